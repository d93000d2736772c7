//! Matrix products on raw memory, by the `gemm` crate (AVX-512 where the processor has it).

use super::{
    parallel::{Shared, SharedMut, for_ranges},
    pool::CpuVec,
    team,
    transpose::transpose,
};
use crate::dtype::DType;
use half::f16;

/// A strided matrix in memory: element (i, j) lies at `ptr + i * row + j * column`.
#[derive(Clone, Copy)]
pub struct Mat<T> {
    /// Element (0, 0).
    pub ptr: T,
    /// Step from row to row, in elements.
    pub row: isize,
    /// Step from column to column, in elements.
    pub column: isize,
}

impl<T> Mat<T> {
    /// A matrix with these strides.
    pub fn new(ptr: T, row: isize, column: isize) -> Self {
        Mat { ptr, row, column }
    }

    /// The transposed matrix, without a copy.
    pub fn t(self) -> Self {
        Mat { ptr: self.ptr, row: self.column, column: self.row }
    }
}

/// Element types that the products know. bf16 goes through f32.
pub trait GemmElement: crate::dtype::Element + crate::dtype::Float {}
impl GemmElement for f32 {}
impl GemmElement for f64 {}
impl GemmElement for f16 {}

/// How a product meets what stands in its destination.
#[derive(Clone, Copy, PartialEq)]
pub enum Into {
    /// dst = lhs * rhs
    Set,
    /// dst = dst + lhs * rhs
    Add,
}

/// `dst (m x n) = [dst +] scale * lhs (m x k) * rhs (k x n)`. `threads`: use all of them, or stay on this one
/// (inside a parallel section).
///
/// # Safety
/// The three matrices lie in valid memory, and `dst` overlaps neither operand.
pub unsafe fn gemm<T: GemmElement>(
    [m, n, k]: [usize; 3],
    dst: Mat<*mut T>,
    lhs: Mat<*const T>,
    rhs: Mat<*const T>,
    scale: f64,
    into: Into,
    threads: bool,
) {
    // Packing walks over 48 columns of `rhs` at once. Where these lie apart, that reads from 48 places at a time, and
    // where they begin at the same place of different pages, all want the same few cache lines. A transposed copy
    // first costs less: the products of a ViT then run at 200 to 220 GFLOP/s on two cores instead of 120 to 207.
    if rhs.row == 1 && rhs.column != 1 && dst.column == 1 && m >= 64 && n >= 16 && k >= 16 {
        let mut copy = CpuVec::<T>::new(n * k);
        let (to, from) = (SharedMut::new(&mut copy), Shared(rhs.ptr));
        let part = |range: std::ops::Range<usize>| unsafe {
            let (first, from) = (range.start, from.ptr().offset(range.start as isize * rhs.column));
            transpose([range.len(), k], from, rhs.column, to.ptr().add(first), n as isize);
        };
        if threads && n * k > 1 << 16 {
            for_ranges(n, (1usize << 16).div_ceil(k).next_multiple_of(16), part);
        } else {
            part(0..n);
        }
        let rhs = Mat::new(copy.as_ptr(), n as isize, 1);
        return unsafe { gemm([m, n, k], dst, lhs, rhs, scale, into, threads) };
    }
    // A task of less than some 100 microseconds is not worth waking a thread for.
    let parallelism = if threads && m * n * k > 1 << 20 && rayon::current_num_threads() > 1 {
        gemm::Parallelism::Rayon(0)
    } else {
        gemm::Parallelism::None
    };
    macro_rules! call {
        ($t:ty, $one:expr, $scale:expr) => {
            unsafe {
                gemm::gemm::<$t>(
                    m,
                    n,
                    k,
                    dst.ptr.cast(),
                    dst.column,
                    dst.row,
                    into == Into::Add,
                    lhs.ptr.cast(),
                    lhs.column,
                    lhs.row,
                    rhs.ptr.cast(),
                    rhs.column,
                    rhs.row,
                    $one,
                    $scale,
                    false,
                    false,
                    false,
                    parallelism,
                )
            }
        };
    }
    let product = || match T::DTYPE {
        DType::F32 => call!(f32, 1.0, scale as f32),
        DType::F64 => call!(f64, 1.0, scale),
        DType::F16 => call!(gemm::f16, gemm::f16::ONE, gemm::f16::from_f64(scale)),
        other => unreachable!("GemmElement is not implemented for {other}"),
    };
    match parallelism {
        gemm::Parallelism::None => product(),
        gemm::Parallelism::Rayon(_) => team::with_rayon(product),
    }
}
