//! The contrastive loss over ranks: losses of each, and the gradient of their mean.

use super::{
    file::{Golden, Report},
    tolerance,
};
use smalti::{Error, Result, Tensor, comm};
use smalti_models::flip::contrastive;

#[derive(serde::Deserialize)]
struct Config {
    world_size: usize,
}

/// One rank's logits, loss, and the gradients of its loss: of its images, texts and the scale's logarithm.
struct Rank {
    logits: [Tensor; 2],
    loss: Tensor,
    grads: [Tensor; 3],
}

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    let Config { world_size: world } = golden.config(&["world_size"])?;
    let ranks = comm::threads(world, |comm| rank(golden, &comm))?;
    for (r, rank) in ranks.iter().enumerate() {
        let mut compare = |name: &str, got: &Tensor, tolerance: f64| {
            report.compare(&format!("rank{r} {name}"), got, golden.get(name)?, tolerance)
        };
        let output = |name: &str| format!("output.rank{r}.{name}");
        compare(&output("logits_per_image"), &rank.logits[0], tolerance::OUTPUT)?;
        compare(&output("logits_per_text"), &rank.logits[1], tolerance::OUTPUT)?;
        compare(&output("loss"), &rank.loss, tolerance::LOSS)?;
        for (i, name) in ["image_features", "text_features"].into_iter().enumerate() {
            // before ranks are averaged: what each finds by itself
            let own = format!("output.autograd.local1_grad1.rank{r}.{name}");
            compare(&own, &rank.grads[i], tolerance::GRADIENT)?;
            let mean = rank.grads[i].mul_scalar(1.0 / world as f64)?;
            compare(&format!("grad.rank{r}.{name}"), &mean, tolerance::GRADIENT)?;
        }
    }
    // The scale's gradient is one number a rank, by cancellation nearly 0 in some: they are compared as one vector.
    let all = |parts: Vec<&Tensor>| Tensor::cat(&parts, 0);
    let own = |r: usize| golden.get(&format!("output.autograd.local1_grad1.rank{r}.logit_scale"));
    let (reference, logs) = (
        all((0..world).map(own).collect::<Result<_>>()?)?,
        all(ranks.iter().map(|r| &r.grads[2]).collect())?,
    );
    report.compare("logit_scale of every rank", &logs, &reference, tolerance::CANCELLING)?;
    let mean = |x: Tensor| x.mean(0)?.reshape([1]);
    let loss = all(ranks.iter().map(|r| &r.loss).collect())?;
    report.compare("loss", &mean(loss)?, golden.get("output.loss")?, tolerance::LOSS)?;
    report.compare("grad.logit_scale", &mean(logs)?, golden.get("grad.logit_scale")?, tolerance::CANCELLING)
}

fn rank(golden: &Golden, comm: &comm::Comm) -> Result<Rank> {
    let input = |name: &str| -> Result<Tensor> {
        Ok(golden.get(&format!("input.rank{}.{name}", comm.rank()))?.requires_grad())
    };
    let leaves =
        [input("image_features")?, input("text_features")?, golden.get("input.logit_scale")?.requires_grad()];
    let [images, texts, log] = &leaves;
    let scale = log.exp()?;
    let loss = contrastive(images, texts, &scale, comm)?;
    let logits = |own: &Tensor, others: &Tensor| -> Result<Tensor> {
        Ok(own.matmul(&others.all_gather(comm)?.t()?)?.mul(&scale)?.detach())
    };
    let logits = [logits(images, texts)?, logits(texts, images)?];
    let grads = loss.backward()?;
    let grad = |leaf| grads.get(leaf).cloned().ok_or_else(|| Error::msg("no gradient"));
    Ok(Rank { logits, loss: loss.detach().reshape([1])?, grads: [grad(images)?, grad(texts)?, grad(log)?] })
}
