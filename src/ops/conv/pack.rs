//! Memory in the order in which the inner loops want it: packed weights, channels-last pieces of images.

use super::{Geometry, tile::ConvElement};
use crate::{
    Tensor,
    cpu::{
        parallel::{Shared, SharedMut, for_ranges},
        pool::CpuVec,
        simd::{LANES, simd_of},
        transpose::transpose,
    },
    dtype::Real,
};
use std::ops::Range;

/// How the weights of a convolution stand in panels `[group, panel, tap, input channel, lane]`, a lane for each
/// output channel. Depthwise weights are panels `[panel, tap, lane]` of 16 channels each.
pub struct Panels {
    pub depthwise: bool,
    pub groups: usize,
    pub taps: usize,
    /// Input and output channels of a group.
    pub inputs: usize,
    pub outputs: usize,
    /// Lanes of a panel, in registers.
    pub registers: usize,
    /// Panels of a group.
    pub panels: usize,
    /// Where in the weight tensor: group, output channel, input channel, tap row, tap column.
    steps: [isize; 5],
    kernel: [usize; 2],
    /// Are the taps in reverse order?
    reversed: bool,
}

impl Panels {
    /// For the convolution itself, or (`reversed`) the transposed one.
    pub fn new<T: ConvElement>(g: &Geometry, weight_strides: &[isize], reversed: bool) -> Panels {
        let groups = g.options.groups;
        let [x, y] = g.channels.map(|c| c / groups);
        let depthwise = x == 1 && y == 1;
        let s = weight_strides;
        let group_step = y as isize * s[0];
        let (inputs, outputs, steps) = if reversed {
            (y, x, [group_step, s[1], s[0], s[2], s[3]])
        } else {
            (x, y, [group_step, s[0], s[1], s[2], s[3]])
        };
        let (groups, outputs, steps) =
            if depthwise { (1, groups, [0, s[0], 0, s[2], s[3]]) } else { (groups, outputs, steps) };
        let lanes = outputs.div_ceil(LANES);
        // Two registers wide unless that would leave the second one idle too often.
        let registers = if !depthwise && (lanes.is_multiple_of(2) || lanes > 4) { 2 } else { 1 };
        Panels {
            depthwise,
            groups,
            taps: g.kernel[0] * g.kernel[1],
            inputs,
            outputs,
            registers,
            panels: lanes.div_ceil(registers),
            steps,
            kernel: g.kernel,
            reversed,
        }
    }

    pub fn width(&self) -> usize {
        self.registers * LANES
    }

    /// Elements of one panel.
    pub fn panel_len(&self) -> usize {
        self.taps * self.inputs * self.width()
    }

    /// Panels in all.
    pub fn count(&self) -> usize {
        self.groups * self.panels
    }

    pub fn len(&self) -> usize {
        self.count() * self.panel_len()
    }

    /// Channels of panel `j` of a group that exist.
    pub fn valid(&self, j: usize) -> usize {
        (self.outputs - j * self.width()).min(self.width())
    }

    /// First output channel of a panel.
    pub fn output(&self, panel: usize) -> usize {
        panel / self.panels * self.outputs + panel % self.panels * self.width()
    }

    /// First input channel that a panel reads.
    pub fn input(&self, panel: usize) -> usize {
        if self.depthwise { panel * LANES } else { panel / self.panels * self.inputs }
    }

    /// Where tap (row, column) stands.
    pub fn tap(&self, row: usize, column: usize) -> usize {
        let tap = row * self.kernel[1] + column;
        if self.reversed { self.taps - 1 - tap } else { tap }
    }

    /// First weight of a panel in the weight tensor.
    fn start(&self, panel: usize) -> isize {
        let (group, first) = (panel / self.panels, panel % self.panels * self.width());
        group as isize * self.steps[0] + first as isize * self.steps[1]
    }

    /// Calls `f(row of the panel, element of the weight tensor of its first lane)` for all of a panel's rows.
    fn rows(&self, panel: usize, mut f: impl FnMut(usize, isize)) {
        let [_, _, input, down, across] = self.steps;
        for row in 0..self.kernel[0] {
            for column in 0..self.kernel[1] {
                let tap = self.tap(row, column);
                let at = self.start(panel) + row as isize * down + column as isize * across;
                for i in 0..self.inputs {
                    f(tap * self.inputs + i, at + i as isize * input);
                }
            }
        }
    }

