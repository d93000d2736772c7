//! Building blocks of networks: named parameters and layers.

mod attention;
mod block;
mod conv;
pub mod init;
mod linear;
mod load;
mod mlp;
mod norm;
mod params;
pub mod pos_embed;

pub use attention::Attention;
pub use block::{Block, BlockConfig, BlockNames};
pub use conv::Conv2d;
pub use linear::Linear;
pub use load::{LoadOptions, LoadReport};
pub use mlp::{Gelu, Mlp};
pub use norm::{BatchNorm, BatchNormConfig, GroupNorm, LayerNorm, RmsNorm, Statistics};
pub use params::{Param, Params};
