//! The one seam between a real GPU and the emulated one: two files with the same interface.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
use cuda as active;

#[cfg(not(feature = "cuda"))]
mod emulated;
#[cfg(not(feature = "cuda"))]
use emulated as active;

pub(crate) use active::*;
