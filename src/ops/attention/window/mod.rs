//! Attention within windows of an image, or over all of it, with decomposed relative positions: Li et al., ECCV
//! 2022, "Exploring Plain Vision Transformer Backbones for Object Detection", arXiv:2203.16527, after Li et al.,
//! CVPR 2022, "MViTv2", arXiv:2112.01526, equation 4 (facebookresearch/detectron2, `modeling/backbone/utils.py`).
//!
//! Windows are read and written in place. What stands in memory at one time is a block of queries against one
//! window; the backward computes it again.

mod cpu;

use super::cpu::Number;
use crate::{
    DType, InterpolateOptions, Interpolation, OutputSize, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_real, on_device,
    shape::{Dims, contiguous_strides},
};
use smallvec::smallvec;
use std::sync::Arc;

const OP: &str = "window_attention";

impl Tensor {
    /// Self-attention over an image of tokens: the packed projection `[B, H, W, 3, heads, D]` (queries, keys,
    /// values) to `[B, H, W, heads * D]`, within windows of `window` x `window` tokens, or over all if `None`.
    ///
    /// `rel_pos`: tables for rows and columns, `[2 * size - 1, D]` for windows (or images) of that size, shared by
    /// all heads; a table of another length is interpolated. They add `q . rows[y - ky + size - 1] +
    /// q . columns[x - kx + size - 1]` to `scale * q . k`, with q unscaled. Where windows do not divide the image,
    /// the tokens beyond are keys like any other, made of `qkv_bias` (3 * heads * D elements; zeros if not given):
    /// what a projection gives for a token of zeros. Its gradient is that of those tokens alone.
    /// `scale` is 1/sqrt(D) if not given. Saves: its inputs, output and log-sum-exp.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit together.
    #[track_caller]
    pub fn window_attention(
        &self,
        window: Option<usize>,
        rel_pos: Option<(&Tensor, &Tensor)>,
        qkv_bias: Option<&Tensor>,
        scale: Option<f64>,
    ) -> Result<Tensor> {
        let [b, h, w, three, heads, d] = self.dims(OP)?;
        ensure!(three == 3, OP, "needs shape [B, H, W, 3, heads, D], got {:?}", self.shape());
        ensure!(window != Some(0), OP, "a window of no tokens");
        ensure!(self.dtype().is_float(), OP, "needs floats, got {}", self.dtype());
        let side = Side { image: [h, w], window: window.map_or([h, w], |size| [size, size]) };
        let plan = Plan::new(b, heads, [side, side], d, scale)?;
        let tables = rel_pos.map(|t| tables(t, plan.table_rows(), d)).transpose()?;
        let bias = qkv_bias.map(|bias| {
            ensure!(
                bias.numel() == 3 * heads * d,
                OP,
                "the qkv bias has shape {:?}, {heads} heads of {d} need {} elements",
                bias.shape(),
                3 * heads * d
            );
            bias.reshape([3, heads, d])
        });
        let bias = bias.transpose()?;
        let dtype = self.dtype();
        let compute = compute_dtype(self, &plan);
        let inputs = Inputs { first: self.to_dtype(compute)?, none: self.detach(), tables, bias };
        let flat = inputs.first.detach().contiguous()?;
        let part = |i: usize| {
            let [s0, s1, s2, _, s4, _] = [0, 1, 2, 3, 4, 5].map(|a| flat.strides()[a]);
            let offset = flat.offset() + i * heads * d;
            flat.view_as(smallvec![b, heads, h, w, d], smallvec![s0, s4, s1, s2, 1], offset, OP)
        };
        let saved = forward(plan, [0, 1, 2].map(part), &inputs)?;
        let out = saved.out.view_as(
            smallvec![b, h, w, heads * d],
            contiguous_strides(&[b, h, w, heads * d]),
            saved.out.offset(),
            OP,
        );
        out.record(inputs.edges([]), Packed(saved))?.to_dtype(dtype)
    }

