//! A file of reference values, and the comparison with it.

use smalti::{DType, Device, Error, Gradients, Result, Tensor, nn::Params};
use std::{collections::BTreeMap, fmt, path::Path};

/// Tensors by name, and the configuration as JSON.
pub struct Golden {
    pub config: serde_json::Value,
    tensors: BTreeMap<String, Tensor>,
}

impl Golden {
    pub fn read(path: &Path) -> Result<Golden> {
        let file = smalti::io::load(path)?;
        let config = file.metadata.get("config").map_or("{}", String::as_str);
        let config = serde_json::from_str(config).map_err(|e| Error::format(path, format!("config: {e}")))?;
        // files are read to the CPU; the test runs where SMALTI_DEVICE says
        let device = Device::current()?;
        let place = |(name, t): (String, Tensor)| Ok((name, t.to_device(device)?));
        Ok(Golden { config, tensors: file.tensors().into_iter().map(place).collect::<Result<_>>()? })
    }

    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::msg(format!("the file has no tensor {name}")))
    }

    /// Tensors whose names start with `prefix`, without it.
    pub fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Tensor)> {
        self.tensors.iter().filter_map(move |(name, t)| Some((name.strip_prefix(prefix)?, t)))
    }

    /// The configuration as `T`; keys that `T` does not know are of no concern to it.
    pub fn config<T: serde::de::DeserializeOwned>(&self, known: &[&str]) -> Result<T> {
        let mut config = self.config.clone();
        if let Some(map) = config.as_object_mut() {
            map.retain(|key, _| known.contains(&key.as_str()));
        }
        serde_json::from_value(config).map_err(|e| Error::msg(format!("config: {e}")))
    }

    /// Checks numbers of the configuration that the model takes for granted.
    pub fn fixed(&self, numbers: &[(&str, f64)]) -> Result<()> {
        for (key, wanted) in numbers {
            let given = self.config.get(key).and_then(serde_json::Value::as_f64);
            if given.is_some_and(|given| given != *wanted) {
                return Err(Error::msg(format!("config: {key} is {given:?}, the model has {wanted}")));
            }
        }
        Ok(())
    }

    /// Compares parameters and buffers, as they are now, with `<prefix><name>`.
    pub fn compare_params(
        &self,
        report: &mut Report,
        params: &Params,
        prefix: &str,
        tolerance: f64,
    ) -> Result<()> {
        for (name, reference) in self.with_prefix(prefix) {
            let param = params.get(name).ok_or_else(|| Error::msg(format!("no parameter {name}")))?.value();
            let tolerance = if param.dtype().is_float() { tolerance } else { 0.0 };
            report.compare(&format!("{prefix}{name}"), &param, reference, tolerance)?;
        }
        Ok(())
    }

    /// Compares gradients with `grad.<name>`; where there is none it counts as 0.
    pub fn compare_grads(
        &self,
        report: &mut Report,
        params: &Params,
        grads: &Gradients,
        tolerance: f64,
    ) -> Result<()> {
        for (name, reference) in self.with_prefix("grad.") {
            let param = params.get(name).ok_or_else(|| Error::msg(format!("no parameter {name}")))?;
            let grad = match grads.get(&param) {
                Some(grad) => grad.clone(),
                None => reference.zeros_like()?,
            };
            report.compare(&format!("grad.{name}"), &grad, reference, tolerance)?;
        }
        Ok(())
    }

    /// Sets every parameter from `weight.<name>`; both sides must name the same ones.
    pub fn load_weights(&self, params: &Params) -> Result<()> {
        let given: BTreeMap<&str, &Tensor> = self.with_prefix("weight.").collect();
        for param in params.all() {
            let value = given
                .get(param.name())
                .ok_or_else(|| Error::msg(format!("the file has no weight {}", param.name())))?;
            param.set(value)?;
        }
        match given.keys().find(|name| params.get(name).is_none()) {
            Some(name) => Err(Error::msg(format!("the model has no parameter {name}"))),
            None => Ok(()),
        }
    }
}

/// What was compared, with the deviations.
#[derive(Default)]
pub struct Report {
    lines: Vec<(String, f64, f64)>,
}

impl Report {
    /// Compares with a tolerance relative to the reference's largest magnitude; integers and masks exactly.
    pub fn compare(&mut self, name: &str, got: &Tensor, reference: &Tensor, tolerance: f64) -> Result<()> {
        if got.shape() != reference.shape() {
            let message = format!("{name}: shape {:?}, reference {:?}", got.shape(), reference.shape());
            return Err(Error::msg(message));
        }
        let values = |t: &Tensor| t.detach().to_dtype(DType::F64)?.to_vec::<f64>();
        let (got, reference) = (values(got)?, values(reference)?);
        let scale = reference.iter().fold(0f64, |m, v| m.max(v.abs()));
        let scale = if scale == 0.0 { 1.0 } else { scale };
        let worst = got.iter().zip(&reference).fold(0f64, |worst, (a, b)| {
            let difference = if a == b { 0.0 } else { (a - b).abs() / scale };
            if difference.is_nan() { f64::INFINITY } else { worst.max(difference) }
        });
        self.lines.push((name.into(), worst, tolerance));
        Ok(())
    }

    /// The error of `got` as a multiple of the error of `other`, both against `exact`.
    pub fn ratio(
        &mut self,
        name: &str,
        got: &Tensor,
        other: &Tensor,
        exact: &Tensor,
        allowed: f64,
    ) -> Result<()> {
        let values = |t: &Tensor| t.detach().to_dtype(DType::F64)?.to_vec::<f64>();
        let exact = values(exact)?;
        let error = |t: &Tensor| -> Result<f64> {
            let worse = |m: f64, d: f64| if d <= m { m } else { d };
            Ok(values(t)?.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, worse))
        };
        let (got, other) = (error(got)?, error(other)?);
        let ratio = if got == 0.0 { 0.0 } else { got / other };
        self.lines.push((name.into(), if ratio.is_nan() { f64::INFINITY } else { ratio }, allowed));
        Ok(())
    }

    pub fn verdict(&self) -> Result<(), String> {
        match self.lines.iter().filter(|(_, got, allowed)| got > allowed).count() {
            0 => Ok(()),
            n => Err(format!("{n} of {} comparisons exceed their tolerance", self.lines.len())),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (name, got, allowed) in &self.lines {
            let verdict = if got > allowed { "  EXCEEDED" } else { "" };
            writeln!(f, "  {name:40} deviation {got:.1e}, allowed {allowed:.0e}{verdict}")?;
        }
        Ok(())
    }
}
