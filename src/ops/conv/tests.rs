use super::*;
use crate::{BackwardOptions, DType, Rng, gradcheck};

fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
    Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
}

/// The defining loop; `up` runs it the other way round.
fn naive(x: &Tensor, w: &Tensor, o: ConvOptions, y_size: [usize; 2]) -> Result<Vec<f64>> {
    let [n, _, h, wide] = x.dims::<4>("naive")?;
    let [out, per_group, kh, kw] = w.dims::<4>("naive")?;
    let (xs, ws) = (x.to_vec::<f64>()?, w.to_vec::<f64>()?);
    let c = per_group * o.groups;
    let mut y = vec![0.0; n * out * y_size[0] * y_size[1]];
    for (i, y) in y.iter_mut().enumerate() {
        let (b, k) = (i / y_size[1] / y_size[0] / out, i / y_size[1] / y_size[0] % out);
        let at = [i / y_size[1] % y_size[0], i % y_size[1]];
        for (j, &weight) in ws[k * per_group * kh * kw..][..per_group * kh * kw].iter().enumerate() {
            let tap = [j / kw % kh, j % kw];
            let channel = k / (out / o.groups) * per_group + j / kw / kh;
            let p = [0, 1]
                .map(|d| (at[d] * o.stride[d] + tap[d] * o.dilation[d]) as isize - o.padding[d] as isize);
            if p[0] >= 0 && p[1] >= 0 && p[0] < h as isize && p[1] < wide as isize {
                *y += weight * xs[((b * c + channel) * h + p[0] as usize) * wide + p[1] as usize];
            }
        }
    }
    Ok(y)
}

fn close(y: &Tensor, truth: &[f64], tolerance: f64) -> Result<()> {
    let y = y.to_dtype(DType::F64)?.to_vec::<f64>()?;
    assert_eq!(y.len(), truth.len());
    for (i, (y, t)) in y.iter().zip(truth).enumerate() {
        assert!((y - t).abs() <= tolerance * (1.0 + t.abs()), "element {i}: {y} {t}");
    }
    Ok(())
}

/// Within 1e-6 of the largest element.
fn close_to_scale(y: &Tensor, truth: &Tensor) -> Result<()> {
    let truth = truth.to_vec::<f64>()?;
    let scale = truth.iter().fold(0.0f64, |m, t| m.max(t.abs()));
    let y = y.to_dtype(DType::F64)?.mul_scalar(1.0 / scale)?;
    close(&y, &truth.iter().map(|t| t / scale).collect::<Vec<_>>(), 1e-6)
}

const CASES: [([usize; 4], [usize; 4], ConvOptions); 7] = {
    let o = ConvOptions { stride: [1, 1], padding: [1, 1], dilation: [1, 1], groups: 1 };
    [
        ([2, 3, 5, 6], [4, 3, 3, 3], o),
        ([1, 2, 7, 6], [3, 2, 3, 2], ConvOptions { stride: [2, 3], padding: [0, 2], ..o }),
        ([2, 4, 5, 5], [6, 2, 3, 3], ConvOptions { stride: [2, 1], dilation: [1, 2], groups: 2, ..o }),
        ([2, 3, 5, 4], [3, 1, 3, 3], ConvOptions { groups: 3, ..o }),
        ([2, 3, 4, 5], [5, 3, 1, 1], ConvOptions { padding: [0, 0], ..o }),
        ([2, 3, 5, 5], [2, 3, 1, 1], ConvOptions { stride: [3, 2], padding: [0, 0], ..o }),
        ([1, 2, 4, 4], [4, 1, 2, 2], ConvOptions { groups: 2, stride: [2, 2], padding: [0, 0], ..o }),
    ]
};

#[test]
fn values_and_gradients() -> Result<()> {
    for (x, w, o) in CASES {
        let (x, w, b) = (random(&x, 1)?, random(&w, 2)?, random(&w[..1], 3)?);
        let y = x.conv2d(&w, None, o)?;
        close(&y, &naive(&x, &w, o, [y.shape()[2], y.shape()[3]])?, 1e-12)?;
        let last = x.to_channels_last()?;
        close(&last.conv2d(&w, None, o)?, &y.to_vec::<f64>()?, 1e-12)?;
        for x in [x, last] {
            gradcheck(|t| t[0].conv2d(&t[1], Some(&t[2]), o), &[x, w.clone(), b.clone()])?;
        }
    }
    Ok(())
}

/// f32 takes other loops than f64: sizes that fill tiles, leave remainders, and need several passes.
#[test]
fn single_precision() -> Result<()> {
    let o = ConvOptions::new(1, 1);
    for (x, w, o) in [
        ([2, 40, 9, 17], [50, 40, 3, 3], o),
        ([1, 160, 6, 5], [33, 160, 3, 3], o),
        ([2, 3, 20, 20], [70, 3, 7, 7], ConvOptions::new(2, 3)),
        ([2, 48, 9, 9], [64, 24, 3, 3], ConvOptions::new(2, 1).groups(2)),
        ([2, 37, 9, 16], [37, 1, 3, 3], o.groups(37)),
        ([3, 20, 7, 7], [16, 20, 1, 1], ConvOptions::new(1, 0)),
        // many channels: far apart from pixel to pixel, in f64 already in the first
        ([2, 120, 3, 5], [200, 120, 1, 1], ConvOptions::new(1, 0)),
        ([2, 13, 4, 5], [260, 13, 3, 3], o),
    ] {
        let (x, w) = (random(&x, 1)?, random(&w, 2)?);
        let (x32, w32) = (x.to_dtype(DType::F32)?.requires_grad(), w.to_dtype(DType::F32)?.requires_grad());
        let (x, w) = (x.requires_grad(), w.requires_grad());
        for last in [false, true] {
            let arrange = |x: &Tensor| if last { x.to_channels_last() } else { Ok(x.clone()) };
            let (y, y32) = (x.conv2d(&w, None, o)?, arrange(&x32)?.conv2d(&w32, None, o)?);
            assert_eq!(y32.strides()[1] == 1, last);
            close_to_scale(&y32, &y)?;
            let (g, g32) = (y.mul(&y)?.sum(())?.backward()?, y32.mul(&y32)?.sum(())?.backward()?);
            for (a, a32) in [(&x, &x32), (&w, &w32)] {
                let zero = a.zeros_like()?;
                close_to_scale(g32.get(a32).unwrap_or(&zero), g.get(a).unwrap_or(&zero))?;
            }
        }
    }
    Ok(())
}