    /// The core of [`window_attention`](Self::window_attention): queries `[N, Hq * Wq, D]` on one grid against
    /// keys and values `[N, Hk * Wk, D]` on another, grids as `[rows, columns]`. Tables have
    /// `2 * max(Hq, Hk) - 1` and `2 * max(Wq, Wk) - 1` rows, or are interpolated to that. Returns the output
    /// `[N, Hq * Wq, D]` and the log-sum-exp of each row of logits `[N, Hq * Wq]`, untracked and f32 for half types.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit together.
    #[track_caller]
    pub fn relative_attention(
        &self,
        key: &Tensor,
        value: &Tensor,
        rel_pos: (&Tensor, &Tensor),
        query_grid: [usize; 2],
        key_grid: [usize; 2],
        scale: Option<f64>,
    ) -> Result<(Tensor, Tensor)> {
        const OP: &str = "relative_attention";
        let [n, lq, d] = self.dims(OP)?;
        let [rows, columns] = [query_grid, key_grid].map(|g| g[0] * g[1]);
        let fits = lq == rows && key.shape() == [n, columns, d] && value.shape() == key.shape();
        ensure!(
            fits,
            OP,
            "needs queries [N, Lq, D] on a grid {query_grid:?}, keys and values [N, Lk, D] on {key_grid:?}, got {:?}, {:?}, {:?}",
            self.shape(),
            key.shape(),
            value.shape()
        );
        let dtype = self.dtype();
        ensure!(
            dtype.is_float() && key.dtype() == dtype && value.dtype() == dtype,
            OP,
            "needs floats of one dtype, got query {dtype}, key {}, value {}",
            key.dtype(),
            value.dtype()
        );
        let sides = [query_grid, key_grid].map(|grid| Side { image: grid, window: grid });
        let plan = Plan::new(n, 1, sides, d, scale)?;
        let tables = tables(rel_pos, plan.table_rows(), d)?;
        let compute = compute_dtype(self, &plan);
        let (q, k, v) = (self.to_dtype(compute)?, key.to_dtype(compute)?, value.to_dtype(compute)?);
        let inputs = Inputs { first: q.clone(), none: q.detach(), tables: Some(tables), bias: None };
        let views = [(&q, query_grid), (&k, key_grid), (&v, key_grid)].map(|(t, [y, x])| {
            let t = t.detach().contiguous()?;
            let shape: Dims = smallvec![n, 1, y, x, d];
            let strides = contiguous_strides(&shape);
            Ok(t.view_as(shape, strides, t.offset(), OP))
        });
        let [vq, vk, vv] = views;
        let saved = forward(plan, [vq?, vk?, vv?], &inputs)?;
        let flat = |t: &Tensor, shape: Dims| {
            let strides = contiguous_strides(&shape);
            t.view_as(shape, strides, t.offset(), OP)
        };
        let (out, lse) = (flat(&saved.out, smallvec![n, lq, d]), flat(&saved.lse, smallvec![n, lq]));
        Ok((out.record(inputs.edges([&k, &v]), Separate(saved))?.to_dtype(dtype)?, lse))
    }
}

/// The dtype that is computed in: the tensor's own where a kernel takes it.
fn compute_dtype(t: &Tensor, plan: &Plan) -> DType {
    let _ = plan;
    #[cfg(gpu)]
    if crate::gpu::on_gpu(t) && gpu::takes(t, plan) {
        return t.dtype();
    }
    t.dtype().computed_in()
}

/// Both tables at the lengths that the grids need.
#[track_caller]
fn tables((h, w): (&Tensor, &Tensor), rows: [usize; 2], d: usize) -> Result<[Tensor; 2]> {
    let [h, w] = [(h, rows[0]), (w, rows[1])].map(|(t, n)| {
        let fits = t.rank() == 2 && t.shape()[1] == d && t.shape()[0] > 0;
        ensure!(fits, OP, "a relative position table of shape {:?}, needs [{n}, {d}]", t.shape());
        resized(t, n)
    });
    Ok([h?, w?])
}

