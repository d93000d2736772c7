//! Reading elements at indices.

use crate::{
    DType, Dim, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    bail, ensure, for_size, on_device,
    shape::{Dims, broadcast},
};
use smallvec::smallvec;

impl Tensor {
    /// `out[i][j][k]` = `self[index[i][j][k]][j][k]` for `dim` = 0, and so on. `index` has the tensor's rank; in
    /// dimensions other than `dim` it may be smaller. The gradient is added up at repeated indices.
    ///
    /// # Errors
    /// If the ranks differ, `index` is larger than the tensor elsewhere than in `dim`, is not of an integer
    /// dtype, or holds an index outside `0..n`.
    #[track_caller]
    pub fn gather(&self, dim: impl Dim, index: &Tensor) -> Result<Tensor> {
        let dim = dim.of("gather", self)?;
        self.gather_as("gather", dim, index)
    }

    #[track_caller]
    fn gather_as(&self, op: &'static str, dim: usize, index: &Tensor) -> Result<Tensor> {
        check_shape(op, self, dim, index)?;
        let index = checked(op, index, dim, self.dim(dim)?)?;
        if self.rank() == 0 {
            return self.reshape([1])?.gather_as(op, 0, &index.reshape([1])?)?.reshape(());
        }
        let y = self.moved(|x| {
            on_device!(
                x,
                op,
                for_size!(x.dtype(), T => Ok(cpu::gather::<T>(x, dim, &index, op))),
                gpu::gather(x, dim, &index, op)
            )
        })?;
        y.record([self], Gather { index, dim, from: Dims::from_slice(self.shape()) })
    }

    /// The slices of `dim` that the 1-D `index` names, in its order. The gradient is added up at repeated
    /// indices.
    ///
    /// # Errors
    /// If `index` is not 1-D, not of an integer dtype, or holds an index outside `0..n`.
    #[track_caller]
    pub fn index_select(&self, dim: impl Dim, index: &Tensor) -> Result<Tensor> {
        let dim = dim.of("index_select", self)?;
        let [n] = index.dims("index_select")?;
        let index = checked("index_select", index, dim, self.dim(dim)?)?;
        if self.rank() == 0 {
            return self.reshape([1])?.index_select(0, &index);
        }
        let mut shape = Dims::from_slice(self.shape());
        let mut column: Dims = smallvec![1; self.rank()];
        (shape[dim], column[dim]) = (n, n);
        let spread = index.reshape(column)?.expand(shape)?;
        let y = self.moved(|x| {
            on_device!(
                x,
                "index_select",
                for_size!(x.dtype(), T => Ok(cpu::gather::<T>(x, dim, &spread, "index_select"))),
                gpu::gather(x, dim, &spread, "index_select")
            )
        })?;
        y.record([self], IndexSelect { index, dim, from: Dims::from_slice(self.shape()) })
    }

    /// [`gather`](Self::gather) where tensor and indices first broadcast in the dimensions other than `dim`:
    /// applies the result of [`argsort`](Self::argsort) or `argmax` with kept dimension.
    ///
    /// # Errors
    /// As `gather`, or if the shapes do not broadcast.
    #[track_caller]
    pub fn take_along_dim(&self, indices: &Tensor, dim: impl Dim) -> Result<Tensor> {
        let dim = dim.of("take_along_dim", self)?;
        ensure!(
            indices.rank() == self.rank(),
            "take_along_dim",
            "indices {:?} need the rank of the tensor {:?}",
            indices.shape(),
            self.shape()
        );
        if self.rank() == 0 {
            return self.gather_as("take_along_dim", dim, indices);
        }
        let (mut x, mut i) = (Dims::from_slice(self.shape()), Dims::from_slice(indices.shape()));
        let (n, k) = (std::mem::replace(&mut x[dim], 1), std::mem::replace(&mut i[dim], 1));
        let mut shape = broadcast("take_along_dim", &x, &i)?;
        shape[dim] = k;
        let indices = indices.expand(&shape)?;
        shape[dim] = n;
        self.expand(shape)?.gather_as("take_along_dim", dim, &indices)
    }
}

