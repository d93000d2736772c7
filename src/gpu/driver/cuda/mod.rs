//! A real GPU, by the driver API. The library is loaded at run time; where there is none, the first thing that
//! everything here passes through, [`gpu`], says so.

mod convolution;
mod graph;
mod library;
mod product;
mod transfer;

pub(crate) use convolution::convolution;
pub(crate) use graph::{
    Event, begin_capture, elapsed_ms, end_capture, forget_graph, launch_graph, pop_range, push_range,
    record_event,
};
pub(crate) use product::product;
pub(crate) use transfer::{download, upload};

use crate::{Device, Error, Result};
use cudarc::driver::sys::{self as cu, CUresult};
use library::Library;
use std::{
    ffi::{CStr, c_void},
    ptr::null_mut,
    sync::{Mutex, OnceLock},
};

/// Devices that the crate counts to.
const MOST: usize = 64;
/// A call that an older driver does not have would be a panic.
const OLDEST: i32 = 12080;

/// What a device has for the life of the process. Handles of the driver are valid on every thread.
struct Gpu {
    index: usize,
    /// The primary context: the one that the runtime API of the kernels and the libraries use as well.
    context: usize,
    /// The one stream on which everything runs, in the order in which it was asked for.
    stream: usize,
    ring: Mutex<Option<transfer::Ring>>,
    products: Mutex<product::Plans>,
    convolutions: Mutex<convolution::Plans>,
}

impl Gpu {
    fn stream(&self) -> cu::CUstream {
        self.stream as cu::CUstream
    }

    fn error(&self, message: impl Into<String>) -> Error {
        Error::Device { device: Device::Cuda(self.index).to_string(), message: message.into() }
    }

    /// Turns a status of the driver into an error that names the call.
    fn check(&self, call: &str, code: CUresult) -> Result<()> {
        match code {
            CUresult::CUDA_SUCCESS => Ok(()),
            code => Err(self.error(format!("{call}: {}", text(code)))),
        }
    }

    /// Makes the device's context the one of this thread. Costs some ten nanoseconds where it is already.
    fn bind(&self) -> Result<()> {
        self.check("cuCtxSetCurrent", unsafe { cu::cuCtxSetCurrent(self.context as cu::CUcontext) })
    }
}

fn text(code: CUresult) -> String {
    let read = |f: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = std::ptr::null();
        let found = unsafe { f(code, &mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
        found.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    match (read(cu::cuGetErrorName), read(cu::cuGetErrorString)) {
        (Some(name), Some(string)) => format!("{string} ({name})"),
        _ => format!("CUDA driver error {}", code as u32),
    }
}

/// Device `index`, current on this thread.
fn gpu(index: usize) -> Result<&'static Gpu> {
    static ALL: [OnceLock<Result<Gpu, String>>; MOST] = [const { OnceLock::new() }; MOST];
    let none = |message: String| Error::Device { device: Device::Cuda(index).to_string(), message };
    let slot = ALL.get(index).ok_or_else(|| none(format!("devices are counted to {}", MOST - 1)))?;
    match slot.get_or_init(|| start(index)) {
        Ok(gpu) => gpu.bind().map(|()| gpu),
        Err(message) => Err(none(message.clone())),
    }
}

fn start(index: usize) -> Result<Gpu, String> {
    if !Library::Driver.is_present() {
        return Err("no CUDA driver on this machine (libcuda is not to be found)".into());
    }
    let check = |call: &str, code| match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(format!("{call}: {}", text(code))),
    };
    unsafe {
        match cu::cuInit(0) {
            CUresult::CUDA_ERROR_NO_DEVICE => return Err("the CUDA driver finds no GPU".into()),
            code => check("cuInit", code)?,
        }
        let (mut version, mut count) = (0, 0);
        check("cuDriverGetVersion", cu::cuDriverGetVersion(&mut version))?;
        if version < OLDEST {
            let dotted = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
            return Err(format!(
                "the CUDA driver knows CUDA {} and older; {} is needed",
                dotted(version),
                dotted(OLDEST)
            ));
        }
        check("cuDeviceGetCount", cu::cuDeviceGetCount(&mut count))?;
        if index >= count as usize {
            return Err(format!("there are {count} GPUs"));
        }
        let (mut device, mut context, mut stream) = (0, null_mut(), null_mut());
        check("cuDeviceGet", cu::cuDeviceGet(&mut device, index as i32))?;
        check("cuDevicePrimaryCtxRetain", cu::cuDevicePrimaryCtxRetain(&mut context, device))?;
        check("cuCtxSetCurrent", cu::cuCtxSetCurrent(context))?;
        // does not wait for the default stream, which nothing here uses
        let flags = cu::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        check("cuStreamCreate", cu::cuStreamCreate(&mut stream, flags))?;
        Ok(Gpu {
            index,
            context: context as usize,
            stream: stream as usize,
            ring: Mutex::default(),
            products: Mutex::default(),
            convolutions: Mutex::default(),
        })
    }
}

/// Makes sure that device `index` is there.
pub(crate) fn open(index: usize) -> Result<()> {
    gpu(index).map(|_| ())
}

/// Fresh memory of device `index`, or `None` if there is not so much.
pub(crate) fn allocate(index: usize, bytes: usize) -> Result<Option<usize>> {
    let gpu = gpu(index)?;
    let mut address = 0;
    match unsafe { cu::cuMemAlloc_v2(&mut address, bytes.max(1)) } {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Ok(None),
        code => gpu.check("cuMemAlloc", code).map(|()| Some(address as usize)),
    }
}

/// Gives back what [`allocate`] gave.
///
/// # Safety
/// The memory is not used any more.
pub(crate) unsafe fn release(index: usize, address: usize, _bytes: usize) {
    // A failure here is a lost device, which the next call reports.
    if gpu(index).is_ok() {
        let _ = unsafe { cu::cuMemFree_v2(address as cu::CUdeviceptr) };
    }
}

/// Writes zeros, in the order of the stream.
///
/// # Safety
/// The place holds `bytes` bytes.
pub(crate) unsafe fn zero(index: usize, at: *mut u8, bytes: usize) -> Result<()> {
    let gpu = gpu(index)?;
    if bytes == 0 {
        return Ok(());
    }
    let code = unsafe { cu::cuMemsetD8Async(at as cu::CUdeviceptr, 0, bytes, gpu.stream()) };
    gpu.check("cuMemsetD8Async", code)
}

/// The stream on which everything of device `index` runs; the device is current on this thread.
pub(crate) fn stream(index: usize) -> Result<*mut c_void> {
    Ok(gpu(index)?.stream().cast())
}

/// Waits for all work of device `index`. An error of a kernel that ran before is reported here (and by every call
/// from then on: such an error ends the context's life).
pub(crate) fn synchronize(index: usize) -> Result<()> {
    let gpu = gpu(index)?;
    gpu.check("synchronize", unsafe { cu::cuStreamSynchronize(gpu.stream()) })
}
