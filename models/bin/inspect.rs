//! `smalti inspect CHECKPOINT`

use smalti::{Result, io};
use std::{collections::BTreeMap, path::Path, process::ExitCode};

pub fn run(path: &Path) -> Result<ExitCode> {
    let file = io::load(path)?;
    let tensors = file.tensors();
    let width = tensors.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut by_dtype: BTreeMap<String, (usize, usize, usize)> = BTreeMap::new();
    for (name, t) in &tensors {
        println!("{name:<width$}  {:<5} {:?}", t.dtype().to_string(), t.shape());
        let sum = by_dtype.entry(t.dtype().to_string()).or_default();
        *sum = (sum.0 + 1, sum.1 + t.numel(), sum.2 + t.numel() * t.dtype().size());
    }
    for (key, text) in &file.metadata {
        println!("metadata {key}: {}", text.trim_end());
    }
    for (dtype, (count, elements, bytes)) in &by_dtype {
        println!("{count} tensors of {dtype}: {elements} elements, {:.1} MB", *bytes as f64 / 1e6);
    }
    let elements: usize = by_dtype.values().map(|sum| sum.1).sum();
    println!("{} tensors, {elements} elements", tensors.len());
    Ok(ExitCode::SUCCESS)
}
