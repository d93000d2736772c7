//! Boxes are shared out forward, bands of rows or channels backward.

use super::{OP, Plan, RoiAlignOptions};
use crate::{
    Error, Result, Tensor,
    cpu::{
        parallel::{Shared, SharedMut, for_ranges, for_rows},
        pool::CpuVec,
        simd::simd_of,
    },
    dtype::{Float, Real},
};
use rayon::prelude::*;
use std::ops::Range;

/// The pixels of each bin along one axis.
struct Line<R> {
    /// For each bin its first pixel, and where its weights are.
    bins: Vec<(usize, Range<usize>)>,
    weights: Vec<R>,
}

impl<R: Real> Line<R> {
    /// Pixels of bin `b` with their weights.
    #[inline(always)]
    fn bin(&self, b: usize) -> impl Iterator<Item = (usize, R)> {
        let (first, at) = &self.bins[b];
        self.weights[at.clone()].iter().enumerate().map(move |(i, &w)| (first + i, w))
    }

    fn new(low: f64, high: f64, bins: usize, size: usize, options: &RoiAlignOptions) -> Self {
        let shift = if options.aligned { 0.5 } else { 0.0 };
        let start = low * options.spatial_scale - shift;
        let extent = high * options.spatial_scale - shift - start;
        let extent = if !options.aligned && extent < 1.0 { 1.0 } else { extent };
        let length = extent / bins as f64;
        let adaptive = options.sampling_ratio <= 0;
        let samples = if adaptive { length.ceil() } else { options.sampling_ratio as f64 };
        let mut line = Line { bins: Vec::with_capacity(bins), weights: Vec::new() };
        for b in 0..bins {
            let origin = start + b as f64 * length;
            // samples of this bin that can lie on the image, a few too many: boxes may be huge
            let reach = |place: f64| (place - origin) * samples / length - 0.5;
            let (first, last) = if samples > 4.0 && length > 0.0 {
                ((reach(-1.0) - 2.0).max(0.0), (reach(size as f64) + 3.0).min(samples))
            } else {
                (0.0, samples)
            };
            let sane = origin.is_finite() && length.is_finite();
            let taken = if sane { first as usize..last as usize } else { 0..0 };
            line.push(
                taken.filter_map(|i| pixels(origin + (i as f64 + 0.5) * length / samples, size)),
                samples,
            );
        }
        line
    }

    /// Another bin, from what its samples read.
    fn push(&mut self, taps: impl Iterator<Item = (usize, f64)> + Clone, samples: f64) {
        let at = self.weights.len();
        let first = taps.clone().map(|(pixel, _)| pixel).min().unwrap_or(0);
        for (pixel, share) in taps {
            let to = at + pixel - first;
            let needed = if share > 0.0 { to + 2 } else { to + 1 };
            if self.weights.len() < needed {
                self.weights.resize(needed, R::ZERO);
            }
            self.weights[to] += R::of((1.0 - share) / samples);
            if share > 0.0 {
                self.weights[to + 1] += R::of(share / samples);
            }
        }
        self.bins.push((first, at..self.weights.len()));
    }
}

/// The pixel below a place, and the share of the one above. `None` where 0 is read.
#[inline(always)]
fn pixels(place: f64, size: usize) -> Option<(usize, f64)> {
    if !(place >= -1.0 && place <= size as f64) {
        return None;
    }
    let place = place.max(0.0);
    let low = place as usize;
    Some(if low + 1 >= size { (size - 1, 0.0) } else { (low, place - low as f64) })
}

/// A box on the feature map.
struct Box<R> {
    image: usize,
    rows: Line<R>,
    columns: Line<R>,
}

