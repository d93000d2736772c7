//! candle's side of the comparison. The fused `layer_norm` and `softmax_last_dim` have no backward: whatever is
//! differentiated uses the composed forms, as everybody who trains with candle has to.

#[path = "../../worker.rs"]
mod worker;

use candle_core::{D, Device, Tensor, Var};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW, ops};
use worker::shapes::{self, BATCH, DECODER, ENCODER, KEEP, PATCH, PATCHES, PIXELS, SIDE};
use worker::{Outputs, Result, Variant, fill, mean_square, serve, sizes, variant};

type Candle<T> = candle_core::Result<T>;

fn tensor(shape: &[usize], seed: u32, scale: f64, mean: f64) -> Candle<Tensor> {
    Tensor::from_vec(fill(shape.iter().product(), seed, scale, mean), shape, &Device::Cpu)
}

fn outputs(tensors: Vec<Tensor>) -> Outputs {
    let square = |t: &Tensor| Ok(mean_square(&t.flatten_all()?.to_vec1()?));
    Box::new(move || tensors.iter().map(square).collect())
}

fn forward(
    name: &'static str,
    inputs: Vec<Tensor>,
    f: impl Fn(&[Tensor]) -> Candle<Tensor> + 'static,
) -> Variant {
    variant(name, move || Ok(outputs(vec![f(&inputs)?])))
}

/// Forward and backward. `backward` starts from ones only: the gradient `dy` enters as the loss sum(y * dy).
fn backward(
    name: &'static str,
    dy: Tensor,
    inputs: Vec<Tensor>,
    f: impl Fn(&[Tensor]) -> Candle<Tensor> + 'static,
) -> Result<Variant> {
    let vars = inputs.iter().map(Var::from_tensor).collect::<Candle<Vec<_>>>()?;
    let leaves: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    Ok(variant(name, move || {
        let y = f(&leaves)?;
        let grads = (&y * &dy)?.sum_all()?.backward()?;
        let mut all = vec![y];
        for leaf in &leaves {
            all.push(grads.get(leaf).ok_or("a gradient is missing")?.clone());
        }
        Ok(outputs(all))
    }))
}

fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Candle<Tensor> {
    let scale = (q.dim(D::Minus1)? as f64).powf(-0.5);
    ops::softmax(&(q * scale)?.matmul(&k.t()?)?, D::Minus1)?.matmul(v)
}

fn linear(x: &Tensor, w: &Tensor, b: &Tensor) -> Candle<Tensor> {
    Linear::new(w.clone(), Some(b.clone())).forward(x)
}

/// `p`: norm1, qkv, proj, norm2, fc1, fc2, each weight and bias.
fn block(x: &Tensor, p: &[Tensor], heads: usize) -> Candle<Tensor> {
    let (n, t, c) = x.dims3()?;
    let h = ops::layer_norm_slow(x, &p[0], &p[1], 1e-6)?;
    let qkv = linear(&h, &p[2], &p[3])?.reshape((n, t, 3, heads, c / heads))?;
    let qkv = qkv.permute((2, 0, 3, 1, 4))?.contiguous()?;
    let o = attention(&qkv.get(0)?, &qkv.get(1)?, &qkv.get(2)?)?;
    let x = (x + linear(&o.transpose(1, 2)?.reshape((n, t, c))?, &p[4], &p[5])?)?;
    let h = ops::layer_norm_slow(&x, &p[6], &p[7], 1e-6)?;
    &x + linear(&linear(&h, &p[8], &p[9])?.gelu_erf()?, &p[10], &p[11])?
}

fn parameters(shapes: &[shapes::Parameter], seed: u32) -> Candle<Vec<Tensor>> {
    let one = |(i, (shape, scale, mean)): (usize, &shapes::Parameter)| {
        tensor(shape, seed + i as u32, *scale, *mean)
    };
    shapes.iter().enumerate().map(one).collect()
}

