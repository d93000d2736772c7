//! Residual networks with torchvision's names and initialisation.
//!
//! Source: He, Zhang, Ren, Sun, CVPR 2016 (arXiv 1512.03385), in the layout "v1.5" of torchvision: the stride of a
//! stage sits on the 3 x 3 convolution of its first bottleneck.

use serde::{Deserialize, Serialize};
use smalti::{
    ConvOptions, PoolOptions, Result, Rng, Tensor, ensure,
    nn::{BatchNorm, BatchNormConfig, Conv2d, Params, Statistics, init},
};

/// The residual block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockKind {
    /// Two 3 x 3 convolutions: ResNet-18 and -34.
    Basic,
    /// 1 x 1, 3 x 3, 1 x 1 with four times the width at the end: ResNet-50 and deeper.
    Bottleneck,
}

impl BlockKind {
    /// Channels behind the block over its width.
    pub fn expansion(self) -> usize {
        match self {
            BlockKind::Basic => 1,
            BlockKind::Bottleneck => 4,
        }
    }
}

/// What stands before the stages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stem {
    /// 7 x 7 convolution of stride 2 and 3 x 3 max-pooling of stride 2.
    #[default]
    Imagenet,
    /// 3 x 3 convolution of stride 1 and no pooling, for images of 32 pixels (MoCo's CIFAR notebook).
    Cifar,
}

/// Sizes of the network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResNetConfig {
    /// The block.
    pub block: BlockKind,
    /// Blocks of each of the four stages.
    pub layers: [usize; 4],
    /// Width of the first stage; it doubles from stage to stage.
    #[serde(default = "width")]
    pub width: usize,
    /// What stands before the stages.
    #[serde(default)]
    pub stem: Stem,
    /// Channels of the image.
    #[serde(default = "super::vit::three")]
    pub in_chans: usize,
    /// Start with every block as the identity: the gain of its last norm is 0.
    #[serde(default)]
    pub zero_init_residual: bool,
}

fn width() -> usize {
    64
}

impl ResNetConfig {
    /// ResNet-18, -34, -50, -101 or -152.
    pub fn preset(depth: usize) -> Option<ResNetConfig> {
        let (block, layers) = match depth {
            18 => (BlockKind::Basic, [2, 2, 2, 2]),
            34 => (BlockKind::Basic, [3, 4, 6, 3]),
            50 => (BlockKind::Bottleneck, [3, 4, 6, 3]),
            101 => (BlockKind::Bottleneck, [3, 4, 23, 3]),
            152 => (BlockKind::Bottleneck, [3, 8, 36, 3]),
            _ => return None,
        };
        let (stem, zero_init_residual) = (Stem::Imagenet, false);
        Some(ResNetConfig { block, layers, width: width(), stem, in_chans: 3, zero_init_residual })
    }

    /// Width of the features behind the average pool: 2048 for ResNet-50.
    pub fn features(&self) -> usize {
        8 * self.width * self.block.expansion()
    }
}

/// A convolution without bias and its norm.
#[derive(Clone, Debug)]
struct ConvNorm {
    conv: Conv2d,
    norm: BatchNorm,
}

impl ConvNorm {
    /// Registers the convolution and the norm under `names`.
    fn new(
        params: &Params,
        names: [&str; 2],
        channels: [usize; 2],
        (kernel, stride): (usize, usize),
        norm: &BatchNormConfig,
        rng: &mut Rng,
    ) -> Result<ConvNorm> {
        let options = ConvOptions { stride: [stride; 2], padding: [kernel / 2; 2], ..ConvOptions::default() };
        let conv = Conv2d::new(&params.sub(names[0]), channels, kernel, options, false, rng)?;
        // He initialisation by the fan-out.
        let std = (2.0 / (channels[1] * kernel * kernel) as f64).sqrt();
        conv.weight().set(&init::normal(conv.weight().value().shape(), std, rng)?)?;
        Ok(ConvNorm { conv, norm: BatchNorm::new(&params.sub(names[1]), channels[1], norm)? })
    }

    fn forward(&self, x: &Tensor, training: bool) -> Result<Tensor> {
        self.norm.forward(&self.conv.forward(x)?, training)
    }

    /// With a ReLU at the end, behind the sum with `residual` if there is one.
    fn forward_relu(&self, x: &Tensor, residual: Option<&Tensor>, training: bool) -> Result<Tensor> {
        self.norm.forward_relu(&self.conv.forward(x)?, residual, training)
    }
}

