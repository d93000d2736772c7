//! Which values make sense.

use super::Recipe;

impl Recipe {
    /// Values out of range, by key.
    pub(super) fn check(&self) -> Result<(), String> {
        let dims = self.model.dims().map_err(|e| e.to_string())?;
        let positive = [
            ("model.img_size", dims.img_size),
            ("model.patch_size", dims.patch_size),
            ("model.embed_dim", dims.embed_dim),
            ("model.depth", dims.depth),
            ("model.num_heads", dims.num_heads),
            ("model.decoder_embed_dim", dims.decoder_embed_dim),
            ("model.decoder_num_heads", dims.decoder_num_heads),
            ("data.batch", self.data.batch),
            ("optim.accumulate", self.optim.accumulate),
            ("schedule.epochs", self.schedule.epochs),
            ("run.log_every", self.run.log_every),
            ("run.checkpoint_every", self.run.checkpoint_every),
            ("run.preview_every", self.run.preview_every),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{key} is 0, needs at least 1"));
        }
        let (lr, wd, decay) = (self.optim.base_lr, self.optim.weight_decay, self.optim.layer_decay);
        let [beta1, beta2] = self.optim.betas;
        let (f, warmup) = (&self.finetune, self.schedule.warmup_epochs);
        let below_one = |v: f64| (0.0..1.0).contains(&v);
        let share = |v: f64| (0.0..=1.0).contains(&v);
        let rules = [
            (dims.img_size % dims.patch_size == 0, "model.img_size is no multiple of model.patch_size"),
            (matches!(dims.in_chans, 1 | 3), "model.in_chans is neither 1 nor 3"),
            (dims.embed_dim % dims.num_heads == 0, "model.embed_dim is no multiple of model.num_heads"),
            (
                dims.decoder_embed_dim % dims.decoder_num_heads == 0,
                "model.decoder_embed_dim is no multiple of model.decoder_num_heads",
            ),
            (dims.mask_ratio > 0.0 && dims.mask_ratio < 1.0, "model.mask_ratio is not between 0 and 1"),
            (dims.mlp_ratio.is_finite() && dims.mlp_ratio > 0.0, "model.mlp_ratio is not above 0"),
            (lr.is_finite() && lr > 0.0, "optim.base_lr is not above 0"),
            (wd.is_finite() && wd >= 0.0, "optim.weight_decay is negative"),
            (decay > 0.0 && decay <= 1.0, "optim.layer_decay is not in (0, 1]"),
            (below_one(beta1) && below_one(beta2), "optim.betas are not in [0, 1)"),
            (below_one(self.optim.momentum), "optim.momentum is not in [0, 1)"),
            (self.optim.clip.is_none_or(|c| c > 0.0), "optim.clip is not above 0"),
            (self.optim.ema.is_none_or(below_one), "optim.ema is not in [0, 1)"),
            (
                (0.0..=self.schedule.epochs as f64).contains(&warmup),
                "schedule.warmup_epochs is not between 0 and schedule.epochs",
            ),
            (self.schedule.min_lr.is_finite() && self.schedule.min_lr >= 0.0, "schedule.min_lr is negative"),
            (
                self.data.crop_min_area > 0.0 && share(self.data.crop_min_area),
                "data.crop_min_area is not in (0, 1]",
            ),
            (share(self.data.flip), "data.flip is no probability"),
            (share(self.data.shift), "data.shift is not in [0, 1]"),
            (below_one(self.data.zoom), "data.zoom is not in [0, 1)"),
            (self.data.rotate.is_finite() && self.data.rotate >= 0.0, "data.rotate is negative"),
            (below_one(f.drop_path), "finetune.drop_path is not in [0, 1)"),
            (below_one(f.smoothing), "finetune.smoothing is not in [0, 1)"),
            (share(f.reprob), "finetune.reprob is no probability"),
            (f.mixup >= 0.0 && f.cutmix >= 0.0, "finetune.mixup and finetune.cutmix must not be negative"),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, message)) => Err((*message).to_owned()),
            None => Ok(()),
        }
    }
}
