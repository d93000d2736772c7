//! Views: other shapes and strides over the same storage. Nothing is copied, but by `reshape` where no view
//! will do and by `contiguous`.

use crate::{
    Dim, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    bail,
    cpu::elementwise,
    ensure, for_dtype, on_device,
    shape::{Dims, IntoShape, Strides, broadcast_strides, checked_count, count},
};
use smallvec::smallvec;

impl Tensor {
    /// Another shape with the same elements in row-major order. A view where the strides allow it, else a copy.
    ///
    /// # Errors
    /// If the number of elements differs.
    #[track_caller]
    pub fn reshape(&self, shape: impl IntoShape) -> Result<Tensor> {
        let shape = shape.into_shape();
        let n = checked_count("reshape", &shape, self.dtype().size())?;
        ensure!(
            n == self.numel(),
            "reshape",
            "shape {shape:?} has {n} elements, the tensor of shape {:?} has {}",
            self.shape(),
            self.numel()
        );
        if shape[..] == *self.shape() {
            return Ok(self.clone());
        }
        let y = match reshaped_strides(self.shape(), self.strides(), &shape) {
            Some(strides) => self.view_as(shape, strides, self.offset(), "reshape"),
            None => {
                let copy = self.detach().contiguous()?;
                let strides = crate::shape::contiguous_strides(&shape);
                copy.view_as(shape, strides, copy.offset(), "reshape")
            }
        };
        y.record([self], Reshape { from: Dims::from_slice(self.shape()) })
    }

    /// Merges dimensions `first..=last` into one.
    ///
    /// # Errors
    /// If a dimension does not exist.
    #[track_caller]
    pub fn flatten(&self, first: impl Dim, last: impl Dim) -> Result<Tensor> {
        let (first, last) = (first.of("flatten", self)?, last.of("flatten", self)?);
        ensure!(first <= last, "flatten", "first dimension {first} lies behind the last, {last}");
        if self.rank() == 0 {
            return self.reshape([1]);
        }
        let mut shape = Dims::from_slice(&self.shape()[..first]);
        shape.push(count(&self.shape()[first..=last]));
        shape.extend_from_slice(&self.shape()[last + 1..]);
        self.reshape(shape)
    }

    /// Splits one dimension into `sizes`.
    ///
    /// # Errors
    /// If the product of the sizes is another.
    #[track_caller]
    pub fn unflatten(&self, dim: impl Dim, sizes: impl IntoShape) -> Result<Tensor> {
        let dim = dim.of("unflatten", self)?;
        let mut shape = Dims::from_slice(&self.shape()[..dim]);
        shape.extend(sizes.into_shape());
        shape.extend_from_slice(self.shape().get(dim + 1..).unwrap_or_default());
        self.reshape(shape)
    }

    /// Row-major order without gaps: itself if it already is so, else a copy.
    ///
    /// # Errors
    /// None on the CPU.
    #[track_caller]
    pub fn contiguous(&self) -> Result<Tensor> {
        if self.is_contiguous() {
            return Ok(self.clone());
        }
        let y = on_device!(
            self,
            "contiguous",
            for_dtype!(self.dtype(), T => Ok(elementwise::contiguous::<T>(self, "contiguous"))),
            crate::gpu::elementwise::contiguous("contiguous", self)
        )?;
        y.record([self], Contiguous)
    }

    /// The dimensions in another order.
    ///
    /// # Errors
    /// If `order` is not a permutation of all dimensions.
    #[track_caller]
    pub fn permute<D: Dim>(&self, order: impl AsRef<[D]>) -> Result<Tensor> {
        let order = order.as_ref();
        ensure!(
            order.len() == self.rank(),
            "permute",
            "the order names {} dimensions, the tensor has {}",
            order.len(),
            self.rank()
        );
        let mut seen = Dims::new();
        for d in order {
            let d = d.of("permute", self)?;
            ensure!(!seen.contains(&d), "permute", "dimension {d} is named twice");
            seen.push(d);
        }
        let shape = seen.iter().map(|&d| self.shape()[d]).collect();
        let strides = seen.iter().map(|&d| self.strides()[d]).collect();
        let y = self.view_as(shape, strides, self.offset(), "permute");
        y.record([self], Permute { order: seen })
    }

