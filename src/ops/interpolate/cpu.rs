//! A table applied along one axis of a dense array.

use super::table::Table;
use crate::{
    Result, Tensor,
    cpu::{
        parallel::{SharedMut, for_rows},
        pool::CpuVec,
        simd::simd_of,
    },
    dtype::Real,
    shape::{Dims, contiguous_strides},
};

/// Both axes of `x` `[N, C, H, W]`, whichever of its two memory orders it has.
pub fn resample<T: Real>(x: &Tensor, rows: &Table, columns: &Table) -> Result<Tensor> {
    let [n, c, h, w] = x.dims("interpolate")?;
    let (h2, w2) = (rows.output(), columns.output());
    let shape = Dims::from_slice(&[n, c, h2, w2]);
    let last = x.permute([0, 2, 3, 1])?;
    // [outer, H, W, inner] in memory
    let channels_last = !x.is_contiguous() && last.is_contiguous();
    let (outer, inner, dense) = if channels_last { (n, c, last) } else { (n * c, 1, x.contiguous()?) };
    let x = dense.cpu_slice::<T>();
    // the axis that grows goes last: fewer elements in between
    let y = if h2 >= h {
        let wide = along(x, outer * h, inner, columns);
        along(wide.as_deref().unwrap_or(x), outer, w2 * inner, rows).or(wide)
    } else {
        let short = along(x, outer, w * inner, rows);
        along(short.as_deref().unwrap_or(x), outer * h2, inner, columns).or(short)
    };
    let y = y.unwrap_or_else(|| CpuVec::from_slice(x));
    let strides = if channels_last {
        let s = contiguous_strides(&[n, h2, w2, c]);
        [s[0], s[3], s[1], s[2]].into_iter().collect()
    } else {
        contiguous_strides(&shape)
    };
    Ok(Tensor::from_cpu_strided(y, shape, strides, "interpolate"))
}

/// y `[outer, output, inner]` from x `[outer, input, inner]`; None if nothing changes.
fn along<T: Real>(x: &[T], outer: usize, inner: usize, table: &Table) -> Option<CpuVec<T>> {
    if table.is_identity() {
        return None;
    }
    let (input, output) = (table.input, table.output());
    let weights: Vec<T> = table.weights.iter().map(|&w| T::of(w)).collect();
    let mut y = CpuVec::new(outer * output * inner);
    let target = SharedMut::new(&mut y);
    if inner == 1 {
        for_rows(outer, output, |range| {
            let y = unsafe { target.slice(range.start * output..range.end * output) };
            simd_of::<T, _>(
                #[inline(always)]
                || {
                    for (o, y) in range.zip(y.chunks_exact_mut(output)) {
                        row(&x[o * input..][..input], y, table, &weights);
                    }
                },
            );
        });
    } else {
        for_rows(outer * output, inner, |range| {
            let y = unsafe { target.slice(range.start * inner..range.end * inner) };
            simd_of::<T, _>(
                #[inline(always)]
                || {
                    for (at, y) in range.zip(y.chunks_exact_mut(inner.max(1))) {
                        let (o, i) = (at / output, at % output);
                        let (start, weights) = table.taps(i, &weights);
                        combine(&x[(o * input + start) * inner..], y, weights);
                    }
                },
            );
        });
    }
    Some(y)
}

/// Single elements side by side.
#[inline(always)]
fn row<T: Real>(x: &[T], y: &mut [T], table: &Table, weights: &[T]) {
    for (i, y) in y.iter_mut().enumerate() {
        let (start, weights) = table.taps(i, weights);
        let x = &x[start..start + weights.len()];
        *y = match (x, weights) {
            ([x], [w]) => *x * *w,
            ([a, b], [u, v]) => *a * *u + *b * *v,
            ([a, b, c, d], [s, t, u, v]) => (*a * *s + *b * *t) + (*c * *u + *d * *v),
            _ => x.iter().zip(weights).fold(T::ZERO, |sum, (&x, &w)| sum + x * w),
        };
    }
}

/// y = sum of w[k] * x[k], where x[k] are consecutive vectors of y's length.
#[inline(always)]
fn combine<T: Real>(x: &[T], y: &mut [T], weights: &[T]) {
    let n = y.len();
    let vector = |k: usize| &x[k * n..][..n];
    match *weights {
        [] => y.fill(T::ZERO),
        [w] => {
            let x = vector(0);
            (0..n).for_each(|i| y[i] = x[i] * w);
        }
        [u, v] => {
            let (a, b) = (vector(0), vector(1));
            (0..n).for_each(|i| y[i] = a[i] * u + b[i] * v);
        }
        [s, t, u, v] => {
            let (a, b, c, d) = (vector(0), vector(1), vector(2), vector(3));
            (0..n).for_each(|i| y[i] = (a[i] * s + b[i] * t) + (c[i] * u + d[i] * v));
        }
        _ => {
            y.fill(T::ZERO);
            for (k, &w) in weights.iter().enumerate() {
                let x = vector(k);
                (0..n).for_each(|i| y[i] += x[i] * w);
            }
        }
    }
}
