//! The linear probe of MoCo, MoCo v3 and SimSiam.

use crate::backbones::{Backbone, BackboneConfig, checkpoint};
use smalti::{
    CrossEntropy, DType, Error, Result, Rng, Tensor,
    nn::{Linear, LoadReport, Params, Statistics, init},
    no_grad,
};

/// A linear layer on a frozen backbone, which stays in evaluation mode also while the layer is trained: its norms
/// use the running statistics and leave them alone. Unlike MAE's probe there is no norm before the layer, and the
/// weight starts normal with deviation 0.01, the bias at 0 (`main_lincls.py`).
///
/// | | optimizer, momentum 0.9, no decay | rate at batch B | schedule |
/// |---|---|---|---|
/// | MoCo | SGD | 30 at 256 | 100 epochs, a tenth from 60 and 80 on |
/// | MoCo v3, ResNet | SGD | 0.1 B / 256, B = 1024 | 90 epochs, cosine |
/// | MoCo v3, ViT | SGD | 3 B / 256, B = 1024 | 90 epochs, cosine |
/// | SimSiam | LARC, all parameters | 0.1 B / 256, B = 4096 | 90 epochs, cosine |
#[derive(Clone, Debug)]
pub struct LinearClassifier {
    params: Params,
    backbone: Backbone,
    config: BackboneConfig,
    linear: Linear,
    /// The backbone's values as they were loaded.
    loaded: Vec<(String, Tensor)>,
}

impl LinearClassifier {
    /// On the backbone of a checkpoint: of MoCo, MoCo v3, SimSiam, a plain one, or a classifier's. The head that stands
    /// there is not taken over.
    ///
    /// # Errors
    /// If the checkpoint lacks parts of the backbone, or has others.
    pub fn new(
        config: &BackboneConfig,
        classes: usize,
        checkpoint: Vec<(String, Tensor)>,
        rng: &mut Rng,
    ) -> Result<LinearClassifier> {
        let (params, name) = (Params::new(), config.head_name());
        let backbone = Backbone::new(&params, config, Statistics::Batch, rng)?;
        let width = config.features();
        let linear = Linear::new(&params.sub(name), width, classes, true, rng)?;
        checkpoint::load_backbone(&params, checkpoint, &format!("{name}."))?;
        linear.weight().set(&init::normal([classes, width], 0.01, rng)?)?;
        if let Some(bias) = params.sub(name).get("bias") {
            bias.set(&init::zeros([classes])?)?;
        }
        let mut model =
            LinearClassifier { params, backbone, config: config.clone(), linear, loaded: Vec::new() };
        model.loaded = model.frozen();
        for (name, _) in &model.loaded {
            model.params.freeze(true, |n| n == name);
        }
        Ok(model)
    }

    /// Backbone, frozen, and linear layer, under the names of official checkpoints.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Loads a whole classifier, such as the official `linear-*.pth.tar`.
    ///
    /// # Errors
    /// If a name is missing or too many, or a shape does not fit.
    pub fn load(&mut self, tensors: Vec<(String, Tensor)>) -> Result<LoadReport> {
        let report = checkpoint::load_model(&self.params, tensors)?;
        self.loaded = self.frozen();
        Ok(report)
    }

    /// Images `[N, C, H, W]` to logits `[N, classes]`.
    ///
    /// # Errors
    /// If the images have another size or other channels.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        self.linear.forward(&no_grad(|| self.backbone.forward(images, false))?)
    }

    /// Mean cross-entropy of labels `[N]`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn loss(&self, images: &Tensor, labels: &Tensor) -> Result<Tensor> {
        self.forward(images)?.cross_entropy(labels, &CrossEntropy::default())
    }

    /// The official code's check after the first epoch: no bit of the backbone differs from what was loaded, running
    /// statistics included.
    ///
    /// # Errors
    /// If one does; all tensors with changes are named.
    pub fn check_frozen(&self) -> Result<()> {
        let mut changed = Vec::new();
        for ((name, now), (_, then)) in self.frozen().into_iter().zip(&self.loaded) {
            if bits(&now)? != bits(then)? {
                changed.push(name);
            }
        }
        match changed.is_empty() {
            true => Ok(()),
            false => Err(Error::msg(format!("the probe has changed the backbone: {}", changed.join(", ")))),
        }
    }

    /// All but the linear layer.
    fn frozen(&self) -> Vec<(String, Tensor)> {
        checkpoint::without_head(self.params.tensors(), &format!("{}.", self.config.head_name()))
    }
}

/// Every dtype of a network fits f64 without rounding.
fn bits(t: &Tensor) -> Result<Vec<u64>> {
    Ok(t.to_dtype(DType::F64)?.to_vec::<f64>()?.into_iter().map(f64::to_bits).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbones::resnet::{BlockKind, ResNetConfig, Stem};
    use smalti::{
        comm::single,
        optim::{Algorithm, Optimizer, Sgd},
    };

    fn networks() -> [BackboneConfig; 2] {
        let vit = crate::moco_v3::tests::vit(false);
        let (block, stem) = (BlockKind::Basic, Stem::Cifar);
        let resnet =
            ResNetConfig { block, layers: [1; 4], width: 4, stem, in_chans: 3, zero_init_residual: false };
        [vit, BackboneConfig::ResNet(resnet)]
    }

    /// From a MoCo v3 checkpoint: the loss falls, the backbone stays, and a touched running mean is found.
    #[test]
    fn trains_the_head_alone() -> Result<()> {
        for backbone in networks() {
            let config = crate::moco_v3::tests::config(backbone);
            let moco = crate::moco_v3::MocoV3::new(&config, single(), &mut Rng::new(1))?;
            let images = Tensor::randn([6, 3, 16, 16], &mut Rng::new(2))?;
            moco.forward(&images, &images, 0.9)?;
            let file = moco.params().tensors().into_iter().map(|(n, t)| (format!("module.{n}"), t));
            let probe = LinearClassifier::new(&config.backbone, 3, file.collect(), &mut Rng::new(3))?;
            assert_eq!(probe.params().trained().len(), 2);
            let features = moco.base().features(&images, false)?.to_vec::<f32>()?;
            assert_eq!(probe.backbone.forward(&images, false)?.to_vec::<f32>()?, features);
            let labels = Tensor::from_slice(&[0i64, 1, 2, 0, 1, 2], [6])?;
            let mut sgd = Sgd { momentum: 0.9, ..Default::default() }.over(&probe.params().trained(), &[])?;
            let mut losses = Vec::new();
            for _ in 0..5 {
                let loss = probe.loss(&images, &labels)?;
                losses.push(loss.item()?);
                sgd.step(&loss.backward()?, 0.05)?;
            }
            assert!(losses[4] < losses[0], "{losses:?}");
            probe.check_frozen()?;
            let all = probe.params().all();
            let touched =
                all.iter().find(|p| p.name().contains("norm.bias") || p.name() == "bn1.running_mean");
            touched.unwrap().update(|v| v.add_scalar(1e-7))?;
            assert!(probe.check_frozen().unwrap_err().to_string().contains(touched.unwrap().name()));
        }
        Ok(())
    }
}
