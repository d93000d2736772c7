//! Crops, resizes and the flip.

use std::borrow::Cow;

use smalti::{Result, Rng, ensure};

use crate::data::{
    ImageOp,
    image::{self, Filter, Region, RgbImage},
};

/// What to do with a drawn rectangle that does not fit into the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CropDraw {
    /// torchvision: draw up to ten times, then take the largest centred rectangle of an allowed aspect.
    TenTries,
    /// FLIP (`utils/transform_util.py`): draw up to ten times, then take the central square of
    /// size / (size + 32) of the short side.
    TenTriesOrSquare,
    /// TensorFlow's crop of MAE's linear probe (its `util/crop.py`): one draw, each side cut to the image's.
    Clamped,
}

/// A random rectangle, scaled to `size` x `size`.
#[derive(Clone, Copy, Debug)]
pub struct RandomResizedCrop {
    /// Side of the result.
    pub size: u32,
    /// Range of the rectangle's area as a fraction of the image's, uniform.
    pub area: (f64, f64),
    /// Range of width / height, log-uniform.
    pub aspect: (f64, f64),
    /// Filter of the scaling.
    pub filter: Filter,
    /// What to do with rectangles that do not fit.
    pub draw: CropDraw,
}

impl RandomResizedCrop {
    /// Area from `min_area` to 1, aspect 3/4 to 4/3, bicubic, ten tries.
    pub fn new(size: u32, min_area: f64) -> Self {
        let (area, aspect) = ((min_area, 1.0), (3.0 / 4.0, 4.0 / 3.0));
        RandomResizedCrop { size, area, aspect, filter: Filter::Bicubic, draw: CropDraw::TenTries }
    }

    /// Draws the rectangle for an image of `width` x `height`.
    pub fn region(&self, width: u32, height: u32, rng: &mut Rng) -> Region {
        match self.draw {
            CropDraw::TenTries | CropDraw::TenTriesOrSquare => {
                for _ in 0..10 {
                    let (w, h) = self.sides(width, height, rng);
                    if (1..=width).contains(&w) && (1..=height).contains(&h) {
                        return place(width, height, w, h, rng);
                    }
                }
                if self.draw == CropDraw::TenTries {
                    self.fallback(width, height)
                } else {
                    self.square(width, height)
                }
            }
            CropDraw::Clamped => {
                let (w, h) = self.sides(width, height, rng);
                place(width, height, w.clamp(1, width), h.clamp(1, height), rng)
            }
        }
    }

    fn sides(&self, width: u32, height: u32, rng: &mut Rng) -> (u32, u32) {
        let area = f64::from(width) * f64::from(height) * rng.range(self.area.0, self.area.1);
        let aspect = rng.range(self.aspect.0.ln(), self.aspect.1.ln()).exp();
        let round = |side: f64| side.round_ties_even() as u32;
        (round((area * aspect).sqrt()), round((area / aspect).sqrt()))
    }

    fn fallback(&self, width: u32, height: u32) -> Region {
        let aspect = f64::from(width) / f64::from(height);
        let (w, h) = if aspect < self.aspect.0 {
            (width, (f64::from(width) / self.aspect.0).round_ties_even() as u32)
        } else if aspect > self.aspect.1 {
            ((f64::from(height) * self.aspect.1).round_ties_even() as u32, height)
        } else {
            (width, height)
        };
        let (w, h) = (w.clamp(1, width), h.clamp(1, height));
        Region { left: (width - w) / 2, top: (height - h) / 2, width: w, height: h }
    }

    fn square(&self, width: u32, height: u32) -> Region {
        let size = f64::from(self.size);
        let side = ((size / (size + 32.0) * f64::from(width.min(height))) as u32).max(1);
        Region {
            left: (width - side).div_ceil(2),
            top: (height - side).div_ceil(2),
            width: side,
            height: side,
        }
    }
}

/// The random rectangle alone, unscaled: for a [`Pipeline`](crate::data::Pipeline) that scales in floats.
#[derive(Clone, Copy, Debug)]
pub struct RandomRegion(pub RandomResizedCrop);

