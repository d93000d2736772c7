//! smalti's side of the comparison.

#[cfg(target_arch = "x86_64")]
mod peak;
mod steps;
#[path = "../../worker.rs"]
mod worker;

use smalti::{BackwardOptions, ConvOptions, CrossEntropy, DType, Tensor};
use worker::{Outputs, Result, Variant, fill, mean_square, serve, sizes, variant};

fn tensor(shape: &[usize], seed: u32, scale: f64, mean: f64) -> smalti::Result<Tensor> {
    Tensor::from_slice(&fill(shape.iter().product(), seed, scale, mean), shape)
}

fn outputs(tensors: Vec<Tensor>) -> Outputs {
    let square = |t: &Tensor| Ok(mean_square(&t.detach().to_vec::<f32>()?));
    Box::new(move || tensors.iter().map(square).collect())
}

fn forward(
    name: &'static str,
    inputs: Vec<Tensor>,
    f: impl Fn(&[Tensor]) -> smalti::Result<Tensor> + 'static,
) -> Variant {
    variant(name, move || Ok(outputs(vec![f(&inputs)?])))
}

fn backward(
    name: &'static str,
    dy: Tensor,
    inputs: Vec<Tensor>,
    f: impl Fn(&[Tensor]) -> smalti::Result<Tensor> + 'static,
) -> Variant {
    let leaves: Vec<Tensor> = inputs.iter().map(Tensor::requires_grad).collect();
    variant(name, move || {
        let y = f(&leaves)?;
        let options = BackwardOptions { grad: Some(dy.clone()), ..Default::default() };
        let mut grads = y.backward_with(&options)?;
        let mut all = vec![y];
        for leaf in &leaves {
            all.push(grads.remove(leaf).ok_or("a gradient is missing")?);
        }
        Ok(outputs(all))
    })
}

const X: [usize; 3] = [8, 197, 768];

fn rows() -> smalti::Result<Vec<Tensor>> {
    Ok(vec![tensor(&X, 1, 2.0, 0.0)?, tensor(&X[2..], 2, 0.1, 1.0)?, tensor(&X[2..], 3, 0.1, 0.0)?])
}

fn layer_norm(x: &[Tensor]) -> smalti::Result<Tensor> {
    x[0].layer_norm([X[2]], Some(&x[1]), Some(&x[2]), 1e-6)
}

fn conv2d(name: &str, plain: impl Fn(&[usize], u32) -> smalti::Result<Tensor>) -> Result<Vec<Variant>> {
    let groups: usize = name.trim_start_matches("conv2d/groups").parse()?;
    let options = ConvOptions { padding: [1, 1], groups, ..Default::default() };
    let (x, dy) = (plain(&[8, 64, 56, 56], 1)?, plain(&[8, 64, 56, 56], 9)?);
    let w = tensor(&[64, 64 / groups, 3, 3], 2, 0.1, 0.0)?;
    let conv = move |x: &[Tensor]| x[0].conv2d(&x[1], None, options);
    let last = vec![x.to_channels_last()?, w.clone()];
    Ok(vec![
        backward("nchw", dy.clone(), vec![x, w], conv.clone()),
        backward("channels_last", dy.to_channels_last()?, last, conv),
    ])
}

fn attention(name: &str) -> Result<Vec<Variant>> {
    let [b, h, t, d] = sizes(name)?;
    let qkv: Vec<Tensor> =
        (1..4).map(|seed| tensor(&[b, h, t, d], seed, 2.0, 0.0)).collect::<smalti::Result<_>>()?;
    let dy = tensor(&[b, h, t, d], 9, 1.0, 0.0)?;
    Ok(vec![backward("scaled_dot_product_attention", dy, qkv, |x| {
        Ok(x[0].scaled_dot_product_attention(&x[1], &x[2], None, false, None)?.0)
    })])
}

fn unit(shape: &[usize], seed: u32) -> smalti::Result<Tensor> {
    let x = tensor(shape, seed, 1.0, 0.0)?;
    x.div(&x.mul(&x)?.sum_keepdim(1)?.sqrt()?)
}

