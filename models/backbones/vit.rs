//! The plain vision transformer with timm's parameter names.
//!
//! Source: Dosovitskiy et al., ICLR 2021; sizes and initialisation as in MAE (He et al., CVPR 2022).

use super::{blocks, stem::Stem};
use serde::{Deserialize, Serialize};
use smalti::{
    PatchOrder, Result, Rng, Tensor, ensure,
    nn::{
        Block, BlockConfig, BlockNames, Gelu, LayerNorm, Linear, Param, Params, Statistics, init, pos_embed,
    },
};

/// Height and width of the input: `224`, or `[224, 320]` in recipes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ImageSize {
    /// Both the same.
    Square(usize),
    /// [height, width]
    Rectangle([usize; 2]),
}

impl ImageSize {
    /// [height, width]
    pub fn height_width(self) -> [usize; 2] {
        match self {
            ImageSize::Square(n) => [n, n],
            ImageSize::Rectangle(size) => size,
        }
    }
}

/// Sizes of the encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct VitConfig {
    pub img_size: ImageSize,
    pub patch_size: usize,
    #[serde(default = "three")]
    pub in_chans: usize,
    pub embed_dim: usize,
    pub depth: usize,
    pub num_heads: usize,
    #[serde(default = "four")]
    pub mlp_ratio: f64,
    #[serde(default = "yes")]
    pub qkv_bias: bool,
    #[serde(default = "tiny")]
    pub layer_norm_eps: f64,
    #[serde(default)]
    pub gelu: Gelu,
    /// A [`ConvStem`](super::ConvStem) in the patch projection's place.
    #[serde(default)]
    pub conv_stem: bool,
}

pub(crate) fn three() -> usize {
    3
}
pub(crate) fn four() -> f64 {
    4.0
}
pub(crate) fn yes() -> bool {
    true
}
pub(crate) fn tiny() -> f64 {
    1e-6
}

impl VitConfig {
    /// `base` (ViT-B/16), `large` (ViT-L/16) or `huge` (ViT-H/14) at 224 pixels.
    pub fn preset(name: &str) -> Option<VitConfig> {
        let (patch_size, embed_dim, depth, num_heads) = match name {
            "base" => (16, 768, 12, 12),
            "large" => (16, 1024, 24, 16),
            "huge" => (14, 1280, 32, 16),
            _ => return None,
        };
        Some(VitConfig {
            img_size: ImageSize::Square(224),
            patch_size,
            in_chans: 3,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio: 4.0,
            qkv_bias: true,
            layer_norm_eps: 1e-6,
            gelu: Gelu::Erf,
            conv_stem: false,
        })
    }

    /// Rows and columns of patches.
    ///
    /// # Errors
    /// If the image does not divide into patches.
    pub fn grid(&self) -> Result<[usize; 2]> {
        let [h, w] = self.img_size.height_width();
        let p = self.patch_size;
        ensure!(
            p > 0 && h > 0 && w > 0 && h % p == 0 && w % p == 0,
            "vit",
            "an image of {h} x {w} does not divide into patches of {p} x {p}"
        );
        Ok([h / p, w / p])
    }

    /// Number of patches.
    ///
    /// # Errors
    /// If the image does not divide into patches.
    pub fn patches(&self) -> Result<usize> {
        let [rows, columns] = self.grid()?;
        Ok(rows * columns)
    }

    pub(crate) fn block(&self, drop_path: f64) -> BlockConfig {
        BlockConfig {
            width: self.embed_dim,
            heads: self.num_heads,
            mlp_ratio: self.mlp_ratio,
            qkv_bias: self.qkv_bias,
            eps: self.layer_norm_eps,
            gelu: self.gelu,
            drop_path,
            causal: false,
            names: BlockNames::TIMM,
        }
    }
}

/// Projection of patches: a convolution with kernel = stride = patch, computed as a product over the patches
/// that are wanted. Registers `weight` `[D, C, p, p]` and `bias`.
#[derive(Clone, Debug)]
pub struct PatchEmbed {
    weight: Param,
    bias: Option<Param>,
    patch: usize,
}

impl PatchEmbed {
    pub(crate) fn new(params: &Params, config: &VitConfig, bias: bool, rng: &mut Rng) -> Result<PatchEmbed> {
        let p = config.patch_size;
        let shape = [config.embed_dim, config.in_chans, p, p];
        let weight = params.param("weight", init::xavier_uniform(shape, rng)?)?;
        let bias = match bias {
            // Not zeroed: MAE's official initialisation leaves the convolution's default.
            true => {
                let bias = init::fan_in_uniform([shape[0]], config.in_chans * p * p, rng)?;
                Some(params.param("bias", bias)?)
            }
            false => None,
        };
        Ok(PatchEmbed { weight, bias, patch: p })
    }

