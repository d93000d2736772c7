//! LARS: layer-wise adaptive rates (You et al., 2017), in the two forms that self-supervised learning uses.

use super::{
    sgd::Momentum,
    update::{Algorithm, Job, Rule, Slot, norms, step},
};
#[cfg(gpu)]
use crate::gpu::sys;
use crate::{Result, dtype::Real, ensure};

/// SGD with momentum whose gradient is first scaled, per parameter, by a trust ratio.
#[derive(Clone, Copy, Debug)]
pub struct Lars {
    /// Factor of the old momentum.
    pub momentum: f64,
    /// Added to the gradient as this times the parameter.
    pub weight_decay: f64,
    /// Step length relative to the parameter's norm.
    pub coefficient: f64,
    /// How the ratio is formed.
    pub trust: Trust,
}

/// How the trust ratio is formed. A [`Group`](super::Group) can switch it off (and with it the decay) for
/// parameters by name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Trust {
    /// MAE's linear probe and MoCo v3: for parameters of two dimensions or more g += decay * w, then
    /// g *= c |w| / |g| (1 if a norm is 0); biases and gains get neither.
    Matrices,
    /// Apex's LARC without clipping, as SimSiam's linear probe: for all parameters
    /// g = (g + decay * w) * c |w| / (|g| + decay |w| + 1e-8); g itself, without decay, if a norm is 0.
    All,
    /// Apex's LARC with clipping: the ratio is at most the learning rate, over which it is then divided.
    Clipped,
}

impl Default for Lars {
    fn default() -> Self {
        Lars { momentum: 0.9, weight_decay: 0.0, coefficient: 0.001, trust: Trust::Matrices }
    }
}

impl Algorithm for Lars {
    fn states(&self) -> &'static [&'static str] {
        &["momentum_buffer"]
    }

    fn decay(&self) -> f64 {
        self.weight_decay
    }

    fn check(&self) -> Result<()> {
        ensure!(self.momentum >= 0.0, "lars", "momentum is {}", self.momentum);
        ensure!(self.coefficient > 0.0, "lars", "the trust coefficient is {}", self.coefficient);
        Ok(())
    }

    fn advance(&self, jobs: &mut [Job], lr: f64) {
        let decayed = self.trust == Trust::Matrices;
        let look = |job: &Job| Look(if decayed { job.slot.weight_decay } else { 0.0 });
        let looks: Vec<Look> = jobs.iter().map(look).collect();
        let norms = norms(jobs, &looks);
        let rule = |(job, [w, g]): (&Job, [f64; 2])| {
            let mut rule = self.rule(job.slot, lr);
            let (ratio, decay) = if self.adapts(job.slot) {
                self.ratio(w, g, job.slot.weight_decay, rule.lr)
            } else {
                (1.0, 0.0)
            };
            (rule.sign, rule.decay) = (ratio, ratio * decay);
            rule
        };
        let rules: Vec<Momentum> = jobs.iter().zip(norms).map(rule).collect();
        step(jobs, &rules);
    }

    #[cfg(gpu)]
    fn kernel(&self) -> u32 {
        match self.trust {
            Trust::Matrices => sys::SMALTI_LARS,
            Trust::All => sys::SMALTI_LARC,
            Trust::Clipped => sys::SMALTI_LARC_CLIPPED,
        }
    }

    #[cfg(gpu)]
    fn numbers(&self, slot: &Slot, lr: f64) -> [f64; 8] {
        let rule = self.rule(slot, lr);
        let adapts = f64::from(u8::from(self.adapts(slot)));
        [self.coefficient, rule.decay, rule.old, rule.new, 0.0, rule.lr, adapts, 0.0]
    }
}

impl Lars {
    /// Does the ratio scale the gradient?
    fn adapts(&self, slot: &Slot) -> bool {
        slot.trust.unwrap_or(self.trust != Trust::Matrices || slot.rank() > 1)
    }

    /// The update without a ratio.
    fn rule(&self, slot: &Slot, lr: f64) -> Momentum {
        let old = if slot.steps == 1 { 0.0 } else { self.momentum };
        let (decay, lr) = (slot.weight_decay, slot.rate(lr));
        Momentum { sign: 1.0, decay, old, new: 1.0, ahead: None, lr }
    }

