//! Geometric edits: affine maps with the sampling of Pillow's `Image.transform`.

use std::borrow::Cow;

use smalti::{Result, Rng};

use crate::data::{
    ImageOp,
    image::{Filter, RgbImage},
};

/// Output pixel (x, y) shows the input at (m0 (x+½) + m1 (y+½) + m2, m3 (x+½) + m4 (y+½) + m5), the centre of a
/// pixel being at ½; `fill` where that is outside of the image.
pub fn affine(image: &RgbImage, m: [f64; 6], filter: Filter, fill: [u8; 3]) -> RgbImage {
    let mut result = RgbImage::new(image.width(), image.height());
    let (width, height) = (f64::from(image.width()), f64::from(image.height()));
    for (x, y, pixel) in result.enumerate_pixels_mut() {
        let (cx, cy) = (f64::from(x) + 0.5, f64::from(y) + 0.5);
        let (sx, sy) = (m[0] * cx + m[1] * cy + m[2], m[3] * cx + m[4] * cy + m[5]);
        pixel.0 = if !(sx >= 0.0 && sx < width && sy >= 0.0 && sy < height) {
            fill
        } else {
            match filter {
                Filter::Nearest => image.get_pixel(sx as u32, sy as u32).0,
                Filter::Bilinear => bilinear(image, sx, sy),
                Filter::Bicubic => bicubic(image, sx, sy),
            }
        };
    }
    result
}

/// Rotates counter-clockwise by `degrees` around the centre; the size stays.
pub fn rotate(image: &RgbImage, degrees: f64, filter: Filter, fill: [u8; 3]) -> RgbImage {
    affine(image, about_centre(image, degrees, 1.0), filter, fill)
}

/// The map of a rotation and a scaling by `scale` around the centre.
fn about_centre(image: &RgbImage, degrees: f64, scale: f64) -> [f64; 6] {
    let (sin, cos) = (-degrees.to_radians()).sin_cos();
    // Pillow rounds, so that right angles become exact.
    let round = |v: f64| (v * 1e15).round_ties_even() / 1e15;
    let (a, b, d, e) = (round(cos) / scale, round(sin) / scale, round(-sin) / scale, round(cos) / scale);
    let (cx, cy) = (f64::from(image.width()) / 2.0, f64::from(image.height()) / 2.0);
    [a, b, a * -cx + b * -cy + cx, d, e, d * -cx + e * -cy + cy]
}

/// The pixels at `start..start + N` of an axis of `limit`, the border repeated.
fn taps<const N: usize>(start: i64, limit: u32) -> [usize; N] {
    std::array::from_fn(|i| (start + i as i64).clamp(0, i64::from(limit) - 1) as usize)
}

fn bilinear(image: &RgbImage, x: f64, y: f64) -> [u8; 3] {
    let (x, y) = (x - 0.5, y - 0.5);
    let (dx, dy) = (x - x.floor(), y - y.floor());
    let columns = taps::<2>(x.floor() as i64, image.width());
    let rows = taps::<2>(y.floor() as i64, image.height());
    let stride = image.width() as usize;
    std::array::from_fn(|c| {
        let [top, bottom] = rows.map(|row| {
            let at = |column: usize| f64::from(image.as_raw()[(row * stride + column) * 3 + c]);
            let (left, right) = (at(columns[0]), at(columns[1]));
            left + (right - left) * dx
        });
        (top + (bottom - top) * dy) as u8
    })
}

/// Three channels. Doubles, as in Pillow: results are cut to whole levels, which floats would miss at times.
type Lanes = [f64; 3];

/// Cubic through four values at -1, 0, 1, 2 with a = -1.
#[inline(always)]
fn cubic([v0, v1, v2, v3]: [Lanes; 4], d: f64) -> Lanes {
    let mut result = [0.0; 3];
    for c in 0..3 {
        let p2 = v2[c] - v0[c];
        let p3 = 2.0 * (v0[c] - v1[c]) + v2[c] - v3[c];
        let p4 = v1[c] - v0[c] - v2[c] + v3[c];
        result[c] = v1[c] + d * (p2 + d * (p3 + d * p4));
    }
    result
}

