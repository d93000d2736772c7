use super::*;
use crate::backbones::{checkpoint, resnet::BlockKind};
use smalti::optim::{Algorithm, Optimizer, Sgd};

fn config(stop_gradient: bool) -> SimSiamConfig {
    let (block, stem) = (BlockKind::Basic, Stem::Cifar);
    let backbone =
        ResNetConfig { block, layers: [1; 4], width: 4, stem, in_chans: 3, zero_init_residual: true };
    SimSiamConfig { backbone, dim: 16, pred_dim: 4, projector_layers: 2, stop_gradient }
}

/// ResNet-50, the figures of the official file.
#[test]
fn names_and_counts() -> Result<()> {
    let config = SimSiamConfig::preset("imagenet").unwrap();
    let model = SimSiam::new(&config, Statistics::Batch, &mut Rng::new(0))?;
    let params = model.params();
    assert_eq!((params.all().len(), params.count()), (343, 38_201_408));
    assert_eq!(params.sub("predictor").count(), 2_100_224);
    let bias = params.get("encoder.fc.6.bias").unwrap();
    let largest = bias.value().abs()?.amax(())?.item()?;
    assert!(!bias.is_trained() && largest > 0.021 && largest < 0.0221, "{largest}");
    assert!(params.get("encoder.fc.7.weight").is_none() && params.get("encoder.fc.3.bias").is_none());
    assert_eq!(params.get("encoder.layer1.0.bn3.weight").unwrap().value().amax(())?.item()?, 0.0);
    // two layers for CIFAR: the frozen bias is that of the second
    let small = SimSiam::new(&self::config(true), Statistics::Batch, &mut Rng::new(0))?;
    assert!(!small.params().get("encoder.fc.3.bias").unwrap().is_trained());
    assert!(small.params().get("encoder.fc.6.weight").is_none());
    Ok(())
}

/// The deviation of the channels after a few steps, with the loss.
fn train(stop_gradient: bool) -> Result<(f64, f64)> {
    let model = SimSiam::new(&config(stop_gradient), Statistics::Batch, &mut Rng::new(1))?;
    let mut sgd = Sgd { momentum: 0.9, ..Default::default() }.over(&model.params().trained(), &[])?;
    let mut rng = Rng::new(2);
    let mut last = (0.0, 0.0);
    for _ in 0..40 {
        let x = Tensor::randn([16, 3, 8, 8], &mut rng)?;
        let mut view = || x.add(&Tensor::randn([16, 3, 8, 8], &mut rng)?.mul_scalar(0.3)?);
        let out = model.forward(&view()?, &view()?)?;
        last = (z_norm_std(&out.z1)?.item()?, out.loss.item()?);
        sgd.step(&out.loss.backward()?, 0.1)?;
    }
    Ok(last)
}

/// Without the stopped gradient the loss goes to -1 at once and says nothing (§4.1).
#[test]
fn collapse_without_stop_gradient() -> Result<()> {
    let ((healthy, loss), (collapsed, lower)) = (train(true)?, train(false)?);
    println!("{healthy} {loss} {collapsed} {lower}");
    assert!(healthy > 0.6 / 4.0, "deviation {healthy}, loss {loss}");
    assert!(lower < loss && collapsed < healthy, "deviation {collapsed}, loss {lower}");
    Ok(())
}

/// A backbone out of a SimSiam file; MoCo's encoders do not pass for one.
#[test]
fn files() -> Result<()> {
    let model = SimSiam::new(&config(true), Statistics::Batch, &mut Rng::new(1))?;
    let params = Params::new();
    ResNet::new(&params, &config(true).backbone, Statistics::Batch, &mut Rng::new(2))?;
    let file = |prefix: &str| {
        let tensors = model.params().tensors().into_iter();
        tensors.map(|(name, t)| (format!("{prefix}{name}"), t)).collect::<Vec<_>>()
    };
    let report = checkpoint::load_backbone(&params, file("module."), "fc.")?;
    assert!(report.is_complete() && report.loaded == params.all().len());
    let names = |name: &str| name.replace("encoder.", "encoder_k.");
    let keys = file("module.").into_iter().map(|(name, t)| (names(&name), t)).collect();
    assert!(checkpoint::load_backbone(&params, keys, "fc.").is_err());
    checkpoint::load_model(model.params(), file(""))?;
    Ok(())
}
