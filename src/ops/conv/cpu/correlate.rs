//! The convolution and the transposed one: tiles of output pixels by channels, sums over taps and inputs.

use super::{AxisPhase, PIECE, TASK, Walk, result_order, split};
use crate::{
    Tensor,
    cpu::{
        elementwise::dense_strides,
        parallel::{SharedMut, for_ranges},
        pool::CpuVec,
        transpose::transpose,
    },
    ops::conv::{
        pack::{Panels, Pieces},
        tile::{ConvElement, Kernels, Run, Tile},
    },
    shape::{Dims, count},
};
use std::ops::Range;

/// Rows of a weight panel that one pass takes; two registers wide they are 128 KiB.
const PASS: usize = 1024;
/// Bytes of weights that stay in the second-level cache from task to task.
const RESIDENT: usize = 1024 * 1024;

/// A new image.
pub fn correlate<T: ConvElement>(
    op: &'static str,
    walk: &Walk,
    panels: &Panels,
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    shape: Dims,
) -> Tensor {
    let strides = dense_strides(&shape, &result_order(input));
    let mut out = CpuVec::<T>::new(count(&shape));
    if !out.is_empty() {
        let to = Target::of(SharedMut::new(&mut out), &shape, &strides);
        run(walk, panels, input, weight, to, Some(&starts::<T>(panels, bias)));
    }
    Tensor::from_cpu_strided(out, shape, strides, op)
}

/// Adds to the image `sum`. False, with nothing done, if that is seen by others, or is not channels-last as the result
/// would be.
pub fn correlate_onto<T: ConvElement>(
    walk: &Walk,
    panels: &Panels,
    input: &Tensor,
    weight: &Tensor,
    sum: &mut Tensor,
) -> bool {
    let strides = dense_strides(sum.shape(), &result_order(input));
    if sum.dtype() != T::DTYPE || sum.strides() != &strides[..] || strides[1] != 1 || !sum.is_unique() {
        return false;
    }
    if sum.numel() > 0 {
        let out = SharedMut::of(sum.cpu_ptr::<T>().cast_mut());
        run(walk, panels, input, weight, Target::of(out, sum.shape(), &strides), None);
    }
    true
}

/// `starts`: what the sums of each panel start with; without, what stands in the target.
fn run<T: ConvElement>(
    walk: &Walk,
    panels: &Panels,
    input: &Tensor,
    weight: &Tensor,
    to: Target<T>,
    starts: Option<&[T]>,
) {
    let packed = panels.pack::<T>(weight);
    let cut = Cut::of::<T>(walk, panels, input, to.direct());
    // What several tasks read is brought into order once for all.
    let whole = (cut.parts > 1).then(|| {
        let [y, x] = [0, 1].map(|d| walk.reach(d, &(0..walk.count(d))));
        Pieces::new(input, 0..cut.batch, [y[0], x[0]], [y[1], x[1]], true)
    });
    let job = Job { walk, panels, packed: &packed, starts, kernels: T::kernels(), to };
    for_ranges(cut.tasks(), 1, |tasks| {
        for task in tasks {
            let (images, rows, some) = cut.task(task);
            match &whole {
                Some(pieces) => job.block(pieces, images, rows, some),
                None => {
                    let [y, x] = [walk.reach(0, &rows), walk.reach(1, &(0..walk.count(1)))];
                    let pieces = Pieces::new(input, images.clone(), [y[0], x[0]], [y[1], x[1]], false);
                    job.block(&pieces, images, rows, some);
                }
            }
        }
    });
}

/// What the sums of each panel start with.
fn starts<T: ConvElement>(panels: &Panels, bias: Option<&Tensor>) -> CpuVec<T> {
    let mut starts = CpuVec::<T>::zeros(panels.count() * panels.width());
    if let Some(bias) = bias {
        let from = |c: usize| unsafe { *bias.cpu_ptr::<T>().offset(c as isize * bias.strides()[0]) };
        for panel in 0..panels.count() {
            for l in 0..panels.valid(panel % panels.panels) {
                starts[panel * panels.width() + l] = from(panels.output(panel) + l);
            }
        }
    }
    starts
}

/// How a correlation is cut into tasks: groups of images, blocks of rows, parts of the panels.
struct Cut {
    batch: usize,
    images: usize,
    height: usize,
    rows: usize,
    panels: usize,
    /// Panels of a task.
    some: usize,
    parts: usize,
}

