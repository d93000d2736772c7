//! One file or folder an operation family: API, saved state, backward, CPU code, tests.

mod binary;
mod cast;
mod cat;
mod create;
mod gather;
mod linear;
mod matmul;
mod layer_norm;
mod reduce;
mod scatter;
mod sort;
mod unary;
mod view;
