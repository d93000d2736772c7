//! Libraries that are loaded at run time. cudarc panics at the first call into one that is not there, so each use
//! asks here first; the answer is kept.

use crate::{Error, Result};
use std::sync::OnceLock;

#[derive(Clone, Copy)]
pub(super) enum Library {
    Driver,
    BlasLt,
    Dnn,
    Nvtx,
}

impl Library {
    pub fn is_present(self) -> bool {
        static FOUND: [OnceLock<bool>; 4] = [const { OnceLock::new() }; 4];
        *FOUND[self as usize].get_or_init(|| unsafe {
            match self {
                Library::Driver => cudarc::driver::sys::is_culib_present(),
                Library::BlasLt => cudarc::cublaslt::sys::is_culib_present(),
                Library::Dnn => cudarc::cudnn::sys::is_culib_present(),
                Library::Nvtx => cudarc::nvtx::sys::is_culib_present(),
            }
        })
    }

    /// An error that names the library and what to do, unless it is there.
    pub fn needed(self, op: &'static str) -> Result<()> {
        let (file, package) = match self {
            Library::BlasLt => ("libcublasLt.so", "nvidia-cublas"),
            Library::Dnn => ("libcudnn.so", "nvidia-cudnn-cu13"),
            Library::Driver | Library::Nvtx => ("libcuda.so", "the NVIDIA driver"),
        };
        if self.is_present() {
            return Ok(());
        }
        Err(Error::op(
            op,
            format!(
                "needs the library {file}, and the loader does not find it; install it (or pip's {package}) and \
                 add its folder to LD_LIBRARY_PATH"
            ),
        ))
    }
}
