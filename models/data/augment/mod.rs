//! Augmentations: pure functions of an image (or a batch) and an [`Rng`](smalti::Rng).

mod affine;
mod blur;
mod colour;
mod crop;
mod erase;
mod hue;
mod jitter;
mod mix;
mod normalize;
mod randaugment;
mod unclipped;

pub use affine::{RandomAffine, RandomShift, affine, rotate};
pub use blur::gaussian_blur;
pub use colour::{
    auto_contrast, blend, brightness, color, contrast, equalize, grayscale, invert, map_levels, posterize,
    sharpness, solarize, solarize_add,
};
pub use crop::{
    CropDraw, HorizontalFlip, RandomRegion, RandomResizedCrop, ResizeCenterCrop, ResizeTo, center_region,
};
pub use erase::RandomErasing;
pub use hue::hue;
pub use jitter::{ColorJitter, GaussianBlur, Grayscale, Randomly, Solarize, Tint};
pub use mix::{MixUp, Mixed, soft_targets};
pub use normalize::{CIFAR10_MEAN, CIFAR10_STD, IMAGENET_MEAN, IMAGENET_STD, Normalize};
pub use randaugment::{Edit, EditKind, RandAugment, Resample};
pub use unclipped::resize_unclipped;
