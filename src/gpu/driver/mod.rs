//! The one seam between a real GPU and the emulated one: two folders with the same interface.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
use cuda as active;

#[cfg(not(feature = "cuda"))]
mod emulated;
#[cfg(not(feature = "cuda"))]
use emulated as active;

pub(crate) use active::*;

use crate::{
    DType,
    ops::conv::{Geometry, Kind},
};

/// A matrix in device memory. Element (i, j) of matrix b lies at `ptr + b * batch + i * row + j * column`, in
/// elements; one of the two inner steps is 1.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub ptr: *mut u8,
    pub row: isize,
    pub column: isize,
    pub batch: isize,
}

/// What a product does besides.
#[derive(Clone, Copy)]
pub(crate) enum Epilogue {
    None,
    /// Adds this vector of n elements to every row of y.
    Bias(*const u8),
    /// Writes the sums over the rows of a, m elements, to this place: where y is the gradient of a weight, a is
    /// the transposed gradient of the layer's output, and these sums are the gradient of its bias.
    RowSums(*mut u8),
}

/// `y[m, n] = a[m, k] b[k, n]` for each of a batch, y row-major.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub op: &'static str,
    pub dtype: DType,
    pub batch: usize,
    /// m, n, k.
    pub size: [usize; 3],
    pub a: Matrix,
    pub b: Matrix,
    pub y: Matrix,
    pub epilogue: Epilogue,
    /// f32 operands may be rounded to TF32 (10 bits of mantissa).
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub allow_tf32: bool,
}

/// An image or a kernel in device memory, with steps in elements.
#[derive(Clone, Copy)]
pub(crate) struct Image {
    pub ptr: *mut u8,
    pub shape: [usize; 4],
    pub strides: [isize; 4],
}

/// One of the three operations of a convolution; `kind` says which of x, y and w is written.
#[derive(Clone, Copy)]
pub(crate) struct Convolution {
    pub op: &'static str,
    pub kind: Kind,
    pub geometry: Geometry,
    pub dtype: DType,
    pub x: Image,
    pub y: Image,
    pub w: Image,
    /// As in [`Product`].
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub allow_tf32: bool,
}
