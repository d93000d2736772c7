use super::*;
use crate::backbones::{text::TextConfig, vit::ImageSize};
use checkpoint::{from_official, from_open_clip};
use smalti::{DType, comm, no_grad, optim, optim::Algorithm, optim::Optimizer};

fn small(variant: Variant) -> FlipConfig {
    FlipConfig {
        variant,
        embed_dim: 10,
        image: ImageConfig {
            img_size: ImageSize::Square(20),
            patch_size: 4,
            in_chans: 3,
            width: 24,
            layers: 2,
            heads: 3,
            mlp_ratio: 2.5,
        },
        text: TextConfig {
            vocab_size: 40,
            context_length: 7,
            width: 14,
            layers: 3,
            heads: 2,
            mlp_ratio: 3.0,
        },
        mask_ratio: 0.5,
        text_mask_ratio: 0.0,
        text_masking: TextMasking::Prioritised,
        quick_gelu: false,
        image_pool: None,
    }
}

fn model(config: &FlipConfig) -> Flip {
    Flip::new(config, &mut Rng::new(3)).unwrap()
}

fn images(n: usize, seed: u64) -> Tensor {
    Tensor::randn([n, 3, 20, 20], &mut Rng::new(seed)).unwrap()
}

/// Texts of 5, 2 and 7 tokens, the last of each with the largest id.
fn tokens() -> Tensor {
    let ids = [38, 9, 4, 0, 39, 0, 0, 38, 39, 0, 0, 0, 0, 0, 38, 5, 6, 7, 8, 9, 39];
    Tensor::from_slice(&ids.map(|id: i64| id), [3, 7]).unwrap()
}

fn close(a: &Tensor, b: &Tensor, tolerance: f32) -> bool {
    let (a, b) =
        (a.contiguous().unwrap().to_vec::<f32>().unwrap(), b.contiguous().unwrap().to_vec::<f32>().unwrap());
    a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= tolerance)
}

/// FLIP: counted in the official models; open_clip: counted in its own.
#[test]
fn published_sizes_have_their_numbers_of_parameters() {
    let official = [("base", 139_927_809), ("large", 413_200_129), ("huge", 966_723_841)];
    for (name, count) in official {
        assert_eq!(FlipConfig::official(name).unwrap().parameters().unwrap(), count, "{name}");
    }
    let open_clip = [("ViT-B-16", 149_620_737), ("ViT-L-14", 427_616_513), ("ViT-H-14", 986_109_441)];
    for (name, count) in open_clip {
        assert_eq!(FlipConfig::open_clip(name).unwrap().parameters().unwrap(), count, "{name}");
    }
    assert!(FlipConfig::open_clip("ViT-L-16").is_some());
    assert!(FlipConfig::official("giant").is_none() && FlipConfig::open_clip("ViT-B-8").is_none());
}

#[test]
fn parameters_are_counted_as_they_are_made() {
    for variant in [Variant::Official, Variant::OpenClip] {
        let config = small(variant);
        let made: usize = model(&config).params().all().iter().map(|p| p.value().numel()).sum();
        assert_eq!(config.parameters().unwrap(), made);
    }
}

/// FLIP §3: truncated in double precision.
#[test]
fn kept_counts() {
    let (official, open_clip) = (small(Variant::Official), small(Variant::OpenClip));
    for (length, ratio, kept) in
        [(196, 0.5, 98), (196, 0.75, 49), (256, 0.75, 64), (25, 0.5, 12), (25, 0.75, 6), (9, 0.0, 9)]
    {
        assert_eq!(official.kept("patches", length, ratio).unwrap(), kept);
        assert_eq!(open_clip.kept("patches", length, ratio).unwrap(), kept);
    }
    assert!(official.kept("patches", 10, 0.9).unwrap_err().to_string().contains("keeps 0 of 10 patches"));
    assert_eq!(open_clip.kept("patches", 10, 0.9).unwrap(), 1);
    for ratio in [-0.1, 1.0, f64::NAN] {
        assert!(open_clip.kept("patches", 10, ratio).is_err());
    }
    let quick = FlipConfig { quick_gelu: true, ..official };
    assert!(Flip::new(&quick, &mut Rng::new(0)).unwrap_err().to_string().contains("quick_gelu"));
}

