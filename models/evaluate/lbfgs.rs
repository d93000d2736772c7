//! Limited-memory BFGS (Nocedal and Wright, Numerical Optimization, 2006, algorithm 7.4) for convex functions.

use smalti::Result;
use std::collections::VecDeque;

/// Pairs of steps and changes of the gradient that are remembered.
const MEMORY: usize = 30;
/// Part of the promised decrease that a step must bring.
const ARMIJO: f64 = 1e-4;
/// Relative change of a value that may be rounding alone.
const ROUNDING: f64 = 1e-14;
/// How often a step is halved before the decrease is held to be below rounding.
const HALVINGS: usize = 50;

/// Where a minimisation ended.
pub(super) struct Minimum {
    pub at: Vec<f64>,
    /// The function's value there.
    pub value: f64,
    /// Largest absolute value in the gradient there.
    pub slope: f64,
}

/// Minimises the convex `f`, which gives value and gradient, until no entry of the gradient is above `tolerance`, no
/// step brings anything, or `limit` steps are done.
pub(super) fn minimise(
    start: Vec<f64>,
    tolerance: f64,
    limit: usize,
    mut f: impl FnMut(&[f64]) -> Result<(f64, Vec<f64>)>,
) -> Result<Minimum> {
    let (mut x, (mut value, mut gradient)) = (start.clone(), f(&start)?);
    let mut memory: VecDeque<Pair> = VecDeque::new();
    'steps: for _ in 0..limit {
        if largest(&gradient) <= tolerance {
            break;
        }
        let direction = direction(&memory, &gradient);
        let promised = dot(&direction, &gradient);
        // the first step knows nothing of the function's scale
        let mut length =
            if memory.is_empty() { 1.0 / dot(&gradient, &gradient).sqrt().max(1.0) } else { 1.0 };
        for _ in 0..HALVINGS {
            let next: Vec<f64> = x.iter().zip(&direction).map(|(x, d)| x + length * d).collect();
            let (next_value, next_gradient) = f(&next)?;
            let decrease = next_value < value && next_value <= value + ARMIJO * length * promised;
            // Near the minimum values differ by rounding alone; there the slope along the step tells the same (the
            // approximate Wolfe condition: Hager and Zhang, SIAM J. Optim. 16, 2005, section 4).
            let flat = next_value <= value + ROUNDING * value.abs()
                && dot(&direction, &next_gradient) <= (2.0 * ARMIJO - 1.0) * promised;
            if decrease || flat {
                memory.extend(Pair::new(&x, &next, &gradient, &next_gradient));
                if memory.len() > MEMORY {
                    memory.pop_front();
                }
                (x, value, gradient) = (next, next_value, next_gradient);
                continue 'steps;
            }
            length /= 2.0;
        }
        break;
    }
    let slope = largest(&gradient);
    Ok(Minimum { at: x, value, slope })
}

/// A step, the change of the gradient over it, and 1 / their product.
struct Pair {
    step: Vec<f64>,
    change: Vec<f64>,
    rho: f64,
}

impl Pair {
    /// Nothing if rounding has eaten the curvature.
    fn new(x: &[f64], next: &[f64], gradient: &[f64], next_gradient: &[f64]) -> Option<Pair> {
        let minus = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>();
        let (step, change) = (minus(next, x), minus(next_gradient, gradient));
        let curvature = dot(&step, &change);
        (curvature > 0.0).then(|| Pair { step, change, rho: 1.0 / curvature })
    }
}

/// -H g, with the inverse Hessian H that the pairs tell of (the two-loop recursion).
fn direction(memory: &VecDeque<Pair>, gradient: &[f64]) -> Vec<f64> {
    let mut d: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut alphas = Vec::with_capacity(memory.len());
    for pair in memory.iter().rev() {
        let alpha = pair.rho * dot(&pair.step, &d);
        add(&mut d, -alpha, &pair.change);
        alphas.push(alpha);
    }
    if let Some(last) = memory.back() {
        let scale = 1.0 / (last.rho * dot(&last.change, &last.change));
        d.iter_mut().for_each(|d| *d *= scale);
    }
    for (pair, alpha) in memory.iter().zip(alphas.into_iter().rev()) {
        let beta = pair.rho * dot(&pair.change, &d);
        add(&mut d, alpha - beta, &pair.step);
    }
    d
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, what: &[f64]) {
    to.iter_mut().zip(what).for_each(|(to, x)| *to += factor * x);
}

fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |a, b| a.max(b.abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ill_conditioned_bowl() -> Result<()> {
        let curvature: Vec<f64> = (0..20).map(|i| 10f64.powf(i as f64 / 5.0 - 2.0)).collect();
        let mut calls = 0;
        let found = minimise(vec![1.0; 20], 1e-9, 1000, |x| {
            calls += 1;
            let gradient: Vec<f64> = x.iter().zip(&curvature).map(|(x, c)| c * (x - 3.0)).collect();
            let value = x.iter().zip(&gradient).map(|(x, g)| 0.5 * (x - 3.0) * g).sum::<f64>();
            Ok((value + 7.0, gradient))
        })?;
        assert!(found.at.iter().all(|x| (x - 3.0).abs() < 1e-6) && (found.value - 7.0).abs() < 1e-12);
        assert!(found.slope <= 1e-9 && calls < 300, "{} after {calls}", found.slope);
        Ok(())
    }
}
