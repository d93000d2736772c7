//! Dropout of elements and of whole samples. The random words are a function of (seed, stream, position), so
//! masks are the same for any number of threads, and backward makes them again instead of keeping them.

use crate::{
    Result, Rng, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_float, on_device,
    shape::Dims,
};
use smallvec::smallvec;

impl Tensor {
    /// Each element is 0 with probability `p`, else divided by 1 - p (Srivastava et al., 2014). For training;
    /// in evaluation do not call it. `p` = 0 is the identity, without a copy.
    ///
    /// # Errors
    /// If `p` is not in [0, 1] or the dtype is not a float.
    #[track_caller]
    pub fn dropout(&self, p: f64, rng: &mut Rng) -> Result<Tensor> {
        ensure!((0.0..=1.0).contains(&p), Dropout::NAME, "p = {p} is no probability");
        if p == 0.0 {
            return Ok(self.clone());
        }
        let first = rng.reserve(self.numel() as u64) / 4;
        self.drop_elements(Dropout { p, source: *rng, first })
    }

    #[track_caller]
    fn drop_elements(&self, rule: Dropout) -> Result<Tensor> {
        let x = self.contiguous()?;
        let y = on_device!(
            self,
            Dropout::NAME,
            for_float!(self.dtype(), Dropout::NAME, T => Ok(cpu::dropout::<T>(&x, &rule))),
            gpu::dropout(&x, &rule)
        )?;
        y.record([self], rule)
    }

    /// Stochastic depth (Huang et al., 2016): each sample (slice of dimension 0) is 0 with probability `p`,
    /// else divided by 1 - p. `p` = 0 is the identity, without a copy.
    ///
    /// # Errors
    /// If `p` is not in [0, 1], the dtype is not a float, or the tensor is a scalar.
    #[track_caller]
    pub fn drop_path(&self, p: f64, rng: &mut Rng) -> Result<Tensor> {
        ensure!((0.0..=1.0).contains(&p), "drop_path", "p = {p} is no probability");
        ensure!(
            self.rank() > 0 && self.dtype().is_float(),
            "drop_path",
            "needs float samples, got {} {:?}",
            self.dtype(),
            self.shape()
        );
        if p == 0.0 {
            return Ok(self.clone());
        }
        let mut shape = Dims::from_elem(1, self.rank());
        shape[0] = self.shape()[0];
        let factors = Tensor::ones(shape, self.dtype())?.dropout(p, rng)?;
        self.mul(&factors)
    }
}

/// Element i is kept if word `4 * first + i` of the stream says so.
#[derive(Clone, Copy)]
struct Dropout {
    p: f64,
    source: Rng,
    first: u64,
}
impl Dropout {
    /// p in units of a word; p = 1 leaves the one word out that would be kept.
    fn threshold(&self) -> u32 {
        (self.p * 4_294_967_296.0).round().min(u32::MAX.into()) as u32
    }

