//! The papers' pipelines.

mod contrastive;

pub use contrastive::{DigitViews, TwoViews, digit_views, flip_pretrain, two_views};

use smalti::{Error, Result};

use super::{
    DIGITS_MEAN, DIGITS_STD, Filter, Pipeline,
    augment::{
        CropDraw, HorizontalFlip, Normalize, RandAugment, RandomAffine, RandomErasing, RandomResizedCrop,
        RandomShift, Resample, ResizeCenterCrop, ResizeTo,
    },
};

/// MAE pre-training (`main_pretrain.py`): crop of area 0.2 to 1, bicubic; flip; ImageNet normalisation.
pub fn mae_pretrain(size: u32) -> Result<Pipeline> {
    let crop = RandomResizedCrop::new(size, 0.2);
    Ok(Pipeline::new(Normalize::imagenet()?).then(crop).then(HorizontalFlip(0.5)))
}

/// MAE fine-tuning: crop of area 0.08 to 1, flip, RandAugment in timm's notation (`rand-m9-mstd0.5-inc1`) with
/// bicubic geometry, random erasing with probability `erasing` (0.25). Mixing works on batches: see
/// [`MixUp`](super::augment::MixUp).
pub fn mae_finetune(size: u32, randaugment: &str, erasing: f64) -> Result<Pipeline> {
    let augment =
        RandAugment { resample: Resample::Fixed(Filter::Bicubic), ..RandAugment::parse(randaugment)? };
    let crop = RandomResizedCrop::new(size, 0.08);
    Ok(Pipeline::new(Normalize::imagenet()?)
        .then(crop)
        .then(HorizontalFlip(0.5))
        .then(augment)
        .erasing(RandomErasing::new(erasing)))
}

/// MAE's linear probe: one draw of area 0.08 to 1, cut to the image; flip.
pub fn linear_probe(size: u32) -> Result<Pipeline> {
    let crop = RandomResizedCrop { draw: CropDraw::Clamped, ..RandomResizedCrop::new(size, 0.08) };
    Ok(Pipeline::new(Normalize::imagenet()?).then(crop).then(HorizontalFlip(0.5)))
}

/// Evaluation: short side to size / 0.875 (256 for 224), central crop; above 224 the short side is the crop's
/// (MAE's `util/datasets.py`).
pub fn evaluate(size: u32) -> Result<Pipeline> {
    let resize = if size > 224 { size } else { (f64::from(size) / 0.875) as u32 };
    Ok(Pipeline::new(Normalize::imagenet()?).then(ResizeCenterCrop::new(resize, size)))
}

/// Strengths of the light augmentation of small drawings.
#[derive(Clone, Copy, Debug)]
pub struct DigitStrength {
    /// Shift, up to this fraction of the side each way.
    pub shift: f64,
    /// Rotation, up to this many degrees each way.
    pub degrees: f64,
    /// Scaling, up to this fraction smaller or larger.
    pub scale: f64,
}

impl Default for DigitStrength {
    fn default() -> Self {
        DigitStrength { shift: 0.125, degrees: 10.0, scale: 0.1 }
    }
}

/// The shipped digits at `size` x `size`, in one channel or three, with the mean and deviation of the training
/// rows; `strength` for training, `None` for evaluation.
pub fn digits(size: u32, channels: usize, strength: Option<DigitStrength>) -> Result<Pipeline> {
    let normalize = Normalize::new(&vec![DIGITS_MEAN; channels], &vec![DIGITS_STD; channels])?;
    let pipeline = Pipeline::new(normalize).then(ResizeTo { size, filter: Filter::Bicubic });
    let Some(DigitStrength { shift, degrees, scale }) = strength else { return Ok(pipeline) };
    if !((0.0..=1.0).contains(&shift) && (0.0..1.0).contains(&scale) && degrees.is_finite()) {
        return Err(Error::msg(format!(
            "digits: shift {shift} and scale {scale} must lie in 0..1, degrees {degrees} be a number"
        )));
    }
    let (fill, filter) = ([0; 3], Filter::Bilinear);
    let affine = RandomAffine { degrees, scale: (1.0 - scale, 1.0 + scale), filter, fill };
    let padding = (shift * f64::from(size)).round() as u32;
    Ok(pipeline.then(affine).then(RandomShift { padding, fill }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{RgbImage, Transform};
    use smalti::Rng;

    #[test]
    fn every_preset_gives_its_shape() {
        let image = RgbImage::from_fn(70, 50, |x, y| ::image::Rgb([x as u8 * 3, y as u8 * 5, 100]));
        let all = [
            mae_pretrain(32),
            mae_finetune(32, "rand-m9-mstd0.5-inc1", 0.25),
            linear_probe(32),
            evaluate(32),
            digits(32, 3, Some(DigitStrength::default())),
        ];
        for pipeline in all {
            let pipeline = pipeline.unwrap();
            for seed in 0..40 {
                let views = pipeline.views(&image, &mut Rng::new(seed)).unwrap();
                assert_eq!((views.len(), views[0].shape, views[0].data.len()), (1, [3, 32, 32], 3 * 32 * 32));
                assert!(views[0].data.iter().all(|v| v.is_finite()));
                assert_eq!(views, pipeline.views(&image, &mut Rng::new(seed)).unwrap());
            }
        }
        assert_eq!(evaluate(240).unwrap().view(&image, &mut Rng::new(0)).unwrap().shape, [3, 240, 240]);
        assert!(mae_finetune(32, "rand-z1", 0.25).is_err());
        let wild = DigitStrength { scale: 1.0, ..DigitStrength::default() };
        assert!(digits(8, 1, Some(wild)).is_err());
        assert!(digits(8, 2, None).is_err());
    }
}
