//! smalti's side of the comparison.

#[cfg(target_arch = "x86_64")]
mod peak;
#[path = "../../worker.rs"]
mod worker;

use smalti::{
    BackwardOptions, ConvOptions, CrossEntropy, DType, Rng, Tensor,
    nn::{Block, BlockConfig, BlockNames, Gelu, Linear, Params, Statistics},
    optim::{AdamW, Algorithm, Optimizer, no_decay_1d},
};
use smalti_models::{
    backbones::resnet::{ResNet, ResNetConfig},
    mae::{Mae, MaeConfig},
};
use worker::shapes::{self, BATCH, DECODER, ENCODER, PATCHES, SIDE};
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

/// Gives the parameters the numbers that every worker computes on.
fn set(params: &Params, shapes: &[shapes::Parameter], seed: u32) -> smalti::Result<()> {
    let trained = params.trained();
    for (i, (param, (shape, scale, mean))) in trained.iter().zip(shapes).enumerate() {
        let value = tensor(shape, seed + i as u32, *scale, *mean)?;
        param.set(&value.reshape(param.value().shape())?)?;
    }
    Ok(())
}

fn vit_block(dy: Tensor) -> Result<Variant> {
    let (width, _, heads) = ENCODER;
    let params = Params::new();
    let config = BlockConfig {
        width,
        heads,
        mlp_ratio: 4.0,
        qkv_bias: true,
        eps: 1e-6,
        gelu: Gelu::Erf,
        drop_path: 0.0,
        causal: false,
        names: BlockNames::TIMM,
    };
    let block = Block::new(&params, config, &mut Rng::new(0))?;
    set(&params, &shapes::block(width), 10)?;
    let x = tensor(&X, 1, 1.0, 0.0)?.requires_grad();
    Ok(variant("nn::Block", move || {
        let y = block.forward(&x, None)?;
        let options = BackwardOptions { grad: Some(dy.clone()), ..Default::default() };
        let mut grads = y.backward_with(&options)?;
        let mut all = vec![y];
        all.push(grads.remove(&x).ok_or("a gradient is missing")?);
        for param in params.trained() {
            all.push(grads.remove(&param).ok_or("a gradient is missing")?);
        }
        Ok(outputs(all))
    }))
}

/// Gives a network's parameters their numbers, by a rule on names and shapes that the other workers have too.
fn set_network(params: &Params, seed: u32) -> smalti::Result<()> {
    for (i, param) in params.trained().iter().enumerate() {
        let shape = param.value().shape().to_vec();
        let fan = match shape[..] {
            [out, _, height, width] => out * height * width,
            _ => shape.iter().sum(),
        };
        let scale = if shape.len() == 1 { 0.1 } else { (6.0 / fan as f64).sqrt() };
        let gain = shape.len() == 1 && param.name().ends_with("weight");
        param.set(&tensor(&shape, seed + i as u32, scale, f64::from(u8::from(gain)))?)?;
    }
    Ok(())
}

fn resnet50() -> Result<Variant> {
    let (params, rng) = (Params::new(), &mut Rng::new(0));
    let config = ResNetConfig::preset(50).ok_or("no preset")?;
    let network = ResNet::new(&params, &config, Statistics::Batch, rng)?;
    let head = Linear::new(&params.sub("fc"), config.features(), 1000, true, rng)?;
    set_network(&params, 200)?;
    let images = tensor(&[BATCH, 3, SIDE, SIDE], 7, 1.7, 0.0)?.to_channels_last()?;
    let dy = tensor(&[BATCH, 1000], 9, 1.0, 0.0)?;
    Ok(variant("smalti_models::resnet, channels_last", move || {
        let y = head.forward(&network.forward(&images, true)?)?;
        let options = BackwardOptions { grad: Some(dy.clone()), ..Default::default() };
        let mut grads = y.backward_with(&options)?;
        let mut all = vec![y];
        for param in params.trained() {
            all.push(grads.remove(&param).ok_or("a gradient is missing")?);
        }
        Ok(outputs(all))
    }))
}

fn mae_step() -> Result<Variant> {
    let config = MaeConfig { norm_pix_loss: true, ..MaeConfig::preset("base").ok_or("no preset")? };
    let mae = Mae::new(&config, &mut Rng::new(0))?;
    set(mae.params(), &shapes::mae(), 100)?;
    for (name, seed, width) in [("pos_embed", 5, ENCODER.0), ("decoder_pos_embed", 6, DECODER.0)] {
        let table = mae.params().get(name).ok_or("no position table")?;
        table.set(&tensor(&[1, 1 + PATCHES, width], seed, 1.0, 0.0)?)?;
    }
    let trained = mae.params().trained();
    let adam = AdamW { betas: (0.9, 0.95), weight_decay: 0.05, ..Default::default() };
    let mut adam = adam.over(&trained, &[no_decay_1d(&trained)])?;
    let images = tensor(&[BATCH, 3, SIDE, SIDE], 7, 1.7, 0.0)?;
    let noise = tensor(&[BATCH, PATCHES], 8, 1.0, 0.0)?;
    Ok(variant("smalti_models::mae", move || {
        let loss = mae.forward(&images, mae.mask(&noise)?)?.loss;
        adam.step(&loss.backward()?, 1e-4)?;
        Ok(outputs(vec![loss]))
    }))
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
        let both = logits.cross_entropy(&labels, &options)?.add(&logits.t()?.cross_entropy(&labels, &options)?)?;
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
        (_, "softmax/forward") => vec![forward("softmax", vec![tensor(&X, 1, 4.0, 0.0)?], |x| x[0].softmax(-1))],
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
        (_, "vit_block") => vec![vit_block(dy()?)?],
        (_, "resnet50") => vec![resnet50()?],
        (_, "mae_step") => vec![mae_step()?],
        _ => return Ok(None),
    }))
}

fn main() -> Result<()> {
    // As the command line does: the main thread works too, instead of waking another and waiting for it.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global()?;
    serve("smalti", env!("CARGO_PKG_VERSION"), cases)
}
