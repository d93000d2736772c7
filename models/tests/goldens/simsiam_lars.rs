//! A linear classifier under SGD that is wrapped in LARC.

use super::{
    file::{Golden, Report},
    tolerance,
};
use smalti::{
    CrossEntropy, Result, Rng,
    nn::{Linear, Params},
    optim::{Algorithm, Lars, Optimizer, Trust},
};

#[derive(serde::Deserialize)]
struct Config {
    #[serde(rename = "C")]
    width: usize,
    classes: usize,
    clip: bool,
    lr: f64,
    sgd_momentum: f64,
    steps: usize,
    trust_coefficient: f64,
    weight_decay: f64,
}

const KEYS: &[&str] =
    &["C", "classes", "clip", "lr", "sgd_momentum", "steps", "trust_coefficient", "weight_decay"];

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    golden.fixed(&[("eps", 1e-8)])?;
    let config: Config = golden.config(KEYS)?;
    let params = Params::new();
    let fc = Linear::new(&params.sub("fc"), config.width, config.classes, true, &mut Rng::new(0))?;
    golden.load_weights(&params)?;
    let larc = Lars {
        momentum: config.sgd_momentum,
        weight_decay: config.weight_decay,
        coefficient: config.trust_coefficient,
        trust: if config.clip { Trust::Clipped } else { Trust::All },
    };
    let mut optimizer = larc.over(&params.trained(), &[])?;
    let (features, target) = (golden.get("input.features")?, golden.get("input.target")?);
    for step in 1..=config.steps {
        let loss = fc.forward(features)?.cross_entropy(target, &CrossEntropy::default())?;
        let name = format!("output.step{step}.loss");
        let reference = golden.get(&name)?;
        report.compare(&name, &loss.reshape(reference.shape())?, reference, tolerance::LOSS)?;
        let grads = loss.backward()?;
        if step == 1 {
            golden.compare_grads(report, &params, &grads, tolerance::GRADIENT)?;
        }
        optimizer.step(&grads, config.lr)?;
        for param in params.all() {
            let name = format!("output.step{step}.{}", param.name());
            report.compare(&name, &param.value(), golden.get(&name)?, tolerance::OUTPUT)?;
        }
    }
    Ok(())
}