/// Convolutions around which a shortcut leads.
#[derive(Clone, Debug)]
struct Block {
    branch: Vec<ConvNorm>,
    downsample: Option<ConvNorm>,
}

impl Block {
    fn new(
        params: &Params,
        config: &ResNetConfig,
        [inputs, width]: [usize; 2],
        stride: usize,
        norm: &BatchNormConfig,
        rng: &mut Rng,
    ) -> Result<Block> {
        let outputs = width * config.block.expansion();
        let shapes: &[_] = match config.block {
            BlockKind::Basic => &[([inputs, width], (3, stride)), ([width, outputs], (3, 1))],
            BlockKind::Bottleneck => {
                &[([inputs, width], (1, 1)), ([width, width], (3, stride)), ([width, outputs], (1, 1))]
            }
        };
        let branch: Vec<ConvNorm> = shapes
            .iter()
            .enumerate()
            .map(|(i, &(channels, kernel))| {
                let names = [format!("conv{}", i + 1), format!("bn{}", i + 1)];
                ConvNorm::new(params, [&names[0], &names[1]], channels, kernel, norm, rng)
            })
            .collect::<Result<_>>()?;
        if let Some(gain) = branch.last().filter(|_| config.zero_init_residual).and_then(|c| c.norm.weight())
        {
            gain.set(&init::zeros([outputs])?)?;
        }
        let downsample = match stride != 1 || inputs != outputs {
            true => {
                let (params, shape) = (params.sub("downsample"), [inputs, outputs]);
                Some(ConvNorm::new(&params, ["0", "1"], shape, (1, stride), norm, rng)?)
            }
            false => None,
        };
        Ok(Block { branch, downsample })
    }

    fn forward(&self, x: &Tensor, training: bool) -> Result<Tensor> {
        let shortcut = match &self.downsample {
            Some(layer) => layer.forward(x, training)?,
            None => x.clone(),
        };
        let mut y = x.clone();
        for (i, layer) in self.branch.iter().enumerate() {
            let residual = (i + 1 == self.branch.len()).then_some(&shortcut);
            y = layer.forward_relu(&y, residual, training)?;
        }
        Ok(y)
    }
}

/// The network without its head: what classifiers and self-supervised heads build on. Registers torchvision's names
/// except `fc.*`.
#[derive(Clone, Debug)]
pub struct ResNet {
    stem: ConvNorm,
    stages: Vec<Vec<Block>>,
    config: ResNetConfig,
}

/// What a network has computed on the way.
#[derive(Clone, Debug)]
pub struct Stages {
    /// Behind the stem, and its pooling if it has one: `[N, width, H / 4, W / 4]`.
    pub stem: Tensor,
    /// Behind each stage; the last is `[N, features, H / 32, W / 32]`.
    pub stages: Vec<Tensor>,
}

impl ResNet {
    /// With torchvision's initialisation. `statistics`: whose means and variances the norms take in training.
    ///
    /// # Errors
    /// If a size is 0.
    pub fn new(
        params: &Params,
        config: &ResNetConfig,
        statistics: Statistics,
        rng: &mut Rng,
    ) -> Result<ResNet> {
        let sizes = config.width > 0 && config.in_chans > 0 && config.layers.iter().all(|&n| n > 0);
        ensure!(sizes, "resnet", "needs at least one channel and one block a stage, got {config:?}");
        let norm = BatchNormConfig { statistics, ..BatchNormConfig::default() };
        let kernel = match config.stem {
            Stem::Imagenet => (7, 2),
            Stem::Cifar => (3, 1),
        };
        let channels = [config.in_chans, config.width];
        let stem = ConvNorm::new(params, ["conv1", "bn1"], channels, kernel, &norm, rng)?;
        let mut inputs = config.width;
        let mut stages = Vec::new();
        for (stage, &blocks) in config.layers.iter().enumerate() {
            let (params, width) = (params.sub(format!("layer{}", stage + 1)), config.width << stage);
            let mut built = Vec::new();
            for i in 0..blocks {
                let stride = if stage > 0 && i == 0 { 2 } else { 1 };
                built.push(Block::new(&params.sub(i), config, [inputs, width], stride, &norm, rng)?);
                inputs = width * config.block.expansion();
            }
            stages.push(built);
        }
        Ok(ResNet { stem, stages, config: config.clone() })
    }

