//! Optimizers, learning rate schedules, gradient clipping, averages of parameters.
//!
//! An algorithm is a plain struct of its numbers; [`over`](AdamW::over) binds it to parameters:
//!
//! ```
//! # use smalti::{DType, Tensor, nn::Params, optim::{AdamW, Algorithm, Optimizer, Schedule, no_decay_1d}};
//! # fn main() -> smalti::Result<()> {
//! # let params = Params::new();
//! # let w = params.param("w", Tensor::ones([3, 2], DType::F32)?)?;
//! let groups = [no_decay_1d(&params.trained())];
//! let mut optimizer =
//!     AdamW { betas: (0.9, 0.95), weight_decay: 0.05, ..Default::default() }.over(&params.trained(), &groups)?;
//! let schedule = Schedule::WarmupCosine { base: 1e-3, warmup: 0.0, min: 0.0, warmup_steps: 10.0, steps: 100.0 };
//! for step in 0..2 {
//!     let grads = w.get().sum(())?.backward()?;
//!     optimizer.step(&grads, schedule.at(step as f64))?;
//! }
//! # Ok(()) }
//! ```

mod adam;
mod clip;
mod ema;
#[cfg(all(test, feature = "emulate"))]
mod gpu_tests;
mod group;
mod lamb;
mod lars;
mod schedule;
mod sgd;
mod update;

pub use adam::{Adam, AdamW};
pub use clip::{clip_grad_norm, clip_grad_norm_tensor, clip_grad_value, grad_norm};
pub use ema::{Ema, average_into};
pub use group::{Group, layer_decay, no_decay_1d};
pub use lamb::Lamb;
pub use lars::{Lars, Trust};
pub use schedule::Schedule;
pub use sgd::Sgd;
pub use update::{Algorithm, Stepper};

use crate::{Gradients, Result, Tensor};

/// What moves parameters along their gradients.
pub trait Optimizer: Send {
    /// One step at the learning rate `lr`, in place. A parameter without a gradient is left as it is, decay
    /// included.
    ///
    /// # Errors
    /// If `lr` is no finite number from 0 up, or a gradient has another shape than its parameter; nothing has
    /// been changed then.
    fn step(&mut self, grads: &Gradients, lr: f64) -> Result<()>;

    /// To be called before each launch of a graph in which a step was recorded: writes what changes from step to step
    /// (`lr`, corrections by the number of steps) to the device, and counts a step for the parameters that move in it.
    /// The numbers of `step` at the recording do not matter; before that, `step` has run once in the ordinary way.
    ///
    /// # Errors
    /// If `lr` is no finite number from 0 up, or a graph is being recorded.
    #[cfg(gpu)]
    fn next_step(&mut self, lr: f64) -> Result<()>;

    /// All that has to be saved, as `<parameter>.<what>`: moments, step counts, f32 copies of half-precision
    /// parameters. Parameters that have not moved yet have no state.
    fn state(&self) -> Vec<(String, Tensor)>;

    /// Restores what [`state`](Self::state) gave. Parameters that are not in it start afresh.
    ///
    /// # Errors
    /// If a name, shape or dtype does not fit; nothing has been changed then.
    fn load_state(&mut self, state: &[(String, Tensor)]) -> Result<()>;
}
