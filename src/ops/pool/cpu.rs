//! Images are planes of pixels with `lanes` numbers each: NCHW has N C planes of one lane, NHWC has N planes of
//! C lanes. With lanes, each window is worked off 16 lanes at a time; without, a row of windows at a time, their
//! first elements, their second elements, and so on, so that the inner loops run over memory in order.

use super::windows::{Tap, Windows};
use crate::{
    Tensor,
    cpu::{
        elementwise::{contiguous, dense_strides},
        parallel::{Shared, SharedMut, for_ranges},
        pool::CpuVec,
        simd::{each, fold, simd},
    },
    dtype::{Element, Real},
    shape::{Dims, Strides},
};

/// Elements of output that are worth a task.
const GRAIN: usize = 8 * 1024;
/// Lanes of a task of a backward.
const LANES_OF_TASK: usize = 64;

/// A batch of images as planes.
pub struct Planes {
    planes: usize,
    lanes: usize,
    batch: usize,
    channels: usize,
}

impl Planes {
    /// In the order in which `x` lies in memory, NHWC or else NCHW.
    pub fn of(x: &Tensor) -> Planes {
        let (shape, s) = (x.shape(), x.strides());
        let [n, c, h, w] = [shape[0], shape[1], shape[2], shape[3]];
        let last = dense_strides(shape, &[0, 2, 3, 1]);
        let nhwc = c > 1 && h * w > 1 && (0..4).all(|d| shape[d] == 1 || s[d] == last[d]);
        let [planes, lanes] = if nhwc { [n, c] } else { [n * c, 1] };
        Planes { planes, lanes, batch: n, channels: c }
    }

    /// Strides of a result of this order.
    pub fn strides(&self, [h, w]: [usize; 2]) -> (Dims, Strides) {
        let shape = Dims::from_slice(&[self.batch, self.channels, h, w]);
        let order: &[usize] = if self.lanes > 1 { &[0, 2, 3, 1] } else { &[0, 1, 2, 3] };
        let strides = dense_strides(&shape, order);
        (shape, strides)
    }

    /// `x` in this order: itself or a copy.
    fn arrange<T: Element>(&self, x: &Tensor) -> Tensor {
        let (_, strides) = self.strides([x.shape()[2], x.shape()[3]]);
        if (0..4).all(|d| x.shape()[d] == 1 || x.strides()[d] == strides[d]) {
            return x.clone();
        }
        if self.lanes == 1 {
            return contiguous::<T>(x, "contiguous");
        }
        let (shape, s) = (x.shape(), x.strides());
        let view = x.view_as(
            [0, 2, 3, 1].iter().map(|&d| shape[d]).collect(),
            [0, 2, 3, 1].iter().map(|&d| s[d]).collect(),
            x.offset(),
            "contiguous",
        );
        let copy = contiguous::<T>(&view, "contiguous");
        copy.view_as(Dims::from_slice(shape), strides, copy.offset(), "contiguous")
    }
}

/// Calls `f(window, pixel)` for the pairs of a tap.
#[inline(always)]
fn pairs(tap: &Tap, mut f: impl FnMut(usize, usize)) {
    match tap.stride {
        Some(stride) => {
            let (window, pixel) = tap.pairs[0];
            let n = tap.pairs.len();
            match stride {
                1 => (0..n).for_each(|k| f(window + k, pixel + k)),
                2 => (0..n).for_each(|k| f(window + k, pixel + 2 * k)),
                _ => (0..n).for_each(|k| f(window + k, pixel + stride * k)),
            }
        }
        None => tap.pairs.iter().for_each(|&(window, pixel)| f(window, pixel)),
    }
}

/// The `n` rows of each result on all threads: `f(plane, row, first element of the row in the result)`.
#[inline(always)]
fn rows(planes: &Planes, n: usize, row_len: usize, f: impl Fn(usize, usize, usize) + Sync) {
    for_ranges(planes.planes * n, (GRAIN / row_len.max(1)).max(1), |range| {
        simd(
            #[inline(always)]
            || {
                for row in range {
                    f(row / n, row % n, row * row_len);
                }
            },
        );
    });
}

