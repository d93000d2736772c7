//! Operations of `ops_reduce_*`.

use crate::case::Op;
use smalti::{Result, Tensor};

/// `over!(c, x, dims => with keepdim, without)`: a list of dimensions, where null and [] mean all.
macro_rules! over {
    ($c:ident, |$x:ident, $dims:ident| $keep:expr, $drop:expr) => {{
        let $x = $c.input(0)?;
        let dims = match $c.opt_i64s("dim")? {
            Some(dims) if !dims.is_empty() => dims,
            _ => (0..$x.rank() as i64).collect(),
        };
        let $dims = &dims[..];
        Ok(vec![if $c.bool("keepdim")? { $keep? } else { $drop? }])
    }};
}

/// Operations with indices: one dimension, or null for the flattened input.
macro_rules! along {
    ($c:ident, |$x:ident, $dim:ident| $keep:expr, $drop:expr, $flat:expr) => {{
        let $x = $c.input(0)?;
        match $c.opt_i64("dim")? {
            Some($dim) if $c.bool("keepdim")? => $keep,
            Some($dim) => $drop,
            None => $flat,
        }
    }};
}

fn both(result: Result<(Tensor, Tensor)>) -> Result<Vec<Tensor>> {
    result.map(|(values, indices)| vec![values, indices])
}

fn only(result: Result<Tensor>) -> Result<Vec<Tensor>> {
    result.map(|y| vec![y])
}

pub const OPS: &[(&str, Op)] = &[
    ("sum", |c| over!(c, |x, d| x.sum_keepdim(d), x.sum(d))),
    ("mean", |c| over!(c, |x, d| x.mean_keepdim(d), x.mean(d))),
    ("prod", |c| over!(c, |x, d| x.prod_keepdim(d), x.prod(d))),
    ("logsumexp", |c| over!(c, |x, d| x.logsumexp_keepdim(d), x.logsumexp(d))),
    ("amax", |c| over!(c, |x, d| x.amax_keepdim(d), x.amax(d))),
    ("amin", |c| over!(c, |x, d| x.amin_keepdim(d), x.amin(d))),
    ("var", |c| {
        let correction = c.usize("correction")?;
        over!(c, |x, d| x.var_keepdim(d, correction), x.var(d, correction))
    }),
    ("std", |c| {
        let correction = c.usize("correction")?;
        over!(c, |x, d| x.std_keepdim(d, correction), x.std(d, correction))
    }),
    ("norm", |c| {
        let ord = c.f64("ord")?;
        over!(c, |x, d| x.norm_keepdim(ord, d), x.norm(ord, d))
    }),
    ("max", |c| both(along!(c, |x, d| x.max_keepdim(d), x.max(d), x.max_flat()))),
    ("min", |c| both(along!(c, |x, d| x.min_keepdim(d), x.min(d), x.min_flat()))),
    ("argmax", |c| only(along!(c, |x, d| x.argmax_keepdim(d), x.argmax(d), x.argmax_flat()))),
    ("argmin", |c| only(along!(c, |x, d| x.argmin_keepdim(d), x.argmin(d), x.argmin_flat()))),
    ("cumsum", |c| only(c.input(0)?.cumsum(c.i64("dim")?))),
];
