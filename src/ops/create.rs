//! Tensors out of nothing: from slices, constants, ranges, random numbers; and back to `Vec`.

use crate::{
    DType, Device, Result, Rng, Tensor,
    cpu::{
        parallel::{SharedMut, for_ranges},
        pool::CpuVec,
    },
    dtype::Element,
    ensure, for_dtype,
    random::unit_f32,
    shape::{Dims, IntoShape, Strides, checked_count, count},
};

impl Tensor {
    /// A tensor of `values` in row-major order: `Tensor::from_slice(&[1f32, 2., 3.], [3])?`.
    ///
    /// # Errors
    /// If the shape does not have as many elements as there are values.
    #[track_caller]
    pub fn from_slice<T: Element>(values: &[T], shape: impl IntoShape) -> Result<Tensor> {
        let shape = shape.into_shape();
        let n = checked_count("from_slice", &shape, size_of::<T>())?;
        ensure!(n == values.len(), "from_slice", "shape {shape:?} needs {n} values, got {}", values.len());
        Tensor::from_cpu(CpuVec::from_slice(values), shape, "from_slice").placed()
    }

    /// A scalar (rank 0) of type f32. It stays on the CPU if the current device cannot be had: one number may meet
    /// tensors of any device.
    pub fn scalar(value: f32) -> Tensor {
        let scalar = Tensor::from_cpu(CpuVec::from_slice(&[value]), (), "scalar");
        scalar.placed().unwrap_or(scalar)
    }

    /// All elements `value`, rounded to `dtype`. Stored once and expanded: costs no memory until it is written.
    ///
    /// # Errors
    /// If the shape is larger than the address space.
    #[track_caller]
    pub fn full(shape: impl IntoShape, value: f64, dtype: DType) -> Result<Tensor> {
        Tensor::full_on(shape, value, dtype, Device::current()?)
    }

    #[track_caller]
    fn full_on(shape: impl IntoShape, value: f64, dtype: DType, device: Device) -> Result<Tensor> {
        let shape = shape.into_shape();
        checked_count("full", &shape, dtype.size())?;
        let one =
            for_dtype!(dtype, T => Tensor::from_cpu(CpuVec::from_slice(&[T::from_f64(value)]), (), "full"));
        let one = one.transferred(device)?;
        let strides = Strides::from_elem(0, shape.len());
        Ok(one.view_as(shape, strides, 0, "full"))
    }

    /// All zeros.
    ///
    /// # Errors
    /// If the shape is larger than the address space.
    #[track_caller]
    pub fn zeros(shape: impl IntoShape, dtype: DType) -> Result<Tensor> {
        Tensor::full(shape, 0.0, dtype)
    }

    /// All ones.
    ///
    /// # Errors
    /// If the shape is larger than the address space.
    #[track_caller]
    pub fn ones(shape: impl IntoShape, dtype: DType) -> Result<Tensor> {
        Tensor::full(shape, 1.0, dtype)
    }

    /// Zeros of this tensor's shape, dtype and device.
    ///
    /// # Errors
    /// None on the CPU.
    pub fn zeros_like(&self) -> Result<Tensor> {
        self.full_like(0.0)
    }

    /// Ones of this tensor's shape, dtype and device.
    ///
    /// # Errors
    /// None on the CPU.
    pub fn ones_like(&self) -> Result<Tensor> {
        self.full_like(1.0)
    }

    /// `value` in this tensor's shape, dtype and device.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn full_like(&self, value: f64) -> Result<Tensor> {
        Tensor::full_on(self.shape(), value, self.dtype(), self.device())
    }

    /// The numbers 0, 1, .., n - 1.
    ///
    /// # Errors
    /// If the shape is larger than the address space.
    #[track_caller]
    pub fn arange(n: usize, dtype: DType) -> Result<Tensor> {
        checked_count("arange", &[n], dtype.size())?;
        for_dtype!(dtype, T => {
            let mut out = CpuVec::<T>::new(n);
            out.iter_mut().enumerate().for_each(|(i, x)| *x = T::from_i64(i as i64));
            Tensor::from_cpu(out, [n], "arange").placed()
        })
    }

    /// f32 numbers uniform in [0, 1), 24 bits each. The same on every device and for any number of threads.
    ///
    /// # Errors
    /// If the shape is larger than the address space.
    #[track_caller]
    pub fn rand(shape: impl IntoShape, rng: &mut Rng) -> Result<Tensor> {
        random("rand", shape.into_shape(), rng, |words, out| {
            for (x, word) in out.iter_mut().zip(words) {
                *x = unit_f32(word);
            }
        })
    }

    /// f32 numbers of the standard normal distribution (Box-Muller on pairs of words).
    ///
    /// # Errors
    /// If the shape is larger than the address space.
    #[track_caller]
    pub fn randn(shape: impl IntoShape, rng: &mut Rng) -> Result<Tensor> {
        random("randn", shape.into_shape(), rng, |words, out| {
            let mut values = [0.0; 4];
            for pair in 0..2 {
                let radius = (-2.0 * (1.0 - unit_f32(words[2 * pair])).ln()).sqrt();
                let (sin, cos) = (std::f32::consts::TAU * unit_f32(words[2 * pair + 1])).sin_cos();
                values[2 * pair] = radius * cos;
                values[2 * pair + 1] = radius * sin;
            }
            out.copy_from_slice(&values[..out.len()]);
        })
    }

    /// The elements in row-major order.
    ///
    /// # Errors
    /// If the dtype is not `T`; convert with [`to_dtype`](Self::to_dtype) first.
    #[track_caller]
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        ensure!(self.dtype() == T::DTYPE, "to_vec", "the tensor is {}, asked for {}", self.dtype(), T::DTYPE);
        let t = self.detach().contiguous()?.transferred(Device::Cpu)?;
        Ok(t.cpu_slice::<T>().to_vec())
    }

    /// The one element of a tensor, as f64.
    ///
    /// # Errors
    /// If it has more than one element or none.
    #[track_caller]
    pub fn item(&self) -> Result<f64> {
        ensure!(self.numel() == 1, "item", "needs one element, got shape {:?}", self.shape());
        let one = self.detach().contiguous()?.transferred(Device::Cpu)?;
        for_dtype!(self.dtype(), T => Ok(unsafe { *one.cpu_ptr::<T>() }.to_f64()))
    }
}

/// Fills f32 elements, four from each Philox block.
#[track_caller]
fn random(
    op: &'static str,
    shape: Dims,
    rng: &mut Rng,
    fill: impl Fn([u32; 4], &mut [f32]) + Sync,
) -> Result<Tensor> {
    let n = checked_count(op, &shape, 4)?;
    debug_assert_eq!(n, count(&shape));
    let first = rng.reserve(n as u64) / 4;
    let source = *rng;
    let mut out = CpuVec::<f32>::new(n);
    let target = SharedMut::new(&mut out);
    for_ranges(n, 1 << 14, |range| {
        let start = range.start;
        let out = unsafe { target.slice(range) };
        for (i, four) in out.chunks_mut(4).enumerate() {
            fill(source.block(first + (start / 4 + i) as u64), four);
        }
    });
    Tensor::from_cpu(out, shape, op).placed()
}