fn boxes<R: Real>(rois: &Tensor, [n, h, w]: [usize; 3], options: &RoiAlignOptions) -> Result<Vec<Box<R>>> {
    let [oh, ow] = options.output_size;
    let one = |(i, v): (usize, &[R])| {
        let v: [f64; 5] = std::array::from_fn(|k| v[k].to_f64());
        // also refuses NaN
        if !(v[0] > -1.0 && v[0] < n as f64) {
            return Err(Error::op(OP, format!("box {i} belongs to image {}, there are {n}", v[0])));
        }
        let rows = Line::new(v[2], v[4], oh, h, options);
        Ok(Box { image: v[0] as usize, rows, columns: Line::new(v[1], v[3], ow, w, options) })
    };
    rois.cpu_slice::<R>().par_chunks(5).enumerate().with_min_len(16).map(one).collect()
}

/// Tensors `[N, C, H, W]` as the loops see them.
#[derive(Clone, Copy)]
struct Image<P> {
    data: P,
    step: [isize; 4],
}

impl<T> Image<*const T> {
    #[inline(always)]
    unsafe fn row(&self, at: [usize; 3], channels: usize) -> &[T] {
        let offset =
            at[0] as isize * self.step[0] + at[1] as isize * self.step[2] + at[2] as isize * self.step[3];
        unsafe { std::slice::from_raw_parts(self.data.offset(offset), channels) }
    }
}

#[inline(always)]
fn add_scaled<T: Float>(sum: &mut [T::Acc], x: &[T], weight: T::Acc) {
    let n = sum.len();
    let x = &x[..n];
    for i in 0..n {
        sum[i] = x[i].acc().mul_add(weight, sum[i]);
    }
}

/// All bins of a box, channels adjacent: `out` is `[h, w, C]`.
#[inline(always)]
fn box_last<T: Float>(x: Image<*const T>, b: &Box<T::Acc>, sum: &mut [T::Acc], out: &mut [T]) {
    let (c, ow) = (sum.len(), b.columns.bins.len());
    for (at, out) in out.chunks_exact_mut(c).enumerate() {
        sum.fill(T::Acc::ZERO);
        for (row, below) in b.rows.bin(at / ow) {
            for (column, beside) in b.columns.bin(at % ow) {
                add_scaled::<T>(sum, unsafe { x.row([b.image, row, column], c) }, below * beside);
            }
        }
        for i in 0..c {
            out[i] = T::store(sum[i]);
        }
    }
}

/// The same channel by channel: `out` is `[C, h, w]`.
fn box_first<T: Float>(x: Image<*const T>, b: &Box<T::Acc>, out: &mut [T]) {
    let (oh, ow) = (b.rows.bins.len(), b.columns.bins.len());
    for (channel, out) in out.chunks_exact_mut(oh * ow).enumerate() {
        let start = b.image as isize * x.step[0] + channel as isize * x.step[1];
        for (at, out) in out.iter_mut().enumerate() {
            let mut sum = T::Acc::ZERO;
            for (row, below) in b.rows.bin(at / ow) {
                let mut line = T::Acc::ZERO;
                for (column, beside) in b.columns.bin(at % ow) {
                    let offset = start + row as isize * x.step[2] + column as isize * x.step[3];
                    line += unsafe { *x.data.offset(offset) }.acc() * beside;
                }
                sum += line * below;
            }
            *out = T::store(sum);
        }
    }
}

pub fn forward<T: Float>(x: &Tensor, rois: &Tensor, plan: &Plan) -> Result<Tensor> {
    let [n, c, h, w] = x.dims(OP)?;
    let ([oh, ow], r) = (plan.options.output_size, rois.shape()[0]);
    let boxes = boxes::<T::Acc>(rois, [n, h, w], &plan.options)?;
    let step = [0, 1, 2, 3].map(|d| x.strides()[d]);
    let (data, each) = (Shared(x.cpu_ptr::<T>()), c * oh * ow);
    let shape = if plan.last { [r, oh, ow, c] } else { [r, c, oh, ow] };
    let mut out = CpuVec::<T>::new(crate::shape::checked_count(OP, &shape, size_of::<T>())?);
    let target = SharedMut::new(&mut out);
    for_rows(r, 16 * each, |range| {
        let mut sum = vec![T::Acc::ZERO; c];
        for i in range {
            let x = Image { data: data.ptr(), step };
            let (b, sum) = (&boxes[i], &mut sum[..]);
            let out = unsafe { target.slice(i * each..(i + 1) * each) };
            if plan.last {
                simd_of::<T, _>(
                    #[inline(always)]
                    || box_last(x, b, sum, out),
                );
            } else if c > 0 {
                box_first(x, b, out);
            }
        }
    });
    let y = Tensor::from_cpu(out, shape, OP);
    if plan.last { y.permute([0, 3, 1, 2]) } else { Ok(y) }
}

