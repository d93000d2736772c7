//! Images as sequences of patches, and the reconstruction loss over them (He et al., CVPR 2022, sections 3 and
//! 4.1; facebookresearch/mae). Patches are numbered row by row.

use super::gather::checked;
use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_float, for_real, for_size, on_device,
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
                for_size!(x.dtype(), T => Ok(cpu::patchify::<T>(x, &size, None, order))),
                gpu::patchify("patchify", x, &size, None, order, None, x.dtype())
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
            on_device!(
                x,
                op,
                for_size!(x.dtype(), T => Ok(cpu::patchify::<T>(x, &size, Some(&ids), order))),
                gpu::patchify(op, x, &size, Some(&ids), order, None, x.dtype())
            )
        })?;
        y.record([self], PatchifyKept { ids, p, grid: [size.rows, size.columns], order })
    }

    /// The patches `ids` [N, K] of images as they come from a decoder, in one pass: [N, K, p * p * C] of `dtype`, each
    /// pixel (x - mean) / std with its channel's mean and standard deviation. x is the pixel, of u8 images a 255th
    /// of it. Images are constants: no gradient goes into them.
    ///
    /// # Errors
    /// As [`patchify_kept`](Self::patchify_kept), if `mean` and `std` do not have a number for each channel, or if
    /// `dtype` or that of the images (u8 apart) is no float.
    #[track_caller]
    pub fn masked_patches(
        &self,
        ids: &Tensor,
        p: usize,
        order: PatchOrder,
        mean: &[f64],
        std: &[f64],
        dtype: DType,
    ) -> Result<Tensor> {
        let op = "masked_patches";
        let size = Sizes::of(op, self, p)?;
        let [n, _] = ids.dims(op)?;
        ensure!(n == size.n, op, "ids {:?} do not belong to images {:?}", ids.shape(), self.shape());
        ensure!(
            mean.len() == size.c && std.len() == size.c && std.iter().all(|&s| s > 0.0),
            op,
            "images {:?} need {} means and positive deviations, got {mean:?} and {std:?}",
            self.shape(),
            size.c
        );
        ensure!(
            dtype.is_float() && (self.dtype().is_float() || self.dtype() == DType::U8),
            op,
            "turns u8 or float images into a float dtype, not {} into {dtype}",
            self.dtype()
        );
        let unit = if self.dtype() == DType::U8 { 255.0 } else { 1.0 };
        let affine = Affine {
            scale: std.iter().map(|s| 1.0 / (s * unit)).collect(),
            shift: mean.iter().zip(std).map(|(m, s)| -m / s).collect(),
        };
        let ids = checked(op, ids, 1, size.patches())?.contiguous()?;
        on_device!(
            self,
            op,
            for_float!(dtype, op, R => cpu::normalised_any::<R>(self, &size, &ids, order, &affine)),
            gpu::patchify(op, self, &size, Some(&ids), order, Some(&affine), dtype)
        )
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
            on_device!(
                x,
                op,
                for_size!(x.dtype(), T => Ok(cpu::unpatchify::<T>(x, &size, order))),
                gpu::unpatchify(x, &size, order)
            )
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
        let want = self.tracked() && crate::autograd::is_grad_enabled();
        #[cfg(gpu)]
        let widened = self.dtype().is_half() && !crate::gpu::on_gpu(self);
        #[cfg(not(gpu))]
        let widened = self.dtype().is_half();
        let pred = if widened { self.to_dtype(DType::F32)? } else { self.clone() };
        let (loss, grad) = on_device!(
            self,
            op,
            {
                let (x, images) = (pred.contiguous()?, images.detach().to_dtype(pred.dtype())?);
                let weights = mask.to_dtype(DType::F64)?.to_vec::<f64>()?;
                let total = checked_total(weights.iter().sum())?;
                for_real!(pred.dtype(), op, T => {
                    Ok(cpu::loss::<T>(&x, &images, &size, &weights, total, norm_pix, want))
                })
            },
            gpu::loss(&pred, images, mask, &size, norm_pix, want)
        )?;
        match grad {
            Some(grad) => loss.record([&pred], MaskedPatchLoss { grad }),
            None => Ok(loss),
        }
    }
}

/// The sum of the mask, if there is a patch to take the mean over.
#[track_caller]
fn checked_total(total: f64) -> Result<f64> {
    ensure!(
        total > 0.0,
        MaskedPatchLoss::NAME,
        "the mask sums to {total}: no patch is removed, so the mean is undefined"
    );
    Ok(total)
}

/// x * scale + shift, by channel.
struct Affine {
    scale: Vec<f64>,
    shift: Vec<f64>,
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
        // On a GPU a look would wait for the device; backward starts with a 1 that is known there.
        #[cfg(gpu)]
        let looked =
            if crate::gpu::on_gpu(grad) { crate::gpu::known(grad).value } else { Some(grad.item()?) };
        #[cfg(not(gpu))]
        let looked = Some(grad.item()?);
        let dx = match looked {
            Some(1.0) => self.grad.clone(),
            _ => self.grad.mul(grad)?.to_dtype(self.grad.dtype())?,
        };
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
        dtype::{Element, Float, Real},
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

