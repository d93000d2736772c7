//! Adam (Kingma and Ba, 2015) and AdamW (Loshchilov and Hutter, 2019).

use super::update::{Algorithm, Job, Rule, Slot, step};
#[cfg(gpu)]
use crate::gpu::sys;
use crate::{Result, dtype::Real, ensure};

/// AdamW: w *= 1 - lr * weight_decay; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
/// w -= lr * m' / (sqrt(v') + eps), where m' and v' are corrected for their start at zero by the number of steps
/// that this parameter has made.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Decay of the two moments.
    pub betas: (f64, f64),
    /// Keeps the division finite.
    pub eps: f64,
    /// Decay of the parameter itself, times the learning rate.
    pub weight_decay: f64,
    /// Divide by the largest second moment so far (Reddi et al., 2018).
    pub amsgrad: bool,
    /// Go up instead of down.
    pub maximize: bool,
}

impl Default for AdamW {
    fn default() -> Self {
        AdamW { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.01, amsgrad: false, maximize: false }
    }
}

/// Adam: as [`AdamW`], but weight decay is added to the gradient.
#[derive(Clone, Copy, Debug)]
pub struct Adam {
    /// Decay of the two moments.
    pub betas: (f64, f64),
    /// Keeps the division finite.
    pub eps: f64,
    /// Added to the gradient as this times the parameter.
    pub weight_decay: f64,
    /// Divide by the largest second moment so far.
    pub amsgrad: bool,
    /// Go up instead of down.
    pub maximize: bool,
}

impl Default for Adam {
    fn default() -> Self {
        Adam { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0, amsgrad: false, maximize: false }
    }
}

pub(super) const MOMENTS: &[&str] = &["exp_avg", "exp_avg_sq"];
const MOMENTS_AND_MAX: &[&str] = &["exp_avg", "exp_avg_sq", "max_exp_avg_sq"];

pub(super) fn check(op: &'static str, (a, b): (f64, f64), eps: f64) -> Result<()> {
    let fits = |beta: f64| (0.0..1.0).contains(&beta);
    ensure!(fits(a) && fits(b), op, "betas are {a} and {b}, need numbers from 0 to below 1");
    ensure!(eps >= 0.0, op, "eps is {eps}");
    Ok(())
}

macro_rules! algorithm {
    ($name:ident, $op:literal, decoupled: $decoupled:literal) => {
        impl Algorithm for $name {
            fn states(&self) -> &'static [&'static str] {
                if self.amsgrad { MOMENTS_AND_MAX } else { MOMENTS }
            }

            fn decay(&self) -> f64 {
                self.weight_decay
            }

            fn check(&self) -> Result<()> {
                check($op, self.betas, self.eps)
            }

            fn advance(&self, jobs: &mut [Job], lr: f64) {
                let rules: Vec<Moments> = jobs.iter().map(|job| self.rule(job.slot, lr)).collect();
                if self.amsgrad {
                    let rules: Vec<WithMax> = rules.into_iter().map(WithMax).collect();
                    step(jobs, &rules);
                } else {
                    step(jobs, &rules);
                }
            }

            #[cfg(gpu)]
            fn kernel(&self) -> u32 {
                if self.amsgrad { sys::SMALTI_ADAM_MAX } else { sys::SMALTI_ADAM }
            }

            #[cfg(gpu)]
            fn numbers(&self, slot: &Slot, lr: f64) -> [f64; 8] {
                let Moments { betas: (b1, b2), eps, sign, keep, decay, lr, root } = self.rule(slot, lr);
                [b1, b2, eps, sign, keep, decay, lr, root]
            }
        }

        impl $name {
            fn rule(&self, slot: &Slot, lr: f64) -> Moments {
                let (lr, decay) = (slot.rate(lr), slot.weight_decay);
                let correction = |beta: f64| 1.0 - beta.powf(slot.steps as f64);
                Moments {
                    betas: self.betas,
                    eps: self.eps,
                    sign: if self.maximize { -1.0 } else { 1.0 },
                    keep: if $decoupled { 1.0 - lr * decay } else { 1.0 },
                    decay: if $decoupled { 0.0 } else { decay },
                    lr: lr / correction(self.betas.0),
                    root: 1.0 / correction(self.betas.1).sqrt(),
                }
            }
        }
    };
}
algorithm!(Adam, "adam", decoupled: false);
algorithm!(AdamW, "adamw", decoupled: true);

#[derive(Clone, Copy)]
struct Moments {
    betas: (f64, f64),
    eps: f64,
    sign: f64,
    /// What decoupled decay leaves of the parameter.
    keep: f64,
    /// Decay by way of the gradient.
    decay: f64,
    /// The rate over the first moment's correction.
    lr: f64,
    /// One over the root of the second moment's correction.
    root: f64,
}

/// The moments after one more gradient.
#[inline(always)]
pub(super) fn moments<R: Real>((b1, b2): (f64, f64), g: R, m: R, v: R) -> (R, R) {
    (R::of(b1) * m + R::of(1.0 - b1) * g, R::of(b2) * v + R::of(1.0 - b2) * g * g)
}

impl Moments {
    #[inline(always)]
    fn moments<R: Real>(self, p: R, g: R, m: R, v: R) -> (R, R) {
        moments(self.betas, R::of(self.sign) * g + R::of(self.decay) * p, m, v)
    }

    #[inline(always)]
    fn apply<R: Real>(self, p: R, m: R, v: R) -> R {
        p * R::of(self.keep) - R::of(self.lr) * m / (v.sqrt() * R::of(self.root) + R::of(self.eps))
    }
}

impl Rule<2> for Moments {
    #[inline(always)]
    fn step<R: Real>(self, p: R, g: R, state: &mut [R; 2]) -> R {
        let (m, v) = self.moments(p, g, state[0], state[1]);
        *state = [m, v];
        self.apply(p, m, v)
    }
}

#[derive(Clone, Copy)]
struct WithMax(Moments);

impl Rule<3> for WithMax {
    #[inline(always)]
    fn step<R: Real>(self, p: R, g: R, state: &mut [R; 3]) -> R {
        let (m, v) = self.0.moments(p, g, state[0], state[1]);
        *state = [m, v, v.maximum(state[2])];
        self.0.apply(p, m, state[2])
    }
}
