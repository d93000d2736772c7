//! Features of a data set, computed once.

use smalti::{DType, Result, Tensor, ensure, no_grad};

/// One row a sample, with its label.
#[derive(Clone, Debug)]
pub struct Features {
    /// `[N, D]` f32.
    pub x: Tensor,
    /// `[N]` i64.
    pub labels: Tensor,
}

impl Features {
    /// From rows and labels.
    ///
    /// # Errors
    /// If there is not one label a row, or no row.
    pub fn new(x: Tensor, labels: &[i64]) -> Result<Features> {
        let [n, _] = x.dims("features")?;
        ensure!(n == labels.len() && n > 0, "features", "{} labels for {n} rows", labels.len());
        Ok(Features { x: x.to_dtype(DType::F32)?.contiguous()?, labels: Tensor::from_slice(labels, [n])? })
    }

    /// Runs `f` over batches of (images, labels) without recording.
    ///
    /// # Errors
    /// Those of the batches and of `f`, or if there is no batch.
    pub fn extract(
        batches: impl IntoIterator<Item = Result<(Tensor, Vec<i64>)>>,
        f: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Features> {
        let (mut rows, mut labels) = (Vec::new(), Vec::new());
        for batch in batches {
            let (images, batch_labels) = batch?;
            rows.push(no_grad(|| f(&images))?);
            labels.extend(batch_labels);
        }
        ensure!(!rows.is_empty(), "features", "there are no images to compute features of");
        Features::new(Tensor::cat(&rows.iter().collect::<Vec<_>>(), 0)?, &labels)
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.labels.numel()
    }

    /// Never: a set has at least one row.
    pub fn is_empty(&self) -> bool {
        self.labels.numel() == 0
    }
}

/// Subtracts the training mean of each feature and divides by its deviation (biased, eps 1e-6): a BatchNorm
/// without affine, as its running averages end.
///
/// # Errors
/// If the sets have different widths.
pub fn standardise(train: &Features, others: &[&Features]) -> Result<Vec<Features>> {
    let mean = train.x.mean_keepdim(0)?;
    let scale = train.x.var_keepdim(0, 0)?.add_scalar(1e-6)?.rsqrt()?;
    let map = |f: &Features| Ok(Features { x: f.x.sub(&mean)?.mul(&scale)?, labels: f.labels.clone() });
    others.iter().map(|f| map(f)).collect()
}
