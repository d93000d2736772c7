//! What the losses over classes share: where the classes lie, and checked labels and weights.

use crate::{DType, Error, Result, Tensor, bail, ensure, on_device, shape::Dims};

/// Logits as a matrix [rows, classes].
pub struct Layout {
    shape: Dims,
    /// The class dimension last, and the way back.
    order: Vec<usize>,
    inverse: Vec<usize>,
    pub rows: usize,
    pub classes: usize,
}

impl Layout {
    #[track_caller]
    pub fn of(op: &'static str, x: &Tensor) -> Result<Layout> {
        let rank = x.rank();
        ensure!(rank > 0, op, "needs shape [N, C, ..] or [C], got a scalar");
        ensure!(x.dtype().is_float(), op, "needs floats, got {}", x.dtype());
        let dim = usize::from(rank > 1);
        let order: Vec<usize> = (0..rank).filter(|&d| d != dim).chain([dim]).collect();
        let mut inverse = vec![0; rank];
        order.iter().enumerate().for_each(|(i, &d)| inverse[d] = i);
        let shape: Dims = order.iter().map(|&d| x.shape()[d]).collect();
        let rows = crate::shape::count(&shape[..rank - 1]);
        Ok(Layout { classes: shape[rank - 1], rows, shape, order, inverse })
    }

    /// The shape of a loss for each row.
    pub fn row_shape(&self) -> Dims {
        Dims::from_slice(&self.shape[..self.shape.len() - 1])
    }

    /// Row-major [.., C], untracked.
    pub fn matrix(&self, t: &Tensor) -> Result<Tensor> {
        t.detach().permute(&self.order)?.contiguous()
    }

    /// A matrix as a tensor of the logits' shape.
    pub fn restore(&self, matrix: Tensor) -> Result<Tensor> {
        matrix.reshape(&self.shape)?.permute(&self.inverse)
    }

    /// Labels, checked.
    #[track_caller]
    pub fn labels(&self, op: &'static str, target: &Tensor, ignore: i64) -> Result<Tensor> {
        if target.dtype().is_float() || target.dtype() == DType::Bool {
            bail!(op, "needs integer labels, got {}", target.dtype());
        }
        ensure!(
            *target.shape() == self.row_shape()[..],
            op,
            "labels of shape {:?} do not fit; needs {:?}",
            target.shape(),
            self.row_shape()
        );
        let labels = target.detach().to_dtype(DType::I64)?.contiguous()?;
        let classes = self.classes as i64;
        let wrong = |&y: &i64| y != ignore && !(0..classes).contains(&y);
        let found = on_device!(
            labels,
            op,
            Ok(labels.cpu_slice::<i64>().iter().copied().find(wrong)),
            gpu::wrong(op, &labels, classes, ignore)
        )?;
        match found {
            Some(y) => bail!(op, "label {y} is neither one of the {classes} classes nor ignored ({ignore})"),
            None => Ok(labels),
        }
    }

    /// Weights of classes, checked.
    #[track_caller]
    pub fn weight(&self, op: &'static str, weight: Option<&Tensor>, dtype: DType) -> Result<Option<Tensor>> {
        let Some(weight) = weight else { return Ok(None) };
        if weight.tracked() {
            return Err(Error::NoGradient { op, input: "weight" });
        }
        ensure!(
            *weight.shape() == [self.classes],
            op,
            "weight has shape {:?}, needs [{}]",
            weight.shape(),
            self.classes
        );
        Ok(Some(weight.to_dtype(dtype)?.contiguous()?))
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::gpu::{self, sys};

    /// The first wrong label. Sixteen bytes are read back for it; while a graph is recorded nothing can be read, and a
    /// wrong label makes the loss NaN.
    pub fn wrong(op: &'static str, labels: &Tensor, classes: i64, ignore: i64) -> Result<Option<i64>> {
        if gpu::is_recording() {
            return Ok(None);
        }
        let found = gpu::empty(labels, &[2], DType::I64, op)?;
        gpu::launch(op, [labels, &found], |[labels, found], stream| unsafe {
            sys::smalti_wrong_label(&labels, &found, classes, ignore, stream)
        })?;
        let found = found.to_vec::<i64>()?;
        Ok((found[0] >= 0).then_some(found[1]))
    }
}