    /// A panel as matrices that the weight tensor holds transposed, lanes apart by `steps[1]` and elements side
    /// by side: calls `f(first row of the panel, from row to row of it, rows, element of the weight tensor)`.
    /// False, with nothing called, if the tensor's strides are others.
    fn matrices(&self, panel: usize, mut f: impl FnMut(usize, isize, usize, isize)) -> bool {
        let [_, _, input, down, across] = self.steps;
        if self.taps == 1 && input == 1 {
            f(0, 1, self.inputs, self.start(panel));
            return true;
        }
        let side_by_side = self.taps > 1 && across == 1 && down == self.kernel[1] as isize;
        for i in 0..if side_by_side { self.inputs } else { 0 } {
            let step = self.inputs as isize * if self.reversed { -1 } else { 1 };
            f(self.tap(0, 0) * self.inputs + i, step, self.taps, self.start(panel) + i as isize * input);
        }
        side_by_side
    }

    /// The weights in panels; lanes without a channel are zero.
    pub fn pack<T: Real>(&self, weight: &Tensor) -> CpuVec<T> {
        let mut packed = CpuVec::<T>::new(self.len());
        let target = SharedMut::new(&mut packed);
        let (source, width) = (Shared(weight.cpu_ptr::<T>()), self.width());
        for_ranges(self.count(), (1 << 14) / self.panel_len().max(1), |range| {
            for panel in range {
                let out = unsafe { target.slice(panel * self.panel_len()..(panel + 1) * self.panel_len()) };
                let valid = self.valid(panel % self.panels);
                if valid < width {
                    out.fill(T::ZERO);
                }
                let moved = self.matrices(panel, |row, step, rows, at| unsafe {
                    let to = out.as_mut_ptr().add(row * width);
                    let from = source.ptr().offset(at);
                    transpose([valid, rows], from, self.steps[1], to, step * width as isize);
                });
                if !moved {
                    self.rows(panel, |row, at| {
                        let from = unsafe { source.ptr().offset(at) };
                        let to = &mut out[row * width..row * width + valid];
                        if self.steps[1] == 1 {
                            to.copy_from_slice(unsafe { std::slice::from_raw_parts(from, valid) });
                            return;
                        }
                        for (l, to) in to.iter_mut().enumerate() {
                            *to = unsafe { *from.offset(l as isize * self.steps[1]) };
                        }
                    });
                }
            }
        });
        packed
    }

    /// Sums of `copies` sets of panels, in order, as a contiguous weight tensor's elements.
    pub fn unpack_sum<T: Real>(&self, packed: &mut [T], copies: usize, out: &mut [T]) {
        let (target, source, width) = (SharedMut::new(out), SharedMut::new(packed), self.width());
        for_ranges(self.count(), (1 << 13) / self.panel_len().max(1), |range| {
            for panel in range {
                let of_copy = |copy: usize| {
                    let at = copy * self.len() + panel * self.panel_len();
                    unsafe { source.slice(at..at + self.panel_len()) }
                };
                let sums = of_copy(0);
                for copy in 1..copies {
                    let other = of_copy(copy);
                    simd_of::<T, _>(
                        #[inline(always)]
                        || sums.iter_mut().zip(&*other).for_each(|(s, &v)| *s += v),
                    );
                }
                let valid = self.valid(panel % self.panels);
                let moved = self.matrices(panel, |row, step, rows, at| unsafe {
                    let from = sums.as_ptr().add(row * width);
                    let to = target.ptr().offset(at);
                    transpose([rows, valid], from, step * width as isize, to, self.steps[1]);
                });
                debug_assert!(moved, "the strides are those of a contiguous tensor");
            }
        });
    }
}

/// One image in memory.
#[derive(Clone, Copy)]
pub struct Image<T> {
    pub ptr: *const T,
    pub size: [usize; 2],
    pub channels: usize,
    /// Steps from channel to channel, row to row, pixel to pixel.
    pub steps: [isize; 3],
}

impl<T: Real> Image<T> {
    /// Image `n` of a batch.
    pub fn of(batch: &Tensor, n: usize) -> Image<T> {
        let (shape, s) = (batch.shape(), batch.strides());
        let ptr = unsafe { batch.cpu_ptr::<T>().offset(n as isize * s[0]) };
        Image { ptr, size: [shape[2], shape[3]], channels: shape[1], steps: [s[1], s[2], s[3]] }
    }
}

