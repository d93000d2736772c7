//! Every operation against reference values: each `ops_<group>_<x>.safetensors` in `models/goldens/` and in the
//! folder of the environment variable `SMALTI_GOLDENS` is one trial. The format is described in
//! `models/goldens/ops.md`. Files carry their own arguments, layouts and tolerances; to cover another operation,
//! add its line to the registry of its group.

mod case;
mod file;

mod attention;
mod conv;
mod detection;
mod elementwise;
mod index;
mod loss;
mod matmul;
mod norm;
mod optim;
mod pool;
mod reduce;
mod resize;

use case::Op;
use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

/// Operation name to function, by group.
const GROUPS: [(&str, &[(&str, Op)]); 12] = [
    ("attention", attention::OPS),
    ("conv", conv::OPS),
    ("detection", detection::OPS),
    ("elementwise", elementwise::OPS),
    ("index", index::OPS),
    ("loss", loss::OPS),
    ("matmul", matmul::OPS),
    ("norm", norm::OPS),
    ("optim", optim::OPS),
    ("pool", pool::OPS),
    ("reduce", reduce::OPS),
    ("resize", resize::OPS),
];

fn main() {
    let arguments = Arguments::from_args();
    let summary = Arc::new(Mutex::new(Vec::new()));
    let trials = golden_files()
        .into_iter()
        .map(|path| {
            let (name, summary) = (file_name(&path), summary.clone());
            Trial::test(name, move || {
                let (lines, result) = run(&path);
                summary.lock().unwrap_or_else(PoisonError::into_inner).push(lines);
                result
            })
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    let mut lines = std::mem::take(&mut *summary.lock().unwrap_or_else(PoisonError::into_inner));
    lines.sort();
    lines.iter().for_each(|line| println!("{line}"));
    conclusion.exit();
}

/// The report on one file, and whether it holds.
fn run(path: &Path) -> (String, Result<(), Failed>) {
    let name = file_name(path);
    let group = name.trim_start_matches("ops_").rsplit_once('_').map_or("", |(group, _)| group);
    match GROUPS.iter().find(|(g, _)| *g == group) {
        Some((_, ops)) => {
            let report = file::check(path, ops);
            let result = match report.failures.as_slice() {
                [] => Ok(()),
                failures => Err(failures.join("\n").into()),
            };
            (format!("{}: {report}", path.display()), result)
        }
        None => (format!("{}: unknown group", path.display()), Err(format!("no group `{group}`").into())),
    }
}

fn file_name(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn golden_files() -> Vec<PathBuf> {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/goldens");
    let folders = [Some(shipped), std::env::var_os("SMALTI_GOLDENS").map(PathBuf::from)];
    let mut files: Vec<PathBuf> = folders
        .iter()
        .flatten()
        .flat_map(|folder| match std::fs::read_dir(folder) {
            Ok(entries) => entries.flatten().map(|e| e.path()).collect::<Vec<_>>(),
            Err(e) => panic!("{}: {e}", folder.display()),
        })
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors") && file_name(p).starts_with("ops_"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no reference values found");
    files
}
