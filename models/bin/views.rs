//! `smalti views`

use clap::{Args, ValueEnum};
use smalti::{Error, Result};
use smalti_models::{
    data::{
        Digits, DigitsSplit, Folder, Views,
        augment::Normalize,
        presets::{self, DigitViews, TwoViews},
    },
    train::sheet::sheet,
};
use std::{path::PathBuf, process::ExitCode};

/// Images in a row.
const ACROSS: usize = 2;
/// Small pictures are enlarged to about this many pixels.
const SIDE: u32 = 96;

/// Options of `smalti views`.
#[derive(Args)]
pub struct Options {
    /// Whose augmentation.
    kind: Kind,
    /// Folder of images; not for the digits, which are part of the program.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// The picture to write (.png).
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Other views for every seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Side of the views in pixels; 224 if not given, 32 for the digits.
    #[arg(long, value_name = "PIXELS")]
    size: Option<u32>,
    /// Number of images.
    #[arg(long, default_value_t = 12)]
    count: usize,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Kind {
    Digits,
    Moco,
    MocoV2,
    MocoV3,
    Simsiam,
    Flip,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let Options { kind, data, out, seed, size, count } = options;
    let views = views(*kind, *size)?;
    let picture = match (kind, data) {
        (Kind::Digits, None) => {
            sheet(&Digits::open(DigitsSplit::Train)?, &views, *count, ACROSS, SIDE, *seed)?
        }
        (Kind::Digits, Some(_)) => {
            return Err(Error::msg("views digits: --data does not go with the built-in digits"));
        }
        (_, Some(folder)) => sheet(&Folder::open(folder)?, &views, *count, ACROSS, SIDE, *seed)?,
        (_, None) => return Err(Error::msg("views: takes a folder of images; give one by --data DIR")),
    };
    picture.save(out).map_err(|e| Error::format(out, e.to_string()))?;
    println!("{}: each image, then its views", out.display());
    Ok(ExitCode::SUCCESS)
}

fn views(kind: Kind, size: Option<u32>) -> Result<Views> {
    let photo = size.unwrap_or(224);
    let kind = match kind {
        Kind::Digits => return presets::digit_views(size.unwrap_or(32), 1, DigitViews::default()),
        Kind::Flip => return Ok(Views(vec![presets::flip_pretrain(photo)?])),
        Kind::Moco => TwoViews::MocoV1,
        Kind::MocoV2 | Kind::Simsiam => TwoViews::MocoV2,
        Kind::MocoV3 => TwoViews::MocoV3 { min_area: 0.08 },
    };
    presets::two_views(kind, photo, &Normalize::imagenet()?)
}
