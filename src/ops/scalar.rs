//! Arithmetic with a constant, in one pass: `mul * x + add`. Saves nothing.

use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    cpu::elementwise,
    dtype::Real,
    ensure, for_computed, on_device,
};
use smallvec::smallvec;

impl Tensor {
    /// self + value
    ///
    /// # Errors
    /// If the dtype is bool.
    #[track_caller]
    pub fn add_scalar(&self, value: f64) -> Result<Tensor> {
        affine(self, "add_scalar", 1.0, value)
    }

    /// self * value
    ///
    /// # Errors
    /// If the dtype is bool.
    #[track_caller]
    pub fn mul_scalar(&self, value: f64) -> Result<Tensor> {
        affine(self, "mul_scalar", value, 0.0)
    }

    /// -self
    ///
    /// # Errors
    /// If the dtype is bool.
    #[track_caller]
    pub fn neg(&self) -> Result<Tensor> {
        affine(self, "neg", -1.0, 0.0)
    }

    /// self * mul + add. For integers both constants are truncated.
    ///
    /// # Errors
    /// If the dtype is bool.
    #[track_caller]
    pub fn affine(&self, mul: f64, add: f64) -> Result<Tensor> {
        affine(self, "affine", mul, add)
    }
}

#[track_caller]
fn affine(x: &Tensor, op: &'static str, mul: f64, add: f64) -> Result<Tensor> {
    ensure!(x.dtype() != DType::Bool, op, "needs numbers, got a bool tensor");
    let y = on_device!(
        x,
        op,
        if x.dtype().is_float() {
            for_computed!(x.dtype(), op, T => Ok(cpu::float::<T>(op, x, mul, add)))
        } else {
            Ok(cpu::integer(op, x, mul as i64, add as i64))
        },
        crate::gpu::elementwise::map(op, (crate::gpu::sys::SMALTI_AFFINE, [mul, add]), x)
    )?;
    y.record([x], Affine { mul })
}

struct Affine {
    mul: f64,
}
impl Backward for Affine {
    const NAME: &'static str = "affine";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(if self.mul == 1.0 { grad.clone() } else { grad.mul_scalar(self.mul)? })])
    }
}

mod cpu {
    use super::*;

    /// Without the part that does nothing, which would not leave -0 and infinities as they are.
    pub fn float<T: Real>(op: &'static str, x: &Tensor, mul: f64, add: f64) -> Tensor {
        let (m, a) = (T::of(mul), T::of(add));
        if add == 0.0 {
            elementwise::map(op, x, move |v: T| v * m)
        } else if mul == 1.0 {
            elementwise::map(op, x, move |v: T| v + a)
        } else {
            elementwise::map(op, x, move |v: T| v * m + a)
        }
    }

    pub fn integer(op: &'static str, x: &Tensor, mul: i64, add: i64) -> Tensor {
        elementwise::map(op, x, move |v: i64| v.wrapping_mul(mul).wrapping_add(add))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype() -> Result<()> {
        let x = Tensor::from_slice(&[-3i32, 0, 5], [3])?;
        assert_eq!(x.affine(2.0, 1.0)?.to_vec::<i32>()?, [-5, 1, 11]);
        assert_eq!(x.neg()?.to_vec::<i32>()?, [3, 0, -5]);
        assert_eq!(
            x.to_dtype(DType::BF16)?.affine(0.5, 1.0)?.to_dtype(DType::F32)?.to_vec::<f32>()?[0],
            -0.5
        );
        assert!(x.to_dtype(DType::Bool)?.neg().is_err());
        let zero = Tensor::scalar(-0.0).mul_scalar(1.0)?;
        assert!(zero.item()?.is_sign_negative());
        Ok(())
    }
}
