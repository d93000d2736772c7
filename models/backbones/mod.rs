//! Architectures that several papers share.

pub mod vit;
