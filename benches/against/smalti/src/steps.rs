//! Whole models and training steps.

use crate::{
    outputs, tensor, unit,
    worker::{
        Outputs, Result, Variant, fill,
        shapes::{self, BATCH, DECODER, ENCODER, PATCHES, SIDE},
        variant,
    },
};
use smalti::{
    BackwardOptions, Gradients, Rng, Tensor,
    comm::single,
    nn::{Block, BlockConfig, BlockNames, Gelu, Linear, Param, Params, Statistics},
    optim::{AdamW, Algorithm, Group, Optimizer, Sgd, no_decay_1d},
};
use smalti_models::{
    backbones::resnet::{ResNet, ResNetConfig},
    flip::{Flip, FlipConfig, Masking},
    mae::{Mae, MaeConfig},
    moco::{Moco, MocoConfig},
    simsiam::{SimSiam, SimSiamConfig, SimSiamOutput},
};

/// Gives the parameters the numbers that every worker computes on.
fn set(params: &Params, shapes: &[shapes::Parameter], seed: u32) -> smalti::Result<()> {
    let trained = params.trained();
    for (i, (param, (shape, scale, mean))) in trained.iter().zip(shapes).enumerate() {
        let value = tensor(shape, seed + i as u32, *scale, *mean)?;
        param.set(&value.reshape(param.value().shape())?)?;
    }
    Ok(())
}

