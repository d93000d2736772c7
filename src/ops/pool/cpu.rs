//! One code for both memory orders: planes of pixels with `lanes` numbers each. NCHW has N C planes of one
//! lane, NHWC has N planes of C lanes. Rows of a window's element go by one after the other, so that the inner
//! loops run over memory in order.

use super::windows::{Axis, Tap, Windows};
use crate::{
    Tensor,
    cpu::{
        elementwise::{contiguous, dense_strides},
        parallel::{Shared, SharedMut, for_ranges},
        pool::CpuVec,
        simd::{fold, simd},
    },
    dtype::{Element, Real},
    shape::{Dims, Strides},
};

/// Elements of output that are worth a task.
const GRAIN: usize = 8 * 1024;
/// Lanes of a task of a backward.
const LANES_OF_TASK: usize = 64;

/// A batch of images as planes.
struct Planes {
    planes: usize,
    lanes: usize,
    batch: usize,
    channels: usize,
}

impl Planes {
    /// In the order in which `x` lies in memory, NHWC or else NCHW.
    fn of(x: &Tensor) -> Planes {
        let (shape, s) = (x.shape(), x.strides());
        let [n, c, h, w] = [shape[0], shape[1], shape[2], shape[3]];
        let last = dense_strides(shape, &[0, 2, 3, 1]);
        let nhwc = c > 1 && h * w > 1 && (0..4).all(|d| shape[d] == 1 || s[d] == last[d]);
        let [planes, lanes] = if nhwc { [n, c] } else { [n * c, 1] };
        Planes { planes, lanes, batch: n, channels: c }
    }

