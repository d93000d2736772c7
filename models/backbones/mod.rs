//! Architectures that several papers share.

pub mod checkpoint;
pub mod resnet;
pub mod vit;
