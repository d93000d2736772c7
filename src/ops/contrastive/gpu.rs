//! Launching the kernels of cuda/contrastive_*.cu.

use super::{Output, Saved, Side};
use crate::{
    DType, Result, Tensor,
    gpu::{self, sys},
};
use std::{ffi::c_void, ptr::null_mut};

/// Queries, keys, positives (or any tensor) and scale as one call.
fn call(saved: &Saved, [q, k, mut positive, scale]: [sys::smalti_view; 4]) -> sys::smalti_contrastive {
    if saved.positive.is_none() {
        positive.ptr = null_mut();
    }
    let labels = saved.labels;
    let (offset, both) = (labels.offset as i64, labels.both as i32);
    sys::smalti_contrastive { q, k, positive, scale: scale.ptr, offset, budget: 0, both }
}

fn operands(saved: &Saved) -> [&Tensor; 4] {
    [&saved.q, &saved.k, saved.positive.as_ref().unwrap_or(&saved.q), &saved.scale]
}

#[track_caller]
fn workspace(
    op: &'static str,
    saved: &Saved,
    size: impl FnOnce(&sys::smalti_contrastive) -> i64,
) -> Result<(Tensor, i64)> {
    let mut bytes = -1;
    gpu::launch(op, operands(saved), |views, _| {
        bytes = size(&call(saved, views));
        i32::from(bytes < 0)
    })?;
    Ok((gpu::empty(&saved.q, &[bytes as usize], DType::U8, op)?, bytes))
}

#[track_caller]
pub fn forward(op: &'static str, saved: &Saved, rank: bool) -> Result<Output> {
    let (q, [n, m]) = (&saved.q, [saved.q.shape()[0], saved.k.shape()[0]]);
    let compute = q.dtype().computed_in();
    let loss = gpu::empty(q, &[], compute, op)?;
    let rows = gpu::empty(q, &[3, n], compute, op)?;
    let columns = if saved.labels.both { Some(gpu::empty(q, &[2, m], compute, op)?) } else { None };
    let rank = if rank { Some(gpu::empty(q, &[n], DType::I64, op)?) } else { None };
    let (space, bytes) = workspace(op, saved, |c| unsafe { sys::smalti_contrastive_forward_workspace(c) })?;
    let (to, ranks) = (columns.as_ref().unwrap_or(&loss), rank.as_ref().unwrap_or(&loss));
    let [a, b, c, d] = operands(saved);
    gpu::launch(
        op,
        [a, b, c, d, &loss, &rows, to, ranks, &space],
        |[a, b, c, d, l, r, t, k, s], stream| unsafe {
            let ranks = if rank.is_some() { k.ptr.cast() } else { null_mut() };
            let columns = if columns.is_some() { t.ptr } else { null_mut() };
            let call = call(saved, [a, b, c, d]);
            sys::smalti_contrastive_forward(&call, l.ptr, r.ptr, columns, ranks, s.ptr, bytes, stream)
        },
    )?;
    Ok(Output {
        loss,
        rows: Side { state: rows },
        columns: columns.map(|state| Side { state }),
        mean: None,
        rank,
    })
}

/// Gradients of queries, of keys or separate positives, and of the scale, those that are needed.
#[track_caller]
pub fn backward(
    op: &'static str,
    saved: &Saved,
    rows: &Side,
    columns: Option<&Side>,
    grad: &Tensor,
    needs: [bool; 3],
) -> Result<[Option<Tensor>; 3]> {
    let (q, apart) = (&saved.q, saved.positive.as_ref());
    let grad = grad.contiguous()?;
    let like = [q, apart.unwrap_or(&saved.k), &saved.scale];
    let mut out = [None, None, None];
    for i in 0..3 {
        if needs[i] {
            out[i] = Some(gpu::empty(q, like[i].shape(), like[i].dtype(), op)?);
        }
    }
    let with_dk = needs[1] && apart.is_none();
    let size = |c: &_| unsafe { sys::smalti_contrastive_backward_workspace(c, with_dk as i32) };
    let (space, bytes) = workspace(op, saved, size)?;
    let [a, b, c, d] = operands(saved);
    let [x, y, z] = out.each_ref().map(|t| t.as_ref().unwrap_or(&grad));
    let to = columns.map_or(&rows.state, |side| &side.state);
    gpu::launch(op, [a, b, c, d, &rows.state, to, &grad, x, y, z, &space], |views, stream| unsafe {
        let [a, b, c, d, r, t, g, x, y, z, s] = views;
        let call = call(saved, [a, b, c, d]);
        let columns = if columns.is_some() { t.ptr } else { null_mut() };
        let given =
            |i: usize, v: sys::smalti_view| -> *mut c_void { if needs[i] { v.ptr } else { null_mut() } };
        let (dq, second, ds) = (given(0, x), given(1, y), given(2, z));
        let (dk, dp) = if apart.is_some() { (null_mut(), second) } else { (second, null_mut()) };
        sys::smalti_contrastive_backward(&call, r.ptr, columns, g.ptr, dq, dk, dp, ds, s.ptr, bytes, stream)
    })?;
    Ok(out)
}
