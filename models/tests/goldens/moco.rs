//! Momentum contrast: two training steps with an SGD step between them.

use super::{
    file::{Golden, Report},
    tolerance,
};
use serde::Deserialize;
use smalti::{
    CrossEntropy, Error, Gradients, Result, Rng, Tensor, comm,
    nn::Params,
    optim::{Algorithm, Optimizer, Sgd},
};
use smalti_models::{
    backbones::resnet::{BlockKind, ResNetConfig, Stem},
    moco::{Moco, MocoConfig, MocoOutput},
};

/// What the files call the model's sizes.
#[derive(Deserialize)]
struct Model {
    block: BlockKind,
    layers: [usize; 4],
    width: usize,
    dim: usize,
    #[serde(rename = "K")]
    queue: usize,
    #[serde(rename = "m")]
    momentum: f64,
    #[serde(rename = "T")]
    temperature: f64,
    mlp: bool,
}

#[derive(Deserialize)]
struct Training {
    lr: f64,
    sgd_momentum: f64,
    weight_decay: f64,
}

pub fn config(golden: &Golden) -> Result<MocoConfig> {
    let model: Model = golden.config(&["block", "layers", "width", "dim", "K", "m", "T", "mlp"])?;
    let Model { block, layers, width, dim, queue, momentum, temperature, mlp } = model;
    let (stem, in_chans) = (Stem::Imagenet, golden.get("input.im_q")?.dim(1)?);
    let backbone = ResNetConfig { block, layers, width, stem, in_chans, zero_init_residual: false };
    Ok(MocoConfig { backbone, dim, queue, momentum, temperature, mlp, symmetric: false, bn_splits: 1 })
}

/// What the model never stores: all similarities over the temperature, the positive's first.
pub fn logits(out: &MocoOutput, queue: &Tensor, temperature: f64) -> Result<Tensor> {
    let positive = out.q.mul(&out.k)?.sum_keepdim(1)?;
    Tensor::cat(&[positive, out.q.matmul(queue)?], 1)?.mul_scalar(1.0 / temperature)
}

/// The present value of a parameter or buffer.
pub fn value(params: &Params, name: &str) -> Result<Tensor> {
    params.get(name).map(|p| p.value()).ok_or_else(|| Error::msg(format!("no parameter {name}")))
}

/// Compares every tensor of the file below `prefix` with the model's of that name.
pub fn parameters(
    golden: &Golden,
    report: &mut Report,
    params: &Params,
    prefix: &str,
    tolerance: f64,
) -> Result<()> {
    for (name, reference) in golden.with_prefix(prefix) {
        report.compare(&format!("{prefix}{name}"), &value(params, name)?, reference, tolerance)?;
    }
    Ok(())
}

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    let config = config(golden)?;
    let moco = Moco::new(&config, &comm::single(), &mut Rng::new(0))?;
    golden.load_weights(moco.params())?;
    let training: Training = golden.config(&["lr", "sgd_momentum", "weight_decay"])?;
    let Training { lr, sgd_momentum: momentum, weight_decay } = training;
    // as the official script, which leaves it to the optimizer to pass over what has no gradient
    let mut sgd = Sgd { momentum, weight_decay, ..Sgd::default() }.over(&moco.params().all(), &[])?;
    let (im_q, im_k) = (golden.get("input.im_q")?, golden.get("input.im_k")?);

    let order = golden.get("input.idx_shuffle")?;
    let grads = step(golden, report, &moco, (im_q, im_k, order), ("step1", tolerance::MOCO))?;
    parameters(golden, report, moco.params(), "output.step1.buffer.", tolerance::MOCO)?;
    parameters(golden, report, moco.params(), "output.step1.param.", tolerance::MOCO)?;
    for (name, reference) in golden.with_prefix("grad.") {
        let param = moco.params().get(name).ok_or_else(|| Error::msg(format!("no parameter {name}")))?;
        let grad = grads.get(&param).ok_or_else(|| Error::msg(format!("no gradient of {name}")))?;
        report.compare(&format!("grad.{name}"), grad, reference, tolerance::MOCO_GRADIENT)?;
    }
    activations(golden, report, &moco)?;
    sgd.step(&grads, lr)?;
    parameters(golden, report, moco.params(), "output.step1.after_sgd.", tolerance::MOCO_SECOND)?;

    let order = golden.get("input.idx_shuffle2")?;
    let grads = step(golden, report, &moco, (im_k, im_q, order), ("step2", tolerance::MOCO_SECOND))?;
    sgd.step(&grads, lr)?;
    parameters(golden, report, moco.params(), "output.step2.after_sgd.", tolerance::MOCO_SECOND)
}

/// One step up to the gradients.
fn step(
    golden: &Golden,
    report: &mut Report,
    moco: &Moco,
    (im_q, im_k, order): (&Tensor, &Tensor, &Tensor),
    (step, allowed): (&str, f64),
) -> Result<Gradients> {
    let reference = |name: &str| golden.get(&format!("output.{step}.{name}"));
    let queue = value(moco.params(), "queue")?;
    let out = moco.forward_permuted(im_q, im_k, std::slice::from_ref(order))?;
    let logits = logits(&out, &queue, moco.config().temperature)?;
    let cross_entropy = logits.cross_entropy(reference("labels")?, &CrossEntropy::default())?;
    for (name, got) in [
        ("q", &out.q),
        ("k", &out.k),
        ("logits", &logits),
        ("loss", &out.loss.reshape([1])?),
        ("loss", &cross_entropy.reshape([1])?),
        ("acc1", &out.acc1.reshape([1])?),
        ("acc5", &out.acc5.reshape([1])?),
        ("queue", &value(moco.params(), "queue")?),
        ("queue_ptr", &value(moco.params(), "queue_ptr")?),
    ] {
        report.compare(&format!("{step}.{name}"), got, reference(name)?, allowed)?;
    }
    out.loss.backward()
}

/// What the encoders compute on the way: once more, for it does not depend on running statistics.
fn activations(golden: &Golden, report: &mut Report, moco: &Moco) -> Result<()> {
    let images = golden.get("input.im_q")?;
    let (q, k) = (moco.encoder_q(), moco.encoder_k());
    let maps = q.backbone().stages(images, true)?;
    let mut got = vec![("encoder_q.maxpool".to_owned(), maps.stem.clone())];
    let names = (1..).map(|i| format!("encoder_q.layer{i}"));
    got.extend(names.zip(maps.stages));
    let pooled = q.backbone().forward(images, true)?;
    got.push(("encoder_q.avgpool".into(), pooled.unsqueeze(-1)?.unsqueeze(-1)?));
    got.push(("encoder_q.out".into(), q.forward(images, true)?));
    let shuffled = golden.get("input.im_k")?.index_select(0, golden.get("input.idx_shuffle")?)?;
    got.push(("encoder_k.out".into(), k.forward(&shuffled, true)?));
    for (name, got) in got {
        report.compare(&name, &got, golden.get(&format!("output.step1.{name}"))?, tolerance::MOCO)?;
    }
    Ok(())
}
