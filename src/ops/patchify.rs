//! Images as sequences of patches, and the reconstruction loss over them (He et al., CVPR 2022, sections 3 and
//! 4.1; facebookresearch/mae). Patches are numbered row by row.

use super::gather::checked;
use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_real, for_size, on_device,
};
use smallvec::smallvec;

/// How the p * p * C values of a patch are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchOrder {
    /// (row, column, channel), channel fastest: predictions and targets of masked autoencoders.
    ChannelLast,
    /// (channel, row, column): the weight [D, C, p, p] of a patch projection, reshaped to [D, C * p * p].
    ChannelFirst,
}

impl Tensor {
    /// Images [N, C, H, W] as patches [N, L, p * p * C], L = (H / p) * (W / p).
    ///
    /// # Errors
    /// If the rank is not 4 or `p` does not divide H and W.
    #[track_caller]
    pub fn patchify(&self, p: usize, order: PatchOrder) -> Result<Tensor> {
        let size = Sizes::of("patchify", self, p)?;
        let y = self.moved(|x| {
            on_device!(
                x,
                "patchify",
                for_size!(x.dtype(), T => Ok(cpu::patchify::<T>(x, &size, None, order)))
            )
        })?;
        y.record([self], Patchify { p, grid: [size.rows, size.columns], order })
    }

    /// The patches `ids` [N, K] alone, as [N, K, p * p * C]: what a patch projection of kept patches multiplies.
    /// No other pixel is read.
    ///
    /// # Errors
    /// As [`patchify`](Self::patchify), or if an id is no patch.
    #[track_caller]
    pub fn patchify_kept(&self, ids: &Tensor, p: usize, order: PatchOrder) -> Result<Tensor> {
        let op = "patchify_kept";
        let size = Sizes::of(op, self, p)?;
        let [n, _] = ids.dims(op)?;
        ensure!(n == size.n, op, "ids {:?} do not belong to images {:?}", ids.shape(), self.shape());
        let ids = checked(op, ids, 1, size.patches())?.contiguous()?;
        let y = self.moved(|x| {
            on_device!(x, op, for_size!(x.dtype(), T => Ok(cpu::patchify::<T>(x, &size, Some(&ids), order))))
        })?;
        y.record([self], PatchifyKept { ids, p, grid: [size.rows, size.columns], order })
    }

    /// Patches [N, L, p * p * C] as images [N, C, H, W]; `grid` is [H / p, W / p].
    ///
    /// # Errors
    /// If the rank is not 3, L is not the grid's, or p * p does not divide the last size.
    #[track_caller]
    pub fn unpatchify(&self, p: usize, grid: [usize; 2], order: PatchOrder) -> Result<Tensor> {
        let op = "unpatchify";
        let [n, l, width] = self.dims(op)?;
        let [rows, columns] = grid;
        ensure!(rows.checked_mul(columns) == Some(l), op, "grid {grid:?} does not have {l} patches");
        let area = p.checked_mul(p).filter(|&a| a > 0 && width % a == 0);
        ensure!(area.is_some(), op, "patches of {width} values are not {p} x {p} pixels");
        let size = Sizes { n, c: width / area.unwrap_or(1), rows, columns, p };
        let x = self.contiguous()?;
        let y = x.moved(|x| {
            on_device!(x, op, for_size!(x.dtype(), T => Ok(cpu::unpatchify::<T>(x, &size, order))))
        })?;
        y.record([self], Unpatchify { p, order })
    }

