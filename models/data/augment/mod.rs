//! Augmentations: pure functions of an image (or a batch) and an [`Rng`](smalti::Rng).

mod affine;
mod colour;
mod crop;
mod erase;
mod mix;
mod normalize;
mod randaugment;

pub use affine::{RandomAffine, RandomShift, affine, rotate};
pub use colour::{
    auto_contrast, blend, brightness, color, contrast, equalize, invert, map_levels, posterize, sharpness,
    solarize, solarize_add,
};
pub use crop::{CropDraw, HorizontalFlip, RandomResizedCrop, ResizeCenterCrop, ResizeTo, center_region};
pub use erase::RandomErasing;
pub use mix::{MixUp, Mixed, soft_targets};
pub use normalize::{IMAGENET_MEAN, IMAGENET_STD, Normalize};
pub use randaugment::{Edit, EditKind, RandAugment, Resample};
