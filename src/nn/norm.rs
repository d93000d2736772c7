//! Normalisation layers.

use super::{Param, Params, init};
use crate::{DType, Error, Result, Tensor, comm::Comm, ensure};

const OP: &str = "batch_norm";

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

/// Whose mean and variance a [`BatchNorm`] takes in training.
#[derive(Clone, Debug, Default)]
pub enum Statistics {
    /// The batch's.
    #[default]
    Batch,
    /// Those of each of so many groups; sample n belongs to group n mod S. The running statistics move to the mean
    /// over groups. One device stands for several (MoCo's CIFAR notebook, `SplitBatchNorm`).
    Split(usize),
    /// Those over the batches of all ranks (SyncBN).
    Ranks(Comm),
}

/// What a [`BatchNorm`] is made with.
#[derive(Clone, Debug)]
pub struct BatchNormConfig {
    /// Learn a gain and a shift for each channel.
    pub affine: bool,
    /// Added to the variance.
    pub eps: f64,
    /// Share by which running statistics move to the batch's.
    pub momentum: f64,
    /// Whose statistics.
    pub statistics: Statistics,
}

impl Default for BatchNormConfig {
    /// PyTorch's: affine, eps 1e-5, momentum 0.1, the batch's own statistics.
    fn default() -> Self {
        BatchNormConfig { affine: true, eps: 1e-5, momentum: 0.1, statistics: Statistics::Batch }
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
    config: BatchNormConfig,
}

/// What comes out of a training pass: the result, and where the running statistics have moved.
type Moved = (Tensor, Option<(Tensor, Tensor)>);

impl BatchNorm {
    /// For `channels` channels; weight 1, bias 0, running mean 0, running variance 1.
    ///
    /// # Errors
    /// If the names are taken, or there are no groups.
    #[track_caller]
    pub fn new(params: &Params, channels: usize, config: &BatchNormConfig) -> Result<BatchNorm> {
        ensure!(!matches!(config.statistics, Statistics::Split(0)), OP, "needs at least one group");
        let affine = match config.affine {
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
            config: config.clone(),
        })
    }

    /// The gain, if there is one.
    pub fn weight(&self) -> Option<&Param> {
        self.affine.as_ref().map(|(weight, _)| weight)
    }

