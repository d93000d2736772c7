//! Channels to space and back (Shi et al., CVPR 2016).

use crate::{Result, Tensor, ensure};

impl Tensor {
    /// [N, C * r * r, H, W] to [N, C, H * r, W * r]: channel (c, i, j) goes to pixel (y * r + i, x * r + j).
    ///
    /// # Errors
    /// If the rank is not 4 or r * r does not divide the channels.
    #[track_caller]
    pub fn pixel_shuffle(&self, r: usize) -> Result<Tensor> {
        let [n, c, h, w] = self.dims("pixel_shuffle")?;
        ensure!(
            r > 0 && r.checked_mul(r).is_some_and(|area| c % area == 0),
            "pixel_shuffle",
            "{c} channels are not a multiple of {r} * {r}"
        );
        let c = c / (r * r);
        self.reshape([n, c, r, r, h, w])?.permute([0, 1, 4, 2, 5, 3])?.reshape([n, c, h * r, w * r])
    }

    /// The inverse of [`pixel_shuffle`](Self::pixel_shuffle): [N, C, H * r, W * r] to [N, C * r * r, H, W].
    ///
    /// # Errors
    /// If the rank is not 4 or r does not divide height and width.
    #[track_caller]
    pub fn pixel_unshuffle(&self, r: usize) -> Result<Tensor> {
        let [n, c, h, w] = self.dims("pixel_unshuffle")?;
        ensure!(
            r > 0 && h % r == 0 && w % r == 0,
            "pixel_unshuffle",
            "{h} x {w} pixels are not made of {r} x {r} blocks"
        );
        let (h, w) = (h / r, w / r);
        self.reshape([n, c, h, r, w, r])?.permute([0, 1, 3, 5, 2, 4])?.reshape([n, c * r * r, h, w])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    #[test]
    fn there_and_back() -> Result<()> {
        let x = Tensor::randn([2, 12, 3, 2], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        let y = x.pixel_shuffle(2)?;
        assert_eq!(y.shape(), [2, 3, 6, 4]);
        assert_eq!(y.pixel_unshuffle(2)?.to_vec::<f64>()?, x.to_vec::<f64>()?);
        assert!(x.pixel_shuffle(0).is_err() && x.pixel_shuffle(5).is_err() && x.pixel_unshuffle(2).is_err());
        gradcheck(|t| t[0].pixel_shuffle(2)?.exp(), &[x.narrow(0, 0, 1)?])
    }
}
