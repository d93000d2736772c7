//! One file or folder an operation family: API, saved state, backward, CPU code, tests.

mod binary;
mod cast;
mod cat;
mod create;
mod dropout;
mod embedding;
mod gather;
pub(crate) mod grid_sample;
pub(crate) mod interpolate;
mod layer_norm;
mod linear;
mod masked;
mod masking;
mod matmul;
pub(crate) mod pad;
pub(crate) mod patchify;
mod pixel_shuffle;
mod reduce;
mod repeat;
mod roll;
mod scatter;
mod sort;
mod triangle;
mod unary;
mod view;