impl ImageOp for RandomRegion {
    fn apply<'a>(&self, image: Cow<'a, RgbImage>, rng: &mut Rng) -> Result<Cow<'a, RgbImage>> {
        image::crop(&image, self.0.region(image.width(), image.height(), rng)).map(Cow::Owned)
    }
}

fn place(width: u32, height: u32, w: u32, h: u32, rng: &mut Rng) -> Region {
    let top = rng.below(u64::from(height - h) + 1) as u32;
    let left = rng.below(u64::from(width - w) + 1) as u32;
    Region { left, top, width: w, height: h }
}

impl ImageOp for RandomResizedCrop {
    fn apply<'a>(&self, image: Cow<'a, RgbImage>, rng: &mut Rng) -> Result<Cow<'a, RgbImage>> {
        let region = self.region(image.width(), image.height(), rng);
        image::resized_crop(&image, region, self.size, self.size, self.filter).map(Cow::Owned)
    }
}

/// The test transform: the short side to `resize`, then the central `crop` x `crop`.
#[derive(Clone, Copy, Debug)]
pub struct ResizeCenterCrop {
    /// Length of the short side after scaling; at least `crop`.
    pub resize: u32,
    /// Side of the result.
    pub crop: u32,
    /// Filter of the scaling.
    pub filter: Filter,
}

impl ResizeCenterCrop {
    /// `resize` to `crop`, bicubic.
    pub fn new(resize: u32, crop: u32) -> Self {
        ResizeCenterCrop { resize, crop, filter: Filter::Bicubic }
    }
}

/// Rectangle of `size` x `size` in the middle, rounded as torchvision rounds. `size` must fit.
pub fn center_region(width: u32, height: u32, size: u32) -> Result<Region> {
    ensure!(
        size > 0 && size <= width && size <= height,
        "center_crop",
        "a square of {size} does not fit into an image of {width}x{height}"
    );
    let start = |side: u32| (f64::from(side - size) / 2.0).round_ties_even() as u32;
    Ok(Region { left: start(width), top: start(height), width: size, height: size })
}

/// Size of an image of `width` x `height` whose short side is scaled to `short` (torchvision: the long side is
/// cut to a whole number).
fn short_side(width: u32, height: u32, short: u32) -> (u32, u32) {
    let long = |a: u32, b: u32| (u64::from(short) * u64::from(a) / u64::from(b).max(1)) as u32;
    if width <= height { (short, long(height, width)) } else { (long(width, height), short) }
}

impl ImageOp for ResizeCenterCrop {
    fn apply<'a>(&self, image: Cow<'a, RgbImage>, _: &mut Rng) -> Result<Cow<'a, RgbImage>> {
        let (width, height) = short_side(image.width(), image.height(), self.resize);
        let region = center_region(width, height, self.crop)?;
        let scaled = image::resize(&image, width, height, self.filter)?;
        image::crop(&scaled, region).map(Cow::Owned)
    }
}

/// Scales to exactly `size` x `size`, whatever the aspect.
#[derive(Clone, Copy, Debug)]
pub struct ResizeTo {
    /// Side of the result.
    pub size: u32,
    /// Filter of the scaling.
    pub filter: Filter,
}

impl ImageOp for ResizeTo {
    fn apply<'a>(&self, image: Cow<'a, RgbImage>, _: &mut Rng) -> Result<Cow<'a, RgbImage>> {
        if image.dimensions() == (self.size, self.size) {
            return Ok(image);
        }
        image::resize(&image, self.size, self.size, self.filter).map(Cow::Owned)
    }
}

/// Mirrors left and right with this probability.
#[derive(Clone, Copy, Debug)]
pub struct HorizontalFlip(pub f64);

