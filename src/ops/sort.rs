//! Order along a dimension: sort, argsort, topk. The values are gathered with the indices, which gives them
//! their gradient.

use crate::{DType, Dim, Result, Tensor, ensure, for_dtype, on_device};

impl Tensor {
    /// Values in order along `dim`, and where they stood (i64). Stable in both directions; NaN counts as the
    /// largest.
    ///
    /// # Errors
    /// If there is no such dimension.
    #[track_caller]
    pub fn sort(&self, dim: impl Dim, descending: bool) -> Result<(Tensor, Tensor)> {
        let dim = dim.of("sort", self)?;
        let index = self.order("sort", dim, None, descending)?;
        Ok((self.gather(dim, &index)?, index))
    }

    /// Where the values in order along `dim` stand (i64). Stable in both directions; NaN counts as the largest.
    ///
    /// # Errors
    /// If there is no such dimension.
    #[track_caller]
    pub fn argsort(&self, dim: impl Dim, descending: bool) -> Result<Tensor> {
        let dim = dim.of("argsort", self)?;
        self.order("argsort", dim, None, descending)
    }

    /// The `k` largest (or smallest) values along `dim` in order, and where they stood (i64). Of equal values
    /// the first is taken; NaN counts as the largest.
    ///
    /// # Errors
    /// If the dimension has fewer than `k` elements.
    #[track_caller]
    pub fn topk(&self, k: usize, dim: impl Dim, largest: bool) -> Result<(Tensor, Tensor)> {
        let dim = dim.of("topk", self)?;
        let n = self.dim(dim)?;
        ensure!(k <= n, "topk", "asked for {k} of the {n} elements of dimension {dim}");
        let index = self.order("topk", dim, Some(k), largest)?;
        let values = if self.rank() == 0 && k == 0 {
            self.reshape([1])?.narrow(0, 0, 0)?
        } else {
            self.gather(dim, &index)?
        };
        Ok((values, index))
    }

