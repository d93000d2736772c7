//! First values of the parameters.

use super::{FlipConfig, Variant};
use smalti::{
    Result, Rng,
    nn::{Param, Params, init},
};

/// Gives all parameters the variant's first values, those apart that the towers have set already: tables of
/// embeddings, norms and the scale.
pub(super) fn initialise(params: &Params, config: &FlipConfig, rng: &mut Rng) -> Result<()> {
    for param in params.all() {
        match config.variant {
            Variant::Official => official(&param, rng)?,
            Variant::OpenClip => open_clip(&param, config, rng)?,
        }
    }
    Ok(())
}

fn zero(param: &Param) -> Result<()> {
    param.set(&init::zeros(param.value().shape())?.contiguous()?)
}

/// Xavier for every matrix, q, k and v counted as one; biases 0.
fn official(param: &Param, rng: &mut Rng) -> Result<()> {
    let (name, shape) = (param.name(), param.value().shape().to_vec());
    if name.ends_with("bias") {
        return zero(param);
    }
    if shape.len() < 2 || name.ends_with("embedding") || name == "token_embedding.weight" {
        return Ok(());
    }
    param.set(&init::xavier_uniform(shape, rng)?)
}

/// The image tower has PyTorch's defaults, which are there already but for the attention, and tokens and projection
/// scaled by the width; the text tower has CLIP's normals, those of the residual branches smaller with the depth.
fn open_clip(param: &Param, config: &FlipConfig, rng: &mut Rng) -> Result<()> {
    let (name, shape) = (param.name(), param.value().shape().to_vec());
    let root = |width: usize| (width as f64).powf(-0.5);
    if name.ends_with("in_proj_bias") || name.ends_with("out_proj.bias") {
        return zero(param);
    }
    if let Some(name) = name.strip_prefix("visual.") {
        return match name {
            "class_embedding" | "proj" => param.set(&init::normal(shape, root(config.image.width), rng)?),
            // PyTorch's default of a convolution, from -1/sqrt(fan_in) to 1/sqrt(fan_in)
            "conv1.weight" => {
                let fan_in = shape[1..].iter().product();
                param.set(&init::fan_in_uniform(shape, fan_in, rng)?)
            }
            _ if name.ends_with("in_proj_weight") => param.set(&init::xavier_uniform(shape, rng)?),
            _ => Ok(()),
        };
    }
    let (width, layers) = (config.text.width, config.text.layers);
    let std = match name
        .rsplit_once("resblocks.")
        .map_or(name, |(_, part)| part.trim_start_matches(char::is_numeric))
    {
        "positional_embedding" => 0.01,
        "text_projection" | ".attn.in_proj_weight" => root(width),
        ".attn.out_proj.weight" | ".mlp.c_proj.weight" => root(width) * root(2 * layers),
        ".mlp.c_fc.weight" => root(2 * width),
        _ => return Ok(()),
    };
    param.set(&init::normal(shape, std, rng)?)
}
