//! MoCo v3: one step with a patch projection or a convolutional stem.

use super::{
    file::{Golden, Report},
    tolerance,
};
use smalti::{Error, Result, Rng, Tensor, comm::single};
use smalti_models::{
    backbones::{BackboneConfig, vit::VitConfig},
    moco_v3::{MocoV3, MocoV3Config, MocoV3Output},
};

const VIT: &[&str] = &[
    "img_size",
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "layer_norm_eps",
    "gelu",
    "conv_stem",
];

/// What the model takes for granted.
const FIXED: &[(&str, f64)] =
    &[("bn_eps", 1e-5), ("bn_momentum", 0.1), ("pos_embed_temperature", 10_000.0), ("world_size", 1.0)];

#[derive(serde::Deserialize)]
struct Step {
    dim: usize,
    mlp_dim: usize,
    #[serde(rename = "T")]
    temperature: f64,
    m: f64,
    stop_grad_conv1: bool,
}

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    golden.fixed(FIXED)?;
    let vit: VitConfig = golden.config(VIT)?;
    let step: Step = golden.config(&["dim", "mlp_dim", "T", "m", "stop_grad_conv1"])?;
    let Step { dim, mlp_dim, temperature, m, stop_grad_conv1 } = step;
    let backbone = BackboneConfig::Vit(vit);
    let config = MocoV3Config { backbone, dim, mlp_dim, temperature, stop_grad_conv1 };
    let moco = MocoV3::new(&config, single(), &mut Rng::new(0))?;
    for name in ["base_encoder.pos_embed", "momentum_encoder.pos_embed"] {
        // built here, so compared before the file's takes its place
        let table = moco.params().get(name).ok_or_else(|| Error::msg("there are no positions"))?;
        report.compare(name, &table.value(), golden.get(&format!("weight.{name}"))?, tolerance::TABLE)?;
    }
    golden.load_weights(moco.params())?;
    let views = [golden.get("input.x1")?, golden.get("input.x2")?];
    for (i, view) in views.into_iter().enumerate() {
        let features = moco.base().features(view, true)?;
        let (feat, proj) = (format!("feat{}", i + 1), format!("proj{}", i + 1));
        report.compare(&feat, &features, golden.get(&format!("output.{feat}"))?, tolerance::OUTPUT)?;
        let projected = moco.base().project(&features, true)?;
        report.compare(&proj, &projected, golden.get(&format!("output.{proj}"))?, tolerance::BATCH_NORMED)?;
    }
    // these passes have moved the running statistics
    golden.load_weights(moco.params())?;
    let out = moco.forward(views[0], views[1], m)?;
    outputs(golden, report, &out, temperature)?;
    let grads = out.loss.backward()?;
    golden.compare_grads(report, moco.params(), &grads, tolerance::BATCH_NORMED_GRADIENT)?;
    golden.compare_params(report, moco.params(), "output.updated.", tolerance::UPDATED)?;
    golden.compare_params(report, moco.params(), "output.buffers_after.", tolerance::STATISTICS)
}

fn outputs(golden: &Golden, report: &mut Report, out: &MocoV3Output, temperature: f64) -> Result<()> {
    let unit = |t: &Tensor| t.detach().normalize(2.0, 1, 1e-12);
    let logits = |q: &Tensor, k: &Tensor| unit(q)?.matmul(&unit(k)?.t()?)?.mul_scalar(1.0 / temperature);
    let (logits12, logits21) = (logits(&out.q1, &out.k2)?, logits(&out.q2, &out.k1)?);
    for (name, value) in [
        ("q1", &out.q1),
        ("q2", &out.q2),
        ("k1", &out.k1),
        ("k2", &out.k2),
        ("logits_q1k2", &logits12),
        ("logits_q2k1", &logits21),
    ] {
        report.compare(name, value, golden.get(&format!("output.{name}"))?, tolerance::BATCH_NORMED)?;
    }
    for (name, value) in [("loss_q1k2", &out.loss_q1k2), ("loss_q2k1", &out.loss_q2k1), ("loss", &out.loss)] {
        report.compare(name, value, golden.get(&format!("output.{name}"))?, tolerance::BATCH_NORMED_LOSS)?;
    }
    Ok(())
}
