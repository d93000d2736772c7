//! Tensors out of nothing: from slices, constants, ranges, random numbers; and back to `Vec`.

use crate::{
    DType, Device, Result, Rng, Tensor,
    cpu::{
        parallel::{SharedMut, for_ranges},
        pool::CpuVec,
        simd::{ln_f32, simd, turn_f32},
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
    pub(crate) fn full_on(shape: impl IntoShape, value: f64, dtype: DType, device: Device) -> Result<Tensor> {
        let shape = shape.into_shape();
        checked_count("full", &shape, dtype.size())?;
        let one = match device {
            // made there, so that it can be part of a recorded graph
            #[cfg(gpu)]
            Device::Cuda(index) => crate::gpu::elementwise::full("full", index, &[], value, dtype)?,
            _ => {
                for_dtype!(dtype, T => Tensor::from_cpu(CpuVec::from_slice(&[T::from_f64(value)]), (), "full"))
            }
        };
        #[cfg(gpu)]
        crate::gpu::know(
            &one,
            crate::gpu::Known {
                below: (dtype == DType::I64 && value >= 0.0).then_some(value as i64 + 1),
                value: Some(value),
                ..Default::default()
            },
        );
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
        random::<false>("rand", shape.into_shape(), rng)
    }

    /// f32 numbers of the standard normal distribution (Box-Muller on pairs of words). The same bits on every
    /// device and for any number of threads: logarithm, sine and cosine are polynomials that round alike.
    ///
    /// # Errors
    /// If the shape is larger than the address space.
    #[track_caller]
    pub fn randn(shape: impl IntoShape, rng: &mut Rng) -> Result<Tensor> {
        random::<true>("randn", shape.into_shape(), rng)
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

/// Blocks of four words that are drawn together, so that Philox and the functions vectorise.
const BLOCKS: usize = 16;

/// f32 elements, four from each Philox block, uniform or normal.
#[track_caller]
fn random<const NORMAL: bool>(op: &'static str, shape: Dims, rng: &mut Rng) -> Result<Tensor> {
    let n = checked_count(op, &shape, 4)?;
    debug_assert_eq!(n, count(&shape));
    let first = rng.reserve(n as u64) / 4;
    let source = *rng;
    #[cfg(gpu)]
    if let (Device::Cuda(index), false) = (Device::current()?, crate::device::is_on_host()) {
        return gpu::random(op, index, &shape, &source, first, NORMAL);
    }
    let mut out = CpuVec::<f32>::new(n);
    let target = SharedMut::new(&mut out);
    for_ranges(n, 1 << 14, |range| {
        let start = range.start;
        let out = unsafe { target.slice(range) };
        for (i, out) in out.chunks_mut(4 * BLOCKS).enumerate() {
            let first = first + (start / 4 + i * BLOCKS) as u64;
            simd(
                #[inline(always)]
                || fill::<NORMAL>(&source.blocks(first), out),
            );
        }
    });
    Tensor::from_cpu(out, shape, op).placed()
}

#[inline(always)]
fn fill<const NORMAL: bool>(words: &[[u32; BLOCKS]; 4], out: &mut [f32]) {
    let mut values = [[0.0; BLOCKS]; 4];
    for w in 0..4 {
        for i in 0..BLOCKS {
            values[w][i] = unit_f32(words[w][i]);
        }
    }
    if NORMAL {
        for pair in [0, 2] {
            for i in 0..BLOCKS {
                let radius = (-2.0 * ln_f32(1.0 - values[pair][i])).sqrt();
                let (sin, cos) = turn_f32(values[pair + 1][i]);
                (values[pair][i], values[pair + 1][i]) = (radius * cos, radius * sin);
            }
        }
    }
    for (i, four) in out.chunks_mut(4).enumerate() {
        for (w, x) in four.iter_mut().enumerate() {
            *x = values[w][i];
        }
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::gpu::{self, sys};

    pub fn random(
        op: &'static str,
        index: usize,
        shape: &[usize],
        source: &Rng,
        block: u64,
        normal: bool,
    ) -> Result<Tensor> {
        let y = gpu::empty_on(index, shape, DType::F32, op)?;
        let [seed, philox_stream, _] = source.state();
        gpu::launch(op, [&y], |[y], stream| unsafe {
            sys::smalti_random(seed, philox_stream, block, normal.into(), &y, stream)
        })?;
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bits that every device gives; the kernels' own test prints them.
    #[test]
    fn normal_numbers_have_these_bits() -> Result<()> {
        let mut rng = Rng::from_state([0x12_3456_789a_bcde, 77, 4 * ((1 << 32) - 2)]);
        let x = Tensor::randn([40_003], &mut rng)?.to_vec::<f32>()?;
        assert_eq!([0, 1, 40_002].map(|i| x[i].to_bits()), [0x3f3f_febb, 0xbece_abc7, 0x3fd0_4951]);
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / x.len() as f64;
        let square = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
        assert!(mean.abs() < 0.02 && (square - 1.0).abs() < 0.02);
        Ok(())
    }
}