    /// Every patch, row by row: `[N, C, H, W]` to `[N, L, D]`.
    ///
    /// # Errors
    /// If the image does not divide into patches or has other channels.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        self.project(&images.patchify(self.patch, PatchOrder::ChannelFirst)?)
    }

    /// Only patches `ids` `[N, K]`: the others are not even read.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), or if an id is out of range.
    pub fn forward_kept(&self, images: &Tensor, ids: &Tensor) -> Result<Tensor> {
        self.project(&images.patchify_kept(ids, self.patch, PatchOrder::ChannelFirst)?)
    }

    fn project(&self, patches: &Tensor) -> Result<Tensor> {
        let weight = self.weight.get();
        let patches = patches.to_dtype(weight.dtype())?;
        patches.linear(&weight.flatten(1, -1)?, self.bias.as_ref().map(Param::get).as_ref())
    }
}

/// Patch projection, class token, positions and blocks: what MAE pre-trains and classifiers build on.
#[derive(Clone, Debug)]
pub struct Encoder {
    cls_token: Param,
    pos_embed: Param,
    stem: Stem,
    blocks: Vec<Block>,
    config: VitConfig,
}

/// Tokens `[N, K, D]` with their positions' rows of the table `[L, D]`: rows `ids` `[N, K]`, or all L in order.
pub(crate) fn add_positions(x: &Tensor, table: &Tensor, ids: Option<&Tensor>) -> Result<Tensor> {
    match ids {
        Some(ids) => x.add(&table.index_select(0, &ids.flatten(0, 1)?)?.reshape(x.shape())?),
        None => x.add(table),
    }
}

/// Drop-path rate of block `i` of `depth`: rising linearly from 0 to `rate`.
pub fn drop_path_rate(rate: f64, i: usize, depth: usize) -> f64 {
    if depth > 1 { rate * i as f64 / (depth - 1) as f64 } else { 0.0 }
}

impl Encoder {
    /// Cut in two, since the official state dict has other tokens between the class token and the patches.
    pub(crate) fn tokens(params: &Params, config: &VitConfig, rng: &mut Rng) -> Result<[Param; 2]> {
        let [rows, columns] = config.grid()?;
        let table = pos_embed::sin_cos_2d(config.embed_dim, rows, columns, pos_embed::First::Column)?;
        let cls_token = params.param("cls_token", init::normal([1, 1, config.embed_dim], 0.02, rng)?)?;
        let pos_embed = params.param("pos_embed", pos_embed::with_class_rows(&table, 1)?)?;
        Ok([cls_token, pos_embed])
    }

    pub(crate) fn new(
        params: &Params,
        tokens: [Param; 2],
        config: &VitConfig,
        drop_path: f64,
        rng: &mut Rng,
    ) -> Result<Encoder> {
        let stem = Stem::new(&params.sub("patch_embed"), config, Statistics::Batch, rng)?;
        Encoder::behind(stem, params, tokens, config, drop_path, rng)
    }

    pub(crate) fn behind(
        stem: Stem,
        params: &Params,
        [cls_token, pos_embed]: [Param; 2],
        config: &VitConfig,
        drop_path: f64,
        rng: &mut Rng,
    ) -> Result<Encoder> {
        let blocks = (0..config.depth)
            .map(|i| {
                let rate = drop_path_rate(drop_path, i, config.depth);
                Block::new(&params.sub("blocks").sub(i), config.block(rate), rng)
            })
            .collect::<Result<_>>()?;
        Ok(Encoder { cls_token, pos_embed, stem, blocks, config: config.clone() })
    }

    /// The sizes.
    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// Images `[N, C, H, W]` to projected patches `[N, L, D]`, row by row. `training` concerns a convolutional stem.
    ///
    /// # Errors
    /// If the images have another size or other channels.
    pub fn patches(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        self.check(images)?;
        self.stem.forward(images, training)
    }

    /// All patches: images `[N, C, H, W]` to tokens `[N, 1 + L, D]` behind the last block, class token first.
    /// `rng`: draws of drop path, in training; `None` in evaluation.
    ///
    /// # Errors
    /// If the images have another size or other channels.
    pub fn forward(&self, images: &Tensor, rng: Option<&mut Rng>) -> Result<Tensor> {
        blocks::run(&self.blocks, self.embed(images, rng.is_some())?, rng)
    }

    /// The class token behind the last block, `[N, D]`, without drop path.
    pub(super) fn class_token(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        blocks::first_token(&self.blocks, self.embed(images, training)?)
    }

    /// Class token and patches with their positions.
    fn embed(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        let x = self.patches(images, training)?;
        Tensor::cat(&[&self.class_rows(x.shape()[0])?, &x], 1)?.add(&self.pos_embed.get())
    }

