//! A fully connected layer.

use super::{Param, Params, init};
use crate::{Result, Rng, Tensor};

/// y = x W^T + b. Registers `weight` `[outputs, inputs]` and `bias` `[outputs]`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Param,
    bias: Option<Param>,
}

impl Linear {
    /// With PyTorch's default initialisation.
    ///
    /// # Errors
    /// If the names are taken.
    #[track_caller]
    pub fn new(params: &Params, inputs: usize, outputs: usize, bias: bool, rng: &mut Rng) -> Result<Linear> {
        Self::named(params, ["weight", "bias"], [inputs, outputs], bias, rng)
    }

    /// [`new`](Self::new) with other names for weight and bias.
    ///
    /// # Errors
    /// If the names are taken.
    #[track_caller]
    pub fn named(
        params: &Params,
        names: [&str; 2],
        [inputs, outputs]: [usize; 2],
        bias: bool,
        rng: &mut Rng,
    ) -> Result<Linear> {
        let weight = params.param(names[0], init::fan_in_uniform([outputs, inputs], inputs, rng)?)?;
        let bias = match bias {
            true => Some(params.param(names[1], init::fan_in_uniform([outputs], inputs, rng)?)?),
            false => None,
        };
        Ok(Linear { weight, bias })
    }

    /// `[.., inputs]` to `[.., outputs]`.
    ///
    /// # Errors
    /// If the last axis of `x` is not `inputs`.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.linear(&self.weight.get(), self.bias().as_ref())
    }

    /// GELU (erf) of the layer's output, in one operation.
    ///
    /// # Errors
    /// If the last axis of `x` is not `inputs`.
    #[track_caller]
    pub fn forward_gelu(&self, x: &Tensor) -> Result<Tensor> {
        match self.bias() {
            Some(bias) => x.linear_gelu(&self.weight.get(), &bias),
            None => self.forward(x)?.gelu(),
        }
    }

    /// The weight.
    pub fn weight(&self) -> &Param {
        &self.weight
    }

    /// The bias's present value.
    pub fn bias(&self) -> Option<Tensor> {
        self.bias.as_ref().map(Param::get)
    }
}