    /// The loss of masked autoencoders: `self` [N, L, p * p * C] predicts the patches of `images` [N, C, H, W].
    ///
    /// loss = sum(mask * mean((pred - target)^2)) / sum(mask), the mean over a patch's values in
    /// (row, column, channel) order. With `norm_pix` (an eps, 1e-6 by custom) the target is
    /// (t - mean) / sqrt(var + eps) with each patch's own mean and unbiased variance. Images are constants: no gradient goes into them. Half-precision
    /// predictions are widened; the loss is f32 (f64 for f64).
    ///
    /// # Errors
    /// If shapes do not match, the mask [N, L] sums to 0, or `norm_pix` meets patches of one value.
    #[track_caller]
    pub fn masked_patch_loss(
        &self,
        images: &Tensor,
        mask: &Tensor,
        p: usize,
        norm_pix: Option<f64>,
    ) -> Result<Tensor> {
        let op = MaskedPatchLoss::NAME;
        let size = Sizes::of(op, images, p)?;
        let shape = [size.n, size.patches(), size.width()];
        ensure!(
            *self.shape() == shape && *mask.shape() == shape[..2],
            op,
            "images {:?} need predictions {shape:?} and a mask {:?}, got {:?} and {:?}",
            images.shape(),
            &shape[..2],
            self.shape(),
            mask.shape()
        );
        ensure!(norm_pix.is_none() || size.width() > 1, op, "a patch of one value has no variance");
        let pred = if self.dtype().is_half() { self.to_dtype(DType::F32)? } else { self.clone() };
        let (x, images) = (pred.contiguous()?, images.detach().to_dtype(pred.dtype())?);
        let weights = mask.to_dtype(DType::F64)?.to_vec::<f64>()?;
        let total: f64 = weights.iter().sum();
        ensure!(total > 0.0, op, "the mask sums to {total}: no patch is removed, so the mean is undefined");
        let want = x.tracked() && crate::autograd::is_grad_enabled();
        let (loss, grad) = on_device!(
            self,
            op,
            for_real!(pred.dtype(), op, T => {
                Ok(cpu::loss::<T>(&x, &images, &size, &weights, total, norm_pix, want))
            })
        )?;
        match grad {
            Some(grad) => loss.record([&pred], MaskedPatchLoss { grad }),
            None => Ok(loss),
        }
    }
}

/// A batch of images as patches.
struct Sizes {
    n: usize,
    c: usize,
    rows: usize,
    columns: usize,
    p: usize,
}

impl Sizes {
    #[track_caller]
    fn of(op: &'static str, images: &Tensor, p: usize) -> Result<Sizes> {
        let [n, c, h, w] = images.dims(op)?;
        ensure!(
            p > 0 && h % p == 0 && w % p == 0,
            op,
            "images of {h} x {w} pixels are not made of {p} x {p} patches"
        );
        Ok(Sizes { n, c, rows: h / p, columns: w / p, p })
    }
    fn patches(&self) -> usize {
        self.rows * self.columns
    }
    /// Values of a patch.
    fn width(&self) -> usize {
        self.p * self.p * self.c
    }
}

struct Patchify {
    p: usize,
    grid: [usize; 2],
    order: PatchOrder,
}
impl Backward for Patchify {
    const NAME: &'static str = "patchify";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.unpatchify(self.p, self.grid, self.order)?)])
    }
}

struct PatchifyKept {
    ids: Tensor,
    p: usize,
    grid: [usize; 2],
    order: PatchOrder,
}
impl Backward for PatchifyKept {
    const NAME: &'static str = "patchify_kept";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let all = grad.ungather_tokens(&self.ids, self.grid[0] * self.grid[1])?;
        Ok(smallvec![Some(all.unpatchify(self.p, self.grid, self.order)?)])
    }
}

struct Unpatchify {
    p: usize,
    order: PatchOrder,
}
impl Backward for Unpatchify {
    const NAME: &'static str = "unpatchify";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.patchify(self.p, self.order)?)])
    }
}

