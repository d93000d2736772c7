//! Which values make sense.

use super::{Curve, Job, Normalization, Optimizer, Probe, Recipe, Source, ViewKind};

/// Jobs that begin without weights.
const PRETRAINING: &[Job] = &[Job::Mae, Job::Moco, Job::MocoV3, Job::Simsiam, Job::Flip];

/// Statements with what is said where one does not hold.
fn first_broken(rules: &[(bool, &str)]) -> Result<(), String> {
    match rules.iter().find(|(holds, _)| !holds) {
        Some((_, message)) => Err((*message).to_owned()),
        None => Ok(()),
    }
}

fn below_one(v: f64) -> bool {
    (0.0..1.0).contains(&v)
}

fn share(v: f64) -> bool {
    (0.0..=1.0).contains(&v)
}

fn above_zero(v: f64) -> bool {
    v.is_finite() && v > 0.0
}

impl Recipe {
    /// Values out of range, and values that say nothing for this job, by key.
    pub(super) fn check(&self) -> Result<(), String> {
        self.check_counts()?;
        self.check_network()?;
        self.check_training()?;
        self.check_schedule()?;
        self.check_methods()?;
        self.check_use()
    }

    /// Numbers that must not be 0.
    fn check_counts(&self) -> Result<(), String> {
        let (model, length) = (&self.model, self.schedule.epochs as u64 + self.schedule.steps);
        let mut positive = vec![
            ("model.img_size", model.img_size.unwrap_or(1)),
            ("model.patch_size", model.patch_size.unwrap_or(1)),
            ("model.embed_dim", model.embed_dim.unwrap_or(1)),
            ("model.depth", model.depth.unwrap_or(1)),
            ("model.num_heads", model.num_heads.unwrap_or(1)),
            ("model.decoder_embed_dim", model.decoder_embed_dim.unwrap_or(1)),
            ("model.decoder_num_heads", model.decoder_num_heads.unwrap_or(1)),
            ("data.batch", self.data.batch),
            ("optim.accumulate", self.optim.accumulate),
            ("schedule.epochs", length as usize),
            ("run.log_every", self.run.log_every),
            ("run.checkpoint_every", self.run.checkpoint_every),
            ("run.preview_every", self.run.preview_every),
            ("run.ranks", self.run.ranks),
        ];
        if let Some(resnet) = &self.resnet {
            positive.push(("resnet.width", resnet.width));
            positive.push(("resnet.layers", resnet.layers.map_or(1, |n| n.into_iter().min().unwrap_or(0))));
        }
        if let Some(moco) = &self.moco {
            positive.extend([
                ("moco.dim", moco.dim),
                ("moco.queue", moco.queue),
                ("moco.bn_groups", moco.bn_groups),
            ]);
        }
        if let Some(v3) = &self.moco_v3 {
            positive.extend([("moco_v3.dim", v3.dim), ("moco_v3.mlp_dim", v3.mlp_dim)]);
        }
        if let Some(simsiam) = &self.simsiam {
            positive.extend([("simsiam.dim", simsiam.dim), ("simsiam.pred_dim", simsiam.pred_dim)]);
        }
        match positive.iter().find(|(_, value)| *value == 0) {
            Some((key, _)) => Err(format!("{key} is 0, needs at least 1")),
            None => Ok(()),
        }
    }

    fn check_network(&self) -> Result<(), String> {
        if let Some(resnet) = &self.resnet {
            resnet.config(self.model.in_chans()).map_err(|e| e.to_string())?;
            let unused = self.model.transformer_key();
            return unused.map_or(Ok(()), |key| Err(format!("model.{key} says nothing beside [resnet]")));
        }
        let dims = self.model.dims().map_err(|e| e.to_string())?;
        first_broken(&[
            (dims.img_size % dims.patch_size == 0, "model.img_size is no multiple of model.patch_size"),
            (matches!(dims.in_chans, 1 | 3), "model.in_chans is neither 1 nor 3"),
            (dims.embed_dim % dims.num_heads == 0, "model.embed_dim is no multiple of model.num_heads"),
            (
                dims.decoder_embed_dim % dims.decoder_num_heads == 0,
                "model.decoder_embed_dim is no multiple of model.decoder_num_heads",
            ),
            (dims.mask_ratio > 0.0 && dims.mask_ratio < 1.0, "model.mask_ratio is not between 0 and 1"),
            (above_zero(dims.mlp_ratio), "model.mlp_ratio is not above 0"),
        ])
    }

