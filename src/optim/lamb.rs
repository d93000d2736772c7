//! LAMB: Adam's direction with layer-wise adaptive rates (You et al., 2020).

use super::{
    adam::{MOMENTS, check, moments},
    update::{Algorithm, Job, Rule, Slot, norms, step},
};
#[cfg(gpu)]
use crate::gpu::sys;
use crate::{Result, dtype::Real};

/// r = m' / (sqrt(v') + eps) + weight_decay * w with Adam's corrected moments; w -= lr * |w| / |r| * r. The ratio
/// is 1 if a norm is 0, and for parameters without weight decay (as in the authors' code) unless a group says
/// otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Lamb {
    /// Decay of the two moments.
    pub betas: (f64, f64),
    /// Keeps the division finite.
    pub eps: f64,
    /// Part of the direction.
    pub weight_decay: f64,
}

impl Default for Lamb {
    fn default() -> Self {
        Lamb { betas: (0.9, 0.999), eps: 1e-6, weight_decay: 0.01 }
    }
}

impl Algorithm for Lamb {
    fn states(&self) -> &'static [&'static str] {
        MOMENTS
    }

    fn decay(&self) -> f64 {
        self.weight_decay
    }

    fn check(&self) -> Result<()> {
        check("lamb", self.betas, self.eps)
    }

    fn advance(&self, jobs: &mut [Job], lr: f64) {
        let mut rules: Vec<Direction> = jobs.iter().map(|job| self.rule(job.slot, lr)).collect();
        let norms = norms(jobs, &rules);
        for ((rule, job), [w, r]) in rules.iter_mut().zip(jobs.iter()).zip(norms) {
            if adapts(job.slot) && w > 0.0 && r > 0.0 {
                rule.lr *= w / r;
            }
        }
        step(jobs, &rules);
    }

    #[cfg(gpu)]
    fn kernel(&self) -> u32 {
        sys::SMALTI_LAMB
    }

    #[cfg(gpu)]
    fn numbers(&self, slot: &Slot, lr: f64) -> [f64; 8] {
        let Direction { betas: (b1, b2), first, root, eps, decay, lr } = self.rule(slot, lr);
        [b1, b2, eps, first, root, decay, lr, f64::from(u8::from(adapts(slot)))]
    }
}

/// Does the step go by the trust ratio?
fn adapts(slot: &Slot) -> bool {
    slot.trust.unwrap_or(slot.weight_decay != 0.0)
}

impl Lamb {
    fn rule(&self, slot: &Slot, lr: f64) -> Direction {
        let correction = |beta: f64| 1.0 - beta.powf(slot.steps as f64);
        Direction {
            betas: self.betas,
            first: 1.0 / correction(self.betas.0),
            root: 1.0 / correction(self.betas.1).sqrt(),
            eps: self.eps,
            decay: slot.weight_decay,
            lr: slot.rate(lr),
        }
    }
}

#[derive(Clone, Copy)]
struct Direction {
    betas: (f64, f64),
    first: f64,
    root: f64,
    eps: f64,
    decay: f64,
    lr: f64,
}

impl Direction {
    #[inline(always)]
    fn direction<R: Real>(self, p: R, [m, v]: [R; 2]) -> R {
        R::of(self.first) * m / (v.sqrt() * R::of(self.root) + R::of(self.eps)) + R::of(self.decay) * p
    }
}

impl Rule<2> for Direction {
    /// Updates the moments.
    #[inline(always)]
    fn look<R: Real>(self, p: R, g: R, state: &mut [R; 2]) -> R {
        let (m, v) = moments(self.betas, g, state[0], state[1]);
        *state = [m, v];
        self.direction(p, *state)
    }

    #[inline(always)]
    fn step<R: Real>(self, p: R, _: R, state: &mut [R; 2]) -> R {
        p - R::of(self.lr) * self.direction(p, *state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Tensor, nn::Params, optim::Optimizer};

    /// At the first step the corrected moments are g and g^2, so the direction is sign(g) + decay * w.
    #[test]
    fn first_step() -> Result<()> {
        let params = Params::new();
        let p = params.param("w", Tensor::from_slice(&[3f64, -4.0], [2])?)?;
        let mut optimizer =
            Lamb { eps: 0.0, weight_decay: 0.1, ..Default::default() }.over(&params.trained(), &[])?;
        let g = Tensor::from_slice(&[0.2, -7.0], [2])?;
        optimizer.step(&p.get().mul(&g)?.sum(())?.backward()?, 0.01)?;
        let r = [1.0 + 0.3, -1.0 - 0.4];
        let ratio = 5.0 / (r[0] * r[0] + r[1] * r[1]).sqrt();
        let got = p.value().to_vec::<f64>()?;
        assert!((got[0] - (3.0 - 0.01 * ratio * r[0])).abs() < 1e-12, "{got:?}");
        assert!((got[1] - (-4.0 - 0.01 * ratio * r[1])).abs() < 1e-12, "{got:?}");
        Ok(())
    }
}
