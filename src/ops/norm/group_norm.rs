//! Group normalisation, and instance normalisation, which is that with a group for each channel.

use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    bail, ensure, for_float, on_device,
};
use smallvec::smallvec;

impl Tensor {
    /// `(x - mean) / sqrt(var + eps) * weight + bias` for `[N, C, ..]`, with the mean and the biased variance of
    /// each of `groups` groups of neighbouring channels of each image; weight and bias have shape `[C]`.
    /// The memory order is kept. Saves: its input, mean and 1/sqrt(var + eps) of each group.
    ///
    /// # Errors
    /// If the groups do not divide the channels, a parameter is not of shape `[C]`, or the dtype is not a float.
    #[track_caller]
    pub fn group_norm(
        &self,
        groups: usize,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<Tensor> {
        ensure!(self.rank() >= 2, OP, "needs shape [N, C, ..], got {:?}", self.shape());
        let channels = self.shape()[1];
        ensure!(
            groups > 0 && channels.is_multiple_of(groups),
            OP,
            "{groups} groups do not divide the {channels} channels of {:?}",
            self.shape()
        );
        let vector = |name: &str, t: Option<&Tensor>| match t {
            Some(t) if *t.shape() == [channels] => {
                t.to_dtype(self.dtype().computed_in())?.contiguous().map(Some)
            }
            Some(t) => bail!(OP, "{name} has shape {:?}, needs [{channels}]", t.shape()),
            None => Ok(None),
        };
        let (weight, bias) = (vector("weight", weight)?, vector("bias", bias)?);
        // Images must follow each other in memory.
        let axis = crate::cpu::axis::Axis::of(self, 0);
        let x = if axis.outer == 1 { self.detach() } else { self.detach().contiguous()? };
        // An untracked tensor stands for what is not there.
        let inputs = [&weight, &bias].map(|t| t.clone().unwrap_or_else(|| x.clone()));
        let [weight, bias] = [weight, bias].map(|t| t.map(|t| t.detach()));
        let (y, mean, rstd) = on_device!(
            x,
            OP,
            for_float!(x.dtype(), OP, T => {
                cpu::forward::<T>(&x, groups, weight.as_ref(), bias.as_ref(), eps)
            }),
            gpu::forward(&x, groups, weight.as_ref(), bias.as_ref(), eps)
        )?;
        y.record([self, &inputs[0], &inputs[1]], GroupNorm { x, mean, rstd, weight, groups })
    }

    /// [`group_norm`](Self::group_norm) with a group for each channel: statistics of each channel of each image.
    ///
    /// # Errors
    /// As `group_norm`.
    #[track_caller]
    pub fn instance_norm(&self, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        let channels = self.shape().get(1).copied().unwrap_or(0);
        ensure!(channels > 0, "instance_norm", "needs shape [N, C, ..], got {:?}", self.shape());
        self.group_norm(channels, weight, bias, eps)
    }
}

const OP: &str = "group_norm";

struct GroupNorm {
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Option<Tensor>,
    groups: usize,
}

/// As layer norm, with a weight that is constant within a channel.
impl Backward for GroupNorm {
    const NAME: &'static str = OP;

    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let [dx, dw, db] = on_device!(
            grad,
            Self::NAME,
            for_float!(grad.dtype(), Self::NAME, T => cpu::backward::<T>(self, grad)),
            gpu::backward(self, grad)
        )?;
        Ok(smallvec![Some(dx), Some(dw), Some(db)])
    }
}

mod cpu {
    use super::{
        super::channels::{Channels, at},
        *,
    };
    use crate::{
        cpu::{
            axis::Axis,
            parallel::{SharedMut, for_rows},
            pool::CpuVec,
        },
        dtype::{Float, Real},
    };
    use std::ops::Range;

    /// Images, their units, and the groups within.
    struct Images {
        channels: Channels,
        units: usize,
        /// Channels of a group, and elements of a channel of an image.
        size: usize,
        area: usize,
    }

    impl Images {
        fn of(axis: &Axis, x: &Tensor, groups: usize) -> Images {
            let channels = Channels::of(axis);
            let elements: usize = x.shape()[1..].iter().product();
            let units = elements / channels.width().max(1);
            Images { size: channels.n / groups, area: elements / channels.n.max(1), units, channels }
        }

        fn units(&self, image: usize) -> Range<usize> {
            image * self.units..(image + 1) * self.units
        }

        /// Means over groups of sums over channels.
        fn means<A: Real>(&self, sums: &[A], out: &mut [A]) {
            let share = A::ONE / A::of((self.size * self.area) as f64);
            for (m, sums) in out.iter_mut().zip(sums.chunks_exact(self.size)) {
                *m = sums.iter().copied().sum::<A>() * share;
            }
        }
    }

    fn vector<A: Real>(t: Option<&Tensor>, n: usize, value: A) -> CpuVec<A> {
        t.map_or_else(|| CpuVec::full(n, value), |t| CpuVec::from_slice(t.cpu_slice::<A>()))
    }

