//! One task is one window and head: its keys and values are brought together in the cache, then blocks of its
//! queries meet them by matrix products.

mod backward;
mod forward;

use super::{Number, Plan, Side};
use crate::{
    Tensor,
    cpu::{
        gemm::{Into, Mat, gemm},
        parallel::Shared,
        pool::CpuVec,
        simd::simd,
    },
};

pub use backward::backward;
pub use forward::forward;

/// Elements of a block of logits: half of a second-level cache.
const BLOCK: usize = 1 << 17;

/// A tensor `[B, heads, H, W, D]` in memory.
#[derive(Clone, Copy)]
struct Field<P> {
    data: P,
    strides: [isize; 4],
}

impl<T: Number> Field<Shared<T>> {
    fn of(t: &Tensor) -> Self {
        let s = t.strides();
        Field { data: Shared(t.cpu_ptr::<T>()), strides: [s[0], s[1], s[2], s[3]] }
    }
}

impl<P> Field<P> {
    /// Where a token of the image starts.
    fn at(&self, place: &Place, token: [usize; 2]) -> isize {
        let [b, h, y, x] = self.strides;
        place.b as isize * b + place.head as isize * h + token[0] as isize * y + token[1] as isize * x
    }
}

/// One window and head.
struct Place {
    b: usize,
    head: usize,
    window: [usize; 2],
}

impl Place {
    fn of(plan: &Plan, job: usize) -> Place {
        let (job, head) = (job / plan.heads, job % plan.heads);
        let [ny, nx] = plan.windows;
        Place { b: job / (ny * nx), head, window: [job / nx % ny, job % nx] }
    }

    /// Rows and columns of the window that are inside the image.
    fn inside(&self, side: &Side) -> [usize; 2] {
        [0, 1].map(|a| side.window[a].min(side.image[a] - self.window[a] * side.window[a]))
    }

    /// A token of the window, in the image.
    fn token(&self, side: &Side, y: usize, x: usize) -> [usize; 2] {
        [self.window[0] * side.window[0] + y, self.window[1] * side.window[1] + x]
    }
}

impl Plan {
    fn jobs(&self) -> usize {
        self.batch * self.windows[0] * self.windows[1] * self.heads
    }
    fn keys(&self) -> usize {
        self.k.window[0] * self.k.window[1]
    }
    fn block(&self) -> usize {
        (BLOCK / self.keys()).clamp(16, 256).min(self.q.window[0] * self.q.window[1])
    }
    /// Jobs that are worth a task.
    fn grain(&self) -> usize {
        let work = self.q.window[0] * self.q.window[1] * self.keys() * self.d;
        ((1 << 21) / work.max(1)).max(1)
    }
}

/// What all tasks read.
struct Task<'a, T: Number> {
    plan: &'a Plan,
    q: Field<Shared<T>>,
    k: Field<Shared<T>>,
    v: Field<Shared<T>>,
    /// Rows of both tables.
    tables: Option<[&'a [T]; 2]>,
    bias: Option<&'a [T]>,
}

/// A task's own memory.
struct Work<T: Number> {
    q: CpuVec<T>,
    k: CpuVec<T>,
    k_t: CpuVec<T>,
    v: CpuVec<T>,
    p: CpuVec<T>,
    /// Products of queries and table rows, then their gradients.
    terms: [CpuVec<T>; 2],
    column: CpuVec<T>,
}

fn mat<T>(x: &[T], width: usize) -> Mat<*const T> {
    Mat::new(x.as_ptr(), width as isize, 1)
}
fn mat_mut<T>(x: &mut [T], width: usize) -> Mat<*mut T> {
    Mat::new(x.as_mut_ptr(), width as isize, 1)
}

impl<'a, T: Number> Task<'a, T> {
    fn new(
        plan: &'a Plan,
        [q, k, v]: &[Tensor; 3],
        tables: Option<&'a [Tensor; 2]>,
        bias: Option<&'a Tensor>,
    ) -> Self {
        Task {
            plan,
            q: Field::<Shared<T>>::of(q),
            k: Field::<Shared<T>>::of(k),
            v: Field::<Shared<T>>::of(v),
            tables: tables.map(|t| t.each_ref().map(|t| t.cpu_slice::<T>())),
            bias: bias.map(|b| b.cpu_slice::<T>()),
        }
    }

    fn work(&self) -> Work<T> {
        let (plan, block) = (self.plan, self.plan.block());
        let rows = self.tables.map_or([0, 0], |t| t.map(|t| t.len() / plan.d));
        Work {
            q: CpuVec::new(block * plan.d),
            k: CpuVec::new(plan.keys() * plan.d),
            k_t: CpuVec::new(plan.keys() * plan.d),
            v: CpuVec::new(plan.keys() * plan.d),
            p: CpuVec::new(block * plan.keys()),
            terms: rows.map(|n| CpuVec::new(block * n)),
            column: CpuVec::new(plan.k.window[1]),
        }
    }