/// The loss of the official MAE, norm_pix_loss.
fn mae_loss(p: &[Tensor], pos: &Tensor, d_pos: &Tensor, imgs: &Tensor, noise: &Tensor) -> Candle<Tensor> {
    let ((w, depth, heads), (dw, d_depth, d_heads)) = (ENCODER, DECODER);
    let (cls, mask_token) = (&p[0], &p[1]);
    let index = |ids: Tensor, width: usize| ids.unsqueeze(2)?.repeat((1, 1, width))?.contiguous();
    let patch_w = p[2].reshape((w, 3, PATCH, PATCH))?;
    let x = imgs.conv2d(&patch_w, 0, PATCH, 1, 1)?.broadcast_add(&p[3].reshape((1, w, 1, 1))?)?;
    let x = x.flatten_from(2)?.transpose(1, 2)?.broadcast_add(&pos.narrow(1, 1, PATCHES)?)?;
    let shuffle = noise.arg_sort_last_dim(true)?;
    let restore = shuffle.arg_sort_last_dim(true)?;
    let x = x.contiguous()?.gather(&index(shuffle.narrow(1, 0, KEEP)?, w)?, 1)?;
    let mask = Tensor::ones((BATCH, PATCHES - KEEP), candle_core::DType::F32, &Device::Cpu)?;
    let mask = mask.pad_with_zeros(1, KEEP, 0)?.contiguous()?.gather(&restore, 1)?;

    let cls = cls.broadcast_add(&pos.narrow(1, 0, 1)?)?.repeat((BATCH, 1, 1))?;
    let mut x = Tensor::cat(&[&cls, &x], 1)?;
    let mut p = &p[4..];
    for _ in 0..depth {
        x = block(&x, &p[..12], heads)?;
        p = &p[12..];
    }
    x = linear(&ops::layer_norm_slow(&x, &p[0], &p[1], 1e-6)?, &p[2], &p[3])?;
    p = &p[4..];

    let hidden = mask_token.repeat((BATCH, PATCHES - KEEP, 1))?;
    let tokens = Tensor::cat(&[&x.narrow(1, 1, KEEP)?, &hidden], 1)?;
    let tokens = tokens.contiguous()?.gather(&index(restore, dw)?, 1)?;
    x = Tensor::cat(&[&x.narrow(1, 0, 1)?, &tokens], 1)?.broadcast_add(d_pos)?;
    for _ in 0..d_depth {
        x = block(&x, &p[..12], d_heads)?;
        p = &p[12..];
    }
    x = ops::layer_norm_slow(&x, &p[0], &p[1], 1e-6)?;
    let pred = linear(&x, &p[2], &p[3])?.narrow(1, 1, PATCHES)?;

    let g = SIDE / PATCH;
    let target = imgs.reshape((BATCH, 3, g, PATCH, g, PATCH))?.permute((0, 2, 4, 3, 5, 1))?;
    let target = target.reshape((BATCH, PATCHES, PIXELS))?;
    let (mean, var) = (target.mean_keepdim(2)?, target.var_keepdim(2)?);
    let target = target.broadcast_sub(&mean)?.broadcast_div(&(var + 1e-6)?.sqrt()?)?;
    let loss = (pred - target)?.sqr()?.mean(2)?;
    (loss * &mask)?.sum_all()? / mask.sum_all()?
}

fn mae_step() -> Result<Variant> {
    let vars = parameters(&shapes::mae(), 100)?.iter().map(Var::from_tensor).collect::<Candle<Vec<_>>>()?;
    let p: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let (decayed, plain): (Vec<Var>, Vec<Var>) = vars.into_iter().partition(|v| v.rank() > 1);
    let adamw = |vars, weight_decay| {
        AdamW::new(vars, ParamsAdamW { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay })
    };
    let mut optimizers = [adamw(decayed, 0.05)?, adamw(plain, 0.0)?];
    let pos = tensor(&[1, 1 + PATCHES, ENCODER.0], 5, 1.0, 0.0)?;
    let d_pos = tensor(&[1, 1 + PATCHES, DECODER.0], 6, 1.0, 0.0)?;
    let imgs = tensor(&[BATCH, 3, SIDE, SIDE], 7, 1.7, 0.0)?;
    let noise = tensor(&[BATCH, PATCHES], 8, 1.0, 0.0)?;
    Ok(variant("composed", move || {
        let loss = mae_loss(&p, &pos, &d_pos, &imgs, &noise)?;
        let grads = loss.backward()?;
        for optimizer in &mut optimizers {
            optimizer.step(&grads)?;
        }
        Ok(outputs(vec![loss]))
    }))
}

const X: [usize; 3] = [8, 197, 768];

