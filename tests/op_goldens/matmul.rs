//! Operations of `ops_matmul_*`.

use crate::case::Op;

pub const OPS: &[(&str, Op)] = &[
    ("bmm", |c| Ok(vec![c.input(0)?.bmm(c.input(1)?)?])),
    ("linear", |c| Ok(vec![c.input(0)?.linear(c.input(1)?, c.optional(2))?])),
    ("matmul", |c| Ok(vec![c.input(0)?.matmul(c.input(1)?)?])),
    ("outer", |c| Ok(vec![c.input(0)?.outer(c.input(1)?)?])),
];