/// A table `[L, D]` at length `n`: linear along the length, half-pixel centres, clamped at the ends.
fn resized(table: &Tensor, n: usize) -> Result<Tensor> {
    let [l, d] = table.dims(OP)?;
    if l == n {
        return Ok(table.clone());
    }
    let linear = InterpolateOptions { mode: Interpolation::Bilinear, ..Default::default() };
    let image = table.t()?.reshape([1, d, l, 1])?;
    image.interpolate(OutputSize::Pixels([n, 1]), &linear)?.reshape([d, n])?.t()
}

/// Queries or keys: the image and its windows, in tokens, rows first.
#[derive(Clone, Copy, PartialEq)]
struct Side {
    image: [usize; 2],
    window: [usize; 2],
}

/// Sizes and settings of one call.
#[derive(Clone)]
struct Plan {
    batch: usize,
    heads: usize,
    q: Side,
    k: Side,
    windows: [usize; 2],
    d: usize,
    scale: f64,
    /// For each axis the table row of (query, key), `query * keys + key`.
    index: [Arc<Vec<usize>>; 2],
}

impl Plan {
    #[track_caller]
    fn new(batch: usize, heads: usize, [q, k]: [Side; 2], d: usize, scale: Option<f64>) -> Result<Plan> {
        let tokens = [q, k].iter().all(|s| s.image[0] * s.image[1] > 0);
        ensure!(tokens && d > 0, OP, "no tokens: {:?} queries, {:?} keys of {d}", q.image, k.image);
        let index = [0, 1].map(|axis| Arc::new(index(q.window[axis], k.window[axis])));
        let windows = [0, 1].map(|axis| q.image[axis].div_ceil(q.window[axis]));
        let scale = scale.unwrap_or(1.0 / (d as f64).sqrt());
        Ok(Plan { batch, heads, q, k, windows, d, scale, index })
    }

    fn table_rows(&self) -> [usize; 2] {
        [0, 1].map(|axis| 2 * self.q.window[axis].max(self.k.window[axis]) - 1)
    }
}

/// Grids of different sizes are laid over each other: the finer one counts, and positions between are truncated, in
/// f32 as in the official code.
fn index(queries: usize, keys: usize) -> Vec<usize> {
    let (nq, nk) = (queries as f32, keys as f32);
    let (fq, fk) = ((nk / nq).max(1.0), (nq / nk).max(1.0));
    let at = |q: usize, k: usize| (q as f32 * fq - k as f32 * fk) + (nk - 1.0) * fk;
    (0..queries).flat_map(|q| (0..keys).map(move |k| at(q, k) as usize)).collect()
}

/// The tracked inputs. Tables and bias in their own dtype: a gradient that was summed in f32 stays so for f32 masters.
struct Inputs {
    /// The packed projection or the queries, in the dtype that is computed in.
    first: Tensor,
    tables: Option<[Tensor; 2]>,
    bias: Option<Tensor>,
    /// An untracked tensor stands for an input that is not there.
    none: Tensor,
}

