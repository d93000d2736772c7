//! Attention without the matrix of weights: a block of queries meets all keys in a workspace that stays in the
//! cache, and the backward computes the block again from the log-sum-exp of its rows (Dao et al., 2022,
//! "FlashAttention", arXiv:2205.14135).

mod cpu;
#[cfg(gpu)]
mod gpu;
#[cfg(gpu)]
mod masked;
mod window;

use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    bail, ensure, for_real, on_device,
    shape::{Dims, Strides, broadcast, contiguous_strides, count},
};
use smallvec::smallvec;

impl Tensor {
    /// `softmax(scale * q k^T + mask) v` for queries `[.., Lq, D]`, keys `[.., Lk, D]` and values `[.., Lk, Dv]`;
    /// leading dimensions broadcast. Returns `[.., Lq, Dv]`, in the memory order of the queries, and the
    /// log-sum-exp of each row of logits, `[.., Lq]`, untracked and f32 for half types.
    ///
    /// `mask` broadcasts to `[.., Lq, Lk]`: boolean (true = may attend) or float (added to the scaled logits;
    /// its gradient takes the memory of all logits, and so does any mask on a GPU). `causal`: query i sees keys 0..=i. `scale` is 1/sqrt(D)
    /// if not given. A query that may attend to nothing gives zeros and sends no gradient.
    /// Saves: inputs, output and log-sum-exp.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit together.
    #[track_caller]
    pub fn scaled_dot_product_attention(
        &self,
        key: &Tensor,
        value: &Tensor,
        mask: Option<&Tensor>,
        causal: bool,
        scale: Option<f64>,
    ) -> Result<(Tensor, Tensor)> {
        let dtype = self.dtype();
        ensure!(
            dtype.is_float() && key.dtype() == dtype && value.dtype() == dtype,
            OP,
            "needs floats of one dtype, got query {dtype}, key {}, value {}",
            key.dtype(),
            value.dtype()
        );
        let plan = Plan::of(self, key, value, causal, scale)?;
        let wide = compute_dtype(self, &plan, mask.is_some());
        let [q, k, v] = [self, key, value].map(|t| t.to_dtype(wide));
        let inputs = [q?, k?, v?];
        let [q, k, v] = &inputs;
        let mask = mask.map(|m| plan.mask(m, wide)).transpose()?;
        let views = [plan.view(q)?, plan.view(k)?, plan.view(v)?];
        let (shape, strides) = plan.output(&views[0]);
        let (out, lse) = on_device!(
            q,
            OP,
            for_real!(wide, OP, T => cpu::forward::<T>(&plan, &views, mask.as_ref(), shape, strides)),
            if mask.is_some() {
                masked::forward(&plan, &views, mask.as_ref(), shape, strides)
            } else {
                gpu::forward(&plan, &views, shape, strides, OP)
            },
            when gpu::takes(&plan, mask.is_some()) || masked::takes(&plan, mask.is_some())
        )?;
        // An untracked tensor stands for a mask that is not there.
        let mask_input = mask.clone().unwrap_or_else(|| lse.clone());
        let mask = mask.map(|m| m.detach());
        let saved = Saved { plan, views, mask, out: out.clone(), lse: lse.clone() };
        let out = out.record([q, k, v, &mask_input], Attention(saved))?;
        Ok((out.to_dtype(dtype)?, lse))
    }

