//! Normalisation: of rows, of channels, of groups of channels, to unit norm.

mod batch_norm;
mod channels;
mod group_norm;
#[cfg(gpu)]
mod images;
mod layer_norm;
mod normalize;
mod rows;