    /// Indices of the first `k` (all if `None`) elements in order.
    #[track_caller]
    fn order(&self, op: &'static str, dim: usize, k: Option<usize>, descending: bool) -> Result<Tensor> {
        if self.rank() == 0 {
            return if k == Some(0) { Tensor::zeros([0], DType::I64) } else { Tensor::zeros((), DType::I64) };
        }
        let (k, last) = (k.unwrap_or(self.shape()[dim]), self.rank() - 1);
        let lines = self.detach().transpose(dim, last)?.contiguous()?;
        let index = on_device!(
            self,
            op,
            for_dtype!(self.dtype(), T => Ok(cpu::order::<T>(&lines, k, descending, op))),
            gpu::order(&lines, k, descending, op),
            when self.dtype().size() == 8 || lines.shape()[last] <= u32::MAX as usize
        )?;
        index.transpose(dim, last)
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
    use rayon::slice::ParallelSliceMut;

    /// A number whose order is that of the elements: NaN last, both zeros equal.
    #[inline(always)]
    fn key64<T: Element>(value: T) -> u64 {
        if T::DTYPE.is_float() {
            let value = value.to_f64() + 0.0;
            let bits = value.to_bits();
            match value {
                _ if value.is_nan() => u64::MAX,
                _ if bits >> 63 == 0 => bits | 1 << 63,
                _ => !bits,
            }
        } else {
            value.to_i64() as u64 ^ 1 << 63
        }
    }

    /// The same for types of at most 32 bits.
    #[inline(always)]
    fn key32<T: Element>(value: T) -> u32 {
        if T::DTYPE.is_float() {
            let value = value.to_f64() as f32 + 0.0;
            let bits = value.to_bits();
            match value {
                _ if value.is_nan() => u32::MAX,
                _ if bits >> 31 == 0 => bits | 1 << 31,
                _ => !bits,
            }
        } else {
            value.to_i64() as u32 ^ 1 << 31
        }
    }

    /// Per line of the last dimension, the indices of its first `k` elements in order. What is sorted is key
    /// and index in one number: all differ, so an unstable sort gives the stable order.
    pub fn order<T: Element>(x: &Tensor, k: usize, descending: bool, op: &'static str) -> Tensor {
        let flip = if descending { u64::MAX } else { 0 };
        if size_of::<T>() <= 4 && x.shape().last().is_some_and(|&n| n <= u32::MAX as usize) {
            let pack = |v: T, i: usize| u64::from(key32(v) ^ flip as u32) << 32 | i as u64;
            lines(x, k, op, pack, |packed| i64::from(packed as u32))
        } else {
            let pack = |v: T, i: usize| u128::from(key64(v) ^ flip) << 64 | i as u128;
            lines(x, k, op, pack, |packed| packed as i64)
        }
    }

    /// Up to here a sorted list of the best so far beats selecting from all.
    const FEW: usize = 32;

    /// The `k` least in order; few elements get past the comparison with the worst of them.
    fn least<P: Ord + Copy>(k: usize, all: impl Iterator<Item = P>, best: &mut Vec<P>) {
        for p in all {
            if best.len() == k {
                if p > best[k - 1] {
                    continue;
                }
                best.pop();
            }
            best.insert(best.partition_point(|b| *b < p), p);
        }
    }

    fn lines<T: Element, P: Ord + Copy + Send>(
        x: &Tensor,
        k: usize,
        op: &'static str,
        pack: impl Fn(T, usize) -> P + Sync,
        index: impl Fn(P) -> i64 + Sync,
    ) -> Tensor {
        let mut shape = Dims::from_slice(x.shape());
        let n = shape.pop().unwrap_or(1);
        shape.push(k);
        let lines = x.numel() / n.max(1);
        let mut out = CpuVec::<i64>::new(count(&shape));
        let (source, target) = (Shared(x.cpu_ptr::<T>()), SharedMut::new(&mut out));
        for_ranges(if k == 0 { 0 } else { lines }, GRAIN / 16 / n.max(1), |range| {
            let mut packed = Vec::with_capacity(n);
            for line in range {
                let values = unsafe { std::slice::from_raw_parts(source.ptr().add(line * n), n) };
                packed.clear();
                let all = values.iter().enumerate().map(|(i, &v)| pack(v, i));
                if k <= FEW && k < n {
                    least(k, all, &mut packed);
                } else {
                    packed.extend(all);
                    if k < n {
                        packed.select_nth_unstable(k - 1);
                    }
                    let first = &mut packed[..k];
                    if k > 4 * GRAIN { first.par_sort_unstable() } else { first.sort_unstable() }
                }
                let to = unsafe { target.slice(line * k..(line + 1) * k) };
                to.iter_mut().zip(&packed).for_each(|(to, packed)| *to = index(*packed));
            }
        });
        Tensor::from_cpu(out, shape, op)
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::{
        gpu::{self, Known, sys},
        shape::{Dims, count},
    };

    /// Per line of the last dimension, the indices of its first `k` elements in order.
    pub fn order(x: &Tensor, k: usize, descending: bool, op: &'static str) -> Result<Tensor> {
        let mut shape = Dims::from_slice(x.shape());
        let n = shape.pop().unwrap_or(1);
        let lines = count(&shape);
        shape.push(k);
        let index = gpu::empty(x, &shape, DType::I64, op)?;
        let (n64, k64, dtype) = (n as i64, k as i64, x.dtype() as i32);
        let bytes = unsafe { sys::smalti_argsort_workspace(lines as i64, n64, k64, dtype) };
        let work = gpu::empty(x, &[bytes as usize], DType::U8, op)?;
        let (from, to) = (x.reshape([lines, n])?, index.reshape([lines, k])?);
        gpu::launch(op, [&from, &to, &work], |[x, index, work], stream| unsafe {
            sys::smalti_argsort(&x, descending.into(), &index, work.ptr, stream)
        })?;
        gpu::know(&index, Known { below: Some(n64), permutations: k == n, ..Known::default() });
        Ok(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck};

    #[test]
    fn stable_with_nan_largest() -> Result<()> {
        let values = [1.0, f32::NAN, -0.0, 0.0, f32::INFINITY, -1.0, 1.0, f32::NEG_INFINITY];
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            let x = Tensor::from_slice(&values, [8])?.to_dtype(dtype)?;
            assert_eq!(x.argsort(0, false)?.to_vec::<i64>()?, [7, 5, 2, 3, 0, 6, 4, 1]);
            assert_eq!(x.argsort(0, true)?.to_vec::<i64>()?, [1, 4, 0, 6, 2, 3, 5, 7]);
            assert_eq!(x.topk(3, 0, true)?.1.to_vec::<i64>()?, [1, 4, 0]);
            assert_eq!(x.topk(5, 0, false)?.1.to_vec::<i64>()?, [7, 5, 2, 3, 0]);
        }
        let x = Tensor::from_slice(&[3i64, i64::MIN, -1, i64::MAX], [2, 2])?;
        assert_eq!(x.sort(0, true)?.0.to_vec::<i64>()?, [3, i64::MAX, -1, i64::MIN]);
        Ok(())
    }

    #[test]
    fn scalars_empty_and_long() -> Result<()> {
        assert_eq!(Tensor::scalar(2.0).sort(0, false)?.0.item()?, 2.0);
        assert_eq!(Tensor::scalar(2.0).topk(0, 0, true)?.0.shape(), [0]);
        let empty = Tensor::zeros([3, 0], DType::F32)?;
        assert_eq!(empty.sort(1, false)?.0.shape(), [3, 0]);
        assert_eq!(empty.sort(0, false)?.0.shape(), [3, 0]);
        assert_eq!(empty.topk(0, 1, true)?.1.shape(), [3, 0]);
        assert!(empty.topk(1, 1, true).is_err());
        let (values, _) = Tensor::rand([200_000], &mut Rng::new(1))?.sort(0, false)?;
        assert!(values.to_vec::<f32>()?.windows(2).all(|w| w[0] <= w[1]));
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = Tensor::randn([4, 5], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        gradcheck(|t| Ok(t[0].sort(0, true)?.0), &[x.t()?])?;
        gradcheck(|t| Ok(t[0].topk(2, -1, false)?.0), &[x])
    }
}