impl Cut {
    /// Small images under many weights are taken together, and the panels dealt out instead of the rows: else each
    /// task would fetch all weights from memory for a few pixels. `direct`: are tiles written straight to the result?
    fn of<T>(walk: &Walk, panels: &Panels, input: &Tensor, direct: bool) -> Cut {
        let (batch, height) = (input.shape()[0], walk.count(0));
        let [row_bytes, bytes] = walk.bytes(input.shape()[1] * size_of::<T>());
        let row_work = walk.count(1) * panels.count() * panels.width() * panels.inputs * panels.taps;
        let mut cut = Cut {
            batch,
            images: 1,
            height,
            rows: height,
            panels: panels.count(),
            some: panels.count(),
            parts: 1,
        };
        if direct && panels.len() * size_of::<T>() > RESIDENT {
            // a pass over a kernel of one tap reads only a part of the channels
            let passes = if panels.taps == 1 { panels.inputs.div_ceil(PASS) } else { 1 };
            cut.images = walk.images(batch, bytes / passes);
        }
        if cut.images > 1 {
            let parts = 16usize.div_ceil(batch.div_ceil(cut.images)).min(cut.panels);
            let most = cut.images * height * row_work / TASK;
            cut.some = cut.panels.div_ceil(parts.min(most.max(1)));
            cut.parts = cut.panels.div_ceil(cut.some);
        } else {
            cut.rows = walk.rows(batch, row_bytes, PIECE, row_work);
        }
        cut
    }

    fn blocks(&self) -> usize {
        self.height.div_ceil(self.rows)
    }

    fn tasks(&self) -> usize {
        self.batch.div_ceil(self.images) * self.blocks() * self.parts
    }

    /// Images, rows and panels of a task.
    fn task(&self, task: usize) -> (Range<usize>, Range<usize>, Range<usize>) {
        let piece = |i: usize, size: usize, n: usize| i * size..((i + 1) * size).min(n);
        let (task, part) = (task / self.parts, task % self.parts);
        let (group, block) = (task / self.blocks(), task % self.blocks());
        (
            piece(group, self.images, self.batch),
            piece(block, self.rows, self.height),
            piece(part, self.some, self.panels),
        )
    }
}

/// Images to be written.
struct Target<T> {
    out: SharedMut<T>,
    size: [usize; 2],
    channels: usize,
    steps: [isize; 4],
}

impl<T> Target<T> {
    fn of(out: SharedMut<T>, shape: &[usize], strides: &[isize]) -> Target<T> {
        let steps = [strides[0], strides[1], strides[2], strides[3]];
        Target { out, size: [shape[2], shape[3]], channels: shape[1], steps }
    }

    /// Are tiles written straight to it?
    fn direct(&self) -> bool {
        self.steps[1] == 1 || self.channels == 1
    }
}

/// What all tasks of a correlation share.
struct Job<'a, T: 'static> {
    walk: &'a Walk,
    panels: &'a Panels,
    packed: &'a [T],
    starts: Option<&'a [T]>,
    kernels: Kernels<T>,
    to: Target<T>,
}

/// Pixels of a phase: where the first is read and written, the steps from image to image, row to row and pixel to
/// pixel, and how many there are.
#[derive(Clone, Copy)]
struct Plane<T> {
    x: *const T,
    x_steps: [isize; 3],
    out: *mut T,
    out_steps: [isize; 3],
    sizes: [usize; 3],
}

impl<T> Plane<T> {
    /// Rows that follow each other without a gap become one long row, then images likewise.
    fn merged(mut self) -> Self {
        for d in [1, 0] {
            let even = |steps: [isize; 3]| steps[d] == self.sizes[2] as isize * steps[2];
            if (d == 1 || self.sizes[1] == 1) && even(self.x_steps) && even(self.out_steps) {
                self.sizes[2] *= self.sizes[d];
                self.sizes[d] = 1;
            }
        }
        self
    }
}