    /// The patches `ids` of u8 or float images, normalised.
    pub fn normalised_any<R: Float>(
        images: &Tensor,
        size: &Sizes,
        ids: &Tensor,
        order: PatchOrder,
        affine: &Affine,
    ) -> Result<Tensor> {
        if images.dtype() == DType::U8 {
            return Ok(normalised::<u8, R>(images, size, ids, order, affine));
        }
        let images = images.detach().to_dtype(R::Acc::DTYPE)?;
        Ok(normalised::<R::Acc, R>(&images, size, ids, order, affine))
    }

    fn normalised<T: Element, R: Float>(
        images: &Tensor,
        size: &Sizes,
        ids: &Tensor,
        order: PatchOrder,
        affine: &Affine,
    ) -> Tensor {
        let (patches, width, area) = (ids.shape()[1], size.width(), size.p * size.p);
        let ids = ids.cpu_slice::<i64>();
        let pixels = Pixels::<T>::of(images);
        let of = |v: &[f64]| v.iter().map(|&v| R::Acc::of(v)).collect::<Vec<_>>();
        let (scale, shift) = (of(&affine.scale), of(&affine.shift));
        let mut out = CpuVec::<R>::new(size.n * patches * width);
        let target = SharedMut::new(&mut out);
        for_rows(size.n * patches, width, |range| {
            let mut buffer = vec![T::default(); width];
            for at in range {
                unsafe { pixels.read(size, at / patches, ids[at] as usize, order, &mut buffer) };
                let to = unsafe { target.slice(at * width..(at + 1) * width) };
                let put = |to: &mut R, x: T, c: usize| {
                    *to = R::store(R::Acc::of(x.to_f64()) * scale[c] + shift[c]);
                };
                match order {
                    PatchOrder::ChannelLast => {
                        for (to, from) in to.chunks_exact_mut(size.c).zip(buffer.chunks_exact(size.c)) {
                            to.iter_mut().zip(from).enumerate().for_each(|(c, (to, &x))| put(to, x, c));
                        }
                    }
                    PatchOrder::ChannelFirst => {
                        let channels = to.chunks_exact_mut(area).zip(buffer.chunks_exact(area));
                        for (c, (to, from)) in channels.enumerate() {
                            to.iter_mut().zip(from).for_each(|(to, &x)| put(to, x, c));
                        }
                    }
                }
            }
        });
        Tensor::from_cpu(out, [size.n, patches, width], "masked_patches")
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

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::gpu::{self, sys};

    /// Channels of which kernels know scale and shift.
    const CHANNELS: usize = 16;

    fn is_last(order: PatchOrder) -> i32 {
        i32::from(order == PatchOrder::ChannelLast)
    }

    pub fn patchify(
        op: &'static str,
        images: &Tensor,
        size: &Sizes,
        ids: Option<&Tensor>,
        order: PatchOrder,
        affine: Option<&Affine>,
        dtype: DType,
    ) -> Result<Tensor> {
        if let (Some(affine), Some(ids)) = (affine, ids) {
            let direct = match images.dtype() {
                DType::U8 | DType::F32 => dtype != DType::F64,
                _ => true,
            };
            if size.c > CHANNELS || !direct {
                return composed(images, size, ids, order, affine, dtype);
            }
        }
        // of other pairs, halves and doubles, the images are converted first
        let from_dtype = match images.dtype() {
            from @ (DType::U8 | DType::F32) => from,
            from if from == dtype => from,
            _ => dtype,
        };
        let images = images.detach().to_dtype(from_dtype)?;
        let patches = ids.map_or(size.patches(), |ids| ids.shape()[1]);
        let y = gpu::empty(&images, &[size.n, patches, size.width()], dtype, op)?;
        gpu::launch(op, [&images, ids.unwrap_or(&images), &y], |[x, ids_view, y], stream| {
            let ids = if ids.is_some() { &raw const ids_view } else { std::ptr::null() };
            let (scale, shift) =
                affine.map_or((std::ptr::null(), std::ptr::null()), |a| (a.scale.as_ptr(), a.shift.as_ptr()));
            unsafe { sys::smalti_patchify(&x, ids, size.p as i64, is_last(order), scale, shift, &y, stream) }
        })?;
        Ok(y)
    }

    /// Normalised patches by other operations: more channels, or u8 and f32 images to f64.
    fn composed(
        images: &Tensor,
        size: &Sizes,
        ids: &Tensor,
        order: PatchOrder,
        affine: &Affine,
        dtype: DType,
    ) -> Result<Tensor> {
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let by_channel = |v: &[f64]| -> Result<Tensor> {
            let shape = match order {
                PatchOrder::ChannelLast => [1, size.c],
                PatchOrder::ChannelFirst => [size.c, 1],
            };
            images.device().scope(|| Tensor::from_slice(v, shape))?.to_dtype(wide)
        };
        let area = size.p * size.p;
        let inner = match order {
            PatchOrder::ChannelLast => [area, size.c],
            PatchOrder::ChannelFirst => [size.c, area],
        };
        let kept = images.detach().patchify_kept(ids, size.p, order)?.to_dtype(wide)?;
        let y = kept.reshape([size.n, ids.shape()[1], inner[0], inner[1]])?;
        let y = y.mul(&by_channel(&affine.scale)?)?.add(&by_channel(&affine.shift)?)?;
        y.reshape([size.n, ids.shape()[1], size.width()])?.to_dtype(dtype)
    }

    pub fn unpatchify(x: &Tensor, size: &Sizes, order: PatchOrder) -> Result<Tensor> {
        let Sizes { n, c, rows, columns, p } = *size;
        let y = gpu::empty(x, &[n, c, rows * p, columns * p], x.dtype(), "unpatchify")?;
        gpu::launch("unpatchify", [x, &y], |[x, y], stream| unsafe {
            sys::smalti_unpatchify(&x, p as i64, is_last(order), &y, stream)
        })?;
        Ok(y)
    }

    /// The loss and, if wanted, its gradient. Waits for the device to see the sum of the mask, unless a kernel of
    /// this crate made the mask.
    pub fn loss(
        pred: &Tensor,
        images: &Tensor,
        mask: &Tensor,
        size: &Sizes,
        norm_pix: Option<f64>,
        want: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (op, f64s) = (MaskedPatchLoss::NAME, pred.dtype() == DType::F64);
        ensure!(pred.dtype().is_float(), op, "needs float predictions, got {}", pred.dtype());
        let x = pred.detach().contiguous()?;
        let taken =
            images.dtype() == x.dtype() || (!f64s && matches!(images.dtype(), DType::F32 | DType::U8));
        let images = if taken { images.detach() } else { images.detach().to_dtype(x.dtype())? };
        let known = gpu::is_positive(mask);
        let mask_dtype = if f64s && mask.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let mask = mask.detach().to_dtype(mask_dtype)?.contiguous()?;
        let bytes = unsafe { sys::smalti_masked_loss_workspace((size.n * size.patches()) as i64) } as usize;
        let work = gpu::empty(&x, &[bytes / size_of::<f64>()], DType::F64, op)?;
        let loss = gpu::empty(&x, &[], if f64s { DType::F64 } else { DType::F32 }, op)?;
        let grad = want.then(|| gpu::empty(&x, x.shape(), x.dtype(), op)).transpose()?;
        let (p, norm, eps) = (size.p as i64, norm_pix.is_some().into(), norm_pix.unwrap_or(0.0));
        let tensors = [&x, &images, &mask, &work, &loss, grad.as_ref().unwrap_or(&x)];
        gpu::launch(op, tensors, |[x, images, mask, work, loss, g], stream| {
            let g = if want { &raw const g } else { std::ptr::null() };
            let work = work.ptr.cast();
            unsafe { sys::smalti_masked_loss(&x, &images, &mask, p, norm, eps, work, &loss, g, stream) }
        })?;
        if !known {
            checked_total(work.narrow(0, 0, 1)?.item()?)?;
        }
        Ok((loss, grad))
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
    fn normalised_patches_are_the_composition() -> Result<()> {
        let (mean, std) = ([0.5, 0.25, 0.75], [0.5, 2.0, 0.25]);
        let bytes: Vec<u8> = (0..2 * 3 * 8 * 12).map(|i| (i * 37 % 256) as u8).collect();
        let x = Tensor::from_slice(&bytes, [2, 3, 8, 12])?;
        let ids = Tensor::from_slice(&[5i64, 0, 2, 1], [2, 2])?;
        for x in [x.clone(), x.to_channels_last()?, x.to_dtype(DType::F32)?, x.to_dtype(DType::F64)?] {
            let unit = if x.dtype() == DType::U8 { 255.0 } else { 1.0 };
            let wide = x.to_dtype(DType::F64)?.mul_scalar(1.0 / unit)?;
            let by_channel = |v: &[f64]| Tensor::from_slice(v, [3, 1, 1]);
            let exact = wide.sub(&by_channel(&mean)?)?.div(&by_channel(&std)?)?;
            for order in [PatchOrder::ChannelLast, PatchOrder::ChannelFirst] {
                let want = exact.patchify_kept(&ids, 4, order)?.to_vec::<f64>()?;
                for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
                    let y = x.masked_patches(&ids, 4, order, &mean, &std, dtype)?;
                    assert_eq!((y.dtype(), y.shape()), (dtype, &[2, 2, 48][..]));
                    let tolerance = if dtype.is_half() { 4e-3 } else { 1e-6 };
                    for (a, b) in y.to_dtype(DType::F64)?.to_vec::<f64>()?.iter().zip(&want) {
                        assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{a} {b} {dtype}");
                    }
                }
            }
        }
        let last = PatchOrder::ChannelLast;
        assert!(x.masked_patches(&ids, 4, last, &mean[..2], &std, DType::F32).is_err());
        assert!(x.masked_patches(&ids, 4, last, &mean, &[0.0; 3], DType::F32).is_err());
        assert!(x.masked_patches(&ids, 4, last, &mean, &std, DType::I64).is_err());
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