/// The gradient for a cotangent of 1, made together with the loss.
struct MaskedPatchLoss {
    grad: Tensor,
}
impl Backward for MaskedPatchLoss {
    const NAME: &'static str = "masked_patch_loss";
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let dx = if grad.item()? == 1.0 { self.grad.clone() } else { self.grad.mul(grad)? };
        Ok(smallvec![Some(dx)])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            parallel::{Shared, SharedMut, for_rows},
            pool::CpuVec,
            simd::{fold, simd_of},
        },
        dtype::{Element, Real},
    };

    /// Where the pixels of an image tensor are.
    struct Pixels<T> {
        base: Shared<T>,
        /// Steps of sample, channel, row, column.
        strides: [isize; 4],
    }

    impl<T: Element> Pixels<T> {
        fn of(images: &Tensor) -> Self {
            let s = images.strides();
            Pixels { base: Shared(images.cpu_ptr::<T>()), strides: [s[0], s[1], s[2], s[3]] }
        }

        /// Copies one patch.
        ///
        /// # Safety
        /// Sample and patch exist.
        #[inline(always)]
        unsafe fn read(&self, size: &Sizes, sample: usize, patch: usize, order: PatchOrder, to: &mut [T]) {
            let (p, c) = (size.p, size.c);
            let [sn, sc, sy, sx] = self.strides;
            let (y, x) = (patch / size.columns * p, patch % size.columns * p);
            let corner = sample as isize * sn + y as isize * sy + x as isize * sx;
            let line = |channel: usize, row: usize| unsafe {
                self.base.ptr().offset(corner + channel as isize * sc + row as isize * sy)
            };
            let run = |from: *const T, n: usize| unsafe { std::slice::from_raw_parts(from, n) };
            match order {
                PatchOrder::ChannelLast if sc == 1 && sx == c as isize => {
                    for (row, to) in to.chunks_exact_mut(p * c).enumerate() {
                        to.copy_from_slice(run(line(0, row), p * c));
                    }
                }
                PatchOrder::ChannelLast if sx == 1 && c == 3 => {
                    for (row, to) in to.chunks_exact_mut(p * 3).enumerate() {
                        let [r, g, b] = [0, 1, 2].map(|channel| run(line(channel, row), p));
                        for (to, ((&r, &g), &b)) in to.chunks_exact_mut(3).zip(r.iter().zip(g).zip(b)) {
                            to.copy_from_slice(&[r, g, b]);
                        }
                    }
                }
                PatchOrder::ChannelLast => {
                    for (row, to) in to.chunks_exact_mut((p * c).max(1)).enumerate() {
                        for channel in 0..c {
                            let from = line(channel, row);
                            for i in 0..p {
                                to[i * c + channel] = unsafe { *from.offset(i as isize * sx) };
                            }
                        }
                    }
                }
                PatchOrder::ChannelFirst => {
                    for (at, to) in to.chunks_exact_mut(p).enumerate() {
                        let from = line(at / p, at % p);
                        if sx == 1 {
                            to.copy_from_slice(run(from, p));
                        } else {
                            (0..p).for_each(|i| to[i] = unsafe { *from.offset(i as isize * sx) });
                        }
                    }
                }
            }
        }
    }

    pub fn patchify<T: Element>(
        images: &Tensor,
        size: &Sizes,
        ids: Option<&Tensor>,
        order: PatchOrder,
    ) -> Tensor {
        let (patches, width) = (ids.map_or(size.patches(), |ids| ids.shape()[1]), size.width());
        let ids = ids.map(Tensor::cpu_slice::<i64>);
        let pixels = Pixels::<T>::of(images);
        let mut out = CpuVec::<T>::new(size.n * patches * width);
        let target = SharedMut::new(&mut out);
        for_rows(size.n * patches, width, |range| {
            for at in range {
                let patch = ids.map_or(at % patches, |ids| ids[at] as usize);
                unsafe {
                    let to = target.slice(at * width..(at + 1) * width);
                    pixels.read(size, at / patches, patch, order, to);
                }
            }
        });
        Tensor::from_cpu(out, [size.n, patches, width], "patchify")
    }

    pub fn unpatchify<T: Element>(x: &Tensor, size: &Sizes, order: PatchOrder) -> Tensor {
        let Sizes { n, c, rows, columns, p } = *size;
        let (h, w, width) = (rows * p, columns * p, size.width());
        let x = x.cpu_slice::<T>();
        let mut out = CpuVec::<T>::new(n * c * h * w);
        let target = SharedMut::new(&mut out);
        // one line of all channels after the other, so that patches are read once
        for_rows(n * h, c * w, |range| {
            for line in range {
                let (sample, y) = (line / h, line % h);
                for column in 0..columns {
                    let patch = &x[((sample * rows + y / p) * columns + column) * width..][..width];
                    for channel in 0..c {
                        let start = ((sample * c + channel) * h + y) * w + column * p;
                        let to = unsafe { target.slice(start..start + p) };
                        match order {
                            PatchOrder::ChannelFirst => {
                                to.copy_from_slice(&patch[(channel * p + y % p) * p..][..p]);
                            }
                            PatchOrder::ChannelLast => {
                                let from = patch[y % p * p * c..][..p * c].chunks_exact(c);
                                to.iter_mut().zip(from).for_each(|(to, from)| *to = from[channel]);
                            }
                        }
                    }
                }
            }
        });
        Tensor::from_cpu(out, [n, c, h, w], "unpatchify")
    }

    /// The loss and, if wanted, its gradient. Each removed patch is read once; its target lives in the cache.
    pub fn loss<T: Real>(
        pred: &Tensor,
        images: &Tensor,
        size: &Sizes,
        weights: &[f64],
        total: f64,
        norm_pix: Option<f64>,
        want_grad: bool,
    ) -> (Tensor, Option<Tensor>) {
        let (patches, width) = (size.patches(), size.width());
        let (x, pixels) = (pred.cpu_slice::<T>(), Pixels::<T>::of(images));
        let mut grad = CpuVec::<T>::new(if want_grad { x.len() } else { 0 });
        let mut losses = vec![0.0f64; weights.len()];
        let (target, each) = (SharedMut::new(&mut grad), SharedMut::new(&mut losses));
        for_rows(weights.len(), width, |range| {
            let mut buffer = vec![T::ZERO; width];
            for at in range {
                let span = at * width..(at + 1) * width;
                let grad = want_grad.then(|| unsafe { target.slice(span.clone()) });
                if weights[at] == 0.0 {
                    grad.into_iter().for_each(|g| g.fill(T::ZERO));
                    continue;
                }
                let scale = T::of(2.0 * weights[at] / (width as f64 * total));
                let sum = simd_of::<T, _>(
                    #[inline(always)]
                    || {
                        let (sample, patch) = (at / patches, at % patches);
                        unsafe { pixels.read(size, sample, patch, PatchOrder::ChannelLast, &mut buffer) };
                        residual(&x[span], &mut buffer, norm_pix, grad, scale)
                    },
                );
                unsafe { *each.ptr().add(at) = sum.to_f64() * weights[at] };
            }
        });
        let loss = losses.iter().sum::<f64>() / (width as f64 * total);
        let mut out = CpuVec::<T>::new(1);
        out[0] = T::of(loss);
        let loss = Tensor::from_cpu(out, (), "masked_patch_loss");
        (loss, want_grad.then(|| Tensor::from_cpu(grad, pred.shape(), "masked_patch_loss")))
    }

    /// Sum of squares of pred - target for the patch in `t`; `grad` gets the differences times `scale`.
    #[inline(always)]
    fn residual<T: Real>(
        pred: &[T],
        t: &mut [T],
        norm_pix: Option<f64>,
        grad: Option<&mut [T]>,
        scale: T,
    ) -> T {
        let add = |a: T, b: T| a + b;
        let (mut mean, mut inverse) = (T::ZERO, T::ONE);
        if let Some(eps) = norm_pix {
            // Measured from the first value the mean of a constant patch is exact: its variance is 0, so an
            // error would grow by 1 / sqrt(eps).
            let (first, n) = (t[0], t.len());
            mean = first + fold(t, T::ZERO, |a, v| a + (v - first), add) / T::of(n as f64);
            let variance = fold(t, T::ZERO, |a, v| a + (v - mean) * (v - mean), add) / T::of((n - 1) as f64);
            inverse = T::ONE / (variance + T::of(eps)).sqrt();
        }
        for (t, &x) in t.iter_mut().zip(pred) {
            *t = x - (*t - mean) * inverse;
        }
        if let Some(grad) = grad {
            for (g, &d) in grad.iter_mut().zip(t.iter()) {
                *g = d * scale;
            }
        }
        fold(t, T::ZERO, |a, d| a + d * d, add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck};

    fn random<const N: usize>(shape: [usize; N], seed: u64) -> Result<Tensor> {
        Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
    }

    /// The definition: reshape and permute.
    fn naive(x: &Tensor, p: usize, order: PatchOrder) -> Result<Vec<f64>> {
        let [n, c, h, w] = x.dims("test")?;
        let axes = match order {
            PatchOrder::ChannelLast => [0, 2, 4, 3, 5, 1],
            PatchOrder::ChannelFirst => [0, 2, 4, 1, 3, 5],
        };
        x.reshape([n, c, h / p, p, w / p, p])?.permute(axes)?.to_vec()
    }

    #[test]
    fn patches_of_any_layout_and_back() -> Result<()> {
        for (c, p) in [(3, 2), (1, 3), (4, 1), (2, 2), (3, 6)] {
            let x = random([2, c, 6, 12], 1)?;
            for x in [x.clone(), x.to_channels_last()?, x.transpose(2, 3)?] {
                for order in [PatchOrder::ChannelLast, PatchOrder::ChannelFirst] {
                    let y = x.patchify(p, order)?;
                    assert_eq!(y.to_vec::<f64>()?, naive(&x, p, order)?);
                    let grid = [x.dim(2)? / p, x.dim(3)? / p];
                    assert_eq!(y.unpatchify(p, grid, order)?.to_vec::<f64>()?, x.to_vec::<f64>()?);
                    let ids = Tensor::from_slice(&[1i64, 0], [2, 1])?;
                    let kept = x.patchify_kept(&ids, p, order)?.to_vec::<f64>()?;
                    assert_eq!(kept, y.gather_tokens(&ids)?.to_vec::<f64>()?);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn bad_arguments_are_errors() -> Result<()> {
        let x = random([1, 3, 4, 6], 1)?;
        let order = PatchOrder::ChannelLast;
        assert!(x.patchify(4, order).is_err() && x.patchify(0, order).is_err());
        let y = x.patchify(2, order)?;
        assert!(y.unpatchify(2, [2, 2], order).is_err() && y.unpatchify(0, [2, 3], order).is_err());
        assert!(x.patchify_kept(&Tensor::from_slice(&[6i64], [1, 1])?, 2, order).is_err());
        let none = y.masked_patch_loss(&x, &Tensor::zeros([1, 6], DType::F32)?, 2, Some(1e-6));
        assert!(none.is_err_and(|e| e.to_string().contains("sums to 0")));
        assert!(y.masked_patch_loss(&x, &Tensor::ones([6], DType::F32)?, 2, Some(1e-6)).is_err());
        let one = random([1, 4, 1], 2)?;
        assert!(
            one.masked_patch_loss(
                &random([1, 1, 2, 2], 3)?,
                &Tensor::ones([1, 4], DType::F32)?,
                1,
                Some(1e-6)
            )
            .is_err()
        );
        let empty = x.narrow(0, 0, 0)?;
        assert_eq!(empty.patchify(2, order)?.shape(), [0, 6, 12]);
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = random([2, 2, 4, 6], 1)?.transpose(2, 3)?;
        let ids = Tensor::from_slice(&[5i64, 0, 2, 1], [2, 2])?;
        for order in [PatchOrder::ChannelLast, PatchOrder::ChannelFirst] {
            gradcheck(|t| t[0].patchify(2, order), std::slice::from_ref(&x))?;
            gradcheck(|t| t[0].unpatchify(2, [3, 2], order), &[random([2, 6, 8], 2)?])?;
            gradcheck(|t| t[0].patchify_kept(&ids, 2, order), std::slice::from_ref(&x))?;
        }
        let mask = Tensor::from_slice(&[1f32, 0., 1., 1., 0.5, 0., 0., 0., 0., 0., 1., 1.], [2, 6])?;
        let pred = random([6, 2, 8], 3)?.transpose(0, 1)?;
        for norm_pix in [None, Some(1e-6)] {
            gradcheck(
                |t| t[0].masked_patch_loss(&x, &mask, 2, norm_pix)?.mul_scalar(3.0),
                std::slice::from_ref(&pred),
            )?;
        }
        let leaf = pred.requires_grad();
        let grads = leaf.masked_patch_loss(&x, &mask, 2, Some(1e-6))?.backward()?;
        let grad = grads.get(&leaf).map(|g| g.select(1, 1)?.to_vec::<f64>()).transpose()?;
        assert_eq!(grad, Some(vec![0.0; 16]), "visible patches get exactly nothing");
        Ok(())
    }
}
