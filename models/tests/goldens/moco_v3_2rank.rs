//! MoCo v3's loss with the keys of several ranks.

use super::{
    file::{Golden, Report},
    tolerance,
};
use smalti::{CrossEntropy, Error, Result, Tensor, comm::threads};
use smalti_models::moco_v3::contrastive_loss;

#[derive(serde::Deserialize)]
struct Config {
    world_size: usize,
    batch_per_rank: usize,
    #[serde(rename = "T")]
    temperature: f64,
}

/// One direction of one rank: queries, keys, loss, and its gradient.
struct Direction {
    q: Tensor,
    loss: Tensor,
    grad: Tensor,
}

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    let config: Config = golden.config(&["world_size", "batch_per_rank", "T"])?;
    let (n, t) = (config.batch_per_rank, config.temperature);
    let ranks = threads(config.world_size, |comm| {
        let rows = |name: &str| golden.get(&format!("input.{name}_all"))?.narrow(0, comm.rank() * n, n);
        let direction = |q: &str, k: &str| {
            let q = rows(q)?.contiguous()?.requires_grad();
            let loss = contrastive_loss(&q, &rows(k)?, t, &comm)?;
            let grads = loss.backward()?;
            let grad = grads.get(&q).cloned().ok_or_else(|| Error::msg("the queries have no gradient"))?;
            Ok::<_, Error>(Direction { q, loss, grad })
        };
        Ok([direction("q1", "k2")?, direction("q2", "k1")?])
    })?;
    let mut total = 0.0;
    for (rank, [first, second]) in ranks.iter().enumerate() {
        let output = |name: &str| golden.get(&format!("output.rank{rank}.{name}"));
        let loss = first.loss.add(&second.loss)?;
        total += loss.item()?;
        for (name, value) in [("loss_q1k2", &first.loss), ("loss_q2k1", &second.loss), ("loss", &loss)] {
            report.compare(&format!("rank{rank}.{name}"), value, output(name)?, tolerance::RANKS)?;
        }
        let unit = |t: &Tensor| t.detach().normalize(2.0, 1, 1e-12);
        let keys = unit(golden.get("input.k2_all")?)?;
        let logits = unit(&first.q)?.matmul(&keys.t()?)?.mul_scalar(1.0 / t)?;
        report.compare(&format!("rank{rank}.logits"), &logits, output("logits_q1k2")?, tolerance::RANKS)?;
        // with the file's labels the logits give the loss
        let labelled = logits.cross_entropy(output("labels")?, &CrossEntropy::default())?;
        let labelled = labelled.mul_scalar(2.0 * t)?;
        report.compare(&format!("rank{rank}.labels"), &labelled, &first.loss, tolerance::RANKS)?;
        for (name, got) in [("q1", &first.grad), ("q2", &second.grad)] {
            let name = format!("grad.rank{rank}.{name}");
            report.compare(&name, got, golden.get(&name)?, tolerance::RANKS_GRADIENT)?;
        }
    }
    let mean = Tensor::full((), total / config.world_size as f64, smalti::DType::F64)?;
    report.compare("mean_loss", &mean, golden.get("output.mean_loss")?, tolerance::RANKS)
}
