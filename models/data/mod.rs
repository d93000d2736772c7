//! From files to batches: decode, augment, assemble.
//!
//! A [`Dataset`] gives images and labels by index, a [`Transform`] turns an image into one or several views of
//! floats, a [`Loader`] runs both on all cores ahead of the training loop. Everything random takes an
//! [`Rng`](smalti::Rng) that depends on seed, epoch and index alone, so a batch is the same for any number of
//! threads and after any restart.
//!
//! ```no_run
//! # fn main() -> smalti::Result<()> {
//! use smalti_models::data::{Folder, Loader, LoaderOptions, presets};
//! let dataset = Folder::split("imagenet".as_ref(), "train")?;
//! let options = LoaderOptions { batch_size: 256, seed: 1, ..LoaderOptions::default() };
//! let loader = Loader::new(dataset, presets::mae_pretrain(224)?, options)?;
//! for batch in loader.epoch(0) {
//!     let batch = batch?;
//!     println!("{:?} {:?}", batch.views[0].shape, batch.labels);
//! }
//! for file in loader.skipped() {
//!     eprintln!("{}: {}", file.name, file.reason);
//! }
//! # Ok(())
//! # }
//! ```

pub mod augment;
mod dataset;
mod digits;
mod folder;
pub mod image;
mod loader;
mod pairs;
mod pipeline;
pub mod presets;
mod text;
mod worker;

pub use self::image::{Filter, Region, RgbImage};
pub use dataset::{Cached, Dataset, Sample};
pub use digits::{DIGITS_MEAN, DIGITS_STD, Digits, DigitsSplit};
pub use folder::Folder;
pub use loader::{Batch, Images, Loader, LoaderOptions, OnUnreadable, Skipped};
pub use pairs::{Captions, DIGIT_NAMES, DIGIT_TEMPLATES, DigitPairs, Pairs, choose_captions};
pub use pipeline::{ImageOp, Pipeline, Transform, View, Views};
pub use text::Tokenizer;
pub use worker::Epoch;
