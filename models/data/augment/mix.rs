//! Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) on a whole batch, as timm's `Mixup` in batch mode.

use smalti::{Result, Rng, bail, ensure};

use crate::data::Region;

/// Mixes sample i of a batch with sample B-1-i.
#[derive(Clone, Copy, Debug)]
pub struct MixUp {
    /// Mixup's lambda is Beta(a, a); 0 turns mixup off.
    pub mixup_alpha: f64,
    /// CutMix's lambda is Beta(a, a); 0 turns CutMix off.
    pub cutmix_alpha: f64,
    /// Share of batches that are mixed at all.
    pub probability: f64,
    /// Share of CutMix among the mixed, if both are on.
    pub switch_probability: f64,
    /// Label smoothing.
    pub smoothing: f32,
    /// Number of classes.
    pub classes: usize,
}

/// What was done to a batch.
#[derive(Clone, Debug)]
pub struct Mixed {
    /// Target distributions [N, classes]; each row sums to 1.
    pub targets: Vec<f32>,
    /// Weight of the sample itself; 1 if the batch was left alone.
    pub lambda: f64,
    /// CutMix's rectangle, now showing the partner; `None` after mixup.
    pub region: Option<Region>,
}

impl MixUp {
    /// The fine-tuning recipe of MAE: mixup 0.8, CutMix 1.0, every batch, half and half, smoothing 0.1.
    pub fn mae(classes: usize) -> Self {
        let (mixup_alpha, cutmix_alpha, smoothing) = (0.8, 1.0, 0.1);
        MixUp { mixup_alpha, cutmix_alpha, probability: 1.0, switch_probability: 0.5, smoothing, classes }
    }

    /// Mixes `images` [N, C, H, W] in place and returns the soft targets. Nothing is changed if it fails.
    ///
    /// Errors: an odd N, a size that does not match the shape, a label that is not a class.
    pub fn apply(
        &self,
        images: &mut [f32],
        shape: [usize; 4],
        labels: &[i64],
        rng: &mut Rng,
    ) -> Result<Mixed> {
        let [n, c, h, w] = shape;
        ensure!(images.len() == n * c * h * w, "mixup", "{} values do not make {shape:?}", images.len());
        ensure!(labels.len() == n, "mixup", "{} labels for {n} images", labels.len());
        ensure!(n % 2 == 0, "mixup", "the batch of {n} has a sample without a partner; needs an even size");
        check_labels(labels, self.classes)?;
        let (mut lambda, cut) = self.draw(rng);
        let mut region = None;
        if cut && lambda < 1.0 {
            let (cut, kept) = cut_region(w, h, lambda, rng);
            swap_region(images, shape, cut);
            (region, lambda) = (Some(cut), kept);
        } else if lambda < 1.0 {
            blend_pairs(images, n, lambda as f32);
        }
        Ok(Mixed {
            targets: soft_targets(labels, self.classes, self.smoothing, lambda as f32)?,
            lambda,
            region,
        })
    }

    fn draw(&self, rng: &mut Rng) -> (f64, bool) {
        let (mixup, cutmix) = (self.mixup_alpha > 0.0, self.cutmix_alpha > 0.0);
        if !(mixup || cutmix) || !rng.bernoulli(self.probability) {
            return (1.0, false);
        }
        let cut = cutmix && (!mixup || rng.bernoulli(self.switch_probability));
        let alpha = if cut { self.cutmix_alpha } else { self.mixup_alpha };
        (rng.beta(alpha, alpha), cut)
    }
}

/// A rectangle of about 1 - lambda of the image, cut off at the border, and the share of the image outside of it.
fn cut_region(width: usize, height: usize, lambda: f64, rng: &mut Rng) -> (Region, f64) {
    let ratio = (1.0 - lambda).sqrt();
    let mut span = |side: usize| {
        let half = (side as f64 * ratio) as usize / 2;
        let centre = rng.below(side.max(1) as u64) as usize;
        (centre.saturating_sub(half), (centre + half).min(side))
    };
    let ((top, bottom), (left, right)) = (span(height), span(width));
    let (w, h) = (right - left, bottom - top);
    let share = (w * h) as f64 / (width * height).max(1) as f64;
    (Region { left: left as u32, top: top as u32, width: w as u32, height: h as u32 }, 1.0 - share)
}

/// Both partners show the other's rectangle, so the two change places.
fn swap_region(images: &mut [f32], [n, c, h, w]: [usize; 4], region: Region) {
    let (left, rows) = (region.left as usize, region.top as usize..(region.top + region.height) as usize);
    for_pairs(images, n, |a, b| {
        for plane in 0..c {
            for y in rows.clone() {
                let start = (plane * h + y) * w + left;
                let line = start..start + region.width as usize;
                a[line.clone()].swap_with_slice(&mut b[line]);
            }
        }
    });
}

fn blend_pairs(images: &mut [f32], n: usize, lambda: f32) {
    let rest = 1.0 - lambda;
    for_pairs(images, n, |a, b| {
        for (x, y) in a.iter_mut().zip(b) {
            (*x, *y) = (*x * lambda + *y * rest, *y * lambda + *x * rest);
        }
    });
}

