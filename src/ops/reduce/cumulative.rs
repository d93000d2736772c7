//! Cumulative sums. f32 sums are carried in f64, so that long ones keep their digits.

use crate::{
    DType, Dim, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    on_device,
};
use smallvec::smallvec;

impl Tensor {
    /// Sums along `dim` up to and with each element; same shape. Integers and booleans sum to i64.
    ///
    /// # Errors
    /// If there is no such dimension.
    #[track_caller]
    pub fn cumsum(&self, dim: impl Dim) -> Result<Tensor> {
        let dim = dim.of("cumsum", self)?;
        if !self.dtype().is_float() {
            return self.to_dtype(DType::I64)?.running(dim, false);
        }
        Tensor::in_f32([self], |[x]| x.running(dim, false))
    }

    /// Running sums from the first element on, or from the last one back.
    fn running(&self, dim: usize, back: bool) -> Result<Tensor> {
        let x = self.contiguous()?;
        let y = on_device!(
            self,
            "cumsum",
            Ok(match self.dtype() {
                DType::F32 => cpu::running::<f32, f64>(&x, dim, back, |v| v.into(), |a| a as f32),
                DType::F64 => cpu::running::<f64, f64>(&x, dim, back, |v| v, |a| a),
                _ => cpu::running::<i64, i64>(&x, dim, back, |v| v, |a| a),
            }),
            super::gpu::running("cumsum", &x, dim, back)
        )?;
        y.record([self], Cumsum { dim, back })
    }
}

struct Cumsum {
    dim: usize,
    back: bool,
}
impl Backward for Cumsum {
    const NAME: &'static str = "cumsum";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.running(self.dim, !self.back)?)])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            parallel::{GRAIN, Shared, SharedMut, for_ranges},
            pool::CpuVec,
        },
        dtype::Element,
        shape::{Dims, count},
    };

    /// Neighbouring lines that run side by side.
    const TILE: usize = 128;

    /// The trait by which sums are carried.
    pub trait Carry: Copy + Default {
        fn plus(self, other: Self) -> Self;
    }
    impl Carry for f64 {
        #[inline(always)]
        fn plus(self, other: f64) -> f64 {
            self + other
        }
    }
    impl Carry for i64 {
        #[inline(always)]
        fn plus(self, other: i64) -> i64 {
            self.wrapping_add(other)
        }
    }

    pub fn running<T: Element, A: Carry>(
        x: &Tensor,
        dim: usize,
        back: bool,
        widen: impl Fn(T) -> A + Sync,
        narrow: impl Fn(A) -> T + Sync,
    ) -> Tensor {
        let shape = Dims::from_slice(x.shape());
        let n = shape.get(dim).copied().unwrap_or(1);
        let inner = count(shape.get(dim + 1..).unwrap_or(&[]));
        let mut out = CpuVec::<T>::new(x.numel());
        let (source, target) = (Shared(x.cpu_ptr::<T>()), SharedMut::new(&mut out));
        let width = TILE.min(inner).max(1);
        let tiles = inner.div_ceil(width);
        let tasks = if out.is_empty() { 0 } else { x.numel() / (n * inner) * tiles };
        for_ranges(tasks, GRAIN / (n * width).max(1), |range| {
            for task in range {
                let first = task % tiles * width;
                let lines = width.min(inner - first);
                let start = task / tiles * n * inner + first;
                let mut sums = [A::default(); TILE];
                for i in 0..n {
                    let at = start + if back { n - 1 - i } else { i } * inner;
                    for (j, sum) in sums[..lines].iter_mut().enumerate() {
                        unsafe {
                            *sum = sum.plus(widen(*source.ptr().add(at + j)));
                            *target.ptr().add(at + j) = narrow(*sum);
                        }
                    }
                }
            }
        });
        Tensor::from_cpu(out, shape, "cumsum")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck};

    #[test]
    fn values() -> Result<()> {
        let x = Tensor::from_slice(&[1u8, 2, 3, 4, 5, 250], [2, 3])?;
        assert_eq!(x.cumsum(1)?.to_vec::<i64>()?, [1, 3, 6, 4, 9, 259]);
        assert_eq!(x.cumsum(0)?.to_vec::<i64>()?, [1, 2, 3, 5, 7, 253]);
        assert_eq!(
            x.to_dtype(DType::BF16)?.t()?.cumsum(-1)?.to_dtype(DType::F64)?.to_vec::<f64>()?[..4],
            [1., 5., 2., 7.]
        );
        let long = Tensor::ones([300, 1000], DType::F32)?.cumsum(0)?;
        assert_eq!(long.select(0, 299)?.to_vec::<f32>()?, [300.0; 1000]);
        assert_eq!(Tensor::scalar(3.0).cumsum(0)?.item()?, 3.0);
        for dim in [0, 1, 2] {
            assert_eq!(Tensor::zeros([2, 0, 3], DType::F32)?.cumsum(dim)?.shape(), [2, 0, 3]);
        }
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = Tensor::randn([2, 3, 2], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        gradcheck(|t| t[0].cumsum(1), &[x.permute([2, 0, 1])?])?;
        gradcheck(|t| t[0].cumsum(-1), &[x])
    }
}
