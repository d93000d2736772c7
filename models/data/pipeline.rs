//! From an image to what a network is given.

use std::{borrow::Cow, fmt};

use smalti::{Result, Rng};

use super::{
    RgbImage,
    augment::{Normalize, RandomErasing, resize_unclipped},
};

/// An image as floats [C, H, W].
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// Channels, rows, columns.
    pub shape: [usize; 3],
    /// The values, in this order.
    pub data: Vec<f32>,
}

/// An edit of 8-bit pixels. The result must depend on the image and the random stream alone.
pub trait ImageOp: fmt::Debug + Send + Sync {
    /// The edited image, or the same one if there is nothing to do.
    fn apply<'a>(&self, image: Cow<'a, RgbImage>, rng: &mut Rng) -> Result<Cow<'a, RgbImage>>;
}

/// Makes one or several views of an image, always as many and of the same shapes.
pub trait Transform: Send + Sync + 'static {
    /// The views. An error ends the epoch: it means a wrong setting, not a bad file.
    fn views(&self, image: &RgbImage, rng: &mut Rng) -> Result<Vec<View>>;
}

/// Edits in order, normalisation, random erasing: one view.
#[derive(Debug)]
pub struct Pipeline {
    ops: Vec<Box<dyn ImageOp>>,
    unclipped: Option<u32>,
    normalize: Normalize,
    erasing: Option<RandomErasing>,
}

impl Pipeline {
    /// A pipeline that only normalises.
    pub fn new(normalize: Normalize) -> Self {
        Pipeline { ops: Vec::new(), unclipped: None, normalize, erasing: None }
    }

    /// Adds an edit behind those there are.
    pub fn then(mut self, op: impl ImageOp + 'static) -> Self {
        self.ops.push(Box::new(op));
        self
    }

    /// Scales to `size` x `size` behind the edits, in floats: see [`resize_unclipped`]. The normalisation must be
    /// one of three channels.
    pub fn resize_unclipped(mut self, size: u32) -> Self {
        self.unclipped = Some(size);
        self
    }

    /// The edits.
    pub fn ops(&self) -> &[Box<dyn ImageOp>] {
        &self.ops
    }

    /// Erases behind the normalisation.
    pub fn erasing(mut self, erasing: RandomErasing) -> Self {
        self.erasing = Some(erasing);
        self
    }

    /// The normalisation, for undoing it.
    pub fn normalize(&self) -> &Normalize {
        &self.normalize
    }

    /// The view of an image.
    pub fn view(&self, image: &RgbImage, rng: &mut Rng) -> Result<View> {
        let mut image = Cow::Borrowed(image);
        for op in &self.ops {
            image = op.apply(image, rng)?;
        }
        let mut view = match self.unclipped {
            Some(size) => self.normalize.levels(resize_unclipped(&image, size)?)?,
            None => self.normalize.view(&image),
        };
        if let Some(erasing) = &self.erasing {
            erasing.apply(&mut view, rng);
        }
        Ok(view)
    }
}

impl Transform for Pipeline {
    fn views(&self, image: &RgbImage, rng: &mut Rng) -> Result<Vec<View>> {
        Ok(vec![self.view(image, rng)?])
    }
}

/// Several views, one by each pipeline, each with random numbers of its own: two views for contrastive learning.
#[derive(Debug)]
pub struct Views(pub Vec<Pipeline>);

impl Transform for Views {
    fn views(&self, image: &RgbImage, rng: &mut Rng) -> Result<Vec<View>> {
        self.0.iter().map(|pipeline| pipeline.view(image, &mut rng.fork())).collect()
    }
}
