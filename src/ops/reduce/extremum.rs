//! Largest and smallest elements, and where they stand. NaN counts as both.

use super::{
    fold::{Fold, Plan},
    squeezed,
};
use crate::{
    DType, Dim, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    dtype::{Element, Real},
    ensure, on_device,
    shape::{DimList, Dims},
};
use smallvec::smallvec;
use std::marker::PhantomData;

macro_rules! extremum {
    ($(#[doc = $word:literal] $amax:ident $amax_keepdim:ident $max:ident $max_keepdim:ident $max_flat:ident
       $argmax:ident $argmax_keepdim:ident $argmax_flat:ident $rule:ident $largest:literal)+) => {$(
        impl Tensor {
            #[doc = concat!("The ", $word, " element over `dims`, which go away. Ties share the gradient evenly.")]
            ///
            /// # Errors
            /// If a dimension does not exist or has no elements.
            #[track_caller]
            pub fn $amax(&self, dims: impl DimList) -> Result<Tensor> {
                let dims = dims.of(stringify!($amax), self)?;
                squeezed(&self.$amax_keepdim(&dims)?, &dims)
            }

            #[doc = concat!("[`", stringify!($amax), "`](Self::", stringify!($amax), ") with `dims` of size 1.")]
            ///
            /// # Errors
            /// If a dimension does not exist or has no elements.
            #[track_caller]
            pub fn $amax_keepdim(&self, dims: impl DimList) -> Result<Tensor> {
                let dims = dims.of(stringify!($amax), self)?;
                let y = extreme::<$largest>(self, &dims, stringify!($amax), false)?.0;
                let rule = $rule { x: self.clone(), y: y.clone(), dims };
                y.record([self], rule)
            }

            #[doc = concat!("The ", $word, " element along `dim`, which goes away, and where it stands (i64): the")]
            /// first of equal ones, to which the whole gradient goes.
            ///
            /// # Errors
            /// If there is no such dimension or it has no elements.
            #[track_caller]
            pub fn $max(&self, dim: impl Dim) -> Result<(Tensor, Tensor)> {
                let dims = one(dim.of(stringify!($max), self)?, self);
                let (y, index) = self.$max_keepdim(dim)?;
                Ok((squeezed(&y, &dims)?, squeezed(&index, &dims)?))
            }

            #[doc = concat!("[`", stringify!($max), "`](Self::", stringify!($max), ") with `dim` of size 1.")]
            ///
            /// # Errors
            /// If there is no such dimension or it has no elements.
            #[track_caller]
            pub fn $max_keepdim(&self, dim: impl Dim) -> Result<(Tensor, Tensor)> {
                let dim = dim.of(stringify!($max), self)?;
                let (y, index) = extreme::<$largest>(self, &one(dim, self), stringify!($max), true)?;
                let rule = Pick { from: Dims::from_slice(self.shape()), dim, index: index.clone() };
                Ok((y.record([self], rule)?, index))
            }

            #[doc = concat!("The ", $word, " of all elements, and where it stands in row-major order (i64): the first")]
            /// of equal ones, to which the whole gradient goes.
            ///
            /// # Errors
            /// If there are no elements.
            #[track_caller]
            pub fn $max_flat(&self) -> Result<(Tensor, Tensor)> {
                self.reshape([self.numel()])?.$max(0)
            }

            #[doc = concat!("Where the ", $word, " element along `dim` stands (i64): the first of equal ones. `dim`")]
            /// goes away.
            ///
            /// # Errors
            /// If there is no such dimension or it has no elements.
            #[track_caller]
            pub fn $argmax(&self, dim: impl Dim) -> Result<Tensor> {
                let dims = one(dim.of(stringify!($argmax), self)?, self);
                squeezed(&self.$argmax_keepdim(dim)?, &dims)
            }

            #[doc = concat!("[`", stringify!($argmax), "`](Self::", stringify!($argmax), ") with `dim` of size 1.")]
            ///
            /// # Errors
            /// If there is no such dimension or it has no elements.
            #[track_caller]
            pub fn $argmax_keepdim(&self, dim: impl Dim) -> Result<Tensor> {
                let dims = one(dim.of(stringify!($argmax), self)?, self);
                Ok(extreme::<$largest>(self, &dims, stringify!($argmax), true)?.1)
            }

            #[doc = concat!("Where the ", $word, " of all elements stands in row-major order (i64 scalar).")]
            ///
            /// # Errors
            /// If there are no elements.
            #[track_caller]
            pub fn $argmax_flat(&self) -> Result<Tensor> {
                self.detach().reshape([self.numel()])?.$argmax(0)
            }
        }

        struct $rule {
            x: Tensor,
            y: Tensor,
            dims: Dims,
        }
        impl Backward for $rule {
            const NAME: &'static str = stringify!($amax);
            const TWICE: bool = true;
            fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
                let ties = self.x.eq(&self.y)?;
                let count = ties.sum_keepdim(&self.dims)?.to_dtype(grad.dtype())?;
                Ok(smallvec![Some(grad.div(&count)?.mul(&ties.to_dtype(grad.dtype())?)?)])
            }
        }
    )+};
}

