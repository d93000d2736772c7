//! Weights of the official code and of open_clip.
//!
//! The official tree (Flax; a released checkpoint has to be turned into one safetensors file first, names joined by
//! dots) has kernels `[in, out]` and q, k, v apart. [`from_official`] turns it into open_clip's layout:
//!
//! | official | here | change |
//! | --- | --- | --- |
//! | `img_encoder.embedding.kernel` `[p, p, C, D]` | `visual.conv1.weight` `[D, C, p, p]` | permuted |
//! | `img_encoder.embedding.bias` | `visual.conv1.bias` | |
//! | `img_encoder.cls` `[1, 1, D]` | `visual.class_embedding` `[D]` | reshaped |
//! | `img_encoder.posembed_encoder.pos_embedding` `[1, 1 + L, D]` | `visual.positional_embedding` `[1 + L, D]` | reshaped |
//! | `txt_encoder.posembed_encoder.pos_embedding` `[1, T, D]` | `positional_embedding` `[T, D]` | reshaped |
//! | `txt_encoder.token_embedding.embedding` | `token_embedding.weight` | |
//! | `{t}_encoder.Transformer.encoder_norm.scale`, `.bias` | `visual.ln_post.weight` or `ln_final.weight`, `.bias` | |
//! | `img_mlp1.kernel`, `txt_mlp1.kernel` `[D, E]` | `visual.proj`, `text_projection` | |
//! | `logit_scale` `[1]` | `logit_scale` `[]` | reshaped |
//!
//! and in block `{t}_encoder.Transformer.encoderblock_NN`, here `visual.transformer.resblocks.N` or
//! `transformer.resblocks.N`:
//!
//! | official | here | change |
//! | --- | --- | --- |
//! | `LayerNorm_0.scale`, `LayerNorm_1.scale`, `.bias` | `ln_1.weight`, `ln_2.weight`, `.bias` | |
//! | `MultiHeadDotProductAttention_0.{query, key, value}.kernel` | `attn.in_proj_weight` `[3D, D]` | each transposed, stacked |
//! | `MultiHeadDotProductAttention_0.{query, key, value}.bias` | `attn.in_proj_bias` `[3D]` | stacked |
//! | `MultiHeadDotProductAttention_0.out.kernel`, `.bias` | `attn.out_proj.weight`, `.bias` | transposed |
//! | `MlpBlock_0.Dense_0.kernel`, `Dense_1.kernel`, `.bias` | `mlp.c_fc.weight`, `mlp.c_proj.weight`, `.bias` | transposed |

use super::{Flip, Variant};
use smalti::{
    Error, Result, Tensor, io,
    nn::{LoadOptions, LoadReport, pos_embed},
};
use std::{collections::BTreeMap, path::Path};

/// Tensors by name.
pub type Named = Vec<(String, Tensor)>;

impl Flip {
    /// Loads a file of either code (safetensors or `.pth`), told by its names; every parameter must be there.
    ///
    /// # Errors
    /// If the file is damaged, or names or shapes differ: all of them are listed. Nothing has been changed then.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<LoadReport> {
        let path = path.as_ref();
        self.load_tensors(io::load(path)?.tensors()).map_err(|e| Error::format(path, e.to_string()))
    }

    /// Loads tensors with the names of either code. A table of image positions for another image size is resized
    /// if it is learned (bicubic, antialiased), and left as it is here if it is fixed.
    ///
    /// # Errors
    /// If names or shapes differ; nothing has been changed then.
    pub fn load_tensors(&self, tensors: Named) -> Result<LoadReport> {
        let official = tensors.iter().any(|(name, _)| name.contains("img_encoder."));
        let mut tensors = if official { from_official(tensors)? } else { from_open_clip(tensors) };
        for (name, tensor) in &mut tensors {
            let Some(param) = self.params().get(name) else { continue };
            let value = param.value();
            if name == "visual.positional_embedding" && tensor.shape() != value.shape() {
                *tensor = match self.config().variant {
                    Variant::Official => value,
                    Variant::OpenClip => {
                        let grid = self.config().vit().grid()?;
                        pos_embed::resize_with(&tensor.unsqueeze(0)?, 1, grid, true)?.select(0, 0)?
                    }
                };
            } else if name == "logit_scale" && tensor.numel() == 1 {
                *tensor = tensor.reshape(value.shape())?;
            }
        }
        self.params().load_tensors(&tensors, &LoadOptions::default())
    }
}

/// What old files hold besides weights: the causal mask, and OpenAI's three sizes.
const NO_WEIGHTS: [&str; 4] = ["attn_mask", "input_resolution", "context_length", "vocab_size"];

/// Names of an open_clip state dict as they are here: without the prefix `module.` of distributed training, the
/// prefix `text.` of the class CustomTextCLIP, and what is no weight.
pub fn from_open_clip(tensors: Named) -> Named {
    let plain = |name: String| {
        let name = name.strip_prefix("module.").unwrap_or(&name);
        name.strip_prefix("text.").unwrap_or(name).to_owned()
    };
    let tensors = tensors.into_iter().map(|(name, tensor)| (plain(name), tensor));
    tensors.filter(|(name, _)| !NO_WEIGHTS.contains(&name.as_str())).collect()
}