    /// The window's keys or values, row-major; tokens beyond the image are part `part` of the bias.
    fn collect(&self, field: &Field<Shared<T>>, part: usize, place: &Place, out: &mut [T]) {
        let (side, d) = (&self.plan.k, self.plan.d);
        let [rows, columns] = place.inside(side);
        let pad = self.bias.map(|b| &b[(part * self.plan.heads + place.head) * d..][..d]);
        for (i, to) in out.chunks_exact_mut(d).enumerate() {
            let (y, x) = (i / side.window[1], i % side.window[1]);
            if y < rows && x < columns {
                let at = field.at(place, place.token(side, y, x));
                to.copy_from_slice(unsafe { std::slice::from_raw_parts(field.data.ptr().offset(at), d) });
            } else {
                match pad {
                    Some(pad) => to.copy_from_slice(pad),
                    None => to.fill(T::ZERO),
                }
            }
        }
    }

    /// Queries `first ..` of those inside the image, numbered row by row, from any tensor laid out as they are.
    fn queries(&self, field: &Field<Shared<T>>, place: &Place, first: usize, out: &mut [T]) {
        let (side, d) = (&self.plan.q, self.plan.d);
        let columns = place.inside(side)[1];
        for (i, to) in out.chunks_exact_mut(d).enumerate() {
            let i = first + i;
            let at = field.at(place, place.token(side, i / columns, i % columns));
            to.copy_from_slice(unsafe { std::slice::from_raw_parts(field.data.ptr().offset(at), d) });
        }
    }

    /// Logits of `n` queries from `first` on, in `work.p`.
    fn logits(&self, place: &Place, first: usize, n: usize, work: &mut Work<T>) {
        let (plan, keys) = (self.plan, self.plan.keys());
        let q = mat(&work.q, plan.d);
        unsafe {
            gemm(
                [n, keys, plan.d],
                mat_mut(&mut work.p, keys),
                q,
                mat(&work.k_t, keys),
                plan.scale,
                Into::Set,
                false,
            );
        }
        let Some(tables) = self.tables else { return };
        for (table, terms) in tables.iter().zip(&mut work.terms) {
            let rows = table.len() / plan.d;
            unsafe {
                gemm(
                    [n, rows, plan.d],
                    mat_mut(terms, rows),
                    q,
                    mat(table, plan.d).t(),
                    1.0,
                    Into::Set,
                    false,
                )
            };
        }
        let columns = place.inside(&plan.q)[1];
        let [kh, kw] = plan.k.window;
        let lengths = tables.map(|t| t.len() / plan.d);
        for i in 0..n {
            let (y, x) = ((first + i) / columns, (first + i) % columns);
            let [th, tw] = [0, 1].map(|a| &work.terms[a][i * lengths[a]..][..lengths[a]]);
            for (to, &row) in work.column.iter_mut().zip(&plan.index[1][x * kw..][..kw]) {
                *to = tw[row];
            }
            let (logits, column) = (&mut work.p[i * keys..][..keys], &work.column[..kw]);
            for (logits, &row) in logits.chunks_exact_mut(kw).zip(&plan.index[0][y * kh..][..kh]) {
                let a = th[row];
                simd(
                    #[inline(always)]
                    || logits.iter_mut().zip(column).for_each(|(x, &b)| *x += a + b),
                );
            }
        }
    }

    /// All queries of one window and head, in blocks: `(first, n)`.
    fn blocks(&self, place: &Place) -> impl Iterator<Item = (usize, usize)> + use<T> {
        let [rows, columns] = place.inside(&self.plan.q);
        let (queries, block) = (rows * columns, self.plan.block());
        (0..queries).step_by(block).map(move |first| (first, block.min(queries - first)))
    }

    /// Where a query's row of `[B, heads, H, W]` is.
    fn row_index(&self, place: &Place, i: usize) -> usize {
        let [h, w] = self.plan.q.image;
        let columns = place.inside(&self.plan.q)[1];
        let [y, x] = place.token(&self.plan.q, i / columns, i % columns);
        ((place.b * self.plan.heads + place.head) * h + y) * w + x
    }
}

/// The transpose of a matrix of `width` columns.
fn transposed<T: Number>(from: &[T], width: usize, to: &mut [T]) {
    let n = from.len() / width;
    unsafe {
        crate::cpu::transpose::transpose(
            [n, width],
            from.as_ptr(),
            width as isize,
            to.as_mut_ptr(),
            n as isize,
        )
    };
}

/// Strides of `[B, heads, H, W, D]` stored as `[B, H, W, parts, heads, D]`.
fn stored(plan: &Plan, side: &Side, parts: usize) -> [isize; 4] {
    let token = parts * plan.heads * plan.d;
    let [h, w] = side.image;
    [h * w * token, plan.d, w * token, token].map(|n| n as isize)
}
