//! The pixels that a sample takes. The kernels' twin is `Taps` in cuda/grid_sample.cu: the same numbers.

use super::{GridMode, GridPadding};
use smallvec::{SmallVec, smallvec};

/// A pixel that a sample takes: its place in the plane, its weight, and the weight's derivatives along x and y.
pub struct Tap {
    pub at: usize,
    pub weight: f64,
    pub dx: f64,
    pub dy: f64,
}
pub type Taps = SmallVec<[Tap; 16]>;

/// One axis of an image.
pub struct Axis {
    pub size: usize,
    pub padding: GridPadding,
    pub align_corners: bool,
}

impl Axis {
    /// From -1..=1 to pixels, and the derivative.
    fn pixels(&self, x: f64) -> (f64, f64) {
        let n = self.size as f64;
        if self.align_corners {
            ((x + 1.0) / 2.0 * (n - 1.0), (n - 1.0) / 2.0)
        } else {
            (((x + 1.0) * n - 1.0) / 2.0, n / 2.0)
        }
    }

    /// Brings a place into the image as the padding demands; the derivative.
    fn pad(&self, x: f64) -> (f64, f64) {
        let last = (self.size - 1) as f64;
        let (x, slope) = match self.padding {
            GridPadding::Zeros => return (x, 1.0),
            GridPadding::Border => (x, 1.0),
            GridPadding::Reflection if self.align_corners => reflect(x, 0.0, last),
            GridPadding::Reflection => reflect(x, -0.5, last + 1.0),
        };
        // NaN goes to the first pixel.
        if x.is_nan() || x <= 0.0 {
            (0.0, 0.0)
        } else if x >= last {
            (last, 0.0)
        } else {
            (x, slope)
        }
    }

    /// The pixel at a whole number, if there is one.
    fn index(&self, x: f64) -> Option<usize> {
        (x >= 0.0 && x < self.size as f64).then_some(x as usize)
    }
}

/// Mirrors `x` at `low` and at `low + span`.
fn reflect(x: f64, low: f64, span: f64) -> (f64, f64) {
    if span == 0.0 {
        return (0.0, 0.0);
    }
    let (x, sign) = if x < low { (low - x, -1.0) } else { (x - low, 1.0) };
    let rest = x % span;
    if (x / span).floor() % 2.0 == 0.0 { (rest + low, sign) } else { (span - rest + low, -sign) }
}

/// Weights of the four pixels around a place `t` past the second, and their derivatives.
fn cubic(t: f64) -> [(f64, f64); 4] {
    const A: f64 = -0.75;
    let near =
        |x: f64| (((A + 2.0) * x - (A + 3.0)) * x * x + 1.0, (3.0 * (A + 2.0) * x - 2.0 * (A + 3.0)) * x);
    let far = |x: f64| ((((x - 5.0) * x + 8.0) * x - 4.0) * A, ((3.0 * x - 10.0) * x + 8.0) * A);
    let mirrored = |(w, d): (f64, f64)| (w, -d);
    [far(t + 1.0), near(t), mirrored(near(1.0 - t)), mirrored(far(2.0 - t))]
}

/// Positions along one axis with weight and derivative.
type Line = SmallVec<[(f64, f64, f64); 4]>;

fn line(axis: &Axis, x: f64, mode: GridMode) -> Line {
    let (x, unit) = axis.pixels(x);
    match mode {
        GridMode::Nearest => smallvec![(axis.pad(x).0.round_ties_even(), 1.0, 0.0)],
        GridMode::Bilinear => {
            let (x, slope) = axis.pad(x);
            let (low, t, d) = (x.floor(), x - x.floor(), unit * slope);
            smallvec![(low, 1.0 - t, -d), (low + 1.0, t, d)]
        }
        // Here each pixel is padded on its own.
        GridMode::Bicubic => {
            let weights = cubic(x - x.floor());
            (0..4)
                .map(|k| (axis.pad(x.floor() - 1.0 + k as f64).0, weights[k].0, weights[k].1 * unit))
                .collect()
        }
    }
}

/// The pixels that the sample at (x, y) takes.
pub fn taps(x: f64, y: f64, [rows, columns]: &[Axis; 2], mode: GridMode) -> Taps {
    let mut taps = Taps::new();
    let (xs, ys) = (line(columns, x, mode), line(rows, y, mode));
    for &(y, wy, dy) in &ys {
        let Some(row) = rows.index(y) else { continue };
        for &(x, wx, dx) in &xs {
            if let Some(column) = columns.index(x) {
                taps.push(Tap { at: row * columns.size + column, weight: wx * wy, dx: dx * wy, dy: wx * dy });
            }
        }
    }
    taps
}