/// The official tree under the names and in the layouts that are used here; see the table above. It is a
/// permutation of numbers, so that it serves gradients too.
///
/// # Errors
/// If a name is none of the official model, a tensor has another rank, or one of q, k and v is missing.
pub fn from_official(tensors: Named) -> Result<Named> {
    let mut converted = Vec::new();
    let mut stacks: BTreeMap<String, [Option<Tensor>; 3]> = BTreeMap::new();
    for (name, tensor) in tensors {
        let bad = |e: Error| Error::msg(format!("official weight {name} {:?}: {e}", tensor.shape()));
        let leaf = name.strip_prefix("target.").unwrap_or(&name);
        let (to, change) =
            place(leaf).ok_or_else(|| Error::msg(format!("no official weight is named {name}")))?;
        match change {
            Change::None => converted.push((to, tensor)),
            Change::Flat => converted.push((to, tensor.reshape([tensor.numel()]).map_err(bad)?)),
            Change::Rows => converted.push((to, tensor.squeeze(0).map_err(bad)?)),
            Change::Transpose => converted.push((to, tensor.t().map_err(bad)?)),
            Change::Patch => converted.push((to, tensor.permute([3, 2, 0, 1]).map_err(bad)?)),
            Change::Stack(part) => {
                let tensor = if tensor.rank() == 2 { tensor.t().map_err(bad)? } else { tensor };
                stacks.entry(to).or_default()[part] = Some(tensor);
            }
        }
    }
    for (name, parts) in stacks {
        let [Some(q), Some(k), Some(v)] = &parts else {
            return Err(Error::msg(format!(
                "official weights: query, key and value of {name} are not all there"
            )));
        };
        converted.push((name, Tensor::cat(&[q, k, v], 0)?));
    }
    Ok(converted)
}

/// What is done with an official tensor.
#[derive(Clone, Copy)]
enum Change {
    None,
    /// To one axis.
    Flat,
    /// The first axis, of one element, goes.
    Rows,
    Transpose,
    /// `[p, p, C, D]` to `[D, C, p, p]`.
    Patch,
    /// Part 0, 1 or 2 of the rows, transposed if it is a matrix.
    Stack(usize),
}

fn place(name: &str) -> Option<(String, Change)> {
    let (to, change) = match name {
        "logit_scale" => return Some((name.to_owned(), Change::None)),
        "img_mlp1.kernel" => ("visual.proj", Change::None),
        "txt_mlp1.kernel" => ("text_projection", Change::None),
        "img_encoder.embedding.kernel" => ("visual.conv1.weight", Change::Patch),
        "img_encoder.embedding.bias" => ("visual.conv1.bias", Change::None),
        "img_encoder.cls" => ("visual.class_embedding", Change::Flat),
        "img_encoder.posembed_encoder.pos_embedding" => ("visual.positional_embedding", Change::Rows),
        "txt_encoder.posembed_encoder.pos_embedding" => ("positional_embedding", Change::Rows),
        "txt_encoder.token_embedding.embedding" => ("token_embedding.weight", Change::None),
        _ => return in_transformer(name),
    };
    Some((to.to_owned(), change))
}

fn in_transformer(name: &str) -> Option<(String, Change)> {
    let (tower, rest) = name.split_once("_encoder.Transformer.")?;
    let (prefix, last_norm) = match tower {
        "img" => ("visual.", "ln_post"),
        "txt" => ("", "ln_final"),
        _ => return None,
    };
    if let Some(leaf) = rest.strip_prefix("encoder_norm.") {
        return Some((format!("{prefix}{last_norm}.{}", norm_leaf(leaf)?), Change::None));
    }
    let (block, part) = rest.strip_prefix("encoderblock_")?.split_once('.')?;
    let block: usize = block.parse().ok()?;
    let (to, change) = in_block(part)?;
    Some((format!("{prefix}transformer.resblocks.{block}.{to}"), change))
}

fn in_block(part: &str) -> Option<(String, Change)> {
    let (layer, leaf) = part.rsplit_once('.')?;
    let (to, stack) = match layer {
        "LayerNorm_0" => return Some((format!("ln_1.{}", norm_leaf(leaf)?), Change::None)),
        "LayerNorm_1" => return Some((format!("ln_2.{}", norm_leaf(leaf)?), Change::None)),
        "MlpBlock_0.Dense_0" => ("mlp.c_fc.", None),
        "MlpBlock_0.Dense_1" => ("mlp.c_proj.", None),
        _ => match layer.strip_prefix("MultiHeadDotProductAttention_0.")? {
            "query" => ("attn.in_proj_", Some(0)),
            "key" => ("attn.in_proj_", Some(1)),
            "value" => ("attn.in_proj_", Some(2)),
            "out" => ("attn.out_proj.", None),
            _ => return None,
        },
    };
    let (leaf, change) = match leaf {
        "kernel" => ("weight", Change::Transpose),
        "bias" => ("bias", Change::None),
        _ => return None,
    };
    Some((format!("{to}{leaf}"), stack.map_or(change, Change::Stack)))
}

fn norm_leaf(leaf: &str) -> Option<&'static str> {
    match leaf {
        "scale" => Some("weight"),
        "bias" => Some("bias"),
        _ => None,
    }
}