    /// Exchanges two dimensions.
    ///
    /// # Errors
    /// If a dimension does not exist.
    #[track_caller]
    pub fn transpose(&self, a: impl Dim, b: impl Dim) -> Result<Tensor> {
        let (a, b) = (a.of("transpose", self)?, b.of("transpose", self)?);
        let mut order: Vec<usize> = (0..self.rank()).collect();
        if self.rank() > 0 {
            order.swap(a, b);
        }
        self.permute(order)
    }

    /// The matrix transposed (the last two dimensions exchanged).
    ///
    /// # Errors
    /// If there are fewer than two dimensions.
    #[track_caller]
    pub fn t(&self) -> Result<Tensor> {
        ensure!(self.rank() >= 2, "t", "needs two dimensions, got shape {:?}", self.shape());
        self.transpose(-2, -1)
    }

    /// Elements `start..start + length` along a dimension.
    ///
    /// # Errors
    /// If they lie outside.
    #[track_caller]
    pub fn narrow(&self, dim: impl Dim, start: usize, length: usize) -> Result<Tensor> {
        let dim = dim.of("narrow", self)?;
        ensure!(self.rank() > 0, "narrow", "a scalar has no dimension to narrow");
        let size = self.shape()[dim];
        ensure!(
            start.checked_add(length).is_some_and(|end| end <= size),
            "narrow",
            "{start}..{start}+{length} lies outside dimension {dim} of size {size}"
        );
        self.step_slice("narrow", dim, start, length, 1)
    }

    /// Elements `start, start + step, ..` below `end` along a dimension.
    ///
    /// # Errors
    /// If they lie outside, or the step is 0.
    #[track_caller]
    pub fn slice(&self, dim: impl Dim, start: usize, end: usize, step: usize) -> Result<Tensor> {
        let dim = dim.of("slice", self)?;
        let size = self.shape().get(dim).copied().unwrap_or(0);
        ensure!(step > 0, "slice", "the step is 0");
        ensure!(
            start <= end && end <= size,
            "slice",
            "{start}..{end} lies outside dimension {dim} of size {size}"
        );
        self.step_slice("slice", dim, start, (end - start).div_ceil(step), step)
    }

    fn step_slice(
        &self,
        op: &'static str,
        dim: usize,
        start: usize,
        length: usize,
        step: usize,
    ) -> Result<Tensor> {
        if start == 0 && length == self.shape()[dim] && step == 1 {
            return Ok(self.clone());
        }
        let mut shape = Dims::from_slice(self.shape());
        let mut strides = Strides::from_slice(self.strides());
        let offset = if length == 0 { 0 } else { start as isize * strides[dim] };
        shape[dim] = length;
        strides[dim] *= step as isize;
        let y = self.view_as(shape, strides, (self.offset() as isize + offset) as usize, op);
        y.record([self], Slice { from: Dims::from_slice(self.shape()), dim, start, step })
    }

    /// Element `index` along a dimension, which goes away.
    ///
    /// # Errors
    /// If it lies outside.
    #[track_caller]
    pub fn select(&self, dim: impl Dim, index: usize) -> Result<Tensor> {
        let dim = dim.of("select", self)?;
        self.narrow(dim, index, 1)?.squeeze(dim)
    }

    /// Takes away a dimension of size 1.
    ///
    /// # Errors
    /// If its size is another.
    #[track_caller]
    pub fn squeeze(&self, dim: impl Dim) -> Result<Tensor> {
        let dim = dim.of("squeeze", self)?;
        let mut shape = Dims::from_slice(self.shape());
        ensure!(shape.get(dim) == Some(&1), "squeeze", "dimension {dim} of shape {shape:?} is not of size 1");
        shape.remove(dim);
        self.reshape(shape)
    }

