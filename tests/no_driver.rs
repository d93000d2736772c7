//! A binary built with the feature `cuda` starts on a machine without a driver and says so, in an error.
#![cfg(feature = "cuda")]

use smalti::{DType, Device, Result, Tensor};

/// Where the kernel module is, a driver is there.
fn has_driver() -> bool {
    std::path::Path::new("/proc/driver/nvidia/version").exists()
}

#[test]
fn device_or_error() -> Result<()> {
    if has_driver() {
        let gpu = Device::cuda(0)?;
        let x = Tensor::arange(5, DType::F32)?;
        assert_eq!(x.to_device(gpu)?.to_device(Device::Cpu)?.to_vec::<f32>()?, x.to_vec::<f32>()?);
        smalti::gpu::synchronize(gpu)?;
    } else {
        let error = Device::cuda(0).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("cuda:0") && error.contains("no CUDA driver"), "{error}");
        assert!(Tensor::arange(5, DType::F32)?.to_device(Device::Cuda(0)).is_err());
        assert!(smalti::gpu::stats(Device::Cuda(0)).is_err());
        assert!(smalti::gpu::Event::record(Device::Cuda(0)).is_err());
        assert!(smalti::gpu::Graph::capture(Device::Cuda(0), || Ok(())).is_err());
        assert!(Device::parse("cuda:0").is_err());
        let _range = smalti::gpu::range("ranges cost nothing");
    }
    // more devices than any machine has
    assert!(Device::cuda(1 << 20).is_err());
    // the CPU is as it was
    assert_eq!(Tensor::arange(3, DType::F32)?.sum(())?.item()?, 3.0);
    Ok(())
}