/// <y, conv(x)> = <conv_transpose(y), x>
#[test]
fn transposed() -> Result<()> {
    for (x, w, o) in CASES {
        let (x, w) = (random(&x, 1)?, random(&w, 2)?);
        let y = x.conv2d(&w, None, o)?;
        let g = random(y.shape(), 3)?;
        let full = g.conv_transpose2d(&w, None, o, [0, 0])?;
        let rest = [2, 3].map(|d| x.shape()[d] - full.shape()[d]);
        let back = g.conv_transpose2d(&w, None, o, rest)?;
        assert_eq!(back.shape(), x.shape());
        let (a, b) = (y.mul(&g)?.sum(())?.item()?, back.mul(&x)?.sum(())?.item()?);
        assert!((a - b).abs() < 1e-10, "{a} {b}");
        let b = random(&x.shape()[1..2], 4)?;
        gradcheck(|t| t[0].conv_transpose2d(&t[1], Some(&t[2]), o, rest), &[g, w, b])?;
    }
    Ok(())
}

#[test]
fn second_order() -> Result<()> {
    let (x, w, o) = (random(&[1, 2, 4, 4], 1)?, random(&[2, 2, 3, 3], 2)?, ConvOptions::new(2, 1));
    let gradient = |x: &Tensor| -> Result<(Tensor, Tensor)> {
        let (x, w) = (x.requires_grad(), w.requires_grad());
        let y = x.conv2d(&w, None, o)?;
        let options = BackwardOptions { create_graph: true, ..Default::default() };
        let grads = y.mul(&y)?.mul(&y)?.sum(())?.backward_with(&options)?;
        let total = [&x, &w].iter().try_fold(Tensor::zeros((), DType::F64)?, |sum, t| {
            grads.get(*t).map_or(Ok(sum.clone()), |g| sum.add(&g.mul(g)?.sum(())?))
        })?;
        let second = total.backward()?.get(&x).cloned().unwrap_or(x.zeros_like()?);
        Ok((total.detach(), second))
    };
    let (_, second) = gradient(&x)?;
    let (values, second) = (x.to_vec::<f64>()?, second.to_vec::<f64>()?);
    for i in 0..values.len() {
        let at = |delta: f64| -> Result<f64> {
            let mut moved = values.clone();
            moved[i] += delta;
            gradient(&Tensor::from_slice(&moved, x.shape())?)?.0.item()
        };
        let numeric = (at(1e-5)? - at(-1e-5)?) / 2e-5;
        assert!((numeric - second[i]).abs() < 1e-5 * numeric.abs().max(1.0), "{numeric} {}", second[i]);
    }
    Ok(())
}

#[test]
fn one_dimension_no_batch_and_errors() -> Result<()> {
    let (x, w) = (random(&[2, 4, 10], 1)?, random(&[6, 2, 3], 2)?);
    let o = ConvOptions { stride: [1, 2], padding: [0, 2], dilation: [1, 2], groups: 2 };
    assert_eq!(x.conv1d(&w, None, o)?.shape(), [2, 6, 5]);
    gradcheck(|t| t[0].conv1d(&t[1], None, o), &[x.clone(), w])?;
    let (image, w) = (random(&[3, 5, 5], 1)?, random(&[2, 3, 3, 3], 2)?);
    let o = ConvOptions::default();
    assert_eq!(image.conv2d(&w, None, o)?.shape(), [2, 3, 3]);
    let empty = random(&[0, 3, 5, 5], 1)?.requires_grad();
    let w = w.requires_grad();
    let grads = empty.conv2d(&w, None, o)?.sum(())?.backward()?;
    assert_eq!(grads.get(&w).map(|g| g.to_vec::<f64>()).transpose()?, Some(vec![0.0; 54]));
    assert!(image.conv2d(&w, Some(&random(&[3], 1)?), o).is_err() && x.conv2d(&w, None, o).is_err());
    assert!(image.conv2d(&w, None, ConvOptions { stride: [0, 1], ..o }).is_err());
    assert!(image.conv2d(&w, None, o.groups(2)).is_err());
    assert!(random(&[3, 2, 2], 1)?.conv2d(&w, None, o).is_err());
    assert!(random(&[2, 2, 2], 1)?.conv_transpose2d(&w, None, o, [1, 0]).is_err());
    let half = image.to_dtype(DType::BF16)?.conv2d(&w.to_dtype(DType::BF16)?, None, o)?;
    assert_eq!(half.dtype(), DType::BF16);
    Ok(())
}
