//! One source, several instruction sets: `simd!` runs a call compiled for AVX-512, for AVX2+FMA, or for the
//! plain target, whichever the processor has. Code inside is ordinary Rust that the compiler vectorises. For
//! that, three things must hold, or the loop silently runs one element at a time, some fifty times slower:
//!
//! - Everything is inlined: functions carry `#[inline(always)]`, and so do closures with more than a few
//!   operations, where they are passed: `rows(a, out, #[inline(always)] |x| x.exp())`. (A closure bound by `let`
//!   cannot carry it.)
//! - The loop stands in a function that takes slices, not in a closure that captures them: through captures
//!   the compiler cannot see that input and output do not overlap.
//! - Bounds checks are hoisted: cut all slices to one length before the loop.
//!
//! Reductions keep [`LANES`] partial results, so that they vectorise and give the same sums everywhere.

use crate::dtype::{DType, Element};
use std::sync::OnceLock;

/// Width of explicit lane arrays: one AVX-512 register of f32, two of AVX2.
pub const LANES: usize = 16;

#[derive(Clone, Copy, PartialEq)]
enum Level {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            let v3 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let v4 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if v3 && v4 {
                return Level::Avx512;
            }
            if v3 {
                return Level::Avx2;
            }
        }
        Level::Plain
    })
}

/// Does this processor have AVX-512? For loops that choose their register tiles themselves.
#[cfg(target_arch = "x86_64")]
pub fn has_avx512() -> bool {
    level() == Level::Avx512
}

/// `simd!(kernel(a, b, out))`: the call with the best instruction set of this processor. Moves what it names.
macro_rules! call {
    ($call:expr) => {
        $crate::cpu::simd::simd(
            #[inline(always)]
            move || $call,
        )
    };
}
pub(crate) use call as simd;

/// Calls the code with 16 lanes at a time, then one by one: `each!(range, |at, L| code)`. Where the code collects its
/// results in a local array of `L` numbers, which no operand overlaps, its loops over the lanes vectorise.
macro_rules! each {
    ($range:expr, |$at:ident, $L:ident| $body:expr) => {{
        let range: std::ops::Range<usize> = $range;
        let mut $at = range.start;
        while $at + $crate::cpu::simd::LANES <= range.end {
            const $L: usize = $crate::cpu::simd::LANES;
            $body;
            $at += $L;
        }
        while $at < range.end {
            const $L: usize = 1;
            $body;
            $at += $L;
        }
    }};
}
pub(crate) use each;

/// Runs `f` with the best instruction set of this processor. `simd!` is the way to call it.
#[inline(always)]
pub fn simd<R>(f: impl FnOnce() -> R) -> R {
    match level() {
        Level::Plain => f(),
        #[cfg(all(target_arch = "x86_64", not(debug_assertions)))]
        Level::Avx512 => unsafe { avx512(f) },
        // Builds for development leave out the version that takes longest to compile.
        #[cfg(target_arch = "x86_64")]
        _ => unsafe { avx2(f) },
    }
}

/// [`simd`] for code over elements of type `T`: worth every instruction set for f32 and the half types; f64 and
/// integers, which no model computes in, are compiled once.
#[inline(always)]
pub fn simd_of<T: Element, R>(f: impl FnOnce() -> R) -> R {
    if const { matches!(T::DTYPE, DType::F32 | DType::BF16 | DType::F16) } { simd(f) } else { f() }
}