/// Rows of a task, channels adjacent.
const BAND: usize = 4;

/// Adds what a box sends to rows `band` of its image. `dx` is `[band, W, C]`, `g` `[h, w, C]`.
#[inline(always)]
fn send_last<R: Real>(g: &[R], b: &Box<R>, band: Range<usize>, dx: &mut [R], [w, c]: [usize; 2]) {
    let ow = b.columns.bins.len();
    for bin in 0..b.rows.bins.len() {
        for (row, below) in b.rows.bin(bin) {
            if !band.contains(&row) {
                continue;
            }
            for other in 0..ow {
                let g = &g[(bin * ow + other) * c..][..c];
                for (column, beside) in b.columns.bin(other) {
                    let to = ((row - band.start) * w + column) * c;
                    add_scaled::<R>(&mut dx[to..to + c], g, below * beside);
                }
            }
        }
    }
}

/// Adds what a box sends to one channel. `dx` is `[H, W]`, `g` `[h, w]`.
fn send_first<R: Real>(g: &[R], b: &Box<R>, dx: &mut [R], w: usize) {
    let ow = b.columns.bins.len();
    for bin in 0..b.rows.bins.len() {
        for (row, below) in b.rows.bin(bin) {
            for other in 0..ow {
                let g = g[bin * ow + other] * below;
                for (column, beside) in b.columns.bin(other) {
                    dx[row * w + column] += g * beside;
                }
            }
        }
    }
}

/// A band of rows, or a channel, has one owner, who takes the boxes in their order: the same sums on any machine.
pub fn backward<R: Real>(grad: &Tensor, rois: &Tensor, shape: &[usize], plan: &Plan) -> Result<Tensor> {
    let [n, c, h, w] = [0, 1, 2, 3].map(|d| shape[d]);
    let [oh, ow] = plan.options.output_size;
    let boxes = boxes::<R>(rois, [n, h, w], &plan.options)?;
    let mut of_image = vec![Vec::new(); n];
    boxes.iter().enumerate().for_each(|(i, b)| of_image[b.image].push(i));
    let each = c * oh * ow;
    let mut out = CpuVec::<R>::zeros(n * c * h * w);
    let target = SharedMut::new(&mut out);
    if plan.last {
        let grad = grad.permute([0, 2, 3, 1])?.contiguous()?;
        let (g, bands) = (grad.cpu_slice::<R>(), h.div_ceil(BAND));
        for_ranges(n * bands, 1, |range| {
            for task in range {
                let (image, first) = (task / bands, task % bands * BAND);
                let band = first..h.min(first + BAND);
                let at = (image * h + band.start) * w * c..(image * h + band.end) * w * c;
                let dx = unsafe { target.slice(at) };
                for &i in &of_image[image] {
                    let (g, b, dx, band) = (&g[i * each..(i + 1) * each], &boxes[i], &mut *dx, band.clone());
                    simd_of::<R, _>(
                        #[inline(always)]
                        || send_last(g, b, band, dx, [w, c]),
                    );
                }
            }
        });
        return Tensor::from_cpu(out, [n, h, w, c], OP).permute([0, 3, 1, 2]);
    }
    let grad = grad.contiguous()?;
    let (g, bins) = (grad.cpu_slice::<R>(), oh * ow);
    for_ranges(n * c, 1, |range| {
        for plane in range {
            let dx = unsafe { target.slice(plane * h * w..(plane + 1) * h * w) };
            for &i in &of_image[plane / c] {
                send_first(&g[i * each + plane % c * bins..][..bins], &boxes[i], dx, w);
            }
        }
    });
    Ok(Tensor::from_cpu(out, [n, c, h, w], OP))
}
