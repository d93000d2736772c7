//! From a checkpoint and a recipe to features of training and test images.

use super::{
    Encoder, Recipe,
    recipe::Source,
    source::{self, normalization},
};
use crate::{
    backbones::vit::{Pool, VitClassifier},
    data::{Dataset, Digits, DigitsSplit, Folder, Loader, LoaderOptions, Pipeline, augment, presets},
    evaluate::Features,
    mae::transfer::load_encoder,
};
use smalti::{Error, Result, Rng, Tensor, io};
use std::path::Path;

/// Images that go through the encoder at a time.
const BATCH: usize = 64;

/// Which part of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// That which is trained on.
    Train,
    /// That which is tested on.
    Test,
}

/// The recipe that stands in a checkpoint's metadata.
///
/// # Errors
/// If the file cannot be read or its recipe does not parse.
pub fn recipe_of(path: &Path) -> Result<Option<Recipe>> {
    let file = io::load(path)?;
    file.metadata.get("recipe").map(|text| Recipe::parse(path, text, &[])).transpose()
}

/// A classifier of the recipe's size with the encoder of named tensors; its head is new.
///
/// # Errors
/// If an encoder parameter is missing or a shape does not fit.
pub fn classifier(
    recipe: &Recipe,
    tensors: Vec<(String, Tensor)>,
    classes: usize,
    pool: Pool,
) -> Result<VitClassifier> {
    let mut rng = Rng::new(recipe.seed).stream(0x6865_6164);
    let config = recipe.model.dims()?.mae().vit();
    let model = VitClassifier::new(&config, classes, pool, recipe.finetune.drop_path, &mut rng)?;
    load_encoder(&model, tensors)?;
    Ok(model)
}

/// Batches of images with what belongs to each.
pub type InOrder<L> = Box<dyn Iterator<Item = Result<(Tensor, Vec<L>)>>>;

/// Batches of images with their classes.
pub type Labelled = InOrder<i64>;

/// The images of a split, each once and in order, without augmentation.
///
/// # Errors
/// If there are no images, or no classes where a folder should have them.
pub fn batches(recipe: &Recipe, split: Split) -> Result<Labelled> {
    let size = recipe.model.img_size() as u32;
    match recipe.data.source {
        Source::Digits => {
            let split = if split == Split::Train { DigitsSplit::Train } else { DigitsSplit::Test };
            in_order(Digits::open(split)?, presets::digits(size, recipe.model.in_chans(), None)?)
        }
        Source::Folder => in_order(labelled(recipe, split)?, photographs(recipe)?),
    }
}

/// The middle of photographs, as large as the recipe's model takes them.
///
/// # Errors
/// If the model has neither one nor three channels.
pub(super) fn photographs(recipe: &Recipe) -> Result<Pipeline> {
    let size = recipe.model.img_size() as u32;
    let short = if size > 224 { size } else { (f64::from(size) / 0.875) as u32 };
    Ok(Pipeline::new(normalization(recipe)?).then(augment::ResizeCenterCrop::new(short, size)))
}

/// Images with their labels, each once and in order.
///
/// # Errors
/// If there are none.
pub(super) fn in_order<D: Dataset>(dataset: D, pipeline: Pipeline) -> Result<InOrder<D::Label>> {
    let options = LoaderOptions { threads: rayon::current_num_threads(), ..LoaderOptions::evaluation(BATCH) };
    let batches = Loader::new(dataset, pipeline, options)?.epoch(0);
    Ok(Box::new(batches.map(|batch| {
        let batch = batch?;
        Ok((source::tensor(&batch.views[0])?, batch.labels))
    })))
}

/// Features of a split.
///
/// # Errors
/// As [`batches`].
pub fn features(encoder: &Encoder, recipe: &Recipe, split: Split) -> Result<Features> {
    Features::extract(batches(recipe, split)?, |images| encoder.features(images))
}

/// Raw levels of the digits, 0 to 1.
///
/// # Errors
/// None: they are part of the program.
pub fn raw_digits(split: DigitsSplit) -> Result<Features> {
    let digits = Digits::open(split)?;
    Features::new(Tensor::from_slice(&digits.array(1), [digits.len(), 64])?, digits.labels())
}

/// `train` or `val` of the recipe's folder, with the numbers that the training folder gives the classes.
///
/// # Errors
/// If a folder is missing or has no classes.
pub fn labelled(recipe: &Recipe, split: Split) -> Result<Folder> {
    let train = source::folder(recipe)?;
    let Some(root) = recipe.data.folder.as_deref().filter(|_| train.classes().len() > 1) else {
        return Err(Error::msg("labels are needed: the folder must hold train/<class>/ and val/<class>/"));
    };
    match split {
        Split::Train => Ok(train),
        Split::Test => Folder::split(root, "val")?.with_classes(train.classes()),
    }
}
