//! Handing attention to the kernels (cuda/attention/forward.cu, backward.cu).

use super::{OP, Plan, Saved};
use crate::{
    Result, Tensor,
    gpu::{self, sys},
    shape::{Dims, Strides, count},
};
use smallvec::smallvec;

/// Do the kernels do this? Wide heads and no keys at all go through the host; for masks see `masked`.
pub fn takes(plan: &Plan, mask: bool) -> bool {
    !mask && plan.d.max(plan.dv) <= 128 && plan.keys > 0 && plan.d * plan.dv > 0
}

/// As the kernels count: `[B, H, L, n]`, the leading dimensions but the last in one, which must be possible.
fn four(plan: &Plan, t: &Tensor) -> Result<Tensor> {
    let (rank, lead) = (t.rank(), plan.lead.len());
    let [rows, columns] = [t.shape()[rank - 2], t.shape()[rank - 1]];
    let heads = if lead > 0 { plan.lead[lead - 1] } else { 1 };
    let batch = plan.heads / heads.max(1);
    let head_step = if lead > 0 { t.strides()[lead - 1] } else { 0 };
    // several leading dimensions must step as one
    let mut batch_step = if lead > 1 { t.strides()[lead - 2] } else { 0 };
    let mut inner = 1;
    for i in (0..lead.saturating_sub(1)).rev() {
        if plan.lead[i] > 1 && inner > 1 && t.strides()[i] != batch_step * inner as isize {
            return four(plan, &t.contiguous()?);
        }
        if plan.lead[i] > 1 && inner == 1 {
            batch_step = t.strides()[i];
        }
        inner *= plan.lead[i];
    }
    let strides: Strides = smallvec![batch_step, head_step, t.strides()[rank - 2], 1];
    Ok(t.view_as(smallvec![batch, heads, rows, columns], strides, t.offset(), OP))
}

/// Output at these strides, and log-sum-exp.
pub fn forward(
    plan: &Plan,
    [q, k, v]: &[Tensor; 3],
    shape: Dims,
    strides: Strides,
    op: &'static str,
) -> Result<(Tensor, Tensor)> {
    let out = gpu::empty_strided(q, &shape, strides, q.dtype(), op)?;
    let rows: Dims = plan.lead.iter().copied().chain([plan.queries]).collect();
    let lse = gpu::empty(q, &rows, q.dtype().computed_in(), op)?;
    if count(&rows) > 0 {
        let views = [four(plan, q)?, four(plan, k)?, four(plan, v)?, four(plan, &out)?, per_row(plan, &lse)];
        gpu::launch(op, views.each_ref(), |[q, k, v, o, l], stream| unsafe {
            let causal = plan.causal as i32;
            sys::smalti_attention_forward(&q, &k, &v, &o, &l, plan.scale, causal, stream)
        })?;
    }
    Ok((out, lse))
}

fn per_row(plan: &Plan, t: &Tensor) -> Tensor {
    let heads = plan.lead.last().copied().unwrap_or(1);
    let batch = plan.heads / heads.max(1);
    let shape: Dims = smallvec![batch, heads, plan.queries];
    let strides = crate::shape::contiguous_strides(&shape);
    t.view_as(shape, strides, t.offset(), OP)
}

/// Gradients of queries, keys and values into tensors that are like them.
pub fn backward(saved: &Saved, grad: &Tensor, slopes: [&Tensor; 3], op: &'static str) -> Result<()> {
    let plan = &saved.plan;
    let [q, k, v] = &saved.views;
    let lse = per_row(plan, &saved.lse);
    let rows: Dims = [2].iter().chain(lse.shape()).copied().collect();
    let delta = gpu::empty(q, &rows, lse.dtype(), op)?;
    let (q, k, v) = (four(plan, q)?, four(plan, k)?, four(plan, v)?);
    let (out, grad) = (four(plan, &saved.out)?, four(plan, grad)?);
    let [dq, dk, dv] = slopes.map(|t| four(plan, t));
    let (dq, dk, dv) = (dq?, dk?, dv?);
    let tensors = [&q, &k, &v, &out, &grad, &lse, &delta, &dq, &dk, &dv];
    gpu::launch(op, tensors, |[q, k, v, o, g, l, d, dq, dk, dv], stream| unsafe {
        let causal = plan.causal as i32;
        sys::smalti_attention_backward(&q, &k, &v, &o, &g, &l, &d, &dq, &dk, &dv, plan.scale, causal, stream)
    })
}
