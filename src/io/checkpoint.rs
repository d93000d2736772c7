//! Checkpoints of a training run: everything that is needed to go on as if it had never stopped, in one
//! safetensors file.

use super::{Value, load_safetensors, save_safetensors};
use crate::{
    Error, Result, Rng, Tensor,
    nn::{LoadOptions, Params},
    optim::Optimizer,
};
use serde_json::{Map, json};
use std::{collections::BTreeMap, path::Path};

/// Where a run stands. Schedules are functions of the step, so the step is their position too.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Epochs that are complete.
    pub epoch: u64,
    /// Optimizer steps that are complete.
    pub step: u64,
    /// Random generators by name.
    pub rngs: BTreeMap<String, Rng>,
    /// Further tensors by name, such as running averages of the parameters.
    pub tensors: Vec<(String, Tensor)>,
    /// Anything else, such as the configuration.
    pub metadata: serde_json::Value,
}

const KEY: &str = "checkpoint";

/// Writes parameters and buffers, the state of optimizers (by name), and the run's progress. A crash leaves the
/// old file or the new one.
///
/// # Errors
/// If the file cannot be written.
pub fn save(
    path: impl AsRef<Path>,
    params: &Params,
    optimizers: &[(&str, &dyn Optimizer)],
    progress: &Progress,
) -> Result<()> {
    let mut tensors = prefixed("params", params.tensors());
    for (name, optimizer) in optimizers {
        tensors.extend(prefixed(&format!("optimizer.{name}"), optimizer.state()));
    }
    tensors.extend(prefixed("tensors", progress.tensors.clone()));
    let rngs: Map<String, serde_json::Value> =
        progress.rngs.iter().map(|(name, rng)| (name.clone(), json!(rng.state()))).collect();
    let header = json!({
        "epoch": progress.epoch, "step": progress.step, "rngs": rngs, "metadata": progress.metadata,
    });
    save_safetensors(path, &tensors, &[(KEY.into(), header.to_string())])
}

/// Restores what [`save`] wrote, bit for bit.
///
/// # Errors
/// If the file is damaged or belongs to another model or optimizer; nothing has been changed then.
pub fn load(
    path: impl AsRef<Path>,
    params: &Params,
    optimizers: &mut [(&str, &mut dyn Optimizer)],
) -> Result<Progress> {
    let path = path.as_ref();
    let file = load_safetensors(path)?;
    let header = file.metadata.get(KEY).and_then(|text| serde_json::from_str(text).ok());
    let mut progress = header
        .as_ref()
        .and_then(read_header)
        .ok_or_else(|| Error::format(path, "a safetensors file, but no checkpoint of a training run"))?;
    progress.tensors = below(&file.tree, "tensors");
    let restore =
        params.plan(&below(&file.tree, "params"), &LoadOptions { exact: true, ..Default::default() })?;
    let mut before = Vec::new();
    for i in 0..optimizers.len() {
        let (name, optimizer) = &mut optimizers[i];
        before.push(optimizer.state());
        if let Err(error) = optimizer.load_state(&below(&file.tree, &format!("optimizer.{name}"))) {
            // what the optimizers had themselves fits them
            for ((_, optimizer), state) in optimizers.iter_mut().zip(&before).take(i) {
                optimizer.load_state(state)?;
            }
            return Err(error);
        }
    }
    restore.apply()?;
    Ok(progress)
}

fn read_header(header: &serde_json::Value) -> Option<Progress> {
    let mut rngs = BTreeMap::new();
    for (name, state) in header["rngs"].as_object()? {
        let state: Vec<u64> = state.as_array()?.iter().map(|n| n.as_u64()).collect::<Option<_>>()?;
        rngs.insert(name.clone(), Rng::from_state(state.try_into().ok()?));
    }
    Some(Progress {
        epoch: header["epoch"].as_u64()?,
        step: header["step"].as_u64()?,
        rngs,
        tensors: Vec::new(),
        metadata: header["metadata"].clone(),
    })
}

fn prefixed(prefix: &str, tensors: Vec<(String, Tensor)>) -> Vec<(String, Tensor)> {
    tensors.into_iter().map(|(name, t)| (format!("{prefix}.{name}"), t)).collect()
}

fn below(tree: &Value, prefix: &str) -> Vec<(String, Tensor)> {
    let strip = |(name, t): (String, Tensor)| {
        let rest = name.strip_prefix(prefix)?.strip_prefix('.')?.to_owned();
        Some((rest, t))
    };
    tree.tensors().into_iter().filter_map(strip).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        DType,
        optim::{AdamW, Algorithm, Sgd, Stepper},
    };

    fn model(seed: u64) -> Result<(Params, Stepper<AdamW>)> {
        let mut rng = Rng::new(seed);
        let params = Params::new();
        params.param("w", Tensor::randn([5, 3], &mut rng)?)?;
        params.sub("bn").buffer("count", Tensor::from_slice(&[3i64], ())?)?;
        let optimizer = AdamW::default().over(&params.trained(), &[])?;
        Ok((params, optimizer))
    }

    fn step(params: &Params, optimizer: &mut dyn Optimizer, rng: &mut Rng) -> Result<Vec<f32>> {
        let Some(w) = params.get("w") else { return Err(Error::msg("no w")) };
        let x = Tensor::randn([5, 3], rng)?;
        optimizer.step(&w.get().mul(&x)?.exp()?.sum(())?.backward()?, 0.1)?;
        w.value().to_vec()
    }

    #[test]
    fn going_on_is_bit_for_bit_the_same() -> Result<()> {
        let folder = tempfile::tempdir().map_err(|e| Error::io(".", e))?;
        let path = folder.path().join("run.safetensors");
        let (params, mut optimizer) = model(1)?;
        let mut rng = Rng::new(9);
        step(&params, &mut optimizer, &mut rng)?;
        let progress = Progress {
            epoch: 2,
            step: u64::MAX,
            rngs: [("data".to_owned(), rng)].into(),
            tensors: vec![("ema.w".into(), Tensor::ones([2], DType::BF16)?)],
            metadata: json!({"lr": 0.1}),
        };
        save(&path, &params, &[("main", &optimizer)], &progress)?;
        let expected = step(&params, &mut optimizer, &mut rng)?;

        let (params, mut optimizer) = model(2)?;
        let loaded = load(&path, &params, &mut [("main", &mut optimizer)])?;
        assert_eq!((loaded.epoch, loaded.step, &loaded.metadata), (2, u64::MAX, &progress.metadata));
        assert_eq!(loaded.tensors[0].1.dtype(), DType::BF16);
        let mut rng = loaded.rngs["data"];
        assert_eq!(step(&params, &mut optimizer, &mut rng)?, expected);

        let (params, mut optimizer) = model(3)?;
        let before = params.all()[0].value().to_vec::<f32>()?;
        let mut sgd = Sgd::default().over(&params.trained(), &[])?;
        assert!(load(&path, &params, &mut [("main", &mut optimizer), ("main", &mut sgd)]).is_err());
        assert_eq!(params.all()[0].value().to_vec::<f32>()?, before, "a failed load changes nothing");
        assert!(optimizer.state().is_empty());
        Ok(())
    }
}
