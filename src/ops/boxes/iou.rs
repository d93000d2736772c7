//! How much boxes overlap: intersection over union and what was added to it, every box with every other. Formulas as
//! in torchvision.ops.boxes.

use super::{corners, length, part, product, sides};
use crate::{Result, Tensor, ensure};
use std::f64::consts::PI;

impl Tensor {
    /// Intersection over union of boxes `[N, 4]` with boxes `[M, 4]`: `[N, M]`. NaN for two boxes without area, as
    /// in torchvision.
    ///
    /// # Errors
    /// If the shapes are others.
    #[track_caller]
    pub fn box_iou(&self, other: &Tensor) -> Result<Tensor> {
        Pairs::all("box_iou", self, other)?.iou(0.0)
    }

    /// GIoU (Rezatofighi et al., 2019): IoU less the share of the box around both that neither fills.
    ///
    /// # Errors
    /// As [`box_iou`](Self::box_iou).
    #[track_caller]
    pub fn generalized_box_iou(&self, other: &Tensor) -> Result<Tensor> {
        let pairs = Pairs::all("generalized_box_iou", self, other)?;
        pairs.iou(0.0)?.sub(&pairs.unfilled(0.0)?)
    }

    /// DIoU (Zheng et al., 2020): IoU less the squared distance of the centres by the squared diagonal of the box
    /// around both, plus `eps`.
    ///
    /// # Errors
    /// As [`box_iou`](Self::box_iou).
    #[track_caller]
    pub fn distance_box_iou(&self, other: &Tensor, eps: f64) -> Result<Tensor> {
        let pairs = Pairs::all("distance_box_iou", self, other)?;
        pairs.iou(0.0)?.sub(&pairs.distance(eps)?)
    }

    /// CIoU (Zheng et al., 2020): DIoU less alpha v, where v measures how much the aspect ratios differ, and
    /// alpha = v / (1 - IoU + v + eps) counts as a constant.
    ///
    /// # Errors
    /// As [`box_iou`](Self::box_iou).
    #[track_caller]
    pub fn complete_box_iou(&self, other: &Tensor, eps: f64) -> Result<Tensor> {
        let pairs = Pairs::all("complete_box_iou", self, other)?;
        let iou = pairs.iou(0.0)?;
        iou.sub(&pairs.distance(eps)?)?.sub(&pairs.aspect(&iou, eps)?)
    }
}

/// Boxes `[.., 4]` that meet, broadcast.
pub(super) struct Pairs {
    a: Tensor,
    b: Tensor,
    op: &'static str,
}

impl Pairs {
    /// Every box of `[N, 4]` with every one of `[M, 4]`.
    #[track_caller]
    pub fn all(op: &'static str, a: &Tensor, b: &Tensor) -> Result<Pairs> {
        ensure!(
            a.rank() == 2 && b.rank() == 2 && a.shape()[1] == 4 && b.shape()[1] == 4,
            op,
            "needs boxes [N, 4] and [M, 4], got {:?} and {:?}",
            a.shape(),
            b.shape()
        );
        Ok(Pairs { a: a.unsqueeze(1)?, b: b.unsqueeze(0)?, op })
    }

    /// Each box with the one in its place.
    #[track_caller]
    pub fn each(op: &'static str, a: &Tensor, b: &Tensor) -> Result<Pairs> {
        ensure!(
            a.shape() == b.shape() && a.shape().last() == Some(&4),
            op,
            "needs boxes [.., 4] of one shape, got {:?} and {:?}",
            a.shape(),
            b.shape()
        );
        Ok(Pairs { a: a.clone(), b: b.clone(), op })
    }

    /// Areas of intersection and union.
    fn areas(&self) -> Result<[Tensor; 2]> {
        let ([a0, a1], [b0, b1]) = (corners(self.op, &self.a)?, corners(self.op, &self.b)?);
        let both = product(&a1.minimum(&b1)?.sub(&a0.maximum(&b0)?)?.clamp(0.0, None)?)?;
        let union = self.a.box_area()?.add(&self.b.box_area()?)?.sub(&both)?;
        Ok([both, union])
    }

    pub fn iou(&self, eps: f64) -> Result<Tensor> {
        let [both, union] = self.areas()?;
        both.div(&more(union, eps)?)
    }

    /// Sides of the box around both.
    fn around(&self) -> Result<Tensor> {
        let ([a0, a1], [b0, b1]) = (corners(self.op, &self.a)?, corners(self.op, &self.b)?);
        a1.maximum(&b1)?.sub(&a0.minimum(&b0)?)
    }

    /// The share of the box around both that neither fills.
    pub fn unfilled(&self, eps: f64) -> Result<Tensor> {
        let ([_, union], around) = (self.areas()?, product(&self.around()?)?);
        around.sub(&union)?.div(&more(around, eps)?)
    }

    /// Squared distance of the centres by the squared diagonal of the box around both.
    pub fn distance(&self, eps: f64) -> Result<Tensor> {
        let ([a0, a1], [b0, b1]) = (corners(self.op, &self.a)?, corners(self.op, &self.b)?);
        let apart = length(&a0.add(&a1)?.sub(&b0.add(&b1)?)?.mul_scalar(0.5)?)?;
        apart.div(&more(length(&self.around()?)?, eps)?)
    }

    /// alpha v of the complete IoU.
    pub fn aspect(&self, iou: &Tensor, eps: f64) -> Result<Tensor> {
        let angle = |boxes: &Tensor| {
            let sides = sides(self.op, boxes)?;
            part(&sides, 0)?.div(&part(&sides, 1)?)?.atan()
        };
        let v = angle(&self.a)?.sub(&angle(&self.b)?)?.square()?.mul_scalar(4.0 / (PI * PI))?;
        let fixed = v.detach();
        let alpha = fixed.div(&fixed.sub(&iou.detach())?.add_scalar(1.0 + eps)?)?;
        alpha.mul(&v)
    }
}

/// `eps` more, or the same where there is none.
fn more(x: Tensor, eps: f64) -> Result<Tensor> {
    if eps == 0.0 { Ok(x) } else { x.add_scalar(eps) }
}
