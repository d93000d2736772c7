//! Random colour edits and the blur of contrastive learning.

use std::borrow::Cow;

use smalti::{Result, Rng, ensure};

use super::{blur, colour, hue::hue};
use crate::data::{ImageOp, image::RgbImage};

/// Carries out an edit with a probability, else leaves the image (torchvision's `RandomApply`).
#[derive(Clone, Copy, Debug)]
pub struct Randomly<O>(pub f64, pub O);

impl<O: ImageOp> ImageOp for Randomly<O> {
    fn apply<'a>(&self, image: Cow<'a, RgbImage>, rng: &mut Rng) -> Result<Cow<'a, RgbImage>> {
        if rng.bernoulli(self.0) { self.1.apply(image, rng) } else { Ok(image) }
    }
}

/// torchvision's `ColorJitter`: brightness, contrast, saturation and hue, in random order. An edit of strength 0
/// is left out.
#[derive(Clone, Copy, Debug)]
pub struct ColorJitter {
    /// The factor is uniform in max(0, 1 - this) to 1 + this.
    pub brightness: f64,
    /// As `brightness`.
    pub contrast: f64,
    /// As `brightness`.
    pub saturation: f64,
    /// The turn is uniform in plus or minus this fraction of the circle, at most 0.5.
    pub hue: f64,
}

impl ColorJitter {
    /// Draws the four arguments and the order.
    pub fn draw(&self, rng: &mut Rng) -> Vec<Tint> {
        let mut factor = |x: f64| rng.range((1.0 - x).max(0.0), 1.0 + x) as f32;
        let brightness = (self.brightness, Tint::Brightness(factor(self.brightness)));
        let contrast = (self.contrast, Tint::Contrast(factor(self.contrast)));
        let saturation = (self.saturation, Tint::Saturation(factor(self.saturation)));
        let hue = (self.hue, Tint::Hue(rng.range(-self.hue, self.hue)));
        let mut tints = [brightness, contrast, saturation, hue];
        rng.shuffle(&mut tints);
        tints.into_iter().filter(|(strength, _)| *strength > 0.0).map(|(_, tint)| tint).collect()
    }
}

/// One edit of a [`ColorJitter`] with its argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Tint {
    /// 1 is the image.
    Brightness(f32),
    /// 1 is the image.
    Contrast(f32),
    /// 1 is the image.
    Saturation(f32),
    /// Fraction of the circle.
    Hue(f64),
}

impl Tint {
    /// Edits the image.
    pub fn apply(self, image: &mut RgbImage) {
        match self {
            Tint::Brightness(factor) => colour::brightness(image, factor),
            Tint::Contrast(factor) => colour::contrast(image, factor),
            Tint::Saturation(factor) => colour::color(image, factor),
            Tint::Hue(factor) => hue(image, factor),
        }
    }
}

impl ImageOp for ColorJitter {
    fn apply<'a>(&self, mut image: Cow<'a, RgbImage>, rng: &mut Rng) -> Result<Cow<'a, RgbImage>> {
        let factors = [self.brightness, self.contrast, self.saturation];
        ensure!(
            factors.iter().all(|x| x.is_finite() && *x >= 0.0) && (0.0..=0.5).contains(&self.hue),
            "color_jitter",
            "{self:?}: strengths must not be negative, hue not above 0.5"
        );
        self.draw(rng).into_iter().for_each(|tint| tint.apply(image.to_mut()));
        Ok(image)
    }
}

/// Three equal channels: Pillow's `convert("L")`.
#[derive(Clone, Copy, Debug)]
pub struct Grayscale;

impl ImageOp for Grayscale {
    fn apply<'a>(&self, mut image: Cow<'a, RgbImage>, _: &mut Rng) -> Result<Cow<'a, RgbImage>> {
        colour::grayscale(image.to_mut());
        Ok(image)
    }
}

/// Inverts the levels from the threshold on.
#[derive(Clone, Copy, Debug)]
pub struct Solarize(pub u32);

impl ImageOp for Solarize {
    fn apply<'a>(&self, mut image: Cow<'a, RgbImage>, _: &mut Rng) -> Result<Cow<'a, RgbImage>> {
        colour::solarize(image.to_mut(), self.0);
        Ok(image)
    }
}

/// Pillow's Gaussian blur; the standard deviation in pixels is uniform in this range.
#[derive(Clone, Copy, Debug)]
pub struct GaussianBlur(pub f64, pub f64);

impl ImageOp for GaussianBlur {
    fn apply<'a>(&self, mut image: Cow<'a, RgbImage>, rng: &mut Rng) -> Result<Cow<'a, RgbImage>> {
        let sigma = rng.range(self.0, self.1) as f32;
        blur::gaussian_blur(image.to_mut(), sigma)?;
        Ok(image)
    }
}

#[cfg(test)]
mod tests;
