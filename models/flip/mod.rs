//! FLIP, CLIP trained with masked images: Li, Fan, Hu, Feichtenhofer, He, CVPR 2023 (arXiv 2212.00794).
//!
//! Two towers learn that an image and its caption have similar features and all other pairs of the batch have not.
//! A random part of each image's patches is left out before the image tower in training and is never computed;
//! in evaluation nothing is. One implementation serves the paper's own code and open_clip's CLIP with patch dropout:
//! `config.rs` has the table of where they differ. Parameter names are open_clip's for both; weights of the official
//! code are converted ([`checkpoint`]).

pub mod checkpoint;
mod config;
mod image;
mod init;
mod loss;
mod masking;
#[cfg(test)]
mod tests;

pub use config::{FlipConfig, ImageConfig, ImagePool, TextMasking, Variant};
pub use image::ImageTower;
pub use loss::contrastive;
pub use masking::Masking;

use crate::backbones::text::TextTower;
use config::{Style, Unit};
use smalti::{
    Result, Rng, Tensor,
    comm::Comm,
    nn::{Param, Params},
};

/// Largest logarithm of the scale: temperatures are not below 1/100.
const LN_100: f64 = 4.605170185988092;
/// The first logarithm of the scale, that of the temperature 0.07.
const FIRST_SCALE: f64 = 2.6592600369327783;

/// The model.
#[derive(Clone, Debug)]
pub struct Flip {
    params: Params,
    image: ImageTower,
    text: TextTower,
    /// The logarithm of the inverse temperature.
    logit_scale: Param,
    config: FlipConfig,
    style: Style,
}

/// What a forward pass gives.
#[derive(Clone, Debug)]
pub struct FlipOutput {
    /// This rank's loss, a scalar in f32; the mean over ranks is that of the whole batch.
    pub loss: Tensor,
    /// Features of this rank's images, of length 1, `[N, E]`.
    pub image_features: Tensor,
    /// Features of this rank's texts, of length 1, `[N, E]`.
    pub text_features: Tensor,
    /// What similarities are multiplied by, the inverse temperature (not its logarithm), a scalar.
    pub scale: Tensor,
}

impl Flip {
    /// A model with the variant's own initialisation (FLIP: `models_flip.py`; open_clip: `transformer.py`).
    ///
    /// # Errors
    /// If the configuration does not fit together.
    pub fn new(config: &FlipConfig, rng: &mut Rng) -> Result<Flip> {
        config.check()?;
        let (params, style) = (Params::new(), config.style());
        let image = ImageTower::new(&params.sub("visual"), config, rng)?;
        let text = TextTower::new(&params, &config.text, style.text, config.embed_dim, rng)?;
        let logit_scale = params.param("logit_scale", Tensor::scalar(FIRST_SCALE as f32))?;
        init::initialise(&params, config, rng)?;
        Ok(Flip { params, image, text, logit_scale, config: config.clone(), style })
    }

    /// All parameters under open_clip's names.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The sizes.
    pub fn config(&self) -> &FlipConfig {
        &self.config
    }

    /// The image tower.
    pub fn image(&self) -> &ImageTower {
        &self.image
    }

    /// The text tower.
    pub fn text(&self) -> &TextTower {
        &self.text
    }

    /// Does weight decay apply to this parameter? Officially to all but biases, norms and position tables, so also
    /// to the class token and the scale's logarithm; in open_clip to all of two axes and more.
    pub fn decays(&self, param: &Param) -> bool {
        match self.config.variant {
            Variant::Official => {
                let name = param.name();
                let norm = name.rsplit('.').nth(1).is_some_and(|layer| layer.starts_with("ln_"));
                !norm && !name.ends_with("bias") && !name.ends_with("positional_embedding")
            }
            Variant::OpenClip => param.value().rank() >= 2,
        }
    }

    /// Images `[N, C, H, W]`, already normalised, to features of length 1, `[N, E]`: from all patches, or from
    /// patches `ids` `[N, K]` alone.
    ///
    /// # Errors
    /// If the images have another size or other channels, or an id is out of range.
    pub fn encode_image(&self, images: &Tensor, ids: Option<&Tensor>) -> Result<Tensor> {
        self.unit(&self.image.forward(images, ids)?)
    }

    /// Tokens `[N, T]` (i64) to features of length 1, `[N, E]`: of all tokens, or of positions `ids` `[N, K]` as
    /// [`keep_tokens`](Self::keep_tokens) gives them.
    ///
    /// # Errors
    /// If the texts have another length, or an id is out of range.
    pub fn encode_text(&self, tokens: &Tensor, ids: Option<&Tensor>) -> Result<Tensor> {
        self.unit(&self.text.forward(tokens, ids)?)
    }

    /// Half types are normalised in f32 and come back in their own type.
    fn unit(&self, x: &Tensor) -> Result<Tensor> {
        let wide = x.to_dtype(x.dtype().computed_in())?;
        let unit = match self.style.unit {
            Unit::Added(eps) => wide.div(&wide.norm_keepdim(2.0, -1)?.add_scalar(eps)?),
            Unit::Floor(eps) => wide.normalize(2.0, -1, eps),
        };
        unit?.to_dtype(x.dtype())
    }

    /// The inverse temperature, a scalar in f32. Officially the logarithm is held in 0..ln 100 here: outside of it
    /// the gradient is 0, and only weight decay leads back.
    ///
    /// # Errors
    /// None of its own.
    pub fn scale(&self) -> Result<Tensor> {
        let log = self.logit_scale.get();
        let log = log.to_dtype(log.dtype().computed_in())?;
        if self.style.clamp_in_loss { log.clamp(0.0, LN_100)?.exp() } else { log.exp() }
    }

    /// Puts the scale's logarithm back into 0..ln 100: to be called after every step. The official variant has it
    /// held in the loss instead, and here nothing is done.
    ///
    /// # Errors
    /// None of its own.
    pub fn clamp_scale(&self) -> Result<()> {
        if self.style.clamp_in_loss {
            return Ok(());
        }
        self.logit_scale.update(|log| log.clamp(0.0, LN_100))
    }

    /// Features and loss of images `[N, C, H, W]` and their captions' tokens `[N, T]`, against those of all ranks.
    /// `masking` leaves patches and tokens out, in training; the default leaves out none.
    ///
    /// # Errors
    /// If shapes do not fit, or a rank is lost.
    pub fn forward(
        &self,
        images: &Tensor,
        tokens: &Tensor,
        masking: &Masking,
        comm: &Comm,
    ) -> Result<FlipOutput> {
        let image_features = self.encode_image(images, masking.image.as_ref())?;
        let text_features = self.encode_text(tokens, masking.text.as_ref())?;
        let scale = self.scale()?;
        let loss = contrastive(&image_features, &text_features, &scale, comm)?;
        Ok(FlipOutput { loss, image_features, text_features, scale })
    }
}
