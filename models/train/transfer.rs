//! What is done with a pre-trained encoder, as [`Task`]s: fine-tuning, and the linear probe of the papers.

use super::{
    Encoder, Recipe, method, source,
    trainer::{At, Loss, Task},
};
use crate::{
    backbones::vit::{Pool, VitClassifier},
    data::{
        Batch,
        augment::{MixUp, soft_targets},
    },
    evaluate::LinearClassifier,
    mae::transfer::{ProbeHead, finetune_loss},
};
use smalti::{
    Result, Rng, Tensor,
    nn::Params,
    no_grad,
    optim::{Group, layer_decay},
};

/// What tells classes apart.
pub trait Classifier {
    /// Logits `[N, classes]` of images.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn logits(&self, images: &Tensor) -> Result<Tensor>;

    /// Looks after training at what must not have changed in it.
    ///
    /// # Errors
    /// If it did.
    fn check(&self) -> Result<()> {
        Ok(())
    }
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

    fn loss(&self, batch: &Batch, at: &At) -> Result<Loss> {
        let (images, targets) = self.mixed(batch, at)?;
        Ok(finetune_loss(&self.model, &images, &targets, &mut at.rng.clone())?.into())
    }

    fn inputs<'b>(&self, batch: &'b Batch) -> Vec<(String, &'b [f32])> {
        method::views(batch)
    }
}

impl Classifier for FinetuneTask {
    fn logits(&self, images: &Tensor) -> Result<Tensor> {
        self.model.forward(images, None)?.to_dtype(images.dtype())
    }
}

/// A linear classifier on a frozen encoder.
pub enum ProbeTask {
    /// As MAE has it: behind a norm.
    Normed {
        /// What is not trained.
        encoder: Box<Encoder>,
        /// What is.
        head: ProbeHead,
    },
    /// As MoCo, MoCo v3 and SimSiam have it.
    Plain(Box<LinearClassifier>),
}

impl ProbeTask {
    /// A new head, of the kind that the recipe asks for, on the encoder that stands among `tensors`. `pool`: what a
    /// transformer's features are behind a norm; without it they are the class token.
    ///
    /// # Errors
    /// If a part of the encoder is missing or has another shape.
    pub fn new(
        recipe: &Recipe,
        tensors: Vec<(String, Tensor)>,
        classes: usize,
        pool: Pool,
    ) -> Result<ProbeTask> {
        let mut rng = Rng::new(recipe.seed).stream(0x7072_6F62);
        if !recipe.probe.norm {
            let model = LinearClassifier::new(&recipe.backbone()?, classes, tensors, &mut rng)?;
            return Ok(ProbeTask::Plain(Box::new(model)));
        }
        let encoder = Box::new(Encoder::load(recipe, tensors, pool)?);
        let head = ProbeHead::new(encoder.width(), classes, &mut rng)?;
        Ok(ProbeTask::Normed { encoder, head })
    }
}

impl Task for ProbeTask {
    type Batch = Batch;

    fn params(&self) -> &Params {
        match self {
            ProbeTask::Normed { head, .. } => head.params(),
            ProbeTask::Plain(model) => model.params(),
        }
    }

    fn loss(&self, batch: &Batch, _: &At) -> Result<Loss> {
        let labels = Tensor::from_slice(&batch.labels, [batch.labels.len()])?;
        let images = source::tensor(&batch.views[0])?;
        let loss = match self {
            ProbeTask::Normed { encoder, head } => {
                head.loss(&no_grad(|| encoder.features(&images))?, &labels)?
            }
            ProbeTask::Plain(model) => model.loss(&images, &labels)?,
        };
        Ok(loss.into())
    }

    fn inputs<'b>(&self, batch: &'b Batch) -> Vec<(String, &'b [f32])> {
        method::views(batch)
    }
}

impl Classifier for ProbeTask {
    fn logits(&self, images: &Tensor) -> Result<Tensor> {
        match self {
            ProbeTask::Normed { encoder, head } => no_grad(|| head.forward(&encoder.features(images)?)),
            ProbeTask::Plain(model) => no_grad(|| model.forward(images)),
        }
    }

    fn check(&self) -> Result<()> {
        match self {
            ProbeTask::Normed { .. } => Ok(()),
            ProbeTask::Plain(model) => model.check_frozen(),
        }
    }
}