    /// The result, and mean and 1/sqrt(var + eps), `[N, groups]`.
    pub fn forward<T: Float>(
        x: &Tensor,
        groups: usize,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let axis = Axis::of(x, 1);
        let (images, n) = (x.shape()[0], x.shape()[1]);
        let layout = Images::of(&axis, x, groups);
        let x = axis.view(x)?;
        let xs = x.cpu_slice::<T>();
        let (weight, bias) = (vector(weight, n, T::Acc::ONE), vector(bias, n, T::Acc::ZERO));
        let mut out = CpuVec::<T>::new(xs.len());
        let mut statistics = [(); 2].map(|()| CpuVec::<T::Acc>::new(images * groups));
        let target = SharedMut::new(&mut out);
        let [means, rstds] = statistics.each_mut().map(|s| SharedMut::new(s));
        for_rows(images, layout.area * n, |range| {
            let mut sums = CpuVec::<T::Acc>::new(n);
            for image in range {
                let groups = image * groups..(image + 1) * groups;
                let (mean, rstd) = unsafe { (means.slice(groups.clone()), rstds.slice(groups)) };
                layout.channels.reduce(layout.units(image), &mut sums, |_, _| |i| unsafe { at(xs, i) }.acc());
                layout.means(&sums, mean);
                let mean = &*mean;
                layout.channels.reduce(layout.units(image), &mut sums, |c, _| {
                    let m = mean[c / layout.size];
                    move |i| {
                        let d = unsafe { at(xs, i) }.acc() - m;
                        d * d
                    }
                });
                layout.means(&sums, rstd);
                rstd.iter_mut().for_each(|v| *v = T::Acc::ONE / (*v + T::Acc::of(eps)).sqrt());
                let rstd = &*rstd;
                layout.channels.apply(layout.units(image), &target, |c, _| {
                    let (m, s, b) = (mean[c / layout.size], rstd[c / layout.size] * weight[c], bias[c]);
                    move |i| T::store((unsafe { at(xs, i) }.acc() - m).mul_add(s, b))
                });
            }
        });
        let [mean, rstd] = statistics.map(|s| Tensor::from_cpu(s, [images, groups], OP));
        Ok((axis.tensor(out, OP), mean, rstd))
    }

    /// dx, dweight, dbias. Each image has its own share of the parameters' gradients.
    pub fn backward<T: Float>(rule: &GroupNorm, grad: &Tensor) -> Result<[Tensor; 3]> {
        let axis = Axis::of(&rule.x, 1);
        let (images, n, groups) = (rule.x.shape()[0], rule.x.shape()[1], rule.groups);
        let layout = Images::of(&axis, &rule.x, groups);
        let (x, grad) = (axis.view(&rule.x)?, axis.view(grad)?);
        let (xs, gs) = (x.cpu_slice::<T>(), grad.cpu_slice::<T>());
        let weight = vector(rule.weight.as_ref(), n, T::Acc::ONE);
        let (means, rstds) = (rule.mean.cpu_slice::<T::Acc>(), rule.rstd.cpu_slice::<T::Acc>());
        let mut dx = CpuVec::<T>::new(xs.len());
        let mut shares = [(); 2].map(|()| CpuVec::<T::Acc>::new(images * n));
        let target = SharedMut::new(&mut dx);
        let [dots, plain] = shares.each_mut().map(|s| SharedMut::new(s));
        for_rows(images, layout.area * n, |range| {
            let mut scratch = [(); 2].map(|()| CpuVec::<T::Acc>::new(groups));
            let mut weighted = CpuVec::<T::Acc>::new(n);
            for image in range {
                let mean = &means[image * groups..(image + 1) * groups];
                let rstd = &rstds[image * groups..(image + 1) * groups];
                let mine = image * n..(image + 1) * n;
                let (dot, plain) = unsafe { (dots.slice(mine.clone()), plain.slice(mine)) };
                layout.channels.reduce(layout.units(image), plain, |_, _| |i| unsafe { at(gs, i) }.acc());
                layout.channels.reduce(layout.units(image), dot, |c, _| {
                    let (m, r) = (mean[c / layout.size], rstd[c / layout.size]);
                    move |i| unsafe { at(gs, i).acc() * ((at(xs, i).acc() - m) * r) }
                });
                let [mean_g, slope] = &mut scratch;
                for (sums, out) in [(plain, mean_g), (dot, slope)] {
                    (0..n).for_each(|c| weighted[c] = sums[c] * weight[c]);
                    layout.means(&weighted, out);
                }
                let [mean_g, slope] = &scratch;
                layout.channels.apply(layout.units(image), &target, |c, _| {
                    let g = c / layout.size;
                    let (m, r, w, b, k) = (mean[g], rstd[g], weight[c], mean_g[g], slope[g]);
                    move |i| {
                        let (x, dy) = unsafe { (at(xs, i).acc(), at(gs, i).acc()) };
                        T::store(r * (dy * w - b - (x - m) * r * k))
                    }
                });
            }
        });
        let [dw, db] = shares.map(|share| {
            let mut total = CpuVec::<T::Acc>::zeros(n);
            for share in share.chunks_exact(n.max(1)) {
                total.iter_mut().zip(share).for_each(|(t, s)| *t += *s);
            }
            Tensor::from_cpu(total, n, OP)
        });
        Ok([axis.tensor(dx, OP), dw, db])
    }
}

