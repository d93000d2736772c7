//! Tensors and reverse-mode autodiff.

pub mod autograd;
pub mod cpu;
mod device;
mod display;
pub mod dtype;
pub mod error;
mod gradcheck;
pub mod io;
pub mod nn;
mod ops;
pub mod optim;
pub mod random;
pub mod shape;
mod storage;
mod tensor;

pub use autograd::{Backward, BackwardOptions, Gradients, checkpoint, no_grad};
pub use device::Device;
pub use dtype::DType;
pub use error::{Error, Result};
pub use gradcheck::{gradcheck, gradcheck_with};
pub use ops::{
    conv::ConvOptions,
    grid_sample::{GridMode, GridOptions, GridPadding},
    interpolate::{InterpolateOptions, Interpolation, OutputSize},
    loss::{CrossEntropy, Reduction},
    pad::PadMode,
    patchify::PatchOrder,
    pool::{PoolDivisor, PoolOptions},
};
pub use random::Rng;
pub use shape::{Dim, DimList, IntoShape};
pub use tensor::Tensor;
