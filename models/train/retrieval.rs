//! Retrieval between the images and captions of a recipe's folder.

use super::{Recipe, features, source};
use crate::{
    data::{Dataset, Tokenizer},
    evaluate::{Recall, recall as recall_of},
    flip::Flip,
};
use smalti::{Result, Tensor, no_grad};
use std::fmt;

/// Captions that are encoded at a time.
const CAPTIONS: usize = 256;

/// How much of a folder is found.
pub struct Found {
    /// Its parts.
    pub recall: Recall,
    /// Images and captions in the folder.
    pub of: [usize; 2],
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Found { recall, of: [images, captions] } = self;
        write!(f, "recall among {images} images and {captions} captions")?;
        for (at, (text, image)) in
            recall.at.iter().zip(recall.image_to_text.iter().zip(&recall.text_to_image))
        {
            let (text, image) = (text * 100.0, image * 100.0);
            write!(f, "\n  @{at:<3}  image to text {text:>5.1} %   text to image {image:>5.1} %")?;
        }
        Ok(())
    }
}

/// Recall at `at` of all images of the recipe's folder and all their captions (see [`Pairs`](crate::data::Pairs)), as
/// [`recall`](crate::evaluate::recall) counts it.
///
/// # Errors
/// If the recipe has no folder, an image cannot be read, or a number in `at` is 0.
pub fn recall(model: &Flip, tokenizer: &Tokenizer, recipe: &Recipe, at: &[usize]) -> Result<Found> {
    let pairs = source::pairs(recipe)?;
    let (mut texts, mut image_of) = (Vec::new(), Vec::new());
    for image in 0..pairs.len() {
        texts.extend_from_slice(&pairs.captions(image).texts);
        image_of.resize(texts.len(), image);
    }
    let batches = features::in_order(pairs, features::photographs(recipe)?)?;
    let images = rows(batches.map(|batch| no_grad(|| model.encode_image(&batch?.0, None))))?;
    let captions = rows(
        texts
            .chunks(CAPTIONS)
            .map(|texts| no_grad(|| model.encode_text(&tokenizer.encode_all(texts)?, None))),
    )?;
    let of = [images.shape()[0], texts.len()];
    Ok(Found { recall: recall_of(&images, &captions, &image_of, at)?, of })
}

/// All rows one under the other.
fn rows(parts: impl Iterator<Item = Result<Tensor>>) -> Result<Tensor> {
    let parts = parts.collect::<Result<Vec<_>>>()?;
    Tensor::cat(&parts.iter().collect::<Vec<_>>(), 0)
}
