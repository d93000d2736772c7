//! FLIP by the official code: every intermediate, the loss, gradients; evaluation on all patches, the clamped scale.

use super::{
    file::{Golden, Report},
    tolerance,
};
use smalti::{Error, Gradients, Result, Rng, Tensor, comm, nn::Block};
use smalti_models::{
    backbones::{text::TextConfig, vit::ImageSize},
    flip::{
        Flip, FlipConfig, FlipOutput, ImageConfig, Masking, TextMasking, Variant,
        checkpoint::{Named, from_official},
    },
};

#[derive(serde::Deserialize)]
struct Config {
    image_size: usize,
    patch_size: usize,
    img_width: usize,
    img_layers: usize,
    img_heads: usize,
    img_mlp: usize,
    mask_ratio: f64,
    num_keep: usize,
    vocab_size: usize,
    context_length: usize,
    txt_width: usize,
    txt_layers: usize,
    txt_heads: usize,
    txt_mlp: usize,
    embed_dim: usize,
}

const KEYS: &[&str] = &[
    "image_size",
    "patch_size",
    "img_width",
    "img_layers",
    "img_heads",
    "img_mlp",
    "mask_ratio",
    "num_keep",
    "vocab_size",
    "context_length",
    "txt_width",
    "txt_layers",
    "txt_heads",
    "txt_mlp",
    "embed_dim",
];

impl Config {
    fn flip(&self) -> FlipConfig {
        FlipConfig {
            variant: Variant::Official,
            embed_dim: self.embed_dim,
            image: ImageConfig {
                img_size: ImageSize::Square(self.image_size),
                patch_size: self.patch_size,
                in_chans: 3,
                width: self.img_width,
                layers: self.img_layers,
                heads: self.img_heads,
                mlp_ratio: self.img_mlp as f64 / self.img_width as f64,
            },
            text: TextConfig {
                vocab_size: self.vocab_size,
                context_length: self.context_length,
                width: self.txt_width,
                layers: self.txt_layers,
                heads: self.txt_heads,
                mlp_ratio: self.txt_mlp as f64 / self.txt_width as f64,
            },
            mask_ratio: self.mask_ratio,
            text_mask_ratio: 0.0,
            text_masking: TextMasking::Prioritised,
            quick_gelu: false,
            image_pool: None,
        }
    }
}

/// Tensors under `prefix`, without it.
pub fn named(golden: &Golden, prefix: &str) -> Named {
    golden.with_prefix(prefix).map(|(name, t)| (name.to_owned(), t.clone())).collect()
}

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    let config: Config = golden.config(KEYS)?;
    let flip = Flip::new(&config.flip(), &mut Rng::new(0))?;
    let weights = from_official(named(golden, "weight."))?;
    // The table is built here, so it is compared before the file's takes its place.
    for (name, reference) in &weights {
        if let (true, Some(own)) = (name == "visual.positional_embedding", flip.params().get(name)) {
            report.compare(name, &own.value(), reference, tolerance::TABLE)?;
        }
    }
    flip.load_tensors(named(golden, "weight."))?;
    let masking = kept(golden, report, &flip, config.num_keep)?;
    image_tower(golden, report, &flip, &masking)?;
    text_tower(golden, report, &flip, ["text.tokens", "text.norm"])?;
    let out =
        flip.forward(golden.get("input.image")?, golden.get("input.text")?, &masking, &comm::single())?;
    outputs(golden, report, &flip, &out)?;
    report.compare("tau", &out.scale.recip()?.reshape([1])?, golden.get("output.tau")?, tolerance::OUTPUT)?;
    official_gradients(golden, report, &flip, &out.loss.backward()?)?;
    unmasked(golden, report, &flip)?;
    clamped(golden, report, &flip, &masking)
}

/// The masking that the file's noise gives, compared with the file's own.
pub fn kept(golden: &Golden, report: &mut Report, flip: &Flip, count: usize) -> Result<Masking> {
    let ids = flip.keep_patches(golden.get("input.noise")?)?;
    smalti::ensure!(ids.shape()[1] == count, "flip", "{count} patches are to be kept, got {:?}", ids.shape());
    report.compare("ids_keep", &ids, golden.get("input.ids_keep")?, 0.0)?;
    Ok(Masking { image: Some(ids), text: None })
}

fn image_tower(golden: &Golden, report: &mut Report, flip: &Flip, masking: &Masking) -> Result<()> {
    let (images, tower) = (golden.get("input.image")?, flip.image());
    let all = tower.embed(images, None)?;
    let patches = all.narrow(1, 1, all.shape()[1] - 1)?;
    let reference = golden.get("output.image.patch_tokens")?;
    report.compare("image.patch_tokens", &patches, reference, tolerance::OUTPUT)?;
    let x = tower.embed(images, masking.image.as_ref())?;
    let x = blocks(golden, report, "image", tower.blocks(), x)?;
    let x = tower.ln_post().forward(&x)?;
    report.compare("image.norm", &x, golden.get("output.image.norm")?, tolerance::OUTPUT)
}

/// The names are those of the tokens with positions, if the file has them, and of the last norm.
pub fn text_tower(
    golden: &Golden,
    report: &mut Report,
    flip: &Flip,
    [tokens, norm]: [&str; 2],
) -> Result<()> {
    let tower = flip.text();
    let x = tower.embed(golden.get("input.text")?, None)?;
    if let Ok(reference) = golden.get(&format!("output.{tokens}")) {
        report.compare(tokens, &x, reference, tolerance::OUTPUT)?;
    }
    let x = tower.norm().forward(&blocks(golden, report, "text", tower.blocks(), x)?)?;
    report.compare(norm, &x, golden.get(&format!("output.{norm}"))?, tolerance::OUTPUT)
}