fn rows() -> Candle<(Tensor, Tensor, Tensor)> {
    Ok((tensor(&X, 1, 2.0, 0.0)?, tensor(&X[2..], 2, 0.1, 1.0)?, tensor(&X[2..], 3, 0.1, 0.0)?))
}

fn cases(name: &str) -> Result<Option<Vec<Variant>>> {
    let plain = |shape: &[usize], seed| tensor(shape, seed, 1.0, 0.0);
    let dy = || plain(&X, 9);
    let kind = name.split('/').next().unwrap_or(name);
    Ok(Some(match (kind, name) {
        ("matmul", _) => {
            let [m, k, n] = sizes(name)?;
            vec![forward("matmul", vec![plain(&[m, k], 1)?, plain(&[k, n], 2)?], |x| x[0].matmul(&x[1]))]
        }
        ("qk", _) => {
            let shape = sizes::<4>(name)?;
            vec![forward("matmul", vec![plain(&shape, 1)?, plain(&shape, 2)?], |x| x[0].matmul(&x[1].t()?))]
        }
        ("av", _) => {
            let [b, h, t, d] = sizes(name)?;
            let inputs = vec![plain(&[b, h, t, t], 1)?, plain(&[b, h, t, d], 2)?];
            vec![forward("matmul", inputs, |x| x[0].matmul(&x[1]))]
        }
        (_, "layer_norm/forward") => {
            let (x, w, b) = rows()?;
            let inputs = vec![x, w, b];
            vec![
                forward("layer_norm", inputs.clone(), |x| ops::layer_norm(&x[0], &x[1], &x[2], 1e-6)),
                forward("layer_norm_slow", inputs, |x| ops::layer_norm_slow(&x[0], &x[1], &x[2], 1e-6)),
            ]
        }
        (_, "layer_norm/forward+backward") => {
            let (x, w, b) = rows()?;
            vec![backward("layer_norm_slow", dy()?, vec![x, w, b], |x| {
                ops::layer_norm_slow(&x[0], &x[1], &x[2], 1e-6)
            })?]
        }
        (_, "softmax/forward") => {
            let x = vec![tensor(&X, 1, 4.0, 0.0)?];
            vec![
                forward("softmax_last_dim", x.clone(), |x| ops::softmax_last_dim(&x[0])),
                forward("softmax", x, |x| ops::softmax(&x[0], D::Minus1)),
            ]
        }
        (_, "softmax/forward+backward") => {
            let x = vec![tensor(&X, 1, 4.0, 0.0)?];
            vec![backward("softmax", dy()?, x, |x| ops::softmax(&x[0], D::Minus1))?]
        }
        (_, "gelu/forward") => vec![forward("gelu_erf", vec![tensor(&X, 1, 3.0, 0.0)?], |x| x[0].gelu_erf())],
        (_, "gelu/forward+backward") => {
            vec![backward("gelu_erf", dy()?, vec![tensor(&X, 1, 3.0, 0.0)?], |x| x[0].gelu_erf())?]
        }
        ("attention", _) => {
            let shape = sizes::<4>(name)?;
            let qkv = (1..4).map(|seed| tensor(&shape, seed, 2.0, 0.0)).collect::<Candle<_>>()?;
            vec![backward("composed", plain(&shape, 9)?, qkv, |x| attention(&x[0], &x[1], &x[2]))?]
        }
        ("conv2d", _) => {
            let groups: usize = name.trim_start_matches("conv2d/groups").parse()?;
            let x = plain(&[8, 64, 56, 56], 1)?;
            let w = tensor(&[64, 64 / groups, 3, 3], 2, 0.1, 0.0)?;
            let dy = plain(&[8, 64, 56, 56], 9)?;
            vec![backward("conv2d", dy, vec![x, w], move |x| x[0].conv2d(&x[1], 1, 1, 1, groups))?]
        }
        (_, "vit_block") => {
            let mut inputs = vec![plain(&X, 1)?];
            inputs.extend(parameters(&shapes::block(X[2]), 10)?);
            vec![backward("composed", dy()?, inputs, |x| block(&x[0], &x[1..], 12))?]
        }
        (_, "mae_step") => vec![mae_step()?],
        _ => return Ok(None),
    }))
}

fn main() -> Result<()> {
    serve("candle", "0.11.1 (gemm x86-v4)", cases)
}
