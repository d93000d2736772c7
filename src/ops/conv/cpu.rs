//! The three operations on the CPU: blocks of output rows on all threads, each over a channels-last piece of its
//! input that fits the second-level cache.

use super::{
    Geometry,
    pack::{Image, Panels, Piece},
    tile::{ConvElement, Kernels, Outer, Run, Tile},
};
use crate::{
    Tensor,
    cpu::{
        elementwise::{dense_strides, memory_order},
        parallel::{SharedMut, for_ranges},
        pool::CpuVec,
        transpose::transpose,
    },
    shape::{Dims, contiguous_strides, count},
};

/// Bytes of an input piece: half a second-level cache.
const PIECE: usize = 512 * 1024;
/// The same where a piece of the gradient stands beside it.
const PIECE_OF_TWO: usize = 192 * 1024;
/// Rows of a weight panel that one pass takes; two registers wide they are 128 KiB.
const PASS: usize = 1024;
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

/// Memory order of a result: channels-last if the input is.
pub fn result_order(input: &Tensor) -> Dims {
    let channels_last = [0, 2, 3, 1];
    let order = memory_order(input.shape(), input.strides());
    let keep = |order: &[usize]| order.iter().copied().filter(|&d| input.shape()[d] != 1).collect::<Dims>();
    let is_last = input.shape()[1] != 1 && keep(&order) == keep(&channels_last) && !input.is_contiguous();
    if is_last { Dims::from_slice(&channels_last) } else { Dims::from_slice(&[0, 1, 2, 3]) }
}

fn correlate<T: ConvElement>(
    op: &'static str,
    walk: &Walk,
    panels: &Panels,
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    shape: Dims,
) -> Tensor {
    let order = result_order(input);
    let strides = dense_strides(&shape, &order);
    let mut out = CpuVec::<T>::new(count(&shape));
    if out.is_empty() {
        return Tensor::from_cpu_strided(out, shape, strides, op);
    }
    let packed = panels.pack::<T>(weight);
    let mut starts = CpuVec::<T>::zeros(panels.count() * panels.width());
    if let Some(bias) = bias {
        let from = |c: usize| unsafe { *bias.cpu_ptr::<T>().offset(c as isize * bias.strides()[0]) };
        for panel in 0..panels.count() {
            for l in 0..panels.valid(panel % panels.panels) {
                starts[panel * panels.width() + l] = from(panels.output(panel) + l);
            }
        }
    }
    let row_bytes = (walk.count(1) * walk.step[1]).max(1) * input.shape()[1] * size_of::<T>();
    let row_work = walk.count(1) * shape[1] * panels.inputs * panels.taps;
    let rows = walk.rows(shape[0], row_bytes, PIECE, row_work);
    let blocks = walk.count(0).div_ceil(rows);
    let target = SharedMut::new(&mut out);
    let job = Job { walk, panels, packed: &packed, starts: &starts, kernels: T::kernels() };
    for_ranges(shape[0] * blocks, 1, |tasks| {
        for task in tasks {
            let (n, block) = (task / blocks, task % blocks);
            let range = block * rows..((block + 1) * rows).min(walk.count(0));
            let to = Target {
                ptr: unsafe { target.ptr().offset(n as isize * strides[0]) },
                size: [shape[2], shape[3]],
                channels: shape[1],
                steps: [strides[1], strides[2], strides[3]],
            };
            job.block(&Image::of(input, n), &to, range);
        }
    });
    Tensor::from_cpu_strided(out, shape, strides, op)
}

/// An image to be written.
struct Target<T> {
    ptr: *mut T,
    size: [usize; 2],
    channels: usize,
    steps: [isize; 3],
}

/// What all tasks of a correlation share.
struct Job<'a, T: 'static> {
    walk: &'a Walk,
    panels: &'a Panels,
    packed: &'a [T],
    starts: &'a [T],
    kernels: Kernels<T>,
}

