//! Where pooling windows lie.

use super::{PoolDivisor, PoolOptions};
use crate::{Result, ensure};

/// Windows along both axes.
pub struct Windows {
    pub axes: [Axis; 2],
    /// How they move; `None`: they adapt to the size of the result.
    #[cfg_attr(not(gpu), allow(dead_code))]
    pub moves: Option<PoolOptions>,
    /// Does the padding count in sums' divisors?
    #[cfg_attr(not(gpu), allow(dead_code))]
    pub padded: bool,
    /// Divides every sum; `None` for the product of the axes' sizes.
    pub divisor: Option<usize>,
}

/// Windows along one axis.
pub struct Axis {
    /// Size of the image.
    pub size: usize,
    pub windows: Vec<Window>,
    /// Pixels from element to element of a window.
    pub step: usize,
    /// By element of a window, the windows in which it lies within the image.
    pub taps: Vec<Tap>,
}

/// One window along an axis.
#[derive(Clone, Copy)]
pub struct Window {
    /// First pixel within the image, and how many elements lie within.
    pub start: usize,
    pub count: usize,
    /// What its size counts as.
    pub weight: usize,
    /// Its size with the padding.
    padded: usize,
}

/// Element k of all windows.
pub struct Tap {
    /// (window, pixel).
    pub pairs: Vec<(usize, usize)>,
    /// Pixels from pair to pair if windows follow each other at one distance.
    pub stride: Option<usize>,
}

impl Axis {
    /// From (first pixel, elements, size with padding); the first pixel may lie before the image.
    fn new(size: usize, step: usize, windows: impl Iterator<Item = (isize, usize, usize)>) -> Axis {
        let mut taps: Vec<Tap> = Vec::new();
        let windows: Vec<Window> = windows
            .enumerate()
            .map(|(i, (first, elements, padded))| {
                let inside = |k: &usize| {
                    let pixel = first + (k * step) as isize;
                    pixel >= 0 && pixel < size as isize
                };
                let mut window = Window { start: 0, count: 0, weight: padded, padded };
                for k in (0..elements).filter(inside) {
                    let pixel = (first + (k * step) as isize) as usize;
                    if window.count == 0 {
                        window.start = pixel;
                    }
                    window.count += 1;
                    taps.resize_with(taps.len().max(k + 1), || Tap { pairs: Vec::new(), stride: None });
                    taps[k].pairs.push((i, pixel));
                }
                window
            })
            .collect();
        for tap in &mut taps {
            let even = |stride: usize| {
                tap.pairs.windows(2).all(|p| p[1].0 == p[0].0 + 1 && p[1].1 == p[0].1 + stride)
            };
            let stride = match tap.pairs[..] {
                [a, b, ..] => b.1.saturating_sub(a.1),
                _ => 1,
            };
            tap.stride = even(stride).then_some(stride);
        }
        taps.retain(|tap| !tap.pairs.is_empty());
        Axis { size, windows, step, taps }
    }

    /// Of each pixel, the windows in which it lies, first to last.
    pub fn holders(&self) -> Vec<Vec<usize>> {
        let mut holders = vec![Vec::new(); self.size];
        for i in 0..self.windows.len() {
            self.pixels(i).for_each(|pixel| holders[pixel].push(i));
        }
        holders
    }

    /// The pixels of window `i`.
    pub fn pixels(&self, i: usize) -> impl Iterator<Item = usize> + use<> {
        let (window, step) = (self.windows[i], self.step);
        (0..window.count).map(move |k| window.start + k * step)
    }
}

impl Windows {
    /// A window that moves by its stride.
    #[track_caller]
    pub fn moving(op: &'static str, size: [usize; 2], o: PoolOptions) -> Result<Windows> {
        let mut count = [0; 2];
        for d in 0..2 {
            let (k, stride, padding) = (o.kernel_size[d], o.stride[d], o.padding[d]);
            ensure!(k > 0 && stride > 0 && o.dilation[d] > 0, op, "window sizes must be positive: {o:?}");
            let span = o.dilation[d] * (k - 1) + 1;
            ensure!(2 * padding <= span, op, "the padding is more than half the window: {o:?}");
            let padded = size[d] + 2 * padding;
            ensure!(
                size[d] > 0 && padded >= span,
                op,
                "the window spans {span} pixels, the padded image {size:?} has {padded}"
            );
            let rest = padded - span;
            count[d] = if o.ceil_mode { rest.div_ceil(stride) } else { rest / stride } + 1;
            if o.ceil_mode && (count[d] - 1) * stride >= size[d] + padding {
                count[d] -= 1;
            }
        }
        let axes = [0, 1].map(|d| {
            let windows = (0..count[d]).map(|i| {
                let first = (i * o.stride[d]) as isize - o.padding[d] as isize;
                let end = (size[d] + o.padding[d]) as isize;
                let padded = (end - first).min(o.kernel_size[d] as isize).max(0) as usize;
                (first, o.kernel_size[d], padded)
            });
            Axis::new(size[d], o.dilation[d], windows)
        });
        Ok(Windows { axes, moves: Some(o), padded: true, divisor: None })
    }

    /// Windows that cover the image evenly.
    #[track_caller]
    pub fn adaptive(op: &'static str, size: [usize; 2], output: [usize; 2]) -> Result<Windows> {
        ensure!(size[0] > 0 && size[1] > 0, op, "the image {size:?} is empty");
        let axes = [0, 1].map(|d| {
            let (n, out) = (size[d], output[d]);
            let windows = (0..out).map(|i| {
                let (start, end) = (i * n / out, ((i + 1) * n).div_ceil(out));
                (start as isize, end - start, end - start)
            });
            Axis::new(n, 1, windows)
        });
        Ok(Windows { axes, moves: None, padded: true, divisor: None })
    }

    /// With another divisor for means.
    pub fn divided(mut self, divisor: PoolDivisor) -> Windows {
        for window in self.axes.iter_mut().flat_map(|axis| &mut axis.windows) {
            window.weight = match divisor {
                PoolDivisor::WithPadding => window.padded,
                _ => window.count,
            };
        }
        self.padded = divisor == PoolDivisor::WithPadding;
        if let PoolDivisor::Fixed(n) = divisor {
            self.divisor = Some(n);
        }
        self
    }

    /// The divisor of a window's sum.
    pub fn weight(&self, y: usize, x: usize) -> usize {
        self.divisor.unwrap_or(self.axes[0].windows[y].weight * self.axes[1].windows[x].weight)
    }

    /// Calls `f` with each pixel of a window, counted in the flattened plane.
    #[inline(always)]
    pub fn pixels(&self, y: usize, x: usize, mut f: impl FnMut(usize)) {
        let [down, across] = &self.axes;
        let (wy, wx) = (down.windows[y], across.windows[x]);
        for ky in 0..wy.count {
            let first = (wy.start + ky * down.step) * across.size + wx.start;
            for kx in 0..wx.count {
                f(first + kx * across.step);
            }
        }
    }

    /// Is there one window, over the whole image?
    pub fn global(&self) -> bool {
        self.axes
            .iter()
            .all(|axis| axis.windows.len() == 1 && axis.step == 1 && axis.windows[0].count == axis.size)
    }

    /// Windows along both axes.
    pub fn count(&self) -> [usize; 2] {
        [0, 1].map(|d| self.axes[d].windows.len())
    }

    /// Size of the image.
    pub fn size(&self) -> [usize; 2] {
        [0, 1].map(|d| self.axes[d].size)
    }
}
