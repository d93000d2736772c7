//! One source, several instruction sets: [`simd`] runs a closure compiled for AVX-512, for AVX2+FMA, or for
//! the plain target, whichever the processor has. Code inside is ordinary Rust that the compiler vectorises;
//! what it calls must be `#[inline(always)]`.
//!
//! Reductions keep [`LANES`] partial results, so that they vectorise and give the same sums everywhere.

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

/// Runs `f` with the best instruction set of this processor.
#[inline(always)]
pub fn simd<R>(f: impl FnOnce() -> R) -> R {
    match level() {
        Level::Plain => f(),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2(f) },
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512(f) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,f16c,lzcnt")]
unsafe fn avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[cfg(target_arch = "x86_64")]
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
            let y = simd(|| f(x));
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
    }

    #[test]
    fn ends_of_the_range() {
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert!(exp_f32(f32::NAN).is_nan() && erf_f32(f32::NAN).is_nan() && tanh_f32(f32::NAN).is_nan());
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!((erf_f32(f32::INFINITY), erf_f32(f32::NEG_INFINITY)), (1.0, -1.0));
        assert_eq!((tanh_f32(f32::INFINITY), tanh_f32(f32::NEG_INFINITY)), (1.0, -1.0));
    }
}
