//! Pooling, resizing, sampling and windows on a GPU: by kernels and not through the host, to the CPU's values, and so
//! that a graph can record them.
#![cfg(gpu)]

use smalti::{
    BackwardOptions, DType, Device, GridMode, GridOptions, GridPadding, InterpolateOptions, Interpolation,
    OutputSize, PoolDivisor, PoolOptions, Result, Rng, Tensor, gpu,
};

/// Operations of an image `[2, 8, 13, 11]` and places `[2, 5, 6, 2]`.
type Op = (&'static str, fn(&Tensor, &Tensor) -> Result<Tensor>);

fn resized(x: &Tensor, mode: Interpolation, antialias: bool, size: [usize; 2]) -> Result<Tensor> {
    let options = InterpolateOptions { mode, antialias, ..Default::default() };
    x.interpolate(OutputSize::Pixels(size), &options)
}

fn sampled(x: &Tensor, grid: &Tensor, mode: GridMode, padding: GridPadding) -> Result<Tensor> {
    x.grid_sample(grid, &GridOptions { mode, padding, align_corners: false })
}

const OPS: &[Op] = &[
    ("max_pool2d", |x, _| x.max_pool2d(PoolOptions::new(3, 2, 1))),
    ("avg_pool2d", |x, _| x.avg_pool2d(PoolOptions::new(3, 2, 1), PoolDivisor::WithPadding)),
    ("avg_pool2d without padding", |x, _| {
        x.avg_pool2d(PoolOptions::new(3, 2, 1), PoolDivisor::WithoutPadding)
    }),
    ("avg_pool2d by 5", |x, _| x.avg_pool2d(PoolOptions::new(2, 2, 0), PoolDivisor::Fixed(5))),
    ("adaptive_max_pool2d", |x, _| x.adaptive_max_pool2d([3, 2])),
    ("adaptive_avg_pool2d", |x, _| x.adaptive_avg_pool2d([3, 4])),
    ("global mean", |x, _| x.adaptive_avg_pool2d([1, 1])),
    ("global maximum", |x, _| x.adaptive_max_pool2d([1, 1])),
    ("nearest", |x, _| resized(x, Interpolation::Nearest, false, [20, 7])),
    ("bilinear", |x, _| resized(x, Interpolation::Bilinear, false, [20, 7])),
    ("bicubic", |x, _| resized(x, Interpolation::Bicubic, false, [20, 30])),
    ("area", |x, _| resized(x, Interpolation::Area, false, [4, 3])),
    ("bilinear, antialiased", |x, _| resized(x, Interpolation::Bilinear, true, [4, 3])),
    ("bicubic, antialiased", |x, _| resized(x, Interpolation::Bicubic, true, [3, 4])),
    ("grid_sample bilinear", |x, grid| sampled(x, grid, GridMode::Bilinear, GridPadding::Zeros)),
    ("grid_sample bicubic", |x, grid| sampled(x, grid, GridMode::Bicubic, GridPadding::Reflection)),
    ("grid_sample nearest", |x, grid| sampled(x, grid, GridMode::Nearest, GridPadding::Border)),
    ("unfold", |x, _| x.unfold([3, 2], [1, 2], [2, 1], [2, 1])),
    ("fold", |x, _| x.reshape([2, 4, 286])?.narrow(2, 0, 30)?.fold([7, 11], [2, 1], [1, 1], [0, 2], [3, 1])),
    ("affine_grid", |x, _| {
        x.reshape([2, 8 * 143])?.narrow(1, 0, 6)?.reshape([2, 2, 3])?.affine_grid([2, 1, 4, 5], true)
    }),
];

/// Result and gradients.
fn values(op: &Op, x: &Tensor, grid: &Tensor) -> Result<Vec<Tensor>> {
    let (x, grid) = (x.detach().requires_grad(), grid.detach().requires_grad());
    let y = op.1(&x, &grid)?;
    // a gradient that differs from place to place, and is there already when a graph is recorded
    let gradients = y.backward_with(&BackwardOptions { grad: Some(y.detach()), ..Default::default() })?;
    let all = [Some(&y), gradients.get(&x), gradients.get(&grid)];
    Ok(all.into_iter().flatten().map(Tensor::detach).collect())
}

fn inputs() -> Result<(Tensor, Tensor)> {
    let mut rng = Rng::new(5);
    let x = Tensor::randn([2, 8, 13, 11], &mut rng)?;
    Ok((x, Tensor::rand([2, 5, 6, 2], &mut rng)?.mul_scalar(2.6)?.add_scalar(-1.3)?))
}

fn close(name: &str, got: &[Tensor], want: &[Tensor], tolerance: f64) -> Result<()> {
    assert_eq!(got.len(), want.len(), "{name}");
    for (got, want) in got.iter().zip(want) {
        assert_eq!((got.shape(), got.dtype()), (want.shape(), want.dtype()), "{name}");
        let read = |t: &Tensor| t.to_device(Device::Cpu)?.to_dtype(DType::F64)?.to_vec::<f64>();
        let (got, want) = (read(got)?, read(want)?);
        let scale = want.iter().fold(1f64, |m, v| m.max(v.abs()));
        let worst = got.iter().zip(&want).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst <= tolerance * scale, "{name}: off by {worst:e} of {scale}");
    }
    Ok(())
}

/// One test, since a recording has the device for itself.
#[test]
fn on_a_gpu() -> Result<()> {
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(e) if std::env::var("SMALTI_DEVICE").is_ok_and(|name| name.starts_with("cuda")) => return Err(e),
        Err(_) => return Ok(()),
    };
    let (x, grid) = Device::Cpu.scope(inputs)?;
    kernels_give_the_values_of_the_cpu(device, &x, &grid)?;
    graphs_record_them(device, &x, &grid)
}

fn kernels_give_the_values_of_the_cpu(device: Device, x: &Tensor, grid: &Tensor) -> Result<()> {
    gpu::reset_host_operations();
    for (dtype, tolerance) in
        [(DType::F32, 3e-6), (DType::F64, 1e-13), (DType::BF16, 1.0 / 128.0), (DType::F16, 1.0 / 1024.0)]
    {
        for op in OPS {
            for last in [false, true] {
                let x = x.to_dtype(dtype)?;
                let x = if last { x.to_channels_last()? } else { x };
                let want = Device::Cpu.scope(|| values(op, &x, grid))?;
                let got = device.scope(|| values(op, &x.to_device(device)?, &grid.to_device(device)?))?;
                close(op.0, &got, &want, tolerance)?;
            }
        }
    }
    let through_host = gpu::host_operations();
    assert!(through_host.is_empty(), "{through_host:?}");
    Ok(())
}

fn graphs_record_them(device: Device, x: &Tensor, grid: &Tensor) -> Result<()> {
    let (on_gpu, places) = (x.to_device(device)?, grid.to_device(device)?);
    for op in OPS {
        let want = Device::Cpu.scope(|| values(op, x, grid))?;
        let step = || device.scope(|| values(op, &on_gpu, &places));
        step()?;
        let (graph, got) = gpu::Graph::capture(device, step)?;
        graph.launch()?;
        close(op.0, &got, &want, 3e-6)?;
    }
    Ok(())
}