/// Takes the elements of one tap into the largest so far. `first`: the row's first pixel in the plane.
#[inline(always)]
fn max_of_tap<T: Real>(tap: &Tap, first: i32, x: &[T], out: &mut [T], at: &mut [i32]) {
    let (x, out, at) = (x.as_ptr(), out.as_mut_ptr(), at.as_mut_ptr());
    // Taps name windows and pixels that exist.
    pairs(tap, |i, j| unsafe {
        let (v, best) = (*x.add(j), *out.add(i));
        let larger = v > best || v.is_nan();
        *out.add(i) = if larger { v } else { best };
        *at.add(i) = if larger { first + j as i32 } else { *at.add(i) };
    });
}

/// `L` lanes of one window: the largest and where they are.
#[inline(always)]
unsafe fn max_of_window<T: Real, const L: usize>(
    win: &Windows,
    [row, column]: [usize; 2],
    x: *const T,
    lanes: usize,
    out: *mut T,
    at: *mut i32,
) {
    let (mut best, mut here) = ([T::NEG_INF; L], [i32::MAX; L]);
    win.pixels(row, column, |pixel| {
        let v = unsafe { x.add(pixel * lanes).cast::<[T; L]>().read_unaligned() };
        for l in 0..L {
            // the first pixel counts even if it is -infinity
            let larger = v[l] > best[l] || v[l].is_nan() || here[l] == i32::MAX;
            best[l] = if larger { v[l] } else { best[l] };
            here[l] = if larger { pixel as i32 } else { here[l] };
        }
    });
    unsafe {
        out.cast::<[T; L]>().write_unaligned(best);
        at.cast::<[i32; L]>().write_unaligned(here);
    }
}

/// The largest elements and where they stand in the plane.
pub fn max<T: Real>(op: &'static str, x: &Tensor, win: &Windows) -> (Tensor, Tensor) {
    let planes = Planes::of(x);
    let x = planes.arrange::<T>(x);
    let (shape, strides) = planes.strides(win.count());
    let n = crate::shape::count(&shape);
    let (mut out, mut at) = (CpuVec::<T>::new(n), CpuVec::<i32>::new(n));
    let (target, indices) = (SharedMut::new(&mut out), SharedMut::new(&mut at));
    let (source, lanes, [height, width]) = (Shared(x.cpu_ptr::<T>()), planes.lanes, win.size());
    let [down, across] = &win.axes;
    let row_out = across.windows.len() * lanes;
    rows(
        &planes,
        down.windows.len(),
        row_out,
        #[inline(always)]
        |plane, row, first| {
            let x = unsafe { source.ptr().add(plane * height * width * lanes) };
            let out = unsafe { target.slice(first..first + row_out) };
            let at = unsafe { indices.slice(first..first + row_out) };
            if lanes > 1 {
                for column in 0..across.windows.len() {
                    let (out, at) = (out[column * lanes..].as_mut_ptr(), at[column * lanes..].as_mut_ptr());
                    each!(0..lanes, |l, L| unsafe {
                        max_of_window::<T, L>(win, [row, column], x.add(l), lanes, out.add(l), at.add(l))
                    });
                }
                return;
            }
            let top = down.windows[row].start;
            for (window, at) in across.windows.iter().zip(&mut *at) {
                *at = (top * width + window.start) as i32;
            }
            out.fill(T::NEG_INF);
            for y in down.pixels(row) {
                let x = unsafe { std::slice::from_raw_parts(x.add(y * width), width) };
                for tap in &across.taps {
                    max_of_tap(tap, (y * width) as i32, x, out, at);
                }
            }
        },
    );
    let y = Tensor::from_cpu_strided(out, shape.clone(), strides.clone(), op);
    (y, Tensor::from_cpu_strided(at, shape, strides, op))
}

