//! Matrix products of any rank, on strided operands without copies.

use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_real, on_device,
    shape::{Dims, broadcast, count},
};
use smallvec::smallvec;

impl Tensor {
    /// Matrix product `[.., m, k] x [.., k, n] -> [.., m, n]`; the dimensions in front broadcast. A vector on
    /// the left is a row, on the right a column, and its dimension goes away again.
    ///
    /// # Errors
    /// If a tensor is a scalar, the inner sizes differ, the batches do not broadcast, or the dtypes differ or
    /// are no floats.
    #[track_caller]
    pub fn matmul(&self, other: &Tensor) -> Result<Tensor> {
        ensure!(
            self.rank() > 0 && other.rank() > 0,
            "matmul",
            "needs at least one dimension, got shapes {:?} and {:?}",
            self.shape(),
            other.shape()
        );
        let a = if self.rank() == 1 { self.unsqueeze(0)? } else { self.clone() };
        let b = if other.rank() == 1 { other.unsqueeze(1)? } else { other.clone() };
        let y = product("matmul", &a, &b)?;
        let y = if self.rank() == 1 { y.squeeze(-2)? } else { y };
        if other.rank() == 1 { y.squeeze(-1) } else { Ok(y) }
    }

    /// Batch of matrix products `[b, m, k] x [b, k, n] -> [b, m, n]`.
    ///
    /// # Errors
    /// If a rank is not 3, or sizes or dtypes do not fit.
    #[track_caller]
    pub fn bmm(&self, other: &Tensor) -> Result<Tensor> {
        let ([b, ..], [c, ..]) = (self.dims::<3>("bmm")?, other.dims::<3>("bmm")?);
        ensure!(b == c, "bmm", "the batches of {:?} and {:?} differ", self.shape(), other.shape());
        product("bmm", self, other)
    }

    /// Outer product of two vectors, `[m] x [n] -> [m, n]`.
    ///
    /// # Errors
    /// If a rank is not 1.
    #[track_caller]
    pub fn outer(&self, other: &Tensor) -> Result<Tensor> {
        self.dims::<1>("outer")?;
        other.dims::<1>("outer")?;
        self.unsqueeze(1)?.mul(other)
    }
}

/// The product of two tensors of rank 2 or more.
#[track_caller]
fn product(op: &'static str, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let ((batch_a, [m, k]), (batch_b, [k2, n])) = (split(a), split(b));
    ensure!(k == k2, op, "the inner sizes of {:?} and {:?} differ", a.shape(), b.shape());
    ensure!(a.dtype() == b.dtype(), op, "needs one dtype, got {} and {}", a.dtype(), b.dtype());
    let batch = broadcast(op, batch_a, batch_b)?;
    let y = values(op, &a.detach(), &b.detach(), &batch, [m, n, k])?;
    let saved = |x: &Tensor, with: &Tensor| with.tracked().then(|| x.clone());
    y.record([a, b], Product { a: saved(a, b), b: saved(b, a), shape_b: Dims::from_slice(b.shape()) })
}

/// The values, untracked.
#[track_caller]
fn values(op: &'static str, a: &Tensor, b: &Tensor, batch: &[usize], size: [usize; 3]) -> Result<Tensor> {
    on_device!(
        a,
        op,
        Tensor::in_f32([a, b], |[a, b]| {
            for_real!(a.dtype(), op, T => Ok(cpu::product::<T>(op, a, b, batch, size)))
        }),
        gpu::product(op, a, b, batch)
    )
}

/// Batch dimensions, rows and columns.
fn split(x: &Tensor) -> (&[usize], [usize; 2]) {
    let (batch, matrix) = x.shape().split_at(x.rank() - 2);
    (batch, [matrix[0], matrix[1]])
}

struct Product {
    a: Option<Tensor>,
    b: Option<Tensor>,
    shape_b: Dims,
}

impl Backward for Product {
    const NAME: &'static str = "matmul";
    const TWICE: bool = true;

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let da =
            ctx.grad(0, || product(Self::NAME, grad, &super::binary::kept(Self::NAME, &self.b)?.t()?))?;
        let db = ctx.grad(1, || {
            let a = super::binary::kept(Self::NAME, &self.a)?;
            let (batch, [m, k]) = split(a);
            let n = grad.shape()[grad.rank() - 1];
            // One matrix for the whole batch: its gradient is one product over all rows, not a sum of many.
            if count(&self.shape_b) == k * n && batch == split(grad).0 {
                let rows = count(batch) * m;
                let (a, grad) = (a.reshape([rows, k])?, grad.reshape([rows, n])?);
                product(Self::NAME, &a.t()?, &grad)?.reshape(&self.shape_b)
            } else {
                product(Self::NAME, &a.t()?, grad)
            }
        })?;
        Ok(smallvec![da, db])
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::gpu::{self, Besides};

