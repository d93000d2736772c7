//! The two-layer perceptron of transformer blocks.

use super::{Linear, Params};
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
}

/// `fc1`, GELU, `fc2`.
#[derive(Clone, Debug)]
pub struct Mlp {
    fc1: Linear,
    fc2: Linear,
    gelu: Gelu,
}

impl Mlp {
    /// `width` -> `hidden` -> `width`.
    ///
    /// # Errors
    /// If the names are taken.
    #[track_caller]
    pub fn new(params: &Params, width: usize, hidden: usize, gelu: Gelu, rng: &mut Rng) -> Result<Mlp> {
        Ok(Mlp {
            fc1: Linear::new(&params.sub("fc1"), width, hidden, true, rng)?,
            fc2: Linear::new(&params.sub("fc2"), hidden, width, true, rng)?,
            gelu,
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
        };
        self.fc2.forward(&hidden)
    }
}
