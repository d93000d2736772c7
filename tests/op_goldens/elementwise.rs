//! Operations of `ops_elementwise_*`.

use crate::case::{Case, Op};
use smalti::{Error, Result, Tensor};

pub const OPS: &[(&str, Op)] = &[
    ("add", |c| one(c.input(0)?.add(&c.input(1)?.mul_scalar(c.f64("alpha")?)?))),
    ("sub", |c| one(c.input(0)?.sub(&c.input(1)?.mul_scalar(c.f64("alpha")?)?))),
    ("mul", |c| one(c.input(0)?.mul(c.input(1)?))),
    ("div", |c| one(c.input(0)?.div(c.input(1)?))),
    ("neg", |c| one(c.input(0)?.neg())),
    ("pow", pow),
    ("exp", |c| one(c.input(0)?.exp())),
    ("log", |c| one(c.input(0)?.log())),
    ("sqrt", |c| one(c.input(0)?.sqrt())),
    ("rsqrt", |c| one(c.input(0)?.rsqrt())),
    ("tanh", |c| one(c.input(0)?.tanh())),
    ("sigmoid", |c| one(c.input(0)?.sigmoid())),
    ("erf", |c| one(c.input(0)?.erf())),
    ("gelu", gelu),
    ("relu", |c| one(c.input(0)?.relu())),
    ("silu", |c| one(c.input(0)?.silu())),
    ("softplus", |c| one(c.input(0)?.softplus(c.f64("beta")?, c.f64("threshold")?))),
    ("clamp", |c| one(c.input(0)?.clamp(c.opt_f64("min")?, c.opt_f64("max")?))),
    ("abs", |c| one(c.input(0)?.abs())),
    ("where", |c| one(c.input(0)?.where_cond(c.input(1)?, c.input(2)?))),
    ("maximum", |c| one(c.input(0)?.maximum(c.input(1)?))),
    ("minimum", |c| one(c.input(0)?.minimum(c.input(1)?))),
    ("eq", |c| one(c.input(0)?.eq(c.input(1)?))),
    ("ne", |c| one(c.input(0)?.ne(c.input(1)?))),
    ("lt", |c| one(c.input(0)?.lt(c.input(1)?))),
    ("le", |c| one(c.input(0)?.le(c.input(1)?))),
    ("gt", |c| one(c.input(0)?.gt(c.input(1)?))),
    ("ge", |c| one(c.input(0)?.ge(c.input(1)?))),
];

fn one(y: Result<Tensor>) -> Result<Vec<Tensor>> {
    Ok(vec![y?])
}

fn pow(c: &Case) -> Result<Vec<Tensor>> {
    one(match c.optional(1) {
        Some(exponent) => c.input(0)?.pow(exponent),
        None => c.input(0)?.pow_scalar(c.f64("exponent")?),
    })
}

fn gelu(c: &Case) -> Result<Vec<Tensor>> {
    one(match c.str("approximate")? {
        "none" => c.input(0)?.gelu(),
        "tanh" => c.input(0)?.gelu_tanh(),
        other => Err(Error::msg(format!("gelu: unknown approximation {other}"))),
    })
}
