//! Joining and splitting along a dimension.

use crate::{
    DType, Dim, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    bail,
    cpu::elementwise,
    ensure, for_dtype, on_device,
    shape::{Dims, count},
};
use std::borrow::Borrow;

impl Tensor {
    /// Joins tensors along `dim`; all other sizes agree. Different dtypes meet in the widest. The result has
    /// the memory order of the first tensor, so channels-last stays channels-last.
    ///
    /// # Errors
    /// If there is no tensor, one is a scalar, or shapes differ elsewhere than in `dim`.
    #[track_caller]
    pub fn cat<T: Borrow<Tensor>>(tensors: &[T], dim: impl Dim) -> Result<Tensor> {
        let Some(first) = tensors.first().map(Borrow::borrow) else {
            bail!("cat", "needs at least one tensor");
        };
        ensure!(first.rank() > 0, "cat", "scalars cannot be joined; `stack` them");
        let dim = dim.of("cat", first)?;
        let dtype = tensors.iter().fold(DType::Bool, |d, t| d.promote(t.borrow().dtype()));
        let mut parts = Vec::with_capacity(tensors.len());
        for t in tensors {
            let t = t.borrow();
            let fits = t.rank() == first.rank()
                && (0..t.rank()).all(|d| d == dim || t.shape()[d] == first.shape()[d]);
            ensure!(
                fits,
                "cat",
                "shapes {:?} and {:?} may differ in dimension {dim} only",
                first.shape(),
                t.shape()
            );
            parts.push(t.to_dtype(dtype)?);
        }
        if let [one] = &parts[..] {
            return Ok(one.clone());
        }
        let y = on_device!(
            first,
            "cat",
            for_dtype!(dtype, T => Ok(cpu::cat::<T>(&parts, dim))),
            gpu::cat(&parts, dim)
        )?;
        let sizes = parts.iter().map(|t| t.shape()[dim]).collect();
        y.record(&parts, Cat { sizes, dim })
    }

    /// Joins tensors of one shape along a new dimension `dim`.
    ///
    /// # Errors
    /// If there is no tensor or shapes differ.
    #[track_caller]
    pub fn stack<T: Borrow<Tensor>>(tensors: &[T], dim: impl Dim) -> Result<Tensor> {
        let Some(first) = tensors.first().map(Borrow::borrow) else {
            bail!("stack", "needs at least one tensor");
        };
        let dim = dim.index("stack", first.rank() + 1)?;
        let mut parts = Vec::with_capacity(tensors.len());
        for t in tensors {
            let t = t.borrow();
            ensure!(
                t.shape() == first.shape(),
                "stack",
                "shapes {:?} and {:?} differ",
                first.shape(),
                t.shape()
            );
            parts.push(t.unsqueeze(dim)?);
        }
        Tensor::cat(&parts, dim)
    }

    /// Views of `size` elements along `dim`; the last may be smaller.
    ///
    /// # Errors
    /// If `size` is 0 and the dimension is not.
    #[track_caller]
    pub fn split(&self, size: usize, dim: impl Dim) -> Result<Vec<Tensor>> {
        let dim = dim.of("split", self)?;
        let n = self.dim(dim)?;
        ensure!(size > 0 || n == 0, "split", "pieces of size 0 do not cover dimension {dim} of size {n}");
        let pieces = n.div_ceil(size.max(1)).max(1);
        let sizes: Vec<usize> = (0..pieces).map(|i| size.min(n - i * size)).collect();
        self.split_sizes(&sizes, dim)
    }

    /// Views of the given sizes along `dim`, in order.
    ///
    /// # Errors
    /// If the sizes do not add up to the dimension's.
    #[track_caller]
    pub fn split_sizes(&self, sizes: &[usize], dim: impl Dim) -> Result<Vec<Tensor>> {
        let dim = dim.of("split", self)?;
        ensure!(self.rank() > 0, "split", "a scalar cannot be split");
        let n = self.shape()[dim];
        ensure!(
            sizes.iter().sum::<usize>() == n,
            "split",
            "sizes {sizes:?} do not add up to {n}, the size of dimension {dim}"
        );
        let mut start = 0;
        let mut pieces = Vec::with_capacity(sizes.len());
        for &size in sizes {
            pieces.push(self.narrow(dim, start, size)?);
            start += size;
        }
        Ok(pieces)
    }

    /// At most `chunks` views of ceil(n / chunks) elements along `dim`, the last possibly smaller.
    ///
    /// # Errors
    /// If `chunks` is 0.
    #[track_caller]
    pub fn chunk(&self, chunks: usize, dim: impl Dim) -> Result<Vec<Tensor>> {
        ensure!(chunks > 0, "chunk", "needs at least one chunk");
        let dim = dim.of("chunk", self)?;
        self.split(self.dim(dim)?.div_ceil(chunks), dim)
    }
}

struct Cat {
    sizes: Dims,
    dim: usize,
}

