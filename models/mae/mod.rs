//! Masked autoencoder: He, Chen, Xie, Li, Dollár, Girshick, CVPR 2022 (arXiv 2111.06377).
//!
//! Most patches of an image are hidden, the encoder sees only the visible ones, and a small decoder predicts
//! the pixels of the hidden ones. Parameter names are those of the official checkpoints.

pub mod transfer;

use crate::backbones::vit::{Encoder, ImageSize, VitConfig, four, init_linears, three, tiny, yes};
use serde::{Deserialize, Serialize};
use smalti::{
    DType, PatchOrder, Result, Rng, Tensor, ensure,
    nn::{Block, BlockConfig, Gelu, LayerNorm, Linear, Param, Params, init, pos_embed},
};

/// Sizes of the autoencoder and its loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct MaeConfig {
    pub img_size: ImageSize,
    pub patch_size: usize,
    #[serde(default = "three")]
    pub in_chans: usize,
    pub embed_dim: usize,
    pub depth: usize,
    pub num_heads: usize,
    pub decoder_embed_dim: usize,
    pub decoder_depth: usize,
    pub decoder_num_heads: usize,
    #[serde(default = "four")]
    pub mlp_ratio: f64,
    #[serde(default = "yes")]
    pub qkv_bias: bool,
    #[serde(default = "tiny")]
    pub layer_norm_eps: f64,
    #[serde(default)]
    pub gelu: Gelu,
    /// Part of the patches that is hidden.
    #[serde(default = "three_quarters")]
    pub mask_ratio: f64,
    /// Predict pixels normalised by each patch's own mean and variance.
    #[serde(default)]
    pub norm_pix_loss: bool,
    /// Added to that variance.
    #[serde(default = "tiny")]
    pub target_eps: f64,
}

fn three_quarters() -> f64 {
    0.75
}

impl MaeConfig {
    /// `base` (ViT-B/16), `large` (ViT-L/16) or `huge` (ViT-H/14) at 224 pixels, with the paper's decoder of
    /// width 512 and depth 8.
    pub fn preset(name: &str) -> Option<MaeConfig> {
        let vit = VitConfig::preset(name)?;
        Some(MaeConfig {
            img_size: vit.img_size,
            patch_size: vit.patch_size,
            in_chans: vit.in_chans,
            embed_dim: vit.embed_dim,
            depth: vit.depth,
            num_heads: vit.num_heads,
            decoder_embed_dim: 512,
            decoder_depth: 8,
            decoder_num_heads: 16,
            mlp_ratio: vit.mlp_ratio,
            qkv_bias: vit.qkv_bias,
            layer_norm_eps: vit.layer_norm_eps,
            gelu: vit.gelu,
            mask_ratio: 0.75,
            norm_pix_loss: false,
            target_eps: 1e-6,
        })
    }

    /// The encoder's part.
    pub fn vit(&self) -> VitConfig {
        VitConfig {
            img_size: self.img_size,
            patch_size: self.patch_size,
            in_chans: self.in_chans,
            embed_dim: self.embed_dim,
            depth: self.depth,
            num_heads: self.num_heads,
            mlp_ratio: self.mlp_ratio,
            qkv_bias: self.qkv_bias,
            layer_norm_eps: self.layer_norm_eps,
            gelu: self.gelu,
            conv_stem: false,
        }
    }

    /// Patches that stay visible: L (1 - ratio), truncated, in f64 as the official code has it.
    ///
    /// # Errors
    /// If the image does not divide into patches, or nothing would be kept or nothing hidden.
    pub fn kept(&self) -> Result<usize> {
        let patches = self.vit().patches()?;
        let kept = (patches as f64 * (1.0 - self.mask_ratio)) as usize;
        ensure!(
            (0.0..=1.0).contains(&self.mask_ratio) && kept > 0 && kept < patches,
            "mae",
            "mask_ratio {} keeps {kept} of {patches} patches; at least one must be kept and one hidden",
            self.mask_ratio
        );
        Ok(kept)
    }
}

