//! The innermost loops of convolutions, over channels-last memory: a tile of pixels by channels is kept in
//! registers while the kernel's taps go by.
//!
//! Written once over [`Lanes`], 16 numbers at a time: AVX-512 registers for f32 where the processor has them,
//! arrays elsewhere (which the compiler turns into whatever there is).

use crate::{
    cpu::simd::{LANES, simd_narrow},
    dtype::Real,
};

/// 16 numbers.
pub trait Lanes<T>: Copy {
    /// Which of the lanes take part in a load or store.
    type Mask: Copy;
    /// The first `n` lanes.
    fn mask(n: usize) -> Self::Mask;
    fn splat(value: T) -> Self;
    unsafe fn load(from: *const T) -> Self;
    /// Zero where the mask is not set.
    unsafe fn load_some(from: *const T, mask: Self::Mask) -> Self;
    unsafe fn store_some(self, to: *mut T, mask: Self::Mask);
    unsafe fn store(self, to: *mut T);
    /// self + a * b
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
}

impl<T: Real> Lanes<T> for [T; LANES] {
    type Mask = usize;
    #[inline(always)]
    fn mask(n: usize) -> usize {
        n
    }
    #[inline(always)]
    fn splat(value: T) -> Self {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const T) -> Self {
        unsafe { from.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_some(from: *const T, n: usize) -> Self {
        if n >= LANES {
            return unsafe { Self::load(from) };
        }
        let mut lanes = [T::ZERO; LANES];
        (0..n).for_each(|i| lanes[i] = unsafe { *from.add(i) });
        lanes
    }
    #[inline(always)]
    unsafe fn store_some(self, to: *mut T, n: usize) {
        if n >= LANES {
            return unsafe { self.store(to) };
        }
        (0..n).for_each(|i| unsafe { *to.add(i) = self[i] });
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut T) {
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn add_product(mut self, a: Self, b: Self) -> Self {
        for i in 0..LANES {
            self[i] = a[i].mul_add(b[i], self[i]);
        }
        self
    }
    #[inline(always)]
    unsafe fn add(mut self, other: Self) -> Self {
        for i in 0..LANES {
            self[i] += other[i];
        }
        self
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::Lanes;
    use std::arch::x86_64::*;

    impl Lanes<f32> for __m512 {
        type Mask = __mmask16;
        #[inline(always)]
        fn mask(n: usize) -> __mmask16 {
            if n >= 16 { !0 } else { (1 << n) - 1 }
        }
        #[inline(always)]
        fn splat(value: f32) -> Self {
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_some(from: *const f32, mask: __mmask16) -> Self {
            unsafe { _mm512_maskz_loadu_ps(mask, from) }
        }
        #[inline(always)]
        unsafe fn store_some(self, to: *mut f32, mask: __mmask16) {
            unsafe { _mm512_mask_storeu_ps(to, mask, self) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { _mm512_add_ps(self, other) }
        }
    }
}

/// Input elements that lie in one row of memory, against rows of packed weights.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Position of the first, relative to the pixel.
    pub x: isize,
    /// Position of the first weight in its panel.
    pub w: usize,
    /// How many.
    pub len: usize,
}

/// Work for one tile: `P` pixels side by side by `NV * 16` channels.
pub struct Tile<'a, T> {
    pub runs: &'a [Run],
    pub x: *const T,
    /// From pixel to pixel of the input.
    pub step: isize,
    pub w: *const T,
    /// What the sums start with: a row of the panel's width, or (null) what stands in `out`.
    pub bias: *const T,
    pub out: *mut T,
    pub out_step: isize,
    /// Channels that exist.
    pub valid: usize,
}

/// Work for one tile of a weight gradient: `P` rows of the panel by `NV * 16` channels, summed over pixels.
pub struct Outer<T> {
    pub x: *const T,
    /// From image to image, row to row, pixel to pixel.
    pub x_steps: [isize; 3],
    pub g: *const T,
    pub g_steps: [isize; 3],
    /// Images, rows and columns of pixels.
    pub pixels: [usize; 3],
    /// Added to; rows of the panel's width.
    pub out: *mut T,
    /// Has nothing been written there yet? Then the sums are, without a look at what memory holds.
    pub fresh: bool,
    pub valid: usize,
    /// Of each row of the panel, relative to the pixel (depthwise only).
    pub offsets: *const isize,
}

impl<T> Outer<T> {
    /// Rows that follow each other without a gap become one long row, then images likewise.
    pub fn merge(&mut self) {
        for d in [1, 0] {
            let even = |steps: [isize; 3]| steps[d] == self.pixels[2] as isize * steps[2];
            if (d == 1 || self.pixels[1] == 1) && even(self.x_steps) && even(self.g_steps) {
                self.pixels[2] *= self.pixels[d];
                self.pixels[d] = 1;
            }
        }
    }

    /// Adds to register `at` of the rows.
    #[inline(always)]
    unsafe fn add<V: Lanes<T>>(&self, at: usize, sums: V) {
        unsafe {
            let to = self.out.add(at * LANES);
            let sums = if self.fresh { sums } else { V::load(to).add(sums) };
            sums.store(to);
        }
    }

    /// Calls `f` with the first pixel of each row, of x and of g.
    #[inline(always)]
    fn rows(&self, mut f: impl FnMut(*const T, *const T)) {
        for image in 0..self.pixels[0] as isize {
            for row in 0..self.pixels[1] as isize {
                let at = |steps: [isize; 3]| image * steps[0] + row * steps[1];
                f(self.x.wrapping_offset(at(self.x_steps)), self.g.wrapping_offset(at(self.g_steps)));
            }
        }
    }
}

#[inline(always)]
fn masks<T, V: Lanes<T>, const NV: usize>(valid: usize) -> [V::Mask; NV] {
    let mut masks = [V::mask(0); NV];
    for v in 0..NV {
        masks[v] = V::mask(valid.saturating_sub(v * LANES));
    }
    masks
}

#[inline(always)]
unsafe fn start<T: Real, V: Lanes<T>, const P: usize, const NV: usize>(t: &Tile<T>) -> [[V; NV]; P] {
    let masks = masks::<T, V, NV>(t.valid);
    let mut sums = [[V::splat(T::ZERO); NV]; P];
    for p in 0..P {
        for v in 0..NV {
            sums[p][v] = unsafe {
                if t.bias.is_null() {
                    V::load_some(t.out.offset(p as isize * t.out_step).add(v * LANES), masks[v])
                } else {
                    V::load(t.bias.add(v * LANES))
                }
            };
        }
    }
    sums
}

#[inline(always)]
unsafe fn finish<T: Real, V: Lanes<T>, const P: usize, const NV: usize>(t: &Tile<T>, sums: [[V; NV]; P]) {
    let masks = masks::<T, V, NV>(t.valid);
    for p in 0..P {
        for v in 0..NV {
            unsafe {
                sums[p][v].store_some(t.out.offset(p as isize * t.out_step).add(v * LANES), masks[v]);
            }
        }
    }
}

/// out[p][c] += sum over runs of x[p + run] * w[run][c]
#[inline(always)]
unsafe fn dense<T: Real, V: Lanes<T>, const P: usize, const NV: usize>(t: &Tile<T>) {
    unsafe {
        let mut sums = start::<T, V, P, NV>(t);
        for run in t.runs {
            let (mut x, mut w) = (t.x.offset(run.x), t.w.add(run.w));
            for _ in 0..run.len {
                let mut weights = [V::splat(T::ZERO); NV];
                for v in 0..NV {
                    weights[v] = V::load(w.add(v * LANES));
                }
                for p in 0..P {
                    let value = V::splat(*x.offset(p as isize * t.step));
                    for v in 0..NV {
                        sums[p][v] = sums[p][v].add_product(value, weights[v]);
                    }
                }
                x = x.add(1);
                w = w.add(NV * LANES);
            }
        }
        finish(t, sums);
    }
}

/// out[p][c] += sum over runs of x[p + run][c] * w[run][c]
#[inline(always)]
unsafe fn depthwise<T: Real, V: Lanes<T>, const P: usize>(t: &Tile<T>) {
    unsafe {
        let mask = V::mask(t.valid);
        let mut sums = start::<T, V, P, 1>(t);
        for run in t.runs {
            let (x, weights) = (t.x.offset(run.x), V::load(t.w.add(run.w)));
            for p in 0..P {
                let values = V::load_some(x.offset(p as isize * t.step), mask);
                sums[p][0] = sums[p][0].add_product(values, weights);
            }
        }
        finish(t, sums);
    }
}

/// out[r][c] += sum over pixels of x[pixel + r] * g[pixel][c]
#[inline(always)]
unsafe fn outer<T: Real, V: Lanes<T>, const P: usize, const NV: usize>(t: &Outer<T>) {
    unsafe {
        let masks = masks::<T, V, NV>(t.valid);
        let mut sums = [[V::splat(T::ZERO); NV]; P];
        t.rows(
            #[inline(always)]
            |mut x, mut g| {
                for _ in 0..t.pixels[2] {
                    let mut grads = [V::splat(T::ZERO); NV];
                    for v in 0..NV {
                        grads[v] = V::load_some(g.add(v * LANES), masks[v]);
                    }
                    for r in 0..P {
                        let value = V::splat(*x.add(r));
                        for v in 0..NV {
                            sums[r][v] = sums[r][v].add_product(value, grads[v]);
                        }
                    }
                    x = x.wrapping_offset(t.x_steps[2]);
                    g = g.wrapping_offset(t.g_steps[2]);
                }
            },
        );
        for r in 0..P {
            for v in 0..NV {
                t.add(r * NV + v, sums[r][v]);
            }
        }
    }
}

/// out[r][c] += sum over pixels of x[pixel + offsets[r]][c] * g[pixel][c]
#[inline(always)]
unsafe fn outer_depthwise<T: Real, V: Lanes<T>, const P: usize>(t: &Outer<T>) {
    unsafe {
        let mask = V::mask(t.valid);
        let offsets = *t.offsets.cast::<[isize; P]>();
        let mut sums = [V::splat(T::ZERO); P];
        t.rows(
            #[inline(always)]
            |mut x, mut g| {
                for _ in 0..t.pixels[2] {
                    let grads = V::load_some(g, mask);
                    for r in 0..P {
                        sums[r] = sums[r].add_product(V::load_some(x.offset(offsets[r]), mask), grads);
                    }
                    x = x.wrapping_offset(t.x_steps[2]);
                    g = g.wrapping_offset(t.g_steps[2]);
                }
            },
        );
        for r in 0..P {
            t.add(r, sums[r]);
        }
    }
}

type TileFn<T> = unsafe fn(&Tile<T>);
type OuterFn<T> = unsafe fn(&Outer<T>);

/// The loops for one element type on this processor; entry `i` is for tiles of `i + 1`.
#[derive(Clone, Copy)]
pub struct Kernels<T: 'static> {
    /// By `NV - 1`.
    pub dense: [&'static [TileFn<T>]; 2],
    pub depthwise: &'static [TileFn<T>],
    pub outer: [&'static [OuterFn<T>]; 2],
    pub outer_depthwise: &'static [OuterFn<T>],
}

/// f32 and f64.
pub trait ConvElement: Real {
    fn kernels() -> Kernels<Self>;
}

impl ConvElement for f64 {
    fn kernels() -> Kernels<f64> {
        plain()
    }
}

impl ConvElement for f32 {
    fn kernels() -> Kernels<f32> {
        #[cfg(target_arch = "x86_64")]
        if crate::cpu::simd::has_avx512() {
            return wide::kernels();
        }
        plain()
    }
}

fn plain<T: Real>() -> Kernels<T> {
    unsafe fn dense_plain<T: Real, const P: usize, const NV: usize>(t: &Tile<T>) {
        simd_narrow(
            #[inline(always)]
            || unsafe { dense::<T, [T; LANES], P, NV>(t) },
        );
    }
    unsafe fn depthwise_plain<T: Real, const P: usize>(t: &Tile<T>) {
        simd_narrow(
            #[inline(always)]
            || unsafe { depthwise::<T, [T; LANES], P>(t) },
        );
    }
    unsafe fn outer_plain<T: Real, const P: usize, const NV: usize>(t: &Outer<T>) {
        simd_narrow(
            #[inline(always)]
            || unsafe { outer::<T, [T; LANES], P, NV>(t) },
        );
    }
    unsafe fn outer_depthwise_plain<T: Real, const P: usize>(t: &Outer<T>) {
        simd_narrow(
            #[inline(always)]
            || unsafe { outer_depthwise::<T, [T; LANES], P>(t) },
        );
    }
    Kernels {
        dense: [
            &[dense_plain::<T, 1, 1>, dense_plain::<T, 2, 1>, dense_plain::<T, 3, 1>, dense_plain::<T, 4, 1>],
            &[dense_plain::<T, 1, 2>, dense_plain::<T, 2, 2>],
        ],
        depthwise: &[depthwise_plain::<T, 1>, depthwise_plain::<T, 2>, depthwise_plain::<T, 3>],
        outer: [
            &[outer_plain::<T, 1, 1>, outer_plain::<T, 2, 1>, outer_plain::<T, 3, 1>, outer_plain::<T, 4, 1>],
            &[outer_plain::<T, 1, 2>, outer_plain::<T, 2, 2>],
        ],
        outer_depthwise: &[
            outer_depthwise_plain::<T, 1>,
            outer_depthwise_plain::<T, 2>,
            outer_depthwise_plain::<T, 3>,
        ],
    }
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use super::*;
    use std::arch::x86_64::__m512;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn dense_wide<const P: usize, const NV: usize>(t: &Tile<f32>) {
        unsafe { dense::<f32, __m512, P, NV>(t) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn depthwise_wide<const P: usize>(t: &Tile<f32>) {
        unsafe { depthwise::<f32, __m512, P>(t) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn outer_wide<const P: usize, const NV: usize>(t: &Outer<f32>) {
        unsafe { outer::<f32, __m512, P, NV>(t) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn outer_depthwise_wide<const P: usize>(t: &Outer<f32>) {
        unsafe { outer_depthwise::<f32, __m512, P>(t) }
    }

    /// 14 x 2 sums, 2 rows of weights and a broadcast number fill the 32 registers.
    macro_rules! table {
        ($f:ident $(, $nv:literal)?) => {
            &[
                $f::<1 $(, $nv)?>, $f::<2 $(, $nv)?>, $f::<3 $(, $nv)?>, $f::<4 $(, $nv)?>, $f::<5 $(, $nv)?>,
                $f::<6 $(, $nv)?>, $f::<7 $(, $nv)?>, $f::<8 $(, $nv)?>, $f::<9 $(, $nv)?>, $f::<10 $(, $nv)?>,
                $f::<11 $(, $nv)?>, $f::<12 $(, $nv)?>, $f::<13 $(, $nv)?>, $f::<14 $(, $nv)?>,
            ]
        };
    }

    pub fn kernels() -> Kernels<f32> {
        Kernels {
            dense: [table!(dense_wide, 1), table!(dense_wide, 2)],
            depthwise: table!(depthwise_wide),
            outer: [table!(outer_wide, 1), table!(outer_wide, 2)],
            outer_depthwise: table!(outer_depthwise_wide),
        }
    }
}
