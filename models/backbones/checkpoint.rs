//! Backbones in the checkpoints of self-supervised training: under which prefix they stand there, what may be
//! missing, and how models with DistributedDataParallel's prefix are read and written.

use smalti::{
    Error, Result, Tensor,
    io::{self, Value},
    nn::{LoadOptions, LoadReport, Params},
};
use std::{collections::HashSet, path::Path};

/// What DistributedDataParallel puts before every name.
const MODULE: &str = "module.";

/// Where the backbone stands in the files of MoCo, MoCo v3, SimSiam, and others that have cut out theirs. The dot
/// belongs to it: `encoder_k.` is no backbone.
const PREFIXES: [&str; 4] = ["encoder_q.", "base_encoder.", "encoder.", "backbone."];

/// The counter of batches in a norm, which nothing is computed from; files from before PyTorch 0.4.1 lack it.
const COUNTER: &str = "num_batches_tracked";

/// Names without DistributedDataParallel's `module.`.
pub fn without_module(tensors: Vec<(String, Tensor)>) -> Vec<(String, Tensor)> {
    let plain = |name: String| name.strip_prefix(MODULE).map(str::to_owned).unwrap_or(name);
    tensors.into_iter().map(|(name, t)| (plain(name), t)).collect()
}

/// The tensors of a checkpoint that belong to its backbone, under the backbone's own names; all of them if it is the
/// file of a plain backbone. Key encoders, queues, predictors fall away.
pub fn backbone(tensors: Vec<(String, Tensor)>) -> Vec<(String, Tensor)> {
    let tensors = without_module(tensors);
    let is_there = |prefix: &&str| tensors.iter().any(|(name, _)| name.starts_with(prefix));
    match PREFIXES.into_iter().find(is_there) {
        Some(prefix) => below(tensors, prefix),
        None => tensors,
    }
}

/// What stands under `prefix`, without it.
fn below(tensors: Vec<(String, Tensor)>, prefix: &str) -> Vec<(String, Tensor)> {
    let cut = |(name, t): (String, Tensor)| Some((name.strip_prefix(prefix)?.to_owned(), t));
    tensors.into_iter().filter_map(cut).collect()
}

/// All but what stands under `head` (`fc.` of a ResNet, `head.` of a vision transformer).
pub fn without_head(mut tensors: Vec<(String, Tensor)>, head: &str) -> Vec<(String, Tensor)> {
    tensors.retain(|(name, _)| !name.starts_with(head));
    tensors
}

/// Loads the [`backbone`] of a checkpoint into this branch. The head is left as it is here, and out of what is there:
/// heads of pre-training are of no use behind it (`main_lincls.py` of MoCo). The report lists it as missing.
///
/// # Errors
/// If anything but the head (and counters of batches) is missing, the file has more than the network, or a shape does
/// not fit; nothing has been changed then.
pub fn load_backbone(params: &Params, tensors: Vec<(String, Tensor)>, head: &str) -> Result<LoadReport> {
    let tensors = without_head(backbone(tensors), head);
    // a deeper network of the same width would fit otherwise
    let more = tensors.iter().map(|(name, _)| name.as_str()).filter(|name| params.get(name).is_none());
    let more: Vec<&str> = more.collect();
    if !more.is_empty() {
        return Err(Error::msg(format!("the network lacks parts of the checkpoint: {}", more.join(", "))));
    }
    load_partly(params, &tensors, |name| name.starts_with(head))
}

/// Loads a whole model from a file with or without `module.` before its names; counters of batches may be missing.
///
/// # Errors
/// If anything else is missing or more than there should be, or a shape does not fit; nothing has been changed then.
pub fn load_model(params: &Params, tensors: Vec<(String, Tensor)>) -> Result<LoadReport> {
    let mut tensors = without_module(tensors);
    let given: HashSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    let counters = params.tensors().into_iter();
    let counters: Vec<_> =
        counters.filter(|(name, _)| name.ends_with(COUNTER) && !given.contains(name.as_str())).collect();
    tensors.extend(counters);
    params.load_tensors(&tensors, &LoadOptions::default())
}

/// Writes a whole model as the official trainings do: a `.pth` with `module.` before every name, below `state_dict`.
///
/// # Errors
/// If the file cannot be written; what was at `path` is still there then.
pub fn save_model(params: &Params, path: impl AsRef<Path>) -> Result<()> {
    let named = params.tensors().into_iter().map(|(name, t)| (format!("{MODULE}{name}"), t));
    io::save_pth(path, &Value::Dict(vec![("state_dict".into(), Value::state_dict(named))]))
}

