//! Gradient clipping.

use super::update::{for_chunks, sum_chunks};
use crate::{
    Gradients, Result, Tensor,
    cpu::{
        elementwise::make_mut,
        parallel::SharedMut,
        pool::CpuVec,
        simd::{LANES, join_lanes, simd_of},
    },
    dtype::{Element, Float, Real},
    ensure, for_float,
    nn::Param,
};
use std::ops::Range;

/// The norm of the gradients of `params` taken as one long vector: (sum |g|^p)^(1/p), the largest |g| for
/// p = infinity. Parameters without a gradient count as 0. On a GPU, waits for it.
///
/// # Errors
/// If `norm_type` is not positive.
#[track_caller]
pub fn grad_norm(params: &[Param], grads: &Gradients, norm_type: f64) -> Result<f64> {
    check(norm_type)?;
    let found: Vec<Tensor> = params.iter().filter_map(|p| grads.get(p)).map(Tensor::detach).collect();
    #[cfg(gpu)]
    if let Some(device) = gpu::common(&found) {
        return gpu::norm(device, &found, norm_type, 0.0)?.narrow(0, 0, 1)?.item();
    }
    norm(&found, norm_type)
}

/// Scales the gradients of `params` by min(1, max_norm / (norm + 1e-6)) and returns their norm before. On a GPU,
/// waits for that norm.
///
/// # Errors
/// If `norm_type` is not positive.
#[track_caller]
pub fn clip_grad_norm(params: &[Param], grads: &mut Gradients, max_norm: f64, norm_type: f64) -> Result<f64> {
    clip_grad_norm_tensor(params, grads, max_norm, norm_type)?.item()
}

/// The same with the norm as a tensor (f64, no dimensions). A GPU decides by itself whether to scale: nothing is waited
/// for, and a graph can record it.
///
/// # Errors
/// If `norm_type` is not positive.
#[track_caller]
pub fn clip_grad_norm_tensor(
    params: &[Param],
    grads: &mut Gradients,
    max_norm: f64,
    norm_type: f64,
) -> Result<Tensor> {
    check(norm_type)?;
    change(params, grads, |found| {
        #[cfg(gpu)]
        if let Some(device) = gpu::common(found) {
            return gpu::clip(device, found, max_norm, norm_type);
        }
        let norm = norm(found, norm_type)?;
        let factor = max_norm / (norm + 1e-6);
        // a NaN norm reaches the gradients
        if factor < 1.0 || factor.is_nan() {
            change_on_cpu(found, Change::Scale(factor))?;
        }
        Ok(Tensor::from_cpu(CpuVec::from_slice(&[norm]), (), "grad_norm"))
    })
}

/// Cuts every element of the gradients of `params` off at -max and max.
///
/// # Errors
/// If `max` is negative or NaN.
#[track_caller]
pub fn clip_grad_value(params: &[Param], grads: &mut Gradients, max: f64) -> Result<()> {
    ensure!(max >= 0.0, "clip_grad_value", "the largest value is {max}");
    change(params, grads, |found| {
        #[cfg(gpu)]
        if let Some(device) = gpu::common(found) {
            return gpu::cut_off(device, found, max);
        }
        change_on_cpu(found, Change::CutOff(max))
    })
}

#[track_caller]
fn check(norm_type: f64) -> Result<()> {
    ensure!(norm_type > 0.0, "grad_norm", "the norm's type is {norm_type}, needs a positive number");
    Ok(())
}

/// Takes the gradients out, so that nobody else holds them, and puts them back when `f` is done.
fn change<R>(
    params: &[Param],
    grads: &mut Gradients,
    f: impl FnOnce(&mut [Tensor]) -> Result<R>,
) -> Result<R> {
    let (owners, mut found): (Vec<&Param>, Vec<Tensor>) =
        params.iter().filter_map(|p| Some((p, grads.remove(p)?.detach()))).unzip();
    let result = f(&mut found);
    for (p, grad) in owners.into_iter().zip(found) {
        grads.insert(p, grad);
    }
    result
}

/// The norm of all, by the CPU.
fn norm(found: &[Tensor], norm_type: f64) -> Result<f64> {
    let found: Vec<Tensor> = found.iter().map(Tensor::contiguous).collect::<Result<_>>()?;
    let lengths: Vec<usize> = found.iter().map(Tensor::numel).collect();
    let max = norm_type == f64::INFINITY;
    let join = move |a: f64, b: f64| if max { larger(a, b) } else { a + b };
    let sums = sum_chunks(&lengths, join, |i, range| [powers(&found[i], range, norm_type)]);
    let total = sums.into_iter().fold(0.0, |a, [b]| join(a, b));
    Ok(if max { total } else { total.powf(1.0 / norm_type) })
}

/// NaN if either is.
#[inline(always)]
fn larger(a: f64, b: f64) -> f64 {
    if a > b || a.is_nan() { a } else { b }
}

/// Sum of |x|^p, or the largest |x|.
fn powers(x: &Tensor, range: Range<usize>, p: f64) -> f64 {
    let run = || -> Result<f64> {
        for_float!(x.dtype(), "grad_norm", T => {
            let x = &x.cpu_slice::<T>()[range];
            Ok(match p {
                1.0 => sum(x, |v: T| v.to_f64().abs(), |a, b| a + b),
                2.0 => sum(x, |v: T| { let v = v.to_f64(); v * v }, |a, b| a + b),
                f64::INFINITY => sum(x, |v: T| v.to_f64().abs(), larger),
                _ => sum(x, |v: T| v.to_f64().abs().powf(p), |a, b| a + b),
            })
        })
    };
    // Gradients are floats.
    run().unwrap_or(f64::NAN)
}

