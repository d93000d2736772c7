//! One file or folder an operation family: API, saved state, backward, CPU code, tests.

mod attention;
mod binary;
mod cast;
mod cat;
pub(crate) mod conv;
mod create;
mod dropout;
mod embedding;
mod gather;
pub(crate) mod grid_sample;
pub(crate) mod interpolate;
mod linear;
pub(crate) mod loss;
mod masked;
mod masking;
mod matmul;
mod norm;
pub(crate) mod pad;
pub(crate) mod patchify;
mod pixel_shuffle;
pub(crate) mod pool;
mod reduce;
mod repeat;
mod roll;
mod scatter;
mod softmax;
mod sort;
mod triangle;
mod unary;
mod unfold;
mod view;


