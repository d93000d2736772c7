//! Means over the steps from one line of the log to the next.

use serde_json::{Value, json};
use smalti::{Device, Result, Tensor, comm::Comm};
use std::collections::BTreeMap;

/// Sums of the loss and of what is monitored, and how many steps they are of.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Window {
    loss: f64,
    monitored: BTreeMap<String, f64>,
    steps: u64,
}

impl Window {
    /// A micro-batch of a step: its share of the step's loss, and monitored values of which `weight` counts.
    pub fn add(&mut self, loss: f64, monitored: &[(&'static str, Tensor)], weight: f64) -> Result<()> {
        self.loss += loss;
        for (name, value) in monitored {
            *self.monitored.entry((*name).to_owned()).or_default() += weight * value.item()?;
        }
        Ok(())
    }

    /// The mean over ranks, which watch the same.
    pub fn over_ranks(mut self, comm: &Comm) -> Result<Window> {
        if comm.world() == 1 {
            return Ok(self);
        }
        let own: Vec<f64> = [self.loss].into_iter().chain(self.monitored.values().copied()).collect();
        let own = Device::Cpu.scope(|| Tensor::from_slice(&own, [own.len()]))?;
        let sums = own.all_reduce(comm)?.mul_scalar(1.0 / comm.world() as f64)?.to_vec::<f64>()?;
        for (value, mean) in [&mut self.loss].into_iter().chain(self.monitored.values_mut()).zip(sums) {
            *value = mean;
        }
        Ok(self)
    }

    /// The step that `step`'s micro-batches make.
    pub fn extend(&mut self, step: Window) {
        self.loss += step.loss;
        for (name, value) in step.monitored {
            *self.monitored.entry(name).or_default() += value;
        }
        self.steps += 1;
    }

    /// The mean loss, and the means of what is monitored.
    pub fn means(&self) -> (f64, BTreeMap<String, f64>) {
        let steps = self.steps.max(1) as f64;
        (self.loss / steps, self.monitored.iter().map(|(name, sum)| (name.clone(), sum / steps)).collect())
    }

    /// As bits, so that a resumed run's log goes on with the very same means.
    pub fn state(&self) -> Value {
        let bits: BTreeMap<_, _> = self.monitored.iter().map(|(name, sum)| (name, sum.to_bits())).collect();
        json!({ "loss": self.loss.to_bits(), "monitored": bits, "steps": self.steps })
    }

    /// What [`state`](Self::state) gave.
    pub fn restore(state: &Value) -> Option<Window> {
        let number = |bits: &Value| bits.as_u64().map(f64::from_bits);
        let monitored = state["monitored"].as_object()?.iter();
        let monitored =
            monitored.map(|(name, bits)| Some((name.clone(), number(bits)?))).collect::<Option<_>>()?;
        Some(Window { loss: number(&state["loss"])?, monitored, steps: state["steps"].as_u64()? })
    }
}
