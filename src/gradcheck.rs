//! Numerical gradients: the proof that a backward is right.

use crate::{BackwardOptions, DType, Error, Result, Rng, Tensor};

/// Compares the gradients of `f` at `inputs` with central differences in f64.
///
/// `f` maps f64 tensors to one f64 tensor of any shape; its sum with fixed random weights is differentiated.
/// Every input is perturbed in every element, so keep them small.
///
/// # Errors
/// Names the input, the element and both values where they differ by more than 1e-6 of the largest
/// gradient (or of 1, if that is larger).
#[track_caller]
pub fn gradcheck(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> Result<()> {
    gradcheck_with(f, inputs, 1e-6, 1e-6)
}

/// [`gradcheck`] with another step and tolerance, for functions that are noisy or have kinks nearby.
///
/// # Errors
/// As `gradcheck`.
#[track_caller]
pub fn gradcheck_with(
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
    inputs: &[Tensor],
    step: f64,
    tolerance: f64,
) -> Result<()> {
    let leaves: Vec<Tensor> =
        inputs.iter().map(|x| if x.dtype() == DType::F64 { x.requires_grad() } else { x.clone() }).collect();
    let y = f(&leaves)?;
    crate::ensure!(y.dtype() == DType::F64, "gradcheck", "the function returned {}, needs f64", y.dtype());
    let mut rng = Rng::new(0x6772_6164);
    let weights: Vec<f64> = (0..y.numel()).map(|_| rng.range(0.5, 1.5)).collect();
    let grad = Tensor::from_slice(&weights, y.shape())?;
    let grads = y.backward_with(&BackwardOptions { grad: Some(grad), ..Default::default() })?;

    let value = |inputs: &[Tensor]| -> Result<f64> {
        let y = crate::no_grad(|| f(inputs))?.to_vec::<f64>()?;
        Ok(y.iter().zip(&weights).map(|(y, w)| y * w).sum())
    };
    for (i, x) in inputs.iter().enumerate().filter(|(_, x)| x.dtype() == DType::F64) {
        let values = x.to_vec::<f64>()?;
        let analytic = match grads.get(&leaves[i]) {
            Some(g) if g.shape() == x.shape() => g.to_vec::<f64>()?,
            Some(g) => {
                return Err(Error::op(
                    "gradcheck",
                    format!("input {i} of shape {:?} has a gradient of shape {:?}", x.shape(), g.shape()),
                ));
            }
            None => vec![0.0; values.len()],
        };
        let scale = analytic.iter().fold(1.0f64, |m, g| m.max(g.abs()));
        for j in 0..values.len() {
            let at = |delta: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[j] += delta;
                let mut inputs = inputs.to_vec();
                inputs[i] = restride(x, &moved)?;
                value(&inputs)
            };
            let numeric = (at(step)? - at(-step)?) / (2.0 * step);
            let difference = (numeric - analytic[j]).abs();
            // written so that NaN fails
            if !(difference <= tolerance * scale) {
                return Err(Error::op(
                    "gradcheck",
                    format!(
                        "input {i}, element {j}: backward gives {}, central difference {numeric}",
                        analytic[j]
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// New values in a tensor of the same memory order as `like`, so that strided code is checked as such.
fn restride(like: &Tensor, values: &[f64]) -> Result<Tensor> {
    let order = crate::cpu::elementwise::memory_order(like.shape(), like.strides());
    let mut inverse = vec![0; order.len()];
    order.iter().enumerate().for_each(|(i, &d)| inverse[d] = i);
    Tensor::from_slice(values, like.shape())?.permute(&order[..])?.contiguous()?.permute(inverse)
}