    /// Only patches `ids` `[N, K]`, in that order: tokens `[N, 1 + K, D]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), if an id is out of range, or if the stem is convolutional.
    pub fn forward_kept(&self, images: &Tensor, ids: &Tensor) -> Result<Tensor> {
        self.check(images)?;
        let x = self.stem.forward_kept(images, ids)?;
        let positions = self.pos_embed.get().select(0, 0)?.narrow(0, 1, self.config.patches()?)?;
        let x = add_positions(&x, &positions, Some(ids))?;
        // The class token's position is row 0 of the table.
        let class = self.class_rows(x.shape()[0])?.add(&self.pos_embed.get().narrow(1, 0, 1)?)?;
        blocks::run(&self.blocks, Tensor::cat(&[&class, &x], 1)?, None)
    }

    fn class_rows(&self, n: usize) -> Result<Tensor> {
        self.cls_token.get().expand([n, 1, self.config.embed_dim])
    }

    fn check(&self, images: &Tensor) -> Result<()> {
        let [h, w] = self.config.img_size.height_width();
        let c = self.config.in_chans;
        let fits = matches!(images.shape(), &[_, ci, hi, wi] if [ci, hi, wi] == [c, h, w]);
        ensure!(fits, "vit", "the model takes images [N, {c}, {h}, {w}], got {:?}", images.shape());
        Ok(())
    }
}

/// What a classifier's head sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    /// The mean over patch tokens, behind a norm of its own (`fc_norm`): fine-tuning.
    #[default]
    Mean,
    /// The class token behind `norm`: linear probing.
    Class,
}

/// The classifier of fine-tuning and linear probing (MAE's `models_vit.py`): all patches, positions trained,
/// `fc_norm` or `norm`, `head`.
#[derive(Clone, Debug)]
pub struct VitClassifier {
    params: Params,
    encoder: Encoder,
    norm: LayerNorm,
    head: Linear,
    pool: Pool,
}

impl VitClassifier {
    /// A classifier with Xavier-initialised layers and a head near zero (truncated normal, std 2e-5).
    ///
    /// # Errors
    /// If the configuration does not fit together.
    pub fn new(
        config: &VitConfig,
        classes: usize,
        pool: Pool,
        drop_path: f64,
        rng: &mut Rng,
    ) -> Result<Self> {
        let params = Params::new();
        let tokens = Encoder::tokens(&params, config, rng)?;
        let encoder = Encoder::new(&params, tokens, config, drop_path, rng)?;
        let name = if pool == Pool::Mean { "fc_norm" } else { "norm" };
        let norm = LayerNorm::new(&params.sub(name), config.embed_dim, config.layer_norm_eps)?;
        let head = Linear::new(&params.sub("head"), config.embed_dim, classes, true, rng)?;
        init_linears(&params, rng)?;
        head.weight().set(&init::trunc_normal([classes, config.embed_dim], 2e-5, rng)?)?;
        Ok(VitClassifier { params, encoder, norm, head, pool })
    }

    /// All parameters under their official names.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Images `[N, C, H, W]` to what the head sees, `[N, D]`.
    ///
    /// # Errors
    /// If the images have another size or other channels.
    pub fn features(&self, images: &Tensor, rng: Option<&mut Rng>) -> Result<Tensor> {
        let x = self.encoder.forward(images, rng)?;
        match self.pool {
            Pool::Mean => {
                let patches = x.shape()[1] - 1;
                self.norm.forward(&x.narrow(1, 1, patches)?.mean(1)?)
            }
            Pool::Class => self.norm.forward(&x.select(1, 0)?),
        }
    }

    /// Images `[N, C, H, W]` to logits `[N, classes]`.
    ///
    /// # Errors
    /// If the images have another size or other channels.
    pub fn forward(&self, images: &Tensor, rng: Option<&mut Rng>) -> Result<Tensor> {
        self.head.forward(&self.features(images, rng)?)
    }

    /// The encoder.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// Layer number of a parameter for layer-wise lr decay: 0 for tokens and patch projection, i + 1 for block
    /// i, depth + 1 for all else.
    pub fn layer_of(name: &str, depth: usize) -> usize {
        if name == "cls_token" || name == "pos_embed" || name.starts_with("patch_embed.") {
            return 0;
        }
        let block =
            name.strip_prefix("blocks.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        block.map_or(depth + 1, |i| i + 1)
    }
}

/// Xavier uniform for every matrix of a linear layer, zero for its bias. The qkv matrix counts as one layer.
pub(crate) fn init_linears(params: &Params, rng: &mut Rng) -> Result<()> {
    let all = params.all();
    for weight in all.iter().filter(|p| p.name().ends_with(".weight") && p.value().rank() == 2) {
        let shape = weight.value().shape().to_vec();
        weight.set(&init::xavier_uniform(shape, rng)?)?;
        let bias = weight.name().trim_end_matches("weight").to_string() + "bias";
        if let Some(bias) = all.iter().find(|p| p.name() == bias) {
            bias.set(&bias.value().zeros_like()?.contiguous()?)?;
        }
    }
    Ok(())
}
