//! Sums and means over any dimensions.

use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    cpu::{
        parallel::{Shared, SharedMut, for_ranges},
        pool::CpuVec,
    },
    dtype::{Element, Float, Real},
    for_dtype, for_float, on_device,
    shape::{DimList, Dims, count},
};
use smallvec::smallvec;

impl Tensor {
    /// Sum over `dims`, which go away. Integers and booleans sum to i64.
    ///
    /// # Errors
    /// If a dimension does not exist.
    #[track_caller]
    pub fn sum(&self, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("sum", self)?;
        self.sum_keepdim(&dims)?.reshape(without(self.shape(), &dims))
    }

    /// Sum over `dims`, which stay with size 1.
    ///
    /// # Errors
    /// If a dimension does not exist.
    #[track_caller]
    pub fn sum_keepdim(&self, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("sum", self)?;
        let y = on_device!(
            self,
            "sum",
            if self.dtype().is_float() {
                for_float!(self.dtype(), "sum", T => Ok(cpu::sum::<T>(self, &dims)))
            } else {
                for_dtype!(self.dtype(), T => Ok(cpu::total::<T>(self, &dims)))
            }
        )?;
        y.record([self], Sum { from: Dims::from_slice(self.shape()) })
    }

    /// Mean over `dims`, which go away.
    ///
    /// # Errors
    /// If a dimension does not exist, or the dtype is not a float.
    #[track_caller]
    pub fn mean(&self, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("mean", self)?;
        crate::ensure!(self.dtype().is_float(), "mean", "needs a float tensor, got {}", self.dtype());
        let n: usize = dims.iter().map(|&d| self.shape()[d]).product();
        self.sum(&dims)?.mul_scalar(1.0 / n as f64)
    }

    /// Sums a gradient of a broadcast shape down to the shape that was broadcast.
    pub(crate) fn sum_to(&self, shape: &[usize]) -> Result<Tensor> {
        let lead = self.rank() - shape.len();
        let dims: Dims = (0..self.rank())
            .filter(|&d| d < lead || (shape[d - lead] == 1 && self.shape()[d] != 1))
            .collect();
        self.sum_keepdim(&dims)?.reshape(shape)
    }
}

fn without(shape: &[usize], dims: &[usize]) -> Dims {
    (0..shape.len()).filter(|d| !dims.contains(d)).map(|d| shape[d]).collect()
}

struct Sum {
    from: Dims,
}
impl Backward for Sum {
    const NAME: &'static str = "sum";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.expand(&self.from)?)])
    }
}

mod cpu {
    use super::*;

    /// Kept dimensions in front, reduced ones behind: a matrix [kept, reduced] of row-major memory.
    fn matrix(x: &Tensor, dims: &[usize]) -> (Tensor, Dims, usize, usize) {
        let kept: Vec<usize> = (0..x.rank()).filter(|d| !dims.contains(d)).collect();
        let order: Vec<usize> = kept.iter().chain(dims).copied().collect();
        let shape: Dims = (0..x.rank()).map(|d| if dims.contains(&d) { 1 } else { x.shape()[d] }).collect();
        let rows = count(&shape);
        let columns = dims.iter().map(|&d| x.shape()[d]).product();
        let strides = order.iter().map(|&d| x.strides()[d]).collect();
        let sizes = order.iter().map(|&d| x.shape()[d]).collect();
        (x.view_as(sizes, strides, x.offset(), "sum"), shape, rows, columns)
    }

    pub fn sum<T: Float>(x: &Tensor, dims: &[usize]) -> Tensor {
        let (view, shape, rows, columns) = matrix(x, dims);
        let data =
            if view.is_contiguous() { view } else { crate::cpu::elementwise::contiguous::<T>(&view, "sum") };
        let mut out = CpuVec::<T>::new(rows);
        let (source, target) = (Shared(data.cpu_ptr::<T>()), SharedMut::new(&mut out));
        for_ranges(rows, (1 << 15) / columns.max(1), |range| {
            for row in range {
                let row_data =
                    unsafe { std::slice::from_raw_parts(source.ptr().add(row * columns), columns) };
                let total =
                    crate::cpu::simd::fold(row_data, T::Acc::ZERO, |a, v: T| a + v.acc(), |a, b| a + b);
                unsafe { *target.ptr().add(row) = T::store(total) };
            }
        });
        Tensor::from_cpu(out, shape, "sum")
    }

    pub fn total<T: Element>(x: &Tensor, dims: &[usize]) -> Tensor {
        let (view, shape, rows, columns) = matrix(x, dims);
        let data = crate::cpu::elementwise::contiguous::<T>(&view, "sum");
        let values = data.cpu_slice::<T>();
        let mut out = CpuVec::<i64>::new(rows);
        for (row, total) in out.iter_mut().enumerate() {
            *total = values[row * columns..(row + 1) * columns].iter().map(|v| v.to_i64()).sum();
        }
        debug_assert_eq!(i64::DTYPE, DType::I64);
        Tensor::from_cpu(out, shape, "sum")
    }
}
