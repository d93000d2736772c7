//! The gradient of the weights: tiles of inputs by output channels, sums over pixels.

use super::{PIECE_OF_TWO, Walk, split};
use crate::{
    Tensor,
    cpu::{
        parallel::{SharedMut, for_ranges},
        pool::CpuVec,
        simd::LANES,
    },
    ops::conv::{
        Geometry,
        pack::{Panels, Pieces},
        tile::{ConvElement, Kernels, Outer},
    },
    shape::{Dims, contiguous_strides, count},
};
use std::ops::Range;

/// Bytes from pixel to pixel of a gradient from which on a panel's channels are copied to lie side by side: each of the
/// panel's tiles reads them, and at a power of two they meet in few places of the caches.
const FAR: usize = 1024;
/// Rows of a panel that are worth that copy.
const MANY: usize = 112;

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
    let units = Units::of::<T>(g, &walk, &panels);
    // Sums over different pixels need memory each; what is missing to 8 tasks is made up by splitting panels. With more
    // than one tap each of the parts may copy its pieces, so there it comes later.
    let room = if panels.taps == 1 { 1 << 19 } else { 1 << 21 };
    let most = (room / panels.len().max(1)).clamp(1, units.count().min(8));
    let sums = 1 << most.ilog2();
    let parts = (8 / sums).min(panels.count());
    let mut partial = CpuVec::<T>::new(sums * panels.len());
    let target = SharedMut::new(&mut partial);
    let kernels = T::kernels();
    let source = Source { x, y, walk: &walk, size: g.y };
    // What several tasks read is brought into order once for all.
    let whole = (parts > 1 && units.images > 1).then(|| source.pieces(0..g.batch, 0..g.y[0], true));
    for_ranges(sums * parts, 1, |tasks| {
        for task in tasks {
            let (sum, part) = (task / parts, task % parts);
            let some = part * panels.count() / parts..(part + 1) * panels.count() / parts;
            let at = sum * panels.len();
            let out = unsafe {
                target.slice(at + some.start * panels.panel_len()..at + some.end * panels.panel_len())
            };
            let first = sum * units.count() / sums;
            for unit in first..(sum + 1) * units.count() / sums {
                let (images, rows) = units.unit(unit);
                let own = whole.is_none().then(|| source.pieces(images.clone(), rows.clone(), false));
                if let Some(pieces) = own.as_ref().or(whole.as_ref()) {
                    let (pixels, fresh) = ([images, rows, 0..g.y[1]], unit == first);
                    block(&kernels, &walk, &panels, pieces, pixels, some.clone(), out, fresh);
                }
            }
        }
    });
    panels.unpack_sum(&mut partial, sums, &mut out);
    Tensor::from_cpu(out, shape, op)
}

/// Pixels that are summed at once: groups of images, or blocks of rows.
struct Units {
    batch: usize,
    images: usize,
    height: usize,
    rows: usize,
}

impl Units {
    /// Small images are taken together: else each would add few products to every weight.
    fn of<T>(g: &Geometry, walk: &Walk, panels: &Panels) -> Units {
        let [row_bytes, bytes] = walk.bytes(g.channels[0] * size_of::<T>());
        let row_work = g.y[1] * g.channels[1] * panels.inputs * panels.taps;
        let images = walk.images(g.batch, bytes);
        let rows = if images > 1 { g.y[0] } else { walk.rows(g.batch, row_bytes, PIECE_OF_TWO, row_work) };
        Units { batch: g.batch, images, height: g.y[0], rows }
    }

    fn count(&self) -> usize {
        self.batch.div_ceil(self.images) * self.height.div_ceil(self.rows)
    }

    /// Images and rows.
    fn unit(&self, unit: usize) -> (Range<usize>, Range<usize>) {
        let blocks = self.height.div_ceil(self.rows);
        let piece = |i: usize, size: usize, n: usize| i * size..((i + 1) * size).min(n);
        (piece(unit / blocks, self.images, self.batch), piece(unit % blocks, self.rows, self.height))
    }
}

/// Where the sums come from.
struct Source<'a> {
    x: &'a Tensor,
    y: &'a Tensor,
    walk: &'a Walk,
    /// Of an image of y.
    size: [usize; 2],
}

impl Source<'_> {
    /// Pieces of x and y for these rows of y.
    fn pieces<T: ConvElement>(
        &self,
        images: Range<usize>,
        rows: Range<usize>,
        threads: bool,
    ) -> [Pieces<T>; 2] {
        let [down, across] = [self.walk.reach(0, &rows), self.walk.reach(1, &(0..self.size[1]))];
        let (low, high) = ([rows.start as isize, 0], [rows.end as isize, self.size[1] as isize]);
        [
            Pieces::new(self.x, images.clone(), [down[0], across[0]], [down[1], across[1]], threads),
            Pieces::new(self.y, images, low, high, threads),
        ]
    }
}