/// Gradients of the image, plane by plane (and by blocks of lanes): `f(gradient of the plane, plane, lanes)`.
#[inline(always)]
fn images<T: Real>(
    op: &'static str,
    planes: &Planes,
    win: &Windows,
    f: impl Fn(*mut T, usize, std::ops::Range<usize>) + Sync,
) -> Tensor {
    let (shape, strides) = planes.strides(win.size());
    let mut out = CpuVec::<T>::new(crate::shape::count(&shape));
    let pixels = win.size()[0] * win.size()[1];
    let plane_len = pixels * planes.lanes;
    let blocks = planes.lanes.div_ceil(LANES_OF_TASK);
    let target = SharedMut::new(&mut out);
    let grain = GRAIN / (plane_len / blocks.max(1)).max(1);
    for_ranges(planes.planes * blocks, grain.max(1), |range| {
        simd(
            #[inline(always)]
            || {
                for task in range {
                    let (plane, block) = (task / blocks, task % blocks);
                    let lanes = block * LANES_OF_TASK..planes.lanes.min((block + 1) * LANES_OF_TASK);
                    let at = plane * plane_len;
                    if blocks == 1 {
                        unsafe { target.slice(at..at + plane_len) }.fill(T::ZERO);
                    } else {
                        for at in (0..pixels).map(|pixel| at + pixel * planes.lanes) {
                            unsafe { target.slice(at + lanes.start..at + lanes.end) }.fill(T::ZERO);
                        }
                    }
                    f(unsafe { target.ptr().add(at) }, plane, lanes);
                }
            },
        );
    });
    Tensor::from_cpu_strided(out, shape, strides, op)
}

/// Each gradient to the element that was the largest.
pub fn max_backward<T: Real>(op: &'static str, g: &Tensor, at: &Tensor, win: &Windows) -> Tensor {
    let planes = Planes::of(at);
    let (g, at) = (planes.arrange::<T>(g), planes.arrange::<i32>(at));
    if planes.lanes > 1 {
        return max_backward_of_lanes::<T>(op, &planes, &g, &at, win);
    }
    let (source, indices) = (Shared(g.cpu_ptr::<T>()), Shared(at.cpu_ptr::<i32>()));
    let n = win.count()[0] * win.count()[1];
    images::<T>(
        op,
        &planes,
        win,
        #[inline(always)]
        |dx, plane, _| {
            for i in plane * n..(plane + 1) * n {
                // Indices are those of pixels, so they lie within the plane.
                unsafe { *dx.add(*indices.ptr().add(i) as usize) += *source.ptr().add(i) };
            }
        },
    )
}

/// The same by pixels: each takes the gradients of those of its windows of which it was the largest, so that every
/// element is written once.
fn max_backward_of_lanes<T: Real>(
    op: &'static str,
    planes: &Planes,
    g: &Tensor,
    at: &Tensor,
    win: &Windows,
) -> Tensor {
    let (shape, strides) = planes.strides(win.size());
    let mut out = CpuVec::<T>::new(crate::shape::count(&shape));
    let target = SharedMut::new(&mut out);
    let (source, indices, lanes) = (Shared(g.cpu_ptr::<T>()), Shared(at.cpu_ptr::<i32>()), planes.lanes);
    let ([_, width], [ny, nx]) = (win.size(), win.count());
    let [down, across] = [0, 1].map(|d| win.axes[d].holders());
    rows(
        planes,
        win.size()[0],
        width * lanes,
        #[inline(always)]
        |plane, y, first| {
            let dx = unsafe { target.slice(first..first + width * lanes) };
            for (x, dx) in dx.chunks_exact_mut(lanes).enumerate() {
                let pixel = (y * width + x) as i32;
                each!(0..lanes, |l, L| {
                    let mut sums = [T::ZERO; L];
                    for window in down[y].iter().flat_map(|i| across[x].iter().map(move |j| i * nx + j)) {
                        let from = (plane * ny * nx + window) * lanes + l;
                        let g = unsafe { source.ptr().add(from).cast::<[T; L]>().read_unaligned() };
                        let at = unsafe { indices.ptr().add(from).cast::<[i32; L]>().read_unaligned() };
                        for k in 0..L {
                            sums[k] += if at[k] == pixel { g[k] } else { T::ZERO };
                        }
                    }
                    dx[l..l + L].copy_from_slice(&sums);
                });
            }
        },
    );
    Tensor::from_cpu_strided(out, shape, strides, op)
}

