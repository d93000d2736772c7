//! From levels to the numbers that a network sees, and back.

use smalti::{Result, bail, ensure};

use crate::data::{
    View,
    image::{RgbImage, luma},
};

/// Mean of ImageNet's channels, levels scaled to 0..1.
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Standard deviation of ImageNet's channels, levels scaled to 0..1.
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Mean of CIFAR-10's channels, levels scaled to 0..1.
pub const CIFAR10_MEAN: [f32; 3] = [0.4914, 0.4822, 0.4465];
/// Standard deviation of CIFAR-10's channels as common recipes have it: the mean over images of each image's own.
pub const CIFAR10_STD: [f32; 3] = [0.2023, 0.1994, 0.2010];

/// (level / 255 - mean) / std per channel, with three channels (RGB) or one (grey).
#[derive(Clone, Debug)]
pub struct Normalize {
    mean: Vec<f32>,
    std: Vec<f32>,
    tables: Vec<[f32; 256]>,
}

impl Normalize {
    /// One mean and one standard deviation (above 0) a channel, one channel or three.
    pub fn new(mean: &[f32], std: &[f32]) -> Result<Self> {
        let channels = mean.len();
        ensure!(
            matches!(channels, 1 | 3) && std.len() == channels,
            "normalize",
            "{channels} means and {} deviations; needs 1 or 3 of each",
            std.len()
        );
        if let Some(bad) = std.iter().find(|s| s.is_nan() || **s <= 0.0) {
            bail!("normalize", "standard deviation {bad} is not above 0");
        }
        let table = |(m, s): (&f32, &f32)| std::array::from_fn(|level| (level as f32 / 255.0 - m) / s);
        let tables = mean.iter().zip(std).map(table).collect();
        Ok(Normalize { mean: mean.to_vec(), std: std.to_vec(), tables })
    }

    /// ImageNet's mean and deviation.
    pub fn imagenet() -> Result<Self> {
        Self::new(&IMAGENET_MEAN, &IMAGENET_STD)
    }

    /// Number of channels of the result.
    pub fn channels(&self) -> usize {
        self.tables.len()
    }

    /// The image as floats [C, H, W].
    pub fn view(&self, image: &RgbImage) -> View {
        let (width, height) = (image.width() as usize, image.height() as usize);
        let mut data = Vec::with_capacity(self.channels() * width * height);
        match self.tables.as_slice() {
            [grey] => data.extend(image.chunks_exact(3).map(|pixel| grey[usize::from(luma(pixel))])),
            tables => {
                for (c, table) in tables.iter().enumerate() {
                    data.extend(image.chunks_exact(3).map(|pixel| table[usize::from(pixel[c])]));
                }
            }
        }
        View { shape: [self.channels(), height, width], data }
    }

    /// Normalises levels that are floats already, [3, H, W]; there must be three channels.
    pub fn levels(&self, mut view: View) -> Result<View> {
        let [channels, height, width] = view.shape;
        ensure!(
            channels == 3 && self.channels() == 3,
            "normalize",
            "levels of {channels} channels and constants for {}; needs 3 of both",
            self.channels()
        );
        for (c, plane) in view.data.chunks_exact_mut((height * width).max(1)).enumerate() {
            let (mean, std) = (self.mean[c], self.std[c]);
            plane.iter_mut().for_each(|level| *level = (*level / 255.0 - mean) / std);
        }
        Ok(view)
    }

    /// The way back, for looking at: floats [C, H, W] to rounded levels, cut to 0..=255.
    pub fn image(&self, data: &[f32], shape: [usize; 3]) -> Result<RgbImage> {
        let [channels, height, width] = shape;
        ensure!(
            channels == self.channels() && data.len() == channels * height * width,
            "denormalize",
            "{} values of shape {shape:?}; needs {} channels and as many values as the shape has",
            data.len(),
            self.channels()
        );
        Ok(RgbImage::from_fn(width as u32, height as u32, |x, y| {
            let at = y as usize * width + x as usize;
            ::image::Rgb(std::array::from_fn(|c| {
                let c = c.min(channels - 1);
                ((data[c * height * width + at] * self.std[c] + self.mean[c]) * 255.0).round() as u8
            }))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let image = RgbImage::from_fn(5, 3, |x, y| ::image::Rgb([(x * 50) as u8, (y * 100) as u8, 255]));
        let normalize = Normalize::imagenet().unwrap();
        let view = normalize.view(&image);
        assert_eq!(view.shape, [3, 3, 5]);
        assert_eq!(view.data[15 + 5], (100.0 / 255.0 - 0.456) / 0.224);
        assert_eq!(normalize.image(&view.data, view.shape).unwrap(), image);
        assert!(normalize.image(&view.data[1..], view.shape).is_err());
    }

    #[test]
    fn grey() {
        let image = RgbImage::from_pixel(2, 2, ::image::Rgb([51; 3]));
        let normalize = Normalize::new(&[0.0], &[1.0]).unwrap();
        let view = normalize.view(&image);
        assert_eq!((view.shape, view.data.clone()), ([1, 2, 2], vec![0.2; 4]));
        assert_eq!(normalize.image(&view.data, view.shape).unwrap(), image);
    }

    #[test]
    fn bad_constants() {
        assert!(Normalize::new(&[0.5, 0.5], &[1.0, 1.0]).is_err());
        assert!(Normalize::new(&[0.5], &[0.0]).is_err());
        assert!(Normalize::new(&[0.5], &[f32::NAN]).is_err());
    }
}