pub fn vit_block(dy: Tensor) -> Result<Variant> {
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
    let x = tensor(&crate::X, 1, 1.0, 0.0)?.requires_grad();
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

/// Parameters by their names, buffers left out: an order that all workers have.
fn by_name(params: &Params) -> Vec<Param> {
    let mut all: Vec<Param> = params.all().into_iter().filter(|param| !param.is_buffer()).collect();
    all.sort_by(|a, b| a.name().cmp(b.name()));
    all
}

/// (scale, mean) of a parameter, as in torch_cases.py, which says why.
fn scale_and_mean(name: &str, shape: &[usize]) -> (f64, f64) {
    match shape {
        [out, _, height, width] => ((6.0 / (out * height * width) as f64).sqrt(), 0.0),
        [_, _, ..] => ((6.0 / shape.iter().sum::<usize>() as f64).sqrt(), 0.0),
        _ if name.ends_with("bn3.weight") => (0.01, 0.1),
        _ if name.ends_with("weight") => (0.1, 1.0),
        _ => (0.1, 0.0),
    }
}

/// Gives a network's parameters their numbers, by a rule on names and shapes that the other workers have too. A scalar
/// keeps its own.
fn set_network(params: &Params, seed: u32) -> smalti::Result<()> {
    for (i, param) in by_name(params).iter().enumerate() {
        let shape = param.value().shape().to_vec();
        if !shape.is_empty() {
            let (scale, mean) = scale_and_mean(param.name(), &shape);
            param.set(&tensor(&shape, seed + i as u32, scale, mean)?)?;
        }
    }
    Ok(())
}

/// What is compared: these results, and the gradients of `weights` of torch_cases.py.
fn compared(mut results: Vec<Tensor>, params: &Params, mut grads: Gradients) -> Result<Outputs> {
    let weight = |param: &Param| param.is_trained() && param.value().rank() > 1;
    for param in by_name(params).into_iter().filter(weight) {
        results.push(grads.remove(&param).ok_or_else(|| format!("{} has no gradient", param.name()))?);
    }
    Ok(outputs(results))
}

fn images(n: usize, seed: u32) -> smalti::Result<Tensor> {
    tensor(&[n, 3, SIDE, SIDE], seed, 1.7, 0.0)
}

pub fn resnet50() -> Result<Variant> {
    let (params, rng) = (Params::new(), &mut Rng::new(0));
    let config = ResNetConfig::preset(50).ok_or("no preset")?;
    let network = ResNet::new(&params, &config, Statistics::Batch, rng)?;
    let head = Linear::new(&params.sub("fc"), config.features(), 1000, true, rng)?;
    set_network(&params, 200)?;
    let x = images(BATCH, 7)?.to_channels_last()?;
    let dy = tensor(&[BATCH, 1000], 9, 1.0, 0.0)?;
    Ok(variant("smalti_models::resnet, channels_last", move || {
        let y = head.forward(&network.forward(&x, true)?)?;
        let options = BackwardOptions { grad: Some(dy.clone()), ..Default::default() };
        let grads = y.backward_with(&options)?;
        compared(vec![y], &params, grads)
    }))
}

const SGD: Sgd = Sgd { momentum: 0.9, dampening: 0.0, weight_decay: 1e-4, nesterov: false, maximize: false };

pub fn moco_v2_step() -> Result<Variant> {
    let config = MocoConfig::preset("v2").ok_or("no preset")?;
    let moco = Moco::new(&config, &single(), &mut Rng::new(0))?;
    let (query, key) = (moco.params().sub("encoder_q"), moco.params().sub("encoder_k"));
    set_network(&query, 300)?;
    set_network(&key, 300)?;
    let queue = moco.params().get("queue").ok_or("no queue")?;
    queue.set(&unit(&[config.queue, config.dim], 3)?.t()?.contiguous()?)?;
    let mut sgd = SGD.over(&query.trained(), &[])?;
    let (im_q, im_k, mut rng) = (images(BATCH, 7)?, images(BATCH, 8)?, Rng::new(1));
    Ok(variant("smalti_models::moco", move || {
        let loss = moco.forward(&im_q, &im_k, &mut rng)?.loss;
        let grads = loss.backward()?;
        sgd.step(&grads, 0.001)?;
        compared(vec![loss], &query, grads)
    }))
}

pub fn simsiam_step() -> Result<Variant> {
    let config = SimSiamConfig::preset("imagenet").ok_or("no preset")?;
    let model = SimSiam::new(&config, Statistics::Batch, &mut Rng::new(0))?;
    set_network(model.params(), 400)?;
    let mut sgd = SGD.over(&model.params().trained(), &[])?;
    let (x1, x2) = (images(BATCH, 7)?, images(BATCH, 8)?);
    Ok(variant("smalti_models::simsiam", move || {
        let SimSiamOutput { loss, p1, p2, .. } = model.forward(&x1, &x2)?;
        let grads = loss.backward()?;
        sgd.step(&grads, 0.0016)?;
        // the loss of an untrained network is nearly 0, so that it cannot be compared
        compared(vec![p1, p2], model.params(), grads)
    }))
}

/// Pairs of an image and a text in a step of FLIP and CLIP.
const PAIRS: usize = 16;

/// Texts of 8 to 38 tokens: start, words, end (the largest id, which is pooled), padding. See torch_flip.py.
fn texts(length: usize) -> smalti::Result<Tensor> {
    let mut ids: Vec<i64> =
        fill(PAIRS * length, 5, 1.0, 0.0).iter().map(|v| ((v + 1.0) * 20_000.0) as i64 + 1).collect();
    for (i, text) in ids.chunks_mut(length).enumerate() {
        let last = 7 + 2 * i;
        text[0] = 49_406;
        text[last] = 49_407;
        text[last + 1..].fill(0);
    }
    Tensor::from_slice(&ids, [PAIRS, length])
}

/// open_clip's ViT-B-16 with this part of the patches left out.
pub fn flip_step(mask_ratio: f64) -> Result<Variant> {
    let config = FlipConfig { mask_ratio, ..FlipConfig::open_clip("ViT-B-16").ok_or("no preset")? };
    let flip = Flip::new(&config, &mut Rng::new(0))?;
    set_network(flip.params(), 500)?;
    let trained = flip.params().trained();
    let flat = trained.iter().filter(|param| !flip.decays(param)).map(Param::name);
    let adam = AdamW { betas: (0.9, 0.98), eps: 1e-6, weight_decay: 0.2, ..Default::default() };
    let mut adam = adam.over(&trained, &[Group::named(flat).weight_decay(0.0)])?;
    let (images, tokens) = (images(PAIRS, 7)?, texts(config.text.context_length)?);
    let noise = tensor(&[PAIRS, PATCHES], 8, 1.0, 0.0)?;
    Ok(variant("smalti_models::flip", move || {
        let image = if mask_ratio > 0.0 { Some(flip.keep_patches(&noise)?) } else { None };
        let loss = flip.forward(&images, &tokens, &Masking { image, text: None }, &single())?.loss;
        let grads = loss.backward()?;
        adam.step(&grads, 1e-4)?;
        flip.clamp_scale()?;
        compared(vec![loss], flip.params(), grads)
    }))
}

pub fn mae_step() -> Result<Variant> {
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
    let images = images(BATCH, 7)?;
    let noise = tensor(&[BATCH, PATCHES], 8, 1.0, 0.0)?;
    Ok(variant("smalti_models::mae", move || {
        let loss = mae.forward(&images, mae.mask(&noise)?)?.loss;
        adam.step(&loss.backward()?, 1e-4)?;
        Ok(outputs(vec![loss]))
    }))
}
