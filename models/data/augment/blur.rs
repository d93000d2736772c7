//! The Gaussian blur of Pillow's `ImageFilter.GaussianBlur`, to the level: three passes of a box blur whose box
//! has a fractional width (Gwosdek et al. 2011, "Theoretical Foundations of Gaussian Convolution by Extended Box
//! Filtering"), along the rows, then along the columns, rounded to levels after each pass.

use smalti::{Result, cpu::simd::simd, ensure};

use crate::data::image::RgbImage;

const PASSES: usize = 3;

/// A limit to the margins that rows are given; no augmentation comes near.
const MAX_SIGMA: f32 = 1000.0;

/// Blurs with standard deviation `sigma` in pixels (Pillow's `radius`), 0 to 1000. Beyond the border the
/// outermost pixels are repeated.
pub fn gaussian_blur(image: &mut RgbImage, sigma: f32) -> Result<()> {
    ensure!((0.0..=MAX_SIGMA).contains(&sigma), "gaussian_blur", "sigma {sigma}; needs 0 to {MAX_SIGMA}");
    if sigma == 0.0 || image.is_empty() {
        return Ok(());
    }
    let (filter, row) = (BoxFilter::of_gaussian(sigma), image.width() as usize * 3);
    let pixels = &mut **image;
    simd(
        #[inline(always)]
        move || {
            along_rows(pixels, row, filter);
            along_columns(pixels, row, filter);
        },
    );
    Ok(())
}

/// Weights in units of 2^-24: `inner` for the 2 `radius` + 1 pixels of the box, `outer` for the next on each side.
#[derive(Clone, Copy)]
struct BoxFilter {
    radius: usize,
    inner: u32,
    outer: u32,
}

impl BoxFilter {
    /// The box of which three passes have the variance of the Gaussian; single precision wherever Pillow rounds
    /// to it, since the result is cut to whole weights.
    fn of_gaussian(sigma: f32) -> Self {
        let variance = sigma * sigma / PASSES as f32;
        let length = (12.0 * f64::from(variance) + 1.0).sqrt() as f32;
        let whole = ((f64::from(length) - 1.0) / 2.0).floor() as f32;
        let next = (whole + 1.0) * (whole + 1.0);
        let part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance) / (6.0 * (variance - next));
        let radius = whole + part;
        let inner = (16_777_216.0 / (radius * 2.0 + 1.0)) as u32;
        let box_radius = radius as u32;
        let outer = (16_777_216 - (2 * box_radius + 1) * inner) / 2;
        BoxFilter { radius: box_radius as usize, inner, outer }
    }

    /// `out` becomes the weighted sum of `slices(0)` to `slices(2 radius + 2)`, the first and the last of which
    /// are the outer ones. `sums` is room for as many numbers as `out` has.
    #[inline(always)]
    fn weigh<'a>(self, slices: impl Fn(usize) -> &'a [u8], out: &mut [u8], sums: &mut [u32]) {
        let n = out.len();
        let sums = &mut sums[..n];
        for (sum, level) in sums.iter_mut().zip(&slices(1)[..n]) {
            *sum = u32::from(*level);
        }
        for i in 2..2 * self.radius + 2 {
            for (sum, level) in sums.iter_mut().zip(&slices(i)[..n]) {
                *sum += u32::from(*level);
            }
        }
        let (left, right) = (&slices(0)[..n], &slices(2 * self.radius + 2)[..n]);
        for i in 0..n {
            let outer = (u32::from(left[i]) + u32::from(right[i])) * self.outer;
            out[i] = ((sums[i] * self.inner + outer + (1 << 23)) >> 24) as u8;
        }
    }
}

#[inline(always)]
fn along_rows(pixels: &mut [u8], row: usize, filter: BoxFilter) {
    let margin = (filter.radius + 1) * 3;
    let (mut line, mut sums) = (vec![0; row + 2 * margin], vec![0; row]);
    for pixels in pixels.chunks_exact_mut(row) {
        for _ in 0..PASSES {
            line[margin..margin + row].copy_from_slice(pixels);
            line[..margin].chunks_exact_mut(3).for_each(|pixel| pixel.copy_from_slice(&pixels[..3]));
            let end = line[margin + row..].chunks_exact_mut(3);
            end.for_each(|pixel| pixel.copy_from_slice(&pixels[row - 3..]));
            filter.weigh(
                #[inline(always)]
                |i| &line[3 * i..3 * i + row],
                pixels,
                &mut sums,
            );
        }
    }
}

#[inline(always)]
fn along_columns(pixels: &mut [u8], row: usize, filter: BoxFilter) {
    let (rows, mut sums) = (pixels.len() / row, vec![0; row]);
    let mut source = vec![0; pixels.len()];
    for _ in 0..PASSES {
        source.copy_from_slice(pixels);
        for (y, out) in pixels.chunks_exact_mut(row).enumerate() {
            filter.weigh(
                #[inline(always)]
                |i| {
                    let y = (y + i).saturating_sub(filter.radius + 1).min(rows - 1);
                    &source[y * row..(y + 1) * row]
                },
                out,
                &mut sums,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop_assert, proptest};

    #[test]
    fn bad_deviations_are_errors() {
        let image = RgbImage::from_pixel(3, 2, ::image::Rgb([9, 8, 7]));
        for sigma in [-0.1, f32::NAN, f32::INFINITY] {
            assert!(gaussian_blur(&mut image.clone(), sigma).unwrap_err().to_string().contains("sigma"));
        }
        let mut same = image.clone();
        gaussian_blur(&mut same, 0.0).unwrap();
        assert_eq!(same, image);
    }

    #[test]
    fn a_line_spreads_with_the_variance_of_a_gaussian() {
        let mut image = RgbImage::new(61, 61);
        // A line, since rounding to levels would eat the tails of a single dot.
        (0..61).for_each(|y| image.put_pixel(30, y, ::image::Rgb([255, 0, 0])));
        gaussian_blur(&mut image, 2.0).unwrap();
        let weight = |x: u32| f64::from(image.get_pixel(x, 30).0[0]);
        let sum: f64 = (0..61).map(weight).sum();
        let variance: f64 = (0..61).map(|x| weight(x) * (f64::from(x) - 30.0).powi(2)).sum::<f64>() / sum;
        assert!((sum - 255.0).abs() < 5.0 && (variance - 4.0).abs() < 0.2, "{sum} {variance}");
        assert!(image.pixels().all(|p| p.0[1] == 0 && p.0[2] == 0));
    }

    proptest! {
        #[test]
        fn levels_stay_in_their_range(width in 1u32..20, height in 1u32..20, sigma in 0f32..30.0, seed: u64) {
            let mut rng = smalti::Rng::new(seed);
            let mut image = RgbImage::from_fn(width, height, |_, _| ::image::Rgb([0; 3].map(|_| 50 + rng.below(100) as u8)));
            gaussian_blur(&mut image, sigma).unwrap();
            prop_assert!(image.iter().all(|v| (50..150).contains(v)));
        }
    }
}
