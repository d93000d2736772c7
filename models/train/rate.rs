//! The learning rate over a run.

use super::recipe::{Curve, Recipe};
use smalti::optim::Schedule;

/// Warm-up from 0 along a line, then a curve: in every step, or in steps of whole epochs.
#[derive(Clone, Debug, PartialEq)]
pub struct Rate {
    peak: f64,
    min: f64,
    curve: Curve,
    warmup: Warmup,
    milestones: Vec<f64>,
    gamma: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Warmup {
    Epochs(f64),
    Steps(u64),
}

impl Rate {
    /// That of a recipe.
    pub fn of(recipe: &Recipe) -> Rate {
        let s = &recipe.schedule;
        Rate {
            peak: recipe.peak_lr(),
            min: s.min_lr,
            curve: s.curve,
            warmup: if s.warmup_steps > 0 {
                Warmup::Steps(s.warmup_steps)
            } else {
                Warmup::Epochs(s.warmup_epochs)
            },
            milestones: s.milestones.iter().map(|&m| m as f64).collect(),
            gamma: s.gamma,
        }
    }

    /// The rate of a step, before which `step` of `total` steps and `epoch` of `epochs` passes over the data are done.
    pub fn at(&self, (step, total): (u64, u64), (epoch, epochs): (f64, f64)) -> f64 {
        let (base, min) = (self.peak, self.min);
        let cosine =
            |warmup_steps, steps| Schedule::WarmupCosine { base, warmup: 0.0, min, warmup_steps, steps };
        let warmup = match self.warmup {
            Warmup::Epochs(warmup) => warmup,
            Warmup::Steps(warmup) => return cosine(warmup as f64, total as f64).at(step as f64),
        };
        let cosine = cosine(warmup, epochs);
        match self.curve {
            Curve::Cosine => cosine.at(epoch),
            _ if epoch < warmup => cosine.at(epoch),
            Curve::CosinePerEpoch => cosine.at(epoch.floor().max(warmup)),
            Curve::Milestones => {
                Schedule::MultiStep { base, milestones: self.milestones.clone(), gamma: self.gamma }.at(epoch)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(overrides: &[&str]) -> Rate {
        let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
        Rate::of(&Recipe::load("mae_digits", &overrides).unwrap())
    }

    /// MoCo's `adjust_learning_rate`, with and without `--cos`: one rate an epoch.
    #[test]
    fn once_an_epoch() {
        let base =
            ["data.batch=256", "optim.base_lr=0.03", "schedule.warmup_epochs=0", "schedule.epochs=200"];
        let cosine = rate(&[&base[..], &["schedule.curve=cosine-per-epoch"]].concat());
        let expected = |e: f64| 0.03 * 0.5 * (1.0 + (std::f64::consts::PI * e / 200.0).cos());
        for (epoch, e) in [(0.0, 0.0), (0.99, 0.0), (1.0, 1.0), (130.7, 130.0), (199.5, 199.0)] {
            assert!((cosine.at((7, 9), (epoch, 200.0)) - expected(e)).abs() < 1e-15, "{epoch}");
        }
        let steps =
            rate(&[&base[..], &["schedule.curve=milestones", "schedule.milestones=[120, 160]"]].concat());
        for (epoch, lr) in [(0.0, 0.03), (119.9, 0.03), (120.0, 0.003), (160.0, 0.0003), (199.9, 0.0003)] {
            assert!((steps.at((7, 9), (epoch, 200.0)) - lr).abs() < 1e-15, "{epoch}");
        }
    }

    /// FLIP's check values (L/16 and H/14 on LAION-400M): 10000 times 19 steps.
    #[test]
    fn warmup_in_steps() {
        let rate = |warmup: u64| {
            let warmup = format!("schedule.warmup_steps={warmup}");
            let base = ["data.batch=65536", "optim.base_lr=4e-6", "schedule.warmup_epochs=0"];
            rate(&[&base[..], &[&warmup]].concat())
        };
        let at = |warmup, step| rate(warmup).at((step, 190_000), (0.0, 1.0));
        assert_eq!((at(760, 0), at(760, 760)), (0.0, 1.024e-3));
        for (warmup, step, lr) in
            [(760, 1000, 1.023996e-3), (760, 95_000, 5.15230e-4), (3800, 1000, 2.694737e-4)]
        {
            assert!((at(warmup, step) / lr - 1.0).abs() < 1e-6, "{warmup} {step}: {}", at(warmup, step));
        }
    }
}
