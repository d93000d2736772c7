//! Convolution layers.

use super::{Param, Params, init};
use crate::{ConvOptions, Result, Rng, Tensor, ensure};

/// A 2-D convolution. Registers `weight` `[outputs, inputs / groups, k, k]` and `bias`.
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Param,
    bias: Option<Param>,
    options: ConvOptions,
}

impl Conv2d {
    /// With PyTorch's default initialisation and a square kernel.
    ///
    /// # Errors
    /// If the channels do not divide by the groups, or the names are taken.
    #[track_caller]
    pub fn new(
        params: &Params,
        [inputs, outputs]: [usize; 2],
        kernel: usize,
        options: ConvOptions,
        bias: bool,
        rng: &mut Rng,
    ) -> Result<Conv2d> {
        let groups = options.groups;
        ensure!(
            groups > 0 && inputs % groups == 0 && outputs % groups == 0,
            "conv2d",
            "{inputs} to {outputs} channels do not divide into {groups} groups"
        );
        let shape = [outputs, inputs / groups, kernel, kernel];
        let fan_in = shape[1..].iter().product();
        let weight = params.param("weight", init::fan_in_uniform(shape, fan_in, rng)?)?;
        let bias = match bias {
            true => Some(params.param("bias", init::fan_in_uniform([outputs], fan_in, rng)?)?),
            false => None,
        };
        Ok(Conv2d { weight, bias, options })
    }

    /// `[N, C, H, W]` to `[N, outputs, H', W']`.
    ///
    /// # Errors
    /// If shapes do not fit.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(Param::get);
        x.conv2d(&self.weight.get(), bias.as_ref(), self.options)
    }

    /// The weight.
    pub fn weight(&self) -> &Param {
        &self.weight
    }
}
