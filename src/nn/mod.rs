//! Building blocks of networks: named parameters and layers.

mod load;
mod params;

pub use load::{LoadOptions, LoadReport};
pub use params::{Param, Params};
