//! One file or folder an operation family: API, saved state, backward, CPU code, tests.

mod binary;
mod cast;
mod create;
mod linear;
mod matmul;
mod layer_norm;
mod reduce;
mod unary;
mod view;