    /// Self-attention of all heads from one packed projection: `[B, S, 3, H, D]` (queries, keys, values) to
    /// `[B, S, H * D]`. Reads and writes the packed layout in place. `scale` is 1/sqrt(D) if not given.
    /// Saves: its input, output and log-sum-exp.
    ///
    /// # Errors
    /// If the shape is another, or the dtype is not a float.
    #[track_caller]
    pub fn attention(&self, causal: bool, scale: Option<f64>) -> Result<Tensor> {
        let [b, s, three, h, d] = self.dims("attention")?;
        ensure!(three == 3, "attention", "needs shape [B, S, 3, H, D], got {:?}", self.shape());
        let dtype = self.dtype();
        let plan = {
            let [q, k, v] = unpack(self);
            Plan::of(&q, &k, &v, causal, scale)?
        };
        let qkv = self.to_dtype(compute_dtype(self, &plan, false))?;
        let views = unpack(&qkv.detach().contiguous()?);
        let shape: Dims = smallvec![b, h, s, d];
        let strides: Strides = smallvec![(s * h * d) as isize, d as isize, (h * d) as isize, 1];
        let (heads, lse) = on_device!(
            qkv,
            "attention",
            for_real!(qkv.dtype(), "attention", T => cpu::forward::<T>(&plan, &views, None, shape, strides)),
            gpu::forward(&plan, &views, shape, strides, "attention"),
            when gpu::takes(&plan, false)
        )?;
        let (flat, steps) = (smallvec![b, s, h * d], contiguous_strides(&[b, s, h * d]));
        let out = heads.view_as(flat, steps, 0, "attention");
        out.record([&qkv], Packed(Saved { plan, views, mask: None, out: heads, lse }))?.to_dtype(dtype)
    }
}

const OP: &str = "scaled_dot_product_attention";

/// The dtype that is computed in: the tensor's own where a kernel takes it.
fn compute_dtype(t: &Tensor, plan: &Plan, mask: bool) -> DType {
    let _ = (plan, mask);
    #[cfg(gpu)]
    if crate::gpu::on_gpu(t) && gpu::takes(plan, mask) {
        return t.dtype();
    }
    t.dtype().computed_in()
}

/// Queries, keys and values `[B, H, S, D]` as views of a packed `[B, S, 3, H, D]`.
fn unpack(qkv: &Tensor) -> [Tensor; 3] {
    let (n, step) = (qkv.shape(), qkv.strides());
    [0, 1, 2].map(|part| {
        let offset = qkv.offset() + part * n[3] * n[4];
        qkv.view_as(
            smallvec![n[0], n[3], n[1], n[4]],
            smallvec![step[0], step[3], step[1], step[4]],
            offset,
            "attention",
        )
    })
}

/// Sizes and settings of one call.
struct Plan {
    /// Leading dimensions, and how many matrices they make.
    lead: Dims,
    heads: usize,
    queries: usize,
    keys: usize,
    /// Elements of a query or key, and of a value.
    d: usize,
    dv: usize,
    scale: f64,
    causal: bool,
}

impl Plan {
    #[track_caller]
    fn of(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool, scale: Option<f64>) -> Result<Plan> {
        let (qs, ks, vs) = (q.shape(), k.shape(), v.shape());
        let fits = qs.len() >= 2
            && ks.len() >= 2
            && vs.len() >= 2
            && qs[qs.len() - 1] == ks[ks.len() - 1]
            && ks[ks.len() - 2] == vs[vs.len() - 2];
        if !fits {
            bail!(OP, "needs q [.., Lq, D], k [.., Lk, D], v [.., Lk, Dv], got {qs:?}, {ks:?}, {vs:?}");
        }
        let lead = |s: &[usize]| Dims::from_slice(&s[..s.len() - 2]);
        let lead = broadcast(OP, &broadcast(OP, &lead(qs), &lead(ks))?, &lead(vs))?;
        let d = qs[qs.len() - 1];
        Ok(Plan {
            heads: count(&lead),
            lead,
            queries: qs[qs.len() - 2],
            keys: ks[ks.len() - 2],
            d,
            dv: vs[vs.len() - 1],
            scale: scale.unwrap_or(1.0 / (d.max(1) as f64).sqrt()),
            causal,
        })
    }

    fn shape(&self, rows: usize, columns: usize) -> Dims {
        self.lead.iter().copied().chain([rows, columns]).collect()
    }

    /// An input at the full leading dimensions, untracked, with adjacent columns.
    fn view(&self, t: &Tensor) -> Result<Tensor> {
        let rank = t.rank();
        let t = t.detach();
        let t = if t.strides()[rank - 1] == 1 || t.shape()[rank - 1] == 1 { t } else { t.contiguous()? };
        t.expand(self.shape(t.shape()[rank - 2], t.shape()[rank - 1]))
    }

