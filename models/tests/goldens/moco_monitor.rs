//! Norms over groups of a batch, and the k-nearest-neighbour monitor, of MoCo's CIFAR notebook.

use super::{
    file::{Golden, Report},
    tolerance,
};
use serde::Deserialize;
use smalti::{
    BackwardOptions, Error, Result,
    nn::{BatchNorm, BatchNormConfig, Params, Statistics},
};
use smalti_models::evaluate::{Features, Vote, knn_accuracy, knn_scores};

#[derive(Deserialize)]
struct Config {
    bn_eps: f64,
    bn_momentum: f64,
    splits: usize,
    knn: Knn,
}

#[derive(Deserialize)]
struct Knn {
    classes: usize,
    k: usize,
    t: f64,
}

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    let config: Config = golden.config(&["bn_eps", "bn_momentum", "splits", "knn"])?;
    split_norm(golden, report, &config)?;
    neighbours(golden, report, &config.knn)
}

fn split_norm(golden: &Golden, report: &mut Report, config: &Config) -> Result<()> {
    let x = golden.get("input.x")?.requires_grad();
    let params = Params::new();
    let norm = BatchNormConfig {
        affine: true,
        eps: config.bn_eps,
        momentum: config.bn_momentum,
        statistics: Statistics::Split(config.splits),
    };
    let norm = BatchNorm::new(&params.sub("bn"), x.dim(1)?, &norm)?;
    let param = |name: &str| params.get(name).ok_or_else(|| Error::msg(format!("no parameter {name}")));
    for (name, start) in golden.with_prefix("weight.") {
        param(name)?.set(start)?;
    }
    let y = norm.forward(&x, true)?;
    let slope = golden.get("input.grad_y")?.clone();
    let grads = y.backward_with(&BackwardOptions { grad: Some(slope), ..Default::default() })?;
    for (name, got) in [
        ("y_train", y),
        ("running_mean", param("bn.running_mean")?.value()),
        ("running_var", param("bn.running_var")?.value()),
        ("y_eval_after", norm.forward(&x, false)?),
    ] {
        report.compare(name, &got, golden.get(&format!("output.{name}"))?, tolerance::MOCO)?;
    }
    for (name, got) in [
        ("grad.x", grads.get(&x)),
        ("grad.bn.weight", grads.get(&param("bn.weight")?)),
        ("grad.bn.bias", grads.get(&param("bn.bias")?)),
    ] {
        let got = got.ok_or_else(|| Error::msg(format!("no {name}")))?;
        report.compare(name, got, golden.get(name)?, tolerance::MOCO_GRADIENT)?;
    }
    Ok(())
}

fn neighbours(golden: &Golden, report: &mut Report, knn: &Knn) -> Result<()> {
    let input = |name: &str| golden.get(&format!("input.knn_{name}"));
    let bank = Features::new(input("bank")?.t()?, &input("bank_labels")?.to_vec::<i64>()?)?;
    let queries = Features::new(input("feature")?.clone(), &input("target")?.to_vec::<i64>()?)?;
    let vote = Vote::Weighted { temperature: knn.t };
    let scores = knn_scores(&bank, &queries.x, knn.k, knn.classes, vote)?;
    let top1 = 100.0 * knn_accuracy(&bank, &queries, knn.k, vote)?;
    for (name, got, allowed) in [
        ("knn_pred", scores.argmax(-1)?, 0.0),
        ("knn_scores", scores, tolerance::MOCO),
        ("knn_top1", smalti::Tensor::from_slice(&[top1], [1])?, tolerance::MOCO),
    ] {
        report.compare(name, &got, golden.get(&format!("output.{name}"))?, allowed)?;
    }
    Ok(())
}