    /// The factor of what is kept.
    fn scale(&self) -> f64 {
        if self.p == 1.0 { 0.0 } else { 1.0 / (1.0 - self.p) }
    }
}
impl Backward for Dropout {
    const NAME: &'static str = "dropout";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.drop_elements(*self)?)])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            parallel::{SharedMut, for_ranges},
            pool::CpuVec,
            simd::simd_of,
        },
        dtype::{Float, Real},
    };

    /// Blocks of four words that are drawn together, so that Philox vectorises.
    const BLOCKS: usize = 16;

    pub fn dropout<T: Float>(x: &Tensor, rule: &Dropout) -> Tensor {
        let values = x.cpu_slice::<T>();
        let mut out = CpuVec::<T>::new(values.len());
        let target = SharedMut::new(&mut out);
        let (threshold, scale) = (rule.threshold(), T::Acc::of(rule.scale()));
        for_ranges(values.len(), 1 << 14, |range| {
            let start = range.start;
            let (from, to) = (&values[range.clone()], unsafe { target.slice(range) });
            for (i, (to, from)) in to.chunks_mut(4 * BLOCKS).zip(from.chunks(4 * BLOCKS)).enumerate() {
                let first = rule.first + (start / 4 + i * BLOCKS) as u64;
                simd_of::<T, _>(
                    #[inline(always)]
                    || {
                        let words = rule.source.blocks::<BLOCKS>(first);
                        let mut factors = [T::Acc::ZERO; 4 * BLOCKS];
                        for b in 0..BLOCKS {
                            for w in 0..4 {
                                factors[4 * b + w] =
                                    if words[w][b] >= threshold { scale } else { T::Acc::ZERO };
                            }
                        }
                        for ((to, &x), &factor) in to.iter_mut().zip(from).zip(&factors) {
                            *to = T::store(x.acc() * factor);
                        }
                    },
                );
            }
        });
        Tensor::from_cpu(out, x.shape(), "dropout")
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::gpu::{self, sys};

    pub fn dropout(x: &Tensor, rule: &Dropout) -> Result<Tensor> {
        ensure!(x.dtype().is_float(), Dropout::NAME, "needs a float tensor, got {}", x.dtype());
        let y = gpu::empty(x, x.shape(), x.dtype(), Dropout::NAME)?;
        let [seed, philox_stream, _] = rule.source.state();
        let (threshold, scale) = (rule.threshold(), rule.scale());
        gpu::launch(Dropout::NAME, [x, &y], |[x, y], stream| unsafe {
            sys::smalti_dropout(&x, seed, philox_stream, rule.first, threshold, scale, &y, stream)
        })?;
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, gradcheck};

    #[test]
    fn keeps_the_mean_and_the_word_order() -> Result<()> {
        let n = 100_003;
        let x = Tensor::ones([n], DType::F32)?;
        let mut rng = Rng::new(3);
        let y = x.dropout(0.25, &mut rng)?.to_vec::<f32>()?;
        let kept = y.iter().filter(|&&v| v != 0.0).count() as f64 / n as f64;
        assert!((kept - 0.75).abs() < 0.01 && y.iter().all(|&v| v == 0.0 || v == 1.0 / 0.75));
        for i in [0, 1, 77, 16_384, 99_999] {
            assert_eq!(y[i] != 0.0, Rng::new(3).word(i as u64) >= 1 << 30);
        }
        assert_ne!(x.dropout(0.25, &mut rng)?.to_vec::<f32>()?, y, "the generator moved on");
        Ok(())
    }

    #[test]
    fn ends_of_the_range() -> Result<()> {
        let x = Tensor::ones([2, 3], DType::BF16)?;
        let rng = &mut Rng::new(1);
        let before = rng.state();
        assert_eq!(x.dropout(0.0, rng)?.cpu_ptr::<crate::dtype::Bf16>(), x.cpu_ptr(), "no copy");
        assert_eq!(rng.state(), before);
        assert_eq!(x.dropout(1.0, rng)?.sum(())?.item()?, 0.0);
        assert_eq!(x.drop_path(1.0, rng)?.sum(())?.item()?, 0.0);
        assert!(x.dropout(1.5, rng).is_err() && x.dropout(f64::NAN, rng).is_err());
        assert!(Tensor::scalar(1.0).drop_path(0.5, rng).is_err());
        Ok(())
    }

    #[test]
    fn paths_are_whole_samples() -> Result<()> {
        let y = Tensor::ones([64, 2, 3], DType::F32)?.drop_path(0.5, &mut Rng::new(5))?;
        let sums = y.sum([1, 2])?.to_vec::<f32>()?;
        assert!(sums.iter().all(|&s| s == 0.0 || s == 12.0));
        assert!((16..48).contains(&sums.iter().filter(|&&s| s == 0.0).count()));
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = Tensor::randn([6, 5], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        gradcheck(|t| t[0].dropout(0.4, &mut Rng::new(2)), &[x.t()?])?;
        gradcheck(|t| t[0].drop_path(0.4, &mut Rng::new(2)), &[x])
    }
}
