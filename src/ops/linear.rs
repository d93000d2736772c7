//! Linear layers: product, bias and, if wanted, GELU.

use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads, is_grad_enabled},
    ensure, for_real, on_device,
    shape::{Dims, count},
};
use smallvec::smallvec;

impl Tensor {
    /// `x Wᵀ + b` over the last dimension: `[.., in]` with weight `[out, in]` and bias `[out]` gives `[.., out]`.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit.
    #[track_caller]
    pub fn linear(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (x, shape) = check("linear", self, weight, bias)?;
        let y = forward("linear", &x, weight, bias)?;
        let saved = Linear { x: weight.tracked().then(|| x.clone()), w: x.tracked().then(|| weight.clone()) };
        match bias {
            Some(bias) => y.record([&x, weight, bias], saved)?.reshape(shape),
            None => y.record([&x, weight], saved)?.reshape(shape),
        }
    }

    /// `gelu(x Wᵀ + b)`, the exact GELU `z Φ(z)` in one pass with the bias. Saves the product before the bias;
    /// the backward takes the derivative and sums the bias gradient in one pass.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit.
    #[track_caller]
    pub fn linear_gelu(&self, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (x, shape) = check("linear_gelu", self, weight, Some(bias))?;
        let product = forward("linear_gelu", &x, weight, None)?;
        let y = gelu(&product, &bias.detach())?;
        let (w, b) = (weight.clone(), bias.detach());
        let saved = LinearGelu { x: weight.tracked().then(|| x.clone()), w, b, product };
        y.record([&x, weight, bias], saved)?.reshape(shape)
    }
}

/// The input as a matrix `[rows, in]`, and the shape of the result.
#[track_caller]
fn check(op: &'static str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<(Tensor, Dims)> {
    let [out, inputs] = weight.dims::<2>(op)?;
    ensure!(
        x.shape().last() == Some(&inputs),
        op,
        "weight has shape {:?}, so the input needs {inputs} as its last size; it has shape {:?}",
        weight.shape(),
        x.shape()
    );
    let types = [Some(x), bias].into_iter().flatten().all(|t| t.dtype() == weight.dtype());
    ensure!(types, op, "input ({}), weight ({}) and bias need one dtype", x.dtype(), weight.dtype());
    if let Some(bias) = bias {
        ensure!(bias.shape() == [out], op, "the bias has shape {:?}, needs [{out}]", bias.shape());
    }
    let mut shape = Dims::from_slice(x.shape());
    shape[x.rank() - 1] = out;
    let rows = count(&x.shape()[..x.rank() - 1]);
    Ok((x.reshape([rows, inputs])?, shape))
}

fn forward(op: &'static str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (x, w) = (&x.detach(), &weight.detach());
    let on_cpu = |x: &Tensor, w: &Tensor, b: Option<&Tensor>| for_real!(x.dtype(), op, T => Ok(cpu::forward::<T>(op, x, w, b)));
    on_device!(
        x,
        op,
        match bias {
            Some(b) => Tensor::in_f32([x, w, &b.detach()], |[x, w, b]| on_cpu(x, w, Some(b))),
            None => Tensor::in_f32([x, w], |[x, w]| on_cpu(x, w, None)),
        },
        gpu::forward(op, x, w, bias.map(Tensor::detach).as_ref())
    )
}

fn gelu(product: &Tensor, bias: &Tensor) -> Result<Tensor> {
    const OP: &str = "linear_gelu";
    on_device!(
        product,
        OP,
        Tensor::in_f32([product, bias], |[p, b]| for_real!(p.dtype(), OP, T => Ok(cpu::gelu::<T>(p, b)))),
        gpu::gelu(OP, product, bias)
    )
}

/// The gradient of a product's bias.
fn column_sums(op: &'static str, grad: &Tensor) -> Result<Tensor> {
    on_device!(
        grad,
        op,
        Tensor::in_f32([grad], |[g]| for_real!(g.dtype(), op, T => Ok(cpu::column_sums::<T>(g)))),
        gpu::column_sums(op, grad)
    )
}