/// Adds what some pixels (images, rows, columns) give to some panels; `fresh`: the first are written.
fn block<T: ConvElement>(
    kernels: &Kernels<T>,
    walk: &Walk,
    panels: &Panels,
    [x, g]: &[Pieces<T>; 2],
    [images, rows, columns]: [Range<usize>; 3],
    some: Range<usize>,
    out: &mut [T],
    fresh: bool,
) {
    let [down, across] = [&walk.phases[0][0], &walk.phases[1][0]];
    let step = [x.steps[0], walk.step[0] as isize * x.steps[1], walk.step[1] as isize * x.steps[2]];
    let taps = || down.taps.iter().flat_map(|&(dy, _)| across.taps.iter().map(move |&(dx, _)| (dy, dx)));
    let offsets: Vec<isize> = taps().map(|(dy, dx)| dy * x.steps[1] + dx * x.steps[2]).collect();
    let runs = runs(&offsets, panels.inputs);
    let start = rows.start as isize;
    let pixels = [images.len(), rows.len(), columns.len()];
    let x_first = x.origin(images.start).wrapping_offset(start * step[1]);
    let g_first = g.origin(images.start).wrapping_offset(start * g.steps[1]);
    let mut near = Near::new(g, pixels, panels);
    for (panel, out) in some.zip(out.chunks_exact_mut(panels.panel_len())) {
        let valid = panels.valid(panel % panels.panels);
        let (g, g_steps) = near.panel(g_first.wrapping_add(panels.output(panel)), valid);
        let mut work = Outer {
            x: std::ptr::null(),
            x_steps: step,
            g,
            g_steps,
            pixels,
            out: std::ptr::null_mut(),
            fresh,
            valid,
            offsets: std::ptr::null(),
        };
        work.merge();
        let x = x_first.wrapping_add(panels.input(panel));
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

/// Rows of a panel whose inputs lie side by side in memory: (offset, length).
fn runs(offsets: &[isize], inputs: usize) -> Vec<(isize, usize)> {
    let mut runs: Vec<(isize, usize)> = Vec::new();
    for &at in offsets {
        match runs.last_mut() {
            Some((start, len)) if *start + *len as isize == at => *len += inputs,
            _ => runs.push((at, inputs)),
        }
    }
    runs
}

/// Where a panel finds its channels of the gradient: in a copy, if the pixels are far apart and many tiles read them.
struct Near<T> {
    /// Images, rows and columns.
    pixels: [usize; 3],
    steps: [isize; 3],
    width: usize,
    copy: Option<CpuVec<T>>,
}

impl<T: ConvElement> Near<T> {
    fn new(g: &Pieces<T>, pixels: [usize; 3], panels: &Panels) -> Near<T> {
        let far = g.steps[2].unsigned_abs() * size_of::<T>() >= FAR && panels.taps * panels.inputs >= MANY;
        let (steps, width) = (g.steps, panels.width());
        let copy = far.then(|| CpuVec::new(pixels.iter().product::<usize>() * width));
        Near { pixels, steps, width, copy }
    }

    /// The first element and the steps of a panel that has `valid` channels from `from` on.
    fn panel(&mut self, from: *const T, valid: usize) -> (*const T, [isize; 3]) {
        let Some(copy) = &mut self.copy else { return (from, self.steps) };
        let [images, rows, columns] = self.pixels;
        let mut to = copy.chunks_exact_mut(self.width);
        for row in 0..images * rows {
            let (image, row) = ((row / rows) as isize, (row % rows) as isize);
            let from = from.wrapping_offset(image * self.steps[0] + row * self.steps[1]);
            for (column, to) in (0..columns as isize).zip(&mut to) {
                let from = from.wrapping_offset(column * self.steps[2]);
                if valid < self.width {
                    to[..valid].copy_from_slice(unsafe { std::slice::from_raw_parts(from, valid) });
                    continue;
                }
                for (register, to) in to.chunks_exact_mut(LANES).enumerate() {
                    let lanes = unsafe { from.cast::<[T; LANES]>().add(register).read_unaligned() };
                    to.copy_from_slice(&lanes);
                }
            }
        }
        let row = columns * self.width;
        (copy.as_ptr(), [rows * row, row, self.width].map(|n| n as isize))
    }
}
