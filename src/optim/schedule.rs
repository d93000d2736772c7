//! Learning rates as functions of the step.

use std::f64::consts::PI;

/// A learning rate (or any other number) that depends on the step alone. Steps may be fractional, so that a
/// schedule in epochs can be followed within an epoch. Names and meaning as PyTorch's schedulers.
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// Always `base`.
    Constant {
        /// The rate.
        base: f64,
    },
    /// Times `gamma` after every `size` steps.
    Step {
        /// The first rate.
        base: f64,
        /// Steps at one rate.
        size: f64,
        /// Factor.
        gamma: f64,
    },
    /// Times `gamma` at each milestone.
    MultiStep {
        /// The first rate.
        base: f64,
        /// The steps from which on another factor counts.
        milestones: Vec<f64>,
        /// Factor.
        gamma: f64,
    },
    /// Times `gamma` at every step.
    Exponential {
        /// The first rate.
        base: f64,
        /// Factor.
        gamma: f64,
    },
    /// From `start * base` to `end * base` in `steps` steps, and so on.
    Linear {
        /// The rate whose multiples count.
        base: f64,
        /// First factor.
        start: f64,
        /// Last factor.
        end: f64,
        /// Length of the ramp.
        steps: f64,
    },
    /// base * (1 - t / steps)^power, 0 from `steps` on.
    Polynomial {
        /// The first rate.
        base: f64,
        /// Where it reaches 0.
        steps: f64,
        /// Exponent.
        power: f64,
    },
    /// Half a cosine from `base` to `min` in `steps` steps; it rises again after them.
    Cosine {
        /// The first rate.
        base: f64,
        /// The lowest rate.
        min: f64,
        /// Half a period.
        steps: f64,
    },
    /// Half cosines from `base` to `min`, the first of `first` steps, each next longer by the factor `factor`
    /// (Loshchilov and Hutter, 2017).
    CosineRestarts {
        /// The rate after every restart.
        base: f64,
        /// The lowest rate.
        min: f64,
        /// Length of the first cycle.
        first: f64,
        /// Length of a cycle over that of the one before.
        factor: f64,
    },
    /// A line from `warmup` to `base` in `warmup_steps` steps, then half a cosine to `min` at `steps`, where it
    /// stays.
    WarmupCosine {
        /// The highest rate.
        base: f64,
        /// The first rate.
        warmup: f64,
        /// The last rate.
        min: f64,
        /// Length of the line.
        warmup_steps: f64,
        /// All steps, the warm-up included.
        steps: f64,
    },
}

/// `from` at 0, `to` at 1, along half a cosine.
fn half_cosine(from: f64, to: f64, t: f64) -> f64 {
    to + (from - to) * (1.0 + (PI * t).cos()) / 2.0
}

impl Schedule {
    /// The rate at step `t`, counted from 0.
    pub fn at(&self, t: f64) -> f64 {
        match *self {
            Schedule::Constant { base } => base,
            Schedule::Step { base, size, gamma } => base * gamma.powf((t / size).floor()),
            Schedule::MultiStep { base, ref milestones, gamma } => {
                base * gamma.powi(milestones.iter().filter(|&&m| m <= t).count() as i32)
            }
            Schedule::Exponential { base, gamma } => base * gamma.powf(t),
            Schedule::Linear { base, start, end, steps } => {
                base * (start + (end - start) * (t.min(steps) / steps))
            }
            Schedule::Polynomial { base, steps, power } => base * (1.0 - t.min(steps) / steps).powf(power),
            Schedule::Cosine { base, min, steps } => half_cosine(base, min, t / steps),
            Schedule::CosineRestarts { base, min, first, factor } => {
                half_cosine(base, min, cycle_position(t, first, factor))
            }
            Schedule::WarmupCosine { base, warmup, warmup_steps, .. } if t < warmup_steps => {
                warmup + (base - warmup) * t / warmup_steps
            }
            Schedule::WarmupCosine { base, min, warmup_steps, steps, .. } => {
                let t = (t - warmup_steps) / (steps - warmup_steps);
                half_cosine(base, min, if t < 1.0 { t } else { 1.0 })
            }
        }
    }
}

/// How far, from 0 to 1, the present cycle has come.
fn cycle_position(t: f64, first: f64, factor: f64) -> f64 {
    if factor == 1.0 {
        return (t / first).fract();
    }
    // cycles 0..n last first * (factor^n - 1) / (factor - 1); the rounding error must not cost a cycle
    let n = ((t / first * (factor - 1.0) + 1.0).ln() / factor.ln() + 1e-12).floor().max(0.0);
    let start = first * (factor.powf(n) - 1.0) / (factor - 1.0);
    ((t - start) / (first * factor.powf(n))).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_and_fractions() {
        let s = Schedule::WarmupCosine { base: 1.0, warmup: 0.0, min: 0.1, warmup_steps: 4.0, steps: 10.0 };
        assert_eq!((s.at(0.0), s.at(1.0), s.at(2.5), s.at(4.0)), (0.0, 0.25, 0.625, 1.0));
        assert!((s.at(7.0) - 0.55).abs() < 1e-12 && s.at(10.0) == 0.1 && s.at(1e9) == 0.1);
        let s = Schedule::CosineRestarts { base: 1.0, min: 0.0, first: 3.0, factor: 2.0 };
        for start in [0.0, 3.0, 9.0, 21.0, 45.0] {
            assert_eq!(s.at(start), 1.0, "restart at {start}");
        }
        assert!((s.at(1.5) - 0.5).abs() < 1e-12 && (s.at(6.0) - 0.5).abs() < 1e-12);
        assert_eq!(Schedule::Polynomial { base: 1.0, steps: 4.0, power: 2.0 }.at(5.0), 0.0);
        let no_warmup =
            Schedule::WarmupCosine { base: 1.0, warmup: 0.0, min: 0.0, warmup_steps: 0.0, steps: 0.0 };
        assert_eq!(no_warmup.at(0.0), 0.0, "an empty schedule has ended");
    }
}