/// Gradients of weight and bias of a layer with input `x`, where both are wanted and neither will be differentiated
/// again; `None` where they are better computed apart.
fn both_gradients(op: &'static str, grad: &Tensor, x: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
    #[cfg(gpu)]
    if crate::gpu::on_gpu(grad) {
        return gpu::both_gradients(op, grad, x);
    }
    let _ = (op, grad, x);
    Ok(None)
}

struct Linear {
    x: Option<Tensor>,
    w: Option<Tensor>,
}

impl Backward for Linear {
    const NAME: &'static str = "linear";
    const TWICE: bool = true;

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let dx = ctx.grad(0, || grad.matmul(super::binary::kept(Self::NAME, &self.w)?))?;
        if ctx.needs(1) && ctx.needs(2) && !is_grad_enabled() {
            let x = super::binary::kept(Self::NAME, &self.x)?;
            if let Some((dw, db)) = both_gradients(Self::NAME, grad, x)? {
                return Ok(smallvec![dx, Some(dw), Some(db)]);
            }
        }
        let dw = ctx.grad(1, || grad.t()?.matmul(super::binary::kept(Self::NAME, &self.x)?))?;
        let db =
            ctx.grad(2, || if is_grad_enabled() { grad.sum(0) } else { column_sums(Self::NAME, grad) })?;
        Ok(smallvec![dx, dw, db])
    }
}

struct LinearGelu {
    x: Option<Tensor>,
    w: Tensor,
    b: Tensor,
    product: Tensor,
}

impl Backward for LinearGelu {
    const NAME: &'static str = "linear_gelu";

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let (g, p, b) = (grad, &self.product, &self.b);
        let (dz, db) = on_device!(
            g,
            Self::NAME,
            in_f32_pair([g, p, b], |[g, p, b]| {
                for_real!(g.dtype(), Self::NAME, T => Ok(cpu::gelu_backward::<T>(g, p, b)))
            }),
            gpu::gelu_backward(Self::NAME, g, p, b)
        )?;
        let db = ctx.needs(2).then_some(db);
        let dx = ctx.grad(0, || dz.matmul(&self.w.detach()))?;
        let dw = ctx.grad(1, || dz.t()?.matmul(&super::binary::kept(Self::NAME, &self.x)?.detach()))?;
        Ok(smallvec![dx, dw, db])
    }
}