fn contrastive(name: &str) -> Result<Vec<Variant>> {
    let [n, d] = sizes(name)?;
    let one = || Tensor::from_slice(&[1f32], &[] as &[usize]);
    let scale = Tensor::from_slice(&[14f32], &[] as &[usize])?;
    let inputs = vec![unit(&[n, d], 1)?, unit(&[n, d], 2)?, scale];
    let labels = Tensor::arange(n, DType::I64)?;
    let options = CrossEntropy::default();
    let composed = move |x: &[Tensor]| {
        let logits = x[0].matmul(&x[1].t()?)?.mul(&x[2])?;
        let both =
            logits.cross_entropy(&labels, &options)?.add(&logits.t()?.cross_entropy(&labels, &options)?)?;
        both.mul_scalar(0.5)
    };
    Ok(vec![
        backward("contrastive_loss", one()?, inputs.clone(), |x| x[0].contrastive_loss(&x[1], &x[2])),
        backward("composed", one()?, inputs, composed),
    ])
}

fn info_nce(name: &str) -> Result<Vec<Variant>> {
    let [n, k, d] = sizes(name)?;
    let one = || Tensor::from_slice(&[1f32], &[] as &[usize]);
    let (key, queue) = (unit(&[n, d], 2)?, unit(&[k, d], 3)?.t()?.contiguous()?);
    let (same_key, same_queue) = (key.clone(), queue.clone());
    let labels = Tensor::zeros([n], DType::I64)?;
    let composed = move |x: &[Tensor]| {
        let positive = x[0].mul(&same_key)?.sum_keepdim(1)?;
        let logits = Tensor::cat(&[positive, x[0].matmul(&same_queue)?], 1)?.mul_scalar(1.0 / 0.07)?;
        logits.cross_entropy(&labels, &CrossEntropy::default())
    };
    let inputs = vec![unit(&[n, d], 1)?];
    Ok(vec![
        backward("info_nce", one()?, inputs.clone(), move |x| Ok(x[0].info_nce(&key, &queue, 0.07)?.loss)),
        backward("composed", one()?, inputs, composed),
    ])
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
        (_, "layer_norm/forward") => vec![forward("layer_norm", rows()?, layer_norm)],
        (_, "layer_norm/forward+backward") => vec![backward("layer_norm", dy()?, rows()?, layer_norm)],
        (_, "softmax/forward") => {
            vec![forward("softmax", vec![tensor(&X, 1, 4.0, 0.0)?], |x| x[0].softmax(-1))]
        }
        (_, "softmax/forward+backward") => {
            vec![backward("softmax", dy()?, vec![tensor(&X, 1, 4.0, 0.0)?], |x| x[0].softmax(-1))]
        }
        (_, "gelu/forward") => vec![forward("gelu", vec![tensor(&X, 1, 3.0, 0.0)?], |x| x[0].gelu())],
        (_, "gelu/forward+backward") => {
            vec![backward("gelu", dy()?, vec![tensor(&X, 1, 3.0, 0.0)?], |x| x[0].gelu())]
        }
        #[cfg(target_arch = "x86_64")]
        ("fma_peak", _) => peak::variants(sizes::<1>(name)?[0]),
        ("attention", _) => attention(name)?,
        ("contrastive", _) => contrastive(name)?,
        ("info_nce", _) => info_nce(name)?,
        ("conv2d", _) => conv2d(name, plain)?,
        (_, "vit_block") => vec![steps::vit_block(dy()?)?],
        (_, "resnet50") => vec![steps::resnet50()?],
        (_, "moco_v2_step") => vec![steps::moco_v2_step()?],
        (_, "simsiam_step") => vec![steps::simsiam_step()?],
        (_, "flip_step") => vec![steps::flip_step(0.5)?],
        (_, "clip_step") => vec![steps::flip_step(0.0)?],
        (_, "mae_step") => vec![steps::mae_step()?],
        _ => return Ok(None),
    }))
}

fn main() -> Result<()> {
    // As the command line does: the main thread works too, instead of waking another and waiting for it.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global()?;
    serve("smalti", env!("CARGO_PKG_VERSION"), cases)
}
