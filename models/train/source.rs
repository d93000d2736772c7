//! From a recipe to batches.

use super::{
    features,
    recipe::{self, Job, Normalization, Recipe, Source, ViewKind},
    sheet::sheet,
    trainer::Batches,
};
use crate::data::{
    Batch, Cached, Captions, Dataset, DigitPairs, Digits, DigitsSplit, Filter, Folder, Images, Loader,
    LoaderOptions, Pairs, Pipeline, RgbImage, Transform, Views, augment,
    presets::{self, DigitStrength, DigitViews, TwoViews},
};
use smalti::{
    Error, Result, Rng, Tensor,
    comm::{self, Comm},
};

/// Bytes of decoded photographs that are kept in memory.
const CACHE: usize = 1 << 30;

/// Images of a contact sheet, how many of them stand side by side, and the least width of a picture, pixels.
const SHEET: (usize, usize, u32) = (24, 3, 96);

/// The stream of the seed that orders and augments.
const DATA_STREAM: u64 = 0x6461_7461;

/// Any loader of labelled images.
pub type Labelled = Box<dyn Batches<Batch = Batch>>;

impl<D: Dataset, T: Transform> Batches for Loader<D, T> {
    type Batch = Batch<D::Label>;

    fn per_epoch(&self) -> usize {
        self.batches()
    }

    fn epoch_from(&self, epoch: u64, first: usize) -> Box<dyn Iterator<Item = Result<Self::Batch>> + '_> {
        Box::new(Loader::epoch_from(self, epoch, first))
    }
}

impl<B: Batches + ?Sized> Batches for Box<B> {
    type Batch = B::Batch;

    fn per_epoch(&self) -> usize {
        (**self).per_epoch()
    }

    fn epoch_from(&self, epoch: u64, first: usize) -> Box<dyn Iterator<Item = Result<B::Batch>> + '_> {
        (**self).epoch_from(epoch, first)
    }
}

/// Images as a tensor `[N, C, H, W]`.
///
/// # Errors
/// None for images that a loader made.
pub fn tensor(images: &Images) -> Result<Tensor> {
    Tensor::from_slice(&images.data, images.shape)
}

/// The folder of a recipe that takes one.
///
/// # Errors
/// If the recipe names none, or it cannot be listed.
pub fn folder(recipe: &Recipe) -> Result<Folder> {
    let Some(path) = &recipe.data.folder else {
        return Err(Error::msg("the recipe takes a folder of images; give one by --data DIR"));
    };
    // ImageNet's layout has its training images in `train`
    if path.join("train").is_dir() { Folder::split(path, "train") } else { Folder::open(path) }
}

/// Batches for pre-training: augmented as the recipe says, in a new order every epoch. A folder with fewer images
/// than a batch makes the batch smaller.
///
/// # Errors
/// If there are no images.
pub fn pretraining(recipe: &mut Recipe, comm: &Comm) -> Result<Labelled> {
    if recipe.data.source == Source::Digits {
        return Ok(Box::new(Loader::new(
            Digits::open(DigitsSplit::Train)?,
            digits(recipe)?,
            options(recipe, comm),
        )?));
    }
    let folder = folder(recipe)?;
    recipe.data.batch = recipe.data.batch.min(folder.len());
    recipe.data.batch -= recipe.data.batch % comm.world();
    let size = recipe.model.img_size() as u32;
    let pipeline = Pipeline::new(normalization(recipe)?)
        .then(augment::RandomResizedCrop::new(size, recipe.data.crop_min_area))
        .then(augment::HorizontalFlip(recipe.data.flip));
    Ok(Box::new(Loader::new(Cached::new(folder, CACHE), pipeline, options(recipe, comm))?))
}

/// Batches of two views of each image, as the recipe's `[views]` say. The batch is not made smaller for a folder of
/// few images: losses and queues depend on it.
///
/// # Errors
/// If there are fewer images than a batch takes.
pub fn two_views(recipe: &Recipe, comm: &Comm) -> Result<Labelled> {
    let views = views(recipe)?;
    if recipe.data.source == Source::Digits {
        return Ok(Box::new(Loader::new(Digits::open(DigitsSplit::Train)?, views, options(recipe, comm))?));
    }
    let folder = folder(recipe)?;
    enough(recipe, folder.len())?;
    Ok(Box::new(Loader::new(Cached::new(folder, CACHE), views, options(recipe, comm))?))
}

/// Batches of images with captions: the digits, or a folder with a file `captions.tsv` (see [`Pairs`]). A batch is
/// not made smaller, as for [`two_views`].
///
/// # Errors
/// If there are fewer images than a batch takes.
pub fn captioned(recipe: &Recipe, comm: &Comm) -> Result<Box<dyn Batches<Batch = Batch<Captions>>>> {
    if recipe.data.source == Source::Digits {
        let pairs = DigitPairs::new(Digits::open(DigitsSplit::Train)?);
        return Ok(Box::new(Loader::new(pairs, digits(recipe)?, options(recipe, comm))?));
    }
    let pairs = pairs(recipe)?;
    enough(recipe, pairs.len())?;
    let view = presets::flip_pretrain(recipe.model.img_size() as u32)?;
    Ok(Box::new(Loader::new(Cached::new(pairs, CACHE), view, options(recipe, comm))?))
}