#[test]
fn recipes_name_what_they_mean() {
    let text = r#"{"embed_dim": 8, "variant": "open_clip", "image_pool": "patches", "text_masking": "random",
        "image": {"img_size": 28, "patch_size": 7, "width": 16, "layers": 1, "heads": 2},
        "text": {"vocab_size": 9, "context_length": 5, "width": 8, "layers": 1, "heads": 2}}"#;
    let config: FlipConfig = serde_json::from_str(text).unwrap();
    assert_eq!((config.mask_ratio, config.text_mask_ratio, config.image.mlp_ratio), (0.5, 0.0, 4.0));
    assert_eq!((config.image_pool, config.text_masking), (Some(ImagePool::Patches), TextMasking::Random));
    let written = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<FlipConfig>(&written).unwrap(), config);
}

#[test]
fn every_image_has_patches_of_its_own_and_their_order_is_of_no_matter() -> Result<()> {
    for variant in [Variant::Official, Variant::OpenClip] {
        let flip = model(&small(variant));
        let ids = flip.random_masking(&tokens(), &mut Rng::new(5))?.image.unwrap();
        assert_eq!(ids.shape(), [3, 12]);
        let rows = ids.to_vec::<i64>()?;
        let sorted = |row: &[i64]| {
            let mut row = row.to_vec();
            row.sort_unstable();
            row
        };
        assert_ne!(sorted(&rows[..12]), sorted(&rows[12..24]));
        let masked = flip.encode_image(&images(3, 1), Some(&ids))?;
        let turned = flip.encode_image(&images(3, 1), Some(&ids.sort(1, true)?.0))?;
        assert!(close(&masked, &turned, 2e-6));
        assert!(!close(&masked, &flip.encode_image(&images(3, 1), None)?, 1e-3));
        // what is hidden is not seen
        let hidden: Vec<i64> = (0..25).filter(|l| !rows[..12].contains(l)).collect();
        let mut pixels = images(1, 1).to_vec::<f32>()?;
        for l in hidden {
            let (row, column) = (l as usize / 5 * 4, l as usize % 5 * 4);
            (0..3 * 16).for_each(|i| pixels[i / 16 * 400 + (row + i / 4 % 4) * 20 + column + i % 4] = 9.0);
        }
        let other = Tensor::from_slice(&pixels, [1, 3, 20, 20])?;
        let first = ids.narrow(0, 0, 1)?;
        let (a, b) =
            (flip.encode_image(&images(1, 1), Some(&first))?, flip.encode_image(&other, Some(&first))?);
        assert!(close(&a, &b, 0.0));
    }
    let unmasked = model(&FlipConfig { mask_ratio: 0.0, ..small(Variant::Official) });
    assert!(unmasked.random_masking(&tokens(), &mut Rng::new(5))?.image.is_none());
    Ok(())
}

#[test]
fn masked_texts_keep_what_stands_for_them() -> Result<()> {
    for variant in [Variant::Official, Variant::OpenClip] {
        for text_masking in [TextMasking::Random, TextMasking::Prioritised] {
            let flip = model(&FlipConfig { text_mask_ratio: 0.4, text_masking, ..small(variant) });
            let pooled = match variant {
                Variant::Official => [0; 3],
                Variant::OpenClip => [4, 1, 6],
            };
            for seed in 0..20 {
                let ids = flip.random_masking(&tokens(), &mut Rng::new(seed))?.text.unwrap();
                assert_eq!(ids.shape(), [3, 4]);
                let rows = ids.to_vec::<i64>()?;
                for (i, row) in rows.chunks(4).enumerate() {
                    assert!(row.is_sorted() && row.contains(&pooled[i]), "{variant:?} {row:?}");
                }
                if text_masking == TextMasking::Prioritised {
                    // five tokens are of the first text (one of them has the id 0, which is padding officially), two
                    // of the second
                    let words = |row: &[i64], n: i64| row.iter().filter(|&&p| p < n).count();
                    assert_eq!((words(&rows[..4], 5), words(&rows[4..8], 2)), (4, 2));
                }
            }
        }
    }
    Ok(())
}

/// Without positions beyond the end of the text, a causal tower gives the same; the official one does not.
#[test]
fn padding_is_seen_by_the_official_tower_alone() -> Result<()> {
    let short = tokens().narrow(0, 0, 2)?.narrow(1, 0, 5)?;
    let ids = Tensor::arange(5, DType::I64)?.expand([2, 5])?.contiguous()?;
    let both = tokens().narrow(0, 0, 2)?;
    let open_clip = model(&small(Variant::OpenClip));
    // the third text has no padding, so that nothing is left out
    let full = open_clip.encode_text(&tokens(), None)?.narrow(0, 0, 2)?;
    assert!(close(&full, &open_clip.encode_text(&both, None)?, 1e-6));
    assert!(close(&full, &open_clip.encode_text(&short, None)?, 1e-6));
    assert!(close(&full, &open_clip.encode_text(&both, Some(&ids))?, 1e-6));
    let official = model(&small(Variant::Official));
    let full = official.encode_text(&both, None)?;
    assert!(!close(&full, &official.encode_text(&both, Some(&ids))?, 1e-4));
    let all = Tensor::arange(7, DType::I64)?.expand([2, 7])?.contiguous()?;
    assert!(close(&full, &official.encode_text(&both, Some(&all))?, 1e-6));
    assert!(official.encode_text(&short, None).unwrap_err().to_string().contains("texts of 7 tokens"));
    Ok(())
}