impl<T: ConvElement> Job<'_, T> {
    /// Rows `range` of every phase of one image.
    fn block(&self, image: &Image<T>, to: &Target<T>, range: std::ops::Range<usize>) {
        let walk = self.walk;
        let reach = [walk.reach(0, &range), walk.reach(1, &(0..walk.count(1)))];
        let piece = Piece::new(image, [reach[0][0], reach[1][0]], [reach[0][1], reach[1][1]]);
        let (first, last) = (range.start * walk.stride[0], (range.end * walk.stride[0]).min(to.size[0]));
        if to.steps[0] == 1 || to.channels == 1 {
            return self.phases(&piece, to.ptr, [to.steps[1], to.steps[2]], &range);
        }
        let row = to.size[1] * to.channels;
        let mut memory = CpuVec::<T>::new((last - first) * row);
        let origin = memory.as_mut_ptr().wrapping_sub(first * row);
        self.phases(&piece, origin, [row as isize, to.channels as isize], &range);
        // The result is channels-last or row-major, so the rows follow each other.
        let (pixels, to_row) = ((last - first) * to.size[1], first as isize * to.steps[1]);
        unsafe {
            let step = to.channels as isize;
            transpose([pixels, to.channels], memory.as_ptr(), step, to.ptr.offset(to_row), to.steps[0]);
        }
    }

    /// All phases into channels-last memory with these steps from row to row and pixel to pixel.
    fn phases(&self, piece: &Piece<T>, out: *mut T, steps: [isize; 2], range: &std::ops::Range<usize>) {
        let walk = self.walk;
        for down in &walk.phases[0] {
            for across in &walk.phases[1] {
                let rows = range.start..range.end.min(down.count);
                if rows.is_empty() || across.count == 0 {
                    continue;
                }
                let passes = self.passes(piece, down, across);
                let [from_row, from_pixel] = [0, 1].map(|d| walk.step[d] as isize * piece.steps[d]);
                let [to_row, to_pixel] = [0, 1].map(|d| walk.stride[d] as isize * steps[d]);
                let first = down.first as isize * steps[0] + across.first as isize * steps[1];
                let start = rows.start as isize;
                let x = piece.origin.wrapping_offset(start * from_row);
                let out = out.wrapping_offset(first + start * to_row);
                let mut pixels = [rows.len(), across.count];
                let width = pixels[1] as isize;
                // Rows that follow each other without a gap are one long row.
                if from_row == width * from_pixel && to_row == width * to_pixel {
                    pixels = [1, pixels[0] * pixels[1]];
                }
                self.plane(&passes, x, [from_row, from_pixel], out, [to_row, to_pixel], pixels);
            }
        }
    }

    /// The taps of a phase as runs of memory, in passes of bounded length.
    fn passes(&self, piece: &Piece<T>, down: &AxisPhase, across: &AxisPhase) -> Vec<Vec<Run>> {
        let (inputs, width) = (self.panels.inputs, self.panels.width());
        let mut runs: Vec<Run> = Vec::new();
        for &(dy, row) in &down.taps {
            for &(dx, column) in &across.taps {
                let x = dy * piece.steps[0] + dx * piece.steps[1];
                let w = self.panels.tap(row, column) * inputs * width;
                match runs.last_mut() {
                    Some(run)
                        if !self.panels.depthwise
                            && run.x + run.len as isize == x
                            && run.w + run.len * width == w =>
                    {
                        run.len += inputs;
                    }
                    _ => runs.push(Run { x, w, len: inputs }),
                }
            }
        }
        let mut passes = vec![Vec::new()];
        let mut room = PASS;
        for mut run in runs {
            while run.len > room {
                if room > 0 {
                    passes.last_mut().into_iter().for_each(|p| p.push(Run { len: room, ..run }));
                    run = Run { x: run.x + room as isize, w: run.w + room * width, len: run.len - room };
                }
                passes.push(Vec::new());
                room = PASS;
            }
            room -= run.len;
            passes.last_mut().into_iter().for_each(|p| p.push(run));
        }
        passes
    }

    fn plane(
        &self,
        passes: &[Vec<Run>],
        x: *const T,
        x_steps: [isize; 2],
        out: *mut T,
        out_steps: [isize; 2],
        [rows, columns]: [usize; 2],
    ) {
        let panels = self.panels;
        let tiles =
            if panels.depthwise { self.kernels.depthwise } else { self.kernels.dense[panels.registers - 1] };
        for panel in 0..panels.count() {
            let x = x.wrapping_add(panels.input(panel));
            let out = out.wrapping_add(panels.output(panel));
            for (pass, runs) in passes.iter().enumerate() {
                for row in 0..rows as isize {
                    split(columns, tiles.len(), |at, n| {
                        let at = at as isize;
                        let tile = Tile {
                            runs,
                            x: x.wrapping_offset(row * x_steps[0] + at * x_steps[1]),
                            step: x_steps[1],
                            w: self.packed[panel * panels.panel_len()..].as_ptr(),
                            bias: if pass == 0 {
                                self.starts[panel * panels.width()..].as_ptr()
                            } else {
                                std::ptr::null()
                            },
                            out: out.wrapping_offset(row * out_steps[0] + at * out_steps[1]),
                            out_step: out_steps[1],
                            valid: panels.valid(panel % panels.panels),
                        };
                        unsafe { tiles[n - 1](&tile) };
                    });
                }
            }
        }
    }
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

