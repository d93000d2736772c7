use super::*;
use crate::backbones::resnet::{BlockKind, ResNet};
use smalti::{
    Error,
    comm::{single, threads},
    io,
    nn::Statistics,
    optim::{Algorithm, Optimizer, Sgd},
};

fn config(momentum: f64) -> MocoConfig {
    MocoConfig {
        backbone: ResNetConfig {
            block: BlockKind::Basic,
            layers: [1; 4],
            width: 2,
            stem: Stem::Cifar,
            in_chans: 1,
            zero_init_residual: false,
        },
        dim: 4,
        queue: 24,
        momentum,
        temperature: 0.2,
        mlp: true,
        symmetric: false,
        bn_splits: 1,
    }
}

fn images(n: usize, seed: u64) -> Result<Tensor> {
    Tensor::randn([n, 1, 8, 8], &mut Rng::new(seed))
}

/// A step with the optimizer's: the official script gives it all parameters, those of the key encoder too.
fn train(moco: &Moco, steps: u64) -> Result<()> {
    let mut sgd =
        Sgd { momentum: 0.9, weight_decay: 0.1, ..Sgd::default() }.over(&moco.params().all(), &[])?;
    for step in 0..steps {
        let out = moco.forward(&images(6, 2 * step)?, &images(6, 2 * step + 1)?, &mut Rng::new(step))?;
        sgd.step(&out.loss.backward()?, 0.1)?;
    }
    Ok(())
}

fn parameters(moco: &Moco, encoder: &str) -> Result<Vec<Vec<f32>>> {
    let all = moco.params().sub(encoder).all();
    all.iter().filter(|p| !p.is_buffer()).map(|p| p.value().to_vec()).collect()
}

fn buffer(moco: &Moco, name: &str) -> Result<Vec<f64>> {
    let value = moco.params().get(name).map(|p| p.value());
    value.map_or(Ok(Vec::new()), |v| v.to_dtype(DType::F64)?.to_vec())
}

#[test]
fn the_key_encoder_follows_by_its_momentum() -> Result<()> {
    for momentum in [0.0, 1.0] {
        let moco = Moco::new(&config(momentum), &single(), &mut Rng::new(1))?;
        let first = parameters(&moco, "encoder_k")?;
        assert_eq!(first, parameters(&moco, "encoder_q")?);
        train(&moco, 2)?;
        let trained = parameters(&moco, "encoder_q")?;
        assert_ne!(first, trained);
        // a step reads the queries' weights before the optimizer changes them
        moco.forward(&images(6, 8)?, &images(6, 9)?, &mut Rng::new(3))?;
        let expected = if momentum == 0.0 { trained } else { first };
        assert_eq!(parameters(&moco, "encoder_k")?, expected, "m = {momentum}");
        // its norms follow the batches that it sees, whatever m is
        let mean = |of: &str| buffer(&moco, &format!("{of}.bn1.running_mean"));
        assert_ne!(mean("encoder_k")?, mean("encoder_q")?);
    }
    Ok(())
}

#[test]
fn the_key_encoder_gets_no_gradient_and_no_decay() -> Result<()> {
    let moco = Moco::new(&config(1.0), &single(), &mut Rng::new(1))?;
    let out = moco.forward(&images(6, 0)?, &images(6, 1)?, &mut Rng::new(0))?;
    let grads = out.loss.backward()?;
    for param in moco.params().all() {
        let trained = param.name().starts_with("encoder_q.") && !param.is_buffer();
        assert_eq!(grads.get(&param).is_some(), trained, "{}", param.name());
    }
    assert!(!out.k.tracked() && out.q.tracked());
    let before = parameters(&moco, "encoder_k")?;
    train(&moco, 2)?;
    assert_eq!(parameters(&moco, "encoder_k")?, before);
    Ok(())
}