#[test]
fn the_scale_is_held_in_the_loss_or_in_the_parameter() -> Result<()> {
    for (variant, before, after) in
        [(Variant::Official, 100.0, 100.0), (Variant::OpenClip, 5f64.exp(), 100.0)]
    {
        let flip = model(&small(variant));
        assert!((flip.scale()?.item()? - 1.0 / 0.07).abs() < 1e-4);
        let log = flip.params().get("logit_scale").unwrap();
        log.set(&Tensor::scalar(5.0))?;
        assert!((flip.scale()?.item()? - before).abs() < 1e-3);
        flip.clamp_scale()?;
        assert!((flip.scale()?.item()? - after).abs() < 1e-3);
        assert_eq!(log.value().item()? > 4.9, variant == Variant::Official);
        let grads = flip.scale()?.mul_scalar(1.0)?.backward()?;
        let grad = grads.get(&log).map(Tensor::item).transpose()?.unwrap_or(0.0);
        assert_eq!(grad == 0.0, variant == Variant::Official, "{grad}");
        log.set(&Tensor::scalar(-1.0))?;
        flip.clamp_scale()?;
        assert_eq!(flip.scale()?.item()? as f32, 1.0);
    }
    Ok(())
}

#[test]
fn weights_that_decay() {
    let decays = |variant, name: &str| {
        let flip = model(&small(variant));
        flip.decays(&flip.params().get(name).unwrap())
    };
    for (name, official, open_clip) in [
        ("visual.class_embedding", true, false),
        ("logit_scale", true, false),
        ("token_embedding.weight", true, true),
        ("positional_embedding", false, true),
        ("visual.conv1.weight", true, true),
        ("visual.ln_post.weight", false, false),
        ("transformer.resblocks.0.ln_1.weight", false, false),
        ("transformer.resblocks.0.attn.in_proj_weight", true, true),
        ("transformer.resblocks.0.attn.in_proj_bias", false, false),
        ("text_projection", true, true),
    ] {
        assert_eq!(
            (decays(Variant::Official, name), decays(Variant::OpenClip, name)),
            (official, open_clip),
            "{name}"
        );
    }
}

