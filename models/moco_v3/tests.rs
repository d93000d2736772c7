use super::*;
use crate::backbones::{
    BackboneConfig, checkpoint,
    resnet::{BlockKind, ResNetConfig, Stem},
    vit::{ImageSize, VitConfig},
};
use smalti::{
    comm::{single, threads},
    nn::Gelu,
};

/// A small transformer for images of 16 pixels.
pub(crate) fn vit(conv_stem: bool) -> BackboneConfig {
    BackboneConfig::Vit(VitConfig {
        img_size: ImageSize::Square(16),
        patch_size: if conv_stem { 16 } else { 8 },
        in_chans: 3,
        embed_dim: 16,
        depth: 1,
        num_heads: 2,
        mlp_ratio: 2.0,
        qkv_bias: true,
        layer_norm_eps: 1e-6,
        gelu: Gelu::Erf,
        conv_stem,
    })
}

fn resnet() -> BackboneConfig {
    let (block, stem) = (BlockKind::Basic, Stem::Cifar);
    let config =
        ResNetConfig { block, layers: [1; 4], width: 2, stem, in_chans: 3, zero_init_residual: true };
    BackboneConfig::ResNet(config)
}

pub(crate) fn config(backbone: BackboneConfig) -> MocoV3Config {
    MocoV3Config { backbone, dim: 6, mlp_dim: 12, temperature: 0.2, stop_grad_conv1: true }
}

fn images(n: usize, seed: u64) -> Result<Tensor> {
    Tensor::randn([n, 3, 16, 16], &mut Rng::new(seed))
}

#[test]
fn momentum_ends_at_one() {
    let m: Vec<f64> = [0.0, 50.0, 100.0].iter().map(|&epoch| momentum_at(0.99, epoch, 100.0)).collect();
    assert!((m[0] - 0.99).abs() < 1e-15 && (m[1] - 0.995).abs() < 1e-15 && m[2] == 1.0, "{m:?}");
}

#[test]
fn one_image_is_its_own_only_candidate() -> Result<()> {
    let (q, k) = (Tensor::randn([1, 5], &mut Rng::new(1))?, Tensor::randn([1, 5], &mut Rng::new(2))?);
    assert_eq!(contrastive_loss(&q, &k, 0.2, &single())?.item()?, 0.0);
    Ok(())
}

/// ViT-B, the figures of the official file.
#[test]
fn names_and_counts() -> Result<()> {
    let config = MocoV3Config::preset("vit_base").unwrap();
    let moco = MocoV3::new(&config, single(), &mut Rng::new(0))?;
    let (all, trained) = (moco.params().all(), moco.params().trained());
    let parameters = all.iter().filter(|p| !p.is_buffer()).count();
    let count: usize = trained.iter().map(|p| p.value().numel()).sum();
    assert_eq!((all.len(), parameters, trained.len(), count), (342, 318, 158, 108_150_016));
    assert_eq!(moco.params().sub("predictor").count(), 2_105_344);
    assert_eq!(moco.params().sub("base_encoder.head").count(), 20_987_904);
    let base = moco.params().sub("base_encoder");
    assert_eq!((base.all().len(), base.count()), (166, 85_798_656 + 20_987_904));
    for (name, bound) in [
        ("blocks.3.attn.qkv.weight", 0.0625),
        ("blocks.3.mlp.fc1.weight", (6.0f64 / (5.0 * 768.0)).sqrt()),
        ("patch_embed.proj.weight", 0.0625),
        ("head.3.weight", 1.0 / 64.0),
    ] {
        let largest = base.get(name).unwrap().value().abs()?.amax(())?.item()?;
        assert!(largest <= bound + 1e-6 && largest > 0.999 * bound, "{name}: {largest}, bound {bound}");
    }
    for name in ["blocks.3.attn.qkv.bias", "patch_embed.proj.bias"] {
        assert_eq!(base.get(name).unwrap().value().abs()?.amax(())?.item()?, 0.0, "{name}");
    }
    assert!(base.get("cls_token").unwrap().value().abs()?.amax(())?.item()? < 1e-5);
    Ok(())
}

/// Entries of the official files, with as many blocks and layers as they have.
#[test]
fn entries_of_the_other_kinds() -> Result<()> {
    let (BackboneConfig::Vit(stem), BackboneConfig::ResNet(net)) = (vit(true), resnet()) else {
        return Err(smalti::Error::msg("the kinds are known"));
    };
    let stem = BackboneConfig::Vit(VitConfig { depth: 11, ..stem });
    let net = ResNetConfig { block: BlockKind::Bottleneck, layers: [3, 4, 6, 3], ..net };
    let moco = MocoV3::new(&config(stem), single(), &mut Rng::new(0))?;
    assert_eq!(moco.params().all().len(), 366);
    // the stem is trained all the same
    assert!(moco.params().get("base_encoder.patch_embed.proj.12.bias").unwrap().is_trained());
    let moco = MocoV3::new(&config(BackboneConfig::ResNet(net)), single(), &mut Rng::new(0))?;
    assert_eq!(moco.params().all().len(), 663);
    let names: Vec<String> = moco.params().tensors().into_iter().map(|(name, _)| name).collect();
    let place = |prefix: &str| names.iter().position(|name| name.starts_with(prefix)).unwrap();
    assert!(place("base_encoder.fc.0.weight") < place("momentum_encoder.conv1.weight"));
    assert!(place("momentum_encoder.fc.4.running_var") < place("predictor.0.weight"));
    assert!(names.last().unwrap() == "predictor.3.weight", "no norm behind a ResNet's predictor");
    Ok(())
}

