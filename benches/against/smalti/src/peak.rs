//! What the processor can do at most: fused multiply-adds between registers, with nothing else in the way.

use crate::worker::{Outputs, Result, Variant, variant};
use std::{arch::x86_64::*, hint::black_box};

/// Sums that run beside each other: more than latency times throughput of any processor so far.
const SUMS: usize = 12;
/// Vector steps of 16 numbers. One thread's GFLOP, as `run.py` has it: 2e-9 * 16 * SUMS * STEPS.
const STEPS: usize = 10_000_000;

macro_rules! peak {
    ($name:ident, $features:literal, $vector:ty, $lanes:literal, $set:ident, $fma:ident) => {
        /// Mean of all sums: each goes to 1, as x / 2 + 1 / 2 does.
        #[target_feature(enable = $features)]
        fn $name() -> f64 {
            let half = $set(black_box(0.5));
            let mut sums = [$set(black_box(0.0)); SUMS];
            for _ in 0..STEPS * 16 / $lanes {
                for sum in &mut sums {
                    *sum = $fma(*sum, half, half);
                }
            }
            // SAFETY: a vector is an array of its lanes.
            let lanes = sums.map(|v| unsafe { std::mem::transmute::<$vector, [f32; $lanes]>(v) });
            lanes.iter().flatten().map(|&v| f64::from(v)).sum::<f64>() / ($lanes * SUMS) as f64
        }
    };
}
peak!(avx512, "avx512f", __m512, 16, _mm512_set1_ps, _mm512_fmadd_ps);
peak!(avx2, "avx2,fma", __m256, 8, _mm256_set1_ps, _mm256_fmadd_ps);

/// The loops that this processor can run, on so many threads.
pub fn variants(threads: usize) -> Vec<Variant> {
    let on_all = move |f: fn() -> f64| {
        move || {
            let means: Vec<f64> = std::thread::scope(|s| {
                let running: Vec<_> = (0..threads).map(|_| s.spawn(f)).collect();
                running.into_iter().map(|t| t.join().unwrap_or(f64::NAN)).collect()
            });
            Ok(Box::new(move || Ok(vec![means.iter().sum::<f64>() / means.len() as f64])) as Outputs)
                as Result<Outputs>
        }
    };
    let mut all = Vec::new();
    // SAFETY: called only where the processor has what the function was compiled for.
    if is_x86_feature_detected!("avx512f") {
        all.push(variant("AVX-512", on_all(|| unsafe { avx512() })));
    }
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        all.push(variant("AVX2", on_all(|| unsafe { avx2() })));
    }
    all
}