    /// Normalises by the batch's statistics and moves the running ones (`training`), or by the running ones.
    ///
    /// # Errors
    /// If `x` has other channels, or in training one value a channel, or a batch that does not divide into the groups.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, training: bool) -> Result<Tensor> {
        let (y, moved) = match &self.config.statistics {
            Statistics::Split(groups) if training && *groups > 1 => self.split(x, *groups)?,
            Statistics::Ranks(comm) if training && comm.world() > 1 => self.over_ranks(x, comm)?,
            _ => self.plain(1, |running, [weight, bias]| {
                x.batch_norm(running, weight, bias, training, self.config.momentum, self.config.eps)
            })?,
        };
        self.move_to(moved)?;
        Ok(y)
    }

    /// `relu(forward(x) + residual)`; in one pass if the statistics are the batch's own or the running ones, see
    /// [`Tensor::batch_norm_relu`].
    ///
    /// # Errors
    /// As [`forward`](Self::forward); if the residual has another shape or dtype.
    #[track_caller]
    pub fn forward_relu(&self, x: &Tensor, residual: Option<&Tensor>, training: bool) -> Result<Tensor> {
        let own = match &self.config.statistics {
            Statistics::Batch => true,
            Statistics::Split(groups) => *groups == 1,
            Statistics::Ranks(comm) => comm.world() == 1,
        };
        if training && !own {
            let y = self.forward(x, training)?;
            return residual.map_or_else(|| Ok(y.clone()), |r| y.add(r))?.relu();
        }
        let (y, moved) = self.plain(1, |running, [weight, bias]| {
            let BatchNormConfig { momentum, eps, .. } = self.config;
            x.batch_norm_relu(residual, running, weight, bias, training, momentum, eps)
        })?;
        self.move_to(moved)?;
        Ok(y)
    }

    /// Sets the running statistics to where they have moved.
    fn move_to(&self, moved: Option<(Tensor, Tensor)>) -> Result<()> {
        if let Some((mean, var)) = moved {
            self.mean.set(&mean)?;
            self.var.set(&var)?;
            self.batches.update(|n| n.add_scalar(1.0))?;
        }
        Ok(())
    }

    /// Runs `f` with the running statistics, and weight and bias, repeated for an input whose channels are `groups`
    /// times those of the layer.
    #[track_caller]
    fn plain(
        &self,
        groups: usize,
        f: impl FnOnce(Option<(&Tensor, &Tensor)>, [Option<&Tensor>; 2]) -> Result<Moved>,
    ) -> Result<Moved> {
        let repeated = |t: Tensor| if groups == 1 { Ok(t) } else { t.repeat([groups]) };
        let affine = self.affine.as_ref().map(|(w, b)| Ok((repeated(w.get())?, repeated(b.get())?)));
        let affine = affine.transpose()?;
        let affine = affine.as_ref().map_or([None, None], |(w, b)| [Some(w), Some(b)]);
        let (mean, var) = (repeated(self.mean.value())?, repeated(self.var.value())?);
        f(Some((&mean, &var)), affine)
    }

    #[track_caller]
    fn split(&self, x: &Tensor, groups: usize) -> Result<Moved> {
        let shape = x.shape().to_vec();
        let divides = shape.len() >= 2 && shape[0].is_multiple_of(groups);
        ensure!(divides, OP, "a batch of shape {shape:?} does not divide into {groups} groups");
        let channels = shape[1];
        let mut folded = shape.clone();
        (folded[0], folded[1]) = (shape[0] / groups, groups * channels);
        let x = x.reshape(folded)?;
        let (y, moved) = self.plain(groups, |running, [weight, bias]| {
            x.batch_norm(running, weight, bias, true, self.config.momentum, self.config.eps)
        })?;
        let average = |t: Tensor| t.reshape([groups, channels])?.mean(0);
        let moved = moved.map(|(mean, var)| Ok((average(mean)?, average(var)?))).transpose()?;
        Ok((y.reshape(shape)?, moved))
    }

    /// Means and squared deviations of the ranks are joined after Chan, Golub and LeVeque, as one batch's blocks are.
    #[track_caller]
    fn over_ranks(&self, x: &Tensor, comm: &Comm) -> Result<Moved> {
        let rank = x.rank();
        ensure!(rank >= 2, OP, "needs shape [N, C, ..], got {:?}", x.shape());
        let channels = x.shape()[1];
        let dims: Vec<usize> = (0..rank).filter(|&d| d != 1).collect();
        let mut shape = vec![1; rank];
        shape[1] = channels;
        let wide = x.to_dtype(x.dtype().computed_in())?;
        let own =
            Tensor::cat(&[&wide.mean(&dims[..])?.unsqueeze(0)?, &wide.var(&dims[..], 0)?.unsqueeze(0)?], 0)?;
        // [world, 2, C]; every rank has as many samples
        let all = own.unsqueeze(0)?.all_gather(comm)?;
        let (means, vars) = (all.select(1, 0)?, all.select(1, 1)?);
        let mean = means.mean(0)?;
        let apart = means.sub(&mean)?;
        let var = vars.mean(0)?.add(&apart.mul(&apart)?.mean(0)?)?;
        let rstd = var.add_scalar(self.config.eps)?.rsqrt()?;
        let mut y = wide.sub(&mean.reshape(&shape[..])?)?.mul(&rstd.reshape(&shape[..])?)?;
        if let Some((weight, bias)) = &self.affine {
            let spread = |p: &Param| p.get().to_dtype(wide.dtype())?.reshape(&shape[..]);
            y = y.mul(&spread(weight)?)?.add(&spread(bias)?)?;
        }
        let count = (x.numel() / channels.max(1) * comm.world()) as f64;
        let moved = crate::no_grad(|| {
            let share = self.config.momentum;
            let step = |old: &Param, new: Tensor| {
                let old = old.value();
                old.mul_scalar(1.0 - share)?.add(&new.mul_scalar(share)?.to_dtype(old.dtype())?)
            };
            let unbiased = var.detach().mul_scalar(count / (count - 1.0))?;
            Ok::<_, Error>((step(&self.mean, mean.detach())?, step(&self.var, unbiased)?))
        })?;
        Ok((y.to_dtype(x.dtype())?, Some(moved)))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, comm::threads};

    fn layer(statistics: Statistics) -> Result<(Params, BatchNorm)> {
        let params = Params::new();
        let norm = BatchNorm::new(&params, 3, &BatchNormConfig { statistics, ..Default::default() })?;
        let mut rng = Rng::new(5);
        for p in params.all().iter().filter(|p| p.value().dtype().is_float()) {
            p.set(&Tensor::rand([3], &mut rng)?.add_scalar(0.5)?)?;
        }
        Ok((params, norm))
    }

    /// Result, running statistics and gradients (input, weight, bias) of sum(y * slope).
    fn pass(params: &Params, norm: &BatchNorm, x: &Tensor, slope: &Tensor) -> Result<Vec<Vec<f32>>> {
        let x = x.requires_grad();
        let y = norm.forward(&x, true)?;
        let grads = y.mul(slope)?.sum(())?.backward()?;
        let mut all = vec![y.to_vec()?];
        all.extend(
            ["running_mean", "running_var"].iter().filter_map(|n| params.get(n)?.value().to_vec().ok()),
        );
        all.extend(grads.get(&x).map(Tensor::to_vec).transpose()?);
        for p in params.trained() {
            all.extend(grads.get(&p).map(Tensor::to_vec).transpose()?);
        }
        Ok(all)
    }

    /// The pass that ends in ReLU is the passes one by one, whosever statistics.
    #[test]
    fn relu_in_the_same_pass() -> Result<()> {
        let (x, added) =
            (Tensor::randn([6, 3, 2, 2], &mut Rng::new(1))?, Tensor::randn([6, 3, 2, 2], &mut Rng::new(2))?);
        for statistics in [Statistics::Batch, Statistics::Split(2)] {
            let ((_, one), (_, other)) = (layer(statistics.clone())?, layer(statistics)?);
            for (residual, training) in [(None, true), (Some(&added), true), (Some(&added), false)] {
                let y = one.forward_relu(&x, residual, training)?;
                let apart = other.forward(&x, training)?;
                let apart = residual.map_or_else(|| Ok(apart.clone()), |r| apart.add(r))?.relu()?;
                assert_eq!(y.to_vec::<f32>()?, apart.to_vec::<f32>()?);
                assert_eq!(one.mean.value().to_vec::<f32>()?, other.mean.value().to_vec::<f32>()?);
            }
        }
        Ok(())
    }

    /// Two ranks with halves of a batch are one rank with all of it.
    #[test]
    fn statistics_over_ranks() -> Result<()> {
        let (x, slope) =
            (Tensor::randn([6, 3, 2, 2], &mut Rng::new(1))?, Tensor::randn([6, 3, 2, 2], &mut Rng::new(2))?);
        let (params, norm) = layer(Statistics::Batch)?;
        let whole = pass(&params, &norm, &x, &slope)?;
        let halves = threads(2, |comm| {
            let rank = comm.rank();
            let (params, norm) = layer(Statistics::Ranks(comm))?;
            let half = |t: &Tensor| t.narrow(0, rank * 3, 3);
            pass(&params, &norm, &half(&x)?, &half(&slope)?)
        })?;
        let close =
            |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 2e-5);
        for i in [0, 3] {
            assert!(close(&whole[i], &[&halves[0][i][..], &halves[1][i][..]].concat()), "{i}");
        }
        for i in [1, 2] {
            assert!(close(&whole[i], &halves[0][i]) && halves[0][i] == halves[1][i], "{i}");
        }
        for i in [4, 5] {
            let sum: Vec<f32> = halves[0][i].iter().zip(&halves[1][i]).map(|(a, b)| a + b).collect();
            assert!(close(&whole[i], &sum), "{i}");
        }
        Ok(())
    }

    #[test]
    fn groups_that_do_not_fit() -> Result<()> {
        assert!(layer(Statistics::Split(0)).is_err());
        let (_, norm) = layer(Statistics::Split(4))?;
        let message = norm.forward(&Tensor::ones([6, 3], DType::F32)?, true).unwrap_err().to_string();
        assert!(message.contains("does not divide into 4 groups"), "{message}");
        // evaluation knows no groups
        norm.forward(&Tensor::ones([6, 3], DType::F32)?, false)?;
        Ok(())
    }
}