fn sum<T: Float>(x: &[T], f: impl Fn(T) -> f64, join: impl Fn(f64, f64) -> f64) -> f64 {
    simd_of::<T, _>(
        #[inline(always)]
        || {
            let mut lanes = [0.0; LANES];
            let mut chunks = x.chunks_exact(LANES);
            for chunk in &mut chunks {
                for i in 0..LANES {
                    lanes[i] = join(lanes[i], f(chunk[i]));
                }
            }
            for (lane, &v) in lanes.iter_mut().zip(chunks.remainder()) {
                *lane = join(*lane, f(v));
            }
            join_lanes(lanes, &join)
        },
    )
}

/// What happens to each element.
#[derive(Clone, Copy)]
enum Change {
    Scale(f64),
    CutOff(f64),
}

impl Change {
    #[inline(always)]
    fn of<R: Real>(self, x: R) -> R {
        match self {
            Change::Scale(factor) => x * R::of(factor),
            Change::CutOff(max) => x.maximum(R::of(-max)).minimum(R::of(max)),
        }
    }
}

/// Changes every gradient in place.
fn change_on_cpu(found: &mut [Tensor], change: Change) -> Result<()> {
    let lengths: Vec<usize> = found.iter().map(Tensor::numel).collect();
    let mut runs: Vec<Box<dyn Fn(Range<usize>) + Send + Sync>> = Vec::new();
    for grad in found {
        for_float!(grad.dtype(), "clip", T => {
            let target = SharedMut::new(make_mut::<T>(grad));
            runs.push(Box::new(move |range| {
                let x = unsafe { target.slice(range) };
                simd_of::<T, _>(#[inline(always)] || x.iter_mut().for_each(|x| *x = T::store(change.of(x.acc()))));
            }));
        });
    }
    for_chunks(&lengths, |i, range| runs[i](range));
    Ok(())
}

#[cfg(gpu)]
mod gpu {
    use crate::{
        DType, Device, Result, Tensor,
        gpu::{self, Many, sys},
    };

    const OP: &str = "clip_grad";

    /// The GPU that all are on.
    pub fn common(found: &[Tensor]) -> Option<Device> {
        let device = found.first()?.device();
        (device != Device::Cpu && found.iter().all(|t| t.device() == device)).then_some(device)
    }

    fn many(device: Device, found: &[Tensor]) -> Result<Many> {
        let mut many = Many::new(OP, device);
        found.iter().enumerate().try_for_each(|(i, t)| many.push(t, None, &[], None, i))?;
        Ok(many)
    }

    /// \[norm, most / (norm + 1e-6)\] on the device.
    pub fn norm(device: Device, found: &[Tensor], norm_type: f64, most: f64) -> Result<Tensor> {
        let found: Vec<Tensor> = found.iter().map(Tensor::contiguous).collect::<Result<_>>()?;
        let many = many(device, &found)?;
        let result = gpu::empty(&found[0], &[2], DType::F64, OP)?;
        let workspace =
            many.workspace(&result, |tensors, n| unsafe { sys::smalti_grad_norm_workspace(tensors, n) })?;
        let (to, scratch) = (result.gpu_ptr().cast(), workspace.gpu_ptr().cast());
        many.launch(|tensors, n, stream| unsafe {
            sys::smalti_grad_norm(tensors, n, norm_type, most, to, scratch, stream)
        })?;
        Ok(result)
    }

    pub fn clip(device: Device, found: &mut [Tensor], most: f64, norm_type: f64) -> Result<Tensor> {
        let result = norm(device, found, norm_type, most)?;
        found.iter_mut().try_for_each(|t| gpu::writable(OP, t))?;
        let factor = result.gpu_ptr().cast::<f64>().wrapping_add(1).cast_const();
        many(device, found)?
            .launch(|tensors, n, stream| unsafe { sys::smalti_grad_scale(tensors, n, factor, stream) })?;
        result.narrow(0, 0, 1)?.reshape(())
    }

    pub fn cut_off(device: Device, found: &mut [Tensor], most: f64) -> Result<()> {
        found.iter_mut().try_for_each(|t| gpu::writable(OP, t))?;
        many(device, found)?
            .launch(|tensors, n, stream| unsafe { sys::smalti_grad_clamp(tensors, n, most, stream) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Tensor, nn::Params};

    #[test]
    fn norms_and_clipping() -> Result<()> {
        let params = Params::new();
        let a = params.param("a", Tensor::from_slice(&[3f32; 16], [16])?)?;
        let b = params.param("b", Tensor::from_slice(&[half::f16::from_f32(8.0)], [1])?)?;
        let mut grads = a.get().mul(&a.get())?.sum(())?.backward()?;
        grads.accumulate(b.get().mul(&b.get())?.sum(())?.backward()?)?;
        let all = params.all();
        assert_eq!(grad_norm(&all, &grads, 1.0)?, 16.0 * 6.0 + 16.0);
        assert_eq!(grad_norm(&all, &grads, 2.0)?, (16.0 * 36.0 + 256.0f64).sqrt());
        assert_eq!(grad_norm(&all, &grads, f64::INFINITY)?, 16.0);
        assert!((grad_norm(&all, &grads, 3.0)? - (16.0 * 216.0 + 4096.0f64).powf(1.0 / 3.0)).abs() < 1e-9);
        clip_grad_norm(&all, &mut grads, 8.0, f64::INFINITY)?;
        assert!(
            (grads.get(&a).map(|g| g.to_vec::<f32>()).transpose()?.unwrap_or_default()[9] - 3.0).abs() < 1e-5
        );
        clip_grad_value(&all, &mut grads, 5.0)?;
        assert_eq!(grads.get(&b).map(Tensor::item).transpose()?, Some(5.0));
        assert!(grad_norm(&all, &grads, 0.0).is_err());
        Ok(())
    }
}
