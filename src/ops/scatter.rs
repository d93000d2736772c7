//! Writing and adding at indices. Deterministic: contributions to one element are added in the order in which
//! they stand in the source.

use super::gather::{check_shape, checked};
use crate::{
    Dim, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_dtype, for_real, on_device,
};
use smallvec::smallvec;

impl Tensor {
    /// A copy with `self[index[i][j]][j]` = `src[i][j]` for `dim` = 0, and so on. Where an index repeats, the last
    /// value stays, and the gradient of `src` is defined without repetition only.
    ///
    /// # Errors
    /// If ranks differ, `index` is larger than the tensor (but in `dim`) or than `src`, dtypes differ, or an
    /// index lies outside `0..n`.
    #[track_caller]
    pub fn scatter(&self, dim: impl Dim, index: &Tensor, src: &Tensor) -> Result<Tensor> {
        let dim = dim.of("scatter", self)?;
        self.scatter_as(dim, index, src, false)
    }

    /// A copy with `src[i][j]` added to `self[index[i][j]][j]` for `dim` = 0, and so on. Values at repeated indices
    /// add up.
    ///
    /// # Errors
    /// As [`scatter`](Self::scatter).
    #[track_caller]
    pub fn scatter_add(&self, dim: impl Dim, index: &Tensor, src: &Tensor) -> Result<Tensor> {
        let dim = dim.of("scatter_add", self)?;
        self.scatter_as(dim, index, src, true)
    }

    #[track_caller]
    fn scatter_as(&self, dim: usize, index: &Tensor, src: &Tensor, add: bool) -> Result<Tensor> {
        let op = if add { ScatterAdd::NAME } else { Scatter::NAME };
        check_shape(op, self, dim, index)?;
        ensure!(self.dtype() == src.dtype(), op, "the tensor is {}, src {}", self.dtype(), src.dtype());
        let fits = src.rank() == self.rank() && src.shape().iter().zip(index.shape()).all(|(s, i)| s >= i);
        ensure!(fits, op, "index {:?} is larger than src {:?}", index.shape(), src.shape());
        let index = checked(op, index, dim, self.dim(dim)?)?;
        if self.rank() == 0 {
            let one = |t: &Tensor| t.reshape([1]);
            return one(self)?.scatter_as(0, &one(&index)?, &one(src)?, add)?.reshape(());
        }
        let mut src = src.clone();
        for d in 0..src.rank() {
            src = src.narrow(d, 0, index.shape()[d])?;
        }
        if add {
            let y = Tensor::in_f32([self, &src], |[x, s]| {
                on_device!(
                    x,
                    op,
                    cpu::by_sum!(x.dtype(), op, |sum| cpu::scatter(x, dim, &index, s, op, sum)),
                    gpu::scatter(x, dim, &index, s, op, true)
                )
            })?;
            y.record([self, &src], ScatterAdd { index, dim })
        } else {
            let y = on_device!(
                self,
                op,
                for_dtype!(self.dtype(), T => Ok(cpu::scatter(self, dim, &index, &src, op, |_: T, b: T| b))),
                gpu::scatter(self, dim, &index, &src, op, false)
            )?;
            y.record([self, &src], Scatter { index, dim })
        }
    }

    /// A copy with alpha * `source[i]` added to the slice `index[i]` of `dim`. Slices of repeated indices add up.
    ///
    /// # Errors
    /// If `index` is not 1-D with as many elements as `source` has slices, other sizes or dtypes differ, or an
    /// index lies outside `0..n`.
    #[track_caller]
    pub fn index_add(&self, dim: impl Dim, index: &Tensor, source: &Tensor, alpha: f64) -> Result<Tensor> {
        let op = IndexAdd::NAME;
        let dim = dim.of(op, self)?;
        let [n] = index.dims(op)?;
        ensure!(self.rank() > 0, op, "a scalar has no slices");
        let fits = source.rank() == self.rank()
            && (0..self.rank()).all(|d| source.shape()[d] == if d == dim { n } else { self.shape()[d] });
        ensure!(
            fits,
            op,
            "source {:?} must be like the tensor {:?} with size {n} in dimension {dim}",
            source.shape(),
            self.shape()
        );
        ensure!(
            self.dtype() == source.dtype(),
            op,
            "the tensor is {}, source {}",
            self.dtype(),
            source.dtype()
        );
        let index = checked(op, index, dim, self.shape()[dim])?;
        let scaled = if alpha == 1.0 { source.clone() } else { source.mul_scalar(alpha)? };
        let y = Tensor::in_f32([self, &scaled], |[x, s]| {
            on_device!(
                x,
                op,
                cpu::by_sum!(x.dtype(), op, |sum| cpu::index_add(x, dim, &index, s, op, sum)),
                gpu::index_add(x, dim, &index, s, op)
            )
        })?;
        y.record([self, &scaled], IndexAdd { index, dim })
    }
}

