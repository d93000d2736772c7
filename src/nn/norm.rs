//! Normalisation layers.

use super::{Param, Params, init};
use crate::{Result, Tensor};

/// Layer normalisation over the last axis. Registers `weight` and `bias`.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Param,
    bias: Param,
    eps: f64,
}

impl LayerNorm {
    /// Over `width` features; weight 1, bias 0.
    ///
    /// # Errors
    /// If the names are taken.
    #[track_caller]
    pub fn new(params: &Params, width: usize, eps: f64) -> Result<LayerNorm> {
        let weight = params.param("weight", init::ones([width])?)?;
        let bias = params.param("bias", init::zeros([width])?)?;
        Ok(LayerNorm { weight, bias, eps })
    }

    /// `[.., width]` to the same shape.
    ///
    /// # Errors
    /// If the last axis of `x` is not `width`.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight.get();
        let width = weight.numel();
        x.layer_norm([width], Some(&weight), Some(&self.bias.get()), self.eps)
    }

    /// x + branch and its normalisation, in one pass.
    ///
    /// # Errors
    /// If the shapes differ or their last axis is not `width`.
    #[track_caller]
    pub fn forward_add(&self, x: &Tensor, branch: &Tensor) -> Result<(Tensor, Tensor)> {
        let weight = self.weight.get();
        let width = weight.numel();
        x.add_layer_norm(branch, [width], Some(&weight), Some(&self.bias.get()), self.eps)
    }
}