/// Means of windows.
pub fn average<T: Real>(op: &'static str, x: &Tensor, win: &Windows) -> Tensor {
    let planes = Planes::of(x);
    let x = planes.arrange::<T>(x);
    let (shape, strides) = planes.strides(win.count());
    let mut out = CpuVec::<T>::new(crate::shape::count(&shape));
    let target = SharedMut::new(&mut out);
    let (source, lanes, [height, width]) = (Shared(x.cpu_ptr::<T>()), planes.lanes, win.size());
    let [down, across] = &win.axes;
    let row_out = across.windows.len() * lanes;
    let add = |a: T, b: T| a + b;
    rows(
        &planes,
        down.windows.len(),
        row_out,
        #[inline(always)]
        |plane, row, first| {
            let x = unsafe { source.ptr().add(plane * height * width * lanes) };
            let out = unsafe { target.slice(first..first + row_out) };
            let weight = |column| T::of(win.weight(row, column).max(1) as f64);
            if lanes > 1 {
                for column in 0..across.windows.len() {
                    let (out, weight) = (out[column * lanes..].as_mut_ptr(), weight(column));
                    each!(0..lanes, |l, L| unsafe {
                        let mut sums = [T::ZERO; L];
                        win.pixels(row, column, |pixel| {
                            let v = x.add(pixel * lanes + l).cast::<[T; L]>().read_unaligned();
                            (0..L).for_each(|k| sums[k] += v[k]);
                        });
                        (0..L).for_each(|k| *out.add(l + k) = sums[k] / weight);
                    });
                }
                return;
            }
            if win.global() {
                let x = unsafe { std::slice::from_raw_parts(x, height * width) };
                out[0] = fold(x, T::ZERO, add, add) / weight(0);
                return;
            }
            out.fill(T::ZERO);
            for y in down.pixels(row) {
                let x = unsafe { std::slice::from_raw_parts(x.add(y * width), width) };
                // Few wide windows: along each of them. Many narrow ones: element by element across them.
                if across.taps.len() > across.windows.len() {
                    for (window, out) in across.windows.iter().zip(&mut *out) {
                        *out += fold(&x[window.start..][..window.count], T::ZERO, add, add);
                    }
                    continue;
                }
                let (x, out) = (x.as_ptr(), out.as_mut_ptr());
                for tap in &across.taps {
                    // Taps name windows and pixels that exist.
                    pairs(tap, |i, j| unsafe { *out.add(i) += *x.add(j) });
                }
            }
            out.iter_mut().enumerate().for_each(|(column, v)| *v = *v / weight(column));
        },
    );
    Tensor::from_cpu_strided(out, shape, strides, op)
}

/// Each gradient to all elements of its window, divided.
pub fn average_backward<T: Real>(op: &'static str, g: &Tensor, win: &Windows) -> Tensor {
    let planes = Planes::of(g);
    let g = planes.arrange::<T>(g);
    let source = Shared(g.cpu_ptr::<T>());
    let ([_, width], [ny, nx], all) = (win.size(), win.count(), planes.lanes);
    let [down, across] = &win.axes;
    images::<T>(
        op,
        &planes,
        win,
        #[inline(always)]
        |dx, plane, lanes| {
            let mut scaled = vec![T::ZERO; if all == 1 { nx } else { 0 }];
            for row in 0..ny {
                let g = unsafe { source.ptr().add((plane * ny + row) * nx * all) };
                let scale = |column| T::of(1.0 / win.weight(row, column).max(1) as f64);
                if all == 1 {
                    for (column, to) in scaled.iter_mut().enumerate() {
                        *to = unsafe { *g.add(column) } * scale(column);
                    }
                    for (y, tap) in down.pixels(row).flat_map(|y| across.taps.iter().map(move |tap| (y, tap)))
                    {
                        let (dx, g) = (unsafe { dx.add(y * width) }, scaled.as_ptr());
                        // Taps name windows and pixels that exist.
                        pairs(tap, |i, j| unsafe { *dx.add(j) += *g.add(i) });
                    }
                    continue;
                }
                for column in 0..nx {
                    let scale = scale(column);
                    each!(lanes.clone(), |l, L| unsafe {
                        let g = g.add(column * all + l).cast::<[T; L]>().read_unaligned();
                        win.pixels(row, column, |pixel| {
                            let dx = dx.add(pixel * all + l);
                            (0..L).for_each(|k| *dx.add(k) += g[k] * scale);
                        });
                    });
                }
            }
        },
    )
}
