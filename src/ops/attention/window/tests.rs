use super::*;
use crate::{Rng, gradcheck};

fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
    Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
}

/// Plain loops over `[B, H, W, 3, heads, D]` in windows of `size`, tables of `2 * size - 1` rows.
fn naive(
    qkv: &Tensor,
    size: [usize; 2],
    rel_pos: Option<(&Tensor, &Tensor)>,
    bias: Option<&Tensor>,
) -> Result<Vec<f64>> {
    let [b, h, w, _, heads, d] = qkv.dims("")?;
    let scale = 1.0 / (d as f64).sqrt();
    let x = qkv.to_vec::<f64>()?;
    let bias = bias.map_or(Ok(vec![0.0; 3 * heads * d]), |b| b.to_vec::<f64>())?;
    let tables = match rel_pos {
        Some((h, w)) => [h.to_vec::<f64>()?, w.to_vec::<f64>()?],
        None => [0, 1].map(|a| vec![0.0; (2 * size[a] - 1) * d]),
    };
    let part = |image: usize, [y, x_]: [usize; 2], part: usize, head: usize| -> &[f64] {
        let pad = (part * heads + head) * d;
        if y < h && x_ < w {
            let at = ((image * h + y) * w + x_) * 3 * heads * d + pad;
            &x[at..at + d]
        } else {
            &bias[pad..pad + d]
        }
    };
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let mut out = Vec::new();
    for (image, y, x_) in (0..b * h * w).map(|i| (i / (h * w), i / w % h, i % w)) {
        for head in 0..heads {
            let q = part(image, [y, x_], 0, head);
            let corner = [y / size[0] * size[0], x_ / size[1] * size[1]];
            let keys: Vec<[usize; 2]> =
                (0..size[0] * size[1]).map(|k| [corner[0] + k / size[1], corner[1] + k % size[1]]).collect();
            let weights: Vec<f64> = keys
                .iter()
                .map(|&k| {
                    let row = (y + size[0] - 1 - k[0]) * d;
                    let column = (x_ + size[1] - 1 - k[1]) * d;
                    let near = dot(q, &tables[0][row..row + d]) + dot(q, &tables[1][column..column + d]);
                    (scale * dot(q, part(image, k, 1, head)) + near).exp()
                })
                .collect();
            let sum: f64 = weights.iter().sum();
            for c in 0..d {
                let values = keys.iter().map(|&k| part(image, k, 2, head)[c]);
                out.push(weights.iter().zip(values).map(|(p, v)| p / sum * v).sum());
            }
        }
    }
    Ok(out)
}

fn worst(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    // written so that NaN counts
    a.iter().zip(b).fold(0.0, |m, (a, b)| if (a - b).abs() <= m { m } else { (a - b).abs() })
}

/// Image, window, heads, D. Windows that divide the image or do not, one that is larger, the whole image.
const CASES: &[([usize; 2], Option<usize>, usize, usize)] =
    &[([4, 4], Some(2), 2, 3), ([5, 7], Some(3), 1, 4), ([2, 3], Some(4), 2, 8), ([3, 5], None, 2, 5)];

struct Case {
    qkv: Tensor,
    tables: [Tensor; 2],
    bias: Tensor,
    size: [usize; 2],
}

fn case(&([h, w], window, heads, d): &([usize; 2], Option<usize>, usize, usize)) -> Result<Case> {
    let size = window.map_or([h, w], |n| [n, n]);
    Ok(Case {
        qkv: random(&[2, h, w, 3, heads, d], 1)?,
        tables: [random(&[2 * size[0] - 1, d], 2)?, random(&[2 * size[1] - 1, d], 3)?],
        bias: random(&[3 * heads * d], 4)?,
        size,
    })
}

#[test]
fn values() -> Result<()> {
    for sizes in CASES {
        let Case { qkv, tables: [rows, columns], bias, size } = case(sizes)?;
        let window = sizes.1;
        let exact = naive(&qkv, size, Some((&rows, &columns)), Some(&bias))?;
        let out = qkv.window_attention(window, Some((&rows, &columns)), Some(&bias), None)?;
        assert_eq!(out.shape(), [2, sizes.0[0], sizes.0[1], sizes.2 * sizes.3]);
        assert!(worst(&out.to_vec::<f64>()?, &exact) < 1e-12, "{sizes:?}");
        let plain = qkv.window_attention(window, None, None, None)?;
        assert!(worst(&plain.to_vec::<f64>()?, &naive(&qkv, size, None, None)?) < 1e-12, "{sizes:?}");
        let tracked = qkv.to_dtype(DType::F32)?;
        let out = tracked.window_attention(window, Some((&rows, &columns)), Some(&bias), None)?;
        assert_eq!(out.dtype(), DType::F32);
        assert!(worst(&out.to_dtype(DType::F64)?.to_vec::<f64>()?, &exact) < 1e-5, "{sizes:?}");
    }
    Ok(())
}

