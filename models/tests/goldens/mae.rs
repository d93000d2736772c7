//! The autoencoder: every intermediate, the three losses, gradients.

use super::{
    file::{Golden, Report},
    tolerance,
};
use smalti::{PatchOrder, Result, Rng};
use smalti_models::mae::{Mae, MaeConfig};

const KEYS: &[&str] = &[
    "img_size",
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "decoder_embed_dim",
    "decoder_depth",
    "decoder_num_heads",
    "mlp_ratio",
    "qkv_bias",
    "layer_norm_eps",
    "gelu",
    "mask_ratio",
    "norm_pix_loss",
    "target_eps",
];

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    let config: MaeConfig = golden.config(KEYS)?;
    let mae = Mae::new(&config, &mut Rng::new(0))?;
    // The tables are built here, so they are compared before the file's take their place.
    for name in ["pos_embed", "decoder_pos_embed"] {
        if let (Some(table), Ok(reference)) = (mae.params().get(name), golden.get(&format!("weight.{name}")))
        {
            report.compare(name, &table.value(), reference, tolerance::TABLE)?;
        }
    }
    golden.load_weights(mae.params())?;
    let images = golden.get("input.imgs")?;
    let out = mae.forward(images, mae.mask(golden.get("input.noise")?)?)?;
    outputs(golden, report, &mae, &out)?;
    let grads = out.loss.backward()?;
    golden.compare_grads(report, mae.params(), &grads, tolerance::GRADIENT)
}

fn outputs(
    golden: &Golden,
    report: &mut Report,
    mae: &Mae,
    out: &smalti_models::mae::MaeOutput,
) -> Result<()> {
    let images = golden.get("input.imgs")?;
    let config = mae.config();
    let masking = &out.masking;
    report.compare("ids_keep", &masking.ids_keep, golden.get("output.ids_keep")?, 0.0)?;
    report.compare("ids_restore", &masking.ids_restore, golden.get("output.ids_restore")?, 0.0)?;
    report.compare("mask", &masking.mask, golden.get("output.mask")?, 0.0)?;
    let embedded = mae.encoder().patches(images, true)?;
    report.compare("patch_embed", &embedded, golden.get("output.patch_embed")?, tolerance::OUTPUT)?;
    report.compare("latent", &out.latent, golden.get("output.latent")?, tolerance::OUTPUT)?;
    report.compare("pred", &out.pred, golden.get("output.pred")?, tolerance::OUTPUT)?;
    let p = config.patch_size;
    let reconstruction = out.pred.unpatchify(p, config.vit().grid()?, PatchOrder::ChannelLast)?;
    report.compare(
        "reconstruction",
        &reconstruction,
        golden.get("output.reconstruction")?,
        tolerance::OUTPUT,
    )?;
    report.compare("loss", &out.loss, golden.get("output.loss")?, tolerance::LOSS)
}
