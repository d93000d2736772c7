//! Products by the crate's CPU code, on the same memory. Half types are widened, accumulated in f32 and rounded
//! once, as the real library does.

use super::graph;
use crate::{
    DType, Error, Result,
    cpu::{
        gemm::{GemmElement, Into, Mat, gemm},
        pool::CpuVec,
    },
    dtype::Float,
    gpu::driver::{Epilogue, Matrix, Product},
};
use half::{bf16, f16};

/// Runs the product. The answer is always `true`: nothing is left undone.
///
/// # Safety
/// The matrices lie in memory of device `index`, and y overlaps nothing else.
pub(crate) unsafe fn product(index: usize, p: &Product) -> Result<bool> {
    let run = match p.dtype {
        DType::F32 => run::<f32, f32>,
        DType::F64 => run::<f64, f64>,
        DType::BF16 => run::<bf16, f32>,
        DType::F16 => run::<f16, f32>,
        other => return Err(Error::op(p.op, format!("a product needs floats, got {other}"))),
    };
    let p = *p;
    graph::work(index, move || {
        unsafe { run(&p) };
        Ok(())
    })?;
    Ok(true)
}

/// Matrix `batch` of an operand: in place, or widened into `copy`.
unsafe fn operand<T: Float, A: GemmElement>(
    m: &Matrix,
    batch: usize,
    [rows, columns]: [usize; 2],
    copy: &mut CpuVec<A>,
) -> Mat<*const A> {
    let from = unsafe { m.ptr.cast::<T>().offset(batch as isize * m.batch) };
    if T::DTYPE == A::DTYPE {
        return Mat::new(from.cast(), m.row, m.column);
    }
    for (i, row) in copy.chunks_exact_mut(columns).enumerate().take(rows) {
        for (j, v) in row.iter_mut().enumerate() {
            *v = A::from_f64(unsafe { *from.offset(i as isize * m.row + j as isize * m.column) }.to_f64());
        }
    }
    Mat::new(copy.as_ptr(), columns as isize, 1)
}

unsafe fn run<T: Float, A: GemmElement>(p: &Product) {
    let [m, n, k] = p.size;
    let copies = usize::from(T::DTYPE != A::DTYPE);
    let (mut a, mut b) = (CpuVec::<A>::new(copies * m * k), CpuVec::<A>::new(copies * k * n));
    let mut y = CpuVec::<A>::new(m * n);
    for batch in 0..p.batch {
        unsafe {
            let lhs = operand::<T, A>(&p.a, batch, [m, k], &mut a);
            let rhs = operand::<T, A>(&p.b, batch, [k, n], &mut b);
            gemm::<A>([m, n, k], Mat::new(y.as_mut_ptr(), n as isize, 1), lhs, rhs, 1.0, Into::Set, true);
            match p.epilogue {
                Epilogue::None => {}
                Epilogue::Bias(bias) => {
                    for (i, y) in y.iter_mut().enumerate() {
                        *y = A::from_f64(y.to_f64() + (*bias.cast::<T>().add(i % n)).to_f64());
                    }
                }
                Epilogue::RowSums(sums) => {
                    for i in 0..m as isize {
                        let at = |j: usize| (*lhs.ptr.offset(i * lhs.row + j as isize * lhs.column)).to_f64();
                        *sums.cast::<T>().offset(i) = T::from_f64((0..k).map(at).sum());
                    }
                }
            }
            let out = p.y.ptr.cast::<T>().offset(batch as isize * p.y.batch);
            for (i, y) in y.iter().enumerate() {
                *out.offset((i / n) as isize * p.y.row + (i % n) as isize * p.y.column) =
                    T::from_f64(y.to_f64());
            }
        }
    }
}