    fn check_training(&self) -> Result<(), String> {
        let (optim, data, f) = (&self.optim, &self.data, &self.finetune);
        let [beta1, beta2] = optim.betas;
        let decay = optim.layer_decay;
        let adam = matches!(optim.optimizer, Optimizer::AdamW | Optimizer::Lamb);
        first_broken(&[
            (matches!(self.model.in_chans(), 1 | 3), "model.in_chans is neither 1 nor 3"),
            (above_zero(optim.base_lr), "optim.base_lr is not above 0"),
            (optim.weight_decay.is_finite() && optim.weight_decay >= 0.0, "optim.weight_decay is negative"),
            (decay > 0.0 && decay <= 1.0, "optim.layer_decay is not in (0, 1]"),
            (below_one(beta1) && below_one(beta2), "optim.betas are not in [0, 1)"),
            (below_one(optim.momentum), "optim.momentum is not in [0, 1)"),
            (
                adam || optim.betas == [0.9, 0.999],
                "optim.betas say nothing to an optimizer other than Adam's kind",
            ),
            (
                !adam || optim.momentum == 0.9,
                "optim.momentum says nothing to Adam's kind, which have optim.betas",
            ),
            (optim.clip.is_none_or(|c| c > 0.0), "optim.clip is not above 0"),
            (optim.ema.is_none_or(below_one), "optim.ema is not in [0, 1)"),
            (data.crop_min_area > 0.0 && share(data.crop_min_area), "data.crop_min_area is not in (0, 1]"),
            (data.batch.is_multiple_of(self.run.ranks), "data.batch is no multiple of run.ranks"),
            (share(data.flip), "data.flip is no probability"),
            (share(data.shift), "data.shift is not in [0, 1]"),
            (
                data.normalize != Normalization::Cifar10 || self.model.in_chans() == 3,
                "data.normalize = \"cifar10\" needs model.in_chans = 3",
            ),
            (below_one(data.zoom), "data.zoom is not in [0, 1)"),
            (data.rotate.is_finite() && data.rotate >= 0.0, "data.rotate is negative"),
            (below_one(f.drop_path), "finetune.drop_path is not in [0, 1)"),
            (below_one(f.smoothing), "finetune.smoothing is not in [0, 1)"),
            (share(f.reprob), "finetune.reprob is no probability"),
            (f.mixup >= 0.0 && f.cutmix >= 0.0, "finetune.mixup and finetune.cutmix must not be negative"),
        ])
    }

    fn check_schedule(&self) -> Result<(), String> {
        let s = &self.schedule;
        let longest = if s.steps > 0 { f64::INFINITY } else { s.epochs as f64 };
        let milestones = s.curve == Curve::Milestones;
        first_broken(&[
            (s.epochs == 0 || s.steps == 0, "schedule.epochs and schedule.steps are both given"),
            (
                (0.0..=longest).contains(&s.warmup_epochs),
                "schedule.warmup_epochs is not between 0 and schedule.epochs",
            ),
            (s.steps == 0 || s.warmup_steps <= s.steps, "schedule.warmup_steps is above schedule.steps"),
            (
                s.warmup_steps == 0 || s.warmup_epochs == 0.0,
                "schedule.warmup_epochs and schedule.warmup_steps are both given",
            ),
            (
                s.warmup_steps == 0 || s.curve == Curve::Cosine,
                "schedule.warmup_steps goes with the curve cosine alone; schedule.warmup_epochs with all",
            ),
            (s.min_lr.is_finite() && s.min_lr >= 0.0, "schedule.min_lr is negative"),
            (!milestones || s.min_lr == 0.0, "schedule.min_lr says nothing to the curve milestones"),
            (
                milestones != s.milestones.is_empty(),
                "schedule.milestones go with the curve milestones, and it with them",
            ),
            (s.milestones.is_sorted(), "schedule.milestones are not in order"),
            (above_zero(s.gamma), "schedule.gamma is not above 0"),
        ])
    }

    /// Ranges of the methods' numbers.
    fn check_methods(&self) -> Result<(), String> {
        if let Some(moco) = &self.moco {
            let keys = self.data.batch * if moco.symmetric { 2 } else { 1 };
            if !moco.queue.is_multiple_of(keys) {
                return Err(format!(
                    "moco.queue is {}, no multiple of the {keys} keys of a step",
                    moco.queue
                ));
            }
            first_broken(&[
                (share(moco.momentum), "moco.momentum is not in [0, 1]"),
                (above_zero(moco.temperature), "moco.temperature is not above 0"),
                (
                    (self.data.batch / self.run.ranks).is_multiple_of(moco.bn_groups),
                    "the images of a rank are no multiple of moco.bn_groups",
                ),
            ])?;
        }
        if let Some(v3) = &self.moco_v3 {
            first_broken(&[
                (share(v3.momentum), "moco_v3.momentum is not in [0, 1]"),
                (above_zero(v3.temperature), "moco_v3.temperature is not above 0"),
            ])?;
        }
        if let Some(simsiam) = &self.simsiam {
            let layers = simsiam.projector_layers;
            first_broken(&[(matches!(layers, 2 | 3), "simsiam.projector_layers is neither 2 nor 3")])?;
        }
        if let Some(flip) = &self.flip {
            first_broken(&[
                (below_one(flip.mask_ratio), "flip.mask_ratio is not in [0, 1)"),
                (below_one(flip.text_mask_ratio), "flip.text_mask_ratio is not in [0, 1)"),
            ])?;
        }
        let Some(views) = &self.views else { return Ok(()) };
        let shares = [views.brightness, views.contrast, views.blur, views.sigma];
        first_broken(&[(
            shares.into_iter().all(share),
            "views.brightness, contrast, blur and sigma are not all in [0, 1]",
        )])
    }