    /// The mask, tracked as it was, floats in the dtype that is computed in.
    #[track_caller]
    fn mask(&self, mask: &Tensor, dtype: DType) -> Result<Tensor> {
        let full = self.shape(self.queries, self.keys);
        let fits = broadcast(OP, mask.shape(), &full).is_ok_and(|shape| shape == full);
        ensure!(fits, OP, "a mask of shape {:?} does not broadcast to {full:?}", mask.shape());
        match mask.dtype() {
            DType::Bool => Ok(mask.clone()),
            d if d.is_float() => mask.to_dtype(dtype),
            other => bail!(OP, "needs a bool or float mask, got {other}"),
        }
    }

    /// Shape and dense strides of the output, ordered like the queries in memory.
    fn output(&self, q: &Tensor) -> (Dims, Strides) {
        let shape = self.shape(self.queries, self.dv);
        let strides = like(q, &shape);
        (shape, strides)
    }
}

/// Dense strides for `shape` in the memory order of `t`, row-major where `t` repeats itself.
fn like(t: &Tensor, shape: &[usize]) -> Strides {
    use crate::cpu::elementwise::{dense_strides, memory_order};
    if t.shape().iter().zip(t.strides()).any(|(&n, &s)| n > 1 && s == 0) {
        return contiguous_strides(shape);
    }
    dense_strides(shape, &memory_order(t.shape(), t.strides()))
}

struct Saved {
    plan: Plan,
    /// Queries, keys, values at the full leading dimensions.
    views: [Tensor; 3],
    mask: Option<Tensor>,
    out: Tensor,
    lse: Tensor,
}

/// With P the weights, recomputed as exp(logits - lse), and dP = dO V^T:
/// dV = P^T dO, dS = P * (dP - rowsum(dO * O)), dQ = scale dS K, dK = scale dS^T Q, dmask = dS.
struct Attention(Saved);
impl Backward for Attention {
    const NAME: &'static str = OP;

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let saved = &self.0;
        let grad = saved.plan.view(grad)?;
        let needs = [0, 1, 2, 3].map(|i| ctx.needs(i));
        let grads = on_device!(
            grad,
            Self::NAME,
            for_real!(grad.dtype(), Self::NAME, T => Ok(cpu::backward::<T>(saved, &grad, needs))),
            if saved.mask.is_some() {
                masked::backward(saved, &grad, needs)
            } else {
                let made = saved.views.each_ref().map(|t| {
                    let shape = Dims::from_slice(t.shape());
                    let strides = like(t, &shape);
                    crate::gpu::empty_strided(t, &shape, strides, t.dtype(), OP)
                });
                let [q, k, v] = made;
                let (q, k, v) = (q?, k?, v?);
                gpu::backward(saved, &grad, [&q, &k, &v], OP)?;
                Ok([Some(q), Some(k), Some(v), None])
            },
            when gpu::takes(&saved.plan, saved.mask.is_some()) || masked::takes(&saved.plan, saved.mask.is_some())
        )?;
        Ok(grads.into_iter().collect())
    }
}

/// The same, with the three gradients written side by side.
struct Packed(Saved);
impl Backward for Packed {
    const NAME: &'static str = "attention";

    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let saved = &self.0;
        let [b, s, _] = grad.dims(Self::NAME)?;
        let (h, d) = (saved.plan.lead[1], saved.plan.d);
        let grad = grad.reshape([b, s, h, d])?.permute([0, 2, 1, 3])?;
        let grad = saved.plan.view(&grad)?;
        let qkv = on_device!(
            grad,
            Self::NAME,
            for_real!(grad.dtype(), Self::NAME, T => Ok(cpu::backward_packed::<T>(saved, &grad))),
            {
                let qkv = crate::gpu::empty(&grad, &[b, s, 3, h, d], grad.dtype(), Self::NAME)?;
                let parts = unpack(&qkv);
                gpu::backward(saved, &grad, parts.each_ref(), Self::NAME)?;
                Ok(qkv)
            },
            when gpu::takes(&saved.plan, false)
        )?;
        Ok(smallvec![Some(qkv)])
    }
}

#[cfg(test)]
mod tests;
