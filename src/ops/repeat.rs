//! Repetition: tiles of the whole, or each element several times.

use crate::{
    DType, Dim, Result, Tensor, bail, ensure,
    shape::{Dims, IntoShape},
};

impl Tensor {
    /// Tiles the tensor `repeats[d]` times along each dimension; more repeats than dimensions add dimensions in
    /// front.
    ///
    /// # Errors
    /// If there are fewer repeats than dimensions.
    #[track_caller]
    pub fn repeat(&self, repeats: impl IntoShape) -> Result<Tensor> {
        let repeats = repeats.into_shape();
        ensure!(
            repeats.len() >= self.rank(),
            "repeat",
            "{repeats:?} names fewer dimensions than shape {:?}",
            self.shape()
        );
        let lead = repeats.len() - self.rank();
        let mut paired = Dims::new();
        let mut tiled = Dims::new();
        let mut result = Dims::new();
        for (d, &r) in repeats.iter().enumerate() {
            let n = if d < lead { 1 } else { self.shape()[d - lead] };
            paired.extend([1, n]);
            tiled.extend([r, n]);
            result.push(r.saturating_mul(n));
        }
        self.reshape(paired)?.expand(tiled)?.reshape(result)
    }

    /// Each slice of `dim` `times` times in a row.
    ///
    /// # Errors
    /// If there is no such dimension.
    #[track_caller]
    pub fn repeat_interleave(&self, times: usize, dim: impl Dim) -> Result<Tensor> {
        let dim = dim.of("repeat_interleave", self)?;
        ensure!(self.rank() > 0, "repeat_interleave", "a scalar has no slices");
        let mut spread = Dims::from_slice(self.shape());
        spread.insert(dim + 1, times);
        let mut shape = Dims::from_slice(self.shape());
        shape[dim] = shape[dim].saturating_mul(times);
        self.unsqueeze(dim + 1)?.expand(spread)?.reshape(shape)
    }

    /// Slice i of `dim` `times[i]` times in a row.
    ///
    /// # Errors
    /// If `times` is not a 1-D integer tensor with a number for each slice, or a number is negative.
    #[track_caller]
    pub fn repeat_interleave_each(&self, times: &Tensor, dim: impl Dim) -> Result<Tensor> {
        let op = "repeat_interleave";
        let dim = dim.of(op, self)?;
        ensure!(
            self.rank() > 0 && times.shape() == [self.shape()[dim]],
            op,
            "times {:?} do not belong to dimension {dim} of shape {:?}",
            times.shape(),
            self.shape()
        );
        ensure!(
            matches!(times.dtype(), DType::I64 | DType::I32),
            op,
            "times must be i64 or i32, got {}",
            times.dtype()
        );
        let times = times.to_dtype(DType::I64)?.to_vec::<i64>()?;
        if let Some(t) = times.iter().find(|&&t| t < 0) {
            bail!(op, "a slice cannot stand {t} times");
        }
        let index: Vec<i64> =
            times.iter().enumerate().flat_map(|(i, &t)| std::iter::repeat_n(i as i64, t as usize)).collect();
        self.index_select(dim, &Tensor::from_slice(&index, [index.len()])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck};

    #[test]
    fn bad_arguments_are_errors() -> Result<()> {
        let x = Tensor::zeros([2, 3], DType::F32)?;
        assert!(x.repeat([2]).is_err() && x.repeat_interleave(2, 2).is_err());
        assert!(x.repeat_interleave_each(&Tensor::from_slice(&[1i64, -1], [2])?, 0).is_err());
        assert!(x.repeat_interleave_each(&Tensor::from_slice(&[1i64], [1])?, 0).is_err());
        assert_eq!(x.repeat_interleave(0, 0)?.shape(), [0, 3]);
        assert_eq!(x.repeat([0, 2, 1])?.shape(), [0, 4, 3]);
        assert_eq!(Tensor::scalar(2.0).repeat([3])?.to_vec::<f32>()?, [2.0; 3]);
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = Tensor::randn([2, 3], &mut Rng::new(1))?.to_dtype(DType::F64)?.t()?;
        gradcheck(|t| t[0].repeat([2, 1, 3]), std::slice::from_ref(&x))?;
        gradcheck(|t| t[0].repeat_interleave(3, 0), std::slice::from_ref(&x))?;
        let times = Tensor::from_slice(&[2i64, 0, 1], [3])?;
        gradcheck(|t| t[0].repeat_interleave_each(&times, 0), &[x])
    }
}
