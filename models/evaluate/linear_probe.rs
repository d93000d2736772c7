//! Linear classification of fixed features.

use super::{Features, lbfgs::minimise};
use smalti::{CrossEntropy, DType, Error, Result, Tensor, ensure};

/// How a probe on stored features is fitted.
#[derive(Clone, Copy, Debug)]
pub struct ProbeConfig {
    /// C of scikit-learn's LogisticRegression: the inverse of the strength of the penalty on the weights.
    pub c: f64,
    /// No entry of the gradient of the mean loss is above this at the end.
    pub tolerance: f64,
    /// Steps in which that must be reached.
    pub steps: usize,
}

impl Default for ProbeConfig {
    fn default() -> Self {
        ProbeConfig { c: 1.0, tolerance: 1e-7, steps: 20_000 }
    }
}

/// Multinomial logistic regression on features as they are: the weights and biases that minimise
///
/// mean(cross-entropy) + |weight|^2 / (2 C N),
///
/// which is what scikit-learn's LogisticRegression minimises. The problem is convex, so that the result says
/// something about the features and nothing about a learning rate, a seed or a number of epochs.
pub struct LinearProbe {
    /// `[classes, D]` f64.
    weight: Tensor,
    /// `[classes]` f64.
    bias: Tensor,
    objective: f64,
}

impl LinearProbe {
    /// Fits `train`.
    ///
    /// # Errors
    /// If a label is negative, or the minimum is not reached.
    pub fn fit(train: &Features, config: ProbeConfig) -> Result<LinearProbe> {
        let labels = train.labels.to_vec::<i64>()?;
        ensure!(labels.iter().all(|&c| c >= 0), "linear probe", "labels must not be negative");
        let classes = labels.iter().max().map_or(0, |&c| c as usize + 1);
        let (x, width) = (train.x.to_dtype(DType::F64)?, train.x.shape()[1]);
        let unpack = |values: &[f64]| -> Result<(Tensor, Tensor)> {
            let (weight, bias) = values.split_at(classes * width);
            Ok((Tensor::from_slice(weight, [classes, width])?, Tensor::from_slice(bias, [classes])?))
        };
        let penalty = 1.0 / (config.c * labels.len() as f64);
        let found = minimise(vec![0.0; classes * (width + 1)], config.tolerance, config.steps, |values| {
            let (weight, bias) = unpack(values)?;
            let (weight, bias) = (weight.requires_grad(), bias.requires_grad());
            let loss =
                x.linear(&weight, Some(&bias))?.cross_entropy(&train.labels, &CrossEntropy::default())?;
            let grads = loss.backward()?;
            let mut gradient = Vec::with_capacity(values.len());
            for parameter in [&weight, &bias] {
                let grad = grads.get(parameter).ok_or_else(|| Error::msg("linear probe: no gradient"))?;
                gradient.extend(grad.to_vec::<f64>()?);
            }
            let mut value = loss.item()?;
            for (g, w) in gradient.iter_mut().zip(&values[..classes * width]) {
                *g += penalty * w;
                value += 0.5 * penalty * w * w;
            }
            Ok((value, gradient))
        })?;
        if !(found.slope <= config.tolerance) {
            return Err(Error::msg(format!(
                "linear probe: a gradient of {:e} is left, {:e} was asked for; are the features finite?",
                found.slope, config.tolerance
            )));
        }
        let (weight, bias) = unpack(&found.at)?;
        Ok(LinearProbe { weight, bias, objective: found.value })
    }

    /// The value of what was minimised.
    pub fn objective(&self) -> f64 {
        self.objective
    }

    /// Part of the rows that it classifies rightly.
    ///
    /// # Errors
    /// If the width differs from the training set's.
    pub fn accuracy(&self, test: &Features) -> Result<f64> {
        let best = test.x.to_dtype(DType::F64)?.linear(&self.weight, Some(&self.bias))?.argmax(-1)?;
        let right = best.eq(&test.labels)?.sum(())?.item()?;
        Ok(right / test.len() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{data::DigitsSplit, train::features::raw_digits};

    const OBJECTIVE: f64 = 0.20267449038816449;

    /// Against scikit-learn 1.9, `LogisticRegression(tol=1e-10, max_iter=100000)` on pixels from 0 to 1.
    #[test]
    fn raw_digits_as_scikit_learn_has_them() -> Result<()> {
        let (train, test) = (raw_digits(DigitsSplit::Train)?, raw_digits(DigitsSplit::Test)?);
        let probe = LinearProbe::fit(&train, ProbeConfig::default())?;
        assert!((probe.objective() - OBJECTIVE).abs() < 1e-8, "{}", probe.objective());
        assert_eq!((probe.accuracy(&test)? * 450.0).round(), 414.0);
        Ok(())
    }
}