struct Scatter {
    index: Tensor,
    dim: usize,
}
impl Backward for Scatter {
    const NAME: &'static str = "scatter";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let zeros = grad.device().scope(|| Tensor::zeros(self.index.shape(), grad.dtype()))?;
        Ok(smallvec![
            ctx.grad(0, || grad.scatter(self.dim, &self.index, &zeros))?,
            ctx.grad(1, || grad.gather(self.dim, &self.index))?
        ])
    }
}

struct ScatterAdd {
    index: Tensor,
    dim: usize,
}
impl Backward for ScatterAdd {
    const NAME: &'static str = "scatter_add";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        Ok(smallvec![ctx.grad(0, || Ok(grad.clone()))?, ctx.grad(1, || grad.gather(self.dim, &self.index))?])
    }
}

struct IndexAdd {
    index: Tensor,
    dim: usize,
}
impl Backward for IndexAdd {
    const NAME: &'static str = "index_add";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        Ok(smallvec![
            ctx.grad(0, || Ok(grad.clone()))?,
            ctx.grad(1, || grad.index_select(self.dim, &self.index))?
        ])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            elementwise::{self, Loop},
            parallel::{GRAIN, Shared, SharedMut, for_ranges},
            simd::{LANES, simd_of},
        },
        dtype::Element,
        shape::{Dims, contiguous_strides, count},
    };

    /// Calls a kernel with the sum of two elements of the dtype: in itself for f32 and f64, wrapping for
    /// integers.
    macro_rules! by_sum {
        ($dtype:expr, $op:expr, |$sum:ident| $body:expr) => {
            if $dtype.is_float() {
                for_real!($dtype, $op, T => { let $sum = |a: T, b: T| a + b; Ok($body) })
            } else {
                for_dtype!($dtype, T => {
                    use crate::dtype::Element;
                    let $sum = |a: T, b: T| T::from_i64(a.to_i64().wrapping_add(b.to_i64()));
                    Ok($body)
                })
            }
        };
    }
    pub(super) use by_sum;

    /// out[.., index, ..] = f(out[.., index, ..], src). Threads share out the lines along `dim`; within a line
    /// the order is that of the source.
    pub fn scatter<T: Element>(
        x: &Tensor,
        dim: usize,
        index: &Tensor,
        src: &Tensor,
        op: &'static str,
        f: impl Fn(T, T) -> T + Sync,
    ) -> Tensor {
        let mut out = elementwise::to_vec::<T>(x);
        let strides = contiguous_strides(x.shape());
        let mut lines = Dims::from_slice(index.shape());
        let length = std::mem::replace(&mut lines[dim], 1) as isize;
        let order: Dims = (0..lines.len()).collect();
        let plan = Loop::<3>::new(&lines, &order, [&strides, index.strides(), src.strides()]);
        let steps = plan.inner();
        let (o, i, s) = (strides[dim], index.strides()[dim], src.strides()[dim]);
        let target = SharedMut::new(&mut out);
        let (index, source) = (Shared(index.cpu_ptr::<i64>()), Shared(src.cpu_ptr::<T>()));
        let grain = (GRAIN / length.max(1) as usize).max(LANES);
        for_ranges(if length == 0 { 0 } else { plan.len() }, grain, |range| {
            plan.rows(range, |[to, at, from], n| unsafe {
                let (to, at, from) =
                    (target.ptr().offset(to), index.ptr().offset(at), source.ptr().offset(from));
                let put = |to: *mut T, from: *const T| *to = f(*to, *from);
                if o == 1 {
                    // the lines run along memory: one after the other
                    for c in 0..n as isize {
                        let (to, at, from) =
                            (to.offset(c * steps[0]), at.offset(c * steps[1]), from.offset(c * steps[2]));
                        (0..length)
                            .for_each(|j| put(to.offset(*at.offset(j * i) as isize), from.offset(j * s)));
                    }
                    return;
                }
                for j in 0..length {
                    let (at, from) = (at.offset(j * i), from.offset(j * s));
                    match steps {
                        [1, 0, 1] => {
                            let to = to.offset(*at as isize * o);
                            simd_of::<T, _>(
                                #[inline(always)]
                                || (0..n).for_each(|c| put(to.add(c), from.add(c))),
                            );
                        }
                        [a, b, d] => (0..n as isize).for_each(|c| {
                            put(to.offset(c * a + *at.offset(c * b) as isize * o), from.offset(c * d));
                        }),
                    }
                }
            });
        });
        Tensor::from_cpu(out, x.shape(), op)
    }

    /// out[:, index[k], :] = f(out[:, index[k], :], source[:, k, :]). The source rows of each output row are
    /// listed first, so that threads share out the output rows.
    pub fn index_add<T: Element>(
        x: &Tensor,
        dim: usize,
        index: &Tensor,
        source: &Tensor,
        op: &'static str,
        f: impl Fn(T, T) -> T + Sync,
    ) -> Tensor {
        let mut out = elementwise::to_vec::<T>(x);
        let source = elementwise::contiguous::<T>(source, op);
        let (rows, width) = (x.shape()[dim], count(&x.shape()[dim + 1..]));
        let (source, index) = (source.cpu_slice::<T>(), elementwise::to_vec::<i64>(index));
        let (starts, members) = members(&index, rows);
        let outer = count(&x.shape()[..dim]);
        let work = index.len() * width / rows.max(1);
        let target = SharedMut::new(&mut out);
        for_ranges(outer * rows, GRAIN / work.max(1), |range| {
            for row in range {
                let (o, r) = (row / rows, row % rows);
                let to = unsafe { target.slice(row * width..(row + 1) * width) };
                for &k in &members[starts[r]..starts[r + 1]] {
                    let from = &source[(o * index.len() + k) * width..][..width];
                    simd_of::<T, _>(
                        #[inline(always)]
                        || to.iter_mut().zip(from).for_each(|(a, &b)| *a = f(*a, b)),
                    );
                }
            }
        });
        Tensor::from_cpu(out, x.shape(), op)
    }

    /// Counting sort: the positions that hold index r are `members[starts[r]..starts[r + 1]]`, ascending.
    fn members(index: &[i64], rows: usize) -> (Vec<usize>, Vec<usize>) {
        let mut starts = vec![0; rows + 2];
        index.iter().for_each(|&i| starts[i as usize + 2] += 1);
        (0..rows).for_each(|r| starts[r + 2] += starts[r + 1]);
        let mut members = vec![0; index.len()];
        for (k, &i) in index.iter().enumerate() {
            let next = &mut starts[i as usize + 1];
            members[*next] = k;
            *next += 1;
        }
        (starts, members)
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::{
        gpu::{self, sys},
        shape::Dims,
    };

    /// A fresh row-major copy.
    fn copy(x: &Tensor, op: &'static str) -> Result<Tensor> {
        let y = gpu::empty(x, x.shape(), x.dtype(), op)?;
        gpu::launch(op, [x, &y], |[x, y], stream| unsafe {
            sys::smalti_pad_constant(&x, [0; 8].as_ptr(), 0, &y, stream)
        })?;
        Ok(y)
    }

    /// A copy of `x` with `src` written or added at `index` (of the shape of `src`).
    pub fn scatter(
        x: &Tensor,
        dim: usize,
        index: &Tensor,
        src: &Tensor,
        op: &'static str,
        add: bool,
    ) -> Result<Tensor> {
        let y = copy(x, op)?;
        let order = order(index, dim)?;
        let tensors = [&y, index, src, order.as_ref().unwrap_or(index)];
        gpu::launch(op, tensors, |[y, index, src, by], stream| {
            let by = if order.is_some() { &raw const by } else { std::ptr::null() };
            let launcher = if add { sys::smalti_scatter_add } else { sys::smalti_scatter };
            unsafe { launcher(&y, dim as i32, &index, by, &src, stream) }
        })?;
        Ok(y)
    }

    pub fn index_add(
        x: &Tensor,
        dim: usize,
        index: &Tensor,
        source: &Tensor,
        op: &'static str,
    ) -> Result<Tensor> {
        let mut column = Dims::from_elem(1, x.rank());
        column[dim] = index.numel();
        scatter(x, dim, &index.reshape(column)?.expand(source.shape())?, source, op, true)
    }

    /// Where the elements of `index` stand in order along `dim`, or `None` if threads that go along the whole
    /// dimension do as well: it is short, or there are so many of them that the device is full.
    fn order(index: &Tensor, dim: usize) -> Result<Option<Tensor>> {
        let length = index.shape()[dim];
        if length <= 64 || index.numel() / length >= 64 * length {
            return Ok(None);
        }
        // an index that is repeated over other dimensions is sorted once
        let mut one = index.detach();
        for d in (0..index.rank()).filter(|&d| d != dim && index.strides()[d] == 0 && index.shape()[d] > 1) {
            one = one.narrow(d, 0, 1)?;
        }
        one.argsort(dim, false)?.expand(index.shape()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    fn random<const N: usize>(shape: [usize; N], seed: u64) -> Result<Tensor> {
        Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
    }

    #[test]
    fn repeated_indices_add_up_in_any_dtype() -> Result<()> {
        let index = Tensor::from_slice(&[1i64, 1, 1], [3])?;
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64, DType::I64, DType::U8] {
            let ones = Tensor::ones([3], dtype)?;
            for y in [
                Tensor::ones([2], dtype)?.scatter_add(0, &index, &ones)?,
                Tensor::ones([2], dtype)?.index_add(0, &index, &ones, 1.0)?,
            ] {
                assert_eq!(y.dtype(), dtype);
                assert_eq!(y.to_dtype(DType::F64)?.to_vec::<f64>()?, [1.0, 4.0]);
            }
        }
        Ok(())
    }

    /// Rows that share an index, in a tensor large enough for several threads, along each dimension.
    #[test]
    fn scatter_add_agrees_with_index_add() -> Result<()> {
        let (x, source) = (random([40, 30, 50], 1)?, random([40, 70, 50], 2)?);
        let index: Vec<i64> = (0..70).map(|i| i * i % 30).collect();
        let index = Tensor::from_slice(&index, [70])?;
        for order in [[0, 1, 2], [1, 0, 2], [0, 2, 1]] {
            let dim = order.iter().position(|&d| d == 1).unwrap_or(0);
            let (x, source) = (x.permute(order)?, source.permute(order)?);
            let mut shape = [1; 3];
            shape[dim] = 70;
            let spread = index.reshape(shape)?.expand(source.shape())?;
            let a = x.scatter_add(dim, &spread, &source)?;
            assert_eq!(a.to_vec::<f64>()?, x.index_add(dim, &index, &source, 1.0)?.to_vec::<f64>()?);
            let dense = spread.contiguous()?;
            assert_eq!(a.to_vec::<f64>()?, x.scatter_add(dim, &dense, &source)?.to_vec::<f64>()?);
            assert_eq!(
                x.gather(dim, &dense)?.to_vec::<f64>()?,
                x.index_select(dim, &index)?.to_vec::<f64>()?
            );
        }
        Ok(())
    }

    #[test]
    fn bad_arguments_are_errors() -> Result<()> {
        let (x, index) = (random([2, 3], 1)?, Tensor::zeros([2, 4], DType::I64)?);
        assert!(x.scatter_add(1, &index, &random([2, 3], 2)?).is_err(), "src is smaller than index");
        assert!(x.scatter_add(1, &index, &Tensor::zeros([2, 4], DType::F32)?).is_err());
        assert!(x.scatter(0, &index, &random([2, 4], 2)?).is_err(), "index is larger than the tensor");
        let one = Tensor::from_slice(&[2i64], [1])?;
        assert!(x.index_add(0, &one, &random([1, 3], 2)?, 1.0).is_err(), "out of range");
        assert!(x.index_add(0, &one, &random([2, 3], 2)?, 1.0).is_err());
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let (x, src) = (random([4, 3], 1)?, random([3, 3], 2)?.t()?);
        let distinct = Tensor::from_slice(&[0i64, 2, 2, 1, 1, 0], [2, 3])?;
        gradcheck(|t| t[0].scatter(0, &distinct, &t[1]), &[x.clone(), src.clone()])?;
        gradcheck(|t| t[0].t()?.scatter_add(1, &distinct.t()?, &t[1]), &[x.clone(), src.clone()])?;
        let rows = Tensor::from_slice(&[3i64, 0, 3], [3])?;
        gradcheck(|t| t[0].index_add(0, &rows, &t[1], -2.5), &[x, src])
    }
}
