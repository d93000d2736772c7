//! Operations of `ops_norm_*`.

use crate::case::{Case, Op};
use smalti::{Result, Tensor};

pub const OPS: &[(&str, Op)] = &[
    ("batch_norm", batch_norm),
    ("channel_layer_norm", |c| {
        Ok(vec![c.input(0)?.channel_layer_norm(c.optional(1), c.optional(2), c.f64("eps")?)?])
    }),
    ("group_norm", |c| {
        let (groups, eps) = (c.usize("num_groups")?, c.f64("eps")?);
        Ok(vec![c.input(0)?.group_norm(groups, c.optional(1), c.optional(2), eps)?])
    }),
    ("instance_norm", |c| {
        Ok(vec![c.input(0)?.instance_norm(c.optional(1), c.optional(2), c.f64("eps")?)?])
    }),
    ("layer_norm", |c| {
        let (shape, eps) = (c.usizes("normalized_shape")?, c.f64("eps")?);
        Ok(vec![c.input(0)?.layer_norm(shape, c.optional(1), c.optional(2), eps)?])
    }),
    ("normalize", |c| Ok(vec![c.input(0)?.normalize(c.f64("p")?, c.i64("dim")?, c.f64("eps")?)?])),
    ("rms_norm", |c| {
        Ok(vec![c.input(0)?.rms_norm(c.usizes("normalized_shape")?, c.optional(1), c.f64("eps")?)?])
    }),
];

fn batch_norm(c: &Case) -> Result<Vec<Tensor>> {
    let running = c.optional(1).zip(c.optional(2));
    let (training, momentum, eps) = (c.bool("training")?, c.f64("momentum")?, c.f64("eps")?);
    let (y, moved) =
        c.input(0)?.batch_norm(running, c.optional(3), c.optional(4), training, momentum, eps)?;
    let after = moved.or(running.map(|(mean, var)| (mean.clone(), var.clone())));
    Ok([y].into_iter().chain(after.into_iter().flat_map(|(mean, var)| [mean, var])).collect())
}