#[inline(always)]
fn bicubic(image: &RgbImage, x: f64, y: f64) -> [u8; 3] {
    // Neither is below -½, so adding 1 makes the cut to a whole number a floor, without the call.
    let (x, y) = (x - 0.5, y - 0.5);
    let (left, top) = ((x + 1.0) as i64 - 1, (y + 1.0) as i64 - 1);
    let (dx, dy) = (x - left as f64, y - top as f64);
    let rows = taps::<4>(top - 1, image.height());
    let columns = taps::<4>(left - 1, image.width());
    let (pixels, stride) = (image.as_raw().as_slice(), image.width() as usize * 3);
    let mut lines = [[0.0; 3]; 4];
    for (line, row) in lines.iter_mut().zip(rows) {
        let row = &pixels[row * stride..][..stride];
        let mut v = [[0.0; 3]; 4];
        for (value, column) in v.iter_mut().zip(columns) {
            let p = &row[column * 3..][..3];
            *value = [f64::from(p[0]), f64::from(p[1]), f64::from(p[2])];
        }
        *line = cubic(v, dx);
    }
    cubic(lines, dy).map(|v| v as u8)
}

/// Shifts by a whole number of pixels, up to `padding` each way and axis; what comes in has colour `fill`. The
/// same as padding by `padding` and cropping to the old size.
#[derive(Clone, Copy, Debug)]
pub struct RandomShift {
    /// Largest shift in pixels.
    pub padding: u32,
    /// Colour of what comes in.
    pub fill: [u8; 3],
}

impl ImageOp for RandomShift {
    fn apply<'a>(&self, image: Cow<'a, RgbImage>, rng: &mut Rng) -> Result<Cow<'a, RgbImage>> {
        let mut draw = || rng.below(2 * u64::from(self.padding) + 1) as i64 - i64::from(self.padding);
        let (dx, dy) = (draw(), draw());
        if dx == 0 && dy == 0 {
            return Ok(image);
        }
        let mut result = RgbImage::from_pixel(image.width(), image.height(), ::image::Rgb(self.fill));
        ::image::imageops::replace(&mut result, &*image, dx, dy);
        Ok(Cow::Owned(result))
    }
}

/// Rotates and scales around the centre.
#[derive(Clone, Copy, Debug)]
pub struct RandomAffine {
    /// The angle is uniform in plus or minus this many degrees.
    pub degrees: f64,
    /// The factor is uniform in this range; above 1 enlarges.
    pub scale: (f64, f64),
    /// How pixels are found.
    pub filter: Filter,
    /// Colour of what comes in.
    pub fill: [u8; 3],
}

impl ImageOp for RandomAffine {
    fn apply<'a>(&self, image: Cow<'a, RgbImage>, rng: &mut Rng) -> Result<Cow<'a, RgbImage>> {
        let degrees = rng.range(-self.degrees, self.degrees);
        let scale = rng.range(self.scale.0, self.scale.1);
        let map = about_centre(&image, degrees, scale);
        Ok(Cow::Owned(affine(&image, map, self.filter, self.fill)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> RgbImage {
        RgbImage::from_fn(6, 6, |x, y| ::image::Rgb([(x * 40) as u8, (y * 40) as u8, (x * y) as u8]))
    }

    #[test]
    fn nothing_to_do_changes_nothing() {
        let image = picture();
        for filter in [Filter::Nearest, Filter::Bilinear, Filter::Bicubic] {
            assert_eq!(rotate(&image, 0.0, filter, [0; 3]), image);
            let op = RandomAffine { degrees: 0.0, scale: (1.0, 1.0), filter, fill: [0; 3] };
            assert_eq!(*op.apply(Cow::Borrowed(&image), &mut Rng::new(1)).unwrap(), image);
        }
    }

    #[test]
    fn a_right_angle_is_exact() {
        let turned = rotate(&picture(), 90.0, Filter::Bilinear, [0; 3]);
        assert_eq!(turned, ::image::imageops::rotate270(&picture()));
    }

    #[test]
    fn shifts_reach_both_ends() {
        let image = picture();
        let op = RandomShift { padding: 2, fill: [255; 3] };
        let mut seen = [false; 5];
        for seed in 0..200 {
            let shifted = op.apply(Cow::Borrowed(&image), &mut Rng::new(seed)).unwrap();
            // Red counts columns: find where column 3 went.
            let column = (0..6).find(|&x| (0..6).any(|y| shifted.get_pixel(x, y).0[0] == 120)).unwrap();
            seen[column as usize - 1] = true;
        }
        assert_eq!(seen, [true; 5]);
    }

    #[test]
    fn an_enlarged_dot_grows() {
        let mut image = RgbImage::new(9, 9);
        image.put_pixel(4, 4, ::image::Rgb([255; 3]));
        let op = RandomAffine { degrees: 0.0, scale: (3.0, 3.0), filter: Filter::Nearest, fill: [0; 3] };
        let result = op.apply(Cow::Owned(image), &mut Rng::new(0)).unwrap();
        assert_eq!(result.pixels().filter(|p| p.0[0] == 255).count(), 9);
    }
}
