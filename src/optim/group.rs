//! Parameter groups: which parameters get another learning rate or weight decay, chosen by name.

use crate::nn::Param;
use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

/// Settings for the parameters that it chooses. Where several groups choose one parameter, their learning rate
/// factors multiply, and of the other settings the last counts.
#[derive(Clone)]
pub struct Group {
    choose: Arc<dyn Fn(&str) -> bool + Send + Sync>,
    pub(super) lr_scale: f64,
    pub(super) fixed_lr: Option<f64>,
    pub(super) weight_decay: Option<f64>,
    pub(super) trust: Option<bool>,
}

impl Group {
    /// Chooses by full name: `Group::new(|name| name.starts_with("head.")).lr_scale(10.0)`.
    pub fn new(choose: impl Fn(&str) -> bool + Send + Sync + 'static) -> Group {
        Group { choose: Arc::new(choose), lr_scale: 1.0, fixed_lr: None, weight_decay: None, trust: None }
    }

    /// Chooses the named parameters.
    pub fn named<'a>(names: impl IntoIterator<Item = &'a str>) -> Group {
        let names: HashSet<String> = names.into_iter().map(str::to_owned).collect();
        Group::new(move |name| names.contains(name))
    }

    /// Multiplies the learning rate.
    pub fn lr_scale(self, lr_scale: f64) -> Group {
        Group { lr_scale, ..self }
    }

    /// Takes the place of the learning rate that a step is called with, which a schedule lowers: SimSiam's predictor
    /// keeps its first one (`main_simsiam.py --fix-pred-lr`).
    pub fn fixed_lr(self, lr: f64) -> Group {
        Group { fixed_lr: Some(lr), ..self }
    }

    /// Replaces the optimizer's weight decay.
    pub fn weight_decay(self, weight_decay: f64) -> Group {
        Group { weight_decay: Some(weight_decay), ..self }
    }

    /// Whether LARS and LAMB scale the step by the trust ratio.
    pub fn trust(self, trust: bool) -> Group {
        Group { trust: Some(trust), ..self }
    }

    pub(super) fn chooses(&self, name: &str) -> bool {
        (self.choose)(name)
    }
}

/// No weight decay for what has at most one dimension: biases, gains and shifts of norms.
pub fn no_decay_1d(params: &[Param]) -> Group {
    let flat = params.iter().filter(|p| p.value().rank() <= 1);
    Group::named(flat.map(Param::name)).weight_decay(0.0)
}

/// Layer-wise learning rate decay: a parameter of layer l (as `layer` numbers names) gets the factor
/// `decay^(last - l)`, where `last` is the number of the last layer. For a vision transformer of depth n: 0 for
/// what comes before the blocks, i + 1 for block i, `last` = n + 1 for all else (BEiT; MAE's `lr_decay.py`).
pub fn layer_decay(params: &[Param], layer: impl Fn(&str) -> usize, last: usize, decay: f64) -> Vec<Group> {
    let mut by_layer: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for name in params.iter().map(Param::name) {
        by_layer.entry(layer(name)).or_default().push(name);
    }
    let scale = |l: usize| decay.powi(last as i32 - l as i32);
    by_layer.into_iter().map(|(l, names)| Group::named(names).lr_scale(scale(l))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Result, Tensor};

    #[test]
    fn layers_of_a_vision_transformer() -> Result<()> {
        let params: Vec<Param> = ["cls_token", "blocks.0.w", "blocks.11.w", "head.weight"]
            .iter()
            .map(|name| Ok(Param::new(name, Tensor::ones([2], DType::F32)?)))
            .collect::<Result<_>>()?;
        let layer = |name: &str| match name.strip_prefix("blocks.") {
            Some(rest) => 1 + rest.split('.').next().and_then(|i| i.parse().ok()).unwrap_or(0),
            None if name == "cls_token" => 0,
            None => 13,
        };
        let groups = layer_decay(&params, layer, 13, 0.65);
        let scale =
            |name: &str| groups.iter().filter(|g| g.chooses(name)).map(|g| g.lr_scale).product::<f64>();
        assert!((scale("cls_token") - 0.003697).abs() < 1e-6);
        assert_eq!((scale("blocks.11.w"), scale("head.weight")), (0.65, 1.0));
        Ok(())
    }
}
