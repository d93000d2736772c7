//! Helpers for GPU code: the device's memory, launching kernels, the way of an operation through the host. No
//! operation lives here. Compiled under the features `cuda` and `emulate`.

#[rustfmt::skip]
#[allow(dead_code)]
pub(crate) mod bindings;
mod driver;
pub(crate) mod elementwise;
#[cfg(all(test, feature = "emulate"))]
mod far;
mod graph;
mod host;
mod known;
mod launch;
mod many;
mod memory;
mod product;
mod timing;

#[allow(unused_imports)]
pub(crate) use bindings as sys;
pub(crate) use driver::{Convolution, Image, open};
#[cfg(all(test, feature = "emulate"))]
pub(crate) use graph::alone;
pub use graph::{Graph, refill};
#[allow(unused_imports)]
pub(crate) use graph::{is_recording, touch};
pub(crate) use host::{Upload, enter_host, is_on_host, leave_host, on_gpu, upload_fields};
pub use host::{host_operations, reset_host_operations};
#[allow(unused_imports)]
pub(crate) use known::{Known, are_permutations, is_positive, know, known};
pub(crate) use launch::{bits_of, empty, empty_on, empty_strided, launch, launch_some, workspace};
pub(crate) use many::{Many, numbers_on, writable, writable_for_good, write_numbers};
pub(crate) use memory::Buffer;
pub use memory::{reset_peak, stats, synchronize, trim};
pub(crate) use product::{Besides, convolve, product};
pub use product::{allow_tf32, set_allow_tf32};
pub use timing::{Event, Range, range};

/// Is `cuda:0` the emulator?
pub const fn is_emulated() -> bool {
    cfg!(feature = "emulate")
}