#[test]
fn open_clip_files_load_by_name() -> Result<()> {
    let (from, to) =
        (model(&small(Variant::OpenClip)), Flip::new(&small(Variant::OpenClip), &mut Rng::new(9))?);
    let visual = |name: &str| name.starts_with("visual.") || name == "logit_scale";
    let custom = from.params().tensors().into_iter().map(|(name, t)| match name.as_str() {
        "logit_scale" => Ok((name, t.reshape([1])?)),
        _ if visual(&name) => Ok((name, t)),
        _ => Ok((format!("text.{name}"), t)),
    });
    let mut custom = custom.collect::<Result<Vec<_>>>()?;
    custom.push(("text.attn_mask".into(), Tensor::zeros([7, 7], DType::F32)?));
    let distributed: Vec<_> = custom.iter().map(|(name, t)| (format!("module.{name}"), t.clone())).collect();
    for tensors in [custom, distributed] {
        assert_eq!(from_open_clip(tensors.clone()).len(), from.params().all().len());
        to.load_tensors(tensors)?;
        assert!(close(&from.encode_image(&images(2, 1), None)?, &to.encode_image(&images(2, 1), None)?, 0.0));
        assert!(close(&from.encode_text(&tokens(), None)?, &to.encode_text(&tokens(), None)?, 0.0));
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("clip.safetensors");
    from.params().save(&path)?;
    to.load(&path)?;
    let mut lacking = from.params().tensors();
    lacking.retain(|(name, _)| name != "ln_final.bias");
    lacking.push(("logit_bias".into(), Tensor::scalar(0.0)));
    let message = to.load_tensors(lacking).unwrap_err().to_string();
    assert!(message.contains("ln_final.bias") && message.contains("logit_bias"), "{message}");
    Ok(())
}

#[test]
fn other_image_sizes_take_a_table_that_fits() -> Result<()> {
    for variant in [Variant::Official, Variant::OpenClip] {
        let from = model(&small(variant));
        let mut config = small(variant);
        config.image.img_size = ImageSize::Square(28);
        let to = model(&config);
        let own = to.params().get("visual.positional_embedding").unwrap();
        let fixed = own.value();
        to.load_tensors(from.params().tensors())?;
        assert_eq!(own.value().shape(), [50, 24]);
        assert_eq!(close(&own.value(), &fixed, 0.0), variant == Variant::Official);
        assert!(close(
            &own.value().narrow(0, 0, 1)?,
            &from.params().get(own.name()).unwrap().value().narrow(0, 0, 1)?,
            0.0
        ));
    }
    Ok(())
}

/// FLIP §2.1: D = 8, column 1, row 0.
#[test]
fn positions_have_the_column_first_and_are_not_trained() {
    let mut config = small(Variant::Official);
    (config.image.width, config.image.heads) = (8, 2);
    let table = model(&config).params().get("visual.positional_embedding").unwrap();
    let row = table.value().narrow(0, 2, 1).unwrap();
    let want = [0.841471, 0.01, 0.540302, 0.99995, 0., 0., 1., 1.];
    assert!(close(&row, &Tensor::from_slice(&want.map(|v: f32| v), [1, 8]).unwrap(), 1e-6));
    assert!(!table.is_trained());
}

#[test]
fn official_trees_that_are_incomplete_are_named() -> Result<()> {
    let matrix = || Tensor::zeros([4, 4], DType::F32);
    let block = "img_encoder.Transformer.encoderblock_07.MultiHeadDotProductAttention_0";
    let message = |names: &[String]| -> Result<String> {
        let tensors = names.iter().map(|name| Ok((name.clone(), matrix()?))).collect::<Result<_>>()?;
        Ok(from_official(tensors).unwrap_err().to_string())
    };
    let two = ["query", "value"].map(|part| format!("{block}.{part}.kernel"));
    assert!(message(&two)?.contains("visual.transformer.resblocks.7.attn.in_proj_weight"));
    for unknown in ["img_encoder.mystery", "img_encoder.Transformer.encoderblock_07.LayerNorm_2.scale"] {
        assert!(message(&[unknown.into()])?.contains(unknown));
    }
    let flat = message(&["img_encoder.embedding.kernel".into()])?;
    assert!(flat.contains("img_encoder.embedding.kernel [4, 4]"), "{flat}");
    Ok(())
}

#[test]
fn a_few_pairs_are_learned_with_everything_masked() -> Result<()> {
    for variant in [Variant::Official, Variant::OpenClip] {
        let flip = model(&FlipConfig { text_mask_ratio: 0.2, ..small(variant) });
        let comm = comm::single();
        let (images, tokens) = (images(3, 2), tokens());
        let mut adam = optim::AdamW::default().over(&flip.params().trained(), &[])?;
        let mut rng = Rng::new(1);
        for _ in 0..60 {
            let masking = flip.random_masking(&tokens, &mut rng)?;
            let out = flip.forward(&images, &tokens, &masking, &comm)?;
            adam.step(&out.loss.backward()?, 3e-3)?;
            flip.clamp_scale()?;
        }
        let loss = no_grad(|| flip.forward(&images, &tokens, &Masking::default(), &comm))?.loss.item()?;
        assert!(loss < 0.2, "{variant:?}: {loss}, {} without learning", 3f64.ln());
    }
    Ok(())
}

#[test]
fn half_precision_gives_nearly_the_same() -> Result<()> {
    for variant in [Variant::Official, Variant::OpenClip] {
        let flip = model(&small(variant));
        let masking = flip.random_masking(&tokens(), &mut Rng::new(5))?;
        let run = || flip.forward(&images(3, 1), &tokens(), &masking, &comm::single());
        let full = run()?;
        flip.params().to_dtype(DType::BF16)?;
        let half = run()?;
        assert_eq!((half.image_features.dtype(), half.loss.dtype()), (DType::BF16, DType::F32));
        assert!(close(&full.image_features, &half.image_features.to_dtype(DType::F32)?, 0.03));
        assert!((full.loss.item()? - half.loss.item()?).abs() < 0.3);
        let grads = half.loss.backward()?;
        assert!(flip.params().trained().iter().all(|p| grads.get(p).is_some()));
    }
    Ok(())
}