/// The captioned images of a recipe's folder.
pub(super) fn pairs(recipe: &Recipe) -> Result<Pairs> {
    match &recipe.data.folder {
        Some(path) => Pairs::open(path),
        None => {
            Err(Error::msg("the recipe takes a folder of images with captions.tsv; give one by --data DIR"))
        }
    }
}

/// # Errors
/// If a batch takes more images than there are.
fn enough(recipe: &Recipe, images: usize) -> Result<()> {
    let batch = recipe.data.batch;
    if images >= batch {
        return Ok(());
    }
    Err(Error::msg(format!(
        "data.batch is {batch}, the folder has {images} images; this method needs whole batches"
    )))
}

/// The pipelines of a recipe's views: two for contrast of images, one for captions.
///
/// # Errors
/// If a strength is out of its range.
pub fn views(recipe: &Recipe) -> Result<Views> {
    let (data, views) = (&recipe.data, recipe.views.clone().unwrap_or_default());
    let size = recipe.model.img_size() as u32;
    match (recipe.job, data.source) {
        (Job::Flip, Source::Digits) => return Ok(Views(vec![digits(recipe)?])),
        (Job::Flip, Source::Folder) => return Ok(Views(vec![presets::flip_pretrain(size)?])),
        _ => {}
    }
    if data.source == Source::Digits {
        let recipe::Views { brightness, contrast, blur, sigma, .. } = views;
        let (geometry, min_area) = (strength(recipe), data.crop_min_area);
        let strength = DigitViews { geometry, min_area, brightness, contrast, blur, sigma };
        return presets::digit_views(size, recipe.model.in_chans(), strength);
    }
    let kind = match views.kind {
        ViewKind::MocoV1 => TwoViews::MocoV1,
        ViewKind::MocoV2 => TwoViews::MocoV2,
        ViewKind::MocoV3 => TwoViews::MocoV3 { min_area: data.crop_min_area },
        ViewKind::Cifar => TwoViews::CifarNotebook,
    };
    presets::two_views(kind, size, &normalization(recipe)?)
}

/// Images of the recipe, each followed by its views.
///
/// # Errors
/// If one cannot be read, or there is none.
pub fn contact_sheet(recipe: &Recipe) -> Result<RgbImage> {
    let views = views(recipe)?;
    let seed = Rng::new(recipe.seed).stream(DATA_STREAM).next_u64();
    match recipe.data.source {
        Source::Digits => sheet(&Digits::open(DigitsSplit::Train)?, &views, SHEET.0, SHEET.1, SHEET.2, seed),
        Source::Folder if recipe.job == Job::Flip => {
            sheet(&pairs(recipe)?, &views, SHEET.0, SHEET.1, SHEET.2, seed)
        }
        Source::Folder => sheet(&folder(recipe)?, &views, SHEET.0, SHEET.1, SHEET.2, seed),
    }
}

/// Of one rank of several, each of which has its part of every batch.
fn options(recipe: &Recipe, comm: &Comm) -> LoaderOptions {
    LoaderOptions {
        batch_size: recipe.data.batch / comm.world(),
        share: (comm.rank(), comm.world()),
        seed: Rng::new(recipe.seed).stream(DATA_STREAM).next_u64(),
        threads: rayon::current_num_threads(),
        ..LoaderOptions::default()
    }
}

fn strength(recipe: &Recipe) -> DigitStrength {
    let data = &recipe.data;
    DigitStrength { shift: data.shift, degrees: data.rotate, scale: data.zoom }
}

/// The digits with the recipe's light augmentation.
pub(super) fn digits(recipe: &Recipe) -> Result<Pipeline> {
    presets::digits(recipe.model.img_size() as u32, recipe.model.in_chans(), Some(strength(recipe)))
}

/// Batches for fine-tuning or a linear probe on labelled images, with the recipe's augmentation.
///
/// # Errors
/// If there are no images, or a folder has no classes.
pub fn supervised(recipe: &Recipe) -> Result<Labelled> {
    let comm = &comm::single();
    let (data, finetune) = (&recipe.data, &recipe.finetune);
    if data.source == Source::Digits {
        return Ok(Box::new(Loader::new(
            Digits::open(DigitsSplit::Train)?,
            digits(recipe)?,
            options(recipe, comm),
        )?));
    }
    let folder = features::labelled(recipe, features::Split::Train)?;
    let mut pipeline = Pipeline::new(normalization(recipe)?)
        .then(augment::RandomResizedCrop::new(recipe.model.img_size() as u32, data.crop_min_area))
        .then(augment::HorizontalFlip(data.flip));
    if let Some(text) = &finetune.randaugment {
        let resample = augment::Resample::Fixed(Filter::Bicubic);
        pipeline = pipeline.then(augment::RandAugment { resample, ..augment::RandAugment::parse(text)? });
    }
    if finetune.reprob > 0.0 {
        pipeline = pipeline.erasing(augment::RandomErasing::new(finetune.reprob));
    }
    Ok(Box::new(Loader::new(folder, pipeline, options(recipe, comm))?))
}

