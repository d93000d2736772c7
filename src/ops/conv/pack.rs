//! Memory in the order in which the inner loops want it: packed weights, channels-last pieces of images.

use super::{Geometry, tile::ConvElement};
use crate::{
    Tensor,
    cpu::{
        parallel::{SharedMut, for_ranges},
        pool::CpuVec,
        simd::{LANES, simd_of},
        transpose::transpose,
    },
    dtype::Real,
};

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
        let (source, width) = (crate::cpu::parallel::Shared(weight.cpu_ptr::<T>()), self.width());
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
                        for l in 0..valid {
                            let from = at + l as isize * self.steps[1];
                            out[row * width + l] = unsafe { *source.ptr().offset(from) };
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

/// A piece of an image with its channels side by side, zeros around it where it sticks out.
pub struct Piece<T> {
    /// Pixel (0, 0) of the image, which need not lie within the piece.
    pub origin: *const T,
    /// Steps from row to row and pixel to pixel.
    pub steps: [isize; 2],
    _memory: Option<CpuVec<T>>,
}

impl<T: Real> Piece<T> {
    /// Rows and columns from `low` up to, not including, `high`. A view where nothing sticks out and the
    /// channels lie side by side already, else a copy.
    pub fn new(image: &Image<T>, low: [isize; 2], high: [isize; 2]) -> Piece<T> {
        let inside = (0..2).all(|d| low[d] >= 0 && high[d] <= image.size[d] as isize);
        if inside && (image.steps[0] == 1 || image.channels == 1) {
            return Piece { origin: image.ptr, steps: [image.steps[1], image.steps[2]], _memory: None };
        }
        let c = image.channels;
        let [rows, columns] = [0, 1].map(|d| (high[d] - low[d]).max(0) as usize);
        let mut memory = CpuVec::<T>::new(rows * columns * c);
        let row_len = columns * c;
        let steps = [row_len as isize, c as isize];
        let origin = memory.as_ptr().wrapping_offset(-low[0] * steps[0] - low[1] * steps[1]);
        let whole_rows = columns == image.size[1] && image.steps[1] == columns as isize * image.steps[2];
        if inside && whole_rows {
            let from = unsafe { image.ptr.offset(low[0] * image.steps[1]) };
            unsafe { gather_row(from, image.steps, &mut memory, c) };
            return Piece { origin, steps, _memory: Some(memory) };
        }
        // Columns of the image that lie within the piece, counted within the piece.
        let first = (-low[1]).clamp(0, columns as isize) as usize;
        let last = (image.size[1] as isize - low[1]).clamp(first as isize, columns as isize) as usize;
        for (r, row) in memory.chunks_exact_mut(row_len.max(1)).enumerate() {
            let y = low[0] + r as isize;
            if y < 0 || y >= image.size[0] as isize || first == last {
                row.fill(T::ZERO);
                continue;
            }
            row[..first * c].fill(T::ZERO);
            row[last * c..].fill(T::ZERO);
            let at = y * image.steps[1] + (low[1] + first as isize) * image.steps[2];
            let from = unsafe { image.ptr.offset(at) };
            unsafe { gather_row(from, image.steps, &mut row[first * c..last * c], c) };
        }
        Piece { origin, steps, _memory: Some(memory) }
    }

    /// The pixel at a position relative to the origin.
    pub fn at(&self, y: isize, x: isize) -> *const T {
        self.origin.wrapping_offset(y * self.steps[0] + x * self.steps[1])
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