/// Loads what this branch and `tensors` both name. All that is not `optional` must be there, but for counters of
/// batches.
///
/// # Errors
/// If something is missing or a shape does not fit; all are listed, and nothing has been changed then.
pub fn load_partly(
    params: &Params,
    tensors: &[(String, Tensor)],
    optional: impl Fn(&str) -> bool,
) -> Result<LoadReport> {
    let given: HashSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    let names = params.tensors().into_iter().map(|(name, _)| name);
    let missing: Vec<String> = names
        .filter(|name| !given.contains(name.as_str()) && !optional(name) && !name.ends_with(COUNTER))
        .collect();
    if !missing.is_empty() {
        return Err(Error::msg(format!("the checkpoint lacks parts of the encoder: {}", missing.join(", "))));
    }
    params.load_tensors(tensors, &LoadOptions { strict: false, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbones::resnet::{BlockKind, ResNet, ResNetConfig, Stem};
    use smalti::{
        Rng,
        nn::{Linear, Statistics},
    };

    fn resnet(layers: [usize; 4], classes: usize, seed: u64) -> Result<Params> {
        let (block, stem) = (BlockKind::Basic, Stem::Cifar);
        let config = ResNetConfig { block, layers, width: 2, stem, in_chans: 3, zero_init_residual: false };
        let (params, mut rng) = (Params::new(), Rng::new(seed));
        ResNet::new(&params, &config, Statistics::Batch, &mut rng)?;
        Linear::new(&params.sub("fc"), config.features(), classes, true, &mut rng)?;
        Ok(params)
    }

    fn values(params: &Params) -> Result<Vec<(String, Vec<f64>)>> {
        let f64s = |t: Tensor| t.to_dtype(smalti::DType::F64)?.to_vec::<f64>();
        params.tensors().into_iter().map(|(name, t)| Ok((name, f64s(t)?))).collect()
    }

    /// A file as training with `prefix` leaves it, with what else stands in one.
    fn file(of: &Params, prefix: &str) -> Vec<(String, Tensor)> {
        let mut all = vec![("module.queue".to_owned(), Tensor::scalar(1.0))];
        all.extend(of.tensors().into_iter().map(|(name, t)| (format!("{prefix}{name}"), t)));
        all.push(("module.encoder_k.conv1.weight".into(), Tensor::scalar(2.0)));
        all.push(("module.momentum_encoder.conv1.weight".into(), Tensor::scalar(3.0)));
        all
    }

    #[test]
    fn a_backbone_under_every_prefix() -> Result<()> {
        let trained = resnet([1, 1, 1, 1], 16, 1)?;
        for prefix in [
            "module.encoder_q.",
            "encoder_q.",
            "module.base_encoder.",
            "module.encoder.",
            "encoder.",
            "backbone.",
        ] {
            let net = resnet([1, 1, 1, 1], 5, 2)?;
            let head = net.sub("fc").tensors();
            let mut tensors = file(&trained, prefix);
            tensors.retain(|(name, _)| !name.ends_with(COUNTER));
            let report = load_backbone(&net, tensors, "fc.")?;
            let missing = report.missing.iter().filter(|name| !name.ends_with(COUNTER));
            assert_eq!(missing.collect::<Vec<_>>(), ["fc.weight", "fc.bias"], "{prefix}");
            for ((name, ours), (_, theirs)) in values(&net)?.into_iter().zip(values(&trained)?) {
                assert_eq!(name.starts_with("fc."), ours != theirs, "{prefix}{name}");
            }
            assert_eq!(net.sub("fc").tensors()[0].1.to_vec::<f32>()?, head[0].1.to_vec::<f32>()?);
        }
        // a plain backbone
        load_backbone(&resnet([1, 1, 1, 1], 5, 2)?, trained.tensors(), "fc.")?;
        Ok(())
    }

    #[test]
    fn what_is_missing_or_too_much() -> Result<()> {
        let (trained, net) = (resnet([1, 2, 1, 1], 5, 1)?, resnet([1, 1, 1, 1], 5, 2)?);
        let before = values(&net)?;
        let deeper =
            load_backbone(&net, file(&trained, "module.encoder_q."), "fc.").map_err(|e| e.to_string());
        assert!(deeper.is_err_and(|e| e.contains("layer2.1.conv1.weight")));
        let mut cut = file(&resnet([1, 1, 1, 1], 5, 1)?, "module.encoder_q.");
        cut.retain(|(name, _)| !name.ends_with("layer1.0.bn2.running_var"));
        let cut = load_backbone(&net, cut, "fc.").map_err(|e| e.to_string());
        assert!(cut.is_err_and(|e| e.ends_with("encoder: layer1.0.bn2.running_var")));
        assert_eq!(values(&net)?, before);
        Ok(())
    }

    #[test]
    fn whole_models_with_the_prefix() -> Result<()> {
        let folder = tempfile::tempdir().map_err(|e| Error::io(".", e))?;
        let path = folder.path().join("checkpoint_0000.pth.tar");
        let (trained, net) = (resnet([1, 1, 1, 1], 5, 1)?, resnet([1, 1, 1, 1], 5, 2)?);
        save_model(&trained, &path)?;
        let mut tensors = io::load(&path)?.tensors();
        assert!(tensors.iter().all(|(name, _)| name.starts_with("module.")));
        tensors.retain(|(name, _)| !name.ends_with(COUNTER));
        load_model(&net, tensors.clone())?;
        assert_eq!(values(&net)?, values(&trained)?);
        tensors.pop();
        assert!(load_model(&net, tensors).is_err());
        Ok(())
    }
}