#[cfg(gpu)]
mod gpu {
    use super::{super::images::Images, *};
    use crate::{
        gpu::{self, sys},
        ops::reduce::gpu::fold,
    };

    /// The result, and mean and 1/sqrt(var + eps), `[N, groups]`.
    #[track_caller]
    pub fn forward(
        x: &Tensor,
        groups: usize,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let images = Images::of(x, true)?;
        let [n, positions, channels, area] = images.shape();
        let size = channels / groups;
        let split = images.flat(x)?.reshape([n, positions, groups, size, area])?;
        let (divisor, dtype) = ((size * images.area()) as f64, x.dtype().computed_in());
        let (var, mean) = fold(OP, sys::SMALTI_VAR, &split, &[1, 3, 4], divisor, Some(dtype))?;
        let mean = mean.ok_or_else(|| crate::Error::msg("internal: the mean is missing"))?;
        let (mean, var) = (mean.reshape([n, groups])?, var.reshape([n, groups])?);
        let rstd = gpu::empty(x, &[n, groups], dtype, OP)?;
        gpu::launch(OP, [&mean, &var, &rstd], |[m, v, r], stream| unsafe {
            let none = std::ptr::null();
            sys::smalti_batch_norm_statistics(&m, &v, &r, none, none, none, none, eps, 0.0, 1.0, stream)
        })?;
        let y = images.forward(OP, x, [&mean, &rstd], weight, bias, groups)?;
        Ok((y, mean, rstd))
    }

    /// dx, dweight, dbias.
    #[track_caller]
    pub fn backward(rule: &GroupNorm, grad: &Tensor) -> Result<[Tensor; 3]> {
        let images = Images::of(&rule.x, true)?;
        let (x, dy) = (images.flat(&rule.x)?, images.flat(grad)?);
        let dx = images.empty(OP, grad)?;
        let vector = || gpu::empty(grad, &images.shape()[2..3], rule.rstd.dtype(), OP);
        let (dw, db, groups) = (vector()?, vector()?, rule.groups as i64);
        let mut bytes = -1;
        gpu::launch(OP, [&x], |[x], _| {
            bytes = unsafe { sys::smalti_group_norm_backward_workspace(&x, groups) };
            0
        })?;
        let (space, flat_dx) = (gpu::workspace(OP, grad, bytes)?, images.flat(&dx)?);
        gpu::launch_some(
            OP,
            [
                Some(&x),
                Some(&dy),
                Some(&rule.mean),
                Some(&rule.rstd),
                rule.weight.as_ref(),
                Some(&flat_dx),
                Some(&dw),
                Some(&db),
                Some(&space),
            ],
            |[x, dy, mean, rstd, w, dx, dw, db, space], stream| unsafe {
                let space = (*space).ptr;
                sys::smalti_group_norm_backward(x, dy, mean, rstd, w, dx, dw, db, groups, space, stream)
            },
        )?;
        Ok([dx, dw, db])
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
        let (w, b) = (random(&[4], 1)?, random(&[4], 2)?);
        let x = random(&[2, 4, 2, 3], 3)?;
        let batch_inside = random(&[4, 2, 3], 4)?.permute([1, 0, 2])?;
        for x in [x.clone(), x.to_channels_last()?, random(&[3, 4], 5)?, batch_inside] {
            let inputs = [x.clone(), w.clone(), b.clone()];
            for groups in [1, 2] {
                gradcheck(|t| t[0].group_norm(groups, Some(&t[1]), Some(&t[2]), 1e-3), &inputs)?;
                gradcheck(|t| t[0].group_norm(groups, None, None, 1e-3), &inputs[..1])?;
            }
            gradcheck(|t| t[0].instance_norm(Some(&t[1]), Some(&t[2]), 0.1), &inputs)?;
        }
        Ok(())
    }

    #[test]
    fn layouts_and_edges() -> Result<()> {
        let x = random(&[2, 6, 5, 7], 1)?;
        let y = x.group_norm(3, None, None, 1e-5)?;
        let last = x.to_channels_last()?;
        let y_last = last.group_norm(3, None, None, 1e-5)?;
        assert_eq!(y_last.strides(), last.strides(), "the memory order is kept");
        let rows = x.reshape([2, 3, 70])?.layer_norm(70, None, None, 1e-5)?.to_vec::<f64>()?;
        for ((a, b), c) in y.to_vec::<f64>()?.iter().zip(y_last.to_vec::<f64>()?).zip(rows) {
            assert!((a - b).abs() < 1e-12 && (a - c).abs() < 1e-12);
        }
        assert!(x.group_norm(4, None, None, 1e-5).is_err() && x.group_norm(0, None, None, 1e-5).is_err());
        assert!(x.group_norm(2, Some(&random(&[3], 1)?), None, 1e-5).is_err());
        assert_eq!(Tensor::zeros([0, 6, 2], DType::F32)?.group_norm(2, None, None, 1e-5)?.shape(), [0, 6, 2]);
        Ok(())
    }
}
