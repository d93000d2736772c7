//! The weights along one axis.

use super::{InterpolateOptions, Interpolation};
use std::sync::OnceLock;

/// One axis of a resizing.
pub(super) struct Axis {
    /// Elements of the image and of the result.
    pub input: usize,
    pub output: usize,
    /// Elements of the image to one of the result.
    pub scale: f64,
    pub options: InterpolateOptions,
    /// Does it take gradients back, from `output` to `input` elements?
    pub back: bool,
    table: OnceLock<Table>,
}

impl Axis {
    /// `factor`: the scale that coordinates use instead of output/input.
    pub fn new(input: usize, output: usize, factor: Option<f64>, options: &InterpolateOptions) -> Axis {
        let corners = options.align_corners;
        let scale = match factor {
            _ if corners && output > 1 => (input - 1) as f64 / (output - 1) as f64,
            _ if corners => 0.0,
            Some(factor) => 1.0 / factor,
            None => input as f64 / output as f64,
        };
        Axis { input, output, scale, options: *options, back: false, table: OnceLock::new() }
    }

    pub fn transposed(&self) -> Axis {
        Axis { back: !self.back, table: OnceLock::new(), ..*self }
    }

    /// The weights, for CPU code.
    pub fn table(&self) -> &Table {
        self.table.get_or_init(|| {
            let table = Table::new(self.input, self.output, self.scale, &self.options);
            if self.back { table.transposed() } else { table }
        })
    }
}

/// For each output element the input elements that it takes, which are consecutive, and their weights.
pub(super) struct Table {
    pub input: usize,
    /// For each output: the first input, and where its weights start in `weights`; one entry more at the end.
    pub starts: Vec<(u32, u32)>,
    pub weights: Vec<f64>,
}

impl Table {
    fn new(input: usize, output: usize, scale: f64, options: &InterpolateOptions) -> Table {
        let corners = options.align_corners;
        let centre = |i: usize| if corners { scale * i as f64 } else { scale * (i as f64 + 0.5) - 0.5 };
        let mut table = Table { input, starts: Vec::with_capacity(output + 1), weights: Vec::new() };
        for i in 0..output {
            match options.mode {
                Interpolation::Nearest => table.add((i as f64 * scale).floor() as i64, &[1.0]),
                Interpolation::NearestExact => table.add(((i as f64 + 0.5) * scale).floor() as i64, &[1.0]),
                Interpolation::Area => {
                    let (start, end) = (i * input / output, ((i + 1) * input).div_ceil(output));
                    table.add(start as i64, &vec![1.0 / (end - start) as f64; end - start]);
                }
                Interpolation::Bilinear if options.antialias => table.add_wide(i, scale, 1.0, triangle),
                Interpolation::Bicubic if options.antialias => {
                    table.add_wide(i, scale, 2.0, |x| cubic(x, -0.5))
                }
                Interpolation::Bilinear => {
                    let x = centre(i).max(0.0);
                    table.add(x.floor() as i64, &[1.0 - x.fract(), x.fract()]);
                }
                Interpolation::Bicubic => {
                    let x = centre(i);
                    let t = x - x.floor();
                    let weights = [t + 1.0, t, 1.0 - t, 2.0 - t].map(|d| cubic(d, -0.75));
                    table.add(x.floor() as i64 - 1, &weights);
                }
            }
        }
        table.end();
        table
    }

    /// An output whose weights start at input `first`. What lies outside falls on the edge.
    fn add(&mut self, first: i64, weights: &[f64]) {
        let edge = |j: i64| j.clamp(0, self.input as i64 - 1) as usize;
        let start = edge(first);
        let last = edge(first + weights.len() as i64 - 1);
        let base = self.weights.len();
        self.starts.push((start as u32, base as u32));
        self.weights.resize(base + last - start + 1, 0.0);
        for (k, w) in weights.iter().enumerate() {
            let j = (first + k as i64).clamp(start as i64, last as i64) as usize;
            self.weights[base + j - start] += w;
        }
        // An edge that counts with weight 0 would turn an infinity there into NaN.
        if weights.len() == 2 && weights[1] == 0.0 && last > start {
            self.weights.pop();
        }
    }

    /// An output of the antialiased modes: a kernel of `radius`, as wide as the scale demands, cut at the edges and
    /// normalised (Pillow's way).
    fn add_wide(&mut self, i: usize, scale: f64, radius: f64, kernel: impl Fn(f64) -> f64) {
        let stretch = scale.max(1.0);
        let (centre, support) = (scale * (i as f64 + 0.5), radius * stretch);
        let start = ((centre - support + 0.5) as i64).clamp(0, self.input as i64 - 1) as usize;
        let end = ((centre + support + 0.5) as i64).clamp(start as i64 + 1, self.input as i64) as usize;
        let weights: Vec<f64> = (start..end).map(|j| kernel((j as f64 - centre + 0.5) / stretch)).collect();
        let sum: f64 = weights.iter().sum();
        self.starts.push((start as u32, self.weights.len() as u32));
        self.weights.extend(weights.iter().map(|w| if sum == 0.0 { 0.0 } else { w / sum }));
    }

    fn end(&mut self) {
        self.starts.push((0, self.weights.len() as u32));
    }

    pub fn output(&self) -> usize {
        self.starts.len() - 1
    }

    /// First input and weights of output `i`.
    #[inline(always)]
    pub fn taps<'a, T>(&self, i: usize, weights: &'a [T]) -> (usize, &'a [T]) {
        let (start, from) = self.starts[i];
        (start as usize, &weights[from as usize..self.starts[i + 1].1 as usize])
    }

    /// Does it change nothing?
    pub fn is_identity(&self) -> bool {
        self.input == self.output()
            && (0..self.input).all(|i| {
                let (start, weights) = self.taps(i, &self.weights);
                start == i && weights == [1.0]
            })
    }

    /// The table that takes gradients back. The outputs that use an input are consecutive too, because the windows
    /// move in one direction.
    fn transposed(&self) -> Table {
        let n = self.output();
        let mut table = Table { input: n, starts: Vec::with_capacity(self.input + 1), weights: Vec::new() };
        let mut first = 0;
        for j in 0..self.input {
            let window = |i: usize| {
                let (start, weights) = self.taps(i, &self.weights);
                (start, start + weights.len(), weights)
            };
            while first < n && window(first).1 <= j {
                first += 1;
            }
            table.starts.push((first.min(n - 1) as u32, table.weights.len() as u32));
            for i in first..n {
                let (start, _, weights) = window(i);
                if start > j {
                    break;
                }
                // ends move in one direction too, so every window up to here reaches j
                table.weights.push(weights.get(j - start).copied().unwrap_or(0.0));
            }
        }
        table.end();
        table
    }
}

fn triangle(x: f64) -> f64 {
    (1.0 - x.abs()).max(0.0)
}

/// Keys' cubic convolution kernel.
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}
