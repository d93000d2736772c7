//! Attention with a mask on a GPU: composed of products, a sum and a softmax, with all logits in memory. Weights are
//! computed again in the backward.

use super::{OP, Plan, Saved};
use crate::{
    DType, Device, Error, Result, Tensor,
    cpu::elementwise::memory_order,
    gpu::elementwise::full,
    shape::{Dims, Strides},
};

/// Is it done this way? Where there are no keys, nothing remains to be done fast.
pub fn takes(plan: &Plan, mask: bool) -> bool {
    mask && plan.keys > 0 && plan.d * plan.dv > 0
}

fn logits(plan: &Plan, [q, k, _]: &[Tensor; 3], mask: &Tensor) -> Result<Tensor> {
    let logits = q.mul_scalar(plan.scale)?.matmul(&k.t()?)?;
    let logits = match mask.dtype() {
        DType::Bool => mask.where_cond(&logits, &nothing(&logits)?)?,
        _ => logits.add(&mask.detach())?,
    };
    match q.device() {
        Device::Cuda(index) if plan.causal => {
            let ones = full(OP, index, &[plan.queries, plan.keys], 1.0, DType::Bool)?;
            logits.masked_fill(&ones.triu(1)?, f64::NEG_INFINITY)
        }
        _ => Ok(logits),
    }
}

/// -infinity, written by a kernel: numbers of the host cannot be part of a recorded graph.
fn nothing(like: &Tensor) -> Result<Tensor> {
    match like.device() {
        Device::Cuda(index) => full(OP, index, &[], f64::NEG_INFINITY, like.dtype()),
        Device::Cpu => like.full_like(f64::NEG_INFINITY),
    }
}

/// The queries that may attend to nothing, `[.., Lq, 1]`, whose log-sum-exp is -infinity.
fn blind(lse: &Tensor) -> Result<Tensor> {
    lse.eq(&nothing(lse)?)?.unsqueeze(-1)
}

/// Output at these strides, and log-sum-exp.
pub fn forward(
    plan: &Plan,
    views: &[Tensor; 3],
    mask: Option<&Tensor>,
    shape: Dims,
    strides: Strides,
) -> Result<(Tensor, Tensor)> {
    let logits = logits(plan, views, given(mask)?)?;
    let lse = logits.logsumexp(-1)?;
    let weights = logits.softmax(-1)?.masked_fill(&blind(&lse)?, 0.0)?;
    let order = memory_order(&shape, &strides);
    let mut back = order.clone();
    order.iter().enumerate().for_each(|(place, &d)| back[d] = place);
    let out = weights.matmul(&views[2])?.permute(&order[..])?.contiguous()?.permute(&back[..])?;
    Ok((out, lse))
}

/// Gradients of queries, keys, values and mask.
pub fn backward(saved: &Saved, grad: &Tensor, needs: [bool; 4]) -> Result<[Option<Tensor>; 4]> {
    let (plan, [q, k, v]) = (&saved.plan, &saved.views);
    let lse = saved.lse.unsqueeze(-1)?.masked_fill(&blind(&saved.lse)?, 0.0)?;
    let weights = logits(plan, &saved.views, given(saved.mask.as_ref())?)?.sub(&lse)?.exp()?;
    let dv = if needs[2] { Some(weights.t()?.matmul(grad)?) } else { None };
    if !(needs[0] || needs[1] || needs[3]) {
        return Ok([None, None, dv, None]);
    }
    let own = grad.mul(&saved.out)?.sum_keepdim(-1)?;
    let ds = grad.matmul(&v.t()?)?.sub(&own)?.mul(&weights)?;
    let dq = if needs[0] { Some(ds.matmul(k)?.mul_scalar(plan.scale)?) } else { None };
    let dk = if needs[1] { Some(ds.t()?.matmul(q)?.mul_scalar(plan.scale)?) } else { None };
    Ok([dq, dk, dv, needs[3].then_some(ds)])
}

fn given(mask: Option<&Tensor>) -> Result<&Tensor> {
    mask.ok_or_else(|| Error::op(OP, "internal: the mask was lost"))
}
