//! Contrastive softmax: symmetric image–text loss and InfoNCE. The matrix of logits is never held: it passes by in
//! blocks, once forward and, where the keys or a second direction need it, once more backward.
//!
//! With s the scale, `S = s Q Kᵀ`, and y(i) the column of row i's positive:
//! - `r_i = logsumexp of S[i, j], j ≠ y(i), less S[i, y(i)]` is what is kept of a row. The loss is `softplus(r_i)`
//!   and `p - 1` at the positive is `-sigmoid(r_i)`: both keep all their digits where the loss is nearly zero,
//!   which `log(p)` and `p - 1` don't.
//! - `dS[i, j] = softmax(S)[i, j] - [j = y(i)]`, the same down the columns for the second direction,
//!   `dQ = s dS K`, `dK = s dSᵀ Q`, `ds = Σ dS ∘ Q Kᵀ = Σ_i q_i · (dS K)_i`.
//!
//! Workspace on the CPU: one block of [`BLOCK`] logits (8 MiB in f32, 16 MiB in f64), whatever the sizes, a copy of the keys
//! of a block where their rows lie whole pages apart, and four numbers a row and column. On a GPU: partial sums of
//! at most 128 MiB forward; backward a chunk of dS of at most 256 MiB and an eighth of the whole, and f32 sums of
//! the gradients (N = 65,536, d = 512 in bf16: 418 MiB).

mod cpu;
#[cfg(gpu)]
mod gpu;

use crate::{
    Error, Result, Tensor,
    autograd::{Backward, Ctx, Grads, is_grad_enabled},
    ensure, for_real, on_device,
};
use smallvec::smallvec;

/// Logits in a block.
const BLOCK: usize = 1 << 21;

/// What [`Tensor::info_nce`] returns.
#[derive(Clone, Debug)]
pub struct InfoNce {
    /// Mean over the queries.
    pub loss: Tensor,
    /// For each query how many keys of the queue are more similar than its positive, i64 `[N]`: 0 is a hit
    /// among the top 1, below 5 among the top 5 (MoCo's monitor).
    pub rank: Tensor,
}

impl Tensor {
    /// The symmetric image–text loss of CLIP and FLIP (FLIP, section 4): the mean of the cross-entropies of
    /// `scale * image textᵀ` along rows and along columns, with the diagonal as labels. Both come from one product.
    ///
    /// Image and text features are `[N, d]`, normalised by the caller; `scale` has one element, the inverse
    /// temperature (already exponentiated). The loss is f32 for half features, else of their dtype. Saves: its
    /// inputs and two numbers a row and column.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit, or there are no rows.
    #[track_caller]
    pub fn contrastive_loss(&self, text: &Tensor, scale: &Tensor) -> Result<Tensor> {
        const OP: &str = "contrastive_loss";
        let ([n, _], [m, _]) = check(OP, self, text)?;
        ensure!(n == m, OP, "needs as many images as texts, got {n} and {m}");
        loss(OP, self, text, scale, Labels { offset: 0, both: true })
    }

    /// [`contrastive_loss`](Self::contrastive_loss) over ranks: this rank's features `[n, d]` against the gathered
    /// ones `[N, d]`, whose rows from `offset` on are this rank's. The mean over ranks is the loss of the whole
    /// batch; gradients reach local and gathered features, as `gather_with_grad` with `local_loss` in open_clip.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit, or the labels `offset..offset + n` exceed the gathered rows.
    #[track_caller]
    pub fn contrastive_loss_gathered(
        &self,
        text: &Tensor,
        all_images: &Tensor,
        all_texts: &Tensor,
        scale: &Tensor,
        offset: usize,
    ) -> Result<Tensor> {
        let images = self.contrastive_cross_entropy(all_texts, scale, offset)?;
        let texts = text.contrastive_cross_entropy(all_images, scale, offset)?;
        images.add(&texts)?.mul_scalar(0.5)
    }