/// A piece of each of some images with its channels side by side, zeros around it where it sticks out.
pub struct Pieces<T> {
    /// Pixel (0, 0) of image 0, which need not lie within the pieces.
    origin: Shared<T>,
    /// Steps from image to image, row to row and pixel to pixel.
    pub steps: [isize; 3],
    _memory: Option<CpuVec<T>>,
}

impl<T: Real> Pieces<T> {
    /// Rows and columns from `low` up to, not including, `high`, of some images. A view where nothing sticks out and
    /// the channels lie side by side already, else a copy, made by all threads if this is not within a task.
    pub fn new(
        batch: &Tensor,
        images: Range<usize>,
        low: [isize; 2],
        high: [isize; 2],
        threads: bool,
    ) -> Pieces<T> {
        let first = Image::<T>::of(batch, images.start);
        let inside = (0..2).all(|d| low[d] >= 0 && high[d] <= first.size[d] as isize);
        if inside && (first.steps[0] == 1 || first.channels == 1) {
            let steps = [batch.strides()[0], first.steps[1], first.steps[2]];
            return Pieces { origin: Shared(batch.cpu_ptr()), steps, _memory: None };
        }
        let [rows, columns] = [0, 1].map(|d| (high[d] - low[d]).max(0) as usize);
        let row_len = columns * first.channels;
        let mut memory = CpuVec::<T>::new(images.len() * rows * row_len);
        let target = SharedMut::new(&mut memory);
        let fill = |some: Range<usize>| {
            for i in some {
                let to = unsafe { target.slice(i * rows * row_len..(i + 1) * rows * row_len) };
                Image::<T>::of(batch, images.start + i).cut(low, columns, inside, to);
            }
        };
        if threads {
            for_ranges(images.len(), 1, fill)
        } else {
            fill(0..images.len())
        }
        let steps = [rows * row_len, row_len, first.channels].map(|n| n as isize);
        let at = images.start as isize * steps[0] + low[0] * steps[1] + low[1] * steps[2];
        Pieces { origin: Shared(memory.as_ptr().wrapping_offset(-at)), steps, _memory: Some(memory) }
    }

    /// Pixel (0, 0) of an image.
    pub fn origin(&self, image: usize) -> *const T {
        self.origin.ptr().wrapping_offset(image as isize * self.steps[0])
    }
}

impl<T: Real> Image<T> {
    /// Copies rows of `columns` pixels from `low` on, channels side by side, until `to` is full.
    fn cut(&self, low: [isize; 2], columns: usize, inside: bool, to: &mut [T]) {
        let c = self.channels;
        let row_len = columns * c;
        if inside && columns == self.size[1] && self.steps[1] == columns as isize * self.steps[2] {
            let from = unsafe { self.ptr.offset(low[0] * self.steps[1]) };
            return unsafe { gather_row(from, self.steps, to, c) };
        }
        // Columns of the image that lie within the piece, counted within the piece.
        let first = (-low[1]).clamp(0, columns as isize) as usize;
        let last = (self.size[1] as isize - low[1]).clamp(first as isize, columns as isize) as usize;
        for (r, row) in to.chunks_exact_mut(row_len.max(1)).enumerate() {
            let y = low[0] + r as isize;
            if y < 0 || y >= self.size[0] as isize || first == last {
                row.fill(T::ZERO);
                continue;
            }
            row[..first * c].fill(T::ZERO);
            row[last * c..].fill(T::ZERO);
            let at = y * self.steps[1] + (low[1] + first as isize) * self.steps[2];
            let from = unsafe { self.ptr.offset(at) };
            unsafe { gather_row(from, self.steps, &mut row[first * c..last * c], c) };
        }
    }
}

/// One row of pixels, channels side by side.
unsafe fn gather_row<T: Real>(from: *const T, [channel, _, pixel]: [isize; 3], to: &mut [T], c: usize) {
    let pixels = to.len() / c.max(1);
    if channel == 1 && pixel == c as isize {
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
        return;
    }
    if pixel == 1 {
        return unsafe { transpose([c, pixels], from, channel, to.as_mut_ptr(), c as isize) };
    }
    for (p, to) in to.chunks_exact_mut(c).enumerate() {
        let from = unsafe { from.offset(p as isize * pixel) };
        for (k, to) in to.iter_mut().enumerate() {
            *to = unsafe { *from.offset(k as isize * channel) };
        }
    }
}
