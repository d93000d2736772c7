//! Architectures that several papers share.

mod backbone;
pub(crate) mod blocks;
pub mod checkpoint;
mod head;
pub mod resnet;
mod stem;
pub mod text;
pub mod vit;

pub use backbone::{Backbone, BackboneConfig, ClassTokenVit};
pub use head::{Head, HeadEnd};
pub use stem::ConvStem;
