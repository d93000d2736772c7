//! What makes tokens of an image in a vision transformer: a patch projection or convolutions.

use super::vit::{PatchEmbed, VitConfig};
use smalti::{
    ConvOptions, Result, Rng, Tensor, bail, ensure,
    nn::{BatchNorm, BatchNormConfig, Conv2d, Params, Statistics},
};

/// Either kind.
#[derive(Clone, Debug)]
pub(crate) enum Stem {
    Patches(PatchEmbed),
    Convolutions(ConvStem),
}

impl Stem {
    /// As the configuration wants it; `statistics` are those of the norms of a convolutional stem.
    pub fn new(params: &Params, config: &VitConfig, statistics: Statistics, rng: &mut Rng) -> Result<Stem> {
        Ok(match config.conv_stem {
            true => Stem::Convolutions(ConvStem::new(params, config, statistics, rng)?),
            false => Stem::Patches(PatchEmbed::new(&params.sub("proj"), config, true, rng)?),
        })
    }

    /// Every patch, row by row: `[N, C, H, W]` to `[N, L, D]`.
    pub fn forward(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        match self {
            Stem::Patches(project) => project.forward(images),
            Stem::Convolutions(stem) => stem.forward(images, training),
        }
    }

    /// Patches `ids` `[N, K]`.
    pub fn forward_kept(&self, images: &Tensor, ids: &Tensor) -> Result<Tensor> {
        match self {
            Stem::Patches(project) => project.forward_kept(images, ids),
            Stem::Convolutions(_) => bail!("vit", "a convolutional stem sees hidden patches too"),
        }
    }
}

/// The convolutional stem of Xiao et al. (NeurIPS 2021, arXiv 2106.14881) in MoCo v3's layout (`vits.py`).
/// Four times a 3 x 3 convolution of stride 2 without bias, norm and ReLU, with D/8, D/4, D/2, D channels, then a
/// 1 x 1 convolution with bias: one token for every 16 x 16 pixels. Registers `proj.{0,3,6,9,12}` and the norms
/// `proj.{1,4,7,10}`, with PyTorch's default initialisation.
#[derive(Clone, Debug)]
pub struct ConvStem {
    layers: Vec<(Conv2d, BatchNorm)>,
    last: Conv2d,
}

impl ConvStem {
    /// For images and width of `config`. `statistics`: whose means and variances the norms take in training.
    ///
    /// # Errors
    /// If the patches are not of 16 pixels, or the width does not divide by 8.
    pub fn new(
        params: &Params,
        config: &VitConfig,
        statistics: Statistics,
        rng: &mut Rng,
    ) -> Result<ConvStem> {
        let (width, patch) = (config.embed_dim, config.patch_size);
        let fits = patch == 16 && width > 0 && width.is_multiple_of(8);
        ensure!(fits, "conv_stem", "needs patches of 16 and a width divisible by 8, got {patch} and {width}");
        let (params, norm) =
            (params.sub("proj"), BatchNormConfig { statistics, ..BatchNormConfig::default() });
        let options = ConvOptions { stride: [2; 2], padding: [1; 2], ..ConvOptions::default() };
        let mut inputs = config.in_chans;
        let mut layers = Vec::new();
        for (i, part) in [8, 4, 2, 1].into_iter().enumerate() {
            let outputs = width / part;
            let conv = Conv2d::new(&params.sub(3 * i), [inputs, outputs], 3, options, false, rng)?;
            layers.push((conv, BatchNorm::new(&params.sub(3 * i + 1), outputs, &norm)?));
            inputs = outputs;
        }
        let last = Conv2d::new(&params.sub(12), [width; 2], 1, ConvOptions::default(), true, rng)?;
        Ok(ConvStem { layers, last })
    }

    /// Images `[N, C, H, W]` to tokens `[N, H/16 * W/16, D]`, row by row.
    ///
    /// # Errors
    /// If the images have other channels.
    pub fn forward(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        let dtype = self.last.weight().value().dtype();
        // the layout in which convolutions and norms are fastest, and a pixel's channels are a token
        let mut x = images.to_dtype(dtype)?.to_channels_last()?;
        for (conv, norm) in &self.layers {
            x = norm.forward(&conv.forward(&x)?, training)?.relu()?;
        }
        self.last.forward(&x)?.permute([0, 2, 3, 1])?.flatten(1, 2)
    }
}
