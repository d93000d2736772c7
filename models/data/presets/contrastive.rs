//! Two views of an image for contrastive learning, and the single view of FLIP.

use smalti::{Error, Result};

use super::{DigitStrength, digits};
use crate::data::{
    Filter, Pipeline, Views,
    augment::{
        ColorJitter, CropDraw, GaussianBlur, Grayscale, HorizontalFlip, Normalize, RandomRegion,
        RandomResizedCrop, Randomly, Solarize,
    },
};

/// Sigma of the blur in pixels, at 224 x 224.
const BLUR: GaussianBlur = GaussianBlur(0.1, 2.0);

/// Whose two views. All begin with a random crop, bilinear, of aspect 3/4 to 4/3.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TwoViews {
    /// MoCo v1 (`main_moco.py` without `--aug-plus`), twice: crop of area 0.2 to 1; grayscale, p 0.2; jitter of
    /// brightness, contrast, saturation and hue by 0.4, always; flip, p 0.5. (Grey stays grey under the jitter.)
    MocoV1,
    /// MoCo v2 (`main_moco.py --aug-plus`) and SimSiam (`main_simsiam.py`), twice: crop of area 0.2 to 1; jitter
    /// 0.4, 0.4, 0.4, hue 0.1, p 0.8; grayscale, p 0.2; blur of sigma 0.1 to 2, p 0.5; flip, p 0.5.
    MocoV2,
    /// MoCo v3 (`main_moco.py`; BYOL's): crop of area `min_area` to 1; jitter 0.4, 0.4, 0.2, hue 0.1, p 0.8;
    /// grayscale, p 0.2; blur, always in the first view, p 0.1 in the second; solarisation at 128, p 0.2, in the
    /// second view alone; flip, p 0.5.
    MocoV3 {
        /// 0.08 for a ViT, 0.2 for a ResNet.
        min_area: f64,
    },
    /// MoCo's notebook for CIFAR-10, twice: crop of area 0.08 to 1; flip, p 0.5; jitter 0.4, 0.4, 0.4, hue 0.1,
    /// p 0.8; grayscale, p 0.2; no blur. Goes with [`CIFAR10_MEAN`](crate::data::augment::CIFAR10_MEAN).
    CifarNotebook,
}

/// Two views of `size` x `size`, normalised by `normalize` (ImageNet's constants but for CIFAR).
///
/// Errors: a smallest area outside of 0 to 1.
pub fn two_views(kind: TwoViews, size: u32, normalize: &Normalize) -> Result<Views> {
    let crop = |min_area: f64| {
        if !(min_area > 0.0 && min_area <= 1.0) {
            return Err(Error::msg(format!("{kind:?}: the smallest area must lie in 0..1")));
        }
        let crop = RandomResizedCrop { filter: Filter::Bilinear, ..RandomResizedCrop::new(size, min_area) };
        Ok(Pipeline::new(normalize.clone()).then(crop))
    };
    let jitter = |saturation, hue| ColorJitter { brightness: 0.4, contrast: 0.4, saturation, hue };
    let flip = HorizontalFlip(0.5);
    let view = |second: bool| {
        Ok(match kind {
            TwoViews::MocoV1 => crop(0.2)?.then(Randomly(0.2, Grayscale)).then(jitter(0.4, 0.4)).then(flip),
            TwoViews::MocoV2 => crop(0.2)?
                .then(Randomly(0.8, jitter(0.4, 0.1)))
                .then(Randomly(0.2, Grayscale))
                .then(Randomly(0.5, BLUR))
                .then(flip),
            TwoViews::MocoV3 { min_area } => {
                let coloured =
                    crop(min_area)?.then(Randomly(0.8, jitter(0.2, 0.1))).then(Randomly(0.2, Grayscale));
                if second {
                    coloured.then(Randomly(0.1, BLUR)).then(Randomly(0.2, Solarize(128))).then(flip)
                } else {
                    coloured.then(BLUR).then(flip)
                }
            }
            TwoViews::CifarNotebook => {
                crop(0.08)?.then(flip).then(Randomly(0.8, jitter(0.4, 0.1))).then(Randomly(0.2, Grayscale))
            }
        })
    };
    Ok(Views(vec![view(false)?, view(true)?]))
}

/// FLIP's single view (`utils/transform_util.py`, crop v4): crop of area 0.5 to 1, aspect 3/4 to 4/3, else the
/// central square; flip, p 0.5; bicubic in floats without antialiasing, not clipped; ImageNet normalisation. The
/// flip stands before the scaling, which changes nothing but the work.
pub fn flip_pretrain(size: u32) -> Result<Pipeline> {
    let crop = RandomResizedCrop { draw: CropDraw::TenTriesOrSquare, ..RandomResizedCrop::new(size, 0.5) };
    let pipeline = Pipeline::new(Normalize::imagenet()?).then(RandomRegion(crop)).then(HorizontalFlip(0.5));
    Ok(pipeline.resize_unclipped(size))
}

/// Strengths of two views of small drawings. Both are drawn from the same pipeline.
#[derive(Clone, Copy, Debug)]
pub struct DigitViews {
    /// Shift, rotation, zoom.
    pub geometry: DigitStrength,
    /// The crop has at least this share of the area; 1 for no crop.
    pub min_area: f64,
    /// Factors of brightness are uniform in 1 minus to 1 plus this.
    pub brightness: f64,
    /// As `brightness`.
    pub contrast: f64,
    /// Probability of a blur.
    pub blur: f64,
    /// Largest sigma of the blur as a fraction of the side.
    pub sigma: f64,
}

impl Default for DigitViews {
    /// Gentle: what is left is a digit that people can read. No flip, which would make other signs of digits.
    fn default() -> Self {
        DigitViews {
            geometry: DigitStrength { shift: 0.125, degrees: 15.0, scale: 0.2 },
            min_area: 0.7,
            brightness: 0.3,
            contrast: 0.3,
            blur: 0.5,
            sigma: 0.04,
        }
    }
}

/// Two views of the shipped digits at `size` x `size` (some 16 to 32 pixels), in one channel or three: scaled
/// up, turned and zoomed, shifted, cropped, jittered, blurred, normalised as by [`digits`].
///
/// Errors: strengths outside of their ranges.
pub fn digit_views(size: u32, channels: usize, strength: DigitViews) -> Result<Views> {
    let DigitViews { geometry, min_area, brightness, contrast, blur, sigma } = strength;
    let shares = [min_area, brightness, contrast, blur, sigma];
    if min_area == 0.0 || shares.iter().any(|share| !(0.0..=1.0).contains(share)) {
        return Err(Error::msg(format!(
            "{strength:?}: all but the geometry must lie in 0..1, the area above 0"
        )));
    }
    let view = || {
        let mut pipeline = digits(size, channels, Some(geometry))?;
        if min_area < 1.0 {
            pipeline = pipeline.then(RandomResizedCrop::new(size, min_area));
        }
        let jitter = ColorJitter { brightness, contrast, saturation: 0.0, hue: 0.0 };
        let blurring = GaussianBlur(0.0, sigma * f64::from(size));
        Ok::<_, Error>(pipeline.then(jitter).then(Randomly(blur, blurring)))
    };
    Ok(Views(vec![view()?, view()?]))
}

#[cfg(test)]
mod tests;
