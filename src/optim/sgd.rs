//! Stochastic gradient descent.

use super::update::{Algorithm, Job, Rule, Slot, step};
#[cfg(gpu)]
use crate::gpu::sys;
use crate::{Result, dtype::Real, ensure};

/// SGD with momentum, as PyTorch's: g += weight_decay * w; b = momentum * b + (1 - dampening) * g (the first b
/// is g); w -= lr * b, or lr * (g + momentum * b) with Nesterov's momentum. The rate is outside the momentum.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sgd {
    /// Factor of the old momentum.
    pub momentum: f64,
    /// What is missing of the new gradient in the momentum.
    pub dampening: f64,
    /// Added to the gradient as this times the parameter.
    pub weight_decay: f64,
    /// Nesterov's momentum.
    pub nesterov: bool,
    /// Go up instead of down.
    pub maximize: bool,
}

impl Algorithm for Sgd {
    fn states(&self) -> &'static [&'static str] {
        if self.momentum == 0.0 { &[] } else { &["momentum_buffer"] }
    }

    fn decay(&self) -> f64 {
        self.weight_decay
    }

    fn check(&self) -> Result<()> {
        ensure!(self.momentum >= 0.0, "sgd", "momentum is {}", self.momentum);
        ensure!(
            !self.nesterov || (self.momentum > 0.0 && self.dampening == 0.0),
            "sgd",
            "Nesterov's momentum needs momentum and no dampening, got {} and {}",
            self.momentum,
            self.dampening
        );
        Ok(())
    }

    fn advance(&self, jobs: &mut [Job], lr: f64) {
        let rules: Vec<Momentum> = jobs.iter().map(|job| self.rule(job.slot, lr)).collect();
        if self.momentum == 0.0 {
            let plain: Vec<Plain> = rules.into_iter().map(Plain).collect();
            step(jobs, &plain);
        } else {
            step(jobs, &rules);
        }
    }

    #[cfg(gpu)]
    fn kernel(&self) -> u32 {
        if self.momentum == 0.0 { sys::SMALTI_SGD } else { sys::SMALTI_MOMENTUM }
    }

    #[cfg(gpu)]
    fn numbers(&self, slot: &Slot, lr: f64) -> [f64; 8] {
        let rule = self.rule(slot, lr);
        if self.momentum == 0.0 {
            return [rule.sign, rule.decay, rule.lr, 0.0, 0.0, 0.0, 0.0, 0.0];
        }
        [rule.sign, rule.decay, rule.old, rule.new, rule.ahead.unwrap_or(0.0), rule.lr, 0.0, 0.0]
    }
}

impl Sgd {
    fn rule(&self, slot: &Slot, lr: f64) -> Momentum {
        // the first buffer is the gradient, undamped
        let first = slot.steps == 1;
        Momentum {
            sign: if self.maximize { -1.0 } else { 1.0 },
            decay: slot.weight_decay,
            old: if first { 0.0 } else { self.momentum },
            new: if first { 1.0 } else { 1.0 - self.dampening },
            ahead: self.nesterov.then_some(self.momentum),
            lr: slot.rate(lr),
        }
    }
}

/// The update that LARS shares: its trust ratio stands in `sign`, its decay in `decay`.
#[derive(Clone, Copy)]
pub(super) struct Momentum {
    pub sign: f64,
    pub decay: f64,
    pub old: f64,
    pub new: f64,
    /// Nesterov's look ahead.
    pub ahead: Option<f64>,
    pub lr: f64,
}

impl Momentum {
    #[inline(always)]
    fn gradient<R: Real>(self, p: R, g: R) -> R {
        R::of(self.sign) * g + R::of(self.decay) * p
    }
}

impl Rule<1> for Momentum {
    #[inline(always)]
    fn step<R: Real>(self, p: R, g: R, state: &mut [R; 1]) -> R {
        let g = self.gradient(p, g);
        state[0] = R::of(self.old) * state[0] + R::of(self.new) * g;
        let direction = match self.ahead {
            Some(momentum) => g + R::of(momentum) * state[0],
            None => state[0],
        };
        p - R::of(self.lr) * direction
    }
}

#[derive(Clone, Copy)]
struct Plain(Momentum);

impl Rule<0> for Plain {
    #[inline(always)]
    fn step<R: Real>(self, p: R, g: R, _: &mut [R; 0]) -> R {
        p - R::of(self.0.lr) * self.0.gradient(p, g)
    }
}
