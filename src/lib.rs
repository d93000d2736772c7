//! Tensors and reverse-mode autodiff.

pub mod error;
pub mod random;

pub use error::{Error, Result};
pub use random::Rng;
