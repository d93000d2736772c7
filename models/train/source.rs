//! From a recipe to batches.

use super::{
    features,
    recipe::{Dims, Recipe, Source},
    trainer::Batches,
};
use crate::data::{
    Batch, Cached, Dataset, Digits, DigitsSplit, Filter, Folder, Images, Loader, LoaderOptions, Pipeline,
    RgbImage, Transform, augment,
    presets::{self, DigitStrength},
};
use smalti::{Error, Result, Rng, Tensor};

/// Bytes of decoded photographs that are kept in memory.
const CACHE: usize = 1 << 30;

/// The stream of the seed that orders and augments.
const DATA_STREAM: u64 = 0x6461_7461;

/// Any loader of labelled images.
pub type Labelled = Box<dyn Batches<Batch = Batch>>;

impl<D: Dataset<Label = i64>, T: Transform> Batches for Loader<D, T> {
    type Batch = Batch;

    fn per_epoch(&self) -> usize {
        self.batches()
    }

    fn epoch_from(&self, epoch: u64, first: usize) -> Box<dyn Iterator<Item = Result<Batch>> + '_> {
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
pub fn pretraining(recipe: &mut Recipe) -> Result<Labelled> {
    let dims = recipe.model.dims()?;
    let data = &mut recipe.data;
    let seed = Rng::new(recipe.seed).stream(DATA_STREAM).next_u64();
    let options = |batch_size| LoaderOptions {
        batch_size,
        seed,
        threads: rayon::current_num_threads(),
        ..LoaderOptions::default()
    };
    match data.source {
        Source::Digits => {
            let strength = DigitStrength { shift: data.shift, degrees: data.rotate, scale: data.zoom };
            let pipeline = presets::digits(dims.img_size as u32, dims.in_chans, Some(strength))?;
            Ok(Box::new(Loader::new(Digits::open(DigitsSplit::Train)?, pipeline, options(data.batch))?))
        }
        Source::Folder => {
            let folder = folder(recipe)?;
            recipe.data.batch = recipe.data.batch.min(folder.len());
            let pipeline = normalized(&dims)?
                .then(augment::RandomResizedCrop::new(dims.img_size as u32, recipe.data.crop_min_area))
                .then(augment::HorizontalFlip(recipe.data.flip));
            Ok(Box::new(Loader::new(Cached::new(folder, CACHE), pipeline, options(recipe.data.batch))?))
        }
    }
}

/// Batches for fine-tuning or a linear probe on labelled images, with the recipe's augmentation.
///
/// # Errors
/// If there are no images, or a folder has no classes.
pub fn supervised(recipe: &Recipe) -> Result<Labelled> {
    let dims = recipe.model.dims()?;
    let (data, finetune) = (&recipe.data, &recipe.finetune);
    let options = LoaderOptions {
        batch_size: data.batch,
        seed: Rng::new(recipe.seed).stream(DATA_STREAM).next_u64(),
        threads: rayon::current_num_threads(),
        ..LoaderOptions::default()
    };
    if data.source == Source::Digits {
        let strength = DigitStrength { shift: data.shift, degrees: data.rotate, scale: data.zoom };
        let pipeline = presets::digits(dims.img_size as u32, dims.in_chans, Some(strength))?;
        return Ok(Box::new(Loader::new(Digits::open(DigitsSplit::Train)?, pipeline, options)?));
    }
    let folder = features::labelled(recipe, features::Split::Train)?;
    let mut pipeline = normalized(&dims)?
        .then(augment::RandomResizedCrop::new(dims.img_size as u32, data.crop_min_area))
        .then(augment::HorizontalFlip(data.flip));
    if let Some(text) = &finetune.randaugment {
        let resample = augment::Resample::Fixed(Filter::Bicubic);
        pipeline = pipeline.then(augment::RandAugment { resample, ..augment::RandAugment::parse(text)? });
    }
    if finetune.reprob > 0.0 {
        pipeline = pipeline.erasing(augment::RandomErasing::new(finetune.reprob));
    }
    Ok(Box::new(Loader::new(folder, pipeline, options)?))
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
        let dims = recipe.model.dims()?;
        match recipe.data.source {
            Source::Digits => {
                let pipeline = presets::digits(dims.img_size as u32, dims.in_chans, None)?;
                Samples::from(&Digits::open(DigitsSplit::Test)?, &pipeline, count)
            }
            Source::Folder => {
                let size = dims.img_size as u32;
                let pipeline = normalized(&dims)?.then(augment::ResizeCenterCrop::new(size, size));
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

/// ImageNet's normalisation, of the grey value for one channel.
pub(super) fn normalized(dims: &Dims) -> Result<Pipeline> {
    Ok(Pipeline::new(match dims.in_chans {
        1 => augment::Normalize::new(&[0.449], &[0.226])?,
        _ => augment::Normalize::imagenet()?,
    }))
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
        let batches = pretraining(&mut digits)?;
        assert_eq!(batches.per_epoch(), 13);
        let batch = batches.epoch_from(3, 12).next().unwrap()?;
        assert_eq!((batch.number, batch.views[0].shape), (12, [100, 1, 8, 8]));

        let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/files/photos");
        let mut recipe = recipe("mae_photos", &["data.batch=100"]);
        assert!(pretraining(&mut recipe).err().unwrap().to_string().contains("--data"));
        recipe.data.folder = Some(photos);
        let batches = pretraining(&mut recipe)?;
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
                let batches = pretraining(&mut recipe)?;
                let first = batches.epoch_from(1, 0).next();
                first.unwrap_or_else(|| Err(Error::msg("no batch")))
            })
        };
        assert_eq!(batch(1)?, batch(2)?);
        Ok(())
    }
}
