//! Layer normalisation over the trailing dimensions, alone or fused with the residual sum before it, its kin
//! without a mean, and its kin over the channels of an image.

use super::rows;
use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_float, on_device,
    shape::{Dims, IntoShape},
};
use smallvec::smallvec;

impl Tensor {
    /// `(x - mean) / sqrt(var + eps) * weight + bias`, with the mean and the biased variance of each group of
    /// trailing dimensions `normalized_shape`; `weight` and `bias` have that shape.
    /// Saves: its input, mean and 1/sqrt(var + eps) of each row.
    ///
    /// # Errors
    /// If the trailing dimensions, the weight or the bias are not of `normalized_shape`, or the dtype is no float.
    #[track_caller]
    pub fn layer_norm(
        &self,
        normalized_shape: impl IntoShape,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<Tensor> {
        let affine = Affine::of("layer_norm", self, normalized_shape.into_shape(), weight, bias)?;
        let x = self.detach().contiguous()?;
        let out = on_device!(
            x,
            "layer_norm",
            for_float!(x.dtype(), "layer_norm", T => Ok(rows::forward::<T, true>(&x, None, &affine, eps)))
        )?;
        affine.record::<true>(self, x, out)
    }

    /// The residual sum and its layer norm in one pass: `(x + r, layer_norm(x + r))`. Both outputs carry
    /// gradients, and the backward adds them in one pass as well.
    ///
    /// # Errors
    /// As [`layer_norm`](Self::layer_norm), and if shape or dtype of `x` and `r` differ.
    #[track_caller]
    pub fn add_layer_norm(
        &self,
        residual: &Tensor,
        normalized_shape: impl IntoShape,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<(Tensor, Tensor)> {
        ensure!(
            self.shape() == residual.shape() && self.dtype() == residual.dtype(),
            "add_layer_norm",
            "needs two tensors of one shape and dtype, got {} {:?} and {} {:?}",
            self.dtype(),
            self.shape(),
            residual.dtype(),
            residual.shape()
        );
        let affine = Affine::of("add_layer_norm", self, normalized_shape.into_shape(), weight, bias)?;
        let (x, r) = (self.detach().contiguous()?, residual.detach().contiguous()?);
        let mut out = on_device!(
            x,
            "add_layer_norm",
            for_float!(x.dtype(), "add_layer_norm", T => Ok(rows::forward::<T, true>(&x, Some(&r), &affine, eps)))
        )?;
        let sum = out.sum.take().unwrap_or(x);
        let tracked = sum.record([self, residual], Residual)?;
        let normed = affine.record::<true>(&tracked, tracked.detach(), out)?;
        Ok((tracked, normed))
    }

    /// `x / sqrt(mean(x^2) + eps) * weight`, over the trailing dimensions `normalized_shape`.
    /// Saves: its input and 1/sqrt(mean(x^2) + eps) of each row.
    ///
    /// # Errors
    /// As [`layer_norm`](Self::layer_norm).
    #[track_caller]
    pub fn rms_norm(
        &self,
        normalized_shape: impl IntoShape,
        weight: Option<&Tensor>,
        eps: f64,
    ) -> Result<Tensor> {
        let affine = Affine::of("rms_norm", self, normalized_shape.into_shape(), weight, None)?;
        let x = self.detach().contiguous()?;
        let out = on_device!(
            x,
            "rms_norm",
            for_float!(x.dtype(), "rms_norm", T => Ok(rows::forward::<T, false>(&x, None, &affine, eps)))
        )?;
        affine.record::<false>(self, x, out)
    }

    /// Layer norm of each position of `[N, C, ..]` over its channels, with `weight` and `bias` of shape `[C]`
    /// (ConvNeXt's and ViTDet's LayerNorm2d). Fastest on channels-last memory; the memory order is kept.
    ///
    /// # Errors
    /// If there is no dimension 1, a parameter has another shape, or the dtype is not a float.
    #[track_caller]
    pub fn channel_layer_norm(
        &self,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<Tensor> {
        ensure!(self.rank() >= 2, "channel_layer_norm", "needs [N, C, ..], got {:?}", self.shape());
        let last = self.rank() - 1;
        let there: Vec<usize> = (0..=last).filter(|&d| d != 1).chain([1]).collect();
        let back: Vec<usize> = [0, last].into_iter().chain(1..last).collect();
        let y = self.permute(there)?.layer_norm(self.shape()[1], weight, bias, eps)?.permute(back)?;
        if self.is_contiguous() { y.contiguous() } else { Ok(y) }
    }
}

/// Weight and bias, in the dtype that is computed in.
pub(super) struct Affine {
    pub normalized: Dims,
    pub weight: Option<Tensor>,
    pub bias: Option<Tensor>,
}

impl Affine {
    #[track_caller]
    fn of(
        op: &'static str,
        x: &Tensor,
        normalized: Dims,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Affine> {
        ensure!(
            !normalized.is_empty() && x.shape().ends_with(&normalized),
            op,
            "the last axes of the input {:?} are not {normalized:?}",
            x.shape()
        );
        let convert = |name: &str, t: Option<&Tensor>| match t {
            Some(t) if *t.shape() == normalized[..] => {
                t.to_dtype(x.dtype().computed_in())?.contiguous().map(Some)
            }
            Some(t) => crate::bail!(
                op,
                "{name} has shape {:?}, the last axes of the input {:?} need {normalized:?}",
                t.shape(),
                x.shape()
            ),
            None => Ok(None),
        };
        let (weight, bias) = (convert("weight", weight)?, convert("bias", bias)?);
        Ok(Affine { normalized, weight, bias })
    }

    fn record<const CENTERED: bool>(self, input: &Tensor, x: Tensor, out: Output) -> Result<Tensor> {
        // An untracked tensor stands for what is not there.
        let [weight, bias] = [&self.weight, &self.bias].map(|t| t.clone().unwrap_or_else(|| x.clone()));
        let Output { y, mean, rstd, .. } = out;
        let (weight_saved, normalized) = (self.weight.map(|w| w.detach()), self.normalized);
        y.record(
            [input, &weight, &bias],
            LayerNorm::<CENTERED> { x, mean, rstd, weight: weight_saved, normalized },
        )
    }
}

/// What the forward computes.
pub(super) struct Output {
    pub sum: Option<Tensor>,
    pub y: Tensor,
    pub mean: Tensor,
    pub rstd: Tensor,
}
#[cfg(gpu)]
crate::gpu::upload_fields!(Output { sum, y, mean, rstd });

pub(super) struct LayerNorm<const CENTERED: bool> {
    pub x: Tensor,
    pub mean: Tensor,
    pub rstd: Tensor,
    pub weight: Option<Tensor>,
    pub normalized: Dims,
}

/// With xhat = (x - mean) * rstd and g = dy * weight:
/// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) (rms norm: mean = mean(g) = 0), dweight = sum(dy * xhat), dbias = sum(dy).
impl<const CENTERED: bool> Backward for LayerNorm<CENTERED> {
    const NAME: &'static str = if CENTERED { "layer_norm" } else { "rms_norm" };

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let grad = grad.contiguous()?;
        let pending = ctx.take_pending(0).map(|p| p.contiguous()).transpose()?;
        let affine = ctx.needs(1) || ctx.needs(2);
        let (dx, dw, db) = on_device!(
            grad,
            Self::NAME,
            for_float!(grad.dtype(), Self::NAME, T => {
                Ok(rows::backward::<T, CENTERED>(self, &grad, pending.as_ref(), ctx.needs(0), affine))
            })
        )?;
        let shaped = |t: Option<Tensor>| t.map(|t| t.reshape(&self.normalized)).transpose();
        Ok(smallvec![dx, shaped(dw)?, shaped(db)?])
    }
}

/// x + r, whose sum was computed elsewhere.
struct Residual;
impl Backward for Residual {
    const NAME: &'static str = "add_layer_norm";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        Ok(smallvec![ctx.grad(0, || Ok(grad.clone()))?, ctx.grad(1, || Ok(grad.clone()))?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
        Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
    }

    #[test]
    fn gradients() -> Result<()> {
        let (w, b) = (random(&[2, 9], 1)?, random(&[2, 9], 2)?);
        let x = random(&[3, 2, 9], 3)?;
        gradcheck(|t| t[0].layer_norm([2, 9], Some(&t[1]), Some(&t[2]), 1e-5), &[x.clone(), w.clone(), b])?;
        gradcheck(|t| t[0].layer_norm(9, None, None, 1e-5), &[x.clone()])?;
        gradcheck(|t| t[0].layer_norm([2, 9], None, Some(&t[1]), 1e-5), &[x.clone(), w.clone()])?;
        let permuted = random(&[9, 2, 3], 4)?.permute([2, 1, 0])?;
        gradcheck(|t| t[0].layer_norm([2, 9], Some(&t[1]), None, 1e-5), &[permuted, w])?;
        let broadcast = random(&[1, 1, 4], 5)?.expand([3, 2, 4])?;
        gradcheck(|t| t[0].layer_norm(4, None, None, 1e-3), &[broadcast])?;
        gradcheck(|t| t[0].layer_norm(1, None, None, 1e-1), &[random(&[3, 1], 6)?])
    }

    #[test]
    fn residual_sum() -> Result<()> {
        let inputs = [random(&[4, 5], 1)?, random(&[4, 5], 2)?, random(&[5], 3)?, random(&[5], 4)?];
        let both = |t: &[Tensor]| t[0].add_layer_norm(&t[1], 5, Some(&t[2]), Some(&t[3]), 1e-5);
        // each output alone, and both with an older and with a newer user of the sum
        gradcheck(|t| Ok(both(t)?.0), &inputs)?;
        gradcheck(|t| Ok(both(t)?.1), &inputs)?;
        gradcheck(|t| both(t).and_then(|(s, y)| s.exp()?.add(&y)), &inputs)?;
        gradcheck(|t| both(t).and_then(|(s, y)| y.exp()?.add(&s)?.mul(&y.mul(&s)?)), &inputs)?;
        let (sum, y) = both(&inputs)?;
        let plain = inputs[0].add(&inputs[1])?;
        assert_eq!(sum.to_vec::<f64>()?, plain.to_vec::<f64>()?);
        let expected = plain.layer_norm(5, Some(&inputs[2]), Some(&inputs[3]), 1e-5)?;
        assert_eq!(y.to_vec::<f64>()?, expected.to_vec::<f64>()?);
        Ok(())
    }

    #[test]
    fn kin() -> Result<()> {
        let (x, w, b) = (random(&[3, 4, 2, 5], 1)?, random(&[4], 2)?, random(&[4], 3)?);
        gradcheck(|t| t[0].rms_norm([2, 5], None, 1e-5), &[x.clone()])?;
        gradcheck(|t| t[0].rms_norm(4, Some(&t[1]), 1e-5), &[random(&[4, 19], 4)?.t()?, w.clone()])?;
        let inputs = [x.clone(), w.clone(), b.clone()];
        gradcheck(|t| t[0].channel_layer_norm(Some(&t[1]), Some(&t[2]), 1e-5), &inputs)?;
        gradcheck(|t| t[0].channel_layer_norm(Some(&t[1]), None, 1e-5), &[random(&[3, 4], 5)?, w.clone()])?;
        let last = x.to_channels_last()?;
        let y = last.channel_layer_norm(Some(&w), Some(&b), 1e-5)?;
        assert_eq!(y.strides(), last.strides(), "the memory order is kept");
        assert_eq!(y.to_vec::<f64>()?, x.channel_layer_norm(Some(&w), Some(&b), 1e-5)?.to_vec::<f64>()?);
        assert!(
            x.channel_layer_norm(Some(&x), None, 1e-5).is_err()
                && b.channel_layer_norm(None, None, 1.).is_err()
        );
        let y = Tensor::from_slice(&[3f32, -4.0], 2)?.rms_norm(2, None, 0.0)?.to_vec::<f32>()?;
        assert!((y[0] - 3.0 / 12.5f32.sqrt()).abs() < 1e-6 && (y[1] + 4.0 / 12.5f32.sqrt()).abs() < 1e-6);
        Ok(())
    }

    #[test]
    fn half_types_empty_tensors_and_errors() -> Result<()> {
        let x = random(&[7, 33], 1)?;
        let w = random(&[33], 2)?;
        let exact = x.layer_norm(33, Some(&w), None, 1e-6)?.to_vec::<f64>()?;
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 5e-3), (DType::BF16, 4e-2)] {
            // weights may keep more digits than the input
            let y = x.to_dtype(dtype)?.layer_norm(33, Some(&w.to_dtype(DType::F32)?), None, 1e-6)?;
            assert_eq!(y.dtype(), dtype);
            for (a, b) in y.to_dtype(DType::F64)?.to_vec::<f64>()?.iter().zip(&exact) {
                assert!((a - b).abs() < tolerance * b.abs().max(1.0), "{dtype}: {a} {b}");
            }
        }
        for shape in [[0, 3], [3, 0]] {
            let x = Tensor::zeros(shape, DType::F32)?.requires_grad();
            let w = Tensor::ones(shape[1], DType::F32)?.requires_grad();
            let grads = x.layer_norm(shape[1], Some(&w), None, 1e-5)?.sum(())?.backward()?;
            assert_eq!(grads.get(&w).map(|g| g.to_vec::<f32>()).transpose()?, Some(vec![0.0; shape[1]]));
        }
        let message = |r: Result<Tensor>| r.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message(x.layer_norm(7, None, None, 1e-5)).contains("the last axes of the input [7, 33]"));
        assert!(message(x.layer_norm(33, Some(&x), None, 1e-5)).contains("weight has shape [7, 33]"));
        assert!(x.layer_norm((), None, None, 1e-5).is_err());
        Ok(())
    }
}