    #[track_caller]
    pub fn product(op: &'static str, a: &Tensor, b: &Tensor, batch: &[usize]) -> Result<Tensor> {
        ensure!(a.dtype().is_float(), op, "needs float tensors, got {}", a.dtype());
        // `None` is for what could be done besides
        gpu::product(op, a, b, batch, Besides::Nothing)?
            .ok_or_else(|| crate::Error::op(op, "internal: the library left the product undone"))
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            elementwise::Loop,
            gemm::{GemmElement, Into, Mat, gemm},
            parallel::{Shared, SharedMut, for_ranges},
            pool::CpuVec,
        },
        shape::{Strides, broadcast_strides, contiguous_strides},
    };

    pub fn product<T: GemmElement>(
        op: &'static str,
        a: &Tensor,
        b: &Tensor,
        batch: &[usize],
        [m, n, k]: [usize; 3],
    ) -> Tensor {
        let mut shape = Dims::from_slice(batch);
        shape.extend_from_slice(&[m, n]);
        if k == 0 || count(&shape) == 0 {
            return Tensor::from_cpu(CpuVec::<T>::zeros(count(&shape)), shape, op);
        }
        let mut out = CpuVec::<T>::new(count(&shape));
        let target = SharedMut::new(&mut out);
        let (pa, pb) = (Shared(a.cpu_ptr::<T>()), Shared(b.cpu_ptr::<T>()));
        let (step_a, [row_a, column_a]) = steps(a, batch);
        let (step_b, [row_b, column_b]) = steps(b, batch);
        let step_y: Strides = contiguous_strides(&shape)[..batch.len()].iter().copied().collect();
        let one = |[at_a, at_b, at_y]: [isize; 3], rows: usize, threads: bool| unsafe {
            gemm::<T>(
                [rows, n, k],
                Mat::new(target.ptr().offset(at_y), n as isize, 1),
                Mat::new(pa.ptr().offset(at_a), row_a, column_a),
                Mat::new(pb.ptr().offset(at_b), row_b, column_b),
                1.0,
                Into::Set,
                threads,
            );
        };
        // The rows of all matrices of the batch against one right-hand matrix are one tall product.
        if let Some(rows) = one_matrix(batch, m, &step_a, row_a, &step_b) {
            one([0, 0, 0], rows, true);
            return Tensor::from_cpu(out, shape, op);
        }
        let order: Dims = (0..batch.len()).collect();
        let plan = Loop::<3>::new(batch, &order, [&step_a, &step_b, &step_y]);
        let inner = plan.inner();
        // Many products keep all threads busy, each with its own; few large ones share the threads.
        let work = m * n * k;
        let apart = plan.len() >= 2 * rayon::current_num_threads() || work < 1 << 20;
        let all = |range| {
            plan.rows(range, |at, count| {
                for i in 0..count as isize {
                    one(std::array::from_fn(|o| at[o] + i * inner[o]), m, !apart);
                }
            });
        };
        if apart {
            for_ranges(plan.len(), (1 << 19) / work.max(1), all)
        } else {
            all(0..plan.len())
        }
        Tensor::from_cpu(out, shape, op)
    }

    /// Strides over the broadcast batch, and over rows and columns.
    fn steps(x: &Tensor, batch: &[usize]) -> (Strides, [isize; 2]) {
        let lead = x.rank() - 2;
        let strides = x.strides();
        (broadcast_strides(&x.shape()[..lead], &strides[..lead], batch), [strides[lead], strides[lead + 1]])
    }

    /// All rows of the batch, if the left matrices stand evenly below each other and the right one is the same.
    fn one_matrix(
        batch: &[usize],
        m: usize,
        step_a: &[isize],
        row_a: isize,
        step_b: &[isize],
    ) -> Option<usize> {
        let mut rows = m;
        for d in (0..batch.len()).rev().filter(|&d| batch[d] != 1) {
            if step_b[d] != 0 || step_a[d] != row_a * rows as isize {
                return None;
            }
            rows *= batch[d];
        }
        Some(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
        Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
    }

    /// Sum over k of a[.., m, k, 1] b[.., 1, k, n].
    fn naive(a: &Tensor, b: &Tensor) -> Result<Vec<f64>> {
        a.unsqueeze(-1)?.mul(&b.unsqueeze(-3)?)?.sum(-2)?.to_vec()
    }

    fn check(a: &Tensor, b: &Tensor) -> Result<()> {
        let y = a.matmul(b)?.to_vec::<f64>()?;
        let truth = naive(a, b)?;
        assert_eq!(y.len(), truth.len());
        assert!(y.iter().zip(&truth).all(|(y, t)| (y - t).abs() < 1e-12), "{:?} {:?}", a.shape(), b.shape());
        gradcheck(|t| t[0].matmul(&t[1]), &[a.clone(), b.clone()])
    }

    #[test]
    fn shapes_and_strides() -> Result<()> {
        check(&random(&[3, 4], 0)?, &random(&[4, 5], 1)?)?;
        check(&random(&[4, 3], 0)?.t()?, &random(&[5, 4], 1)?.t()?)?;
        check(&random(&[2, 3, 4], 0)?, &random(&[4, 5], 1)?)?;
        check(&random(&[3, 2, 4], 0)?.transpose(0, 1)?, &random(&[4, 5], 1)?)?;
        check(&random(&[3, 4], 0)?, &random(&[2, 4, 5], 1)?)?;
        check(&random(&[2, 1, 3, 4], 0)?, &random(&[3, 4, 2], 1)?)?;
        check(&random(&[2, 3, 6], 0)?.narrow(2, 1, 4)?, &random(&[2, 4, 1], 1)?)?;
        check(&random(&[3, 1], 0)?.expand([3, 4])?, &random(&[4, 1], 1)?)?;
        let pages = random(&[16, 512], 1)?;
        let y = random(&[64, 512], 0)?.matmul(&pages.t()?)?.to_vec::<f64>()?;
        let copy = random(&[64, 512], 0)?.matmul(&pages.t()?.contiguous()?)?.to_vec::<f64>()?;
        assert!(y.iter().zip(&copy).all(|(a, b)| (a - b).abs() < 1e-12), "columns whole pages apart");
        check(&random(&[2, 0], 0)?, &random(&[0, 3], 1)?)?;
        check(&random(&[0, 2], 0)?, &random(&[2, 3], 1)?)
    }

    #[test]
    fn vectors() -> Result<()> {
        let (a, b) = (random(&[4], 0)?, random(&[2, 4, 3], 1)?);
        assert_eq!(a.matmul(&b)?.shape(), [2, 3]);
        assert_eq!(b.t()?.matmul(&a)?.shape(), [2, 3]);
        assert_eq!(a.matmul(&a)?.shape(), [0usize; 0]);
        gradcheck(|t| t[0].matmul(&t[1]), &[a.clone(), b.clone()])?;
        gradcheck(|t| t[1].t()?.matmul(&t[0]), &[a.clone(), b])?;
        gradcheck(|t| t[0].matmul(&t[1]), &[a.clone(), a.clone()])?;
        gradcheck(|t| t[0].outer(&t[1]), &[a, random(&[3], 2)?])
    }

    /// With y = sum((a b)^2): dy/da = 2 a b bT, and the sum of that over all elements is 2 uT b bT 1 with u the
    /// column sums of a.
    #[test]
    fn second_order() -> Result<()> {
        let (a, b) = (random(&[3, 4], 0)?.requires_grad(), random(&[4, 2], 1)?.requires_grad());
        let c = a.matmul(&b)?;
        let y = c.mul(&c)?.sum(())?;
        let options = crate::BackwardOptions { create_graph: true, ..Default::default() };
        let first = y.backward_with(&options)?;
        let second = first.get(&a).map(|da| da.sum(())?.backward()).transpose()?.unwrap_or_default();
        let (leaf, b, u) = (b.clone(), b.detach(), a.detach().sum_keepdim(0)?.t()?);
        let da = b.matmul(&b.t()?)?.sum_keepdim(0)?.mul_scalar(2.0)?.expand([3, 4])?.to_vec::<f64>()?;
        let db = u.matmul(&b.sum_keepdim(0)?)?.add(&u.t()?.matmul(&b)?)?.mul_scalar(2.0)?.to_vec::<f64>()?;
        for (x, truth) in [(&a, da), (&leaf, db)] {
            let got = second.get(x).map(Tensor::to_vec::<f64>).transpose()?.unwrap_or_default();
            assert!(got.len() == truth.len() && got.iter().zip(&truth).all(|(g, t)| (g - t).abs() < 1e-12));
        }
        Ok(())
    }

    #[test]
    fn half_and_errors() -> Result<()> {
        let (a, b) = (Tensor::ones([2, 3], DType::BF16)?, Tensor::ones([3, 2], DType::BF16)?);
        let y = a.matmul(&b)?;
        assert_eq!((y.dtype(), y.to_dtype(DType::F32)?.to_vec::<f32>()?), (DType::BF16, vec![3.0; 4]));
        assert!(a.matmul(&a).is_err() && a.matmul(&Tensor::scalar(1.0)).is_err());
        assert!(a.matmul(&b.to_dtype(DType::F32)?).is_err() && a.bmm(&b).is_err() && a.outer(&b).is_err());
        Ok(())
    }
}