impl ImageOp for HorizontalFlip {
    fn apply<'a>(&self, mut image: Cow<'a, RgbImage>, rng: &mut Rng) -> Result<Cow<'a, RgbImage>> {
        if rng.bernoulli(self.0) {
            ::image::imageops::flip_horizontal_in_place(image.to_mut());
        }
        Ok(image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    proptest! {
        #[test]
        fn regions_are_inside(width in 1u32..700, height in 1u32..700, seed: u64, draw in 0usize..3, min in 0.01f64..1.0) {
            let draw = [CropDraw::Clamped, CropDraw::TenTries, CropDraw::TenTriesOrSquare][draw];
            let crop = RandomResizedCrop { draw, ..RandomResizedCrop::new(32, min) };
            let region = crop.region(width, height, &mut Rng::new(seed));
            prop_assert!(region.fits(width, height), "{region:?} in {width}x{height}");
        }

        #[test]
        fn test_crops_have_their_size(width in 1u32..90, height in 1u32..90, crop in 1u32..40, more in 0u32..9) {
            let op = ResizeCenterCrop::new(crop + more, crop);
            let image = RgbImage::new(width, height);
            let result = op.apply(Cow::Owned(image), &mut Rng::new(0)).unwrap();
            prop_assert_eq!(result.dimensions(), (crop, crop));
        }
    }

    #[test]
    fn areas_and_aspects_are_those_asked_for() {
        let crop = RandomResizedCrop::new(224, 0.2);
        let mut rng = Rng::new(1);
        let (mut area, mut log_aspect) = (0.0, 0.0);
        for _ in 0..4000 {
            let r = crop.region(1000, 1000, &mut rng);
            let fraction = f64::from(r.width) * f64::from(r.height) / 1e6;
            let aspect = f64::from(r.width) / f64::from(r.height);
            assert!(
                (0.198..=1.0).contains(&fraction) && (0.745..1.34).contains(&aspect),
                "{fraction} {aspect}"
            );
            area += fraction / 4000.0;
            log_aspect += aspect.ln() / 4000.0;
        }
        // A little under 0.6: the largest rectangles fit only if they are nearly square.
        assert!((0.53..0.6).contains(&area) && log_aspect.abs() < 0.01, "{area} {log_aspect}");
    }

    #[test]
    fn a_long_image_falls_back_to_its_centre() {
        let crop = RandomResizedCrop { area: (0.9, 1.0), ..RandomResizedCrop::new(224, 0.0) };
        let centre = Region { left: 433, top: 0, width: 133, height: 100 };
        assert_eq!(crop.region(1000, 100, &mut Rng::new(2)), centre);
        let square = RandomResizedCrop { draw: CropDraw::TenTriesOrSquare, ..crop };
        let centre = Region { left: 457, top: 7, width: 87, height: 87 };
        assert_eq!(square.region(1000, 100, &mut Rng::new(2)), centre);
        let single = RandomResizedCrop { draw: CropDraw::Clamped, ..crop };
        assert_eq!(single.region(1000, 100, &mut Rng::new(2)).height, 100);
    }

    #[test]
    fn sizes_of_torchvision() {
        assert_eq!(short_side(500, 375, 256), (341, 256));
        assert_eq!(short_side(375, 500, 256), (256, 341));
        // (341 - 224) / 2 = 58.5 goes to the even 58.
        assert_eq!(
            center_region(341, 256, 224).unwrap(),
            Region { left: 58, top: 16, width: 224, height: 224 }
        );
        assert!(center_region(100, 256, 224).unwrap_err().to_string().contains("100x256"));
    }

    #[test]
    fn flip_mirrors() {
        let image = RgbImage::from_fn(3, 2, |x, y| ::image::Rgb([x as u8, y as u8, 9]));
        let flipped = HorizontalFlip(1.0).apply(Cow::Borrowed(&image), &mut Rng::new(0)).unwrap();
        assert_eq!(flipped.get_pixel(0, 1).0, [2, 1, 9]);
        let same = HorizontalFlip(0.0).apply(Cow::Borrowed(&image), &mut Rng::new(0)).unwrap();
        assert!(matches!(same, Cow::Borrowed(_)));
    }
}
