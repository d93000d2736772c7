//! Choosing elements by a condition: masked_fill, masked_select, nonzero.

use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    cpu::elementwise,
    ensure, on_device,
    shape::broadcast,
};
use smallvec::smallvec;

impl Tensor {
    /// A copy with `value` where `mask` (bool, or numbers that are not 0) holds. The mask broadcasts to the
    /// tensor's shape.
    ///
    /// # Errors
    /// If it does not.
    #[track_caller]
    pub fn masked_fill(&self, mask: &Tensor, value: f64) -> Result<Tensor> {
        let op = MaskedFill::NAME;
        ensure!(
            broadcast(op, self.shape(), mask.shape())?[..] == *self.shape(),
            op,
            "mask {:?} does not broadcast to {:?}",
            mask.shape(),
            self.shape()
        );
        let mask = mask.to_dtype(DType::Bool)?;
        let y = on_device!(
            self,
            op,
            {
                let value = Tensor::full((), value, self.dtype())?;
                elementwise::select(op, &mask, &value, self)
            },
            gpu::masked_fill(self, &mask, value)
        )?;
        y.record([self], MaskedFill { mask })
    }

    /// The elements where `mask` (bool, or numbers that are not 0) holds, in row-major order: `[count]`. Tensor
    /// and mask broadcast. On a GPU this waits for the device, to know how many there are.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    #[track_caller]
    pub fn masked_select(&self, mask: &Tensor) -> Result<Tensor> {
        let shape = broadcast("masked_select", self.shape(), mask.shape())?;
        let mask = mask.to_dtype(DType::Bool)?.expand(&shape)?;
        let at = on_device!(mask, "masked_select", Ok(cpu::positions(&mask)), gpu::positions(&mask))?;
        self.expand(shape)?.reshape([mask.numel()])?.gather(0, &at)
    }

    /// Where the elements are that are not 0, as rows of indices [count, rank] (i64) in row-major order.
    ///
    /// # Errors
    /// None on the CPU.
    #[track_caller]
    pub fn nonzero(&self) -> Result<Tensor> {
        let mask = self.detach().to_dtype(DType::Bool)?;
        on_device!(mask, "nonzero", Ok(cpu::nonzero(&mask)))
    }
}

struct MaskedFill {
    mask: Tensor,
}
impl Backward for MaskedFill {
    const NAME: &'static str = "masked_fill";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.masked_fill(&self.mask, 0.0)?)])
    }
}

mod cpu {
    use super::*;
    use crate::cpu::pool::CpuVec;

    /// Row-major positions of what is true.
    pub fn positions(mask: &Tensor) -> Tensor {
        let mask = elementwise::to_vec::<bool>(mask);
        let mut out = CpuVec::<i64>::new(mask.iter().filter(|&&m| m).count());
        let found = mask.iter().enumerate().filter(|&(_, &m)| m);
        out.iter_mut().zip(found).for_each(|(to, (i, _))| *to = i as i64);
        let n = out.len();
        Tensor::from_cpu(out, [n], "masked_select")
    }

    pub fn nonzero(mask: &Tensor) -> Tensor {
        let flat = positions(mask);
        let (flat, rank) = (flat.cpu_slice::<i64>(), mask.rank());
        let mut out = CpuVec::<i64>::new(flat.len() * rank);
        for (to, &position) in out.chunks_exact_mut(rank.max(1)).zip(flat) {
            let mut rest = position;
            for (to, &n) in to.iter_mut().zip(mask.shape()).rev() {
                *to = rest % n as i64;
                rest /= n as i64;
            }
        }
        Tensor::from_cpu(out, [flat.len(), rank], "nonzero")
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::{
        dtype::Element,
        for_dtype,
        gpu::{self, sys},
    };

    pub fn masked_fill(x: &Tensor, mask: &Tensor, value: f64) -> Result<Tensor> {
        let op = MaskedFill::NAME;
        let bits = for_dtype!(x.dtype(), T => gpu::bits_of(T::from_f64(value)));
        let order = elementwise::result_order(x.shape(), &[x]);
        let strides = elementwise::dense_strides(x.shape(), &order);
        let y = gpu::empty_strided(x, x.shape(), strides, x.dtype(), op)?;
        // in the order of memory, so that neighbours are threads of a warp
        let in_order = |t: &Tensor| t.detach().permute(&order[..]);
        let (from, to, mask) = (in_order(x)?, in_order(&y)?, in_order(&mask.expand(x.shape())?)?);
        gpu::launch(op, [&from, &mask, &to], |[x, mask, y], stream| unsafe {
            sys::smalti_masked_fill(&x, &mask, bits, &y, stream)
        })?;
        Ok(y)
    }

    /// Row-major positions of what is true: a stable sort puts them in front.
    pub fn positions(mask: &Tensor) -> Result<Tensor> {
        let flat = mask.reshape([mask.numel()])?;
        let count = flat.to_dtype(DType::I64)?.sum(())?.item()? as usize;
        flat.argsort(0, true)?.narrow(0, 0, count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck};

    #[test]
    fn scalars_empty_and_errors() -> Result<()> {
        let x = Tensor::zeros([2, 3], DType::F32)?;
        assert!(x.masked_fill(&Tensor::zeros([3, 2], DType::Bool)?, 1.0).is_err());
        assert!(Tensor::scalar(1.0).masked_fill(&x, 1.0).is_err(), "the mask may not widen the tensor");
        assert_eq!(x.nonzero()?.shape(), [0, 2]);
        assert_eq!(Tensor::scalar(1.0).nonzero()?.shape(), [1, 0]);
        assert_eq!(
            Tensor::scalar(4.0).masked_select(&Tensor::ones((), DType::Bool)?)?.to_vec::<f32>()?,
            [4.0]
        );
        assert_eq!(x.narrow(0, 0, 0)?.masked_select(&Tensor::ones([3], DType::Bool)?)?.shape(), [0]);
        let ids = Tensor::from_slice(&[5i64, 0, -1, 2], [2, 2])?;
        assert_eq!(ids.nonzero()?.to_vec::<i64>()?, [0, 0, 1, 0, 1, 1]);
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = Tensor::randn([3, 4], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        let mask = Tensor::from_slice(&[true, false, true, false], [4])?;
        gradcheck(|t| t[0].masked_fill(&mask, 7.0), std::slice::from_ref(&x))?;
        gradcheck(|t| t[0].t()?.masked_select(&mask.reshape([4, 1])?), std::slice::from_ref(&x))?;
        gradcheck(|t| t[0].narrow(0, 1, 1)?.masked_select(&x.gt(&x.zeros_like()?)?), std::slice::from_ref(&x))
    }
}