extremum! {
    /// largest
    amax amax_keepdim max max_keepdim max_flat argmax argmax_keepdim argmax_flat Amax true
    /// smallest
    amin amin_keepdim min min_keepdim min_flat argmin argmin_keepdim argmin_flat Amin false
}

/// The dimension as a list; a scalar has none.
fn one(dim: usize, x: &Tensor) -> Dims {
    if x.rank() == 0 { Dims::new() } else { Dims::from_slice(&[dim]) }
}

/// Extreme values over `dims`, and if asked their indices along the one dimension; both keep the dimensions.
/// The indices are an empty tensor if not asked for.
#[track_caller]
fn extreme<const LARGEST: bool>(
    x: &Tensor,
    dims: &[usize],
    op: &'static str,
    indices: bool,
) -> Result<(Tensor, Tensor)> {
    if let Some(d) = dims.iter().find(|&&d| x.shape()[d] == 0) {
        crate::bail!(op, "dimension {d} of shape {:?} has no elements", x.shape());
    }
    ensure!(x.rank() > 0 || x.numel() == 1, op, "needs elements, got shape {:?}", x.shape());
    let wide = match x.dtype() {
        dtype if dtype.is_float() => dtype.computed_in(),
        _ => DType::I64,
    };
    let wider = x.detach().to_dtype(wide)?;
    let (y, index) = on_device!(
        x,
        op,
        Ok(match wide {
            DType::F32 => cpu::extreme::<f32, LARGEST>(&wider, dims, op, indices),
            DType::F64 => cpu::extreme::<f64, LARGEST>(&wider, dims, op, indices),
            _ => cpu::extreme::<i64, LARGEST>(&wider, dims, op, indices),
        }),
        gpu::extreme::<LARGEST>(&wider, dims, op, indices)
    )?;
    Ok((y.to_dtype(x.dtype())?, index))
}

/// Sends the gradient to the element that was picked.
struct Pick {
    from: Dims,
    dim: usize,
    index: Tensor,
}
impl Backward for Pick {
    const NAME: &'static str = "max";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        if self.from.is_empty() {
            return Ok(smallvec![Some(grad.clone())]);
        }
        let zeros = Tensor::zeros(&self.from, grad.dtype())?;
        Ok(smallvec![Some(zeros.scatter(self.dim, &self.index, grad)?)])
    }
}

/// Types that the loops compare.
pub trait Ordered: Element {
    const LEAST: Self;
    const GREATEST: Self;
    /// NaN if either is.
    fn larger(self, other: Self) -> Self;
    /// NaN if either is.
    fn smaller(self, other: Self) -> Self;
    /// Equal, or both NaN.
    fn same(self, other: Self) -> bool;
}
macro_rules! ordered {
    ($($t:ident),+) => {$(
        impl Ordered for $t {
            const LEAST: $t = $t::NEG_INFINITY;
            const GREATEST: $t = $t::INFINITY;
            #[inline(always)]
            fn larger(self, other: $t) -> $t { Real::maximum(self, other) }
            #[inline(always)]
            fn smaller(self, other: $t) -> $t { Real::minimum(self, other) }
            #[inline(always)]
            fn same(self, other: $t) -> bool { (self == other) | (self.is_nan() & other.is_nan()) }
        }
    )+};
}
ordered!(f32, f64);
impl Ordered for i64 {
    const LEAST: i64 = i64::MIN;
    const GREATEST: i64 = i64::MAX;
    #[inline(always)]
    fn larger(self, other: i64) -> i64 {
        self.max(other)
    }
    #[inline(always)]
    fn smaller(self, other: i64) -> i64 {
        self.min(other)
    }
    #[inline(always)]
    fn same(self, other: i64) -> bool {
        self == other
    }
}

/// The largest or smallest element.
#[derive(Clone, Copy)]
pub struct Extreme<T, const LARGEST: bool>(PhantomData<T>);
impl<T, const LARGEST: bool> Extreme<T, LARGEST> {
    pub const NEW: Self = Extreme(PhantomData);
}
impl<T: Ordered, const LARGEST: bool> Fold for Extreme<T, LARGEST> {
    type In = T;
    type Acc = T;
    type Out = T;
    #[inline(always)]
    fn neutral(self) -> T {
        if LARGEST { T::LEAST } else { T::GREATEST }
    }
    #[inline(always)]
    fn lift(self, value: T, _: T) -> T {
        value
    }
    #[inline(always)]
    fn join(self, a: T, b: T) -> T {
        if LARGEST { a.larger(b) } else { a.smaller(b) }
    }
    #[inline(always)]
    fn finish(self, acc: T, _: T) -> T {
        acc
    }
}

