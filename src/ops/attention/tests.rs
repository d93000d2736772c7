use super::*;
use crate::{Rng, gradcheck};

fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
    Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
}

/// Plain loops over `[heads, L, D]`.
fn naive(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Vec<f64>> {
    let ([h, lq, d], [_, lk, _], [_, _, dv]) = (q.dims("")?, k.dims("")?, v.dims("")?);
    let (q, k, v) = (q.to_vec::<f64>()?, k.to_vec::<f64>()?, v.to_vec::<f64>()?);
    let mut out = vec![0.0; h * lq * dv];
    for i in 0..h * lq {
        let head = i / lq;
        let visible = if causal { lk.min(i % lq + 1) } else { lk };
        let logit = |j: usize| -> f64 {
            (0..d).map(|c| q[i * d + c] * k[(head * lk + j) * d + c]).sum::<f64>() / (d as f64).sqrt()
        };
        let weights: Vec<f64> = (0..visible).map(|j| logit(j).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (j, w) in weights.iter().enumerate() {
            (0..dv).for_each(|c| out[i * dv + c] += w / sum * v[(head * lk + j) * dv + c]);
        }
    }
    Ok(out)
}

fn close(a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() < tolerance, "{a} is not {b}");
    }
}

#[test]
fn values() -> Result<()> {
    // many heads; one head in several blocks; unequal lengths
    for (h, lq, lk) in [(9, 5, 7), (1, 70, 70), (2, 300, 3), (3, 1, 50), (1, 3, 40)] {
        let (q, k, v) = (random(&[h, lq, 6], 1)?, random(&[h, lk, 6], 2)?, random(&[h, lk, 4], 3)?);
        for causal in [false, true] {
            let exact = naive(&q, &k, &v, causal)?;
            let (out, _) = q.scaled_dot_product_attention(&k, &v, None, causal, None)?;
            close(&out.to_vec::<f64>()?, &exact, 1e-12);
            let [q, k, v] = [&q, &k, &v].map(|t| t.to_dtype(DType::F32));
            let (out, _) = q?.scaled_dot_product_attention(&k?, &v?, None, causal, None)?;
            close(&out.to_dtype(DType::F64)?.to_vec::<f64>()?, &exact, 1e-5);
        }
    }
    Ok(())
}

#[test]
fn gradients() -> Result<()> {
    let (q, k, v) = (random(&[2, 1, 5, 3], 1)?, random(&[2, 2, 4, 3], 2)?, random(&[2, 4, 2], 3)?);
    let bias = random(&[2, 1, 4], 4)?;
    for causal in [false, true] {
        let run =
            |t: &[Tensor]| Ok(t[0].scaled_dot_product_attention(&t[1], &t[2], t.get(3), causal, None)?.0);
        gradcheck(run, &[q.clone(), k.clone(), v.clone()])?;
        gradcheck(run, &[q.clone(), k.clone(), v.clone(), bias.clone()])?;
        // stored [B, L, H, D], and a last dimension that is not adjacent
        let stored = [0, 1, 2].map(|i| random(&[2, 4, 2, 3], i)?.permute([0, 2, 1, 3]));
        let [q, k, v] = stored;
        gradcheck(run, &[q?, k?, v?])?;
        let columns = [0, 1, 2].map(|i| random(&[3, 4], i)?.permute([1, 0]));
        let [q, k, v] = columns;
        gradcheck(run, &[q?, k?, v?])?;
    }
    // one head, several blocks of queries: shares of the gradients are added
    let long = [random(&[37, 2], 1)?, random(&[5, 2], 2)?, random(&[5, 1], 3)?];
    gradcheck(|t| Ok(t[0].scaled_dot_product_attention(&t[1], &t[2], None, true, Some(0.3))?.0), &long)
}

#[test]
fn packed() -> Result<()> {
    for causal in [false, true] {
        gradcheck(|t| t[0].attention(causal, None), &[random(&[2, 3, 3, 2, 4], 1)?])?;
    }
    gradcheck(
        |t| t[0].attention(false, Some(0.4)),
        &[random(&[3, 3, 1, 2, 4], 2)?.permute([2, 1, 0, 3, 4])?],
    )?;
    let qkv = random(&[2, 19, 3, 2, 4], 3)?.to_dtype(DType::F32)?;
    let [q, k, v] = unpack(&qkv);
    let (heads, _) = q.scaled_dot_product_attention(&k, &v, None, false, None)?;
    assert_eq!(heads.strides()[2], 8, "the memory order of the queries is kept");
    let out = qkv.attention(false, None)?;
    assert_eq!(out.to_vec::<f32>()?, heads.permute([0, 2, 1, 3])?.reshape([2, 19, 8])?.to_vec::<f32>()?);
    for dtype in [DType::BF16, DType::F16] {
        let half = qkv.to_dtype(dtype)?.attention(false, None)?;
        assert_eq!(half.dtype(), dtype);
        let wide = |t: &Tensor| t.to_dtype(DType::F64)?.to_vec::<f64>();
        close(&wide(&half)?, &wide(&out)?, 0.03);
    }
    Ok(())
}

/// A mask of one of the shapes that broadcast: boolean, or added with -infinity among its numbers.
fn mask(shape: &[usize], boolean: bool, seed: u64) -> Result<Tensor> {
    let noise = random(shape, seed)?;
    let hidden = noise.gt(&noise.full_like(0.7)?)?;
    if boolean { hidden.logical_not() } else { noise.masked_fill(&hidden, f64::NEG_INFINITY) }
}

