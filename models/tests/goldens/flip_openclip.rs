//! open_clip's CLIP with patch dropout: every intermediate, the loss, gradients; evaluation on all patches, the other
//! activation, pooling of patches.

use super::{
    file::{Golden, Report},
    flip::{blocks, compare_features, gradients, kept, named, outputs, text_tower, unmasked},
    tolerance,
};
use smalti::{Error, Result, Rng, comm};
use smalti_models::{
    backbones::{text::TextConfig, vit::ImageSize},
    flip::{Flip, FlipConfig, ImageConfig, ImagePool, Masking, TextMasking, Variant},
};

#[derive(serde::Deserialize)]
struct Config {
    embed_dim: usize,
    vision_cfg: Vision,
    text_cfg: TextConfig,
    quick_gelu: bool,
    num_keep: usize,
}

#[derive(serde::Deserialize)]
struct Vision {
    image_size: usize,
    patch_size: usize,
    width: usize,
    layers: usize,
    head_width: usize,
    mlp_ratio: f64,
    patch_dropout: f64,
}

const KEYS: &[&str] = &["embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "num_keep"];

impl Config {
    fn flip(&self) -> FlipConfig {
        let vision = &self.vision_cfg;
        FlipConfig {
            variant: Variant::OpenClip,
            embed_dim: self.embed_dim,
            image: ImageConfig {
                img_size: ImageSize::Square(vision.image_size),
                patch_size: vision.patch_size,
                in_chans: 3,
                width: vision.width,
                layers: vision.layers,
                heads: vision.width / vision.head_width,
                mlp_ratio: vision.mlp_ratio,
            },
            text: self.text_cfg.clone(),
            mask_ratio: vision.patch_dropout,
            text_mask_ratio: 0.0,
            text_masking: TextMasking::Prioritised,
            quick_gelu: self.quick_gelu,
            image_pool: None,
        }
    }
}

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    let config: Config = golden.config(KEYS)?;
    let flip = model(golden, &config.flip())?;
    let masking = kept(golden, report, &flip, config.num_keep)?;
    image_tower(golden, report, &flip, &masking)?;
    text_tower(golden, report, &flip, ["text.tokens", "text.ln_final"])?;
    let (images, tokens) = (golden.get("input.image")?, golden.get("input.text")?);
    let out = flip.forward(images, tokens, &masking, &comm::single())?;
    outputs(golden, report, &flip, &out)?;
    gradients(report, &flip, &out.loss.backward()?, named(golden, "grad."))?;
    unmasked(golden, report, &flip)?;
    let others = [
        ("other_gelu.", FlipConfig { quick_gelu: !config.quick_gelu, ..config.flip() }),
        ("avg_pool.", FlipConfig { image_pool: Some(ImagePool::Patches), ..config.flip() }),
    ];
    for (prefix, config) in others {
        let out = model(golden, &config)?.forward(images, tokens, &masking, &comm::single())?;
        compare_features(golden, report, prefix, &out)?;
    }
    Ok(())
}

fn model(golden: &Golden, config: &FlipConfig) -> Result<Flip> {
    let flip = Flip::new(config, &mut Rng::new(0))?;
    flip.load_tensors(named(golden, "weight."))?;
    Ok(flip)
}

fn image_tower(golden: &Golden, report: &mut Report, flip: &Flip, masking: &Masking) -> Result<()> {
    let (images, tower) = (golden.get("input.image")?, flip.image());
    let all = tower.embed(images, None)?;
    report.compare("image.embed", &all, golden.get("output.image.embed")?, tolerance::OUTPUT)?;
    let x = tower.embed(images, masking.image.as_ref())?;
    report.compare("image.kept", &x, golden.get("output.image.kept")?, tolerance::OUTPUT)?;
    let norm = tower.ln_pre().ok_or_else(|| Error::msg("this variant has a norm before the blocks"))?;
    let x = norm.forward(&x)?;
    report.compare("image.ln_pre", &x, golden.get("output.image.ln_pre")?, tolerance::OUTPUT)?;
    let x = tower.ln_post().forward(&blocks(golden, report, "image", tower.blocks(), x)?)?;
    report.compare("image.ln_post", &x, golden.get("output.image.ln_post")?, tolerance::OUTPUT)
}
