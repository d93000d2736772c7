//! `&a + &b`, `&a * 2.0`, `-&a`: shorthand for the methods. The value is a `Result`, since shapes may not fit:
//! `let y = (&a + &b)?;`

use crate::{Result, Tensor};
use std::ops::{Add, Div, Mul, Neg, Sub};

macro_rules! operators {
    ($($trait:ident $name:ident: |$x:ident, $value:ident| $scalar:expr, $reverse:expr;)+) => {$(
        impl $trait for &Tensor {
            type Output = Result<Tensor>;
            #[track_caller]
            fn $name(self, other: &Tensor) -> Result<Tensor> {
                Tensor::$name(self, other)
            }
        }
        impl $trait<f64> for &Tensor {
            type Output = Result<Tensor>;
            #[track_caller]
            fn $name(self, value: f64) -> Result<Tensor> {
                let ($x, $value) = (self, value);
                $scalar
            }
        }
        impl $trait<&Tensor> for f64 {
            type Output = Result<Tensor>;
            #[track_caller]
            fn $name(self, tensor: &Tensor) -> Result<Tensor> {
                let ($x, $value) = (tensor, self);
                $reverse
            }
        }
    )+};
}
operators! {
    Add add: |x, value| x.add_scalar(value), x.add_scalar(value);
    Sub sub: |x, value| x.add_scalar(-value), x.affine(-1.0, value);
    Mul mul: |x, value| x.mul_scalar(value), x.mul_scalar(value);
    Div div: |x, value| x.div(&Tensor::full((), value, x.dtype())?), x.recip()?.mul_scalar(value);
}

impl Neg for &Tensor {
    type Output = Result<Tensor>;
    #[track_caller]
    fn neg(self) -> Result<Tensor> {
        Tensor::neg(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_are_the_methods() -> Result<()> {
        let (a, b) = (Tensor::scalar(6.0), Tensor::scalar(4.0));
        let y = [&a + &b, &a - &b, &a * &b, &a / &b, &a + 1.0, &a - 1.0, &a * 2.0, &a / 4.0, -&a];
        let y: Result<Vec<f64>> = y.into_iter().map(|y| y?.item()).collect();
        assert_eq!(y?, [10., 2., 24., 1.5, 7., 5., 12., 1.5, -6.]);
        let y = [1.0 + &a, 1.0 - &a, 2.0 * &a, 3.0 / &a];
        let y: Result<Vec<f64>> = y.into_iter().map(|y| y?.item()).collect();
        assert_eq!(y?, [7., -5., 12., 0.5]);
        Ok(())
    }
}
