//! SimSiam: two steps of SGD with every stage of the first, and evaluation after them.

use super::{
    file::{Golden, Report},
    tolerance,
};
use smalti::{
    Result, Rng, Tensor,
    nn::Statistics,
    no_grad,
    optim::{Algorithm, Optimizer, Sgd},
};
use smalti_models::{
    backbones::resnet::ResNetConfig,
    simsiam::{SimSiam, SimSiamConfig, SimSiamOutput, z_norm_std},
};

/// What the model takes for granted.
const FIXED: &[(&str, f64)] = &[("bn_eps", 1e-5), ("bn_momentum", 0.1), ("cosine_eps", 1e-8)];

#[derive(serde::Deserialize)]
struct Step {
    dim: usize,
    pred_dim: usize,
    lr_encoder: f64,
    lr_predictor: f64,
    sgd_momentum: f64,
    weight_decay: f64,
}

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    golden.fixed(FIXED)?;
    let backbone: ResNetConfig = golden.config(&["block", "layers", "width"])?;
    let known = ["dim", "pred_dim", "lr_encoder", "lr_predictor", "sgd_momentum", "weight_decay"];
    let step: Step = golden.config(&known)?;
    let (dim, pred_dim) = (step.dim, step.pred_dim);
    let config = SimSiamConfig { backbone, dim, pred_dim, projector_layers: 3, stop_gradient: true };
    let model = SimSiam::new(&config, Statistics::Batch, &mut Rng::new(0))?;
    golden.load_weights(model.params())?;
    let views = [golden.get("input.x1")?, golden.get("input.x2")?];
    no_grad(|| stages(golden, report, &model, views))?;
    // these passes have moved the running statistics
    golden.load_weights(model.params())?;

    let sgd = Sgd { momentum: step.sgd_momentum, weight_decay: step.weight_decay, ..Default::default() };
    let mut parts = ["encoder", "predictor"]
        .map(|part| sgd.over(&model.params().sub(part).trained(), &[]))
        .into_iter()
        .zip([step.lr_encoder, step.lr_predictor])
        .map(|(part, lr)| Ok((part?, lr)))
        .collect::<Result<Vec<_>>>()?;
    for number in 1..=2 {
        let out = model.forward(views[0], views[1])?;
        let prefix = format!("output.step{number}.");
        let first = number == 1;
        outputs(golden, report, &out, &prefix, first)?;
        if first {
            golden.compare_params(
                report,
                model.params(),
                &format!("{prefix}buffer."),
                tolerance::STATISTICS,
            )?;
        }
        let grads = out.loss.backward()?;
        if first {
            golden.compare_grads(report, model.params(), &grads, tolerance::DEEP_GRADIENT)?;
        }
        for (optimizer, lr) in &mut parts {
            optimizer.step(&grads, *lr)?;
        }
        if first {
            let prefix = format!("{prefix}after_sgd.");
            golden.compare_params(report, model.params(), &prefix, tolerance::STATISTICS)?;
        }
    }
    let [z1, p1] = no_grad(|| model.encode(views[0], false))?;
    for (name, value) in [("z1", z1), ("p1", p1)] {
        let name = format!("output.eval_after.{name}");
        report.compare(&name, &value, golden.get(&name)?, tolerance::AFTER_TWO_STEPS)?;
    }
    Ok(())
}

/// Every stage of both views.
fn stages(golden: &Golden, report: &mut Report, model: &SimSiam, views: [&Tensor; 2]) -> Result<()> {
    for (i, view) in views.into_iter().enumerate() {
        let mut compare = |name: &str, value: &Tensor| {
            let name = format!("output.step1.{name}.view{}", i + 1);
            report.compare(&name, value, golden.get(&name)?, tolerance::DEEP)
        };
        let maps = model.backbone().stages(view, true)?;
        compare("encoder.maxpool", &maps.stem)?;
        for (stage, map) in maps.stages.iter().enumerate() {
            compare(&format!("encoder.layer{}", stage + 1), map)?;
        }
        let pooled = maps.stages[maps.stages.len() - 1].mean_keepdim([2, 3])?;
        compare("encoder.avgpool", &pooled)?;
        let mut seen = Vec::new();
        let z = model.projector().forward_seen(&pooled.flatten(1, -1)?, true, |i, t| {
            seen.push((format!("encoder.fc.{i}"), t.clone()));
        })?;
        model.predictor().forward_seen(&z, true, |i, t| seen.push((format!("predictor.{i}"), t.clone())))?;
        let kept = ["encoder.fc.1", "encoder.fc.4", "encoder.fc.6", "encoder.fc.7", "predictor.1"];
        for (name, value) in seen.iter().filter(|(name, _)| kept.contains(&name.as_str())) {
            compare(name, value)?;
        }
    }
    Ok(())
}

fn outputs(
    golden: &Golden,
    report: &mut Report,
    out: &SimSiamOutput,
    prefix: &str,
    first: bool,
) -> Result<()> {
    let (mut tolerance, mut cosine) = (tolerance::DEEP, tolerance::COSINE);
    if !first {
        (tolerance, cosine) = (tolerance::AFTER_A_STEP, tolerance::COSINE_AFTER_A_STEP);
    }
    let mut compare = |name: &str, value: &Tensor, shift: f64, tolerance: f64| {
        let name = format!("{prefix}{name}");
        let reference = golden.get(&name)?;
        let value = value.reshape(reference.shape())?.add_scalar(shift)?;
        report.compare(&name, &value, &reference.add_scalar(shift)?, tolerance)
    };
    for (name, value) in [("z1", &out.z1), ("z2", &out.z2), ("p1", &out.p1), ("p2", &out.p2)] {
        compare(name, value, 0.0, tolerance)?;
    }
    compare("z1_norm_std", &z_norm_std(&out.z1)?, 0.0, tolerance)?;
    // near 0, where a relative error says nothing: the cosines plus 1
    for (name, value) in [("cos_p1_z2", &out.cos_p1_z2), ("cos_p2_z1", &out.cos_p2_z1), ("loss", &out.loss)] {
        compare(name, value, 1.0, cosine)?;
    }
    Ok(())
}