    /// One direction: the mean cross-entropy of the rows of `scale * self keysᵀ` with labels `offset + row`. With
    /// `scale` 1/T this is MoCo v3's loss before its factor 2T (MoCo v3, algorithm 1). If no gradient of the keys
    /// is wanted, the backward takes no product at all.
    ///
    /// `self [n, d]`, `keys [N, d]`, `scale` of one element.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit, or the labels `offset..offset + n` exceed the keys.
    #[track_caller]
    pub fn contrastive_cross_entropy(&self, keys: &Tensor, scale: &Tensor, offset: usize) -> Result<Tensor> {
        const OP: &str = "contrastive_cross_entropy";
        let ([n, _], [m, _]) = check(OP, self, keys)?;
        let fits = offset.checked_add(n).is_some_and(|end| end <= m);
        ensure!(fits, OP, "the labels {offset} + row of {n} rows exceed the {m} keys");
        loss(OP, self, keys, scale, Labels { offset, both: false })
    }

    /// InfoNCE against a queue (MoCo, algorithm 1): the mean over rows of the cross-entropy of
    /// `[q · positive | q · queue] / temperature` with label 0.
    ///
    /// `self [N, d]`, `positive [N, d]`, `queue [d, K]` as MoCo stores it; a queue `[K, d]` is handed in as
    /// `queue.t()`, which copies nothing. Gradients go to the queries and, if tracked, to the positives. The loss
    /// is f32 for half features.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit, the temperature is not positive, or the queue is tracked.
    #[track_caller]
    pub fn info_nce(&self, positive: &Tensor, queue: &Tensor, temperature: f64) -> Result<InfoNce> {
        const OP: &str = "info_nce";
        let ([n, d], [_, _]) = check(OP, self, positive)?;
        ensure!(
            positive.shape()[0] == n,
            OP,
            "needs one positive for each of {n} rows, got {:?}",
            positive.shape()
        );
        let [rows, _] = queue.dims::<2>(OP)?;
        ensure!(rows == d, OP, "needs a queue [{d}, K], got {:?}", queue.shape());
        let types = queue.dtype() == self.dtype();
        ensure!(types, OP, "queries are {}, the queue is {}; needs one dtype", self.dtype(), queue.dtype());
        let positive_number = temperature > 0.0 && temperature.is_finite();
        ensure!(positive_number, OP, "needs a positive temperature, got {temperature}");
        if queue.tracked() {
            return Err(Error::NoGradient { op: OP, input: "queue" });
        }
        let (q, positive, keys) = (operand(self)?, operand(positive)?, operand(&queue.t()?)?);
        let want = q.tracked() && is_grad_enabled();
        let saved = Saved {
            q: rows_of(&q)?,
            k: if keys.strides().contains(&1) { keys } else { keys.contiguous()? },
            scale: Tensor::full_on((), 1.0 / temperature, self.dtype().computed_in(), self.device())?,
            positive: Some(rows_of(&positive)?),
            labels: Labels { offset: 0, both: false },
        };
        let out = forward(OP, &saved, want, true)?;
        let rank = out.rank.ok_or_else(|| Error::msg("info_nce: no ranks were counted"))?;
        let loss = out.loss.record([&q, &positive], Queue { saved, rows: out.rows, mean: out.mean })?;
        Ok(InfoNce { loss, rank })
    }
}

/// Where the positives stand, and whether the columns are a second direction.
#[derive(Clone, Copy)]
struct Labels {
    /// Column of row 0's positive.
    offset: usize,
    both: bool,
}

/// The inputs of one call, untracked.
struct Saved {
    /// `[n, d]`, contiguous.
    q: Tensor,
    /// `[m, d]`, adjacent along one of the two.
    k: Tensor,
    scale: Tensor,
    /// Positives that stand apart from the keys, `[n, d]`, contiguous.
    positive: Option<Tensor>,
    labels: Labels,
}

/// What the backward needs of one direction: the log-sum-exp of the logits, the positive's included, and below it
/// the probability of everything but the positive, `[2, n]`. The kernels keep logarithms to base 2, and for rows
/// `q · positive` as well, `[3, n]`.
struct Side {
    state: Tensor,
}

struct Output {
    loss: Tensor,
    rows: Side,
    columns: Option<Side>,
    /// Keys averaged by the softmax without the positive, `[n, d]`.
    mean: Option<Tensor>,
    rank: Option<Tensor>,
}

