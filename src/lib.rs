//! Tensors, reverse-mode autodiff and fused kernels, written from scratch.
//!
//! # The tour
//!
//! ```
//! use smalti::{autograd::{Backward, Ctx, Grads}, nn, optim, DType, Result, Rng, Tensor};
//! use smalti::optim::{Algorithm, Optimizer};
//!
//! # fn main() -> Result<()> {
//! // Tensors: dtype, shape and device are values; views copy nothing; every error names what did not fit.
//! let x = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.], [2, 3])?;
//! let y = x.t()?.narrow(0, 1, 2)?;
//! assert_eq!(y.shape(), [2, 2]);
//! assert_eq!(y.sum(0)?.to_vec::<f32>()?, [5., 11.]);
//! let error = x.matmul(&x).unwrap_err().to_string();
//! assert!(error.starts_with("matmul: ") && error.contains("[2, 3]"));
//!
//! // Gradients: of a scalar with respect to every tracked tensor that it depends on.
//! let w = Tensor::from_slice(&[0.5f32, -1., 2.], [3])?.requires_grad();
//! let loss = x.mul(&w)?.tanh()?.sum(())?;
//! let grads = loss.backward()?;
//! assert_eq!(grads.get(&w).map(|g| g.shape().to_vec()), Some(vec![3]));
//!
//! // An operation of your own: a forward, and what its backward needs.
//! struct Square {
//!     x: Tensor,
//! }
//! impl Backward for Square {
//!     const NAME: &'static str = "square";
//!     const TWICE: bool = true; // written in tensor operations, so it can be differentiated again
//!     fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
//!         Ok([Some(grad.mul(&self.x)?.mul_scalar(2.0)?)].into_iter().collect())
//!     }
//! }
//! fn square(x: &Tensor) -> Result<Tensor> {
//!     let y = smalti::no_grad(|| x.mul(x))?;
//!     y.record([x], Square { x: x.clone() })
//! }
//! let doubles = Tensor::from_slice(&[0.3f64, -1.2], [2])?;
//! smalti::gradcheck(|t| square(&t[0]), &[doubles])?; // against central differences
//!
//! // A small net that learns XOR. Parameters have names; an optimizer is bound to them.
//! let params = nn::Params::new();
//! let mut rng = Rng::new(1);
//! let hidden = nn::Linear::new(&params.sub("hidden"), 2, 16, true, &mut rng)?;
//! let output = nn::Linear::new(&params.sub("output"), 16, 1, true, &mut rng)?;
//! let forward = |x: &Tensor| output.forward(&hidden.forward(x)?.tanh()?);
//! let inputs = Tensor::from_slice(&[0f32, 0., 0., 1., 1., 0., 1., 1.], [4, 2])?;
//! let truth = Tensor::from_slice(&[0f32, 1., 1., 0.], [4, 1])?;
//! let mut adam = optim::AdamW::default().over(&params.trained(), &[])?;
//! let mut last = f64::INFINITY;
//! for _ in 0..300 {
//!     let loss = square(&forward(&inputs)?.sub(&truth)?)?.mean(())?;
//!     adam.step(&loss.backward()?, 0.02)?;
//!     last = loss.item()?;
//! }
//! assert!(last < 0.01, "{last}");
//!
//! // Saving and loading, by name.
//! # let folder = std::env::temp_dir().join(format!("smalti-tour-{}", std::process::id()));
//! # std::fs::create_dir_all(&folder).ok();
//! let path = folder.join("xor.safetensors");
//! params.save(&path)?;
//! let report = params.load(&path)?;
//! assert!(report.missing.is_empty() && report.unexpected.is_empty());
//! # std::fs::remove_dir_all(&folder).ok();
//! # Ok(())
//! # }
//! ```
//!
//! # Where things are
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`Tensor`] | operations are its methods: one file a family under `src/ops/` |
//! | [`autograd`] | the graph, [`Backward`], [`no_grad`], [`checkpoint`] |
//! | [`gradcheck()`] | numerical gradients |
//! | [`nn`] | [`nn::Params`], layers |
//! | [`optim`] | optimizers, schedules, averages, clipping |
//! | [`comm`] | ranks that train one model together |
//! | [`io`] | safetensors, `.pth`, checkpoints of a whole training state |
//! | [`Device`] | where tensors live; `gpu`, under the features `cuda` and `emulate`, has memory statistics |
//! | [`cpu`] | buffers, threads, SIMD, matrix products: what operations are made of |

#[cfg(all(feature = "cuda", feature = "emulate"))]
compile_error!("the features `cuda` (a real GPU) and `emulate` (the same on host memory) exclude each other");

mod arena;
pub mod autograd;
pub mod comm;
pub mod cpu;
mod device;
mod display;
pub mod dtype;
pub mod error;
#[cfg(gpu)]
pub mod gpu;
mod gradcheck;
pub mod io;
pub mod nn;
mod ops;
pub mod optim;
pub mod random;
pub mod shape;
mod storage;
mod tensor;

pub(crate) use device::on_device;

pub use arena::Stats as MemoryStats;
pub use autograd::{Backward, BackwardOptions, Gradients, checkpoint, detect_anomaly, no_grad};
pub use device::Device;
pub use dtype::DType;
pub use error::{Error, Result};
pub use gradcheck::{gradcheck, gradcheck_with};
pub use ops::{
    boxes::BoxFormat,
    contrastive::InfoNce,
    conv::ConvOptions,
    grid_sample::{GridMode, GridOptions, GridPadding},
    interpolate::{InterpolateOptions, Interpolation, OutputSize},
    loss::{CrossEntropy, Reduction},
    pad::PadMode,
    patchify::PatchOrder,
    pool::{PoolDivisor, PoolOptions},
    roi_align::RoiAlignOptions,
};
pub use random::Rng;
pub use shape::{Dim, DimList, IntoShape};
pub use tensor::Tensor;
