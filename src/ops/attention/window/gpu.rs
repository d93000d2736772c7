//! Handing windows to the kernels (cuda/attention/window_*.cu).

use super::{OP, Plan, Saved, Slopes};
use crate::{
    DType, Result, Tensor,
    gpu::{self, sys},
    shape::{Dims, Strides},
};
use smallvec::smallvec;
use std::ptr::{null, null_mut};

/// Shared memory of a block, in bytes.
const SHARED: usize = 227 * 1024;

/// Do the kernels do this? Grids of two sizes, wide heads and very large tables go through the host.
pub fn takes(t: &Tensor, plan: &Plan) -> bool {
    let [h, w] = plan.q.window;
    let (width, size) = (plan.d.next_multiple_of(16), if t.dtype() == DType::F64 { 8 } else { 4 });
    // the tables' gradients (table.cuh) and a tile's terms (simt_backward.cuh) stand in shared memory
    let table = size * (width * (64 + 2 * (h + w)) + 64 * (h + w + 8));
    let width = if plan.d <= 32 {
        32
    } else if plan.d <= 64 {
        64
    } else {
        128
    };
    let side = if size == 8 { 32 } else { 64 };
    let tile = size * side * (4 * (width + 4) + side + 6 + 2 * (h + w));
    plan.q == plan.k
        && plan.d <= 128
        && h.max(w) <= 4096
        && table <= SHARED
        && (t.dtype().is_half() || tile <= SHARED)
}

fn image(plan: &Plan, t: &Tensor, parts: usize) -> Tensor {
    let [h, w] = plan.q.image;
    let token = parts * plan.heads * plan.d;
    let strides: Strides = [h * w * token, plan.d, w * token, token, 1].iter().map(|&n| n as isize).collect();
    t.view_as(smallvec![plan.batch, plan.heads, h, w, plan.d], strides, t.offset(), OP)
}

fn given(on: bool, view: &sys::smalti_view) -> *const sys::smalti_view {
    if on { view } else { null() }
}

pub fn forward(
    plan: &Plan,
    [q, k, v]: &[Tensor; 3],
    tables: Option<&[Tensor; 2]>,
    bias: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let [h, w] = plan.q.image;
    let out = image(plan, &gpu::empty(q, &[plan.batch, h, w, plan.heads, plan.d], q.dtype(), OP)?, 1);
    let lse = gpu::empty(q, &[plan.batch, plan.heads, h, w], q.dtype().computed_in(), OP)?;
    // a view that is not there is never read
    let [rel_h, rel_w] = tables.map_or([q, q], |t| t.each_ref());
    let tensors = [q, k, v, bias.unwrap_or(q), rel_h, rel_w, &out, &lse];
    gpu::launch(OP, tensors, |[q, k, v, b, rh, rw, o, l], stream| unsafe {
        let [b, rh, rw] =
            [given(bias.is_some(), &b), given(tables.is_some(), &rh), given(tables.is_some(), &rw)];
        let [wh, ww] = plan.q.window.map(|n| n as i64);
        sys::smalti_window_attention_forward(&q, &k, &v, b, rh, rw, &o, &l, wh, ww, plan.scale, stream)
    })?;
    Ok((out, lse))
}

pub fn backward(saved: &Saved, grad: &Tensor, packed: bool) -> Result<Slopes> {
    let (plan, [q, k, v]) = (&saved.plan, &saved.views);
    let ([h, w], sums) = (plan.q.image, q.dtype().computed_in());
    let shape = |parts: &[usize]| -> Dims {
        [plan.batch, h, w].iter().chain(parts).chain(&[plan.heads, plan.d]).copied().collect()
    };
    let made = match packed {
        true => vec![gpu::empty(q, &shape(&[3]), q.dtype(), OP)?],
        false => (0..3).map(|_| gpu::empty(q, &shape(&[]), q.dtype(), OP)).collect::<Result<_>>()?,
    };
    let slope = |i: usize| match packed {
        true => {
            let all = image(plan, &made[0], 3);
            let offset = all.offset() + i * plan.heads * plan.d;
            all.view_as(all.shape().into(), all.strides().into(), offset, OP)
        }
        false => image(plan, &made[i], 1),
    };
    let sum_like = |t: &Tensor| gpu::empty(q, t.shape(), sums, OP);
    let bias = saved.bias.as_ref().map(sum_like).transpose()?;
    let tables = match &saved.tables {
        Some([h, w]) => Some([sum_like(h)?, sum_like(w)?]),
        None => None,
    };
    let (has_bias, has_tables) = (bias.is_some(), tables.is_some());
    let mut bytes = 0;
    gpu::launch(OP, [q], |[q], _| unsafe {
        let [wh, ww] = plan.q.window.map(|n| n as i64);
        bytes = sys::smalti_window_attention_workspace(&q, has_bias as i32, has_tables as i32, wh, ww);
        0
    })?;
    let bytes = usize::try_from(bytes).unwrap_or_default();
    let workspace = gpu::empty(q, &[bytes], DType::U8, OP)?;
    let [rel_h, rel_w] = saved.tables.as_ref().map_or([q, q], |t| t.each_ref());
    let [grad_h, grad_w] = tables.as_ref().map_or([q, q], |t| t.each_ref());
    let (dq, dk, dv) = (slope(0), slope(1), slope(2));
    let tensors = [
        q,
        k,
        v,
        saved.bias.as_ref().unwrap_or(q),
        rel_h,
        rel_w,
        &saved.out,
        grad,
        &saved.lse,
        &workspace,
        &dq,
        &dk,
        &dv,
        bias.as_ref().unwrap_or(q),
        grad_h,
        grad_w,
    ];
    gpu::launch(OP, tensors, |[q, k, v, b, rh, rw, o, g, l, work, dq, dk, dv, db, dh, dw], stream| unsafe {
        let [b, db] = [given(has_bias, &b), given(has_bias, &db)];
        let [rh, rw, dh, dw] = [&rh, &rw, &dh, &dw].map(|t| given(has_tables, t));
        let [wh, ww] = plan.q.window.map(|n| n as i64);
        let work = if bytes == 0 { null_mut() } else { work.ptr };
        sys::smalti_window_attention_backward(
            &q, &k, &v, b, rh, rw, &o, &g, &l, work, &dq, &dk, &dv, db, dh, dw, wh, ww, plan.scale, stream,
        )
    })?;
    Ok(Slopes { qkv: made, tables, bias })
}
