//! Padding (and cropping) at both ends of dimensions.

use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_dtype, on_device,
};
use smallvec::smallvec;

/// What padding is filled with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PadMode {
    /// This value.
    Constant(f64),
    /// The tensor mirrored at its first and last element, which are not repeated.
    Reflect,
    /// The first and last element.
    Replicate,
}

impl Tensor {
    /// Pads with `pads[i]` = (elements before, elements behind), counted from the last dimension on, as in
    /// PyTorch. Negative numbers crop.
    ///
    /// # Errors
    /// If there are more pairs than dimensions, more is cropped than there is, a reflection is as long as the
    /// dimension, or there is no element to repeat.
    #[track_caller]
    pub fn pad(&self, pads: &[(i64, i64)], mode: PadMode) -> Result<Tensor> {
        ensure!(
            pads.len() <= self.rank(),
            "pad",
            "{} pairs for a tensor of shape {:?}",
            pads.len(),
            self.shape()
        );
        let mut pairs = vec![(0, 0); self.rank()];
        for (i, &pair) in pads.iter().enumerate() {
            pairs[self.rank() - 1 - i] = pair;
        }
        for (d, &(before, after)) in pairs.iter().enumerate() {
            let (n, rest) = (self.shape()[d] as i64, self.shape()[d] as i64 + before.min(0) + after.min(0));
            ensure!(
                rest >= 0,
                "pad",
                "({before}, {after}) crops more than the {n} elements of dimension {d}"
            );
            let room = match mode {
                PadMode::Constant(_) => i64::MAX,
                PadMode::Reflect => n - 1,
                PadMode::Replicate => {
                    if n > 0 {
                        i64::MAX
                    } else {
                        0
                    }
                }
            };
            ensure!(
                before.max(after).max(0) <= room.max(0),
                "pad",
                "({before}, {after}) is too much for dimension {d} of size {n} ({mode:?})"
            );
        }
        match mode {
            PadMode::Constant(value) => self.pad_constant(pairs, value),
            _ => self.pad_with(&pairs, mode),
        }
    }

    #[track_caller]
    fn pad_constant(&self, pairs: Vec<(i64, i64)>, value: f64) -> Result<Tensor> {
        if pairs.iter().all(|&pair| pair == (0, 0)) {
            return Ok(self.clone());
        }
        let y = on_device!(
            self,
            "pad",
            for_dtype!(self.dtype(), T => cpu::constant::<T>(self, &pairs, value)),
            gpu::constant(self, &pairs, value)
        )?;
        y.record([self], PadConstant { pairs })
    }

    /// One selection of slices for each dimension that is padded.
    #[track_caller]
    fn pad_with(&self, pairs: &[(i64, i64)], mode: PadMode) -> Result<Tensor> {
        let mut y = self.clone();
        for (d, &(before, after)) in pairs.iter().enumerate().filter(|(_, pair)| **pair != (0, 0)) {
            let n = self.shape()[d] as i64;
            let source = |i: i64| match mode {
                PadMode::Reflect if i < 0 => -i,
                PadMode::Reflect if i >= n => 2 * (n - 1) - i,
                _ => i.clamp(0, n - 1),
            };
            let index: Vec<i64> = (-before..n + after).map(source).collect();
            let index = self.device().scope(|| Tensor::from_slice(&index, [index.len()]))?;
            y = y.index_select(d, &index)?;
        }
        Ok(y)
    }
}

/// By dimension, outermost first.
struct PadConstant {
    pairs: Vec<(i64, i64)>,
}
impl Backward for PadConstant {
    const NAME: &'static str = "pad";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let back = self.pairs.iter().map(|&(before, after)| (-before, -after)).collect();
        Ok(smallvec![Some(grad.pad_constant(back, 0.0)?)])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{elementwise, parallel::SharedMut, pool::CpuVec},
        dtype::Element,
        shape::{Dims, checked_count, contiguous_strides},
    };

    pub fn constant<T: Element>(x: &Tensor, pairs: &[(i64, i64)], value: f64) -> Result<Tensor> {
        let mut part = x.detach();
        let mut shape = Dims::new();
        for (d, &(before, after)) in pairs.iter().enumerate() {
            let [front, back] = [before, after].map(|n| n.min(0).unsigned_abs() as usize);
            part = part.narrow(d, front, x.shape()[d] - front - back)?;
            let [before, after] = [before, after].map(|n| n.max(0) as usize);
            shape.push(part.shape()[d].saturating_add(before).saturating_add(after));
        }
        let mut out = CpuVec::<T>::full(checked_count("pad", &shape, size_of::<T>())?, T::from_f64(value));
        let strides = contiguous_strides(&shape);
        if part.numel() > 0 {
            let offset =
                pairs.iter().zip(&strides).map(|(&(before, _), &s)| before.max(0) as isize * s).sum();
            let order: Dims = (0..x.rank()).collect();
            unsafe { elementwise::copy_into(&part, SharedMut::new(&mut out).from(offset), &strides, &order) };
        }
        Ok(Tensor::from_cpu(out, shape, "pad"))
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::{
        dtype::Element,
        gpu::{self, sys},
        shape::{Dims, checked_count},
    };

    pub fn constant(x: &Tensor, pairs: &[(i64, i64)], value: f64) -> Result<Tensor> {
        let mut shape = Dims::new();
        let mut before = [0; 8];
        for (d, &(front, back)) in pairs.iter().enumerate() {
            let n = i128::from(front) + i128::from(back) + x.shape()[d] as i128;
            shape.push(usize::try_from(n).unwrap_or(usize::MAX));
            before.iter_mut().skip(d).take(1).for_each(|b| *b = front);
        }
        checked_count("pad", &shape, x.dtype().size())?;
        let bits = for_dtype!(x.dtype(), T => gpu::bits_of(T::from_f64(value)));
        let y = gpu::empty(x, &shape, x.dtype(), "pad")?;
        gpu::launch("pad", [x, &y], |[x, y], stream| unsafe {
            sys::smalti_pad_constant(&x, before.as_ptr(), bits, &y, stream)
        })?;
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    #[test]
    fn bad_arguments_are_errors() -> Result<()> {
        let x = Tensor::arange(3, DType::F32)?;
        assert!(x.pad(&[(1, 0), (1, 0)], PadMode::Constant(0.0)).is_err());
        assert!(x.pad(&[(-2, -2)], PadMode::Constant(0.0)).is_err());
        assert!(x.pad(&[(3, 0)], PadMode::Reflect).is_err());
        assert_eq!(x.pad(&[(2, -1)], PadMode::Reflect)?.to_vec::<f32>()?, [2., 1., 0., 1.]);
        let none = x.narrow(0, 0, 0)?;
        assert!(none.pad(&[(1, 0)], PadMode::Replicate).is_err());
        assert_eq!(none.pad(&[(1, 1)], PadMode::Constant(2.0))?.to_vec::<f32>()?, [2., 2.]);
        assert!(x.pad(&[(i64::MAX, i64::MAX)], PadMode::Constant(0.0)).is_err());
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = Tensor::randn([4, 3, 5], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        let pads = [(-1, 2), (2, 1)];
        for mode in [PadMode::Constant(3.0), PadMode::Reflect, PadMode::Replicate] {
            gradcheck(|t| t[0].permute([1, 2, 0])?.pad(&pads, mode), std::slice::from_ref(&x))?;
        }
        Ok(())
    }
}