    /// What this job would pass over is an error: whoever wrote it believes that it does something.
    fn check_use(&self) -> Result<(), String> {
        let job = self.job;
        let two_views = matches!(job, Job::Moco | Job::MocoV3 | Job::Simsiam);
        let whole_batch = matches!(job, Job::Moco | Job::MocoV3 | Job::Flip);
        let only = |given: bool, jobs: &[Job]| !given || jobs.contains(&job);
        let (probe, finetune) = (self.probe != Probe::default(), self.finetune != Default::default());
        let autoencoder = self.model.autoencoder_key().is_some();
        first_broken(&[
            (only(self.moco.is_some(), &[Job::Moco]), "[moco] says nothing to this job"),
            (only(self.moco_v3.is_some(), &[Job::MocoV3]), "[moco_v3] says nothing to this job"),
            (only(self.simsiam.is_some(), &[Job::Simsiam]), "[simsiam] says nothing to this job"),
            (only(self.flip.is_some(), &[Job::Flip, Job::LinearProbe]), "[flip] says nothing to this job"),
            (self.flip.is_some() || job != Job::Flip, "[flip] is missing"),
            (self.flip.is_none() || self.probe.norm, "probe.norm = false: the probe of a [flip] has a norm"),
            (self.flip.is_none() || self.resnet.is_none(), "[resnet] says nothing beside [flip]"),
            (self.views.is_none() || two_views, "[views] say nothing to this job"),
            (only(finetune, &[Job::Finetune]), "[finetune] says nothing to this job"),
            (only(probe, &[Job::LinearProbe]), "[probe] says nothing to this job"),
            (
                only(self.optim.layer_decay != 1.0, &[Job::Finetune]),
                "optim.layer_decay says nothing to this job",
            ),
            (
                only(autoencoder, &[Job::Mae, Job::LinearProbe, Job::Finetune]),
                "model.mask_ratio, norm_pix_loss and decoder_* say nothing to this job",
            ),
            (
                self.resnet.is_none() || two_views || job == Job::LinearProbe,
                "[resnet]: this job takes a transformer, see [model]",
            ),
            (
                self.resnet.is_some() || !matches!(job, Job::Moco | Job::Simsiam),
                "[resnet] is missing: this job takes a residual network",
            ),
            (
                self.optim.accumulate == 1 || !whole_batch,
                "optim.accumulate is above 1: the loss of this job depends on the whole batch, micro-batches would \
                 make another one of it; give the whole batch by data.batch",
            ),
            (self.optim.ema.is_none() || !two_views, "optim.ema says nothing to this job"),
        ])?;
        first_broken(&[(
            only(self.run.ranks > 1, PRETRAINING),
            "run.ranks is above 1: this job runs on one rank",
        )])?;
        if two_views || job == Job::Flip { self.check_views() } else { Ok(()) }
    }

    /// Which settings of the augmentation count for two views, and for FLIP's one.
    fn check_views(&self) -> Result<(), String> {
        let data = &self.data;
        let views = self.views.clone().unwrap_or_default();
        let digits = data.source == Source::Digits;
        let geometry = [data.shift, data.rotate, data.zoom];
        let light = [views.brightness, views.contrast, views.blur, views.sigma];
        let none = |values: &[f64]| values.iter().all(|&v| v == 0.0);
        first_broken(&[
            (data.flip == 0.5, "data.flip says nothing to this job: its views flip photographs by half"),
            (
                digits || (none(&geometry) && none(&light)),
                "data.shift, rotate, zoom and views.brightness, contrast, blur, sigma are for the digits alone",
            ),
            (
                (digits && self.job != Job::Flip)
                    || views.kind == ViewKind::MocoV3
                    || data.crop_min_area == 0.2,
                "data.crop_min_area says nothing to these views, only to views.kind = \"moco-v3\"",
            ),
        ])
    }
}
