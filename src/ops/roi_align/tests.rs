use super::*;
use crate::{BackwardOptions, DType, Rng, gradcheck};

/// Inside, across every edge, outside, of no size, inside out, all of the image; images in no order.
const BOXES: [f64; 40] = [
    1.0, 3.1, 2.2, 9.7, 8.4, 0.0, -4.3, -3.1, 3.4, 2.2, 1.0, 6.3, 5.1, 20.7, 15.2, 0.0, 40.0, 40.0, 50.0,
    50.0, //
    1.0, 2.3, 2.3, 2.3, 2.3, 0.0, 7.2, 5.9, 2.1, 6.3, 0.0, 0.0, 0.0, 12.0, 10.0, 1.0, 3.1, 2.3, 3.4, 2.5,
];

fn boxes() -> Result<Tensor> {
    Tensor::from_slice(&BOXES, [8, 5])
}

fn variants() -> [RoiAlignOptions; 4] {
    let new = |output_size, spatial_scale, sampling_ratio, aligned| RoiAlignOptions {
        output_size,
        spatial_scale,
        sampling_ratio,
        aligned,
    };
    [
        new([2, 3], 0.5, -1, true),
        new([3, 2], 1.0, 0, false),
        new([2, 2], 0.7, 2, true),
        new([1, 2], 0.5, 6, false),
    ]
}

/// The value of one bin, sample by sample, as torchvision has it.
fn naive(x: &[f64], [c, h, w]: [usize; 3], b: &[f64], at: [usize; 3], o: &RoiAlignOptions) -> f64 {
    let shift = if o.aligned { 0.5 } else { 0.0 };
    let axis = |low: f64, high: f64, bins: usize, bin: usize| {
        let start = low * o.spatial_scale - shift;
        let extent = high * o.spatial_scale - shift - start;
        let length = if o.aligned { extent } else { extent.max(1.0) } / bins as f64;
        let n = if o.sampling_ratio > 0 { o.sampling_ratio } else { length.ceil() as i64 };
        (0..n)
            .map(|i| start + bin as f64 * length + (i as f64 + 0.5) * length / n as f64)
            .collect::<Vec<f64>>()
    };
    let rows = axis(b[2], b[4], o.output_size[0], at[1]);
    let columns = axis(b[1], b[3], o.output_size[1], at[2]);
    let plane = &x[(b[0] as usize * c + at[0]) * h * w..][..h * w];
    let mut sum = 0.0;
    for &y in &rows {
        for &x in &columns {
            if y < -1.0 || y > h as f64 || x < -1.0 || x > w as f64 {
                continue;
            }
            let (y, x) = (y.clamp(0.0, (h - 1) as f64), x.clamp(0.0, (w - 1) as f64));
            let (top, left) = (y as usize, x as usize);
            let (dy, dx) = (y - top as f64, x - left as f64);
            let (down, right) = ((top + 1).min(h - 1), (left + 1).min(w - 1));
            sum += plane[top * w + left] * (1.0 - dy) * (1.0 - dx) + plane[top * w + right] * (1.0 - dy) * dx;
            sum += plane[down * w + left] * dy * (1.0 - dx) + plane[down * w + right] * dy * dx;
        }
    }
    sum / (rows.len() * columns.len()).max(1) as f64
}

#[test]
fn values() -> Result<()> {
    let x = Tensor::randn([2, 3, 7, 8], &mut Rng::new(1))?.to_dtype(DType::F64)?;
    let v = x.to_vec::<f64>()?;
    for o in variants() {
        let y = x.roi_align(&boxes()?, &o)?;
        let last = x.to_channels_last()?.roi_align(&boxes()?, &o)?;
        assert_eq!(last.strides()[1], 1, "the memory order is kept");
        let single = x.to_dtype(DType::F32)?.roi_align(&boxes()?, &o)?.to_vec::<f32>()?;
        let (y, last) = (y.to_vec::<f64>()?, last.to_vec::<f64>()?);
        let [oh, ow] = o.output_size;
        for i in 0..y.len() {
            let (r, at) = (i / (3 * oh * ow), [i / (oh * ow) % 3, i / ow % oh, i % ow]);
            let exact = naive(&v, [3, 7, 8], &BOXES[5 * r..5 * r + 5], at, &o);
            assert!(
                (y[i] - exact).abs() < 1e-12 && (last[i] - exact).abs() < 1e-12,
                "{o:?}, box {r}: {} {exact}",
                y[i]
            );
            assert!((f64::from(single[i]) - exact).abs() < 1e-5);
        }
    }
    Ok(())
}

#[test]
fn gradients() -> Result<()> {
    let boxes = boxes()?;
    let x = Tensor::randn([2, 2, 5, 6], &mut Rng::new(2))?.to_dtype(DType::F64)?;
    for o in variants() {
        for x in [x.clone(), x.to_channels_last()?, x.transpose(2, 3)?] {
            gradcheck(|t| t[0].roi_align(&boxes, &o), &[x])?;
        }
    }
    Ok(())
}