/// [`simd`] without AVX-512, for loops that have their own code for it.
#[inline(always)]
pub fn simd_narrow<R>(f: impl FnOnce() -> R) -> R {
    match level() {
        Level::Plain => f(),
        #[cfg(target_arch = "x86_64")]
        _ => unsafe { avx2(f) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,f16c,lzcnt")]
unsafe fn avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[cfg(all(target_arch = "x86_64", not(debug_assertions)))]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,f16c,lzcnt")]
unsafe fn avx512<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// e^x, below 1 ulp off; 0 and infinity beyond the range, NaN kept. No branches, so that loops vectorise.
#[inline(always)]
pub fn exp_f32(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let clamped = if x > 88.8 { 88.8 } else { x };
    let clamped = if clamped < -104.0 { -104.0 } else { clamped };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    // ln 2 in two parts: the first has trailing zeros, so that n * part is exact
    let r = n.mul_add(-0.693_359_375, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 5e-1);
    let y = p.mul_add(r * r, r) + 1.0;
    // 2^n in two factors, so that results near both ends of the range neither overflow nor vanish early
    let n = (shifted.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
    let half = n >> 1;
    let a = f32::from_bits((half.wrapping_add(127) << 23) as u32);
    let b = f32::from_bits((n.wrapping_sub(half).wrapping_add(127) << 23) as u32);
    let y = y * a * b;
    let y = if x > 88.722_84 { f32::INFINITY } else { y };
    let y = if x < -103.972_08 { 0.0 } else { y };
    if x.is_nan() { x } else { y }
}

/// e^x for x up to 88, below 1 ulp off: half the instructions of [`exp_f32`], for softmax, whose arguments are differences
/// from a maximum. Below -87.7, next to the smallest normal number, it gives 0. NaN is kept.
#[inline(always)]
pub fn exp_low_f32(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // as in `exp_f32`
    let x = if x < -88.02 { -88.02 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = n.mul_add(-0.693_359_375, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 5e-1);
    // 2^n; n = -127 gives 0. The integer n stands in the lowest bits of the shifted number.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    (p.mul_add(r * r, r) + 1.0) * scale
}

/// The error function, about 1 ulp. After N. Juffa's two-interval minimax approximation.
#[inline(always)]
pub fn erf_f32(x: f32) -> f32 {
    let t = x.abs();
    let s = x * x;
    let large = {
        let r = (-1.728_534_7e-5_f32).mul_add(t, 3.831_972e-4);
        let u = (-3.883_964e-3_f32).mul_add(t, 2.425_462_2e-2);
        let r = r.mul_add(s, u);
        let r = r.mul_add(t, -1.067_778_8e-1);
        let r = r.mul_add(t, -6.348_467e-1);
        let r = r.mul_add(t, -1.287_175_1e-1);
        let r = r.mul_add(t, -t);
        (1.0 - exp_f32(r)).copysign(x)
    };
    let small = {
        let r = (-5.967_617e-4_f32).mul_add(s, 4.991_194_2e-3);
        let r = r.mul_add(s, -2.676_813_5e-2);
        let r = r.mul_add(s, 1.128_199_25e-1);
        let r = r.mul_add(s, -3.761_253_4e-1);
        let r = r.mul_add(s, 1.283_791_66e-1);
        r.mul_add(x, x)
    };
    if t > 0.927_734_4 { large } else { small }
}

/// tanh x, a few ulp: a polynomial near 0, where 1 - 2/(e^2x + 1) would cancel.
#[inline(always)]
pub fn tanh_f32(x: f32) -> f32 {
    let t = x.abs();
    let s = x * x;
    let small = {
        let r = (-5.704_988_7e-3_f32).mul_add(s, 2.063_908_9e-2);
        let r = r.mul_add(s, -5.373_971_3e-2);
        let r = r.mul_add(s, 1.333_144_3e-1);
        let r = r.mul_add(s, -3.333_328_2e-1);
        (r * s).mul_add(x, x)
    };
    let large = (1.0 - 2.0 / (exp_f32(2.0 * t) + 1.0)).copysign(x);
    if t < 0.625 { small } else { large }
}

/// Natural logarithm, below 1 ulp off. After FreeBSD's `logf`, without branches.
#[inline(always)]
pub fn ln_f32(x: f32) -> f32 {
    const SQRT_HALF: u32 = 0x3f35_04f3;
    let subnormal = x < f32::MIN_POSITIVE;
    let scaled = if subnormal { x * 33_554_432.0 } else { x };
    let bias = if subnormal { -25.0 } else { 0.0 };
    // x = m * 2^e with m in [sqrt(1/2), sqrt(2))
    let bits = scaled.to_bits().wrapping_sub(SQRT_HALF);
    let e = (bits as i32 >> 23) as f32 + bias;
    let f = f32::from_bits((bits & 0x007f_ffff).wrapping_add(SQRT_HALF)) - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let w = z * z;
    let r = w.mul_add(0.242_790_79, 0.400_009_72) * w + w.mul_add(0.284_987_87, 0.666_666_6) * z;
    let half = 0.5 * f * f;
    // ln 2 in two parts: the first has trailing zeros, so that e * part is exact
    let y = e.mul_add(9.058_000_6e-6, s * (half + r)) - half + f;
    let y = e.mul_add(0.693_138_1, y);
    let y = if x == 0.0 { f32::NEG_INFINITY } else { y };
    let y = if x < 0.0 { f32::NAN } else { y };
    if x < f32::INFINITY { y } else { x }
}

/// Sine and cosine of `t` turns, 0 <= t < 1, errors below 1e-7: polynomials on an eighth of a turn to both sides.
#[inline(always)]
pub fn turn_f32(t: f32) -> (f32, f32) {
    let quarters = 4.0 * t;
    let k = (quarters + 0.5) as i32;
    let r = quarters - k as f32;
    let q = r * r;
    let s = q.mul_add(1.604_411_85e-4, -4.681_754_1e-3);
    let s = s.mul_add(q, 7.969_262_6e-2);
    let s = s.mul_add(q, -6.459_641_0e-1);
    // of the fit, as the rest: the f32 below pi / 2; the kernels have the same
    let s = s.mul_add(q, 1.570_796_25) * r;
    let c = q.mul_add(-2.520_204_2e-5, 9.192_602_7e-4);
    let c = c.mul_add(q, -2.086_348_1e-2);
    let c = c.mul_add(q, 2.536_695_1e-1);
    let c = c.mul_add(q, -1.233_700_5);
    let c = c.mul_add(q, 1.0);
    let (sin, cos) = if k & 1 == 1 { (c, s) } else { (s, c) };
    let sin = if k & 2 == 2 { -sin } else { sin };
    let cos = if (k + 1) & 2 == 2 { -cos } else { cos };
    (sin, cos)
}

/// ln(1 + x), a few ulp: the rounding error of 1 + x is divided out (W. Kahan).
#[inline(always)]
pub fn ln_1p_f32(x: f32) -> f32 {
    let u = 1.0 + x;
    let y = ln_f32(u) * (x / (u - 1.0));
    let y = if u == 1.0 { x } else { y };
    let y = if x == -1.0 { f32::NEG_INFINITY } else { y };
    if x < f32::INFINITY { y } else { x }
}

/// Probability that a standard normal variable exceeds |x|, and its density at x; errors below 1e-7.
///
/// The tail is the density times Mills' ratio, which is smooth: a polynomial, fitted on [0, 5.5] so that the
/// error of the product is level.
#[inline(always)]
pub fn normal_f32(x: f32) -> (f32, f32) {
    const MAGIC: f32 = 12_582_912.0; // as in `exp_f32`
    let t = x.abs();
    // beyond 13 the density is subnormal
    let t = if t > 13.0 { 13.0 } else { t };
    let exponent = t * t * (-0.5 * std::f32::consts::LOG2_E);
    let shifted = exponent + MAGIC;
    let r = exponent - (shifted - MAGIC);
    // 2^r / sqrt(2 pi)
    let mut p = 6.168_224e-5_f32;
    p = p.mul_add(r, 5.345_998e-4);
    p = p.mul_add(r, 3.837_049_5e-3);
    p = p.mul_add(r, 2.214_260_2e-2);
    p = p.mul_add(r, 9.583_651e-2);
    p = p.mul_add(r, 2.765_257_4e-1);
    p = p.mul_add(r, 3.989_423e-1);
    let density = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    let t = if t > 5.5 { 5.5 } else { t };
    let mut m = 1.136_470_05e-7_f32;
    m = m.mul_add(t, -3.267_407_7e-6);
    m = m.mul_add(t, 4.250_188e-5);
    m = m.mul_add(t, -3.347_976e-4);
    m = m.mul_add(t, 1.814_407_9e-3);
    m = m.mul_add(t, -7.346_478_8e-3);
    m = m.mul_add(t, 2.375_802_2e-2);
    m = m.mul_add(t, -6.491_698e-2);
    m = m.mul_add(t, 1.558_182e-1);
    m = m.mul_add(t, -3.330_888e-1);
    m = m.mul_add(t, 6.266_203_5e-1);
    m = m.mul_add(t, -9.999_978_5e-1);
    m = m.mul_add(t, 1.253_314_1);
    (density * m, density)
}

/// [`normal_f32`] in f64, to full precision.
pub fn normal_f64(x: f64) -> (f64, f64) {
    let density = (-0.5 * x * x).exp() * 0.398_942_280_401_432_7;
    (0.5 * libm::erfc(x.abs() * std::f64::consts::FRAC_1_SQRT_2), density)
}

/// Sum over a slice, in [`LANES`] partial sums.
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    fold(x, 0.0, |a, b| a + b, |a, b| a + b)
}

/// Largest element (NaN is ignored), -infinity for none.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    fold(x, f32::NEG_INFINITY, larger, larger)
}

/// Folds a slice in [`LANES`] lanes, then the lanes pairwise: a fixed order on every machine.
#[inline(always)]
pub fn fold<T: Copy, A: Copy>(x: &[T], init: A, step: impl Fn(A, T) -> A, join: impl Fn(A, A) -> A) -> A {
    let mut lanes = [init; LANES];
    let mut chunks = x.chunks_exact(LANES);
    for chunk in &mut chunks {
        for i in 0..LANES {
            lanes[i] = step(lanes[i], chunk[i]);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = step(*lane, v);
    }
    join_lanes(lanes, join)
}

/// Joins lanes pairwise.
#[inline(always)]
pub fn join_lanes<A: Copy>(mut lanes: [A; LANES], join: impl Fn(A, A) -> A) -> A {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst(name: &str, low: f32, high: f32, f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) {
        let n = 200_000;
        let mut worst = (0.0f64, 0.0f32);
        for i in 0..=n {
            let x = low + (high - low) * i as f32 / n as f32;
            let y = simd(
                #[inline(always)]
                || f(x),
            );
            let truth = exact(x as f64);
            let error = (y as f64 - truth).abs() / truth.abs().max(1e-30);
            if error > worst.0 {
                worst = (error, x);
            }
        }
        assert!(worst.0 < 2.5e-7, "{name}: relative error {:.1e} at {}", worst.0, worst.1);
    }

    #[test]
    fn accuracy() {
        worst("exp", -87.0, 88.7, exp_f32, f64::exp);
        worst("erf", -6.0, 6.0, erf_f32, libm::erf);
        worst("tanh", -12.0, 12.0, tanh_f32, f64::tanh);
        worst("ln", 1e-3, 8.0, ln_f32, f64::ln);
        worst("ln of tiny numbers", 1e-44, 1e-36, ln_f32, f64::ln);
        worst("ln_1p", -0.9, 4.0, ln_1p_f32, f64::ln_1p);
        for i in 0..100_000 {
            let x = i as f32 * 2e-4 - 10.0;
            let ((tail, density), (exact_tail, exact_density)) = (normal_f32(x), normal_f64(x as f64));
            assert!((tail as f64 - exact_tail).abs() < 1e-7, "tail at {x}: {tail} {exact_tail}");
            assert!((density as f64 - exact_density).abs() < 1e-7, "density at {x}");
        }
    }

    #[test]
    fn turns() {
        for i in 0..100_000 {
            let t = i as f32 / 100_000.0;
            let (sin, cos) = turn_f32(t);
            let angle = std::f64::consts::TAU * f64::from(t);
            assert!(
                (f64::from(sin) - angle.sin()).abs() < 1e-7 && (f64::from(cos) - angle.cos()).abs() < 1e-7
            );
        }
        assert_eq!((turn_f32(0.0), turn_f32(0.25), turn_f32(0.5)), ((0.0, 1.0), (1.0, 0.0), (0.0, -1.0)));
    }

    #[test]
    fn ends_of_the_range() {
        worst("exp_low", -87.6, 88.0, exp_low_f32, f64::exp);
        assert_eq!((exp_low_f32(0.0), exp_low_f32(f32::NEG_INFINITY), exp_low_f32(-1e4)), (1.0, 0.0, 0.0));
        assert!(exp_low_f32(f32::NAN).is_nan() && exp_low_f32(-87.9) <= f32::MIN_POSITIVE);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert!(exp_f32(f32::NAN).is_nan() && erf_f32(f32::NAN).is_nan() && tanh_f32(f32::NAN).is_nan());
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!((erf_f32(f32::INFINITY), erf_f32(f32::NEG_INFINITY)), (1.0, -1.0));
        assert_eq!((ln_f32(0.0), ln_f32(f32::INFINITY)), (f32::NEG_INFINITY, f32::INFINITY));
        assert_eq!((ln_1p_f32(-1.0), ln_1p_f32(f32::INFINITY)), (f32::NEG_INFINITY, f32::INFINITY));
        assert!(ln_f32(-1.0).is_nan() && ln_f32(f32::NAN).is_nan() && ln_1p_f32(-2.0).is_nan());
        assert!(normal_f32(f32::NAN).0.is_nan() && normal_f32(f32::INFINITY).0 < 1e-30);
        assert_eq!((tanh_f32(f32::INFINITY), tanh_f32(f32::NEG_INFINITY)), (1.0, -1.0));
    }
}
