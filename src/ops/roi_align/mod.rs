//! ROIAlign (He et al., 2017, "Mask R-CNN", section 3): boxes of a feature map, resampled to a grid each.
//!
//! A bin of a box is the mean of samples that lie evenly in it, each read bilinearly. The weight of a sample is a
//! product of one along each axis, and so is the weight of a pixel in a bin: all that is computed for a box are the
//! pixels of its rows of bins and of its columns of bins, with their weights.

mod cpu;

use crate::{
    Error, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_float, for_real, on_device,
    shape::Dims,
};
use smallvec::smallvec;

/// Options of [`Tensor::roi_align`], named as in torchvision.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoiAlignOptions {
    /// Bins of a box: (height, width).
    pub output_size: [usize; 2],
    /// Pixels of the feature map for a unit of the boxes' coordinates: 1/16 for stride 16.
    pub spatial_scale: f64,
    /// Samples along each side of a bin; 0 or less: as many as the bin has pixels, rounded up.
    pub sampling_ratio: i64,
    /// Is the centre of the first pixel at 0.5 (right) instead of 0? If not, sides of boxes are at least 1 pixel.
    pub aligned: bool,
}

impl RoiAlignOptions {
    /// torchvision's defaults but for `aligned`, which is true: coordinates as everywhere else in this crate.
    pub fn new(output_size: [usize; 2], spatial_scale: f64) -> Self {
        RoiAlignOptions { output_size, spatial_scale, sampling_ratio: -1, aligned: true }
    }
}

const OP: &str = "roi_align";

impl Tensor {
    /// Feature maps `[N, C, H, W]` in boxes `[R, 5]` (number of the image, x1, y1, x2, y2): `[R, C, h, w]`, in the
    /// memory order of the feature maps, NCHW or NHWC. A sample up to one pixel outside reads the edge, beyond it
    /// is 0. Boxes are constants. Saves: the boxes.
    ///
    /// # Errors
    /// If shapes, dtypes or options do not fit, or a box belongs to an image that is not there (on a GPU, where
    /// nobody can look without waiting for it, such a box gives NaN instead).
    #[track_caller]
    pub fn roi_align(&self, boxes: &Tensor, options: &RoiAlignOptions) -> Result<Tensor> {
        let ([_, c, h, w], [_, five]) = (self.dims(OP)?, boxes.dims(OP)?);
        ensure!(
            five == 5,
            OP,
            "needs boxes [R, 5] (image, x1, y1, x2, y2), got {:?} beside features {:?}",
            boxes.shape(),
            self.shape()
        );
        ensure!(
            self.dtype().is_float() && boxes.dtype().is_float(),
            OP,
            "needs float features and boxes, got {} and {}",
            self.dtype(),
            boxes.dtype()
        );
        ensure!(h > 0 && w > 0, OP, "the features {:?} have no pixels", self.shape());
        let scale = options.spatial_scale;
        ensure!(
            options.output_size.iter().all(|&n| n > 0) && scale > 0.0 && scale.is_finite(),
            OP,
            "needs an output size of at least 1 x 1 and a positive scale, got {options:?}"
        );
        let wide = self.dtype().computed_in();
        let rois = boxes.detach().to_dtype(wide)?.contiguous()?;
        let (x, plan) = (self.detach(), Plan { options: *options, last: c > 1 && self.strides()[1] == 1 });
        let y = on_device!(
            x,
            OP,
            for_float!(x.dtype(), OP, T => cpu::forward::<T>(&x, &rois, &plan)),
            gpu::forward(&x, &rois, &plan),
            when gpu::takes(options)
        )?;
        y.record([self, boxes], RoiAlign { rois, shape: Dims::from_slice(self.shape()), plan })
    }
}

/// How it is done.
#[derive(Clone, Copy)]
struct Plan {
    options: RoiAlignOptions,
    /// Are the channels adjacent in memory?
    last: bool,
}

impl Plan {
    /// Dense strides of a tensor `[N, C, H, W]` in this memory order.
    #[cfg(gpu)]
    fn strides(&self, shape: &[usize]) -> crate::shape::Strides {
        let order: &[usize] = if self.last { &[0, 2, 3, 1] } else { &[0, 1, 2, 3] };
        crate::cpu::elementwise::dense_strides(shape, order)
    }
}

struct RoiAlign {
    rois: Tensor,
    shape: Dims,
    plan: Plan,
}

impl Backward for RoiAlign {
    const NAME: &'static str = OP;

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        if ctx.needs(1) {
            return Err(Error::NoGradient { op: OP, input: "boxes" });
        }
        let grad = if self.plan.last { grad.to_channels_last()? } else { grad.contiguous()? };
        let dx = on_device!(
            grad,
            OP,
            Tensor::in_f32([&grad], |[g]| {
                for_real!(g.dtype(), OP, T => cpu::backward::<T>(g, &self.rois, &self.shape, &self.plan))
            }),
            gpu::backward(&grad, &self.rois, &self.shape, &self.plan),
            when gpu::takes(&self.plan.options)
        )?;
        Ok(smallvec![Some(dx), None])
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::gpu::{self, sys};

    /// Tables of very fine grids do not fit into a block's memory.
    pub fn takes(options: &RoiAlignOptions) -> bool {
        options.output_size.iter().all(|&n| n <= 1024)
    }

    pub fn forward(x: &Tensor, rois: &Tensor, plan: &Plan) -> Result<Tensor> {
        let o = &plan.options;
        let shape = [rois.shape()[0], x.shape()[1], o.output_size[0], o.output_size[1]];
        let y = gpu::empty_strided(x, &shape, plan.strides(&shape), x.dtype(), OP)?;
        gpu::launch(OP, [x, rois, &y], |[x, rois, y], stream| unsafe {
            let (scale, samples) = (o.spatial_scale, o.sampling_ratio);
            sys::smalti_roi_align_forward(&x, &rois, scale, samples, o.aligned.into(), &y, stream)
        })?;
        Ok(y)
    }

    pub fn backward(grad: &Tensor, rois: &Tensor, shape: &[usize], plan: &Plan) -> Result<Tensor> {
        let o = &plan.options;
        let dx = gpu::empty_strided(grad, shape, plan.strides(shape), grad.dtype(), OP)?;
        let bytes = unsafe { sys::smalti_roi_align_workspace(rois.shape()[0] as i64) };
        let work = gpu::workspace(OP, grad, bytes)?;
        gpu::launch(OP, [grad, rois, &dx, &work], |[grad, rois, dx, work], stream| unsafe {
            let (scale, samples, aligned) = (o.spatial_scale, o.sampling_ratio, o.aligned.into());
            sys::smalti_roi_align_backward(&grad, &rois, scale, samples, aligned, &dx, work.ptr, stream)
        })?;
        Ok(dx)
    }
}

#[cfg(test)]
mod tests;