impl Backward for Cat {
    const NAME: &'static str = "cat";
    const TWICE: bool = true;

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let mut start = 0;
        let mut grads = Grads::new();
        for (i, &size) in self.sizes.iter().enumerate() {
            grads.push(ctx.grad(i, || grad.narrow(self.dim, start, size))?);
            start += size;
        }
        Ok(grads)
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{elementwise::dense_strides, parallel::SharedMut, pool::CpuVec},
        dtype::Element,
    };

    pub fn cat<T: Element>(parts: &[Tensor], dim: usize) -> Tensor {
        let mut shape = Dims::from_slice(parts[0].shape());
        shape[dim] = parts.iter().map(|t| t.shape()[dim]).sum();
        let order = elementwise::result_order(parts[0].shape(), &[&parts[0]]);
        let strides = dense_strides(&shape, &order);
        let mut out = CpuVec::<T>::new(count(&shape));
        let mut target = SharedMut::new(&mut out);
        for part in parts.iter().filter(|t| t.numel() > 0) {
            unsafe {
                elementwise::copy_into(part, target, &strides, &order);
                target = target.from(part.shape()[dim] as isize * strides[dim]);
            }
        }
        Tensor::from_cpu_strided(out, shape, strides, "cat")
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::{
        cpu::elementwise::dense_strides,
        gpu::{self, sys},
    };

    pub fn cat(parts: &[Tensor], dim: usize) -> Result<Tensor> {
        let mut shape = Dims::from_slice(parts[0].shape());
        shape[dim] = parts.iter().map(|t| t.shape()[dim]).sum();
        let order = elementwise::result_order(parts[0].shape(), &[&parts[0]]);
        let y =
            gpu::empty_strided(&parts[0], &shape, dense_strides(&shape, &order), parts[0].dtype(), "cat")?;
        let mut start = 0;
        for part in parts.iter().filter(|t| t.numel() > 0) {
            let place = y.narrow(dim, start, part.shape()[dim])?;
            gpu::launch("cat", [part, &place], |[part, place], stream| unsafe {
                sys::smalti_copy(&part, &place, stream)
            })?;
            start += part.shape()[dim];
        }
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck, shape::IntoShape};

    fn random(shape: impl IntoShape, seed: u64) -> Result<Tensor> {
        Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
    }

    #[test]
    fn cat_joins_views_and_empty_tensors() -> Result<()> {
        let x = Tensor::arange(6, DType::F32)?.reshape([2, 3])?;
        let y = Tensor::cat(&[&x.t()?, &x.reshape([3, 2])?.narrow(1, 0, 0)?, &x.reshape([3, 2])?], 1)?;
        assert_eq!(y.to_vec::<f32>()?, [0., 3., 0., 1., 1., 4., 2., 3., 2., 5., 4., 5.]);
        let image = random([2, 3, 4, 5], 1)?.to_channels_last()?;
        let y = Tensor::cat(&[&image, &image.contiguous()?], 1)?;
        assert_eq!(y.strides(), [120, 1, 30, 6], "channels-last stays");
        assert_eq!(y.narrow(1, 3, 3)?.to_vec::<f64>()?, image.to_vec::<f64>()?);
        assert_eq!(Tensor::cat(&[&x, &x.to_dtype(DType::F64)?], 0)?.dtype(), DType::F64);
        Ok(())
    }

    #[test]
    fn bad_arguments_are_errors() -> Result<()> {
        let x = Tensor::zeros([2, 3], DType::F32)?;
        assert!(Tensor::cat::<Tensor>(&[], 0).is_err() && Tensor::stack::<Tensor>(&[], 0).is_err());
        assert!(Tensor::cat(&[Tensor::scalar(1.0)], 0).is_err());
        assert!(Tensor::cat(&[&x, &x.t()?], 0).is_err() && Tensor::stack(&[&x, &x.t()?], 0).is_err());
        assert!(x.split(0, 0).is_err() && x.chunk(0, 0).is_err() && x.split_sizes(&[1, 3], 1).is_err());
        assert!(Tensor::scalar(1.0).split(1, 0).is_err());
        assert_eq!(x.narrow(0, 0, 0)?.chunk(3, 0)?.len(), 1);
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let (a, b) = (random([2, 3], 1)?, random([4, 2], 2)?.t()?);
        gradcheck(|t| Tensor::cat(&[&t[0], &t[1], &t[0]], -1)?.mul(&t[0].narrow(1, 0, 1)?), &[a.clone(), b])?;
        gradcheck(|t| Tensor::stack(&[&t[0], &t[0].exp()?], 1), std::slice::from_ref(&a))?;
        gradcheck(|t| Tensor::stack(&[&t[0], &t[0]], 0), &[Tensor::from_slice(&[2.0], ())?])?;
        gradcheck(
            |t| {
                let p = t[0].split(2, 1)?;
                p[0].mul(&p[1])
            },
            &[a],
        )
    }
}