#[test]
fn gradients() -> Result<()> {
    for sizes in CASES {
        let Case { qkv, tables: [rows, columns], bias, .. } = case(sizes)?;
        let window = sizes.1;
        gradcheck(
            |t| t[0].window_attention(window, Some((&t[1], &t[2])), Some(&t[3]), Some(0.4)),
            &[qkv.clone(), rows, columns, bias.clone()],
        )?;
        gradcheck(|t| t[0].window_attention(window, None, Some(&t[1]), None), &[qkv, bias])?;
    }
    // a projection that is not adjacent in memory, tables of other lengths
    let stored = random(&[1, 4, 3, 3, 2, 4], 5)?.permute([0, 2, 1, 3, 4, 5])?;
    gradcheck(
        |t| t[0].window_attention(None, Some((&t[1], &t[2])), None, None),
        &[stored, random(&[7, 4], 6)?, random(&[5, 4], 7)?],
    )
}

#[test]
fn grids_of_two_sizes() -> Result<()> {
    for (queries, keys) in [([2, 3], [4, 3]), ([4, 6], [2, 3]), ([1, 1], [3, 2]), ([3, 4], [3, 4])] {
        let [lq, lk]: [usize; 2] = [queries, keys].map(|g: [usize; 2]| g[0] * g[1]);
        let rows = [0, 1].map(|a| 2 * queries[a].max(keys[a]) - 1);
        let inputs = [
            random(&[2, lq, 3], 1)?,
            random(&[2, lk, 3], 2)?,
            random(&[2, lk, 3], 3)?,
            random(&[rows[0], 3], 4)?,
            random(&[rows[1] + 2, 3], 5)?,
        ];
        let run = |t: &[Tensor]| t[0].relative_attention(&t[1], &t[2], (&t[3], &t[4]), queries, keys, None);
        gradcheck(|t| Ok(run(t)?.0), &inputs)?;
        assert_eq!(run(&inputs)?.1.shape(), [2, lq]);
    }
    Ok(())
}

#[test]
fn one_window_is_plain_attention() -> Result<()> {
    let qkv = random(&[2, 3, 4, 3, 2, 8], 1)?.to_dtype(DType::F32)?;
    let flat = qkv.reshape([2, 12, 3, 2, 8])?.attention(false, None)?.reshape([2, 3, 4, 16])?;
    let wide = |t: &Tensor| t.to_dtype(DType::F64)?.to_vec::<f64>();
    assert!(worst(&wide(&qkv.window_attention(None, None, None, None)?)?, &wide(&flat)?) < 1e-6);
    // table rows of zeros change nothing
    let zeros = [Tensor::zeros([5, 8], DType::F32)?, Tensor::zeros([7, 8], DType::F32)?];
    let out = qkv.window_attention(None, Some((&zeros[0], &zeros[1])), None, None)?;
    assert!(worst(&wide(&out)?, &wide(&flat)?) < 1e-6);
    for dtype in [DType::BF16, DType::F16] {
        let half = qkv.to_dtype(dtype)?.window_attention(None, Some((&zeros[0], &zeros[1])), None, None)?;
        assert_eq!(half.dtype(), dtype);
        assert!(worst(&wide(&half)?, &wide(&flat)?) < 0.03);
    }
    Ok(())
}

/// Gradients of half inputs come in the dtype of each input: f32 for f32 tables.
#[test]
fn dtypes_of_gradients() -> Result<()> {
    let qkv = random(&[1, 5, 5, 3, 2, 8], 1)?.to_dtype(DType::BF16)?.requires_grad();
    let tables = [
        random(&[5, 8], 2)?.to_dtype(DType::F32)?.requires_grad(),
        random(&[5, 8], 3)?.to_dtype(DType::BF16)?.requires_grad(),
    ];
    let bias = random(&[48], 4)?.to_dtype(DType::F32)?.requires_grad();
    let out = qkv.window_attention(Some(3), Some((&tables[0], &tables[1])), Some(&bias), None)?;
    let grads = out.to_dtype(DType::F32)?.sum(())?.backward()?;
    for (t, shape) in
        [(&qkv, &[1, 5, 5, 3, 2, 8][..]), (&tables[0], &[5, 8]), (&tables[1], &[5, 8]), (&bias, &[48])]
    {
        let grad = grads.get(t).map(|g| (g.dtype(), g.shape().to_vec()));
        assert_eq!(grad, Some((t.dtype(), shape.to_vec())));
    }
    Ok(())
}

#[test]
fn errors_name_what_is_wrong() -> Result<()> {
    let qkv = Tensor::zeros([1, 4, 4, 3, 2, 8], DType::F32)?;
    let table = Tensor::zeros([3, 7], DType::F32)?;
    assert!(qkv.window_attention(Some(0), None, None, None).is_err());
    assert!(qkv.window_attention(None, Some((&table, &table)), None, None).is_err());
    assert!(qkv.window_attention(None, None, Some(&table), None).is_err());
    assert!(qkv.reshape([1, 16, 3, 2, 8])?.window_attention(None, None, None, None).is_err());
    assert!(Tensor::zeros([1, 0, 4, 3, 2, 8], DType::F32)?.window_attention(None, None, None, None).is_err());
    let q = Tensor::zeros([1, 6, 8], DType::F32)?;
    let table = Tensor::zeros([3, 8], DType::F32)?;
    assert!(q.relative_attention(&q, &q, (&table, &table), [2, 2], [2, 3], None).is_err());
    Ok(())
}
