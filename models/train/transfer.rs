//! What is done with a pre-trained encoder, as [`Task`]s: fine-tuning, and the linear probe of the papers.

use super::{
    Recipe, source,
    trainer::{At, Task},
};
use crate::{
    backbones::vit::VitClassifier,
    data::{
        Batch,
        augment::{MixUp, soft_targets},
    },
    mae::transfer::{ProbeHead, finetune_loss},
};
use smalti::{
    Result, Rng, Tensor,
    nn::Params,
    optim::{Group, layer_decay},
};

/// What tells classes apart.
pub trait Classifier {
    /// Logits `[N, classes]` of images.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn logits(&self, images: &Tensor) -> Result<Tensor>;
}

/// A classifier with the regularisation of a recipe: drop path, mixup, CutMix, label smoothing.
pub struct FinetuneTask {
    model: VitClassifier,
    mix: MixUp,
}

impl FinetuneTask {
    /// Fine-tuning of `model`, which tells `classes` apart.
    pub fn new(recipe: &Recipe, model: VitClassifier, classes: usize) -> FinetuneTask {
        let f = &recipe.finetune;
        let mix = MixUp {
            mixup_alpha: f.mixup,
            cutmix_alpha: f.cutmix,
            smoothing: f.smoothing as f32,
            ..MixUp::mae(classes)
        };
        FinetuneTask { model, mix }
    }

    /// The recipe's layer-wise decay of the learning rate; no weight decay for the class token and positions.
    pub fn groups(&self, recipe: &Recipe) -> Vec<Group> {
        let depth = self.model.encoder().config().depth;
        let layer = |name: &str| VitClassifier::layer_of(name, depth);
        let mut groups = layer_decay(&self.params().trained(), layer, depth + 1, recipe.optim.layer_decay);
        groups.push(Group::named(["cls_token", "pos_embed"]).weight_decay(0.0));
        groups
    }

    /// Mixed images and their target distributions `[N, classes]`.
    fn mixed(&self, batch: &Batch, at: &At) -> Result<(Tensor, Tensor)> {
        let mut images = batch.views[0].clone();
        let (n, classes) = (batch.labels.len(), self.mix.classes);
        let targets = if self.mix.mixup_alpha > 0.0 || self.mix.cutmix_alpha > 0.0 {
            // a stream of its own: what is mixed must not shift the draws of drop path
            let mut rng = at.rng.stream(1);
            self.mix.apply(&mut images.data, images.shape, &batch.labels, &mut rng)?.targets
        } else {
            soft_targets(&batch.labels, classes, self.mix.smoothing, 1.0)?
        };
        Ok((source::tensor(&images)?, Tensor::from_slice(&targets, [n, classes])?))
    }
}

impl Task for FinetuneTask {
    type Batch = Batch;

    fn params(&self) -> &Params {
        self.model.params()
    }

    fn loss(&self, batch: &Batch, at: &At) -> Result<Tensor> {
        let (images, targets) = self.mixed(batch, at)?;
        finetune_loss(&self.model, &images, &targets, &mut at.rng.clone())
    }
}

impl Classifier for FinetuneTask {
    fn logits(&self, images: &Tensor) -> Result<Tensor> {
        self.model.forward(images, None)?.to_dtype(images.dtype())
    }
}

/// A linear classifier on a frozen encoder.
pub struct ProbeTask {
    encoder: VitClassifier,
    head: ProbeHead,
}

impl ProbeTask {
    /// A new head on `encoder`.
    ///
    /// # Errors
    /// None in practice.
    pub fn new(recipe: &Recipe, encoder: VitClassifier, classes: usize) -> Result<ProbeTask> {
        let width = encoder.encoder().config().embed_dim;
        let head = ProbeHead::new(width, classes, &mut Rng::new(recipe.seed).stream(0x7072_6F62))?;
        Ok(ProbeTask { encoder, head })
    }
}

impl Task for ProbeTask {
    type Batch = Batch;

    fn params(&self) -> &Params {
        self.head.params()
    }

    fn loss(&self, batch: &Batch, _: &At) -> Result<Tensor> {
        let labels = Tensor::from_slice(&batch.labels, [batch.labels.len()])?;
        self.head.loss(&self.encoder, &source::tensor(&batch.views[0])?, &labels)
    }
}

impl Classifier for ProbeTask {
    fn logits(&self, images: &Tensor) -> Result<Tensor> {
        self.head.forward(&self.encoder, images)
    }
}