/// The model.
#[derive(Clone, Debug)]
pub struct Mae {
    params: Params,
    encoder: Encoder,
    norm: LayerNorm,
    mask_token: Param,
    decoder_pos_embed: Param,
    decoder_embed: Linear,
    decoder_blocks: Vec<Block>,
    decoder_norm: LayerNorm,
    decoder_pred: Linear,
    config: MaeConfig,
}

/// Which patches of a batch are visible.
#[derive(Clone, Debug)]
pub struct Masking {
    /// Visible patches in shuffled order, `[N, K]` i64.
    pub ids_keep: Tensor,
    /// For each patch its place in the shuffled order, `[N, L]` i64.
    pub ids_restore: Tensor,
    /// 0 visible, 1 hidden, in image order, `[N, L]` f32.
    pub mask: Tensor,
}

/// What a forward pass gives.
#[derive(Clone, Debug)]
pub struct MaeOutput {
    /// Mean squared error over the hidden patches, a scalar.
    pub loss: Tensor,
    /// Predicted pixels of every patch, `[N, L, p * p * C]`, in order (row, column, channel).
    pub pred: Tensor,
    /// Encoder output behind its norm, class token first, `[N, 1 + K, D]`.
    pub latent: Tensor,
    /// The masking.
    pub masking: Masking,
}

impl Mae {
    /// A model with the official initialisation.
    ///
    /// # Errors
    /// If the configuration does not fit together.
    pub fn new(config: &MaeConfig, rng: &mut Rng) -> Result<Mae> {
        config.kept()?;
        let (params, vit, width) = (Params::new(), config.vit(), config.decoder_embed_dim);
        let eps = config.layer_norm_eps;
        let tokens = Encoder::tokens(&params, &vit, rng)?;
        let mask_token = params.param("mask_token", init::normal([1, 1, width], 0.02, rng)?)?;
        let [rows, columns] = vit.grid()?;
        let table = pos_embed::sin_cos_2d(width, rows, columns, pos_embed::First::Column)?;
        let decoder_pos_embed = params.param("decoder_pos_embed", pos_embed::with_class_rows(&table, 1)?)?;
        let encoder = Encoder::new(&params, tokens, &vit, 0.0, rng)?;
        let norm = LayerNorm::new(&params.sub("norm"), config.embed_dim, eps)?;
        let decoder_embed = Linear::new(&params.sub("decoder_embed"), config.embed_dim, width, true, rng)?;
        let block = BlockConfig { width, heads: config.decoder_num_heads, ..vit.block(0.0) };
        let decoder_blocks = (0..config.decoder_depth)
            .map(|i| Block::new(&params.sub("decoder_blocks").sub(i), block, rng))
            .collect::<Result<_>>()?;
        let decoder_norm = LayerNorm::new(&params.sub("decoder_norm"), width, eps)?;
        let pixels = config.patch_size * config.patch_size * config.in_chans;
        let decoder_pred = Linear::new(&params.sub("decoder_pred"), width, pixels, true, rng)?;
        init_linears(&params, rng)?;
        // The position tables are fixed: stored, never trained.
        params.freeze(true, |name| name.ends_with("pos_embed"));
        let config = config.clone();
        Ok(Mae {
            params,
            encoder,
            norm,
            mask_token,
            decoder_pos_embed,
            decoder_embed,
            decoder_blocks,
            decoder_norm,
            decoder_pred,
            config,
        })
    }

    /// All parameters under their official names.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The sizes.
    pub fn config(&self) -> &MaeConfig {
        &self.config
    }

    /// The encoder.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// Hides patches by noise `[N, L]`: those with the smallest values stay visible (§3.1).
    ///
    /// # Errors
    /// If the noise has another shape.
    pub fn mask(&self, noise: &Tensor) -> Result<Masking> {
        let [_, l] = noise.dims("mae")?;
        let patches = self.config.vit().patches()?;
        ensure!(l == patches, "mae", "noise for {l} patches, the model has {patches}");
        let (ids_keep, ids_restore, mask) = noise.random_masking_ids(self.config.kept()?)?;
        Ok(Masking { ids_keep, ids_restore, mask })
    }