/// `index` as i64, every element of which lies in `0..size`. On a GPU this waits for the device, unless the index is
/// known to be right: one that was looked at before, or that a kernel of this crate made (argsort, masks).
#[track_caller]
pub(super) fn checked(op: &'static str, index: &Tensor, dim: usize, size: usize) -> Result<Tensor> {
    ensure!(
        matches!(index.dtype(), DType::I64 | DType::I32),
        op,
        "indices must be i64 or i32, got {}",
        index.dtype()
    );
    let index = index.to_dtype(DType::I64)?;
    let outside = on_device!(index, op, Ok(cpu::outside(&index, size)), gpu::outside(&index, size, op))?;
    match outside {
        Some(i) => bail!(op, "index {i} is out of range for dimension {dim} of size {size}"),
        None => Ok(index),
    }
}

/// `index` has the rank of `x` and is nowhere larger but in `dim`.
#[track_caller]
pub(super) fn check_shape(op: &'static str, x: &Tensor, dim: usize, index: &Tensor) -> Result<()> {
    let (a, b) = (x.shape(), index.shape());
    let fits = a.len() == b.len() && (0..a.len()).all(|d| d == dim || b[d] <= a[d]);
    ensure!(
        fits,
        op,
        "index {b:?} must have the rank of the tensor {a:?} and may be larger in dimension {dim} only"
    );
    Ok(())
}

struct Gather {
    index: Tensor,
    dim: usize,
    from: Dims,
}
impl Backward for Gather {
    const NAME: &'static str = "gather";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let zeros = grad.device().scope(|| Tensor::zeros(&self.from, grad.dtype()))?;
        Ok(smallvec![Some(zeros.scatter_add(self.dim, &self.index, grad)?)])
    }
}

struct IndexSelect {
    index: Tensor,
    dim: usize,
    from: Dims,
}
impl Backward for IndexSelect {
    const NAME: &'static str = "index_select";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let zeros = grad.device().scope(|| Tensor::zeros(&self.from, grad.dtype()))?;
        Ok(smallvec![Some(zeros.index_add(self.dim, &self.index, grad, 1.0)?)])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            elementwise::Loop,
            parallel::{Shared, SharedMut},
            pool::CpuVec,
        },
        dtype::Element,
        shape::{Strides, contiguous_strides, count},
    };
    use std::sync::atomic::{AtomicBool, Ordering};

    /// An index that is not in `0..size`, if there is one: the first in row-major order.
    pub fn outside(index: &Tensor, size: usize) -> Option<i64> {
        // An expanded index repeats itself: look at each element once.
        let shape: Dims = index
            .shape()
            .iter()
            .zip(index.strides())
            .map(|(&n, &s)| if s == 0 { n.min(1) } else { n })
            .collect();
        let order: Dims = (0..shape.len()).collect();
        let plan = Loop::<1>::new(&shape, &order, [index.strides()]);
        let [step] = plan.inner();
        let source = Shared(index.cpu_ptr::<i64>());
        let bad = |i: i64| i < 0 || i >= size as i64;
        let found = AtomicBool::new(false);
        plan.par_rows(|[at], n| {
            let row = unsafe { source.ptr().offset(at) };
            let any = (0..n as isize).fold(false, |any, i| any | bad(unsafe { *row.offset(i * step) }));
            if any {
                found.store(true, Ordering::Relaxed);
            }
        });
        let mut first = None;
        if found.into_inner() {
            plan.rows(0..plan.len(), |[at], n| {
                let row = (0..n as isize).map(|i| unsafe { *source.ptr().offset(at + i * step) });
                first = first.or(row.into_iter().find(|&i| bad(i)));
            });
        }
        first
    }

    /// The indices are known to be right.
    pub fn gather<T: Element>(x: &Tensor, dim: usize, index: &Tensor, op: &'static str) -> Tensor {
        let shape = Dims::from_slice(index.shape());
        let mut out = CpuVec::<T>::new(count(&shape));
        let mut base = Strides::from_slice(x.strides());
        let step = std::mem::replace(&mut base[dim], 0);
        let order: Dims = (0..shape.len()).collect();
        let plan = Loop::<3>::new(&shape, &order, [&base, index.strides(), &contiguous_strides(&shape)]);
        let steps = plan.inner();
        let (source, target) = (Shared(x.cpu_ptr::<T>()), SharedMut::new(&mut out));
        let index = Shared(index.cpu_ptr::<i64>());
        plan.par_rows(|[from, at, to], n| unsafe {
            let (from, at, to) = (source.ptr().offset(from), index.ptr().offset(at), target.ptr().offset(to));
            match steps {
                [1, 0, 1] => std::ptr::copy_nonoverlapping(from.offset(*at as isize * step), to, n),
                [s, t, u] => (0..n as isize).for_each(|i| {
                    *to.offset(i * u) = *from.offset(i * s + *at.offset(i * t) as isize * step);
                }),
            }
        });
        Tensor::from_cpu(out, shape, op)
    }
}

