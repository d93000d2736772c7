//! Helpers for GPU code: the device's memory, launching kernels, the way of an operation through the host. No
//! operation lives here. Compiled under the features `cuda` and `emulate`.

#[rustfmt::skip]
pub(crate) mod bindings;
mod driver;
mod host;
mod known;
mod launch;
mod memory;

#[allow(unused_imports)]
pub(crate) use bindings as sys;
pub(crate) use driver::open;
pub(crate) use host::{Upload, enter_host, is_on_host, leave_host, on_gpu, upload_fields};
pub use host::{host_operations, reset_host_operations};
#[allow(unused_imports)]
pub(crate) use known::{Known, are_permutations, is_positive, know, known};
pub(crate) use launch::{bits_of, empty, empty_on, empty_strided, launch};
pub(crate) use memory::Buffer;
pub use memory::{stats, synchronize, trim};

/// Is `cuda:0` the emulator?
pub const fn is_emulated() -> bool {
    cfg!(feature = "emulate")
}
