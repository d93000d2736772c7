//! The optimizer of a recipe.

use super::recipe::{Optim, Optimizer as Kind, Precision};
use smalti::{
    DType, Result,
    nn::Params,
    optim::{AdamW, Algorithm, Group, Lamb, Lars, Optimizer, Sgd, Trust, no_decay_1d},
};

/// The optimizer of a recipe over what is trained. `groups` come on top of "no decay for one dimension", unless the
/// recipe decays all. In bf16 precision the parameters are converted, and the optimizer keeps f32 masters.
///
/// # Errors
/// If a number is out of range.
pub fn optimizer(
    recipe: &Optim,
    params: &Params,
    groups: impl IntoIterator<Item = Group>,
) -> Result<Box<dyn Optimizer>> {
    if recipe.precision == Precision::Bf16 {
        params.to_dtype(DType::BF16)?;
    }
    let trained = params.trained();
    let no_decay = (!recipe.decay_norms).then(|| no_decay_1d(&trained));
    let groups: Vec<Group> = no_decay.into_iter().chain(groups).collect();
    let betas = (recipe.betas[0], recipe.betas[1]);
    let (momentum, weight_decay) = (recipe.momentum, recipe.weight_decay);
    Ok(match recipe.optimizer {
        Kind::AdamW => Box::new(AdamW { betas, weight_decay, ..AdamW::default() }.over(&trained, &groups)?),
        Kind::Sgd => Box::new(Sgd { momentum, weight_decay, ..Sgd::default() }.over(&trained, &groups)?),
        Kind::Lars => Box::new(Lars { momentum, weight_decay, ..Lars::default() }.over(&trained, &groups)?),
        Kind::Larc => Box::new(
            Lars { momentum, weight_decay, trust: Trust::All, ..Lars::default() }.over(&trained, &groups)?,
        ),
        Kind::Lamb => Box::new(Lamb { betas, weight_decay, ..Lamb::default() }.over(&trained, &groups)?),
    })
}