impl Inputs {
    /// What `record` gets: the packed projection or queries, tables, bias, then keys and values if apart.
    fn edges<'a, const N: usize>(&'a self, apart: [&'a Tensor; N]) -> Vec<&'a Tensor> {
        let [h, w] = match &self.tables {
            Some([h, w]) => [h, w],
            None => [&self.none; 2],
        };
        [&self.first, h, w, self.bias.as_ref().unwrap_or(&self.none)].into_iter().chain(apart).collect()
    }
}

struct Saved {
    plan: Plan,
    /// Queries, keys, values `[B, heads, H, W, D]`, last axis adjacent.
    views: [Tensor; 3],
    tables: Option<[Tensor; 2]>,
    bias: Option<Tensor>,
    /// Of both tables and the bias as they were given.
    dtypes: [DType; 3],
    /// `[B, heads, H, W, D]`, stored as `[B, H, W, heads, D]`.
    out: Tensor,
    /// `[B, heads, H, W]`
    lse: Tensor,
}

fn forward(plan: Plan, views: [Tensor; 3], inputs: &Inputs) -> Result<Saved> {
    let dtype = views[0].dtype();
    let plain = |t: &Tensor| t.detach().to_dtype(dtype)?.contiguous();
    let tables = match &inputs.tables {
        Some([h, w]) => Some([plain(h)?, plain(w)?]),
        None => None,
    };
    let bias = inputs.bias.as_ref().map(plain).transpose()?;
    let given =
        [inputs.tables.as_ref().map(|t| &t[0]), inputs.tables.as_ref().map(|t| &t[1]), inputs.bias.as_ref()];
    let dtypes = given.map(|t| t.map_or(dtype, Tensor::dtype));
    let (out, lse) = on_device!(
        views[0],
        OP,
        for_real!(views[0].dtype(), OP, T => Ok(cpu::forward::<T>(&plan, &views, tables.as_ref(), bias.as_ref()))),
        gpu::forward(&plan, &views, tables.as_ref(), bias.as_ref()),
        when gpu::takes(&views[0], &plan)
    )?;
    Ok(Saved { plan, views, tables, bias, dtypes, out, lse })
}

/// Gradients of a call: queries, keys and values side by side or apart, tables, bias.
struct Slopes {
    qkv: Vec<Tensor>,
    tables: Option<[Tensor; 2]>,
    bias: Option<Tensor>,
}
#[cfg(gpu)]
crate::gpu::upload_fields!(Slopes { qkv, tables, bias });

/// `grad` has the shape of `saved.out`. With P the weights and dP = dO V^T:
/// dV = P^T dO, dS = P * (dP - rowsum(dO * O)), dQ = scale dS K + sums of dS over columns and rows times the tables,
/// dK = scale dS^T Q, and each table row gathers those sums times the queries.
fn backward(saved: &Saved, grad: &Tensor, packed: bool) -> Result<Slopes> {
    on_device!(
        grad,
        OP,
        for_real!(grad.dtype(), OP, T => Ok(cpu::backward::<T>(saved, grad, packed))),
        gpu::backward(saved, grad, packed),
        when gpu::takes(&saved.views[0], &saved.plan)
    )
}

/// A gradient `[B, Hq, Wq, heads, D]` in memory, as `[B, heads, Hq, Wq, D]`.
fn spread(saved: &Saved, grad: &Tensor) -> Result<Tensor> {
    let (plan, [h, w]) = (&saved.plan, saved.plan.q.image);
    grad.reshape([plan.batch, h, w, plan.heads, plan.d])?.contiguous()?.permute([0, 3, 1, 2, 4])
}

impl Slopes {
    /// Those of both tables and the bias, in the dtypes of these.
    fn others(&mut self, saved: &Saved) -> Result<[Option<Tensor>; 3]> {
        let [h, w] = match self.tables.take() {
            Some([h, w]) => [Some(h), Some(w)],
            None => [None, None],
        };
        let [a, b, c] = saved.dtypes;
        let cast = |t: Option<Tensor>, dtype: DType| t.map(|t| t.to_dtype(dtype)).transpose();
        Ok([cast(h, a)?, cast(w, b)?, cast(self.bias.take(), c)?])
    }
}

/// One gradient `[B, H, W, 3, heads, D]`.
struct Packed(Saved);
impl Backward for Packed {
    const NAME: &'static str = OP;

    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let mut slopes = backward(&self.0, &spread(&self.0, grad)?, true)?;
        let [h, w, bias] = slopes.others(&self.0)?;
        Ok(smallvec![slopes.qkv.pop(), h, w, bias])
    }
}

/// Gradients of queries, keys and values apart.
struct Separate(Saved);
impl Backward for Separate {
    const NAME: &'static str = "relative_attention";

    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let mut slopes = backward(&self.0, &spread(&self.0, grad)?, false)?;
        let [h, w, bias] = slopes.others(&self.0)?;
        let plan = &self.0.plan;
        let mut next = |side: Side| {
            let [y, x] = side.image;
            slopes.qkv.pop().map(|t| t.reshape([plan.batch, y * x, plan.d])).transpose()
        };
        let (dv, dk, dq) = (next(plan.k)?, next(plan.k)?, next(plan.q)?);
        Ok([dq, h, w, bias, dk, dv].into_iter().collect())
    }
}

#[cfg(gpu)]
mod gpu;

#[cfg(test)]
mod tests;