/// Some images as the model sees them without augmentation, and the way back to pixels.
pub struct Samples {
    /// `[N, C, H, W]`
    pub images: Images,
    /// Makes pixels of them again.
    pub normalize: augment::Normalize,
}

impl Samples {
    /// Evenly spaced ones: digits of the test rows, or images of the recipe's folder.
    ///
    /// # Errors
    /// If none can be read.
    pub fn of(recipe: &Recipe, count: usize) -> Result<Samples> {
        let size = recipe.model.img_size() as u32;
        match recipe.data.source {
            Source::Digits => {
                let pipeline = presets::digits(size, recipe.model.in_chans(), None)?;
                Samples::from(&Digits::open(DigitsSplit::Test)?, &pipeline, count)
            }
            Source::Folder => {
                let pipeline =
                    Pipeline::new(normalization(recipe)?).then(augment::ResizeCenterCrop::new(size, size));
                Samples::from(&folder(recipe)?, &pipeline, count)
            }
        }
    }

    fn from(dataset: &impl Dataset<Label = i64>, pipeline: &Pipeline, count: usize) -> Result<Samples> {
        let count = count.min(dataset.len());
        let mut images = Images { shape: [0; 4], data: Vec::new() };
        for i in 0..count {
            // a file that cannot be read is the loader's matter
            let Ok(sample) = dataset.get(i * dataset.len() / count) else { continue };
            let view = pipeline.view(&sample.image, &mut Rng::new(0))?;
            let [c, h, w] = view.shape;
            images.shape = [images.shape[0] + 1, c, h, w];
            images.data.extend(view.data);
        }
        if images.data.is_empty() {
            return Err(Error::msg("none of the images chosen for the preview can be read"));
        }
        Ok(Samples { images, normalize: pipeline.normalize().clone() })
    }

    /// Floats `[N, C, H, W]` as pictures.
    ///
    /// # Errors
    /// If there are more or fewer than the samples have.
    pub fn pictures(&self, values: &[f32]) -> Result<Vec<RgbImage>> {
        let [_, c, h, w] = self.images.shape;
        values.chunks(c * h * w).map(|one| self.normalize.image(one, [c, h, w])).collect()
    }
}

/// The recipe's normalisation of photographs.
pub(super) fn normalization(recipe: &Recipe) -> Result<augment::Normalize> {
    match (recipe.data.normalize, recipe.model.in_chans()) {
        (Normalization::Imagenet, 1) => augment::Normalize::new(&[0.449], &[0.226]),
        (Normalization::Imagenet, _) => augment::Normalize::imagenet(),
        (Normalization::Cifar10, _) => augment::Normalize::new(&augment::CIFAR10_MEAN, &augment::CIFAR10_STD),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn recipe(name: &str, overrides: &[&str]) -> Recipe {
        Recipe::load(name, &overrides.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn digits_and_photos() -> Result<()> {
        let mut digits = recipe("mae_digits", &["data.batch=100"]);
        let batches = pretraining(&mut digits, &comm::single())?;
        assert_eq!(batches.per_epoch(), 13);
        let batch = batches.epoch_from(3, 12).next().unwrap()?;
        assert_eq!((batch.number, batch.views[0].shape), (12, [100, 1, 8, 8]));

        let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/files/photos");
        let mut recipe = recipe("mae_photos", &["data.batch=100"]);
        assert!(pretraining(&mut recipe, &comm::single()).err().unwrap().to_string().contains("--data"));
        recipe.data.folder = Some(photos);
        let batches = pretraining(&mut recipe, &comm::single())?;
        assert_eq!((batches.per_epoch(), recipe.data.batch), (1, 12), "all twelve make one batch");
        let samples = Samples::of(&recipe, 5)?;
        assert_eq!(samples.images.shape, [5, 3, 64, 64]);
        assert_eq!(samples.pictures(&samples.images.data)?.len(), 5);
        Ok(())
    }

    /// The same pixels for any number of threads.
    #[test]
    fn one_and_two_threads_augment_alike() -> Result<()> {
        let batch = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut recipe = recipe("mae_digits", &[]);
            pool.install(|| -> Result<Batch> {
                let batches = pretraining(&mut recipe, &comm::single())?;
                let first = batches.epoch_from(1, 0).next();
                first.unwrap_or_else(|| Err(Error::msg("no batch")))
            })
        };
        assert_eq!(batch(1)?, batch(2)?);
        Ok(())
    }
}
