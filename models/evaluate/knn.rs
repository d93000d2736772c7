//! k-nearest-neighbour classification.

use super::Features;
use smalti::{Result, ensure};

/// How neighbours vote.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Vote {
    /// Euclidean distance, one vote each.
    Majority,
    /// Cosine similarity s, votes of weight exp(s / temperature): the monitor of Wu et al. (CVPR 2018).
    Weighted {
        /// 0.07 by custom.
        temperature: f64,
    },
}

/// Part of the test rows whose label wins the vote of their `k` nearest training rows. Ties go to the smaller
/// label.
///
/// # Errors
/// If `k` is 0 or larger than the training set, or the widths differ.
pub fn knn_accuracy(train: &Features, test: &Features, k: usize, vote: Vote) -> Result<f64> {
    ensure!(k > 0 && k <= train.len(), "knn", "k = {k} neighbours of {} training rows", train.len());
    let classes = train.labels.to_vec::<i64>()?.iter().max().map_or(0, |&c| c as usize + 1);
    let (train_x, test_x) = match vote {
        Vote::Majority => (train.x.clone(), test.x.clone()),
        Vote::Weighted { .. } => (train.x.normalize(2.0, 1, 1e-12)?, test.x.normalize(2.0, 1, 1e-12)?),
    };
    let squares = train_x.mul(&train_x)?.sum(1)?;
    let train_labels = train.labels.to_vec::<i64>()?;
    let truth = test.labels.to_vec::<i64>()?;
    let mut right = 0;
    // Blocks of test rows bound the similarity matrix.
    for start in (0..test.len()).step_by(1024) {
        let rows = test_x.narrow(0, start, 1024.min(test.len() - start))?;
        let dot = rows.matmul(&train_x.t()?)?;
        // |a - b|^2 = |a|^2 - 2ab + |b|^2, of which |a|^2 does not change the order
        let score = match vote {
            Vote::Majority => dot.mul_scalar(2.0)?.sub(&squares)?,
            Vote::Weighted { .. } => dot,
        };
        let (scores, nearest) = score.topk(k, -1, true)?;
        let (scores, nearest) = (scores.to_vec::<f32>()?, nearest.to_vec::<i64>()?);
        for (i, (scores, nearest)) in scores.chunks(k).zip(nearest.chunks(k)).enumerate() {
            let mut votes = vec![0f64; classes];
            for (&s, &j) in scores.iter().zip(nearest) {
                votes[train_labels[j as usize] as usize] += match vote {
                    Vote::Majority => 1.0,
                    Vote::Weighted { temperature } => (f64::from(s) / temperature).exp(),
                };
            }
            let best = (0..classes).fold(0, |best, c| if votes[c] > votes[best] { c } else { best });
            right += usize::from(best as i64 == truth[start + i]);
        }
    }
    Ok(right as f64 / test.len() as f64)
}
