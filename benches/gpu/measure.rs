//! Time and memory of a call on a GPU.
//!
//! A call is recorded as a graph for each of its sets of inputs and launched between two events, so the host's time to
//! issue it (given apart, as `host_ms`) is not in it; the sets take turns, and a large buffer is overwritten before
//! each launch, so nothing is in the L2 cache. What cannot be recorded (a result whose size depends on values) is timed
//! as issued, and says so.

use serde_json::{Map, Value, json};
use smalti::{BackwardOptions, DType, Device, Result, Rng, Tensor, gpu};
use std::time::{Duration, Instant};

/// Overwritten before each call.
const FLUSH_BYTES: usize = 256 << 20;
/// Time to spend on the launches of one direction.
const TARGET: Duration = Duration::from_millis(200);

/// One set of inputs of an operation.
pub struct Case {
    /// Inputs whose gradients are wanted. Empty: there is no backward.
    pub leaves: Vec<Tensor>,
    /// The forward pass; the first of its results is what the backward starts from.
    pub forward: Box<dyn Fn() -> Result<Vec<Tensor>>>,
}

/// Times calls on one device.
pub struct Timer {
    device: Device,
    flush: Tensor,
}

type Fields = Map<String, Value>;

impl Timer {
    pub fn new(device: Device, tiny: bool) -> Result<Timer> {
        let bytes = if tiny { 1 << 10 } else { FLUSH_BYTES };
        Ok(Timer { device, flush: Tensor::zeros([bytes / 4], DType::F32)?.to_device(device)? })
    }

    /// Forward, backward, and both, as far as there are leaves; each with the fields of its line.
    pub fn directions(&self, cases: &[Case]) -> Result<Vec<(&'static str, Fields)>> {
        let forward = |case: &Case| (case.forward)();
        let mut found = vec![("fwd", self.time(cases, |case| forward(case).map(drop))?)];
        if cases.iter().any(|case| case.leaves.is_empty()) {
            return Ok(found);
        }
        let mut rng = Rng::new(7);
        let mut ready = Vec::new();
        for case in cases {
            let out = forward(case)?.swap_remove(0);
            let grad = Tensor::randn(out.shape(), &mut rng)?.to_dtype(out.dtype())?.to_device(self.device)?;
            ready.push((out, BackwardOptions { grad: Some(grad), retain_graph: true, ..Default::default() }));
        }
        found.push(("bwd", self.time(&ready, |(out, options)| out.backward_with(options).map(drop))?));
        let both: Vec<_> = cases.iter().zip(ready).map(|(case, (_, options))| (case, options)).collect();
        let step = |(case, options): &(&Case, BackwardOptions)| {
            forward(case)?.swap_remove(0).backward_with(options).map(drop)
        };
        found.push(("fwd+bwd", self.time(&both, step)?));
        Ok(found)
    }

    /// The fields of a line for one call a set.
    pub fn time<S>(&self, sets: &[S], call: impl Fn(&S) -> Result<()>) -> Result<Fields> {
        for set in sets.iter().chain(sets.first()) {
            call(set)?;
        }
        gpu::synchronize(self.device)?;
        let before = gpu::stats(self.device)?.live;
        gpu::reset_peak(self.device)?;
        let start = Instant::now();
        sets.first().map_or(Ok(()), &call)?;
        let host = start.elapsed();
        gpu::synchronize(self.device)?;
        let once = start.elapsed();
        let peak = gpu::stats(self.device)?.peak;
        let graphs: Option<Vec<gpu::Graph>> = sets
            .iter()
            .map(|set| gpu::Graph::capture(self.device, || call(set)).ok().map(|(graph, ())| graph))
            .collect();
        let runs = (TARGET.as_secs_f64() / once.as_secs_f64().max(1e-5)).clamp(5.0, 50.0) as usize;
        let mut ms = Vec::with_capacity(runs);
        for run in 0..runs + 1 {
            let turn = run % sets.len();
            // on the device's queue before the first event, and longer than the host takes to launch
            let _written = self.flush.add_scalar(1.0)?;
            let begin = gpu::Event::record(self.device)?;
            match &graphs {
                Some(graphs) => graphs[turn].launch()?,
                None => call(&sets[turn])?,
            }
            let end = gpu::Event::record(self.device)?;
            let took = end.ms_since(&begin)?;
            if run > 0 {
                ms.push(took);
            }
        }
        ms.sort_by(f64::total_cmp);
        let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
        let note = if graphs.is_some() { "graph" } else { "issued by the host" };
        let fields = json!({
            "ms_median": ms[ms.len() / 2], "ms_min": ms[0], "runs": ms.len(), "sets": sets.len(),
            "host_ms": host.as_secs_f64() * 1e3, "peak_mib": mib(peak), "extra_mib": mib(peak.saturating_sub(before)),
            "note": note,
        });
        Ok(match fields {
            Value::Object(fields) => fields,
            _ => Fields::new(),
        })
    }
}
