//! Shuffling BN over ranks: one training step of momentum contrast in several processes.

use super::{
    file::{Golden, Report},
    moco::{config, logits, value},
    tolerance,
};
use smalti::{
    DType, Error, Result, Rng, Tensor,
    comm::{Comm, threads},
};
use smalti_models::moco::{Moco, MocoConfig};

#[derive(serde::Deserialize)]
struct World {
    world_size: usize,
}

/// Tensors of the file by name, and what a rank has for them.
type Named = Vec<(String, Tensor)>;

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    let (config, World { world_size }) = (config(golden)?, golden.config(&["world_size"])?);
    let inverse = golden.get("input.idx_shuffle")?.argsort(0, false)?;
    report.compare("idx_unshuffle", &inverse, golden.get("input.idx_unshuffle")?, 0.0)?;
    let ranks = threads(world_size, |comm| rank(golden, &config, &comm))?;
    for (rank, results) in ranks.into_iter().enumerate() {
        for (name, got) in results {
            let allowed = if name.starts_with("grad.") { tolerance::MOCO_GRADIENT } else { tolerance::MOCO };
            report.compare(&format!("rank{rank}: {name}"), &got, golden.get(&name)?, allowed)?;
        }
    }
    Ok(())
}

/// The step of one rank.
fn rank(golden: &Golden, config: &MocoConfig, comm: &Comm) -> Result<Named> {
    let (rank, moco) = (comm.rank(), Moco::new(config, comm, &mut Rng::new(comm.rank() as u64))?);
    let params = moco.params();
    golden.load_weights(params)?;
    let (all_q, all_k) = (golden.get("input.im_q")?, golden.get("input.im_k")?);
    let n = all_q.dim(0)? / comm.world();
    let own = |t: &Tensor| t.narrow(0, rank * n, n);
    let order = golden.get("input.idx_shuffle")?;
    // the permutation that counts is rank 0's
    let given = if rank == 0 { order.clone() } else { Tensor::arange(n * comm.world(), DType::I64)? };
    let queue = value(params, "queue")?;
    let out = moco.forward_permuted(&own(all_q)?, &own(all_k)?, &[given])?;

    let mut results: Named = Vec::new();
    let logits = logits(&out, &queue, config.temperature)?;
    let loss = out.loss.reshape([1])?;
    for (name, got) in [("q", &out.q), ("k", &out.k), ("logits", &logits), ("loss", &loss)] {
        results.push((format!("output.rank{rank}.{name}"), got.detach()));
    }
    for (name, _) in golden.with_prefix(&format!("output.rank{rank}.buffer.")) {
        results.push((format!("output.rank{rank}.buffer.{name}"), value(params, name)?));
    }
    for name in ["queue", "queue_ptr"] {
        results.push((format!("output.{name}"), value(params, name)?));
    }
    let grads = out.loss.backward()?;
    for (name, _) in golden.with_prefix("grad.") {
        let param = params.get(name).ok_or_else(|| Error::msg(format!("no parameter {name}")))?;
        let grad = grads.get(&param).ok_or_else(|| Error::msg(format!("no gradient of {name}")))?;
        results.push((format!("grad.{name}"), grad.all_reduce(comm)?.mul_scalar(1.0 / comm.world() as f64)?));
    }
    // once more, for it does not depend on running statistics
    let shuffled = moco.encoder_k().forward(&all_k.index_select(0, &own(order)?)?, true)?;
    results.push((format!("output.rank{rank}.k_shuffled_raw"), shuffled));
    Ok(results)
}