fn for_pairs(images: &mut [f32], n: usize, mut each: impl FnMut(&mut [f32], &mut [f32])) {
    let sample = images.len() / n.max(1);
    if sample == 0 {
        return;
    }
    let (front, back) = images.split_at_mut(n / 2 * sample);
    for (a, b) in front.chunks_exact_mut(sample).zip(back.chunks_exact_mut(sample).rev()) {
        each(a, b);
    }
}

fn check_labels(labels: &[i64], classes: usize) -> Result<()> {
    match labels.iter().find(|label| usize::try_from(**label).map_or(true, |l| l >= classes)) {
        Some(label) => bail!("soft_targets", "label {label} is not one of {classes} classes"),
        None => Ok(()),
    }
}

/// Target distributions [N, classes]: one-hot rows with off value s/C and on value 1 - s + s/C, mixed with
/// weight `lambda` to those of the reversed batch. A `lambda` of 1 is label smoothing alone.
///
/// Errors: a label that is not a class.
pub fn soft_targets(labels: &[i64], classes: usize, smoothing: f32, lambda: f32) -> Result<Vec<f32>> {
    check_labels(labels, classes)?;
    let off = smoothing / classes as f32;
    let mut targets = vec![off; labels.len() * classes];
    for (i, row) in targets.chunks_exact_mut(classes.max(1)).enumerate() {
        row[labels[i] as usize] += (1.0 - smoothing) * lambda;
        row[labels[labels.len() - 1 - i] as usize] += (1.0 - smoothing) * (1.0 - lambda);
    }
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop_assert, proptest};

    fn batch(n: usize, side: usize) -> (Vec<f32>, [usize; 4], Vec<i64>) {
        let images = (0..n * 2 * side * side).map(|i| (i / (2 * side * side)) as f32).collect();
        (images, [n, 2, side, side], (0..n as i64).collect())
    }

    proptest! {
        #[test]
        fn rows_sum_to_one_and_match_the_pixels(seed: u64, half in 1usize..5, side in 1usize..20, cutmix: bool) {
            let n = 2 * half;
            let (mut images, shape, labels) = batch(n, side);
            let mix = MixUp { switch_probability: f64::from(u8::from(cutmix)), smoothing: 0.0, ..MixUp::mae(n) };
            let mixed = mix.apply(&mut images, shape, &labels, &mut Rng::new(seed)).unwrap();
            for i in 0..n {
                let row = &mixed.targets[i * n..(i + 1) * n];
                prop_assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5);
                // Pixel values are sample numbers, so the mean of a sample tells how much of its partner it has.
                let pixels = &images[i * 2 * side * side..(i + 1) * 2 * side * side];
                let mean = pixels.iter().sum::<f32>() / pixels.len() as f32;
                let expected: f32 = row.iter().enumerate().map(|(c, t)| c as f32 * t).sum();
                prop_assert!((mean - expected).abs() < 1e-3 * n as f32, "{mean} {expected}");
            }
            if let Some(region) = mixed.region {
                prop_assert!(region.left + region.width <= side as u32 && region.top + region.height <= side as u32);
            }
        }
    }

    #[test]
    fn smoothing() {
        let targets = soft_targets(&[1, 3], 4, 0.1, 1.0).unwrap();
        for (target, wanted) in targets[..4].iter().zip([0.025, 0.925, 0.025, 0.025]) {
            assert!((target - wanted).abs() < 1e-6);
        }
        let mixed = soft_targets(&[1, 3], 4, 0.1, 0.75).unwrap();
        assert!((mixed[1] - 0.7).abs() < 1e-6 && (mixed[3] - 0.25).abs() < 1e-6);
    }

    #[test]
    fn mistakes() {
        let (mut images, shape, labels) = batch(4, 3);
        let mix = MixUp::mae(4);
        let mut rng = Rng::new(0);
        assert!(mix.apply(&mut images[1..], shape, &labels, &mut rng).is_err());
        assert!(mix.apply(&mut images, shape, &labels[1..], &mut rng).is_err());
        assert!(
            mix.apply(&mut images, shape, &[0, 1, 2, 4], &mut rng)
                .unwrap_err()
                .to_string()
                .contains("label 4")
        );
        assert!(mix.apply(&mut images, shape, &[0, 1, 2, -1], &mut rng).is_err());
        let (mut odd, shape, labels) = batch(3, 3);
        assert!(mix.apply(&mut odd, shape, &labels, &mut rng).unwrap_err().to_string().contains("even"));
    }

    #[test]
    fn turned_off() {
        let (mut images, shape, labels) = batch(4, 3);
        let before = images.clone();
        let mix = MixUp { mixup_alpha: 0.0, cutmix_alpha: 0.0, ..MixUp::mae(4) };
        let mixed = mix.apply(&mut images, shape, &labels, &mut Rng::new(0)).unwrap();
        assert!(images == before && mixed.lambda == 1.0 && mixed.region.is_none());
    }
}