#[test]
fn masks_of_all_shapes() -> Result<()> {
    let (q, k, v) = (random(&[2, 3, 5, 4], 1)?, random(&[2, 1, 6, 4], 2)?, random(&[2, 3, 6, 2], 3)?);
    // a mask is a log of factors for the weights: naive products with it
    let exact = |mask: &Tensor, causal: bool| -> Result<Vec<f64>> {
        let added = match mask.dtype() {
            DType::Bool => mask.to_dtype(DType::F64)?.log()?,
            _ => mask.clone(),
        };
        let mut weights = q.matmul(&k.t()?)?.mul_scalar(0.5)?.add(&added)?.exp()?;
        if causal {
            weights = weights.tril(0)?;
        }
        let sum = weights.sum_keepdim(-1)?;
        let none = sum.eq(&sum.zeros_like()?)?;
        weights.matmul(&v)?.div(&sum)?.masked_fill(&none, 0.0)?.to_vec::<f64>()
    };
    for shape in [&[6][..], &[5, 1], &[5, 6], &[3, 5, 6], &[2, 1, 1, 6], &[2, 3, 5, 6], &[1, 1]] {
        for (boolean, causal) in [(true, false), (false, false), (true, true), (false, true)] {
            let mask = mask(shape, boolean, 4)?;
            let (out, _) = q.scaled_dot_product_attention(&k, &v, Some(&mask), causal, None)?;
            close(&out.to_vec::<f64>()?, &exact(&mask, causal)?, 1e-12);
            let run = |t: &[Tensor]| {
                Ok(t[0].scaled_dot_product_attention(&t[1], &t[2], Some(&mask), causal, None)?.0)
            };
            gradcheck(run, &[q.clone(), k.clone(), v.clone()])?;
            for dtype in [DType::F32, DType::BF16] {
                let [q, k, v, m] = [&q, &k, &v, &mask]
                    .map(|t| if t.dtype() == DType::Bool { Ok(t.clone()) } else { t.to_dtype(dtype) });
                let (got, lse) = q?.scaled_dot_product_attention(&k?, &v?, Some(&m?), causal, None)?;
                assert_eq!((got.dtype(), lse.dtype()), (dtype, DType::F32));
                let tolerance = if dtype == DType::F32 { 1e-5 } else { 0.1 };
                close(&got.to_dtype(DType::F64)?.to_vec::<f64>()?, &out.to_vec::<f64>()?, tolerance);
            }
        }
    }
    // stored [B, L, H, D]
    let stored = q.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
    let (out, _) =
        stored.scaled_dot_product_attention(&k, &v, Some(&mask(&[5, 6], true, 4)?), false, None)?;
    assert_eq!(out.strides(), [30, 2, 6, 1], "the memory order of the queries is kept");
    Ok(())
}

#[cfg(feature = "emulate")]
#[test]
fn masks_stay_on_the_gpu() -> Result<()> {
    // a recording refuses whatever goes through the host
    let (_alone, gpu) = (crate::gpu::alone(), crate::Device::cuda(1)?);
    gpu.scope(|| {
        let leaf = |seed| random(&[2, 3, 5, 4], seed).map(|t| t.requires_grad());
        let (q, k, v) = (leaf(1)?, leaf(2)?, leaf(3)?);
        for boolean in [true, false] {
            let mask = mask(&[3, 1, 5], boolean, 4)?;
            let mask = if boolean { mask } else { mask.requires_grad() };
            let options = crate::BackwardOptions { grad: Some(q.detach()), ..Default::default() };
            let step = || {
                let (out, lse) = q.scaled_dot_product_attention(&k, &v, Some(&mask), true, None)?;
                Ok((out.backward_with(&options)?, lse))
            };
            crate::gpu::Graph::capture(gpu, step)?;
        }
        Ok(())
    })
}

#[test]
fn masks_and_edges() -> Result<()> {
    let (q, k, v) = (random(&[2, 3, 4], 1)?, random(&[2, 2, 4], 2)?, random(&[2, 2, 4], 3)?);
    let mask = Tensor::from_slice(&[true, true, false, false, false, true], [3, 2])?;
    let leaf = q.requires_grad();
    let (out, lse) = leaf.scaled_dot_product_attention(&k, &v, Some(&mask), false, None)?;
    assert_eq!(out.to_vec::<f64>()?[4..8], [0.0; 4], "nothing to attend to");
    assert_eq!(lse.to_vec::<f64>()?[1], f64::NEG_INFINITY);
    assert_eq!(out.to_vec::<f64>()?[8..12], v.to_vec::<f64>()?[4..8], "one key takes all the weight");
    let grads = out.sum(())?.backward()?;
    let dq = grads.get(&leaf).map(|g| g.to_vec::<f64>()).transpose()?.unwrap_or_default();
    assert!(dq.iter().all(|g| g.is_finite()) && dq[4..8] == [0.0; 4]);

    let empty = Tensor::zeros([2, 0, 4], DType::F32)?;
    let one = Tensor::ones([2, 3, 4], DType::F32)?;
    assert_eq!(empty.scaled_dot_product_attention(&one, &one, None, false, None)?.0.shape(), [2, 0, 4]);
    let (none, _) = one.scaled_dot_product_attention(&empty, &empty, None, false, None)?;
    assert_eq!(none.to_vec::<f32>()?, [0.0; 24]);
    assert!(q.scaled_dot_product_attention(&k, &one, None, false, None).is_err(), "dtypes differ");
    assert!(q.scaled_dot_product_attention(&random(&[2, 2, 5], 1)?, &v, None, false, None).is_err());
    assert!(q.scaled_dot_product_attention(&k, &v, Some(&q), false, None).is_err());
    assert!(q.attention(false, None).is_err());
    Ok(())
}
