//! TensorFlow's bicubic resize, as FLIP crops (`utils/transform_util.py`: `tf.image.resize`): in floats, without
//! antialiasing, and with overshoots below 0 and above 255 left in place.

use smalti::{Result, ensure};

use crate::data::{View, image::RgbImage};

/// Scales to `size` x `size`; levels as floats [3, size, size]. The cubic has a = -0.5; of a pixel at the border
/// the taps outside of the image are left out and the others scaled to sum 1. (TensorFlow takes weights from a
/// table of 1024 positions, this computes them.)
pub fn resize_unclipped(image: &RgbImage, size: u32) -> Result<View> {
    ensure!(
        size > 0 && !image.is_empty(),
        "resize",
        "{}x{} to {size}x{size}: there are no pixels",
        image.width(),
        image.height()
    );
    let (width, height, side) = (image.width() as usize, image.height() as usize, size as usize);
    let (columns, rows) = (taps(width, side), taps(height, side));
    // Rows first, as planes: [3, height, side].
    let mut between = vec![0.0; 3 * height * side];
    for (y, line) in image.chunks_exact(width * 3).enumerate() {
        for (x, tap) in columns.iter().enumerate() {
            for c in 0..3 {
                let terms = (0..4).map(|i| tap.weights[i] * f32::from(line[tap.pixels[i] * 3 + c]));
                between[(c * height + y) * side + x] = terms.sum();
            }
        }
    }
    let mut data = Vec::with_capacity(3 * side * side);
    for plane in between.chunks_exact(height * side) {
        for tap in &rows {
            let [a, b, c, d] = tap.pixels.map(|y| &plane[y * side..(y + 1) * side]);
            let w = tap.weights;
            data.extend((0..side).map(|x| w[0] * a[x] + w[1] * b[x] + w[2] * c[x] + w[3] * d[x]));
        }
    }
    Ok(View { shape: [3, side, side], data })
}

/// The four pixels that a pixel of the result is made of.
struct Tap {
    pixels: [usize; 4],
    weights: [f32; 4],
}

fn taps(from: usize, to: usize) -> Vec<Tap> {
    let tap = |at: usize| {
        let centre = (at as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        let first = centre.floor() - 1.0;
        let (mut pixels, mut weights) = ([0; 4], [0.0; 4]);
        for i in 0..4 {
            let pixel = first + i as f64;
            pixels[i] = pixel.clamp(0.0, from as f64 - 1.0) as usize;
            weights[i] = if pixels[i] as f64 == pixel { keys((centre - pixel).abs()) } else { 0.0 };
        }
        let sum: f64 = weights.iter().sum();
        Tap { pixels, weights: weights.map(|w| (w / sum) as f32) }
    };
    (0..to).map(tap).collect()
}

/// Keys' cubic with a = -0.5 at a distance of 0 to 2.
fn keys(x: f64) -> f64 {
    if x <= 1.0 { (1.5 * x - 2.5) * x * x + 1.0 } else { ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::image;
    use std::path::Path;

    #[test]
    fn edges_overshoot() {
        let edge = RgbImage::from_fn(8, 3, |x, _| ::image::Rgb([if x < 4 { 0 } else { 255 }; 3]));
        let view = resize_unclipped(&edge, 16).unwrap();
        assert_eq!(view.shape, [3, 16, 16]);
        let (low, high) = view.data.iter().fold((0f32, 0f32), |(l, h), v| (l.min(*v), h.max(*v)));
        assert!(low < -10.0 && high > 265.0, "{low} {high}");
    }

    #[test]
    fn the_same_size_is_the_image() {
        for side in [1, 2, 7] {
            let image = RgbImage::from_fn(side, side, |x, y| ::image::Rgb([x as u8 * 9, y as u8 * 7, 200]));
            let view = resize_unclipped(&image, side).unwrap();
            for (x, y, pixel) in image.enumerate_pixels() {
                for c in 0..3 {
                    let at = (c * side as usize + y as usize) * side as usize + x as usize;
                    assert!((view.data[at] - f32::from(pixel.0[c])).abs() < 1e-3);
                }
            }
        }
        assert!(resize_unclipped(&RgbImage::new(2, 2), 0).is_err());
    }

    /// `jax.image.resize(.., "cubic", antialias=False)`, which has the same definition.
    #[test]
    fn results_of_jax() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/goldens");
        let source = image::read(&folder.join("source.png")).unwrap();
        type Point = ([usize; 3], f32);
        let small: [Point; 4] =
            [([0, 0, 0], 32.222675), ([1, 10, 3], 8.234135), ([2, 5, 10], 69.21971), ([0, 7, 6], 231.72798)];
        let large: [Point; 4] =
            [([0, 0, 0], 22.249092), ([1, 39, 3], 194.11798), ([2, 5, 39], 108.82772), ([0, 7, 6], 196.595)];
        for (size, sum, points) in [(11, 39_638.606, small), (40, 522_041.127, large)] {
            let view = resize_unclipped(&source, size as u32).unwrap();
            let total: f64 = view.data.iter().map(|v| f64::from(*v)).sum();
            assert!((total - sum).abs() < 0.5, "{size}: {total}");
            for ([c, y, x], want) in points {
                let got = view.data[(c * size + y) * size + x];
                assert!((got - want).abs() < 1e-3, "{size}: {got} for {want}");
            }
        }
    }
}