/// Frozen parameters get no gradient, the momentum encoder moves all the same and gets none either.
#[test]
fn what_moves() -> Result<()> {
    let moco = MocoV3::new(&config(vit(false)), single(), &mut Rng::new(3))?;
    let base = moco.params().sub("base_encoder");
    let (projection, table) = (base.get("patch_embed.proj.weight").unwrap(), base.get("pos_embed").unwrap());
    assert!(!projection.is_trained() && !table.is_trained());
    for p in [&projection, &table] {
        p.update(|v| v.add_scalar(1.0))?;
    }
    let before: Vec<Tensor> = moco.momentum().moving().iter().map(Param::value).collect();
    let out = moco.forward(&images(4, 1)?, &images(4, 2)?, 0.75)?;
    for ((k, b), old) in moco.momentum().moving().iter().zip(moco.base().moving()).zip(before) {
        let wanted = old.mul_scalar(0.75)?.add(&b.value().mul_scalar(0.25)?)?;
        assert!(k.value().sub(&wanted)?.abs()?.amax(())?.item()? < 1e-6, "{}", k.name());
    }
    let grads = out.loss.backward()?;
    for p in moco.params().all() {
        assert_eq!(grads.get(&p).is_some(), p.is_trained(), "{}", p.name());
    }
    let counter = moco.params().get("momentum_encoder.head.1.num_batches_tracked").unwrap();
    assert_eq!(counter.value().to_vec::<i64>()?, [2]);
    Ok(())
}

/// Two ranks with halves of a batch are one rank with all of it: losses and averaged gradients, norms over the ranks.
#[test]
fn ranks_are_one_batch() -> Result<()> {
    for backbone in [vit(true), resnet()] {
        let config = config(backbone);
        let (x1, x2) = (images(6, 1)?, images(6, 2)?);
        let step = |comm: Comm, x1: &Tensor, x2: &Tensor| -> Result<(f64, Vec<Vec<f32>>)> {
            let moco = MocoV3::new(&config, comm, &mut Rng::new(7))?;
            let loss = moco.forward(x1, x2, 0.9)?.loss;
            let grads = loss.backward()?;
            let trained = moco.params().trained();
            let values = trained.iter().filter_map(|p| grads.get(p)).map(Tensor::to_vec);
            Ok((loss.item()?, values.collect::<Result<_>>()?))
        };
        let (loss, whole) = step(single(), &x1, &x2)?;
        let halves = threads(2, |comm| {
            let half = |t: &Tensor| t.narrow(0, 3 * comm.rank(), 3);
            step(comm.clone(), &half(&x1)?, &half(&x2)?)
        })?;
        assert!((halves[0].0 + halves[1].0 - 2.0 * loss).abs() < 1e-4, "{loss}");
        for (i, whole) in whole.iter().enumerate() {
            let scale = whole.iter().fold(1e-2f32, |m, x| m.max(x.abs()));
            for (j, x) in whole.iter().enumerate() {
                let mean = (halves[0].1[i][j] + halves[1].1[i][j]) / 2.0;
                assert!((mean - x).abs() < 5e-3 * scale, "{i} {j}: {mean} {x}");
            }
        }
    }
    Ok(())
}

/// Written with `module.`, read back, and by names without.
#[test]
fn files() -> Result<()> {
    let folder = tempfile::tempdir().map_err(|e| smalti::Error::io(".", e))?;
    let path = folder.path().join("checkpoint_0000.pth.tar");
    let config = config(vit(true));
    let (moco, other) = (
        MocoV3::new(&config, single(), &mut Rng::new(1))?,
        MocoV3::new(&config, single(), &mut Rng::new(2))?,
    );
    checkpoint::save_model(moco.params(), &path)?;
    for tensors in [smalti::io::load(&path)?.tensors(), moco.params().tensors()] {
        let all = moco.params().all().len();
        assert_eq!(checkpoint::load_model(other.params(), tensors)?.loaded, all);
    }
    let x = images(2, 1)?;
    let values = |m: &MocoV3| m.base().forward(&x, false)?.to_vec::<f32>();
    assert_eq!(values(&moco)?, values(&other)?);
    Ok(())
}

#[test]
fn recipes_name_the_kind() {
    let text = serde_json::to_string(&MocoV3Config::preset("vit_conv_small").unwrap()).unwrap();
    assert!(text.contains("\"vit\":{") && text.contains("\"depth\":11"), "{text}");
    let back: MocoV3Config = serde_json::from_str(&text).unwrap();
    assert_eq!(Some(back), MocoV3Config::preset("vit_conv_small"));
}
