//! Building blocks of networks: named parameters and layers.

mod params;

pub use params::{Param, Params};
