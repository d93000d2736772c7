//! Rows of a table by number: embedding and one-hot vectors.

use super::gather::checked;
use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    bail, ensure, on_device,
    shape::{Dims, checked_count},
};
use smallvec::smallvec;

impl Tensor {
    /// Rows `ids` (any shape) of the table `self` [V, D], as [.., D]. Gradients of repeated ids add up; row
    /// `padding_idx` gets none.
    ///
    /// # Errors
    /// If the table is not of rank 2, an id lies outside `0..V`, or so does `padding_idx`.
    #[track_caller]
    pub fn embedding(&self, ids: &Tensor, padding_idx: Option<usize>) -> Result<Tensor> {
        let op = Embedding::NAME;
        let [v, d] = self.dims(op)?;
        ensure!(padding_idx.is_none_or(|p| p < v), op, "padding_idx {padding_idx:?} is no row of {v}");
        let flat = checked(op, ids, 0, v)?.reshape([ids.numel()])?;
        let mut shape = Dims::from_slice(ids.shape());
        shape.push(d);
        let Some(padding) = padding_idx else {
            return self.index_select(0, &flat)?.reshape(shape);
        };
        let y = self.detach().index_select(0, &flat)?.reshape(shape)?;
        // padding rows go to a row behind the table, which backward cuts off
        let number = self.device().scope(|| Tensor::full((), padding as f64, DType::I64))?;
        let rows = flat.masked_fill(&flat.eq(&number)?, v as f64)?;
        y.record([self], Embedding { rows, size: [v, d] })
    }

    /// Vectors [.., classes] (i64) with a 1 at each number of `self` (any shape, i64 or i32), 0 elsewhere.
    /// `None` for the classes means the largest number + 1.
    ///
    /// # Errors
    /// If a number lies outside `0..classes`, or there are neither numbers nor classes.
    #[track_caller]
    pub fn one_hot(&self, classes: Option<usize>) -> Result<Tensor> {
        let classes = match classes {
            Some(classes) => classes,
            None => {
                let numbers = self.to_dtype(DType::I64)?.to_vec::<i64>()?;
                match numbers.iter().max() {
                    Some(&largest) if largest >= 0 => largest as usize + 1,
                    _ => bail!("one_hot", "no number of classes follows from the numbers {numbers:?}"),
                }
            }
        };
        let ids = checked("one_hot", self, self.rank(), classes)?;
        let mut shape = Dims::from_slice(self.shape());
        shape.push(classes);
        checked_count("one_hot", &shape, size_of::<i64>())?;
        on_device!(self, "one_hot", Ok(cpu::one_hot(&ids, shape)), gpu::one_hot(&ids, &shape))
    }
}

/// Embedding with a padding row.
struct Embedding {
    rows: Tensor,
    size: [usize; 2],
}
impl Backward for Embedding {
    const NAME: &'static str = "embedding";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let [v, d] = self.size;
        let grad = grad.reshape([self.rows.numel(), d])?;
        let table = grad.device().scope(|| Tensor::zeros([v + 1, d], grad.dtype()))?;
        let table = table.index_add(0, &self.rows, &grad, 1.0)?;
        Ok(smallvec![Some(table.narrow(0, 0, v)?)])
    }
}

mod cpu {
    use super::*;
    use crate::cpu::{elementwise, pool::CpuVec};

    pub fn one_hot(ids: &Tensor, shape: Dims) -> Tensor {
        let classes = shape.last().copied().unwrap_or(0);
        let ids = elementwise::to_vec::<i64>(ids);
        let mut out = CpuVec::<i64>::zeros(ids.len() * classes);
        for (row, &id) in ids.iter().enumerate() {
            out[row * classes + id as usize] = 1;
        }
        Tensor::from_cpu(out, shape, "one_hot")
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::gpu::{self, sys};

    pub fn one_hot(ids: &Tensor, shape: &[usize]) -> Result<Tensor> {
        let (ids, y) = (ids.contiguous()?, gpu::empty(ids, shape, DType::I64, "one_hot")?);
        gpu::launch("one_hot", [&ids, &y], |[ids, y], stream| unsafe {
            sys::smalti_one_hot(&ids, &y, stream)
        })?;
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck};

    #[test]
    fn one_hot_of_anything() -> Result<()> {
        let ids = Tensor::from_slice(&[2i64, 0], [2])?;
        assert_eq!(ids.one_hot(None)?.to_vec::<i64>()?, [0, 0, 1, 1, 0, 0]);
        assert_eq!(ids.to_dtype(DType::I32)?.select(0, 0)?.one_hot(Some(4))?.shape(), [4]);
        assert!(ids.one_hot(Some(2)).is_err() && ids.narrow(0, 0, 0)?.one_hot(None).is_err());
        assert!(Tensor::from_slice(&[-1i64], [1])?.one_hot(None).is_err());
        assert_eq!(ids.narrow(0, 0, 0)?.one_hot(Some(3))?.shape(), [0, 3]);
        Ok(())
    }

    #[test]
    fn embedding_rows_and_gradients() -> Result<()> {
        let table = Tensor::randn([3, 5], &mut Rng::new(1))?.to_dtype(DType::F64)?.t()?;
        let ids = Tensor::from_slice(&[4i64, 0, 4, 2, 2, 2], [2, 3])?;
        gradcheck(|t| t[0].embedding(&ids.t()?, None), std::slice::from_ref(&table))?;
        let leaf = table.requires_grad();
        let grads = leaf.embedding(&ids, Some(2))?.sum(())?.backward()?;
        let counts = grads.get(&leaf).map(|g| g.select(1, 0)?.to_vec::<f64>()).transpose()?;
        assert_eq!(counts, Some(vec![1.0, 0.0, 0.0, 0.0, 2.0]));
        assert!(table.embedding(&ids, Some(5)).is_err() && table.t()?.embedding(&ids, None).is_err());
        assert_eq!(table.embedding(&Tensor::scalar(3.0).to_dtype(DType::I64)?, None)?.shape(), [3]);
        Ok(())
    }
}