    /// Strides of a result of this order.
    fn strides(&self, [h, w]: [usize; 2]) -> (Dims, Strides) {
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

/// Calls `f(i, j)` for every lane `i` of the row of windows and the lane `j` of the row of pixels that tap `tap`
/// pairs it with.
#[inline(always)]
fn pairs(tap: &Tap, lanes: usize, mut f: impl FnMut(usize, usize)) {
    match tap.stride {
        Some(stride) if lanes == 1 => {
            let (window, pixel) = tap.pairs[0];
            let n = tap.pairs.len();
            match stride {
                1 => (0..n).for_each(|k| f(window + k, pixel + k)),
                2 => (0..n).for_each(|k| f(window + k, pixel + 2 * k)),
                _ => (0..n).for_each(|k| f(window + k, pixel + stride * k)),
            }
        }
        _ => {
            for &(window, pixel) in &tap.pairs {
                (0..lanes).for_each(|l| f(window * lanes + l, pixel * lanes + l));
            }
        }
    }
}

/// Rows of windows on all threads: `f(plane, row, first element of the row in the result)`.
fn rows(planes: &Planes, y: &Axis, row_len: usize, f: impl Fn(usize, usize, usize) + Sync) {
    let n = y.windows.len();
    for_ranges(planes.planes * n, (GRAIN / row_len.max(1)).max(1), |range| {
        for row in range {
            f(row / n, row % n, row * row_len);
        }
    });
}

/// Takes the elements of one tap into the largest so far. `first`: the row's first pixel in the plane.
#[inline(always)]
fn max_of_tap<T: Real>(tap: &Tap, lanes: usize, first: i32, x: &[T], out: &mut [T], at: &mut [i32]) {
    if lanes == 1 {
        let (x, out, at) = (x.as_ptr(), out.as_mut_ptr(), at.as_mut_ptr());
        // Taps name windows and pixels that exist.
        return pairs(tap, 1, |i, j| unsafe {
            let (v, best) = (*x.add(j), *out.add(i));
            let larger = v > best || v.is_nan();
            *out.add(i) = if larger { v } else { best };
            *at.add(i) = if larger { first + j as i32 } else { *at.add(i) };
        });
    }
    for &(window, pixel) in &tap.pairs {
        let x = &x[pixel * lanes..][..lanes];
        let out = &mut out[window * lanes..][..lanes];
        let at = &mut at[window * lanes..][..lanes];
        let here = first + pixel as i32;
        for l in 0..lanes {
            let larger = x[l] > out[l] || x[l].is_nan();
            out[l] = if larger { x[l] } else { out[l] };
            at[l] = if larger { here } else { at[l] };
        }
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
    let (row_in, row_out) = (width * lanes, across.windows.len() * lanes);
    rows(&planes, down, row_out, |plane, row, first| {
        let out = unsafe { target.slice(first..first + row_out) };
        let at = unsafe { indices.slice(first..first + row_out) };
        let top = down.pixels(row).next().unwrap_or(0);
        for (window, at) in across.windows.iter().zip(at.chunks_exact_mut(lanes)) {
            at.fill((top * width + window.start) as i32);
        }
        out.fill(T::NEG_INF);
        simd(
            #[inline(always)]
            || {
                for y in down.pixels(row) {
                    let from = (plane * height + y) * row_in;
                    let x = unsafe { std::slice::from_raw_parts(source.ptr().add(from), row_in) };
                    for tap in &across.taps {
                        max_of_tap(tap, lanes, (y * width) as i32, x, out, at);
                    }
                }
            },
        );
    });
    let y = Tensor::from_cpu_strided(out, shape.clone(), strides.clone(), op);
    (y, Tensor::from_cpu_strided(at, shape, strides, op))
}

/// Gradients of the image, plane by plane (and by blocks of lanes): `f(gradient of a plane, plane, lanes)`.
fn images<T: Real>(
    op: &'static str,
    planes: &Planes,
    win: &Windows,
    f: impl Fn(&SharedMut<T>, usize, std::ops::Range<usize>) + Sync,
) -> Tensor {
    let (shape, strides) = planes.strides(win.size());
    let mut out = CpuVec::<T>::new(crate::shape::count(&shape));
    let plane_len = win.size()[0] * win.size()[1] * planes.lanes;
    let blocks = planes.lanes.div_ceil(LANES_OF_TASK);
    let target = SharedMut::new(&mut out);
    let grain = GRAIN / (plane_len / blocks.max(1)).max(1);
    for_ranges(planes.planes * blocks, grain.max(1), |range| {
        for task in range {
            let (plane, block) = (task / blocks, task % blocks);
            let lanes = block * LANES_OF_TASK..planes.lanes.min((block + 1) * LANES_OF_TASK);
            for pixel in 0..win.size()[0] * win.size()[1] {
                let at = plane * plane_len + pixel * planes.lanes;
                unsafe { target.slice(at + lanes.start..at + lanes.end) }.fill(T::ZERO);
            }
            f(&target, plane, lanes);
        }
    });
    Tensor::from_cpu_strided(out, shape, strides, op)
}

/// Each gradient to the element that was the largest.
pub fn max_backward<T: Real>(op: &'static str, g: &Tensor, at: &Tensor, win: &Windows) -> Tensor {
    let planes = Planes::of(at);
    let (g, at) = (planes.arrange::<T>(g), planes.arrange::<i32>(at));
    let (source, indices) = (Shared(g.cpu_ptr::<T>()), Shared(at.cpu_ptr::<i32>()));
    let ([height, width], [ny, nx], all) = (win.size(), win.count(), planes.lanes);
    let [down, across] = &win.axes;
    images::<T>(op, &planes, win, |target, plane, lanes| {
        let to = plane * height * width * all;
        let from = plane * ny * nx * all;
        if all == 1 {
            let (g, at) = unsafe {
                (
                    std::slice::from_raw_parts(source.ptr().add(from), ny * nx),
                    std::slice::from_raw_parts(indices.ptr().add(from), ny * nx),
                )
            };
            let dx = unsafe { target.slice(to..to + height * width) };
            g.iter().zip(at).for_each(|(&g, &at)| dx[at as usize] += g);
            return;
        }
        for row in 0..ny {
            for y in down.pixels(row) {
                for &(window, x) in across.taps.iter().flat_map(|tap| &tap.pairs) {
                    let pixel = y * width + x;
                    let from = from + (row * nx + window) * all + lanes.start;
                    let to = to + pixel * all;
                    unsafe {
                        let dx = target.slice(to + lanes.start..to + lanes.end);
                        let g = std::slice::from_raw_parts(source.ptr().add(from), dx.len());
                        let at = std::slice::from_raw_parts(indices.ptr().add(from), dx.len());
                        simd(
                            #[inline(always)]
                            || {
                                for l in 0..dx.len() {
                                    dx[l] += if at[l] == pixel as i32 { g[l] } else { T::ZERO };
                                }
                            },
                        );
                    }
                }
            }
        }
    })
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
    let (row_in, row_out) = (width * lanes, across.windows.len() * lanes);
    rows(&planes, down, row_out, |plane, row, first| {
        let out = unsafe { target.slice(first..first + row_out) };
        out.fill(T::ZERO);
        simd(
            #[inline(always)]
            || {
                for y in down.pixels(row) {
                    let from = (plane * height + y) * row_in;
                    let x = unsafe { std::slice::from_raw_parts(source.ptr().add(from), row_in) };
                    // Few wide windows: along each of them. Many narrow ones: element by element across them.
                    if lanes == 1 && across.taps.len() > across.windows.len() {
                        for (window, out) in across.windows.iter().zip(&mut *out) {
                            *out +=
                                fold(&x[window.start..][..window.count], T::ZERO, |a, b| a + b, |a, b| a + b);
                        }
                        continue;
                    }
                    let (x, out) = (x.as_ptr(), out.as_mut_ptr());
                    for tap in &across.taps {
                        // Taps name windows and pixels that exist.
                        pairs(tap, lanes, |i, j| unsafe { *out.add(i) += *x.add(j) });
                    }
                }
            },
        );
        for (column, out) in out.chunks_exact_mut(lanes).enumerate() {
            let weight = T::of(win.weight(row, column).max(1) as f64);
            out.iter_mut().for_each(|v| *v = *v / weight);
        }
    });
    Tensor::from_cpu_strided(out, shape, strides, op)
}

/// Each gradient to all elements of its window, divided.
pub fn average_backward<T: Real>(op: &'static str, g: &Tensor, win: &Windows) -> Tensor {
    let planes = Planes::of(g);
    let g = planes.arrange::<T>(g);
    let source = Shared(g.cpu_ptr::<T>());
    let ([height, width], [ny, nx], all) = (win.size(), win.count(), planes.lanes);
    let [down, across] = &win.axes;
    images::<T>(op, &planes, win, |target, plane, lanes| {
        let mut row_of_g = CpuVec::<T>::new(nx * lanes.len());
        for row in 0..ny {
            let from = (plane * ny + row) * nx * all;
            for (column, to) in row_of_g.chunks_exact_mut(lanes.len()).enumerate() {
                let scale = T::of(1.0 / win.weight(row, column).max(1) as f64);
                for (l, to) in to.iter_mut().enumerate() {
                    *to = unsafe { *source.ptr().add(from + column * all + lanes.start + l) } * scale;
                }
            }
            for y in down.pixels(row) {
                let to = (plane * height + y) * width * all;
                simd(
                    #[inline(always)]
                    || {
                        for tap in &across.taps {
                            if all == 1 {
                                let dx = unsafe { target.slice(to..to + width) }.as_mut_ptr();
                                let g = row_of_g.as_ptr();
                                // Taps name windows and pixels that exist.
                                pairs(tap, 1, |i, j| unsafe { *dx.add(j) += *g.add(i) });
                                continue;
                            }
                            for &(window, x) in &tap.pairs {
                                let at = to + x * all;
                                let dx = unsafe { target.slice(at + lanes.start..at + lanes.end) };
                                let g = &row_of_g[window * dx.len()..][..dx.len()];
                                (0..dx.len()).for_each(|l| dx[l] += g[l]);
                            }
                        }
                    },
                );
            }
        }
    })
}
