//! The three operations on a GPU, by its library.

use super::{Geometry, Kind, cpu::result_order};
use crate::{
    DType, Result, Tensor,
    cpu::elementwise::dense_strides,
    gpu::{self, Convolution, Image},
    shape::Dims,
};

/// Does the library take these sizes? It derives y's size from x's and demands that they fit, which a transposed
/// convolution with much output padding does not; and it knows no empty images.
pub fn takes(g: &Geometry) -> bool {
    let fits = |d: usize| {
        let (padded, span) =
            (g.x[d] + 2 * g.options.padding[d], g.options.dilation[d] * (g.kernel[d] - 1) + 1);
        padded >= span && (padded - span) / g.options.stride[d] + 1 == g.y[d]
    };
    g.batch > 0 && g.channels.iter().chain(&g.x).chain(&g.y).all(|&n| n > 0) && (0..2).all(fits)
}

/// Channels-last or row-major memory, whichever the images have.
fn arranged(t: &Tensor, order: &[usize]) -> Result<Tensor> {
    let mut back = [0; 4];
    for (i, &d) in order.iter().enumerate() {
        back[d] = i;
    }
    t.permute(order)?.contiguous()?.permute(back)
}

fn image(t: &Tensor, order: &[usize]) -> Image {
    let strides = dense_strides(t.shape(), order);
    Image {
        ptr: t.gpu_ptr(),
        shape: std::array::from_fn(|d| t.shape()[d]),
        // a tensor's own steps are arbitrary where a size is 1, and the layout is read off them
        strides: std::array::from_fn(|d| strides[d]),
    }
}

/// The values, in the memory order of `a`; `None` if the library has no algorithm for it.
pub fn run(
    op: &'static str,
    kind: Kind,
    g: &Geometry,
    a: &Tensor,
    b: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    // f64 is known to the library in row-major order only
    let wanted = result_order(a);
    let order = if a.dtype() == DType::F64 { Dims::from_slice(&[0, 1, 2, 3]) } else { wanted.clone() };
    let (a, b) = (arranged(a, &order)?, arranged(b, &order)?);
    let per_group = g.channels[0] / g.options.groups;
    let shape = match kind {
        Kind::Down => [g.batch, g.channels[1], g.y[0], g.y[1]],
        Kind::Up => [g.batch, g.channels[0], g.x[0], g.x[1]],
        Kind::Weight => [g.channels[1], per_group, g.kernel[0], g.kernel[1]],
    };
    let out = gpu::empty_strided(&a, &shape, dense_strides(&shape, &order), a.dtype(), op)?;
    let [ia, ib, io] = [&a, &b, &out].map(|t| image(t, &order));
    let (x, y, w) = match kind {
        Kind::Down => (ia, io, ib),
        Kind::Up => (io, ia, ib),
        Kind::Weight => (ia, ib, io),
    };
    let convolution =
        Convolution { op, kind, geometry: *g, dtype: a.dtype(), x, y, w, allow_tf32: gpu::allow_tf32() };
    if !gpu::convolve(&[Some(&a), Some(&b)], &convolution)? {
        return Ok(None);
    }
    // gradients of weights are as the CPU's
    let out = if kind == Kind::Weight { out.contiguous()? } else { arranged(&out, &wanted)? };
    Ok(Some(match bias {
        Some(bias) => out.add(&bias.reshape([shape[1], 1, 1])?)?,
        None => out,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ConvOptions, Device, Rng};

    /// Result and gradients on a GPU against those of the CPU in f64, NCHW and NHWC.
    #[test]
    fn as_the_cpu() -> Result<()> {
        let gpu = Device::cuda(0)?;
        let (plain, wide) =
            (ConvOptions::new(1, 1), ConvOptions { dilation: [1, 2], ..ConvOptions::new(2, 1) });
        let cases = [
            ([2, 4, 7, 6], [8, 4, 3, 3], plain),
            ([2, 4, 7, 6], [8, 2, 3, 2], ConvOptions { groups: 2, ..wide }),
            ([1, 3, 8, 8], [4, 3, 4, 4], ConvOptions::new(4, 0)),
            ([2, 4, 5, 5], [4, 1, 3, 3], plain.groups(4)),
            ([2, 1, 1, 1], [3, 1, 3, 3], plain),
        ];
        for (i, (x, w, options)) in cases.into_iter().enumerate() {
            for (dtype, step) in [(DType::F64, 1e-13), (DType::F32, 1e-6), (DType::BF16, 1.0 / 256.0)] {
                for last in [false, true] {
                    let run = |device, dtype| -> Result<Vec<Tensor>> {
                        let leaf = |shape: &[usize], seed| -> Result<Tensor> {
                            let t = Device::Cpu.scope(|| Tensor::randn(shape, &mut Rng::new(seed)))?;
                            let mut t = t.to_dtype(DType::BF16)?.to_dtype(dtype)?;
                            if last && shape.len() == 4 {
                                t = t.permute([0, 2, 3, 1])?.contiguous()?.permute([0, 3, 1, 2])?;
                            }
                            Ok(t.to_device(device)?.requires_grad())
                        };
                        let t = [leaf(&x, 1)?, leaf(&w, 2)?, leaf(&w[..1], 3)?];
                        let y = t[0].conv2d(&t[1], Some(&t[2]), options)?;
                        assert_eq!(result_order(&y), result_order(&t[0]), "memory order, case {i}");
                        let grads = y.to_dtype(dtype.computed_in())?.square()?.sum(())?.backward()?;
                        let mut all = vec![y.detach()];
                        all.extend(t.iter().filter_map(|t| grads.get(t).cloned()));
                        Ok(all)
                    };
                    let values = |t: &Tensor| t.to_device(Device::Cpu)?.to_dtype(DType::F64)?.to_vec::<f64>();
                    for (got, truth) in run(gpu, dtype)?.iter().zip(&run(Device::Cpu, DType::F64)?) {
                        assert_eq!((got.device(), got.shape()), (gpu, truth.shape()));
                        let (got, truth) = (values(got)?, values(truth)?);
                        let scale = truth.iter().fold(1e-30, |m: f64, t| m.max(t.abs()));
                        let worst = got.iter().zip(&truth).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                        assert!(
                            worst <= 6.0 * step * scale,
                            "case {i} {dtype} last {last}: {worst} of {scale}"
                        );
                    }
                }
            }
        }
        Ok(())
    }
}