#[test]
fn steps_that_do_not_divide_the_queue() -> Result<()> {
    let moco = Moco::new(&config(0.5), &single(), &mut Rng::new(1))?;
    let refused = |n: usize| moco.forward(&images(n, 0).unwrap(), &images(n, 1).unwrap(), &mut Rng::new(0));
    let message = refused(5).unwrap_err().to_string();
    assert!(message.contains("a queue of 24 keys does not divide into steps of 5 (1 ranks"), "{message}");
    let symmetric = MocoConfig { symmetric: true, ..config(0.5) };
    assert!(config(0.5).check_batch(12, 2).is_ok() && symmetric.check_batch(12, 2).is_err());
    assert!(refused(0).is_err());
    let (a, b) = (images(6, 0)?, images(6, 1)?);
    let twice = Tensor::zeros([6], DType::I64)?;
    let message = moco.forward_permuted(&a, &b, &[twice]).unwrap_err().to_string();
    assert!(message.contains("a permutation of 6 images must name each once"), "{message}");
    assert!(moco.forward_permuted(&a, &b, &[]).is_err());
    for wrong in
        [MocoConfig { temperature: 0.0, ..config(0.5) }, MocoConfig { queue: 0, ..config(0.5) }, config(1.5)]
    {
        assert!(Moco::new(&wrong, &single(), &mut Rng::new(1)).is_err());
    }
    moco.params().to_dtype(DType::BF16)?;
    assert!(moco.forward(&a, &b, &mut Rng::new(0)).unwrap_err().to_string().contains("train in f32"));
    Ok(())
}

/// Each rank draws other first weights and permutations; rank 0's count.
#[test]
fn ranks_have_one_queue_and_one_start() -> Result<()> {
    let ranks = threads(2, |comm| {
        let rank = comm.rank() as u64;
        let moco = Moco::new(&config(0.5), &comm, &mut Rng::new(rank))?;
        let start = parameters(&moco, "encoder_k")?;
        let out = moco.forward(&images(3, 10 + rank)?, &images(3, 20 + rank)?, &mut Rng::new(rank))?;
        Ok((start, buffer(&moco, "queue")?, buffer(&moco, "queue_ptr")?, out.k.to_vec::<f32>()?))
    })?;
    let [(start, queue, pointer, k0), (start1, queue1, pointer1, k1)] = &ranks[..] else {
        panic!("two ranks");
    };
    assert_eq!((start, queue, pointer), (start1, queue1, pointer1));
    assert_eq!(pointer, &[6.0]);
    for (i, key) in k0.chunks(4).chain(k1.chunks(4)).enumerate() {
        let column: Vec<f32> = (0..4).map(|c| queue[c * 24 + i] as f32).collect();
        assert_eq!(column, key, "keys of rank 0, then those of rank 1");
    }
    Ok(())
}

/// The sum of two one-sided losses against one old queue; the keys of the first view enter before the second's.
#[test]
fn both_directions() -> Result<()> {
    let symmetric = MocoConfig { symmetric: true, ..config(0.5) };
    let moco = |config: &MocoConfig| Moco::new(config, &single(), &mut Rng::new(1));
    let (a, b) = (images(6, 0)?, images(6, 1)?);
    let both = moco(&symmetric)?;
    let out = both.forward(&a, &b, &mut Rng::new(0))?;
    let one = |x: &Tensor, y: &Tensor| moco(&config(0.5))?.forward(x, y, &mut Rng::new(0));
    let (ab, ba) = (one(&a, &b)?, one(&b, &a)?);
    assert!((out.loss.item()? - ab.loss.item()? - ba.loss.item()?).abs() < 1e-5);
    let close = |x: &Tensor, y: &Tensor| -> Result<bool> { Ok(x.sub(y)?.abs()?.amax(())?.item()? < 1e-5) };
    assert!(close(&out.q, &Tensor::cat(&[&ab.q, &ba.q], 0)?)?);
    assert!(close(&out.k, &Tensor::cat(&[&ba.k, &ab.k], 0)?)?);
    let mean = (ab.acc5.item()? + ba.acc5.item()?) / 2.0;
    assert!((out.acc5.item()? - mean).abs() < 1e-3);
    assert_eq!(buffer(&both, "queue_ptr")?, [12.0]);
    let queue = both.params().get("queue").map(|p| p.value().narrow(1, 0, 12)).transpose()?;
    assert_eq!(queue.map(|q| q.t()?.to_vec::<f32>()).transpose()?, Some(out.k.to_vec::<f32>()?));
    Ok(())
}