/// As [`Tensor::in_f32`], for two results.
fn in_f32_pair<const N: usize>(
    inputs: [&Tensor; N],
    f: impl FnOnce([&Tensor; N]) -> Result<(Tensor, Tensor)>,
) -> Result<(Tensor, Tensor)> {
    let mut second = None;
    let first = Tensor::in_f32(inputs, |inputs| {
        let (first, other) = f(inputs)?;
        second = Some(other);
        Ok(first)
    })?;
    match second {
        Some(second) => Ok((first, second.to_dtype(inputs[0].dtype())?)),
        None => Err(crate::Error::msg("internal: the second of two results is missing")),
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::{
        DType,
        gpu::{self, Besides, Buffer, sys},
        shape::Dims,
    };

    /// `x wᵀ + b`, the bias in the product's epilogue where the library has one (for f64 it has not).
    #[track_caller]
    pub fn forward(op: &'static str, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        ensure!(x.dtype().is_float(), op, "needs float tensors, got {}", x.dtype());
        let (w, batch) = (w.t()?, Dims::new());
        if let Some(bias) = bias {
            let bias = bias.contiguous()?;
            if x.dtype() != DType::F64
                && let Some(y) = gpu::product(op, x, &w, &batch, Besides::Bias(&bias))?
            {
                return Ok(y);
            }
            return plain(op, x, &w)?.add(&bias);
        }
        plain(op, x, &w)
    }

    #[track_caller]
    fn plain(op: &'static str, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        gpu::product(op, a, b, &[], Besides::Nothing)?
            .ok_or_else(|| crate::Error::op(op, "internal: the library left the product undone"))
    }

    pub fn gelu(op: &'static str, product: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let bias = bias.contiguous()?;
        let y = gpu::empty(product, product.shape(), product.dtype(), op)?;
        gpu::launch(op, [product, &bias, &y], |[p, b, y], stream| unsafe {
            sys::smalti_linear_gelu_forward(&p, &b, &y, stream)
        })?;
        Ok(y)
    }

    /// Partial sums. The stream makes it safe to give them back while the kernel still runs.
    fn workspace(like: &Tensor) -> Result<Buffer> {
        let [rows, columns] = [like.shape()[0], like.shape()[1]].map(|n| n as i64);
        let n = unsafe { sys::smalti_linear_partials(rows, columns) };
        let index = match like.device() {
            crate::Device::Cuda(index) => index,
            crate::Device::Cpu => 0,
        };
        Buffer::new(index, n as usize * like.dtype().computed_in().size())
    }

    pub fn gelu_backward(
        op: &'static str,
        grad: &Tensor,
        product: &Tensor,
        bias: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (grad, bias) = (grad.contiguous()?, bias.contiguous()?);
        let dz = gpu::empty(&grad, grad.shape(), grad.dtype(), op)?;
        let db = gpu::empty(&grad, bias.shape(), grad.dtype(), op)?;
        let partial = workspace(&grad)?;
        gpu::launch(op, [&grad, product, &bias, &dz, &db], |[g, p, b, dz, db], stream| unsafe {
            sys::smalti_linear_gelu_backward(&g, &p, &b, &dz, &db, partial.ptr().cast(), stream)
        })?;
        Ok((dz, db))
    }

    pub fn column_sums(op: &'static str, x: &Tensor) -> Result<Tensor> {
        let x = x.contiguous()?;
        let y = gpu::empty(&x, &x.shape()[1..], x.dtype(), op)?;
        let partial = workspace(&x)?;
        gpu::launch(op, [&x, &y], |[x, y], stream| unsafe {
            sys::smalti_linear_column_sums(&x, &y, partial.ptr().cast(), stream)
        })?;
        Ok(y)
    }

    /// The weight's gradient with the bias gradient in the epilogue, which sums over what it reads anyway.
    pub fn both_gradients(op: &'static str, grad: &Tensor, x: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
        if grad.dtype() == DType::F64 {
            return Ok(None);
        }
        let db = gpu::empty(grad, &grad.shape()[1..], grad.dtype(), op)?;
        let dw = gpu::product(op, &grad.t()?, &x.detach(), &[], Besides::RowSums(&db))?;
        Ok(dw.map(|dw| (dw, db)))
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            elementwise,
            gemm::{GemmElement, Into, Mat, gemm},
            parallel::{Shared, SharedMut, for_ranges, for_rows},
            pool::CpuVec,
            simd::simd_of,
        },
        dtype::{Element, Real},
    };

    fn row_major<T: Element>(x: &Tensor) -> Tensor {
        if x.is_contiguous() { x.clone() } else { elementwise::contiguous::<T>(x, "contiguous") }
    }

    fn matrix<T: Element>(x: &Tensor) -> Mat<*const T> {
        Mat::new(x.cpu_ptr::<T>(), x.strides()[0], x.strides()[1])
    }

    /// The product onto rows that already hold the bias: cheaper than another pass over the result.
    pub fn forward<T: GemmElement>(
        op: &'static str,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
    ) -> Tensor {
        let (rows, n, k) = (x.shape()[0], w.shape()[0], w.shape()[1]);
        let mut out = CpuVec::<T>::new(rows * n);
        let target = SharedMut::new(&mut out);
        let bias = bias.map(row_major::<T>);
        let into = if bias.is_some() || k == 0 { Into::Add } else { Into::Set };
        if into == Into::Add {
            let bias = bias.as_ref().map(Tensor::cpu_slice::<T>);
            for_rows(rows, n, |range| {
                let out = unsafe { target.slice(range.start * n..range.end * n) };
                match bias {
                    Some(bias) => out.chunks_exact_mut(n.max(1)).for_each(|row| row.copy_from_slice(bias)),
                    None => out.fill(T::default()),
                }
            });
        }
        if k > 0 && rows * n > 0 {
            let dst = Mat::new(target.ptr(), n as isize, 1);
            unsafe { gemm::<T>([rows, n, k], dst, matrix(x), matrix(w).t(), 1.0, into, true) };
        }
        Tensor::from_cpu(out, [rows, n], op)
    }

    #[inline(always)]
    fn phi<T: Real>(z: T) -> T {
        T::of(0.5) * (T::ONE + (z * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf())
    }

    pub fn gelu<T: Real>(product: &Tensor, bias: &Tensor) -> Tensor {
        let (rows, n) = (product.shape()[0], product.shape()[1]);
        let bias = row_major::<T>(bias);
        let (p, b) = (product.cpu_slice::<T>(), bias.cpu_slice::<T>());
        let mut out = CpuVec::<T>::new(rows * n);
        let target = SharedMut::new(&mut out);
        for_rows(rows, n, |range| {
            for row in range {
                let (p, y) = (&p[row * n..][..n], unsafe { target.slice(row * n..(row + 1) * n) });
                simd_of::<T, _>(
                    #[inline(always)]
                    || {
                        for ((y, &p), &b) in y.iter_mut().zip(p).zip(b) {
                            let z = p + b;
                            *y = z * phi(z);
                        }
                    },
                );
            }
        });
        Tensor::from_cpu(out, [rows, n], "linear_gelu")
    }

    /// Rows summed into one partial result. The split of a sum depends on the number of rows alone.
    fn block(rows: usize) -> usize {
        rows.div_ceil(64).max(16)
    }

    /// The sum over `blocks` rows of `partial`, in order.
    fn join<T: Real>(partial: &[T], n: usize) -> Tensor {
        let mut sums = CpuVec::<T>::zeros(n);
        simd_of::<T, _>(
            #[inline(always)]
            || {
                for row in partial.chunks_exact(n.max(1)) {
                    sums.iter_mut().zip(row).for_each(|(s, &v)| *s += v);
                }
            },
        );
        Tensor::from_cpu(sums, [n], "column sums")
    }

    /// Sums over the rows of a matrix: blocks of rows on all threads, then the blocks in order.
    pub fn column_sums<T: Real>(g: &Tensor) -> Tensor {
        let g = row_major::<T>(g);
        let (rows, n) = (g.shape()[0], g.shape()[1]);
        let (values, grain) = (g.cpu_slice::<T>(), block(rows));
        let mut partial = CpuVec::<T>::new(rows.div_ceil(grain) * n);
        let target = SharedMut::new(&mut partial);
        for_ranges(rows, grain, |range| {
            let sums = unsafe { target.slice(range.start / grain * n..(range.start / grain + 1) * n) };
            sums.fill(T::ZERO);
            simd_of::<T, _>(
                #[inline(always)]
                || {
                    for row in range {
                        sums.iter_mut().zip(&values[row * n..][..n]).for_each(|(s, &v)| *s += v);
                    }
                },
            );
        });
        join(&partial, n)
    }

    /// `dz = g gelu'(product + bias)` and its column sums.
    pub fn gelu_backward<T: Real>(g: &Tensor, product: &Tensor, bias: &Tensor) -> (Tensor, Tensor) {
        let (g, bias) = (row_major::<T>(g), row_major::<T>(bias));
        let (rows, n) = (g.shape()[0], g.shape()[1]);
        let (values, b) = (Shared(g.cpu_slice::<T>().as_ptr()), bias.cpu_slice::<T>());
        let (p, grain) = (product.cpu_slice::<T>(), block(rows));
        let (mut out, mut partial) = (CpuVec::<T>::new(rows * n), CpuVec::<T>::new(rows.div_ceil(grain) * n));
        let (target, target_sums) = (SharedMut::new(&mut out), SharedMut::new(&mut partial));
        let density = T::of(0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2);
        for_ranges(rows, grain, |range| {
            let at = range.start / grain * n;
            let sums = unsafe { target_sums.slice(at..at + n) };
            sums.fill(T::ZERO);
            for row in range {
                let (g, p) =
                    unsafe { (std::slice::from_raw_parts(values.ptr().add(row * n), n), &p[row * n..][..n]) };
                let dz = unsafe { target.slice(row * n..(row + 1) * n) };
                simd_of::<T, _>(
                    #[inline(always)]
                    || {
                        for i in 0..n {
                            let z = p[i] + b[i];
                            let d = g[i] * (phi(z) + z * density * (T::of(-0.5) * z * z).exp());
                            dz[i] = d;
                            sums[i] += d;
                        }
                    },
                );
            }
        });
        (Tensor::from_cpu(out, [rows, n], "linear_gelu"), join(&partial, n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
        Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
    }

    #[test]
    fn values() -> Result<()> {
        let (x, w, b) = (random(&[2, 5, 3], 0)?, random(&[4, 3], 1)?, random(&[4], 2)?);
        let y = x.linear(&w, Some(&b))?;
        let truth = x.matmul(&w.t()?)?.add(&b)?.to_vec::<f64>()?;
        assert_eq!(y.shape(), [2, 5, 4]);
        assert!(y.to_vec::<f64>()?.iter().zip(&truth).all(|(a, b)| (a - b).abs() < 1e-12));
        let gelu = x.linear_gelu(&w, &b)?.to_vec::<f64>()?;
        let exact = |z: f64| 0.5 * z * (1.0 + libm::erf(z / 2f64.sqrt()));
        assert!(gelu.iter().zip(&truth).all(|(y, &z)| (y - exact(z)).abs() < 1e-12));
        assert_eq!(random(&[0], 0)?.linear(&random(&[2, 0], 1)?, None)?.to_vec::<f64>()?, [0.0; 2]);
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let (w, b) = (random(&[4, 3], 1)?, random(&[4], 2)?);
        let inputs = [random(&[2, 5, 3], 0)?, random(&[5, 2, 3], 0)?.transpose(0, 1)?, random(&[3], 0)?];
        for x in inputs {
            let all = [x.clone(), w.clone(), b.clone()];
            gradcheck(|t| t[0].linear(&t[1], Some(&t[2])), &all)?;
            gradcheck(|t| t[0].linear_gelu(&t[1], &t[2]), &all)?;
            gradcheck(|t| t[0].linear(&t[1], None), &[x, w.t()?.contiguous()?.t()?])?;
        }
        let tall = random(&[70, 2], 0)?;
        gradcheck(|t| tall.linear_gelu(&t[0], &t[1]), &[random(&[3, 2], 1)?, random(&[3], 2)?])?;
        gradcheck(|t| tall.linear(&t[0], Some(&t[1])), &[random(&[3, 2], 1)?, random(&[3], 2)?])
    }

    #[test]
    fn errors() -> Result<()> {
        let (x, w) = (random(&[2, 3], 0)?, random(&[4, 3], 1)?);
        assert!(x.linear(&w.t()?, None).is_err() && x.linear(&w, Some(&random(&[3], 0)?)).is_err());
        assert!(Tensor::scalar(1.0).linear(&w, None).is_err());
        assert!(x.to_dtype(DType::F32)?.linear(&w, None).is_err());
        Ok(())
    }
}
