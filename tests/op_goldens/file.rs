//! One file: reads it, runs each case in f32 and in f64, compares outputs and gradients.

use crate::case::{Case, Op, Stored, list, tensor, text};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use smalti::{BackwardOptions, DType, Error, Gradients, Result, Tensor};
use std::{collections::BTreeMap, fmt, path::Path};

/// What was compared in a file.
#[derive(Default)]
pub struct Report {
    cases: BTreeMap<String, usize>,
    /// Largest deviation relative to its tensor's largest magnitude, and where, in f32 and f64.
    worst: [(f64, String); 2],
    pub failures: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [(single, at), (double, there)] = &self.worst;
        write!(f, "{} cases, {} failures", self.cases.values().sum::<usize>(), self.failures.len())?;
        write!(f, "; largest deviation f32 {single:.1e} ({at}), f64 {double:.1e} ({there})\n   ")?;
        self.cases.iter().try_for_each(|(op, n)| write!(f, " {op} {n}"))
    }
}

/// Runs every case of the file at `path` in both precisions.
pub fn check(path: &Path, ops: &[(&str, Op)]) -> Report {
    let mut report = Report::default();
    if let Err(e) = check_cases(path, ops, &mut report) {
        report.failures.push(e.to_string());
    }
    report
}

fn check_cases(path: &Path, ops: &[(&str, Op)], report: &mut Report) -> Result<()> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let bad = |e: &dyn fmt::Display| Error::format(path, e.to_string());
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(&e))?;
    let cases = header.metadata().as_ref().and_then(|m| m.get("cases")).ok_or_else(|| bad(&"no `cases`"))?;
    let cases: Vec<Value> = serde_json::from_str(cases).map_err(|e| bad(&e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(&e))?;
    for (precision, dtype) in [DType::F32, DType::F64].into_iter().enumerate() {
        let stored = load(&file, dtype)?;
        for spec in &cases {
            let name = text(spec, "name")?;
            let deviation = text(spec, "op")
                .and_then(|op| find(ops, op))
                .and_then(|op| check_case(spec, op, &stored, dtype));
            match deviation {
                Ok(deviation) if deviation >= report.worst[precision].0 => {
                    report.worst[precision] = (deviation, name.to_owned());
                }
                Ok(_) => {}
                Err(e) => report.failures.push(format!("{name} ({dtype}): {e}")),
            }
            if precision == 0 {
                *report.cases.entry(text(spec, "op")?.to_owned()).or_default() += 1;
            }
        }
    }
    Ok(())
}

fn find(ops: &[(&str, Op)], name: &str) -> Result<Op> {
    let found = ops.iter().find(|(op, _)| *op == name);
    found.map(|(_, f)| *f).ok_or_else(|| Error::msg(format!("no operation `{name}` in the registry")))
}

/// All tensors of a file, floats as `dtype`; U8 stands for booleans.
fn load(file: &SafeTensors, dtype: DType) -> Result<Stored> {
    let mut stored = Stored::new();
    for (name, view) in file.tensors() {
        let data = view.data();
        let tensor = match view.dtype() {
            Dtype::F32 => {
                let values: Vec<f32> = data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
                Tensor::from_slice(&values, view.shape())?.to_dtype(dtype)?
            }
            Dtype::I64 => {
                let values: Vec<i64> = data.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect();
                Tensor::from_slice(&values, view.shape())?
            }
            Dtype::U8 => {
                let values: Vec<bool> = data.iter().map(|&b| b != 0).collect();
                Tensor::from_slice(&values, view.shape())?
            }
            other => return Err(Error::msg(format!("tensor `{name}` is {other:?}"))),
        };
        stored.insert(name, tensor);
    }
    Ok(stored)
}

/// Runs one case; the largest relative deviation over its outputs and gradients.
fn check_case(spec: &Value, op: Op, stored: &Stored, dtype: DType) -> Result<f64> {
    let (case, leaves) = Case::new(spec, stored, dtype)?;
    let outputs = op(&case)?;
    let names = list(spec, "outputs")?;
    if outputs.len() != names.len() {
        return Err(Error::msg(format!("{} outputs, {} expected", outputs.len(), names.len())));
    }
    let tolerance = match dtype {
        DType::F32 => (10.0 * spec["f32_error"].as_f64().unwrap_or(0.0)).max(1e-6),
        _ => 1e-6,
    };
    let mut worst = 0.0f64;
    let mut grads = Gradients::default();
    for (i, (output, name)) in outputs.iter().zip(names).enumerate() {
        let name = name.as_str().unwrap_or_default();
        worst = worst.max(compare(name, output, tensor(stored, name)?, tolerance)?);
        let cotangent = if i == 0 { &spec["grad_output"] } else { &spec["more_grad_outputs"][name] };
        if let Some(cotangent) = cotangent.as_str().filter(|_| output.tracked()) {
            let grad = Some(tensor(stored, cotangent)?.clone());
            grads.accumulate(output.backward_with(&BackwardOptions {
                grad,
                retain_graph: true,
                ..Default::default()
            })?)?;
        }
    }
    for (input, expected) in spec["grads"].as_object().into_iter().flatten() {
        let name = expected.as_str().unwrap_or_default();
        let leaf = tensor(&leaves, input)?;
        let none = leaf.detach().zeros_like()?;
        let grad = grads.get(leaf).unwrap_or(&none);
        worst = worst.max(compare(name, grad, tensor(stored, name)?, tolerance)?);
    }
    Ok(worst)
}

/// The largest deviation relative to the largest finite magnitude expected; an error above `tolerance`.
fn compare(name: &str, got: &Tensor, expected: &Tensor, tolerance: f64) -> Result<f64> {
    let fail = |what: String| Err(Error::msg(format!("{name}: {what}")));
    if (got.dtype(), got.shape()) != (expected.dtype(), expected.shape()) {
        let (a, b, c, d) = (got.dtype(), got.shape(), expected.dtype(), expected.shape());
        return fail(format!("{a} {b:?}, expected {c} {d:?}"));
    }
    if !expected.dtype().is_float() {
        let (a, b) =
            (got.to_dtype(DType::I64)?.to_vec::<i64>()?, expected.to_dtype(DType::I64)?.to_vec::<i64>()?);
        return if a == b { Ok(0.0) } else { fail(format!("{a:?}, expected {b:?}")) };
    }
    let a = got.to_dtype(DType::F64)?.to_vec::<f64>()?;
    let b = expected.to_dtype(DType::F64)?.to_vec::<f64>()?;
    let largest = b.iter().filter(|x| x.is_finite()).fold(0.0f64, |m, x| m.max(x.abs()));
    let scale = if largest == 0.0 { 1.0 } else { largest };
    let mut worst = 0.0f64;
    for (i, (&a, &b)) in a.iter().zip(&b).enumerate() {
        let deviation = match b.is_finite() {
            true => (a - b).abs() / scale,
            false if a == b || (a.is_nan() && b.is_nan()) => 0.0,
            false => f64::INFINITY,
        };
        // written so that NaN fails
        if !(deviation <= tolerance) {
            return fail(format!(
                "element {i} is {a}, expected {b}: off by {deviation:.1e} of {scale:.3e}, allowed {tolerance:.1e}"
            ));
        }
        worst = worst.max(deviation);
    }
    Ok(worst)
}
