//! Boxes as rows of four numbers: formats, areas, clipping, and (in files of their own) how much they overlap and the
//! losses made of that. All in tensor operations, so that gradients come by themselves.

mod iou;
mod loss;

use crate::{DType, Result, Tensor, ensure};

/// How four numbers make a box.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoxFormat {
    /// Left, top, right, bottom: what all other operations on boxes take.
    Xyxy,
    /// Left, top, width, height.
    Xywh,
    /// Centre, width, height.
    Cxcywh,
}

impl Tensor {
    /// Boxes `[.., 4]` in another format.
    ///
    /// # Errors
    /// If the last dimension is not 4.
    #[track_caller]
    pub fn box_convert(&self, from: BoxFormat, to: BoxFormat) -> Result<Tensor> {
        if from == to {
            corners("box_convert", self)?;
            return Ok(self.clone());
        }
        let [a, b] = corners("box_convert", self)?;
        // left and top, right and bottom
        let (low, high) = match from {
            BoxFormat::Xyxy => (a, b),
            BoxFormat::Xywh => (a.clone(), a.add(&b)?),
            BoxFormat::Cxcywh => {
                let half = b.mul_scalar(0.5)?;
                (a.sub(&half)?, a.add(&half)?)
            }
        };
        let (first, second) = match to {
            BoxFormat::Xyxy => (low, high),
            BoxFormat::Xywh => (low.clone(), high.sub(&low)?),
            BoxFormat::Cxcywh => (low.add(&high)?.mul_scalar(0.5)?, high.sub(&low)?),
        };
        Tensor::cat(&[first, second], -1)
    }

    /// Areas `[..]` of boxes `[.., 4]`. Negative where a box is turned round along one axis.
    ///
    /// # Errors
    /// If the last dimension is not 4.
    #[track_caller]
    pub fn box_area(&self) -> Result<Tensor> {
        product(&sides("box_area", self)?)
    }

    /// Boxes `[.., 4]` cut off at the edges of an image. No gradient reaches what is cut off.
    ///
    /// # Errors
    /// If the last dimension is not 4.
    #[track_caller]
    pub fn clip_boxes_to_image(&self, [height, width]: [usize; 2]) -> Result<Tensor> {
        corners("clip_boxes_to_image", self)?;
        let columns: Vec<Tensor> = (0..4)
            .map(|i| self.narrow(-1, i, 1)?.clamp(0.0, if i % 2 == 0 { width } else { height } as f64))
            .collect::<Result<_>>()?;
        Tensor::cat(&columns, -1)
    }

    /// Indices (i64) of the boxes `[N, 4]` with both sides at least `min_size`, in their order. On a GPU this waits for
    /// the device, to know how many there are.
    ///
    /// # Errors
    /// If the shape is another.
    #[track_caller]
    pub fn remove_small_boxes(&self, min_size: f64) -> Result<Tensor> {
        const OP: &str = "remove_small_boxes";
        let [n, _] = self.dims(OP)?;
        let sides = sides(OP, &self.detach())?;
        let large = sides.ge(&sides.full_like(min_size)?)?;
        let large = large.select(1, 0)?.logical_and(&large.select(1, 1)?)?;
        Tensor::arange(n, DType::I64)?.to_device(self.device())?.masked_select(&large)
    }
}

/// The first and the last two numbers of each box, `[.., 2]`.
#[track_caller]
fn corners(op: &'static str, boxes: &Tensor) -> Result<[Tensor; 2]> {
    ensure!(boxes.shape().last() == Some(&4), op, "needs boxes [.., 4], got shape {:?}", boxes.shape());
    Ok([boxes.narrow(-1, 0, 2)?, boxes.narrow(-1, 2, 2)?])
}

/// Width and height, `[.., 2]`.
#[track_caller]
fn sides(op: &'static str, boxes: &Tensor) -> Result<Tensor> {
    let [low, high] = corners(op, boxes)?;
    high.sub(&low)
}

/// One number of each pair, `[..]`.
fn part(pairs: &Tensor, i: usize) -> Result<Tensor> {
    pairs.select(-1, i)
}

/// Product of each pair, `[..]`.
fn product(pairs: &Tensor) -> Result<Tensor> {
    part(pairs, 0)?.mul(&part(pairs, 1)?)
}

/// Sum of the squares of each pair, `[..]`.
fn length(pairs: &Tensor) -> Result<Tensor> {
    let squares = pairs.square()?;
    part(&squares, 0)?.add(&part(&squares, 1)?)
}

#[cfg(test)]
mod tests;
