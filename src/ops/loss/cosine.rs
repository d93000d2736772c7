//! Cosine similarity.

use crate::{Dim, Result, Tensor};

impl Tensor {
    /// `x . y / (max(|x|, eps) * max(|y|, eps))` along `dim`, which goes away. The inputs broadcast.
    ///
    /// # Errors
    /// If the shapes do not broadcast, the dimension does not exist in the result, or the dtype is not a float.
    #[track_caller]
    pub fn cosine_similarity(&self, other: &Tensor, dim: impl Dim, eps: f64) -> Result<Tensor> {
        let op = "cosine_similarity";
        let shape = crate::shape::broadcast(op, self.shape(), other.shape())?;
        let dim = dim.index(op, shape.len())?;
        // Normalised as they are where that is the same: broadcast copies cost nothing this way.
        let unit = |t: &Tensor| {
            let at = (dim + t.rank()).checked_sub(shape.len());
            match at.filter(|&at| t.shape().get(at) == shape.get(dim)) {
                Some(at) => t.normalize(2.0, at, eps),
                None => t.expand(&shape)?.normalize(2.0, dim, eps),
            }
        };
        unit(self)?.mul(&unit(other)?)?.sum(dim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    #[test]
    fn gradients_and_values() -> Result<()> {
        let mut rng = Rng::new(1);
        let mut random = |shape: &[usize]| Tensor::randn(shape, &mut rng)?.to_dtype(DType::F64);
        let cases = [
            [random(&[3, 4])?, random(&[3, 4])?],
            [random(&[3, 1, 4])?, random(&[2, 4])?],
            [random(&[3, 4])?, random(&[3, 1])?],
            [random(&[4, 3])?.t()?, random(&[4])?],
        ];
        for inputs in &cases {
            gradcheck(|t| t[0].cosine_similarity(&t[1], -1, 1e-8), inputs)?;
        }
        gradcheck(|t| t[0].cosine_similarity(&t[1], 0, 1e-8), &cases[0])?;
        let x = Tensor::from_slice(&[3f32, 4.0, 0.0, 0.0], [2, 2])?;
        let y = Tensor::from_slice(&[6f32, 8.0], [2])?;
        assert_eq!(x.cosine_similarity(&y, 1, 1e-8)?.to_vec::<f32>()?, [1.0, 0.0]);
        assert!(x.cosine_similarity(&y, 2, 1e-8).is_err());
        Ok(())
    }
}