impl<T: ConvElement> Job<'_, T> {
    /// Rows `rows` of every phase of some images, channels of some panels.
    fn block(&self, pieces: &Pieces<T>, images: Range<usize>, rows: Range<usize>, some: Range<usize>) {
        let (walk, to) = (self.walk, &self.to);
        if to.direct() {
            let steps = [to.steps[0], to.steps[2], to.steps[3]];
            return self.phases(pieces, images, to.out.ptr(), steps, &rows, some);
        }
        let (first, last) = (rows.start * walk.stride[0], (rows.end * walk.stride[0]).min(to.size[0]));
        let row = to.size[1] * to.channels;
        let mut memory = CpuVec::<T>::new((last - first) * row);
        for image in images {
            let origin = memory.as_mut_ptr().wrapping_sub(first * row);
            let steps = [0, row as isize, to.channels as isize];
            self.phases(pieces, image..image + 1, origin, steps, &rows, some.clone());
            // The result is channels-last or row-major, so the rows follow each other.
            let pixels = (last - first) * to.size[1];
            unsafe {
                let (step, at) = (to.channels as isize, first as isize * to.steps[2]);
                let out = to.out.ptr().offset(image as isize * to.steps[0] + at);
                transpose([pixels, to.channels], memory.as_ptr(), step, out, to.steps[1]);
            }
        }
    }

    /// All phases into channels-last memory with these steps from image to image, row to row and pixel to pixel.
    fn phases(
        &self,
        pieces: &Pieces<T>,
        images: Range<usize>,
        out: *mut T,
        steps: [isize; 3],
        range: &Range<usize>,
        some: Range<usize>,
    ) {
        let walk = self.walk;
        for down in &walk.phases[0] {
            for across in &walk.phases[1] {
                let rows = range.start..range.end.min(down.count);
                if rows.is_empty() || across.count == 0 {
                    continue;
                }
                let passes = self.passes(pieces, down, across);
                // Pixels without a tap stay as they are.
                if self.starts.is_none() && passes.iter().all(Vec::is_empty) {
                    continue;
                }
                let (start, image) = (rows.start as isize, images.start as isize);
                let x_steps = [
                    pieces.steps[0],
                    walk.step[0] as isize * pieces.steps[1],
                    walk.step[1] as isize * pieces.steps[2],
                ];
                let out_steps =
                    [steps[0], walk.stride[0] as isize * steps[1], walk.stride[1] as isize * steps[2]];
                let first = down.first as isize * steps[1] + across.first as isize * steps[2];
                let plane = Plane {
                    x: pieces.origin(images.start).wrapping_offset(start * x_steps[1]),
                    x_steps,
                    out: out.wrapping_offset(first + image * out_steps[0] + start * out_steps[1]),
                    out_steps,
                    sizes: [images.len(), rows.len(), across.count],
                };
                self.plane(&passes, plane.merged(), some.clone());
            }
        }
    }

    /// The taps of a phase as runs of memory, in passes of bounded length.
    fn passes(&self, pieces: &Pieces<T>, down: &AxisPhase, across: &AxisPhase) -> Vec<Vec<Run>> {
        let (inputs, width) = (self.panels.inputs, self.panels.width());
        let mut runs: Vec<Run> = Vec::new();
        for &(dy, row) in &down.taps {
            for &(dx, column) in &across.taps {
                let x = dy * pieces.steps[1] + dx * pieces.steps[2];
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

    fn plane(&self, passes: &[Vec<Run>], plane: Plane<T>, some: Range<usize>) {
        let panels = self.panels;
        let tiles =
            if panels.depthwise { self.kernels.depthwise } else { self.kernels.dense[panels.registers - 1] };
        let [images, rows, columns] = plane.sizes;
        for panel in some {
            let x = plane.x.wrapping_add(panels.input(panel));
            let out = plane.out.wrapping_add(panels.output(panel));
            let starts = self.starts.map_or(std::ptr::null(), |s| s[panel * panels.width()..].as_ptr());
            for (pass, runs) in passes.iter().enumerate() {
                for row in 0..images * rows {
                    let (image, row) = ((row / rows) as isize, (row % rows) as isize);
                    let place = |steps: [isize; 3], at| image * steps[0] + row * steps[1] + at * steps[2];
                    split(columns, tiles.len(), |at, n| {
                        let tile = Tile {
                            runs,
                            x: x.wrapping_offset(place(plane.x_steps, at as isize)),
                            step: plane.x_steps[2],
                            w: self.packed[panel * panels.panel_len()..].as_ptr(),
                            bias: if pass == 0 { starts } else { std::ptr::null() },
                            out: out.wrapping_offset(place(plane.out_steps, at as isize)),
                            out_step: plane.out_steps[2],
                            valid: panels.valid(panel % panels.panels),
                        };
                        unsafe { tiles[n - 1](&tile) };
                    });
                }
            }
        }
    }
}
