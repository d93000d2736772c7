//! Operations of `ops_attention_*`.

use crate::case::{Case, Op};
use smalti::{Result, Tensor};

pub const OPS: &[(&str, Op)] = &[("scaled_dot_product_attention", sdpa)];

fn sdpa(c: &Case) -> Result<Vec<Tensor>> {
    let (q, k, v) = (c.input(0)?, c.input(1)?, c.input(2)?);
    let (causal, scale) = (c.bool("is_causal")?, c.opt_f64("scale")?);
    let (out, lse) = q.scaled_dot_product_attention(k, v, c.optional(3), causal, scale)?;
    Ok(vec![out, lse])
}
