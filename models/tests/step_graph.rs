//! A whole training step, recorded once and launched: forward, backward and update of a small masked autoencoder.
#![cfg(feature = "emulate")]

use smalti::{
    DType, Device, Result, Rng, Tensor,
    gpu::{Graph, host_operations, refill, reset_host_operations},
    optim::{AdamW, Algorithm, Optimizer},
};
use smalti_models::{
    backbones::vit::ImageSize,
    mae::{Mae, MaeConfig},
};

const GPU: Device = Device::Cuda(0);
const STEPS: u64 = 4;

fn model() -> Result<Mae> {
    let config = MaeConfig {
        img_size: ImageSize::Square(16),
        patch_size: 4,
        embed_dim: 32,
        depth: 2,
        num_heads: 2,
        decoder_embed_dim: 16,
        decoder_depth: 1,
        decoder_num_heads: 2,
        norm_pix_loss: true,
        ..MaeConfig::preset("base").ok_or_else(|| smalti::Error::msg("no preset"))?
    };
    Mae::new(&config, &mut Rng::new(1))
}

/// Images and noise of step `t`.
fn inputs(t: u64) -> Result<[Tensor; 2]> {
    let mut rng = Rng::new(10 + t);
    Device::Cpu.scope(|| Ok([Tensor::randn([3, 3, 16, 16], &mut rng)?, Tensor::rand([3, 16], &mut rng)?]))
}

fn lr(t: u64) -> f64 {
    1e-2 / (1.0 + t as f64)
}

fn step(
    model: &Mae,
    [images, noise]: &[Tensor; 2],
    optimizer: &mut impl Optimizer,
    lr: f64,
) -> Result<Tensor> {
    let loss = model.forward(images, model.mask(noise)?)?.loss;
    optimizer.step(&loss.backward()?, lr)?;
    Ok(loss.detach())
}

/// Losses of steps on the GPU, each sent to it or, from the second on, recorded and launched.
fn losses(dtype: DType, recorded: bool) -> Result<Vec<f64>> {
    let model = model()?;
    model.params().to_dtype(dtype)?;
    let mut optimizer =
        AdamW { weight_decay: 0.05, ..AdamW::default() }.over(&model.params().trained(), &[])?;
    let on_gpu = |t| -> Result<[Tensor; 2]> {
        let [images, noise] = inputs(t)?;
        Ok([images.to_device(GPU)?, noise.to_device(GPU)?])
    };
    let mut data = on_gpu(0)?;
    let mut found = vec![step(&model, &data, &mut optimizer, lr(0))?.item()?];
    let graph = match recorded {
        true => Some(Graph::capture(GPU, || step(&model, &data, &mut optimizer, f64::MAX))?),
        false => None,
    };
    for t in 1..STEPS {
        let loss = match &graph {
            Some((graph, loss)) => {
                for (tensor, values) in data.iter_mut().zip(inputs(t)?) {
                    refill(tensor, &values)?;
                }
                optimizer.next_step(lr(t))?;
                graph.launch()?;
                loss.item()?
            }
            None => step(&model, &on_gpu(t)?, &mut optimizer, lr(t))?.item()?,
        };
        found.push(loss);
    }
    Ok(found)
}

#[test]
fn a_recorded_step_is_the_step() -> Result<()> {
    GPU.scope(|| {
        for dtype in [DType::F32, DType::BF16] {
            reset_host_operations();
            let (sent, launched) = (losses(dtype, false)?, losses(dtype, true)?);
            assert!(sent.iter().all(|loss| loss.is_finite()) && sent[0] != sent[1]);
            assert_eq!(sent, launched, "{dtype}");
            assert!(host_operations().is_empty(), "{:?}", host_operations());
        }
        Ok(())
    })
}
