//! The image tower.

use super::config::{FlipConfig, ImagePool, Style};
use crate::backbones::{
    blocks,
    vit::{PatchEmbed, VitConfig, add_positions},
};
use smalti::{
    Result, Rng, Tensor, ensure,
    nn::{Block, BlockConfig, BlockNames, LayerNorm, Param, Params, init, pos_embed},
};

/// A vision transformer under open_clip's names: `conv1`, `class_embedding` `[D]`, `positional_embedding`
/// `[1 + L, D]`, `ln_pre`, `transformer.resblocks.N`, `ln_post`, `proj` `[D, E]`.
#[derive(Clone, Debug)]
pub struct ImageTower {
    patches: PatchEmbed,
    class: Param,
    positions: Param,
    ln_pre: Option<LayerNorm>,
    blocks: Vec<Block>,
    ln_post: LayerNorm,
    projection: Param,
    vit: VitConfig,
    style: Style,
}

impl ImageTower {
    /// With values that are still to be initialised, except for the table of fixed positions.
    pub(super) fn new(params: &Params, config: &FlipConfig, rng: &mut Rng) -> Result<ImageTower> {
        let (vit, style) = (config.vit(), config.style());
        let (width, eps, [rows, columns]) = (vit.embed_dim, vit.layer_norm_eps, vit.grid()?);
        let patches = PatchEmbed::new(&params.sub("conv1"), &vit, style.patch_bias, rng)?;
        let class = params.param("class_embedding", init::normal([width], 0.02, rng)?)?;
        let table = if style.fixed_positions {
            let table = pos_embed::sin_cos_2d(width, rows, columns, pos_embed::First::Column)?;
            pos_embed::with_class_rows(&table, 1)?.select(0, 0)?
        } else {
            init::normal([1 + rows * columns, width], (width as f64).powf(-0.5), rng)?
        };
        let positions = params.param("positional_embedding", table)?;
        positions.freeze(style.fixed_positions);
        let ln_pre = match style.ln_pre {
            true => Some(LayerNorm::new(&params.sub("ln_pre"), width, eps)?),
            false => None,
        };
        let block = BlockConfig { names: BlockNames::CLIP, ..vit.block(0.0) };
        let branch = params.sub("transformer").sub("resblocks");
        let blocks = (0..vit.depth).map(|i| Block::new(&branch.sub(i), block, rng)).collect::<Result<_>>()?;
        let ln_post = LayerNorm::new(&params.sub("ln_post"), width, eps)?;
        let projection = params.param("proj", init::xavier_uniform([width, config.embed_dim], rng)?)?;
        Ok(ImageTower { patches, class, positions, ln_pre, blocks, ln_post, projection, vit, style })
    }

    /// Images `[N, C, H, W]` as tokens with their positions, class token first: `[N, 1 + L, D]`, or with patches
    /// `ids` `[N, K]` alone, of which each keeps the position that it has in the image: `[N, 1 + K, D]`.
    ///
    /// # Errors
    /// If the images have another size or other channels, or an id is out of range.
    pub fn embed(&self, images: &Tensor, ids: Option<&Tensor>) -> Result<Tensor> {
        let ([h, w], c) = (self.vit.img_size.height_width(), self.vit.in_chans);
        let fits = matches!(images.shape(), &[_, ci, hi, wi] if [ci, hi, wi] == [c, h, w]);
        ensure!(fits, "flip", "the model takes images [N, {c}, {h}, {w}], got {:?}", images.shape());
        let x = match ids {
            Some(ids) => self.patches.forward_kept(images, ids)?,
            None => self.patches.forward(images)?,
        };
        let table = self.positions.get();
        let x = add_positions(&x, &table.narrow(0, 1, self.vit.patches()?)?, ids)?;
        let class = match self.style.fixed_positions {
            true => self.class.get(),
            false => self.class.get().add(&table.select(0, 0)?)?,
        };
        Tensor::cat(&[&class.expand([x.shape()[0], 1, self.vit.embed_dim])?, &x], 1)
    }

    /// The norm before the blocks, if the variant has one.
    pub fn ln_pre(&self) -> Option<&LayerNorm> {
        self.ln_pre.as_ref()
    }

    /// The blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The norm behind them.
    pub fn ln_post(&self) -> &LayerNorm {
        &self.ln_post
    }

    /// Images `[N, C, H, W]` to features `[N, E]`, not normalised, from all patches or from patches `ids` `[N, K]`
    /// alone.
    ///
    /// # Errors
    /// As [`embed`](Self::embed).
    pub fn forward(&self, images: &Tensor, ids: Option<&Tensor>) -> Result<Tensor> {
        let mut x = self.embed(images, ids)?;
        if let Some(norm) = &self.ln_pre {
            x = norm.forward(&x)?;
        }
        let all = |x| blocks::run(&self.blocks, x, None);
        let pooled = match self.style.image_pool {
            ImagePool::All => self.ln_post.forward(&all(x)?)?.mean(1)?,
            ImagePool::Class => self.ln_post.forward(&blocks::first_token(&self.blocks, x)?)?,
            ImagePool::Patches => {
                let patches = x.shape()[1] - 1;
                self.ln_post.forward(&all(x)?.narrow(1, 1, patches)?)?.mean(1)?
            }
        };
        pooled.matmul(&self.projection.get())
    }
}