#[test]
fn half_types_and_many_boxes() -> Result<()> {
    // enough boxes and channels for several tasks, and blocks of the kernels
    let mut rng = Rng::new(3);
    let x = Tensor::randn([2, 40, 9, 11], &mut rng)?;
    let numbers: Vec<f32> = (0..300)
        .flat_map(|i| {
            let [x, y, w, h] = [0; 4].map(|_| rng.range(-2.0, 30.0) as f32);
            [(i % 2) as f32, x, y, x + w, y + h]
        })
        .collect();
    let boxes = Tensor::from_slice(&numbers, [300, 5])?;
    let o = RoiAlignOptions::new([3, 3], 0.3);
    let run = |x: &Tensor, slope: &Tensor| -> Result<[Vec<f64>; 2]> {
        let leaf = x.requires_grad();
        let y = leaf.roi_align(&boxes, &o)?;
        let grad = Some(slope.to_dtype(x.dtype())?);
        let grads = y.backward_with(&BackwardOptions { grad, ..Default::default() })?;
        let dx = grads.get(&leaf).ok_or_else(|| Error::msg("no gradient"))?;
        assert_eq!((dx.dtype(), dx.strides()), (x.dtype(), x.strides()));
        let wide = |t: &Tensor| t.to_dtype(DType::F64)?.to_vec::<f64>();
        Ok([wide(&y)?, wide(dx)?])
    };
    let slope = Tensor::randn([300, 40, 3, 3], &mut rng)?;
    let exact = run(&x.to_dtype(DType::F64)?, &slope)?;
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 0.02), (DType::F16, 0.003)] {
        for x in [x.to_dtype(dtype)?, x.to_dtype(dtype)?.to_channels_last()?] {
            let got = run(&x, &slope)?;
            assert_eq!(got, run(&x, &slope)?, "the same bits again");
            for (got, exact) in got.iter().zip(&exact) {
                let scale = exact.iter().fold(1.0f64, |m, v| m.max(v.abs()));
                assert!(got.iter().zip(exact).all(|(a, b)| (a - b).abs() <= tolerance * scale), "{dtype}");
            }
        }
    }
    Ok(())
}

#[test]
fn edges_and_errors() -> Result<()> {
    let x = Tensor::ones([1, 2, 4, 4], DType::F32)?;
    let o = RoiAlignOptions::new([2, 2], 1.0);
    assert_eq!(x.roi_align(&Tensor::zeros([0, 5], DType::F32)?, &o)?.shape(), [0, 2, 2, 2]);
    let one = |b: [f32; 5]| Tensor::from_slice(&b, [1, 5]);
    assert_eq!(x.roi_align(&one([0.0, 0.0, 0.0, 4.0, 4.0])?, &o)?.to_vec::<f32>()?, [1.0; 8]);
    // huge boxes, and such as are none, end at once
    for b in
        [[0.0, -1e30, -1e30, 1e30, 1e30], [0.0, 0.0, 0.0, f32::INFINITY, 1.0], [0.0, f32::NAN, 0.0, 1.0, 1.0]]
    {
        for sampling_ratio in [0, 2] {
            let y = x.roi_align(&one(b)?, &RoiAlignOptions { sampling_ratio, ..o })?;
            assert!(y.to_vec::<f32>()?.iter().all(|v| (0.0..=1.0).contains(v)));
        }
    }
    for image in [1.0, -1.0, f32::NAN] {
        let y = x.roi_align(&one([image, 0.0, 0.0, 2.0, 2.0])?, &o);
        match x.device() {
            crate::Device::Cpu => assert!(y.is_err_and(|e| e.to_string().contains("belongs to image"))),
            _ => assert!(y?.to_vec::<f32>()?.iter().all(|v| v.is_nan())),
        }
    }
    let b = one([0.0, 0.0, 0.0, 2.0, 2.0])?;
    let text = x.roi_align(&b.narrow(1, 0, 4)?, &o).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(text.starts_with("roi_align: needs boxes [R, 5]") && text.contains("[1, 4]"), "{text}");
    assert!(
        x.roi_align(&b.to_dtype(DType::I64)?, &o).is_err()
            && x.to_dtype(DType::I64)?.roi_align(&b, &o).is_err()
    );
    assert!(x.narrow(2, 0, 0)?.roi_align(&b, &o).is_err() && x.select(0, 0)?.roi_align(&b, &o).is_err());
    assert!(x.roi_align(&b, &RoiAlignOptions { output_size: [0, 2], ..o }).is_err());
    assert!(x.roi_align(&b, &RoiAlignOptions { spatial_scale: f64::NAN, ..o }).is_err());
    let tracked = x.roi_align(&b.requires_grad(), &o)?.sum(())?.backward();
    assert!(matches!(tracked, Err(Error::NoGradient { op: "roi_align", .. })));
    Ok(())
}
