//! Random erasing (Zhong et al. 2020), timm's `pixel` mode.

use smalti::{Rng, random::unit_f32};

use crate::data::View;

/// Overwrites one random rectangle of a normalised image with standard normal noise.
#[derive(Clone, Copy, Debug)]
pub struct RandomErasing {
    /// Share of images that it happens to.
    pub probability: f64,
    /// Range of the area as a fraction of the image's, uniform.
    pub area: (f64, f64),
    /// Range of height / width, log-uniform.
    pub aspect: (f64, f64),
}

impl RandomErasing {
    /// Area 2 % to a third, aspect 0.3 to 1 / 0.3.
    pub fn new(probability: f64) -> Self {
        RandomErasing { probability, area: (0.02, 1.0 / 3.0), aspect: (0.3, 1.0 / 0.3) }
    }

    /// Draws up to ten rectangles and fills the first that is smaller than the image both ways, if any.
    pub fn apply(&self, view: &mut View, rng: &mut Rng) {
        if !rng.bernoulli(self.probability) {
            return;
        }
        let [channels, height, width] = view.shape;
        for _ in 0..10 {
            let area = rng.range(self.area.0, self.area.1) * (height * width) as f64;
            let aspect = rng.range(self.aspect.0.ln(), self.aspect.1.ln()).exp();
            let side = |square: f64| square.sqrt().round_ties_even() as usize;
            let (h, w) = (side(area * aspect), side(area / aspect));
            if h >= height || w >= width {
                continue;
            }
            let top = rng.below((height - h) as u64 + 1) as usize;
            let left = rng.below((width - w) as u64 + 1) as usize;
            for c in 0..channels {
                for y in top..top + h {
                    let start = (c * height + y) * width + left;
                    fill_normal(&mut view.data[start..start + w], rng);
                }
            }
            return;
        }
    }
}

/// Standard normal numbers, both halves of Box-Muller, four for a block of random words.
fn fill_normal(values: &mut [f32], rng: &mut Rng) {
    let first = rng.reserve(values.len() as u64) / 4;
    for (i, chunk) in values.chunks_mut(4).enumerate() {
        let words = rng.block(first + i as u64);
        let pair = |a: u32, b: u32| {
            let radius = (-2.0 * (1.0 - unit_f32(a)).ln()).sqrt();
            let (sin, cos) = (std::f32::consts::TAU * unit_f32(b)).sin_cos();
            [radius * cos, radius * sin]
        };
        let ([a, b], [c, d]) = (pair(words[0], words[1]), pair(words[2], words[3]));
        chunk.copy_from_slice(&[a, b, c, d][..chunk.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rectangle_of_noise() {
        let erasing = RandomErasing::new(1.0);
        let (mut count, mut sum, mut squares) = (0.0, 0.0, 0.0);
        for seed in 0..300 {
            let mut view = View { shape: [3, 32, 24], data: vec![9.0; 3 * 32 * 24] };
            erasing.apply(&mut view, &mut Rng::new(seed));
            let plane = 32 * 24;
            let touched = |c: usize, i: usize| view.data[c * plane + i] != 9.0;
            let hits: Vec<usize> = (0..plane).filter(|&i| touched(0, i)).collect();
            let rows = hits.iter().map(|i| i / 24);
            let columns = hits.iter().map(|i| i % 24);
            let extent = |min: Option<usize>, max: Option<usize>| max.unwrap() - min.unwrap() + 1;
            let h = extent(rows.clone().min(), rows.max());
            let w = extent(columns.clone().min(), columns.max());
            assert_eq!(h * w, hits.len(), "not a rectangle");
            assert!((0.01..0.36).contains(&(hits.len() as f64 / plane as f64)));
            assert!((0..plane).all(|i| touched(0, i) == touched(2, i)));
            for value in view.data.iter().filter(|v| **v != 9.0) {
                (count, sum, squares) = (count + 1.0, sum + value, squares + value * value);
            }
        }
        assert!((sum / count).abs() < 0.02 && (squares / count - 1.0).abs() < 0.02);
    }

    #[test]
    fn seldom_or_impossible() {
        let happened = |shape: [usize; 3], probability: f64| {
            (0..1000).filter(move |&seed| {
                let mut view = View { shape, data: vec![9.0; shape.iter().product()] };
                RandomErasing::new(probability).apply(&mut view, &mut Rng::new(seed));
                view.data.iter().any(|v| *v != 9.0)
            })
        };
        assert!((200..300).contains(&happened([1, 32, 32], 0.25).count()));
        assert_eq!(happened([3, 1, 1], 1.0).count(), 0);
    }
}