#[cfg(gpu)]
pub(super) mod gpu {
    use super::*;
    use crate::gpu::{self, Known, sys};

    /// An index that is not in `0..size`, if there is one: the first in row-major order.
    pub fn outside(index: &Tensor, size: usize, op: &'static str) -> Result<Option<i64>> {
        let size = size as i64;
        if gpu::known(index).below.is_some_and(|below| below <= size) {
            return Ok(None);
        }
        let words = unsafe { sys::smalti_index_check_workspace() } as usize / size_of::<i64>();
        let found = gpu::empty(index, &[words], DType::I64, op)?;
        gpu::launch(op, [index, &found], |[index, found], stream| unsafe {
            sys::smalti_index_check(&index, size, found.ptr.cast(), stream)
        })?;
        match found.narrow(0, 0, 2)?.to_vec::<i64>()?[..] {
            [first, bad] if first >= 0 => Ok(Some(bad)),
            _ => {
                gpu::know(index, Known { below: Some(size), ..Known::default() });
                Ok(None)
            }
        }
    }

    /// The indices are known to be right.
    pub fn gather(x: &Tensor, dim: usize, index: &Tensor, op: &'static str) -> Result<Tensor> {
        let y = gpu::empty(x, index.shape(), x.dtype(), op)?;
        gpu::launch(op, [x, index, &y], |[x, index, y], stream| unsafe {
            sys::smalti_gather(&x, dim as i32, &index, &y, stream)
        })?;
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck};

    fn random<const N: usize>(shape: [usize; N], seed: u64) -> Result<Tensor> {
        Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
    }

    #[test]
    fn out_of_range_names_index_and_size() -> Result<()> {
        let x = random([2, 3], 1)?;
        let index = Tensor::from_slice(&[0i64, 3], [2, 1])?.expand([2, 4])?;
        let error = x.gather(1, &index).map(|_| ()).map_err(|e| e.to_string());
        assert!(error.is_err_and(|e| e.contains("index 3") && e.contains("size 3")));
        assert!(x.index_select(0, &Tensor::from_slice(&[-1i64], [1])?).is_err());
        assert!(x.gather(1, &index.to_dtype(DType::F32)?).is_err());
        assert!(x.gather(1, &Tensor::zeros([3, 1], DType::I64)?).is_err());
        assert!(x.narrow(1, 0, 0)?.gather(1, &Tensor::zeros([2, 1], DType::I64)?).is_err());
        Ok(())
    }

    #[test]
    fn scalars_and_empty_indices() -> Result<()> {
        let x = Tensor::scalar(3.0);
        assert_eq!(x.gather(0, &Tensor::zeros((), DType::I64)?)?.item()?, 3.0);
        assert_eq!(x.index_select(0, &Tensor::zeros([2], DType::I32)?)?.to_vec::<f32>()?, [3.0, 3.0]);
        let none = random([3, 4], 1)?.gather(0, &Tensor::zeros([0, 4], DType::I64)?)?;
        assert_eq!(none.shape(), [0, 4]);
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = random([4, 3], 1)?;
        let index = Tensor::from_slice(&[0i64, 2, 2, 1, 1, 0], [2, 3])?;
        gradcheck(|t| t[0].gather(0, &index), std::slice::from_ref(&x))?;
        gradcheck(|t| t[0].gather(1, &index.t()?), &[random([3, 4], 2)?.t()?.narrow(0, 0, 3)?])?;
        let rows = Tensor::from_slice(&[3i64, 0, 3], [3])?;
        gradcheck(|t| t[0].index_select(0, &rows), std::slice::from_ref(&x))?;
        gradcheck(|t| t[0].index_select(-1, &rows), &[random([4, 2], 3)?.t()?])?;
        let column = Tensor::from_slice(&[1i64, 0], [1, 2])?;
        gradcheck(|t| t[0].take_along_dim(&column, 1), &[x])
    }
}
