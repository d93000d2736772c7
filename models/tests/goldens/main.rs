//! Models against reference values of the official code. Reads every file of `models/goldens` and of the folder
//! named by `SMALTI_GOLDENS`; the kind of a file is its name up to the last `_`, and everything else (sizes,
//! weights, inputs, results) comes from the file. To test a new kind, add a file here and a line to `KINDS`.

mod file;
mod flip;
mod flip_2rank;
mod flip_openclip;
mod mae;
mod moco;
mod moco_monitor;
mod moco_shuffle;
mod moco_v3;
mod moco_v3_2rank;
mod nms;
mod roi_align;
mod simsiam;
mod simsiam_lars;
mod window_attention;

use file::{Golden, Report};
use libtest_mimic::{Arguments, Failed, Trial};
use std::{env, fs, path::PathBuf};

type Check = fn(&Golden, &mut Report) -> smalti::Result<()>;

/// Kinds of files and the checks for them.
const KINDS: &[(&str, Check)] = &[
    ("flip", flip::check),
    ("flip_2rank", flip_2rank::check),
    ("flip_openclip", flip_openclip::check),
    ("mae", mae::check),
    ("moco_monitor", moco_monitor::check),
    ("moco_shuffle", moco_shuffle::check),
    ("moco_v1", moco::check),
    ("moco_v2", moco::check),
    ("moco_v3", moco_v3::check),
    ("moco_v3_2rank", moco_v3_2rank::check),
    ("moco_v3_conv", moco_v3::check),
    ("nms", nms::check),
    ("roi_align", roi_align::check),
    ("simsiam", simsiam::check),
    ("simsiam_lars", simsiam_lars::check),
    ("window_attention", window_attention::check),
];

/// Largest deviation allowed, relative to the largest magnitude of the reference tensor.
pub mod tolerance {
    /// Outputs of a model and its loss.
    pub const OUTPUT: f64 = 6e-6;
    /// Losses.
    pub const LOSS: f64 = 5e-6;
    /// Values pooled from boxes in f32, and overlaps of boxes.
    pub const POOLED: f64 = 5e-6;
    /// Gradients.
    pub const GRADIENT: f64 = 1e-5;
    /// Gradients that are what is left of a sum of larger terms: that of a contrastive loss's scale.
    pub const CANCELLING: f64 = 5e-5;
    /// Momentum contrast: values of a step. PyTorch in f32 needs a tenth of this and of the next two.
    pub const MOCO: f64 = 5e-5;
    /// Gradients of a step.
    pub const MOCO_GRADIENT: f64 = 3e-4;
    /// What follows an optimizer's step.
    pub const MOCO_SECOND: f64 = 5e-4;
    /// One attention in f32.
    pub const ATTENTION: f64 = 1e-5;
    /// Error of a half type as a multiple of that of the unfused computation in it.
    pub const HALF_OUTPUT: f64 = 2.0;
    /// The same of gradients.
    pub const HALF_GRADIENT: f64 = 3.0;
    /// What stands behind several batch norms over a handful of samples, which amplify rounding (MoCo v3).
    pub const BATCH_NORMED: f64 = 4e-4;
    /// The loss behind them.
    pub const BATCH_NORMED_LOSS: f64 = 5e-5;
    /// Gradients through them.
    pub const BATCH_NORMED_GRADIENT: f64 = 5e-4;
    /// Running statistics, and parameters after a step.
    pub const STATISTICS: f64 = 1e-5;
    /// Averages of parameters.
    pub const UPDATED: f64 = 1e-6;
    /// Contrastive losses over ranks.
    pub const RANKS: f64 = 3e-6;
    /// Their gradients.
    pub const RANKS_GRADIENT: f64 = 5e-6;
    /// A residual network and its heads (SimSiam).
    pub const DEEP: f64 = 5e-5;
    /// Gradients through them.
    pub const DEEP_GRADIENT: f64 = 2e-4;
    /// Cosines of what comes out of it and their mean, absolute. PyTorch in f32 deviates by up to 2.1e-6 and 8e-7 itself,
    /// depending on its threads, memory format and the order of the samples.
    pub const COSINE: f64 = 2e-6;
    /// The same network after a step of SGD.
    pub const AFTER_A_STEP: f64 = 6e-4;
    /// Cosines of what comes out of it then, absolute.
    pub const COSINE_AFTER_A_STEP: f64 = 5e-5;
    /// In evaluation after two.
    pub const AFTER_TWO_STEPS: f64 = 2e-3;
    /// Tables that are computed in f64 and rounded.
    pub const TABLE: f64 = 1e-7;
}

fn folders() -> Vec<PathBuf> {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("goldens");
    [own].into_iter().chain(env::var_os("SMALTI_GOLDENS").map(PathBuf::from)).collect()
}

fn run(path: PathBuf, check: Check) -> Result<(), Failed> {
    let golden = Golden::read(&path).map_err(|e| e.to_string())?;
    let mut report = Report::default();
    let outcome = check(&golden, &mut report);
    println!("{}\n{report}", path.display());
    outcome.map_err(|e| format!("{}: {e}", path.display()))?;
    report.verdict().map_err(Failed::from)
}

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    let mut untested = Vec::new();
    for folder in folders() {
        let mut files: Vec<PathBuf> = match fs::read_dir(&folder) {
            Ok(entries) => entries.filter_map(|e| Some(e.ok()?.path())).collect(),
            Err(error) => {
                let message = format!("{}: {error}", folder.display());
                trials.push(Trial::test(folder.display().to_string(), move || Err(message.into())));
                continue;
            }
        };
        files.sort();
        for path in files.into_iter().filter(|p| p.extension().is_some_and(|e| e == "safetensors")) {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let kind = stem.rsplit_once('_').map_or(stem.as_str(), |(kind, _)| kind).to_string();
            match KINDS.iter().find(|(name, _)| *name == kind) {
                Some(&(_, check)) => trials.push(Trial::test(stem, move || run(path, check))),
                // single operations have a test of their own in the tensor crate
                None if kind.starts_with("ops_") => {}
                None => untested.push(path),
            }
        }
    }
    for path in untested {
        println!("no test yet for files of this kind: {}", path.display());
    }
    libtest_mimic::run(&arguments, trials).exit();
}