    /// The sizes.
    pub fn config(&self) -> &ResNetConfig {
        &self.config
    }

    /// Images `[N, C, H, W]` to the maps behind the stem and each stage, in channels-last memory order.
    ///
    /// # Errors
    /// If the images have other channels.
    pub fn stages(&self, images: &Tensor, training: bool) -> Result<Stages> {
        // the layout in which convolutions, norms and pooling are fastest; they keep it
        let x = self.stem.forward_relu(&images.to_channels_last()?, None, training)?;
        let stem = match self.config.stem {
            Stem::Imagenet => x.max_pool2d(PoolOptions::new(3, 2, 1))?,
            Stem::Cifar => x,
        };
        let mut stages: Vec<Tensor> = Vec::new();
        for blocks in &self.stages {
            let mut x = stages.last().unwrap_or(&stem).clone();
            for block in blocks {
                x = block.forward(&x, training)?;
            }
            stages.push(x);
        }
        Ok(Stages { stem, stages })
    }

    /// Images `[N, C, H, W]` to features `[N, features]`: the mean over places behind the last stage.
    ///
    /// # Errors
    /// If the images have other channels.
    pub fn forward(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        match self.stages(images, training)?.stages.last() {
            Some(last) => last.mean([2, 3]),
            None => smalti::bail!("resnet", "there are no stages"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smalti::nn::Linear;
    use std::collections::BTreeMap;

    /// Names, shapes and order of torchvision's ResNet-50, and the number of parameters.
    #[test]
    fn torchvisions_names_and_counts() -> Result<()> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/goldens/resnet50_keys.json");
        let text = std::fs::read_to_string(path).unwrap();
        let listed: serde_json::Value = serde_json::from_str(&text).unwrap();
        let params = Params::new();
        let config = ResNetConfig::preset(50).unwrap();
        ResNet::new(&params, &config, Statistics::Batch, &mut Rng::new(0))?;
        Linear::new(&params.sub("fc"), config.features(), 1000, true, &mut Rng::new(0))?;
        let theirs: BTreeMap<String, Vec<usize>> =
            serde_json::from_value(listed["state_dict"].clone()).unwrap();
        let all = params.all();
        let ours: BTreeMap<String, Vec<usize>> =
            all.iter().map(|p| (p.name().to_owned(), p.value().shape().to_vec())).collect();
        assert_eq!(ours, theirs);
        // a parsed object has lost its order; the text has it
        let places: Vec<usize> =
            all.iter().filter_map(|p| text.find(&format!("\"{}\":", p.name()))).collect();
        assert!(places.len() == theirs.len() && places.is_sorted());
        assert_eq!(params.count(), 25_557_032);
        Ok(())
    }

    #[test]
    fn counts_of_the_other_depths() -> Result<()> {
        for (depth, count) in [(18, 11_689_512), (34, 21_797_672), (101, 44_549_160), (152, 60_192_808)] {
            let params = Params::new();
            let config = ResNetConfig::preset(depth).unwrap();
            ResNet::new(&params, &config, Statistics::Batch, &mut Rng::new(0))?;
            assert_eq!(params.count() + (config.features() + 1) * 1000, count, "ResNet-{depth}");
        }
        Ok(())
    }

    /// With the last gains at 0 every block without a downsampling hands on what it gets, which is not negative.
    #[test]
    fn zero_init_residual_and_the_cifar_stem() -> Result<()> {
        let config = ResNetConfig {
            block: BlockKind::Basic,
            layers: [2, 1, 1, 1],
            width: 4,
            stem: Stem::Cifar,
            in_chans: 1,
            zero_init_residual: true,
        };
        let params = Params::new();
        let net = ResNet::new(&params, &config, Statistics::Batch, &mut Rng::new(0))?;
        let images = Tensor::randn([2, 1, 8, 8], &mut Rng::new(1))?;
        let maps = net.stages(&images, true)?;
        assert_eq!(maps.stem.shape(), [2, 4, 8, 8]);
        assert_eq!(maps.stages[0].to_vec::<f32>()?, maps.stem.to_vec::<f32>()?);
        assert_eq!(net.forward(&images, true)?.shape(), [2, 32]);
        assert!(net.forward(&Tensor::randn([2, 3, 8, 8], &mut Rng::new(1))?, true).is_err());
        Ok(())
    }
}
