//! From tensors to products and convolutions of the device's library.

use super::{
    driver::{self, Convolution, Epilogue, Matrix, Product},
    graph, launch,
};
use crate::{
    Device, Error, Result, Tensor,
    shape::{Dims, Strides, broadcast_strides},
};
use std::sync::atomic::{AtomicBool, Ordering};

static ALLOW_TF32: AtomicBool = AtomicBool::new(false);

/// Lets products and convolutions of f32 tensors on GPUs round their operands to TF32, with 10 bits of mantissa
/// instead of 23, which is several times as fast. Off at first; holds for the whole process. The emulated device
/// computes in f32 all the same.
pub fn set_allow_tf32(allow: bool) {
    ALLOW_TF32.store(allow, Ordering::Relaxed);
}

/// Are operands rounded to TF32?
pub fn allow_tf32() -> bool {
    ALLOW_TF32.load(Ordering::Relaxed)
}

/// What a product does besides, on tensors.
#[derive(Clone, Copy)]
pub(crate) enum Besides<'a> {
    Nothing,
    /// Adds a vector to every row, before the result is rounded.
    Bias(&'a Tensor),
    /// Writes the sums over the rows of the left matrix into this vector.
    RowSums(&'a Tensor),
}

/// The device of all these tensors.
#[track_caller]
fn device_of(op: &'static str, tensors: &[Option<&Tensor>]) -> Result<usize> {
    let mut devices = tensors.iter().flatten().map(|t| t.device());
    let first = devices.next().unwrap_or(Device::Cpu);
    tensors.iter().flatten().for_each(|t| graph::touch(t));
    if let Some(other) = devices.find(|&d| d != first) {
        return Err(Error::op(op, format!("the tensors are on {first} and on {other}")));
    }
    match first {
        Device::Cuda(index) => graph::enter(index).map(|()| index),
        Device::Cpu => Err(Error::op(op, "internal: a tensor is on cpu, its library is on a GPU")),
    }
}

/// `y = a b` over a broadcast batch, `[.., m, k] x [.., k, n]`; `None` if the library cannot do it with what it
/// should do besides (which is then for the caller to do).
#[track_caller]
pub(crate) fn product(
    op: &'static str,
    a: &Tensor,
    b: &Tensor,
    batch: &[usize],
    besides: Besides,
) -> Result<Option<Tensor>> {
    let vector = match besides {
        Besides::Nothing => None,
        Besides::Bias(t) | Besides::RowSums(t) => Some(t),
    };
    let index = device_of(op, &[Some(a), Some(b), vector])?;
    let [m, k, n] = [a.shape()[a.rank() - 2], a.shape()[a.rank() - 1], b.shape()[b.rank() - 1]];
    let mut shape = Dims::from_slice(batch);
    shape.extend_from_slice(&[m, n]);
    let y = launch::empty(a, &shape, a.dtype(), op)?;
    if k == 0 || y.numel() == 0 {
        let zeros = y.numel() * y.dtype().size();
        unsafe { driver::zero(index, y.gpu_ptr(), zeros) }?;
        return Ok(matches!(besides, Besides::Nothing).then_some(y));
    }
    let (a, b) = (operand(a, m, k)?, operand(b, k, n)?);
    let mut plan = Plan::new(&a, &b, batch, [m, n, k]);
    plan.fold_rows();
    let epilogue = match besides {
        Besides::Nothing => Epilogue::None,
        Besides::Bias(t) => Epilogue::Bias(t.gpu_ptr()),
        Besides::RowSums(t) => Epilogue::RowSums(t.gpu_ptr()),
    };
    let done = plan.each(|[at_a, at_b, at_y], p| {
        let size = a.dtype().size() as isize;
        let at = |t: &Tensor, at: isize| t.gpu_ptr().wrapping_offset(at * size);
        let matrix = |ptr, m: &Matrix| Matrix { ptr, ..*m };
        let product = Product {
            op,
            dtype: a.dtype(),
            batch: p.count,
            size: p.size,
            a: matrix(at(&a, at_a), &p.a),
            b: matrix(at(&b, at_b), &p.b),
            y: matrix(at(&y, at_y), &p.y),
            epilogue,
            allow_tf32: allow_tf32(),
        };
        unsafe { driver::product(index, &product) }
    })?;
    if done {
        return Ok(Some(y));
    }
    match besides {
        Besides::Nothing => {
            Err(Error::op(op, format!("no algorithm for {:?} x {:?} in {}", a.shape(), b.shape(), a.dtype())))
        }
        _ => Ok(None),
    }
}

/// Runs a convolution on the device of its tensors; `false` if the library has no algorithm for it.
#[track_caller]
pub(crate) fn convolve(tensors: &[Option<&Tensor>], convolution: &Convolution) -> Result<bool> {
    let index = device_of(convolution.op, tensors)?;
    unsafe { driver::convolution(index, convolution) }
}

/// The tensor itself if its matrices can be read by rows or by columns, else a copy.
fn operand(t: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
    let [row, column] = inner(t);
    if reads(row, column, rows, columns) { Ok(t.clone()) } else { t.contiguous() }
}

fn inner(t: &Tensor) -> [isize; 2] {
    [t.strides()[t.rank() - 2], t.strides()[t.rank() - 1]]
}

/// Can a library read this matrix? One step is 1 and the other spans a row (or column).
fn reads(row: isize, column: isize, rows: usize, columns: usize) -> bool {
    let by_rows = (column == 1 || columns == 1) && (rows == 1 || row >= columns as isize);
    let by_columns = (row == 1 || rows == 1) && (columns == 1 || column >= rows as isize);
    by_rows || by_columns
}

/// The batch as few runs of matrices in even steps.
struct Plan {
    size: [usize; 3],
    a: Matrix,
    b: Matrix,
    y: Matrix,
    /// Matrices in the innermost run.
    count: usize,
    /// The other batch dimensions, innermost last: size and steps of a, b and y.
    outer: Vec<(usize, [isize; 3])>,
}

/// Matrices in one call: what a grid's third dimension counts to.
const MOST: usize = 65535;

impl Plan {
    fn new(a: &Tensor, b: &Tensor, batch: &[usize], [m, n, k]: [usize; 3]) -> Plan {
        let steps = |t: &Tensor| -> Strides {
            let lead = t.rank() - 2;
            broadcast_strides(&t.shape()[..lead], &t.strides()[..lead], batch)
        };
        let (step_a, step_b) = (steps(a), steps(b));
        let mut step_y = (m * n) as isize;
        let mut dims: Vec<(usize, [isize; 3])> = Vec::new();
        for d in (0..batch.len()).rev() {
            if batch[d] != 1 {
                dims.push((batch[d], [step_a[d], step_b[d], step_y]));
                step_y *= batch[d] as isize;
            }
        }
        // innermost first; neighbours with one even step are one dimension
        let mut outer: Vec<(usize, [isize; 3])> = Vec::new();
        for (size, step) in dims {
            match outer.last_mut() {
                Some((n, s)) if (0..3).all(|i| step[i] == s[i] * *n as isize) => *n *= size,
                _ => outer.push((size, step)),
            }
        }
        outer.reverse();
        let matrix = |[row, column]: [isize; 2]| Matrix { ptr: std::ptr::null_mut(), row, column, batch: 0 };
        let y = matrix([n as isize, 1]);
        let mut plan = Plan { size: [m, n, k], a: matrix(inner(a)), b: matrix(inner(b)), y, count: 1, outer };
        plan.take_run();
        plan
    }

    /// Makes the innermost remaining dimension the run.
    fn take_run(&mut self) {
        let (count, [a, b, y]) = self.outer.pop().unwrap_or((1, [0; 3]));
        self.count = count;
        (self.a.batch, self.b.batch, self.y.batch) = (a, b, y);
    }

    /// Left matrices that stand evenly below each other, against one right matrix, are one tall matrix.
    fn fold_rows(&mut self) {
        let [m, _, k] = self.size;
        if self.count == 1 || self.b.batch != 0 {
            return;
        }
        let row = if m == 1 { self.a.batch } else { self.a.row };
        let rows = m * self.count;
        if self.a.batch == row * m as isize && reads(row, self.a.column, rows, k) {
            self.a.row = row;
            self.size[0] = rows;
            self.take_run();
        }
    }

    /// Calls `f` with the offsets of a, b and y for every run, until one answers `false`.
    fn each(&self, mut f: impl FnMut([isize; 3], &Plan) -> Result<bool>) -> Result<bool> {
        let runs: usize = self.outer.iter().map(|d| d.0).product();
        for run in 0..runs {
            let (mut at, mut rest) = ([0; 3], run);
            for &(size, step) in self.outer.iter().rev() {
                let i = (rest % size) as isize;
                rest /= size;
                (0..3).for_each(|o| at[o] += i * step[o]);
            }
            for first in (0..self.count).step_by(MOST) {
                let i = first as isize;
                let at = [at[0] + i * self.a.batch, at[1] + i * self.b.batch, at[2] + i * self.y.batch];
                let count = MOST.min(self.count - first);
                let part = Plan { count, outer: Vec::new(), ..*self };
                if !f(at, &part)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng};

    fn random(shape: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
        Device::Cpu.scope(|| Tensor::randn(shape, &mut Rng::new(seed)))?.to_dtype(dtype)
    }

    /// Largest difference, with the largest magnitude of the truth.
    fn off(got: &Tensor, truth: &Tensor) -> Result<(f64, f64)> {
        assert_eq!(got.shape(), truth.shape());
        let values = |t: &Tensor| t.to_device(Device::Cpu)?.to_dtype(DType::F64)?.to_vec::<f64>();
        let (got, truth) = (values(got)?, values(truth)?);
        let worst = got.iter().zip(&truth).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        Ok((worst, truth.iter().fold(1e-30, |m, t| t.abs().max(m))))
    }

    /// Against the CPU's product of the same numbers in f64: one rounding of the result, and of f32 sums.
    fn check(a: &Tensor, b: &Tensor) -> Result<()> {
        let gpu = Device::cuda(0)?;
        let truth = a.to_dtype(DType::F64)?.matmul(&b.to_dtype(DType::F64)?)?;
        let y = a.to_device(gpu)?.matmul(&b.to_device(gpu)?)?;
        assert_eq!((y.device(), y.dtype()), (gpu, a.dtype()));
        let tolerance = match a.dtype() {
            DType::BF16 => 1.0 / 256.0,
            DType::F16 => 1.0 / 2048.0,
            DType::F32 => 2e-6,
            _ => 1e-14,
        };
        let (worst, scale) = off(&y, &truth)?;
        assert!(worst <= tolerance * scale, "{:?} {:?} {}: {worst}", a.shape(), b.shape(), a.dtype());
        Ok(())
    }

    #[test]
    fn shapes_strides_and_dtypes() -> Result<()> {
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let r = |shape: &[usize], seed| random(shape, dtype, seed);
            check(&r(&[3, 4], 0)?, &r(&[4, 5], 1)?)?;
            check(&r(&[4, 3], 0)?.t()?, &r(&[5, 4], 1)?.t()?)?;
            check(&r(&[1, 4], 0)?, &r(&[4, 1], 1)?)?;
            check(&r(&[2, 3, 4], 0)?, &r(&[4, 5], 1)?)?;
            check(&r(&[3, 2, 4], 0)?.transpose(0, 1)?, &r(&[4, 5], 1)?)?;
            check(&r(&[2, 3, 4], 0)?, &r(&[2, 5, 4], 1)?.t()?)?;
            check(&r(&[2, 1, 3, 4], 0)?, &r(&[3, 4, 2], 1)?)?;
            check(&r(&[2, 5, 3, 4], 0)?.transpose(0, 1)?, &r(&[5, 2, 4, 2], 1)?)?;
            check(&r(&[2, 3, 6], 0)?.narrow(2, 1, 4)?, &r(&[2, 4, 1], 1)?)?;
            check(&r(&[3, 1], 0)?.expand([3, 4])?, &r(&[4, 1], 1)?)?;
            check(&r(&[4], 0)?, &r(&[2, 4, 3], 1)?)?;
            check(&r(&[2, 0], 0)?, &r(&[0, 3], 1)?)?;
            check(&r(&[0, 2], 0)?, &r(&[2, 3], 1)?)?;
        }
        Ok(())
    }

    /// Heads of attention, [batch, tokens, heads, width] seen as [batch, heads, tokens, width]: read in place.
    #[test]
    fn operands_are_read_in_place() -> Result<()> {
        let gpu = Device::cuda(0)?;
        let x = random(&[2, 6, 3, 4], DType::F32, 0)?.to_device(gpu)?.transpose(1, 2)?;
        let plan = Plan::new(&x, &x.t()?, &[2, 3], [6, 6, 4]);
        assert_eq!((plan.count, plan.outer.len()), (3, 1));
        assert!(reads(plan.a.row, plan.a.column, 6, 4) && reads(plan.b.row, plan.b.column, 4, 6));
        let weight = random(&[4, 5], DType::F32, 0)?.to_device(gpu)?;
        let mut plan = Plan::new(&x.transpose(1, 2)?.contiguous()?, &weight, &[2, 6], [3, 5, 4]);
        plan.fold_rows();
        assert_eq!((plan.count, plan.size), (1, [36, 5, 4]));
        assert!(!reads(0, 1, 3, 4) && reads(0, 1, 1, 4) && !reads(2, 1, 3, 4) && !reads(2, 3, 3, 4));
        Ok(())
    }

    #[test]
    fn layers_in_half_round_once() -> Result<()> {
        let gpu = Device::cuda(0)?;
        for (dtype, step) in [(DType::BF16, 1.0 / 256.0), (DType::F16, 1.0 / 2048.0), (DType::F32, 1e-6)] {
            let inputs =
                [random(&[2, 9, 24], dtype, 0)?, random(&[16, 24], dtype, 1)?, random(&[16], dtype, 2)?];
            let run = |device, dtype, gelu: bool| -> Result<Vec<Tensor>> {
                let mut t = Vec::new();
                for x in &inputs {
                    t.push(x.to_dtype(dtype)?.to_device(device)?.requires_grad());
                }
                let y = if gelu { t[0].linear_gelu(&t[1], &t[2])? } else { t[0].linear(&t[1], Some(&t[2]))? };
                let grads = y.to_dtype(dtype.computed_in())?.square()?.sum(())?.backward()?;
                let mut all = vec![y.detach()];
                all.extend(t.iter().filter_map(|t| grads.get(t).cloned()));
                Ok(all)
            };
            for gelu in [false, true] {
                let (got, truth) = (run(gpu, dtype, gelu)?, run(Device::Cpu, DType::F64, gelu)?);
                assert_eq!((got.len(), truth.len()), (4, 4));
                for (i, (got, truth)) in got.iter().zip(&truth).enumerate() {
                    assert_eq!((got.device(), got.dtype()), (gpu, dtype));
                    let (worst, scale) = off(got, truth)?;
                    // gradients come from a rounded y
                    let allowed = if i == 0 { 1.5 * step } else { 6.0 * step };
                    assert!(worst <= allowed * scale, "{dtype} gelu {gelu} result {i}: {worst} of {scale}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn errors() -> Result<()> {
        let gpu = Device::cuda(0)?;
        let x = random(&[2, 2], DType::F32, 0)?;
        let there = x.to_device(gpu)?;
        assert!(there.matmul(&x).is_err());
        let ints = x.to_dtype(DType::I64)?.to_device(gpu)?;
        assert!(ints.matmul(&ints).is_err());
        assert!(!allow_tf32());
        Ok(())
    }
}