    /// Puts in a dimension of size 1, so that it becomes dimension `dim`.
    ///
    /// # Errors
    /// If `dim` is out of range.
    #[track_caller]
    pub fn unsqueeze(&self, dim: impl Dim) -> Result<Tensor> {
        let dim = dim.index("unsqueeze", self.rank() + 1)?;
        let mut shape = Dims::from_slice(self.shape());
        shape.insert(dim, 1);
        self.reshape(shape)
    }

    /// Repeats size-1 dimensions to `shape` without a copy; more dimensions may stand in front.
    ///
    /// # Errors
    /// If a size is neither 1 nor what is asked for.
    #[track_caller]
    pub fn expand(&self, shape: impl IntoShape) -> Result<Tensor> {
        let shape = shape.into_shape();
        if shape[..] == *self.shape() {
            return Ok(self.clone());
        }
        let fits = shape.len() >= self.rank()
            && self.shape().iter().rev().zip(shape.iter().rev()).all(|(&a, &b)| a == b || a == 1);
        ensure!(fits, "expand", "shape {:?} does not expand to {shape:?}", self.shape());
        let strides = broadcast_strides(self.shape(), self.strides(), &shape);
        let y = self.view_as(shape, strides, self.offset(), "expand");
        y.record([self], Expand)
    }

    /// The same values with NHWC strides, for a tensor of logical shape `[N, C, H, W]`.
    ///
    /// # Errors
    /// If the rank is not 4.
    #[track_caller]
    pub fn to_channels_last(&self) -> Result<Tensor> {
        if self.rank() != 4 {
            bail!("to_channels_last", "needs shape [N, C, H, W], got {:?}", self.shape());
        }
        self.permute([0, 2, 3, 1])?.contiguous()?.permute([0, 3, 1, 2])
    }
}

/// Strides with which `shape` views the same elements in the same order, if there are any.
fn reshaped_strides(from: &[usize], strides: &[isize], shape: &[usize]) -> Option<Strides> {
    if count(from) == 0 {
        return Some(crate::shape::contiguous_strides(shape));
    }
    let mut result = Strides::from_elem(0, shape.len());
    let old: Vec<usize> = (0..from.len()).filter(|&d| from[d] != 1).collect();
    let (mut i, mut j) = (0, 0);
    // Match groups of old and new dimensions that hold the same number of elements.
    while i < old.len() {
        let (i0, j0) = (i, j);
        let (mut a, mut b) = (from[old[i]], shape[j]);
        while a != b {
            if a < b {
                i += 1;
                a *= from[old[i]];
            } else {
                j += 1;
                b *= shape[j];
            }
        }
        // The old dimensions of the group must step evenly.
        for k in i0..i {
            if strides[old[k]] != strides[old[k + 1]] * from[old[k + 1]] as isize {
                return None;
            }
        }
        let mut step = strides[old[i]];
        for k in (j0..=j).rev() {
            result[k] = step;
            step *= shape[k] as isize;
        }
        i += 1;
        j += 1;
    }
    // What is left of the new shape are ones, whose stride does not matter.
    for k in j..shape.len() {
        result[k] = 1;
    }
    Some(result)
}

struct Reshape {
    from: Dims,
}
impl Backward for Reshape {
    const NAME: &'static str = "reshape";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.reshape(&self.from)?)])
    }
}

struct Contiguous;
impl Backward for Contiguous {
    const NAME: &'static str = "contiguous";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.clone())])
    }
}

struct Permute {
    order: Dims,
}
impl Backward for Permute {
    const NAME: &'static str = "permute";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let mut inverse = vec![0; self.order.len()];
        for (i, &d) in self.order.iter().enumerate() {
            inverse[d] = i;
        }
        Ok(smallvec![Some(grad.permute(inverse)?)])
    }
}

/// The engine sums the repeats.
struct Expand;
impl Backward for Expand {
    const NAME: &'static str = "expand";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.clone())])
    }
}

