//! Parameters to and from files.

use super::{Param, Params};
use crate::{Error, Result, Tensor, io};
use std::{collections::HashMap, fmt, path::Path};

/// How to load tensors into parameters.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Are names that the model lacks, or the file, an error? Shapes that differ always are.
    pub strict: bool,
    /// Must dtypes be equal? Otherwise they are converted.
    pub exact: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions { strict: true, exact: false }
    }
}

/// What came of loading.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadReport {
    /// Number of parameters and buffers that took a value.
    pub loaded: usize,
    /// Names that the file lacks.
    pub missing: Vec<String>,
    /// Names that the model lacks.
    pub unexpected: Vec<String>,
    /// Names whose tensors do not fit, with both shapes.
    pub misfits: Vec<String>,
}

impl LoadReport {
    /// Did every name find its tensor, and every tensor its name?
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.misfits.is_empty()
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} loaded", self.loaded)?;
        for (what, names) in
            [("missing", &self.missing), ("unexpected", &self.unexpected), ("do not fit", &self.misfits)]
        {
            if !names.is_empty() {
                write!(f, "; {} {what}: {}", names.len(), names.join(", "))?;
            }
        }
        Ok(())
    }
}

/// A load that has been checked and not yet been made.
pub(crate) struct Plan {
    pairs: Vec<(Param, Tensor)>,
    report: LoadReport,
}

impl Plan {
    /// Gives the parameters their values.
    pub fn apply(self) -> Result<LoadReport> {
        for (param, tensor) in &self.pairs {
            param.set(tensor)?;
        }
        Ok(self.report)
    }
}

impl Params {
    /// Loads a safetensors file or a `.pth` into this branch; every name must be there and fit. Names are those
    /// within the branch.
    ///
    /// # Errors
    /// If the file is damaged, or names or shapes differ: all of them are listed. Nothing has been changed then.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<LoadReport> {
        let path = path.as_ref();
        let tensors = io::load(path)?.tensors();
        self.load_tensors(&tensors, &LoadOptions::default()).map_err(|e| Error::format(path, e.to_string()))
    }

    /// Loads named tensors into this branch.
    ///
    /// # Errors
    /// As the options say; nothing has been changed then.
    pub fn load_tensors(&self, tensors: &[(String, Tensor)], options: &LoadOptions) -> Result<LoadReport> {
        self.plan(tensors, options)?.apply()
    }

    /// Checks a load.
    pub(crate) fn plan(&self, tensors: &[(String, Tensor)], options: &LoadOptions) -> Result<Plan> {
        let mut left: HashMap<&str, &Tensor> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
        let mut report = LoadReport::default();
        let mut pairs = Vec::new();
        for param in self.all() {
            let name = self.short_name(&param);
            let Some(tensor) = left.remove(name) else {
                report.missing.push(name.to_owned());
                continue;
            };
            let value = param.value();
            if value.shape() != tensor.shape() || (options.exact && value.dtype() != tensor.dtype()) {
                let (a, b) = (tensor.dtype(), value.dtype());
                report.misfits.push(format!(
                    "{name} ({a} {:?}, needs {b} {:?})",
                    tensor.shape(),
                    value.shape()
                ));
                continue;
            }
            pairs.push((param.clone(), tensor.detach().to_dtype(value.dtype())?.contiguous()?));
        }
        let unexpected = tensors.iter().map(|(name, _)| name).filter(|name| left.contains_key(name.as_str()));
        report.unexpected = unexpected.cloned().collect();
        report.loaded = pairs.len();
        if !report.misfits.is_empty() || (options.strict && !report.is_complete()) {
            return Err(Error::msg(format!("load: {report}")));
        }
        Ok(Plan { pairs, report })
    }

    /// Parameters and buffers of this branch by their names within it.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        self.all().iter().map(|p| (self.short_name(p).to_owned(), p.value())).collect()
    }

    /// Writes parameters and buffers of this branch: as `.pth` with one key `model` if the name ends so, else as
    /// safetensors.
    ///
    /// # Errors
    /// If the file cannot be written; what was at `path` is still there then.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if matches!(extension, "pth" | "pt" | "tar") {
            let model = io::Value::state_dict(self.tensors());
            return io::save_pth(path, &io::Value::Dict(vec![("model".into(), model)]));
        }
        io::save_safetensors(path, &self.tensors(), &[])
    }

    fn short_name<'a>(&self, param: &'a Param) -> &'a str {
        let prefix = self.full_name("");
        param.name().strip_prefix(&prefix).unwrap_or(param.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    fn model() -> Result<Params> {
        let params = Params::new();
        let branch = params.sub("net");
        branch.param("w", Tensor::zeros([2, 3], DType::F32)?)?;
        branch.param("b", Tensor::zeros([3], DType::F32)?)?;
        branch.buffer("n", Tensor::zeros((), DType::I64)?)?;
        Ok(params)
    }

    #[test]
    fn report_by_name() -> Result<()> {
        let params = model()?;
        let w = Tensor::arange(6, DType::F64)?.reshape([3, 2])?.permute([1, 0])?;
        let mut tensors = vec![("w".to_owned(), w), ("c".to_owned(), Tensor::scalar(1.0))];
        let lax = LoadOptions { strict: false, ..Default::default() };
        let strict = params.sub("net").load_tensors(&tensors, &LoadOptions::default());
        assert_eq!(
            strict.map_err(|e| e.to_string()),
            Err("load: 1 loaded; 2 missing: b, n; 1 unexpected: c".to_owned())
        );
        assert_eq!(params.all()[0].value().to_vec::<f32>()?, [0.0; 6], "a failed load changes nothing");
        let report = params.sub("net").load_tensors(&tensors, &lax)?;
        assert_eq!((report.loaded, report.missing.len()), (1, 2));
        assert_eq!(params.all()[0].value().to_vec::<f32>()?, [0., 2., 4., 1., 3., 5.]);
        tensors.push(("b".into(), Tensor::ones([4], DType::F32)?));
        let misfit = params.sub("net").load_tensors(&tensors, &lax).map_err(|e| e.to_string());
        assert!(misfit.is_err_and(|e| e.contains("b (f32 [4], needs f32 [3])")));
        Ok(())
    }

    #[test]
    fn files_of_both_kinds() -> Result<()> {
        let folder = tempfile::tempdir().map_err(|e| Error::io(".", e))?;
        let params = model()?;
        params.all()[1].update(|b| b.add_scalar(1.5))?;
        for name in ["a.pth", "a.safetensors"] {
            let path = folder.path().join(name);
            params.save(&path)?;
            let other = model()?;
            assert_eq!(other.load(&path)?.loaded, 3);
            assert_eq!(other.all()[1].value().to_vec::<f32>()?, [1.5; 3]);
            assert!(other.sub("net").load(&path).is_err(), "names within the branch have no prefix");
        }
        Ok(())
    }
}
