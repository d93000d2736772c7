//! Parameters on a GPU: many of them in a launch.

use super::{Algorithm, Job, Slot, Stepper, is_recording};
use crate::{
    Device, Result, Tensor,
    gpu::{self, Many, sys},
    nn::Param,
};

const OP: &str = "optimizer";

impl<A: Algorithm> Stepper<A> {
    /// Writes what the kernels will read for this step to every GPU that parameters are on. While a graph is recorded
    /// nothing can be written, nor need be: its launches read what stands there then.
    pub(super) fn write_numbers(&mut self, lr: f64) -> Result<()> {
        if is_recording() {
            return Ok(());
        }
        let moved = |slot: &&Slot| slot.moves;
        let mut devices: Vec<Device> = Vec::new();
        for device in self.slots.iter().filter(moved).map(|slot| slot.param.value().device()) {
            if device != Device::Cpu && !devices.contains(&device) {
                devices.push(device);
            }
        }
        if devices.is_empty() {
            return Ok(());
        }
        let row = |slot| if moved(&slot) { self.algorithm.numbers(slot, lr) } else { [0.0; 8] };
        let rows: Vec<f64> = self.slots.iter().flat_map(row).collect();
        let rows = Device::Cpu.scope(|| Tensor::from_slice(&rows, [self.slots.len(), 8]))?;
        for device in devices {
            gpu::write_numbers(&mut self.numbers, device, &rows)?;
        }
        Ok(())
    }
}

/// Moves parameters that are on one GPU, in place.
pub(super) fn advance<A: Algorithm>(algorithm: &A, jobs: &mut [Job], numbers: &[Tensor]) -> Result<()> {
    let Some(device) = jobs.first().map(|job| job.grad.device()) else { return Ok(()) };
    let Some(numbers) = gpu::numbers_on(numbers, device) else {
        crate::bail!(OP, "a step is recorded after it has run once in the ordinary way");
    };
    let (rule, states) = (algorithm.kernel() as i32, algorithm.states().len());
    let params: Vec<Param> = jobs.iter().map(|job| job.slot.param.clone()).collect();
    let mut locks: Vec<_> = params.iter().map(Param::lock).collect();
    let mut many = Many::new(OP, device);
    for (job, lock) in jobs.iter_mut().zip(&mut locks) {
        for t in &mut job.slot.state {
            gpu::writable_for_good(OP, t)?;
        }
        let (state, master) = job.slot.state.split_at(states);
        many.push(lock.on_gpu(OP)?, Some(&job.grad), state, master.first(), job.row)?;
    }
    gpu::touch(numbers);
    let workspace =
        many.workspace(numbers, |tensors, n| unsafe { sys::smalti_optim_workspace(rule, tensors, n) })?;
    let (rows, scratch) = (numbers.gpu_ptr().cast(), workspace.gpu_ptr().cast());
    many.launch(|tensors, n, stream| unsafe {
        sys::smalti_optim_step(rule, tensors, n, rows, scratch, stream)
    })
}