#[test]
fn files_keep_queue_and_pointer() -> Result<()> {
    let folder = tempfile::tempdir().map_err(|e| Error::io(".", e))?;
    let path = folder.path().join("checkpoint_0000.pth.tar");
    let moco = Moco::new(&config(0.5), &single(), &mut Rng::new(1))?;
    train(&moco, 3)?;
    moco.save(&path)?;
    let tensors = io::load(&path)?.tensors();
    let names: Vec<&str> = tensors.iter().take(3).map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["module.queue", "module.queue_ptr", "module.encoder_q.conv1.weight"]);
    let other = Moco::new(&config(0.5), &single(), &mut Rng::new(2))?;
    other.load(tensors.clone())?;
    assert_eq!(buffer(&other, "queue_ptr")?, [18.0]);
    assert_eq!(buffer(&other, "queue")?, buffer(&moco, "queue")?);
    // both go on alike, at the end of the queue too
    for moco in [&moco, &other] {
        train(moco, 1)?;
        assert_eq!(buffer(moco, "queue_ptr")?, [0.0]);
    }
    assert_eq!(parameters(&other, "encoder_k")?, parameters(&moco, "encoder_k")?);

    // a pointer left by another batch size: 20 + 6 is 2 behind the end
    let pointer = moco.params().get("queue_ptr").map(|p| p.set(&Tensor::from_slice(&[20i64], [1])?));
    pointer.transpose()?;
    let out = moco.forward(&images(6, 0)?, &images(6, 1)?, &mut Rng::new(0))?;
    let queue = moco.params().get("queue").map(|p| p.value().narrow(1, 0, 2)).transpose()?;
    assert_eq!(buffer(&moco, "queue_ptr")?, [2.0]);
    let last = out.k.narrow(0, 4, 2)?.to_vec::<f32>()?;
    assert_eq!(queue.map(|q| q.t()?.to_vec::<f32>()).transpose()?, Some(last));

    // for transfer: nothing but the query encoder is needed
    let backbone = Params::new();
    ResNet::new(&backbone, &config(0.5).backbone, Statistics::Batch, &mut Rng::new(3))?;
    let query = tensors.into_iter().filter(|(name, _)| name.starts_with("module.encoder_q."));
    assert!(checkpoint::load_backbone(&backbone, query.collect(), "fc.")?.is_complete());
    let same = checkpoint::load_backbone(&backbone, moco.backbone(), "fc.")?;
    assert!(same.is_complete() && moco.features(&images(2, 0)?)?.shape() == [2, 4]);
    Ok(())
}

/// Entries and trained parameters of the official models; the queue is one block of each state dict.
#[test]
fn published_sizes() -> Result<()> {
    for (name, entries, trained) in [("v1", 642, 23_770_304), ("v2", 646, 27_966_656)] {
        let preset = MocoConfig::preset(name).map(|c| MocoConfig { queue: 64, ..c });
        let moco = preset.map(|c| Moco::new(&c, &single(), &mut Rng::new(0))).transpose()?;
        let params = moco.map(|m| m.params().clone()).unwrap_or_default();
        let count: usize = params.trained().iter().map(|p| p.value().numel()).sum();
        assert_eq!((params.all().len(), count), (entries, trained), "{name}");
    }
    Ok(())
}