mod cpu {
    use super::*;
    use crate::cpu::pool::CpuVec;

    pub fn extreme<T: Ordered, const LARGEST: bool>(
        x: &Tensor,
        dims: &[usize],
        op: &'static str,
        indices: bool,
    ) -> (Tensor, Tensor) {
        let plan = Plan::new::<T>(x, dims, op);
        let values = plan.run(Extreme::<T, LARGEST>::NEW, &[]);
        let index = if indices {
            plan.tensor(plan.find(&values, T::same), op)
        } else {
            Tensor::from_cpu(CpuVec::<i64>::new(0), [0], op)
        };
        (plan.tensor(values, op), index)
    }
}

#[cfg(gpu)]
mod gpu {
    use super::{super::gpu::fold, *};
    use crate::gpu::{self, sys};

    #[track_caller]
    pub fn extreme<const LARGEST: bool>(
        x: &Tensor,
        dims: &[usize],
        op: &'static str,
        indices: bool,
    ) -> Result<(Tensor, Tensor)> {
        let kind = if LARGEST { sys::SMALTI_MAX } else { sys::SMALTI_MIN };
        let (y, index) = fold(op, kind, x, dims, 0.0, indices.then_some(DType::I64))?;
        Ok((y, index.map_or_else(|| gpu::empty(x, &[0], DType::I64, op), Ok)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck};

    #[test]
    fn first_of_equals_and_nan() -> Result<()> {
        let x = Tensor::from_slice(&[1.0, 3.0, 3.0, 0.0, f32::NAN, f32::NAN, -1.0, 5.0], [2, 4])?;
        for x in [x.clone(), x.t()?.contiguous()?.t()?] {
            for dtype in [DType::F32, DType::F64, DType::BF16] {
                let (y, at) = x.to_dtype(dtype)?.max(1)?;
                assert_eq!(at.to_vec::<i64>()?, [1, 0]);
                assert!(y.dtype() == dtype && y.to_dtype(DType::F64)?.to_vec::<f64>()?[1].is_nan());
                assert_eq!(x.to_dtype(dtype)?.argmin_keepdim(-1)?.to_vec::<i64>()?, [3, 0]);
            }
            assert_eq!(x.argmax_flat()?.item()?, 4.0);
            assert_eq!(x.narrow(0, 0, 1)?.max_flat()?.0.item()?, 3.0);
        }
        Ok(())
    }

    #[test]
    fn long_lines_and_columns() -> Result<()> {
        let x = Tensor::randn([700, 1500], &mut Rng::new(3))?;
        let values = x.to_vec::<f32>()?;
        let at = x.argmax(1)?.to_vec::<i64>()?;
        for (line, &at) in values.chunks(1500).zip(&at) {
            assert_eq!(line[at as usize], line.iter().copied().fold(f32::MIN, f32::max));
        }
        assert_eq!(x.t()?.argmax(0)?.to_vec::<i64>()?, at);
        assert_eq!(x.t()?.contiguous()?.argmax(0)?.to_vec::<i64>()?, at);
        assert_eq!(x.amin(())?.item()?, x.min_flat()?.0.item()?);
        Ok(())
    }

    #[test]
    fn integers_scalars_and_errors() -> Result<()> {
        let x = Tensor::from_slice(&[3u8, 200, 7, 200], [4])?;
        let (y, at) = x.max(0)?;
        assert_eq!((y.dtype(), y.item()?, at.item()?), (DType::U8, 200.0, 1.0));
        assert_eq!(x.amin(())?.item()?, 3.0);
        let wide = Tensor::from_slice(&[i64::MAX - 1, i64::MAX], [2])?;
        assert_eq!(wide.amax(0)?.to_vec::<i64>()?, [i64::MAX]);
        assert!(Tensor::from_slice(&[false, true], [2])?.amax(0)?.to_vec::<bool>()?[0]);
        let scalar = Tensor::scalar(2.0).requires_grad();
        let (y, at) = scalar.max(-1)?;
        assert_eq!((y.item()?, at.item()?), (2.0, 0.0));
        assert_eq!(y.backward()?.get(&scalar).map(Tensor::item).transpose()?, Some(1.0));
        let empty = Tensor::zeros([2, 0], DType::F32)?;
        assert!(empty.max(1).is_err() && empty.amax(()).is_err() && empty.argmax_flat().is_err());
        assert_eq!(empty.max(0)?.0.shape(), [0]);
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = Tensor::randn([3, 4, 2], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        gradcheck(|t| t[0].amax([0, 2]), &[x.permute([2, 0, 1])?])?;
        gradcheck(|t| t[0].amin_keepdim(()), &[x.clone()])?;
        gradcheck(|t| Ok(t[0].max(1)?.0), &[x.clone()])?;
        gradcheck(|t| Ok(t[0].min_flat()?.0), &[x])
    }
}
