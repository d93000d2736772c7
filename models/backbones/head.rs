//! Heads of self-supervised learning: projectors and predictors with batch normalisation.

use smalti::{
    Result, Rng, Tensor, ensure,
    nn::{BatchNorm, BatchNormConfig, Linear, Params, Statistics},
};

/// What a [`Head`] ends with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeadEnd {
    /// The last linear layer has a bias.
    pub bias: bool,
    /// A norm without gain and shift stands behind it.
    pub norm: bool,
}

/// Linear layers without bias, each but the last followed by a batch norm and ReLU; the last as [`HeadEnd`] says.
/// Layer i is registered as `3i`, its norm as `3i + 1`, as in a PyTorch `Sequential`; linear layers have PyTorch's
/// default initialisation.
#[derive(Clone, Debug)]
pub struct Head {
    layers: Vec<(Linear, Option<BatchNorm>)>,
}

impl Head {
    /// `widths`: of the input, the hidden layers and the output. `statistics`: whose means and variances the norms
    /// take in training.
    ///
    /// # Errors
    /// If there are less than two widths.
    pub fn new(
        params: &Params,
        widths: &[usize],
        end: HeadEnd,
        statistics: &Statistics,
        rng: &mut Rng,
    ) -> Result<Head> {
        ensure!(widths.len() > 1, "head", "needs the widths of input and output, got {widths:?}");
        let last = widths.len() - 2;
        let mut layers = Vec::new();
        for (i, pair) in widths.windows(2).enumerate() {
            let bias = i == last && end.bias;
            let linear = Linear::new(&params.sub(3 * i), pair[0], pair[1], bias, rng)?;
            let statistics = statistics.clone();
            let config = BatchNormConfig { affine: i < last, statistics, ..BatchNormConfig::default() };
            let norm = (i < last || end.norm)
                .then(|| BatchNorm::new(&params.sub(3 * i + 1), pair[1], &config))
                .transpose()?;
            layers.push((linear, norm));
        }
        Ok(Head { layers })
    }

    /// `[N, inputs]` to `[N, outputs]`.
    ///
    /// # Errors
    /// If the width differs, or in training there is one sample only.
    pub fn forward(&self, x: &Tensor, training: bool) -> Result<Tensor> {
        self.forward_seen(x, training, |_, _| {})
    }

    /// As [`forward`](Self::forward); `see` gets what every linear layer and norm gives, with its number.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_seen(
        &self,
        x: &Tensor,
        training: bool,
        mut see: impl FnMut(usize, &Tensor),
    ) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, (linear, norm)) in self.layers.iter().enumerate() {
            if i > 0 {
                x = x.relu()?;
            }
            x = linear.forward(&x)?;
            see(3 * i, &x);
            if let Some(norm) = norm {
                x = norm.forward(&x, training)?;
                see(3 * i + 1, &x);
            }
        }
        Ok(x)
    }
}
