//! The two-layer perceptron of transformer blocks.

use super::{BlockConfig, Linear, Params};
use crate::{Result, Rng, Tensor};

/// Which GELU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gelu {
    /// x Phi(x), exact.
    #[default]
    Erf,
    /// The tanh approximation.
    Tanh,
    /// x sigmoid(1.702 x).
    Quick,
}

/// Linear, GELU, linear: `fc1` and `fc2`, or what the block's configuration calls them.
#[derive(Clone, Debug)]
pub struct Mlp {
    fc1: Linear,
    fc2: Linear,
    gelu: Gelu,
}

impl Mlp {
    /// The perceptron of a block of this configuration, under `params`.
    ///
    /// # Errors
    /// If the names are taken.
    #[track_caller]
    pub fn new(params: &Params, config: &BlockConfig, rng: &mut Rng) -> Result<Mlp> {
        let ([fc1, fc2], width) = (config.names.mlp, config.width);
        let hidden = (width as f64 * config.mlp_ratio) as usize;
        Ok(Mlp {
            fc1: Linear::new(&params.sub(fc1), width, hidden, true, rng)?,
            fc2: Linear::new(&params.sub(fc2), hidden, width, true, rng)?,
            gelu: config.gelu,
        })
    }

    /// `[.., width]` to the same shape.
    ///
    /// # Errors
    /// If the last axis of `x` is not `width`.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = match self.gelu {
            Gelu::Erf => self.fc1.forward_gelu(x)?,
            Gelu::Tanh => self.fc1.forward(x)?.gelu_tanh()?,
            Gelu::Quick => self.fc1.forward(x)?.gelu_quick()?,
        };
        self.fc2.forward(&hidden)
    }
}
