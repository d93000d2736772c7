//! Losses of boxes `[.., 4]` against those in the same places. Formulas as in torchvision.ops; of no boxes, sums and
//! means are 0.

use super::iou::Pairs;
use crate::{Reduction, Result, Tensor};

impl Tensor {
    /// 1 - GIoU (Rezatofighi et al., 2019), with `eps` added to the divisors.
    ///
    /// # Errors
    /// If the shapes differ or the last dimension is not 4.
    #[track_caller]
    pub fn generalized_box_iou_loss(
        &self,
        target: &Tensor,
        reduction: Reduction,
        eps: f64,
    ) -> Result<Tensor> {
        let pairs = Pairs::each("generalized_box_iou_loss", self, target)?;
        reduced(pairs.unfilled(eps)?.sub(&pairs.iou(eps)?)?.add_scalar(1.0)?, reduction)
    }

    /// 1 - DIoU (Zheng et al., 2020), with `eps` added to the divisors.
    ///
    /// # Errors
    /// If the shapes differ or the last dimension is not 4.
    #[track_caller]
    pub fn distance_box_iou_loss(&self, target: &Tensor, reduction: Reduction, eps: f64) -> Result<Tensor> {
        let pairs = Pairs::each("distance_box_iou_loss", self, target)?;
        reduced(pairs.distance(eps)?.sub(&pairs.iou(eps)?)?.add_scalar(1.0)?, reduction)
    }

    /// 1 - CIoU (Zheng et al., 2020), with `eps` added to the divisors; its alpha counts as a constant.
    ///
    /// # Errors
    /// If the shapes differ or the last dimension is not 4.
    #[track_caller]
    pub fn complete_box_iou_loss(&self, target: &Tensor, reduction: Reduction, eps: f64) -> Result<Tensor> {
        let pairs = Pairs::each("complete_box_iou_loss", self, target)?;
        let iou = pairs.iou(eps)?;
        let loss = pairs.distance(eps)?.sub(&iou)?.add_scalar(1.0)?.add(&pairs.aspect(&iou, eps)?)?;
        reduced(loss, reduction)
    }
}

fn reduced(losses: Tensor, reduction: Reduction) -> Result<Tensor> {
    match reduction {
        Reduction::None => Ok(losses),
        Reduction::Mean if losses.numel() > 0 => losses.mean(()),
        _ => losses.sum(()),
    }
}