pub fn blocks(
    golden: &Golden,
    report: &mut Report,
    tower: &str,
    blocks: &[Block],
    mut x: Tensor,
) -> Result<Tensor> {
    for (i, block) in blocks.iter().enumerate() {
        x = block.forward(&x, None)?;
        let name = format!("{tower}.block{i}");
        report.compare(&name, &x, golden.get(&format!("output.{name}"))?, tolerance::OUTPUT)?;
    }
    Ok(x)
}

/// Features, logits, both directions of the loss.
pub fn outputs(golden: &Golden, report: &mut Report, flip: &Flip, out: &FlipOutput) -> Result<()> {
    compare_features(golden, report, "", out)?;
    let (image, text, scale) = (&out.image_features, &out.text_features, flip.scale()?);
    for (name, a, b) in [("loss_image_to_text", image, text), ("loss_text_to_image", text, image)] {
        if let Ok(reference) = golden.get(&format!("output.{name}")) {
            let loss = a.contrastive_cross_entropy(b, &scale, 0)?.reshape([1])?;
            report.compare(name, &loss, reference, tolerance::LOSS)?;
        }
    }
    Ok(())
}

/// Features, logits and loss of one way of running the model; `prefix` is "" or ends in a dot.
pub fn compare_features(golden: &Golden, report: &mut Report, prefix: &str, out: &FlipOutput) -> Result<()> {
    let logits = out.image_features.matmul(&out.text_features.t()?)?.mul(&out.scale)?;
    let got = [
        ("image_features", &out.image_features, tolerance::OUTPUT),
        ("text_features", &out.text_features, tolerance::OUTPUT),
        ("logits", &logits, tolerance::OUTPUT),
        ("loss", &out.loss.reshape([1])?, tolerance::LOSS),
    ];
    for (name, got, tolerance) in got {
        let name = format!("{prefix}{name}");
        if let Ok(reference) = golden.get(&format!("output.{name}")) {
            report.compare(&name, got, reference, tolerance)?;
        }
    }
    Ok(())
}

/// Every gradient of the file, by this model's names.
pub fn gradients(report: &mut Report, flip: &Flip, grads: &Gradients, references: Named) -> Result<()> {
    for (name, reference) in references {
        let grad = gradient(flip, grads, &name)?.reshape(reference.shape())?;
        report.compare(&format!("grad.{name}"), &grad, &reference, tolerance::GRADIENT)?;
    }
    Ok(())
}

/// Zeros for what is not trained.
fn gradient(flip: &Flip, grads: &Gradients, name: &str) -> Result<Tensor> {
    let param = flip.params().get(name).ok_or_else(|| Error::msg(format!("no parameter {name}")))?;
    grads.get(&param).cloned().map_or_else(|| param.value().zeros_like(), Ok)
}

/// The same by the official names. The file lacks some, also single ones of q, k and v, which are one parameter here:
/// zeros and ones that take the same way as the numbers tell which of them it has.
fn official_gradients(golden: &Golden, report: &mut Report, flip: &Flip, grads: &Gradients) -> Result<()> {
    let (mut references, mut known) = (Vec::new(), Vec::new());
    for (name, weight) in named(golden, "weight.") {
        let stored = golden.get(&format!("grad.{name}")).ok();
        references.push((name.clone(), stored.map_or_else(|| weight.zeros_like(), |g| Ok(g.clone()))?));
        known.push((name, if stored.is_some() { weight.ones_like()? } else { weight.zeros_like()? }));
    }
    let known = from_official(known)?;
    for ((name, reference), (_, known)) in from_official(references)?.into_iter().zip(known) {
        if known.amax(())?.item()? == 0.0 {
            continue;
        }
        let grad = gradient(flip, grads, &name)?.reshape(reference.shape())?.mul(&known)?;
        report.compare(&format!("grad.{name}"), &grad, &reference, tolerance::GRADIENT)?;
    }
    Ok(())
}

pub fn unmasked(golden: &Golden, report: &mut Report, flip: &Flip) -> Result<()> {
    let (images, tokens) = (golden.get("input.image")?, golden.get("input.text")?);
    let out = flip.forward(images, tokens, &Masking::default(), &comm::single())?;
    compare_features(golden, report, "unmasked.", &out)
}

/// The scale's logarithm above its bound.
fn clamped(golden: &Golden, report: &mut Report, flip: &Flip, masking: &Masking) -> Result<()> {
    let param =
        |name: &str| flip.params().get(name).ok_or_else(|| Error::msg(format!("no parameter {name}")));
    let (log, projection) = (param("logit_scale")?, param("visual.proj")?);
    log.set(&log.value().full_like(5.0)?.contiguous()?)?;
    let out =
        flip.forward(golden.get("input.image")?, golden.get("input.text")?, masking, &comm::single())?;
    let reference = |name: &str| golden.get(&format!("output.clamped.{name}"));
    report.compare("clamped.loss", &out.loss.reshape([1])?, reference("loss")?, tolerance::LOSS)?;
    report.compare("clamped.tau", &out.scale.recip()?.reshape([1])?, reference("tau")?, tolerance::OUTPUT)?;
    let grads = out.loss.backward()?;
    let grad = |param| grads.get(param).ok_or_else(|| Error::msg("no gradient"));
    let name = "clamped.grad.logit_scale";
    report.compare(name, &grad(&log)?.reshape([1])?, reference("grad.logit_scale")?, 0.0)?;
    let name = "clamped.grad.img_mlp1.kernel";
    report.compare(name, grad(&projection)?, reference("grad.img_mlp1.kernel")?, tolerance::GRADIENT)
}
