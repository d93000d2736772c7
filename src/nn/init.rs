//! Initial values of parameters, f32, reproducible from a generator.

use crate::{DType, IntoShape, Result, Rng, Tensor};

/// Uniform in [-bound, bound).
///
/// # Errors
/// If the shape is larger than the address space.
#[track_caller]
pub fn uniform(shape: impl IntoShape, bound: f64, rng: &mut Rng) -> Result<Tensor> {
    Tensor::rand(shape, rng)?.mul_scalar(2.0 * bound)?.add_scalar(-bound)
}

/// Normal with mean 0.
///
/// # Errors
/// If the shape is larger than the address space.
#[track_caller]
pub fn normal(shape: impl IntoShape, std: f64, rng: &mut Rng) -> Result<Tensor> {
    Tensor::randn(shape, rng)?.mul_scalar(std)
}

/// Normal with mean 0, values beyond two (absolute) units drawn again: timm's and PyTorch's `trunc_normal_`
/// with its default bounds.
///
/// # Errors
/// If the shape is larger than the address space.
#[track_caller]
pub fn trunc_normal(shape: impl IntoShape, std: f64, rng: &mut Rng) -> Result<Tensor> {
    let shape = shape.into_shape();
    let mut draw = || loop {
        let x = rng.normal() * std;
        if x.abs() <= 2.0 {
            return x as f32;
        }
    };
    let values: Vec<f32> = (0..crate::shape::count(&shape)).map(|_| draw()).collect();
    Tensor::from_slice(&values, shape)
}

/// Xavier (Glorot) uniform for a weight `[out, in, ..]` seen as a matrix of `out` rows.
///
/// # Errors
/// If the shape is larger than the address space.
#[track_caller]
pub fn xavier_uniform(shape: impl IntoShape, rng: &mut Rng) -> Result<Tensor> {
    let shape = shape.into_shape();
    let out = shape.first().copied().unwrap_or(1);
    let fan_in = crate::shape::count(&shape[1.min(shape.len())..]);
    uniform(shape, (6.0 / (fan_in + out) as f64).sqrt(), rng)
}

/// PyTorch's default for weights and biases of linear and convolution layers: uniform within 1/sqrt(fan_in).
///
/// # Errors
/// If the shape is larger than the address space.
#[track_caller]
pub fn fan_in_uniform(shape: impl IntoShape, fan_in: usize, rng: &mut Rng) -> Result<Tensor> {
    uniform(shape, 1.0 / (fan_in.max(1) as f64).sqrt(), rng)
}

/// All zeros.
///
/// # Errors
/// If the shape is larger than the address space.
#[track_caller]
pub fn zeros(shape: impl IntoShape) -> Result<Tensor> {
    Tensor::zeros(shape, DType::F32)
}

/// All ones.
///
/// # Errors
/// If the shape is larger than the address space.
#[track_caller]
pub fn ones(shape: impl IntoShape) -> Result<Tensor> {
    Tensor::ones(shape, DType::F32)
}
