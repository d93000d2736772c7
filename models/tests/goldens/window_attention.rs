//! The attention core with decomposed relative positions, on grids of one and of two sizes; then once more in the
//! half types, held against the unfused computation in the same type.

use super::{
    file::{Golden, Report},
    tolerance,
};
use smalti::{BackwardOptions, DType, Error, InterpolateOptions, Interpolation, OutputSize, Result, Tensor};

#[derive(serde::Deserialize)]
struct Sizes {
    name: String,
    q: [usize; 2],
    k: [usize; 2],
}

/// Queries, keys, values, tables.
const INPUTS: [&str; 5] = ["q", "k", "v", "rel_pos_h", "rel_pos_w"];

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    let sizes = golden.config.get("sizes").cloned().unwrap_or_default();
    let sizes: Vec<Sizes> = serde_json::from_value(sizes).map_err(|e| Error::msg(format!("sizes: {e}")))?;
    for s in &sizes {
        let given = |kind: &str, part: &str| golden.get(&format!("{kind}.{}.{part}", s.name));
        let inputs = INPUTS.map(|part| given("input", part).cloned());
        let inputs: Vec<Tensor> = inputs.into_iter().collect::<Result<_>>()?;
        let slope = given("input", "grad_out")?;
        let got = run(&fused(s), &inputs, slope)?;
        report.compare(&format!("{}.out", s.name), &got[0], given("output", "out")?, tolerance::ATTENTION)?;
        let lse = fused(s)(&inputs)?.1;
        report.compare(&format!("{}.lse", s.name), &lse, given("output", "lse")?, tolerance::ATTENTION)?;
        for (part, got) in INPUTS.iter().zip(&got[1..]) {
            let reference = given("grad", part)?;
            report.compare(&format!("grad.{}.{part}", s.name), got, reference, tolerance::GRADIENT)?;
        }
        for dtype in [DType::BF16, DType::F16] {
            half(s, &inputs, slope, dtype, report)?;
        }
    }
    Ok(())
}

type Attention<'a> = Box<dyn Fn(&[Tensor]) -> Result<(Tensor, Tensor)> + 'a>;

fn fused(s: &Sizes) -> Attention<'_> {
    Box::new(|t| t[0].relative_attention(&t[1], &t[2], (&t[3], &t[4]), s.q, s.k, None))
}

/// Output, then gradients of the inputs.
fn run(attention: &Attention, inputs: &[Tensor], slope: &Tensor) -> Result<Vec<Tensor>> {
    let leaves: Vec<Tensor> = inputs.iter().map(Tensor::requires_grad).collect();
    let out = attention(&leaves)?.0;
    let grads = out.backward_with(&BackwardOptions { grad: Some(slope.clone()), ..Default::default() })?;
    let grads = leaves.iter().map(|t| grads.get(t).cloned().ok_or_else(|| Error::msg("no gradient")));
    [Ok(out.detach())].into_iter().chain(grads).collect()
}

/// Inputs rounded to `dtype`; the exact values of these are computed in f64.
fn half(s: &Sizes, inputs: &[Tensor], slope: &Tensor, dtype: DType, report: &mut Report) -> Result<()> {
    let mut rounded = inputs.to_vec();
    // both ways get tables of the final length
    for (axis, table) in rounded[3..].iter_mut().enumerate() {
        *table = resized(table, 2 * s.q[axis].max(s.k[axis]) - 1)?;
    }
    let cast = |t: &[Tensor], to: DType| t.iter().map(|t| t.to_dtype(to)).collect::<Result<Vec<_>>>();
    let (rounded, slope) = (cast(&rounded, dtype)?, slope.to_dtype(dtype)?);
    let exact = run(&fused(s), &cast(&rounded, DType::F64)?, &slope.to_dtype(DType::F64)?)?;
    let ours = run(&fused(s), &rounded, &slope)?;
    let unfused = run(&(Box::new(|t: &[Tensor]| unfused(s, t)) as Attention), &rounded, &slope)?;
    for (i, name) in ["out"].iter().chain(&INPUTS).enumerate() {
        let allowed = if i == 0 { tolerance::HALF_OUTPUT } else { tolerance::HALF_GRADIENT };
        let name = format!("{}.{name} {dtype}, against unfused", s.name);
        report.ratio(&name, &ours[i], &unfused[i], &exact[i], allowed)?;
    }
    Ok(())
}

/// A table `[L, D]` at length `n`.
fn resized(table: &Tensor, n: usize) -> Result<Tensor> {
    let [l, d] = table.dims("resized")?;
    if l == n {
        return Ok(table.clone());
    }
    let linear = InterpolateOptions { mode: Interpolation::Bilinear, ..Default::default() };
    let image = table.t()?.reshape([1, d, l, 1])?;
    image.interpolate(OutputSize::Pixels([n, 1]), &linear)?.reshape([d, n])?.t()?.contiguous()
}

/// The same by single operations, as the official code does it.
fn unfused(s: &Sizes, t: &[Tensor]) -> Result<(Tensor, Tensor)> {
    let [n, lq, d] = t[0].dims("unfused")?;
    let ([qh, qw], [kh, kw]) = (s.q, s.k);
    let table = |table: &Tensor, q: usize, k: usize| -> Result<Tensor> {
        let (fq, fk) = ((k as f32 / q as f32).max(1.0), (q as f32 / k as f32).max(1.0));
        let at = |i: usize| (i / k) as f32 * fq - (i % k) as f32 * fk + (k as f32 - 1.0) * fk;
        let index: Vec<i64> = (0..q * k).map(|i| at(i) as i64).collect();
        let rows = table.index_select(0, &Tensor::from_slice(&index, [q * k])?)?;
        rows.reshape([q, k, d])?.transpose(1, 2)
    };
    let logits = t[0].matmul(&t[1].transpose(1, 2)?)?.mul_scalar(1.0 / (d as f64).sqrt())?;
    let grid = t[0].reshape([n, qh, qw, d])?;
    let rows = grid.matmul(&table(&t[3], qh, kh)?)?;
    let columns = grid.transpose(1, 2)?.matmul(&table(&t[4], qw, kw)?)?.transpose(1, 2)?;
    let logits = logits.reshape([n, qh, qw, kh, kw])?;
    let logits = logits.add(&rows.unsqueeze(4)?)?.add(&columns.unsqueeze(3)?)?;
    let weights = logits.reshape([n, lq, kh * kw])?.softmax(2)?;
    Ok((weights.matmul(&t[2])?, weights.detach()))
}