/// w from x and y: rows of pixels are split into as many sums as memory allows, which are then added in order.
pub fn weight<T: ConvElement>(op: &'static str, g: &Geometry, x: &Tensor, y: &Tensor) -> Tensor {
    let groups = g.options.groups;
    let shape = Dims::from_slice(&[g.channels[1], g.channels[0] / groups, g.kernel[0], g.kernel[1]]);
    let mut out = CpuVec::<T>::new(count(&shape));
    let panels = Panels::new::<T>(g, &contiguous_strides(&shape), false);
    let walk = Walk::down(g);
    if out.is_empty() || g.batch == 0 {
        out.fill(T::ZERO);
        return Tensor::from_cpu(out, shape, op);
    }
    let row_bytes = (g.y[1] * walk.step[1]).max(1) * g.channels[0] * size_of::<T>();
    let row_work = g.y[1] * g.channels[1] * panels.inputs * panels.taps;
    let rows = walk.rows(g.batch, row_bytes, PIECE_OF_TWO, row_work);
    let blocks = g.y[0].div_ceil(rows);
    let units = g.batch * blocks;
    // Sums over different pixels need memory each; what is missing to 8 tasks is made up by splitting panels.
    let sums = ((2 << 20) / panels.len().max(1)).clamp(1, units.min(8));
    let parts = 8usize.div_ceil(sums).min(panels.count());
    let mut partial = CpuVec::<T>::zeros(sums * panels.len());
    let target = SharedMut::new(&mut partial);
    let kernels = T::kernels();
    for_ranges(sums * parts, 1, |tasks| {
        for task in tasks {
            let (sum, part) = (task / parts, task % parts);
            let some = part * panels.count() / parts..(part + 1) * panels.count() / parts;
            let at = sum * panels.len();
            let out = unsafe {
                target.slice(at + some.start * panels.panel_len()..at + some.end * panels.panel_len())
            };
            for unit in sum * units / sums..(sum + 1) * units / sums {
                let (n, block) = (unit / blocks, unit % blocks);
                let range = block * rows..((block + 1) * rows).min(g.y[0]);
                let images = [Image::of(x, n), Image::of(y, n)];
                weight_block(&kernels, &walk, &panels, images, range, some.clone(), out);
            }
        }
    });
    panels.unpack_sum(&mut partial, sums, &mut out);
    Tensor::from_cpu(out, shape, op)
}

/// Adds what rows `range` of one image give to some panels.
fn weight_block<T: ConvElement>(
    kernels: &Kernels<T>,
    walk: &Walk,
    panels: &Panels,
    [x, y]: [Image<T>; 2],
    range: std::ops::Range<usize>,
    some: std::ops::Range<usize>,
    out: &mut [T],
) {
    let reach = [walk.reach(0, &range), walk.reach(1, &(0..y.size[1]))];
    let x = Piece::new(&x, [reach[0][0], reach[1][0]], [reach[0][1], reach[1][1]]);
    let g = Piece::new(&y, [range.start as isize, 0], [range.end as isize, y.size[1] as isize]);
    let [down, across] = [&walk.phases[0][0], &walk.phases[1][0]];
    let step = [0, 1].map(|d| walk.step[d] as isize * x.steps[d]);
    let taps = || down.taps.iter().flat_map(|&(dy, _)| across.taps.iter().map(move |&(dx, _)| (dy, dx)));
    let offsets: Vec<isize> = taps().map(|(dy, dx)| dy * x.steps[0] + dx * x.steps[1]).collect();
    // Rows of a panel whose inputs lie side by side in memory: (offset, length).
    let mut runs: Vec<(isize, usize)> = Vec::new();
    for &at in &offsets {
        match runs.last_mut() {
            Some((start, len)) if !panels.depthwise && *start + *len as isize == at => *len += panels.inputs,
            _ => runs.push((at, panels.inputs)),
        }
    }
    let start = range.start as isize;
    for (panel, out) in some.zip(out.chunks_exact_mut(panels.panel_len())) {
        let mut work = Outer {
            x: std::ptr::null(),
            x_steps: step,
            g: g.at(start, 0).wrapping_add(panels.output(panel)),
            g_steps: g.steps,
            pixels: [range.len(), y.size[1]],
            out: std::ptr::null_mut(),
            valid: panels.valid(panel % panels.panels),
            offsets: std::ptr::null(),
        };
        let x = x.origin.wrapping_offset(start * step[0]).wrapping_add(panels.input(panel));
        let mut row = 0;
        let mut tile = |x: *const T, n: usize, offsets: *const isize| {
            work.x = x;
            work.offsets = offsets;
            work.out = out[row * panels.width()..].as_mut_ptr();
            row += n;
            let tiles =
                if panels.depthwise { kernels.outer_depthwise } else { kernels.outer[panels.registers - 1] };
            unsafe { tiles[n - 1](&work) };
        };
        if panels.depthwise {
            split(offsets.len(), kernels.outer_depthwise.len(), |at, n| tile(x, n, offsets[at..].as_ptr()));
        } else {
            for &(offset, len) in &runs {
                let most = kernels.outer[panels.registers - 1].len();
                split(len, most, |at, n| tile(x.wrapping_offset(offset + at as isize), n, std::ptr::null()));
            }
        }
    }
}
