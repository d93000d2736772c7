//! Moving tensors between devices. The gradient moves back.

use crate::{
    Device, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
};
use smallvec::smallvec;

impl Tensor {
    /// The same values on `device`; no copy where they already are. Row-major, unless the tensor is dense in another
    /// order, which stays.
    ///
    /// # Errors
    /// If the device is not there or has no memory left.
    #[track_caller]
    pub fn to_device(&self, device: Device) -> Result<Tensor> {
        if device == self.device() {
            return Ok(self.clone());
        }
        self.transferred(device)?.record_transfer(self)
    }

    fn record_transfer(self, from: &Tensor) -> Result<Tensor> {
        let device = from.device();
        // `record` holds that an operation's tensors are on one device, which is what this one is there to change
        self.record_across([from], ToDevice { device })
    }

    /// The same, untracked.
    pub(crate) fn transferred(&self, device: Device) -> Result<Tensor> {
        if device == self.device() {
            return Ok(self.detach());
        }
        #[cfg(gpu)]
        return between::copy(&self.detach(), device);
        #[cfg(not(gpu))]
        Device::cuda(0).map(|_| self.detach())
    }

    /// A tensor that was just made on the CPU, on the device where new tensors belong.
    pub(crate) fn placed(&self) -> Result<Tensor> {
        if crate::device::is_on_host() { Ok(self.clone()) } else { self.transferred(Device::current()?) }
    }
}

struct ToDevice {
    device: Device,
}

impl Backward for ToDevice {
    const NAME: &'static str = "to_device";
    const TWICE: bool = true;

    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.to_device(self.device)?)])
    }
}

#[cfg(gpu)]
mod between {
    use super::*;
    use crate::{
        cpu::{
            elementwise::{dense_strides, memory_order},
            pool::Buffer,
        },
        gpu,
        shape::Dims,
        storage::Storage,
    };

    pub fn copy(x: &Tensor, device: Device) -> Result<Tensor> {
        // one element that is repeated travels once
        if x.numel() > 1 && x.strides().iter().zip(x.shape()).all(|(&s, &n)| s == 0 || n == 1) {
            let one = x.view_as(Dims::new(), Default::default(), x.offset(), x.op());
            let (shape, strides) = (Dims::from_slice(x.shape()), x.strides().into());
            return Ok(copy(&one, device)?.view_as(shape, strides, 0, x.op()));
        }
        let order = memory_order(x.shape(), x.strides());
        let dense = x.permute(&order[..])?.contiguous()?;
        let strides = dense_strides(x.shape(), &order);
        let (start, bytes) = (dense.offset() * x.dtype().size(), dense.numel() * x.dtype().size());
        let host = match dense.storage() {
            Storage::Cuda(buffer) => {
                let host = Buffer::new(bytes);
                buffer.download(start, &host)?;
                Some(host)
            }
            Storage::Cpu(_) => None,
        };
        let storage = match device {
            Device::Cpu => Storage::Cpu(host.unwrap_or_else(|| Buffer::new(0))),
            Device::Cuda(index) => {
                gpu::open(index)?;
                let buffer = gpu::Buffer::new(index, bytes)?;
                match (host, dense.storage()) {
                    (Some(host), _) => buffer.upload(host.ptr(), bytes)?,
                    (None, from) => buffer.upload(unsafe { from.host().ptr().add(start) }, bytes)?,
                }
                Storage::Cuda(buffer)
            }
        };
        Ok(Tensor::from_storage(storage, Dims::from_slice(x.shape()), strides, x.dtype(), x.op()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng};

    #[test]
    fn where_it_is_already_costs_nothing() -> Result<()> {
        let x = Tensor::arange(6, DType::F32)?;
        let y = x.to_device(x.device())?;
        assert!(std::ptr::eq(x.storage(), y.storage()));
        Ok(())
    }

    #[cfg(gpu)]
    #[test]
    fn there_and_back() -> Result<()> {
        let gpu = Device::cuda(0)?;
        let x = Device::Cpu.scope(|| Tensor::randn([2, 3, 4], &mut Rng::new(1)))?;
        for x in [x.clone(), x.permute([2, 0, 1])?, x.narrow(1, 1, 2)?, x.narrow(1, 0, 1)?.expand([2, 5, 4])?]
        {
            let there = x.to_device(gpu)?;
            assert_eq!(there.device(), gpu);
            assert_eq!(there.to_device(Device::Cpu)?.to_vec::<f32>()?, x.to_vec::<f32>()?);
            assert_eq!(there.to_vec::<f32>()?, x.to_vec::<f32>()?);
        }
        let leaf = x.requires_grad();
        let loss = leaf.to_device(gpu)?.square()?.sum(())?;
        let grads = loss.backward()?;
        assert_eq!(grads.get(&leaf).map(Tensor::device), Some(Device::Cpu));
        assert!(x.add(&x.to_device(gpu)?).is_err(), "tensors of two devices do not meet");
        Ok(())
    }

    #[cfg(not(gpu))]
    #[test]
    fn without_a_gpu_side() {
        let error = Device::cuda(0).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("--features cuda"), "{error}");
        let _ = Rng::new(0);
    }
}
