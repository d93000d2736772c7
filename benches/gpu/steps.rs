//! Whole training steps: forward, backward, optimizer.

use crate::measure::Timer;
use serde_json::{Value, json};
use smalti::{
    DType, Error, Result, Rng, Tensor,
    optim::{AdamW, Algorithm, Optimizer},
};
use smalti_models::{
    backbones::vit::ImageSize,
    mae::{Mae, MaeConfig},
};
use std::cell::RefCell;

/// The lines of one step, without its name and shape.
pub fn run(timer: &Timer, kind: &str, shape: &Value) -> Result<Vec<Value>> {
    match kind {
        "mae-vit-l" => mae(timer, shape),
        other => Err(Error::msg(format!("smalti has no model for the step {other} yet"))),
    }
}

fn size(shape: &Value, key: &str) -> Result<usize> {
    let found = shape[key].as_u64().ok_or_else(|| Error::msg(format!("the shape {shape} has no {key}")))?;
    Ok(found as usize)
}

/// Masked autoencoder in bf16 with f32 masters in the optimizer.
fn mae(timer: &Timer, shape: &Value) -> Result<Vec<Value>> {
    let at = |key: &str| size(shape, key);
    let (image, patch) = (at("image")?, at("patch")?);
    let patches = (image / patch) * (image / patch);
    let config = MaeConfig {
        img_size: ImageSize::Square(image),
        patch_size: patch,
        embed_dim: at("dim")?,
        depth: at("depth")?,
        num_heads: at("heads")?,
        decoder_embed_dim: at("dec_dim")?,
        decoder_depth: at("dec_depth")?,
        decoder_num_heads: at("dec_heads")?,
        mask_ratio: 1.0 - at("keep")? as f64 / patches as f64,
        norm_pix_loss: true,
        ..MaeConfig::preset("large").ok_or_else(|| Error::msg("no preset `large`"))?
    };
    let mut rng = Rng::new(1);
    let model = Mae::new(&config, &mut rng)?;
    model.params().to_dtype(DType::BF16)?;
    let n = at("batch")?;
    let images = Tensor::randn([n, 3, image, image], &mut rng)?;
    let noise = Tensor::rand([n, patches], &mut rng)?;
    let optimizer =
        RefCell::new(AdamW { weight_decay: 0.05, ..AdamW::default() }.over(&model.params().trained(), &[])?);
    let mut fields = timer.time(&[()], |()| {
        let loss = model.forward(&images, model.mask(&noise)?)?.loss;
        optimizer.borrow_mut().step(&loss.backward()?, 1e-4)
    })?;
    if let Some(ms) = fields["ms_median"].as_f64() {
        fields.insert("images_per_s".into(), json!(n as f64 / ms * 1e3));
    }
    fields.insert("direction".into(), json!("step"));
    fields.insert("dtype".into(), json!("bf16, f32 masters"));
    Ok(vec![Value::Object(fields)])
}