struct Slice {
    from: Dims,
    dim: usize,
    start: usize,
    step: usize,
}
impl Backward for Slice {
    const NAME: &'static str = "slice";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.slice_backward(&self.from, self.dim, self.start, self.step)?)])
    }
}

impl Tensor {
    /// Zeros of shape `from` with this tensor in the place of a slice.
    fn slice_backward(&self, from: &[usize], dim: usize, start: usize, step: usize) -> Result<Tensor> {
        let y = on_device!(
            self,
            "slice",
            for_dtype!(self.dtype(), T => Ok(cpu::unslice::<T>(self, from, dim, start, step))),
            gpu::unslice(self, from, dim, start, step)
        )?;
        y.record([self], Unslice { length: self.shape()[dim], dim, start, step })
    }
}

struct Unslice {
    length: usize,
    dim: usize,
    start: usize,
    step: usize,
}
impl Backward for Unslice {
    const NAME: &'static str = "slice backward";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.step_slice("slice", self.dim, self.start, self.length, self.step)?)])
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::{Device, gpu::elementwise};

    pub fn unslice(grad: &Tensor, from: &[usize], dim: usize, start: usize, step: usize) -> Result<Tensor> {
        let Device::Cuda(index) = grad.device() else {
            return Err(crate::Error::msg("slice: internal: no GPU"));
        };
        let y = elementwise::full("slice", index, from, 0.0, grad.dtype())?;
        elementwise::copy("slice", grad, &y.step_slice("slice", dim, start, grad.shape()[dim], step)?)?;
        Ok(y)
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{parallel::SharedMut, pool::CpuVec},
        dtype::Element,
        shape::contiguous_strides,
    };

    pub fn unslice<T: Element>(
        grad: &Tensor,
        from: &[usize],
        dim: usize,
        start: usize,
        step: usize,
    ) -> Tensor {
        let mut out = CpuVec::<T>::zeros(count(from));
        let mut strides = contiguous_strides(from);
        let offset = start as isize * strides[dim];
        strides[dim] *= step as isize;
        let order: Dims = (0..from.len()).collect();
        if grad.numel() > 0 {
            unsafe {
                let target = SharedMut::new(&mut out).from(offset);
                elementwise::copy_into::<T>(grad, target, &strides, &order);
            }
        }
        Tensor::from_cpu(out, from, "slice backward")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn reshape_views_where_it_can() -> Result<()> {
        let x = Tensor::arange(24, DType::I64)?.reshape([2, 3, 4])?;
        let p = x.permute([1, 0, 2])?;
        assert_eq!(p.reshape([3, 8])?.to_vec::<i64>()?[..8], [0, 1, 2, 3, 12, 13, 14, 15]);
        let view = x.permute([2, 0, 1])?.reshape([4, 6])?;
        assert_eq!(view.strides(), [1, 4], "merging dimensions that step evenly needs no copy");
        assert_eq!(view.to_vec::<i64>()?[..6], [0, 4, 8, 12, 16, 20]);
        assert_eq!(x.narrow(1, 1, 2)?.unsqueeze(0)?.shape(), [1, 2, 2, 4]);
        assert!(x.reshape([5, 5]).is_err() && x.narrow(1, 2, 2).is_err() && x.permute([0, 0, 1]).is_err());
        Ok(())
    }

    #[test]
    fn slices_with_steps() -> Result<()> {
        let x = Tensor::arange(10, DType::F32)?.requires_grad();
        let y = x.slice(0, 1, 8, 3)?;
        assert_eq!(y.to_vec::<f32>()?, [1., 4., 7.]);
        let grads = y.sum(())?.backward()?;
        let g = grads.get(&x).map(|g| g.to_vec::<f32>()).transpose()?.unwrap_or_default();
        assert_eq!(g, [0., 1., 0., 0., 1., 0., 0., 1., 0., 0.]);
        Ok(())
    }
}
