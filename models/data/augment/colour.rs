//! Colour edits with the results of Pillow's `ImageOps` and `ImageEnhance`, to the level.

use smalti::cpu::simd::simd;

use crate::data::image::{RgbImage, luma};

/// Replaces every level of channel c by `table(c)[level]`.
pub fn map_levels(image: &mut RgbImage, table: impl Fn(usize) -> [u8; 256]) {
    let tables = [table(0), table(1), table(2)];
    for pixel in image.chunks_exact_mut(3) {
        for c in 0..3 {
            pixel[c] = tables[c][usize::from(pixel[c])];
        }
    }
}

fn same_for_all(image: &mut RgbImage, level: impl Fn(u8) -> u8) {
    let table = std::array::from_fn(|i| level(i as u8));
    map_levels(image, |_| table);
}

fn histograms(image: &RgbImage) -> [[u64; 256]; 3] {
    let mut counts = [[0; 256]; 3];
    for pixel in image.chunks_exact(3) {
        for c in 0..3 {
            counts[c][usize::from(pixel[c])] += 1;
        }
    }
    counts
}

const IDENTITY: [u8; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        table[i] = i as u8;
        i += 1;
    }
    table
};

/// Stretches each channel to the full range.
pub fn auto_contrast(image: &mut RgbImage) {
    let counts = histograms(image);
    map_levels(image, |c| {
        let low = counts[c].iter().position(|&n| n > 0).unwrap_or(0);
        let high = counts[c].iter().rposition(|&n| n > 0).unwrap_or(0);
        if high <= low {
            return IDENTITY;
        }
        let scale = 255.0 / (high - low) as f64;
        let offset = -(low as f64) * scale;
        std::array::from_fn(|i| (i as f64 * scale + offset) as u8)
    });
}

/// Makes the histogram of each channel as even as a mapping of levels can.
pub fn equalize(image: &mut RgbImage) {
    let counts = histograms(image);
    map_levels(image, |c| {
        let total: u64 = counts[c].iter().sum();
        let last = counts[c].iter().rev().find(|&&n| n > 0).copied().unwrap_or(0);
        // 0 also for a single level, where all pixels are in the last.
        let step = (total - last) / 255;
        if step == 0 {
            return IDENTITY;
        }
        let mut sum = step / 2;
        std::array::from_fn(|i| {
            let level = (sum / step).min(255) as u8;
            sum += counts[c][i];
            level
        })
    });
}

/// 255 - level.
pub fn invert(image: &mut RgbImage) {
    same_for_all(image, |v| 255 - v);
}

/// Keeps the upper `bits` bits (0 makes the image black, 8 or more leave it).
pub fn posterize(image: &mut RgbImage, bits: u32) {
    let mask = !(0xFFu32 >> bits.min(8)) as u8;
    same_for_all(image, |v| v & mask);
}

/// Inverts the levels from `threshold` on.
pub fn solarize(image: &mut RgbImage, threshold: u32) {
    same_for_all(image, |v| if u32::from(v) < threshold { v } else { 255 - v });
}

/// Adds `amount` to levels below 128, up to 255.
pub fn solarize_add(image: &mut RgbImage, amount: u32) {
    same_for_all(image, |v| if v < 128 { (u32::from(v) + amount).min(255) as u8 } else { v });
}

/// `base + factor * (level - base)`, cut to whole levels and to 0..=255, as Pillow's `Image.blend` computes it.
#[inline(always)]
pub fn blend(base: u8, level: u8, factor: f32) -> u8 {
    // The conversion saturates, which is Pillow's clipping.
    (f32::from(base) + factor * (f32::from(level) - f32::from(base))) as u8
}

/// Saturation: 0 is grey, 1 the image.
pub fn color(image: &mut RgbImage, factor: f32) {
    let pixels = &mut **image;
    simd(
        #[inline(always)]
        move || saturate(pixels, factor),
    );
}

/// Blocks, since the grey values by themselves and the blend by itself are loops that vectorise.
#[inline(always)]
fn saturate(pixels: &mut [u8], factor: f32) {
    let mut greys = [0; 3 * 256];
    for block in pixels.chunks_mut(greys.len()) {
        for (grey, pixel) in greys.chunks_exact_mut(3).zip(block.chunks_exact(3)) {
            grey.fill(luma(pixel));
        }
        for (level, grey) in block.iter_mut().zip(&greys) {
            *level = blend(*grey, *level, factor);
        }
    }
}

/// Three equal channels, Pillow's grey value.
pub fn grayscale(image: &mut RgbImage) {
    for pixel in image.chunks_exact_mut(3) {
        pixel.fill(luma(pixel));
    }
}

/// Distance to the mean grey: 0 is flat, 1 the image.
pub fn contrast(image: &mut RgbImage, factor: f32) {
    let sum: u64 = image.chunks_exact(3).map(|pixel| u64::from(luma(pixel))).sum();
    let pixels = (image.len() / 3).max(1);
    let mean = (sum as f64 / pixels as f64 + 0.5) as u8;
    same_for_all(image, |v| blend(mean, v, factor));
}

/// 0 is black, 1 the image.
pub fn brightness(image: &mut RgbImage, factor: f32) {
    same_for_all(image, |v| blend(0, v, factor));
}

/// 0 is smoothed by the 3x3 kernel (1 1 1, 1 5 1, 1 1 1) / 13, 1 the image. The outermost pixels stay.
pub fn sharpness(image: &mut RgbImage, factor: f32) {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let source = image.clone().into_raw();
    let pixels: &mut [u8] = image;
    let row = width * 3;
    for y in 1..height.saturating_sub(1) {
        let line = &mut pixels[y * row..(y + 1) * row];
        for x in 3..row.saturating_sub(3) {
            let at = y * row + x;
            let three = |i: usize| u32::from(source[i - 3]) + u32::from(source[i]) + u32::from(source[i + 3]);
            let sum = three(at - row) + three(at) + three(at + row) + 4 * u32::from(source[at]);
            line[x] = blend(((2 * sum + 13) / 26) as u8, source[at], factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_images_stay() {
        let flat = RgbImage::from_pixel(5, 4, ::image::Rgb([10, 200, 60]));
        for edit in [
            auto_contrast,
            equalize,
            |i: &mut RgbImage| sharpness(i, 0.3),
            |i: &mut RgbImage| posterize(i, 9),
        ] {
            let mut image = flat.clone();
            edit(&mut image);
            assert_eq!(image, flat);
        }
    }

    #[test]
    fn one_pixel_and_one_line() {
        for (w, h) in [(1, 1), (1, 7), (7, 1), (2, 2)] {
            let mut image = RgbImage::from_fn(w, h, |x, y| ::image::Rgb([x as u8 * 30, y as u8 * 30, 5]));
            sharpness(&mut image, 1.7);
            contrast(&mut image, 1.7);
            color(&mut image, 0.2);
            equalize(&mut image);
        }
    }
}
