//! The triangles of matrices.

use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_dtype, on_device,
};
use smallvec::smallvec;

impl Tensor {
    /// Matrices (the last two dimensions) with 0 above the given diagonal: 0 is the main one, 1 the next above.
    ///
    /// # Errors
    /// If there are fewer than two dimensions.
    #[track_caller]
    pub fn tril(&self, diagonal: i64) -> Result<Tensor> {
        self.triangle(diagonal, false)
    }

    /// Matrices (the last two dimensions) with 0 below the given diagonal: 0 is the main one, 1 the next above.
    ///
    /// # Errors
    /// If there are fewer than two dimensions.
    #[track_caller]
    pub fn triu(&self, diagonal: i64) -> Result<Tensor> {
        self.triangle(diagonal, true)
    }

    #[track_caller]
    fn triangle(&self, diagonal: i64, upper: bool) -> Result<Tensor> {
        let op = if upper { "triu" } else { "tril" };
        ensure!(self.rank() >= 2, op, "needs matrices, got shape {:?}", self.shape());
        let y = on_device!(
            self,
            op,
            for_dtype!(self.dtype(), T => Ok(cpu::triangle::<T>(self, diagonal, upper, op))),
            gpu::triangle(self, diagonal, upper, op)
        )?;
        y.record([self], Triangle { diagonal, upper })
    }
}

struct Triangle {
    diagonal: i64,
    upper: bool,
}
impl Backward for Triangle {
    const NAME: &'static str = "tril/triu";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.triangle(self.diagonal, self.upper)?)])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            elementwise,
            parallel::{SharedMut, for_rows},
        },
        dtype::Element,
    };

    pub fn triangle<T: Element>(x: &Tensor, diagonal: i64, upper: bool, op: &'static str) -> Tensor {
        let (rows, columns) = (x.shape()[x.rank() - 2], x.shape()[x.rank() - 1]);
        let mut out = elementwise::to_vec::<T>(x);
        let target = SharedMut::new(&mut out);
        for_rows(x.numel() / columns.max(1), columns, |range| {
            for row in range {
                let to = unsafe { target.slice(row * columns..(row + 1) * columns) };
                let first = ((row % rows) as i64).saturating_add(diagonal);
                let cut = |at: i64| at.clamp(0, columns as i64) as usize;
                let zeroed = if upper { 0..cut(first) } else { cut(first.saturating_add(1))..columns };
                to[zeroed].fill(T::default());
            }
        });
        Tensor::from_cpu(out, x.shape(), op)
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::gpu::{self, sys};

    pub fn triangle(x: &Tensor, diagonal: i64, upper: bool, op: &'static str) -> Result<Tensor> {
        let y = gpu::empty(x, x.shape(), x.dtype(), op)?;
        gpu::launch(op, [x, &y], |[x, y], stream| unsafe {
            sys::smalti_triangle(&x, diagonal, upper.into(), &y, stream)
        })?;
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    #[test]
    fn any_diagonal_and_gradients() -> Result<()> {
        let ones = Tensor::ones([2, 3], DType::I64)?;
        assert_eq!(ones.tril(0)?.to_vec::<i64>()?, [1, 0, 0, 1, 1, 0]);
        assert_eq!(ones.triu(1)?.to_vec::<i64>()?, [0, 1, 1, 0, 0, 1]);
        assert_eq!(ones.tril(i64::MAX)?.to_vec::<i64>()?, [1; 6]);
        assert_eq!(ones.triu(i64::MAX)?.to_vec::<i64>()?, [0; 6]);
        assert_eq!(ones.narrow(1, 0, 0)?.tril(0)?.shape(), [2, 0]);
        assert!(Tensor::scalar(1.0).tril(0).is_err());
        let x = Tensor::randn([2, 3, 4], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        gradcheck(|t| t[0].transpose(0, 2)?.tril(-1), std::slice::from_ref(&x))?;
        gradcheck(|t| t[0].triu(1), &[x])
    }
}