/// `[n, d]` and `[m, d]`.
#[track_caller]
fn check(op: &'static str, q: &Tensor, k: &Tensor) -> Result<([usize; 2], [usize; 2])> {
    let (qs, ks) = (q.dims::<2>(op)?, k.dims::<2>(op)?);
    ensure!(qs[1] == ks[1], op, "needs features of one width, got shapes {qs:?} and {ks:?}");
    ensure!(qs[0] > 0, op, "needs at least one row, got shape {qs:?}");
    ensure!(q.dtype() == k.dtype(), op, "features are {} and {}; needs one dtype", q.dtype(), k.dtype());
    ensure!(q.dtype().is_float(), op, "needs float features, got {}", q.dtype());
    ensure!(q.device() == k.device(), op, "features are on {} and {}", q.device(), k.device());
    Ok((qs, ks))
}

/// Half types are computed in f32 by the CPU code; the kernels take them as they are.
fn operand(t: &Tensor) -> Result<Tensor> {
    #[cfg(gpu)]
    if crate::gpu::on_gpu(t) {
        return Ok(t.clone());
    }
    t.to_dtype(t.dtype().computed_in())
}

fn rows_of(t: &Tensor) -> Result<Tensor> {
    t.detach().contiguous()
}

#[track_caller]
fn loss(op: &'static str, q: &Tensor, k: &Tensor, scale: &Tensor, labels: Labels) -> Result<Tensor> {
    let single = scale.numel() == 1 && scale.dtype().is_float();
    ensure!(single, op, "needs a float scale of one element, got {} {:?}", scale.dtype(), scale.shape());
    let scale = scale.to_dtype(q.dtype().computed_in())?;
    let (q, k) = (operand(q)?, operand(k)?);
    let saved = Saved { q: rows_of(&q)?, k: rows_of(&k)?, scale: rows_of(&scale)?, positive: None, labels };
    // Where nothing asks for the keys' gradient, that of the queries is taken along as in attention.
    let along = !labels.both && !k.tracked() && (q.tracked() || scale.tracked()) && is_grad_enabled();
    let out = forward(op, &saved, along, false)?;
    let rule = Pairs { saved, rows: out.rows, columns: out.columns, mean: out.mean };
    out.loss.record([&q, &k, &scale], rule)
}

fn forward(op: &'static str, saved: &Saved, mean: bool, rank: bool) -> Result<Output> {
    on_device!(
        saved.q,
        op,
        for_real!(saved.q.dtype(), op, T => cpu::forward::<T>(saved, mean, rank)),
        gpu::forward(op, saved, rank)
    )
}

#[cfg(gpu)]
crate::gpu::upload_fields!(Side { state });
#[cfg(gpu)]
crate::gpu::upload_fields!(Output { loss, rows, columns, mean, rank });

struct Pairs {
    saved: Saved,
    rows: Side,
    columns: Option<Side>,
    mean: Option<Tensor>,
}

impl Backward for Pairs {
    const NAME: &'static str = "contrastive_loss";

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let saved = &self.saved;
        let needs = [0, 1, 2].map(|i| ctx.needs(i));
        let [dq, dk, ds] = on_device!(
            grad,
            Self::NAME,
            for_real!(grad.dtype(), Self::NAME, T => match &self.mean {
                Some(mean) => {
                    let needs = [needs[0], false, needs[2]];
                    let [dq, _, ds] = cpu::backward_mean::<T>(saved, &self.rows, mean, grad, needs)?;
                    Ok([dq, None, ds])
                }
                None => cpu::backward::<T>(saved, &self.rows, self.columns.as_ref(), grad, needs),
            }),
            gpu::backward(Self::NAME, saved, &self.rows, self.columns.as_ref(), grad, needs)
        )?;
        let ds = ds.map(|t| t.reshape(saved.scale.shape())).transpose()?;
        Ok(smallvec![dq, dk, ds])
    }
}

struct Queue {
    saved: Saved,
    rows: Side,
    /// Missing if no gradient of the queries was wanted.
    mean: Option<Tensor>,
}

impl Backward for Queue {
    const NAME: &'static str = "info_nce";

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let (saved, rows) = (&self.saved, &self.rows);
        // without a mean no gradient of the queries is wanted, on the CPU
        let mean = self.mean.as_ref().unwrap_or(&saved.q);
        let needs = [ctx.needs(0), ctx.needs(1), false];
        let [dq, dp, _] = on_device!(
            grad,
            Self::NAME,
            for_real!(grad.dtype(), Self::NAME, T => cpu::backward_mean::<T>(saved, rows, mean, grad, needs)),
            gpu::backward(Self::NAME, saved, rows, None, grad, needs)
        )?;
        Ok(smallvec![dq, dp])
    }
}

#[cfg(test)]
mod tests;
