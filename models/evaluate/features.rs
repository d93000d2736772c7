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
