//! Frozen encoders, whichever way they were trained.

use super::{Recipe, features, recipe::Job};
use crate::{
    backbones::{
        Backbone, checkpoint,
        vit::{Pool, VitClassifier},
    },
    flip::Flip,
};
use smalti::{
    Result, Rng, Tensor,
    nn::{Params, Statistics},
};

/// The encoder of a recipe in evaluation: images to features.
pub enum Encoder {
    /// A vision transformer with its pool.
    Vit(Box<VitClassifier>),
    /// A residual network, or a vision transformer behind convolutions, with the width of its features.
    Backbone(Box<Backbone>, usize),
    /// The image tower of FLIP, with its projection.
    Flip(Box<Flip>),
}

impl Encoder {
    /// The recipe's encoder with the weights that stand among `tensors`: its own, or those of a whole pre-trained model
    /// by its own or official names. `pool` counts for plain transformers.
    ///
    /// # Errors
    /// If a part of it is missing or has another shape.
    pub fn load(recipe: &Recipe, tensors: Vec<(String, Tensor)>, pool: Pool) -> Result<Encoder> {
        if recipe.flip.is_some() {
            return Encoder::flip(recipe, tensors);
        }
        if recipe.resnet.is_none() && !recipe.model.dims()?.conv_stem {
            let tensors = checkpoint::backbone(tensors);
            return Ok(Encoder::Vit(Box::new(features::classifier(recipe, tensors, 1, pool)?)));
        }
        let (params, config) = (Params::new(), recipe.backbone()?);
        let net = Backbone::new(&params, &config, Statistics::Batch, &mut Rng::new(recipe.seed))?;
        checkpoint::load_backbone(&params, tensors, &format!("{}.", config.head_name()))?;
        Ok(Encoder::Backbone(Box::new(net), config.features()))
    }

    /// The text tower is not looked at and may be missing.
    fn flip(recipe: &Recipe, mut tensors: Vec<(String, Tensor)>) -> Result<Encoder> {
        let flip = Flip::new(&recipe.flip()?, &mut Rng::new(recipe.seed))?;
        let image = |name: &str| name.starts_with("visual.");
        if tensors.iter().all(|(name, _)| image(name)) {
            tensors.extend(flip.params().tensors().into_iter().filter(|(name, _)| !image(name)));
        }
        flip.load_tensors(tensors)?;
        Ok(Encoder::Flip(Box::new(flip)))
    }

    /// What a transformer's features are where nothing else is said: the mean over patches behind MAE, which trains no
    /// class token; the class token behind MoCo v3, which contrasts it.
    pub fn pool(recipe: &Recipe) -> Pool {
        if recipe.job == Job::Mae { Pool::Mean } else { Pool::Class }
    }

    /// Images `[N, C, H, W]` to features `[N, width]`.
    ///
    /// # Errors
    /// If the images have another size or other channels.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        match self {
            Encoder::Vit(vit) => vit.features(images, None),
            Encoder::Backbone(net, _) => net.forward(images, false),
            Encoder::Flip(flip) => flip.image().forward(images, None),
        }
    }

    /// Channels of the features.
    pub fn width(&self) -> usize {
        match self {
            Encoder::Vit(vit) => vit.encoder().config().embed_dim,
            Encoder::Backbone(_, width) => *width,
            Encoder::Flip(flip) => flip.config().embed_dim,
        }
    }
}
