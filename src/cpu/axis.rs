//! A dense tensor seen as `[outer, n, inner]` around one of its dimensions, in the order of its memory: one
//! loop nest for NCHW, for channels-last and for matrices.

use super::{elementwise::dense_strides, elementwise::memory_order, pool::CpuVec};
use crate::{
    Result, Tensor,
    dtype::Element,
    shape::{Dims, count, is_contiguous},
};

/// How the tensor lies around the dimension.
pub struct Axis {
    /// Dimensions, outermost in memory first.
    order: Dims,
    shape: Dims,
    /// Elements before the dimension.
    pub outer: usize,
    /// Its size.
    pub n: usize,
    /// Elements behind it, next to each other in memory.
    pub inner: usize,
}

impl Axis {
    /// The order of `x` if it is dense in any, else row-major.
    pub fn of(x: &Tensor, dim: usize) -> Axis {
        let shape = Dims::from_slice(x.shape());
        let mut order = memory_order(&shape, x.strides());
        let sizes: Dims = order.iter().map(|&d| shape[d]).collect();
        let strides: crate::shape::Strides = order.iter().map(|&d| x.strides()[d]).collect();
        if !is_contiguous(&sizes, &strides) {
            order = (0..shape.len()).collect();
        }
        let at = order.iter().position(|&d| d == dim).unwrap_or(0);
        let product = |dims: &[usize]| dims.iter().map(|&d| shape[d]).product();
        let (outer, inner) = (product(&order[..at]), product(order.get(at + 1..).unwrap_or_default()));
        Axis { n: shape.get(dim).copied().unwrap_or(1), outer, inner, order, shape }
    }

    /// The elements of a tensor of the same shape in this order, untracked; a copy only where it lies otherwise.
    pub fn view(&self, t: &Tensor) -> Result<Tensor> {
        t.detach().permute(&self.order[..])?.contiguous()
    }

    /// The strides of a dense tensor in this order.
    #[cfg(gpu)]
    pub fn strides(&self) -> crate::shape::Strides {
        dense_strides(&self.shape, &self.order)
    }

    /// A tensor of the shape out of elements in this order.
    pub fn tensor<T: Element>(&self, values: CpuVec<T>, op: &'static str) -> Tensor {
        debug_assert_eq!(values.len(), count(&self.shape));
        Tensor::from_cpu_strided(values, self.shape.clone(), dense_strides(&self.shape, &self.order), op)
    }
}
