//! Images as the kernels of batch and group norm take them: memory `[images, positions, channels, area]`, where
//! positions (channels-first) or area (channels-last) is 1.

use crate::{
    Result, Tensor,
    cpu::axis::Axis,
    gpu::{self, sys},
};

pub struct Images {
    axis: Axis,
    shape: [usize; 4],
}

impl Images {
    /// The memory order of `x`, row-major where it has none of this form. Unless `apart`, what stands before the
    /// channels in memory counts as images, be it images or positions.
    pub fn of(x: &Tensor, apart: bool) -> Result<Images> {
        let count = if apart { x.shape()[0] } else { 0 };
        let form = |axis: &Axis| {
            let images = if apart { count } else { axis.outer };
            [images, axis.outer.checked_div(images).unwrap_or(1), axis.n, axis.inner]
        };
        let mut axis = Axis::of(x, 1);
        let [_, positions, _, area] = form(&axis);
        if positions != 1 && area != 1 {
            axis = Axis::of(&x.detach().contiguous()?, 1);
        }
        Ok(Images { shape: form(&axis), axis })
    }

    /// Elements of a channel of an image.
    pub fn area(&self) -> usize {
        self.shape[1] * self.shape[3]
    }

    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// A tensor in this form; a copy only where it lies otherwise.
    pub fn flat(&self, t: &Tensor) -> Result<Tensor> {
        self.axis.view(t)?.reshape(self.shape)
    }

    /// A tensor of the shape and dtype of `like`, in this memory order.
    #[track_caller]
    pub fn empty(&self, op: &'static str, like: &Tensor) -> Result<Tensor> {
        gpu::empty_strided(like, like.shape(), self.axis.strides(), like.dtype(), op)
    }

    /// `(x - mean) * rstd * weight + bias`; mean and rstd of channels (`groups` 0) or of groups of images.
    #[track_caller]
    pub fn forward(
        &self,
        op: &'static str,
        x: &Tensor,
        [mean, rstd]: [&Tensor; 2],
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        groups: usize,
    ) -> Result<Tensor> {
        let y = self.empty(op, x)?;
        gpu::launch_some(
            op,
            [Some(&self.flat(x)?), Some(mean), Some(rstd), weight, bias, Some(&self.flat(&y)?)],
            |[x, mean, rstd, w, b, y], stream| unsafe {
                sys::smalti_channel_norm_forward(x, mean, rstd, w, b, y, groups as i64, stream)
            },
        )?;
        Ok(y)
    }
}
