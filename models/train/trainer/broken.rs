//! What a run says when its numbers are no longer finite.

use super::{At, Task, Trainer};
use smalti::{Error, Gradients, Result, Tensor, detect_anomaly, nn::Param, no_grad};

impl<T: Task> Trainer<'_, T> {
    /// The loss is `value`. Looks for the first number that is not finite: in the batch, in the parameters, in the
    /// operations of the loss, in the buffers. Buffers come last, since a loss that fails has left its mark in running
    /// statistics already.
    pub(super) fn broken(&self, value: f64, batch: &T::Batch, at: &At, lr: f64) -> Error {
        let inputs = self.task.inputs(batch);
        let view = inputs.iter().find(|(_, values)| values.iter().any(|v| !v.is_finite()));
        let all = self.task.params().all();
        let (buffers, params): (Vec<Param>, Vec<Param>) = all.into_iter().partition(Param::is_buffer);
        let found = view
            .map(|(name, _)| format!("the batch's {name} is not finite"))
            .or_else(|| first_broken(&params).map(|p| format!("the parameter {} is not finite", p.name())))
            .or_else(|| self.broken_operation(batch, at))
            .or_else(|| first_broken(&buffers).map(|p| format!("the buffer {} is not finite", p.name())))
            .unwrap_or_else(|| "batch, parameters and buffers are finite".to_owned());
        self.stop("loss", value, lr, &found)
    }

    /// The norm of the gradients is `norm`.
    pub(super) fn broken_gradient(&self, norm: f64, grads: &Gradients, lr: f64) -> Error {
        let found = match broken_gradient(&self.task.params().trained(), grads) {
            Some(name) => format!("the gradient of {name} is not finite"),
            None => "each gradient is finite, their norm is too large".to_owned(),
        };
        self.stop("norm of the gradient", norm, lr, &found)
    }

    /// What goes wrong when the loss is computed once more. Not among several ranks: the others would have to join in.
    fn broken_operation(&self, batch: &T::Batch, at: &At) -> Option<String> {
        if self.comm.world() > 1 {
            return None;
        }
        let again = detect_anomaly(|| self.task.loss(batch, at)?.value.backward());
        again
            .err()
            .map(|error| format!("the parameters are finite, the first operation that goes wrong: {error}"))
    }

    fn stop(&self, what: &str, value: f64, lr: f64, found: &str) -> Error {
        Error::msg(format!(
            "train: the {what} is {value} at step {} (learning rate {lr:.3e}): {found}; nothing was saved after the \
             last checkpoint. A lower optim.base_lr, a longer warm-up (schedule.warmup_epochs) or optim.clip may help",
            self.step
        ))
    }

    /// # Errors
    /// If a parameter or buffer is not finite.
    pub(super) fn check_parameters(&self) -> Result<()> {
        match first_broken(&self.task.params().all()) {
            None => Ok(()),
            Some(param) => Err(Error::msg(format!(
                "train: {} is not finite after step {}; the checkpoint before stands. A lower optim.base_lr, a \
                 longer warm-up (schedule.warmup_epochs) or optim.clip may help",
                param.name(),
                self.step
            ))),
        }
    }
}

fn first_broken(params: &[Param]) -> Option<&Param> {
    params.iter().find(|param| !is_finite(&param.value()))
}

fn broken_gradient(params: &[Param], grads: &Gradients) -> Option<String> {
    let broken = |param: &&Param| grads.get(*param).is_some_and(|grad| !is_finite(grad));
    params.iter().find(broken).map(|param| param.name().to_owned())
}

/// 0 times what is not finite is NaN; a value that cannot be computed counts as such.
fn is_finite(t: &Tensor) -> bool {
    let zero = || no_grad(|| t.mul_scalar(0.0)?.sum(())?.item());
    !t.dtype().is_float() || matches!(zero(), Ok(sum) if sum == 0.0)
}