    /// The factor of the gradient, and the decay that is added to it before.
    fn ratio(&self, w: f64, g: f64, decay: f64, lr: f64) -> (f64, f64) {
        let none = w == 0.0 || g == 0.0;
        match self.trust {
            Trust::Matrices if none => (1.0, decay),
            Trust::Matrices => (self.coefficient * w / g, decay),
            Trust::All | Trust::Clipped if none => (1.0, 0.0),
            Trust::All => (self.coefficient * w / (g + w * decay + 1e-8), decay),
            Trust::Clipped => ((self.coefficient * w / (g + w * decay + 1e-8) / lr).min(1.0), decay),
        }
    }
}

/// The gradient with this much of the parameter added.
#[derive(Clone, Copy)]
struct Look(f64);

impl Rule<1> for Look {
    #[inline(always)]
    fn step<R: Real>(self, p: R, _: R, _: &mut [R; 1]) -> R {
        p
    }

    #[inline(always)]
    fn look<R: Real>(self, p: R, g: R, _: &mut [R; 1]) -> R {
        g + R::of(self.0) * p
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        DType, Tensor,
        nn::{Param, Params},
        optim::{Group, Optimizer},
    };

    fn steps(lars: Lars, w: &[f64], g: &[f64], shape: [usize; 2], groups: &[Group]) -> Result<Vec<f64>> {
        let params = Params::new();
        let p = params.param("w", Tensor::from_slice(w, shape)?)?;
        let mut optimizer = lars.over(&params.trained(), groups)?;
        for _ in 0..2 {
            optimizer.step(&gradient(&p, g)?, 0.5)?;
        }
        p.value().to_vec::<f64>()
    }

    fn gradient(p: &Param, g: &[f64]) -> Result<crate::Gradients> {
        p.get().mul(&Tensor::from_slice(g, p.value().shape())?)?.sum(())?.backward()
    }

    /// Both forms by hand: |w| = 5, |g| = 13.
    #[test]
    fn ratios() -> Result<()> {
        let (w, g) = ([3.0, 4.0], [5.0, 12.0]);
        let lars = Lars { momentum: 0.0, coefficient: 0.1, ..Default::default() };
        let mut x = w;
        for _ in 0..2 {
            let norm = (x[0] * x[0] + x[1] * x[1]).sqrt();
            (0..2).for_each(|i| x[i] -= 0.5 * 0.1 * norm / 13.0 * g[i]);
        }
        let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
        assert!(close(&steps(lars, &w, &g, [1, 2], &[])?, &x));
        let plain: Vec<f64> = (0..2).map(|i| w[i] - g[i]).collect();
        assert!(close(&steps(lars, &w, &g, [1, 2], &[Group::new(|_| true).trust(false)])?, &plain));
        let larc = Lars { trust: Trust::All, weight_decay: 0.2, ..lars };
        let mut x = w;
        for _ in 0..2 {
            let norm = (x[0] * x[0] + x[1] * x[1]).sqrt();
            let a = 0.1 * norm / (13.0 + 0.2 * norm + 1e-8);
            (0..2).for_each(|i| x[i] -= 0.5 * a * (g[i] + 0.2 * x[i]));
        }
        assert!(close(&steps(larc, &w, &g, [1, 2], &[])?, &x));
        assert_eq!(steps(larc, &[0.0; 2], &[1.0, 1.0], [1, 2], &[])?[0].signum(), -1.0);
        Ok(())
    }

    #[test]
    fn vectors_are_left_alone() -> Result<()> {
        let params = Params::new();
        let b = params.param("b", Tensor::from_slice(&[2f32, 2.], [2])?)?;
        let lars = Lars { weight_decay: 0.1, ..Default::default() };
        let mut optimizer = lars.over(&params.trained(), &[])?;
        optimizer.step(&b.get().sum(())?.backward()?, 1.0)?;
        assert_eq!(b.value().to_vec::<f32>()?, [1.0, 1.0]);
        assert_eq!(b.value().dtype(), DType::F32);
        Ok(())
    }
}
