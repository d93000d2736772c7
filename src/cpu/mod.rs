//! Helpers for CPU code: buffers, threads, SIMD, matrix products. No operation lives here.

pub mod axis;
pub mod elementwise;
pub mod gemm;
pub mod parallel;
pub mod pool;
pub mod rows;
pub mod simd;
pub mod team;
pub mod transpose;
