//! Building blocks of networks: named parameters and layers.

mod load;
mod attention;
mod block;
mod conv;
pub mod init;
mod linear;
mod mlp;
mod norm;
mod params;
pub mod pos_embed;

pub use load::{LoadOptions, LoadReport};
pub use attention::Attention;
pub use block::{Block, BlockConfig};
pub use conv::Conv2d;
pub use linear::Linear;
pub use norm::LayerNorm;
pub use params::{Param, Params};
