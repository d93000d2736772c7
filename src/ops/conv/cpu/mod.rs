//! The three operations on the CPU: blocks of output rows on all threads, each over a channels-last piece of its
//! input that fits the second-level cache.

mod correlate;
mod weight;

use super::{Geometry, pack::Panels, tile::ConvElement};
use crate::{Tensor, cpu::elementwise::memory_order, shape::Dims};
use correlate::{correlate, correlate_onto};
pub use weight::weight;

/// Bytes of an input piece: half a second-level cache.
const PIECE: usize = 512 * 1024;
/// The same where a piece of the gradient stands beside it.
const PIECE_OF_TWO: usize = 192 * 1024;
/// Bytes of the pieces of several small images, which leave room for a panel of weights in the cache.
const PIECES: usize = 704 * 1024;
/// Pixels of several small images that pass under one panel of weights: more would not make it wait less for memory.
const PIXELS: usize = 784;
/// A task is at least this many multiplications (some ten microseconds).
const TASK: usize = 1 << 20;

/// Pixels `first, first + step, ..` of one axis of the output, which see the same taps: tap `k` of pixel `p` is
/// input pixel `p * Walk::step + offset`.
struct AxisPhase {
    first: usize,
    count: usize,
    /// (offset, tap), offsets rising.
    taps: Vec<(isize, usize)>,
}

/// How an operation walks over its input.
struct Walk {
    /// Input pixels from output pixel to output pixel of a phase.
    step: [usize; 2],
    /// Output pixels from one pixel of a phase to the next.
    stride: [usize; 2],
    phases: [Vec<AxisPhase>; 2],
}

impl Walk {
    fn down(g: &Geometry) -> Walk {
        let o = &g.options;
        let axis = |d: usize| {
            let taps =
                (0..g.kernel[d]).map(|k| ((k * o.dilation[d]) as isize - o.padding[d] as isize, k)).collect();
            vec![AxisPhase { first: 0, count: g.y[d], taps }]
        };
        Walk { step: o.stride, stride: [1, 1], phases: [axis(0), axis(1)] }
    }

    /// Pixel i of x takes from pixel j of y through tap k where i + padding = j stride + k dilation. Pixels
    /// with the same remainder by the stride see the same taps.
    fn up(g: &Geometry) -> Walk {
        let o = &g.options;
        let axis = |d: usize| {
            let stride = o.stride[d] as isize;
            let phase = |first: usize| {
                let at = |k: usize| (first + o.padding[d]) as isize - (k * o.dilation[d]) as isize;
                let taps = (0..g.kernel[d]).rev().filter(|&k| at(k) % stride == 0);
                let count = (g.x[d] - first).div_ceil(o.stride[d]);
                AxisPhase { first, count, taps: taps.map(|k| (at(k) / stride, k)).collect() }
            };
            (0..o.stride[d].min(g.x[d])).map(phase).collect()
        };
        Walk { step: [1, 1], stride: o.stride, phases: [axis(0), axis(1)] }
    }

    /// Pixels of the largest phase along an axis.
    fn count(&self, d: usize) -> usize {
        self.phases[d].iter().map(|p| p.count).max().unwrap_or(0)
    }

    /// Smallest and largest offset of a tap.
    fn span(&self, d: usize) -> [isize; 2] {
        let offsets = || self.phases[d].iter().flat_map(|p| p.taps.iter().map(|t| t.0));
        [offsets().min().unwrap_or(0), offsets().max().unwrap_or(0)]
    }

    /// Input pixels that output pixels `range` (of each phase) reach: from, up to.
    fn reach(&self, d: usize, range: &std::ops::Range<usize>) -> [isize; 2] {
        let [low, high] = self.span(d);
        let at = |p: usize| (p * self.step[d]) as isize;
        [at(range.start) + low, at(range.end.max(1) - 1) + high + 1]
    }

    /// Bytes of input behind a row of output pixels and behind an image, for pixels of `bytes`. A window of one pixel skips
    /// those between.
    fn bytes(&self, bytes: usize) -> [usize; 2] {
        let [rows, columns] = [0, 1].map(|d| {
            let [low, high] = self.span(d);
            self.count(d) * self.step[d].min((high - low) as usize + 1)
        });
        [columns.max(1) * bytes, rows * columns.max(1) * bytes]
    }

    /// Images that are worked on together because each alone has few pixels for the weights that it takes from memory;
    /// 1 if it has enough. `bytes`: of what an image takes in the cache.
    fn images(&self, batch: usize, bytes: usize) -> usize {
        let pixels = (self.count(0) * self.count(1)).max(1);
        let most = (PIECES / bytes.max(1)).min(PIXELS / pixels).clamp(1, batch.max(1));
        // Equal groups.
        batch.div_ceil(batch.div_ceil(most).max(1)).max(1)
    }

    /// Rows of a phase for one task: the piece stays within `bytes`, and there are some 16 tasks for few images.
    fn rows(&self, images: usize, row_bytes: usize, bytes: usize, row_work: usize) -> usize {
        let [low, high] = self.span(0);
        let fits = (bytes / row_bytes.max(1)).saturating_sub((high - low) as usize) / self.step[0];
        let rows = self.count(0);
        let shared = (rows * images).div_ceil(16).max(TASK.div_ceil(row_work.max(1)));
        // Equal blocks.
        let most = fits.min(shared).clamp(1, rows.max(1));
        rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
    }
}

/// y from x and w.
pub fn down<T: ConvElement>(
    op: &'static str,
    g: &Geometry,
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
) -> Tensor {
    let panels = Panels::new::<T>(g, w.strides(), false);
    let shape = Dims::from_slice(&[g.batch, g.channels[1], g.y[0], g.y[1]]);
    correlate::<T>(op, &Walk::down(g), &panels, x, w, bias, shape)
}

/// x from y and w.
pub fn up<T: ConvElement>(
    op: &'static str,
    g: &Geometry,
    y: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
) -> Tensor {
    let panels = Panels::new::<T>(g, w.strides(), true);
    let shape = Dims::from_slice(&[g.batch, g.channels[0], g.x[0], g.x[1]]);
    correlate::<T>(op, &Walk::up(g), &panels, y, w, bias, shape)
}

/// Adds x from y and w to `sum`; false, with nothing done, if that is not possible.
pub fn up_onto<T: ConvElement>(g: &Geometry, y: &Tensor, w: &Tensor, sum: &mut Tensor) -> bool {
    let panels = Panels::new::<T>(g, w.strides(), true);
    correlate_onto::<T>(&Walk::up(g), &panels, y, w, sum)
}

/// Memory order of a result: channels-last if the input is.
pub fn result_order(input: &Tensor) -> Dims {
    let channels_last = [0, 2, 3, 1];
    let order = memory_order(input.shape(), input.strides());
    let keep = |order: &[usize]| order.iter().copied().filter(|&d| input.shape()[d] != 1).collect::<Dims>();
    let is_last = input.shape()[1] != 1 && keep(&order) == keep(&channels_last) && !input.is_contiguous();
    if is_last { Dims::from_slice(&channels_last) } else { Dims::from_slice(&[0, 1, 2, 3]) }
}

/// Calls `f(start, length)` over `0..n` in the fewest pieces of at most `most`, of even length.
fn split(n: usize, most: usize, mut f: impl FnMut(usize, usize)) {
    let pieces = n.div_ceil(most);
    let mut at = 0;
    for i in 0..pieces {
        let length = (n - at).div_ceil(pieces - i);
        f(at, length);
        at += length;
    }
}