    /// A masking drawn for a batch of `n` images.
    ///
    /// # Errors
    /// None that the constructor has not met.
    pub fn random_mask(&self, n: usize, rng: &mut Rng) -> Result<Masking> {
        let (patches, kept) = (self.config.vit().patches()?, self.config.kept()?);
        let (ids_keep, ids_restore, mask) = Tensor::random_masking(n, patches, kept, rng)?;
        Ok(Masking { ids_keep, ids_restore, mask })
    }

    /// Encoder on the visible patches: `[N, 1 + K, D]`.
    ///
    /// # Errors
    /// If the images have another size.
    pub fn encode(&self, images: &Tensor, masking: &Masking) -> Result<Tensor> {
        self.norm.forward(&self.encoder.forward_kept(images, &masking.ids_keep)?)
    }

    /// Predicted pixels `[N, L, p * p * C]` from the encoder's output.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn decode(&self, latent: &Tensor, masking: &Masking) -> Result<Tensor> {
        let x = self.decoder_embed.forward(latent)?;
        let (mask_token, positions) = (self.mask_token.get().flatten(0, -1)?, self.decoder_pos_embed.get());
        let mut x = x.unshuffle(&mask_token, &masking.ids_restore, &positions.select(0, 0)?)?;
        for block in &self.decoder_blocks {
            x = block.forward(&x, None)?;
        }
        // The class token has no pixels: it is dropped before the projection that would be wasted on it.
        let patches = x.shape()[1] - 1;
        self.decoder_pred.forward(&self.decoder_norm.forward(&x)?.narrow(1, 1, patches)?)
    }

    /// Loss and prediction for images `[N, C, H, W]`, already normalised.
    ///
    /// # Errors
    /// If the images have another size.
    pub fn forward(&self, images: &Tensor, masking: Masking) -> Result<MaeOutput> {
        let latent = self.encode(images, &masking)?;
        let pred = self.decode(&latent, &masking)?;
        let loss = self.loss(images, &pred, &masking.mask)?;
        Ok(MaeOutput { loss, pred, latent, masking })
    }

    /// Mean over hidden patches of the mean squared error of their pixels.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn loss(&self, images: &Tensor, pred: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let normalise = self.config.norm_pix_loss.then_some(self.config.target_eps);
        pred.masked_patch_loss(images, mask, self.config.patch_size, normalise)
    }

    /// Images `[N, C, H, W]` from predicted patches. With a normalised target the patches are brought back by
    /// the true patch's mean and deviation, which only a viewer may know.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn reconstruct(&self, images: &Tensor, pred: &Tensor) -> Result<Tensor> {
        let p = self.config.patch_size;
        let pixels = if self.config.norm_pix_loss {
            let truth = images.patchify(p, PatchOrder::ChannelLast)?;
            let std = truth.var_keepdim(-1, 1)?.add_scalar(self.config.target_eps)?.sqrt()?;
            pred.mul(&std)?.add(&truth.mean_keepdim(-1)?)?
        } else {
            pred.clone()
        };
        let grid = self.config.vit().grid()?;
        pixels.unpatchify(p, grid, PatchOrder::ChannelLast)
    }

    /// The mask as an image `[N, C, H, W]`: 1 where pixels are hidden.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn mask_image(&self, mask: &Tensor) -> Result<Tensor> {
        let (p, c) = (self.config.patch_size, self.config.in_chans);
        let [n, l] = mask.dims("mae")?;
        let pixels = mask.unsqueeze(-1)?.expand([n, l, p * p * c])?;
        pixels.to_dtype(DType::F32)?.unpatchify(p, self.config.vit().grid()?, PatchOrder::ChannelLast)
    }
}
