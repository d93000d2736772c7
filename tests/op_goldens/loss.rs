//! Operations of `ops_loss_*`.

use crate::case::{Case, Op};
use smalti::{CrossEntropy, Error, Reduction, Result, Tensor};

pub const OPS: &[(&str, Op)] = &[
    ("binary_cross_entropy_with_logits", |c| {
        let (weight, pos_weight) = (c.optional(2), c.optional(3));
        Ok(vec![c.input(0)?.binary_cross_entropy_with_logits(
            c.input(1)?,
            weight,
            pos_weight,
            reduction(c)?,
        )?])
    }),
    ("cosine_similarity", |c| {
        Ok(vec![c.input(0)?.cosine_similarity(c.input(1)?, c.i64("dim")?, c.f64("eps")?)?])
    }),
    ("cross_entropy", |c| {
        let options = CrossEntropy { label_smoothing: c.f64("label_smoothing")?, ..options(c)? };
        Ok(vec![c.input(0)?.cross_entropy(c.input(1)?, &options)?])
    }),
    ("huber_loss", |c| Ok(vec![c.input(0)?.huber_loss(c.input(1)?, c.f64("delta")?, reduction(c)?)?])),
    ("kl_div", kl_div),
    ("l1_loss", |c| Ok(vec![c.input(0)?.l1_loss(c.input(1)?, reduction(c)?)?])),
    ("log_softmax", |c| Ok(vec![c.input(0)?.log_softmax(c.i64("dim")?)?])),
    ("mse_loss", |c| Ok(vec![c.input(0)?.mse_loss(c.input(1)?, reduction(c)?)?])),
    ("nll_loss", |c| Ok(vec![c.input(0)?.nll_loss(c.input(1)?, &options(c)?)?])),
    ("smooth_l1_loss", |c| {
        Ok(vec![c.input(0)?.smooth_l1_loss(c.input(1)?, c.f64("beta")?, reduction(c)?)?])
    }),
    ("softmax", |c| Ok(vec![c.input(0)?.softmax(c.i64("dim")?)?])),
];

fn reduction(c: &Case) -> Result<Reduction> {
    match c.str("reduction")? {
        "none" => Ok(Reduction::None),
        "sum" => Ok(Reduction::Sum),
        "mean" => Ok(Reduction::Mean),
        other => Err(Error::msg(format!("unknown reduction `{other}`"))),
    }
}

fn options(c: &Case) -> Result<CrossEntropy> {
    let weight = c.optional(2).cloned();
    Ok(CrossEntropy {
        weight,
        ignore_index: c.i64("ignore_index")?,
        reduction: reduction(c)?,
        ..Default::default()
    })
}

fn kl_div(c: &Case) -> Result<Vec<Tensor>> {
    let (x, target, log_target) = (c.input(0)?, c.input(1)?, c.bool("log_target")?);
    if c.str("reduction")? == "batchmean" {
        return Ok(vec![x.kl_div_batchmean(target, log_target)?]);
    }
    Ok(vec![x.kl_div(target, log_target, reduction(c)?)?])
}
