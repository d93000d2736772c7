//! k-nearest-neighbour classification.

use super::Features;
use smalti::{DType, Result, Tensor, ensure};

/// How neighbours vote.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Vote {
    /// Euclidean distance, one vote each.
    Majority,
    /// Cosine similarity s, votes of weight exp(s / temperature): the monitor of Wu et al. (CVPR 2018).
    Weighted {
        /// 0.07 by custom; 0.1 in MoCo's notebook, with 200 neighbours.
        temperature: f64,
    },
}

/// Part of the test rows whose label wins the vote of their `k` nearest training rows. Ties go to the smaller
/// label.
///
/// # Errors
/// As [`knn_scores`].
pub fn knn_accuracy(train: &Features, test: &Features, k: usize, vote: Vote) -> Result<f64> {
    let classes = train.labels.to_vec::<i64>()?.iter().max().map_or(0, |&c| c as usize + 1);
    let best = knn_scores(train, &test.x, k, classes, vote)?.argmax(-1)?;
    let right = best.eq(&test.labels)?.sum(())?.item()?;
    Ok(right / test.len() as f64)
}

/// For each row of `test` `[N, D]` the sum of the votes of its `k` nearest training rows for each class, f64
/// `[N, classes]`.
///
/// # Errors
/// If `k` is 0 or larger than the training set, the widths differ, or a label is not below `classes`.
pub fn knn_scores(train: &Features, test: &Tensor, k: usize, classes: usize, vote: Vote) -> Result<Tensor> {
    ensure!(k > 0 && k <= train.len(), "knn", "k = {k} neighbours of {} training rows", train.len());
    let (train_x, test_x) = match vote {
        Vote::Majority => (train.x.clone(), test.clone()),
        Vote::Weighted { .. } => (train.x.normalize(2.0, 1, 1e-12)?, test.normalize(2.0, 1, 1e-12)?),
    };
    let squares = train_x.mul(&train_x)?.sum(1)?;
    let rows = test_x.dim(0)?;
    let mut scores = Vec::new();
    // Blocks of test rows bound the similarity matrix.
    for start in (0..rows).step_by(1024) {
        let n = 1024.min(rows - start);
        let dot = test_x.narrow(0, start, n)?.matmul(&train_x.t()?)?;
        // |a - b|^2 = |a|^2 - 2ab + |b|^2, of which |a|^2 does not change the order
        let nearness = match vote {
            Vote::Majority => dot.mul_scalar(2.0)?.sub(&squares)?,
            Vote::Weighted { .. } => dot,
        };
        let (nearness, nearest) = nearness.topk(k, -1, true)?;
        // a small temperature needs the range of f64
        let nearness = nearness.to_dtype(DType::F64)?;
        let votes = match vote {
            Vote::Majority => nearness.ones_like()?,
            Vote::Weighted { temperature } => nearness.mul_scalar(1.0 / temperature)?.exp()?,
        };
        let labels = train.labels.index_select(0, &nearest.reshape([n * k])?)?.reshape([n, k])?;
        scores.push(Tensor::zeros([n, classes], DType::F64)?.scatter_add(1, &labels, &votes)?);
    }
    Tensor::cat(&scores, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(rows: &[f32], labels: &[i64]) -> Result<Features> {
        Features::new(Tensor::from_slice(rows, [labels.len(), 2])?, labels)
    }

    /// Two neighbours of one class are outvoted by a closer one only if votes are weighted.
    #[test]
    fn votes() -> Result<()> {
        let train = features(&[4.0, 0.0, 1.0, 1.0, 1.0, -1.0, -1.0, 0.0], &[2, 0, 0, 1])?;
        let test = features(&[1.0, 0.0], &[2])?;
        let weighted = Vote::Weighted { temperature: 0.1 };
        let scores = |vote| knn_scores(&train, &test.x, 3, 4, vote)?.to_vec::<f64>();
        assert_eq!(scores(Vote::Majority)?, [2.0, 1.0, 0.0, 0.0]);
        let side = 2.0 * (10.0 * 0.5f64.sqrt()).exp();
        for (got, expected) in scores(weighted)?.iter().zip([side, 0.0, 10f64.exp(), 0.0]) {
            assert!((got - expected).abs() <= 1e-5 * expected, "{got} {expected}");
        }
        assert_eq!(knn_accuracy(&train, &test, 3, weighted)?, 1.0);
        assert_eq!(knn_accuracy(&train, &test, 3, Vote::Majority)?, 0.0);
        // one vote each: the smaller label wins
        assert_eq!(knn_accuracy(&train, &features(&[2.6, 0.5], &[0])?, 2, Vote::Majority)?, 1.0);
        for (k, classes) in [(0, 4), (5, 4), (3, 2)] {
            assert!(knn_scores(&train, &test.x, k, classes, weighted).is_err());
        }
        Ok(())
    }
}
