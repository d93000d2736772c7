//! Normalisation layers.

use super::{Param, Params, init};
use crate::{DType, Result, Tensor};

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

/// Batch normalisation over `[N, C]` or `[N, C, H, W]`. Registers `weight` and `bias` (with `affine`), and the
/// buffers `running_mean`, `running_var`, `num_batches_tracked`.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    affine: Option<(Param, Param)>,
    mean: Param,
    var: Param,
    batches: Param,
    eps: f64,
    momentum: f64,
}

impl BatchNorm {
    /// For `channels` channels; weight 1, bias 0, running mean 0, running variance 1.
    ///
    /// # Errors
    /// If the names are taken.
    #[track_caller]
    pub fn new(params: &Params, channels: usize, affine: bool, eps: f64, momentum: f64) -> Result<BatchNorm> {
        let affine = match affine {
            true => {
                let weight = params.param("weight", init::ones([channels])?)?;
                Some((weight, params.param("bias", init::zeros([channels])?)?))
            }
            false => None,
        };
        Ok(BatchNorm {
            affine,
            mean: params.buffer("running_mean", init::zeros([channels])?)?,
            var: params.buffer("running_var", init::ones([channels])?)?,
            batches: params.buffer("num_batches_tracked", Tensor::zeros((), DType::I64)?)?,
            eps,
            momentum,
        })
    }

    /// Normalises by the batch's statistics and moves the running ones (`training`), or by the running ones.
    ///
    /// # Errors
    /// If `x` has other channels, or in training one value a channel.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, training: bool) -> Result<Tensor> {
        let affine = self.affine.as_ref().map(|(weight, bias)| (weight.get(), bias.get()));
        let (weight, bias) = affine.as_ref().map_or((None, None), |(w, b)| (Some(w), Some(b)));
        let (mean, var) = (self.mean.value(), self.var.value());
        let (y, moved) =
            x.batch_norm(Some((&mean, &var)), weight, bias, training, self.momentum, self.eps)?;
        if let Some((mean, var)) = moved {
            self.mean.set(&mean)?;
            self.var.set(&var)?;
            self.batches.update(|n| n.add_scalar(1.0))?;
        }
        Ok(y)
    }
}

/// Group normalisation over `[N, C, ..]`. Registers `weight` and `bias` `[C]`.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    weight: Param,
    bias: Param,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// For `channels` channels in `groups` groups; weight 1, bias 0.
    ///
    /// # Errors
    /// If the names are taken.
    #[track_caller]
    pub fn new(params: &Params, groups: usize, channels: usize, eps: f64) -> Result<GroupNorm> {
        let weight = params.param("weight", init::ones([channels])?)?;
        let bias = params.param("bias", init::zeros([channels])?)?;
        Ok(GroupNorm { weight, bias, groups, eps })
    }

    /// `[N, C, ..]` to the same shape.
    ///
    /// # Errors
    /// If the channels differ or do not divide by the groups.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.group_norm(self.groups, Some(&self.weight.get()), Some(&self.bias.get()), self.eps)
    }
}

/// Root-mean-square normalisation over the last axis. Registers `weight`.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Param,
    eps: f64,
}

impl RmsNorm {
    /// Over `width` features; weight 1.
    ///
    /// # Errors
    /// If the name is taken.
    #[track_caller]
    pub fn new(params: &Params, width: usize, eps: f64) -> Result<RmsNorm> {
        Ok(RmsNorm { weight: params.param("weight", init::ones([width])?)?, eps })
    }

    /// `[.., width]` to the same shape.
    ///
    /// # Errors
    /// If the last axis of `x` is not `width`.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight.get();
        x.rms_norm([weight.numel()], Some(&weight), self.eps)
    }
}
