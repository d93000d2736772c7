//! Operations of `ops_optim_*`: states after every step, and learning rates.

use crate::case::{Case, Op};
use smalti::{
    DType, Error, Gradients, Result, Tensor,
    nn::Param,
    optim::{Adam, AdamW, Algorithm, Ema, Optimizer, Schedule, Sgd, clip_grad_norm, clip_grad_value},
};

pub const OPS: &[(&str, Op)] = &[
    ("sgd", |c| {
        let sgd = Sgd {
            momentum: c.f64("momentum")?,
            dampening: c.f64("dampening")?,
            weight_decay: c.f64("weight_decay")?,
            nesterov: c.bool("nesterov")?,
            maximize: c.bool("maximize")?,
        };
        run(c, sgd, &["momentum_buffer"])
    }),
    ("adam", |c| {
        let adam = Adam {
            betas: betas(c)?,
            eps: c.f64("eps")?,
            weight_decay: c.f64("weight_decay")?,
            amsgrad: c.bool("amsgrad")?,
            maximize: c.bool("maximize")?,
        };
        run(c, adam, &MOMENTS)
    }),
    ("adamw", |c| {
        let adamw = AdamW {
            betas: betas(c)?,
            eps: c.f64("eps")?,
            weight_decay: c.f64("weight_decay")?,
            amsgrad: c.bool("amsgrad")?,
            maximize: c.bool("maximize")?,
        };
        run(c, adamw, &MOMENTS)
    }),
    ("clip_grad_norm_", |c| {
        let (params, mut grads) = gradients(c)?;
        let norm = clip_grad_norm(&params, &mut grads, c.f64("max_norm")?, c.f64("norm_type")?)?;
        let norm = Tensor::from_slice(&[norm], ())?.to_dtype(c.dtype)?;
        Ok([norm].into_iter().chain(clipped(&params, &grads)).collect())
    }),
    ("clip_grad_value_", |c| {
        let (params, mut grads) = gradients(c)?;
        clip_grad_value(&params, &mut grads, c.f64("clip_value")?)?;
        Ok(clipped(&params, &grads).collect())
    }),
    ("ema", |c| {
        let (start, values) = (c.input(0)?, c.input(1)?);
        let param = Param::new("p", start.clone());
        let mut ema = Ema::new(std::slice::from_ref(&param), c.f64("decay")?, c.bool("warmup")?)?;
        let mut rows = Vec::new();
        for t in 0..values.shape()[0] {
            param.set(&row(values, t)?)?;
            ema.update()?;
            rows.push(ema.averages()[0].1.clone());
        }
        Ok(vec![stack(&rows)?])
    }),
    ("step_lr", |c| {
        rates(c, Schedule::Step { base: base(c)?, size: c.f64("step_size")?, gamma: c.f64("gamma")? })
    }),
    ("multi_step_lr", |c| {
        let milestones = c.f64s("milestones")?;
        rates(c, Schedule::MultiStep { base: base(c)?, milestones, gamma: c.f64("gamma")? })
    }),
    ("exponential_lr", |c| rates(c, Schedule::Exponential { base: base(c)?, gamma: c.f64("gamma")? })),
    ("linear_lr", |c| {
        let (start, end) = (c.f64("start_factor")?, c.f64("end_factor")?);
        rates(c, Schedule::Linear { base: base(c)?, start, end, steps: c.f64("total_iters")? })
    }),
    ("polynomial_lr", |c| {
        let (steps, power) = (c.f64("total_iters")?, c.f64("power")?);
        rates(c, Schedule::Polynomial { base: base(c)?, steps, power })
    }),
    ("cosine_annealing_lr", |c| {
        rates(c, Schedule::Cosine { base: base(c)?, min: c.f64("eta_min")?, steps: c.f64("T_max")? })
    }),
    ("cosine_annealing_warm_restarts", |c| {
        let (min, first, factor) = (c.f64("eta_min")?, c.f64("T_0")?, c.f64("T_mult")?);
        rates(c, Schedule::CosineRestarts { base: base(c)?, min, first, factor })
    }),
    ("warmup_cosine_lr", |c| {
        let (warmup, min) = (c.f64("warmup_lr")?, c.f64("min_lr")?);
        let (warmup_steps, steps) = (c.f64("warmup_steps")?, c.f64("total_steps")?);
        rates(c, Schedule::WarmupCosine { base: base(c)?, warmup, min, warmup_steps, steps })
    }),
];

const MOMENTS: [&str; 3] = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"];

fn betas(c: &Case) -> Result<(f64, f64)> {
    match c.f64s("betas")?[..] {
        [a, b] => Ok((a, b)),
        _ => Err(Error::msg("`betas` is no pair")),
    }
}

fn base(c: &Case) -> Result<f64> {
    c.f64("base_lr")
}

/// The rates of steps 0, 1, ..
fn rates(c: &Case, schedule: Schedule) -> Result<Vec<Tensor>> {
    let rates: Vec<f64> = (0..c.usize("steps")?).map(|t| schedule.at(t as f64)).collect();
    Ok(vec![Tensor::from_slice(&rates, rates.len())?.to_dtype(c.dtype)?])
}

fn row(x: &Tensor, t: usize) -> Result<Tensor> {
    x.narrow(0, t, 1)?.reshape(&x.shape()[1..])
}

fn stack(rows: &[Tensor]) -> Result<Tensor> {
    let mut values = Vec::new();
    for row in rows {
        values.extend(row.to_dtype(DType::F64)?.to_vec::<f64>()?);
    }
    let shape: Vec<usize> = [rows.len()].iter().chain(rows[0].shape()).copied().collect();
    Tensor::from_slice(&values, shape)?.to_dtype(rows[0].dtype())
}

/// Parameters whose gradients are the inputs.
fn gradients(c: &Case) -> Result<(Vec<Param>, Gradients)> {
    let mut grads = Gradients::default();
    let mut params = Vec::new();
    for (i, grad) in c.inputs().into_iter().enumerate() {
        let param = Param::new(&format!("p{i}"), grad.zeros_like()?);
        grads.insert(&param, grad.clone());
        params.push(param);
    }
    Ok((params, grads))
}

fn clipped<'a>(params: &'a [Param], grads: &'a Gradients) -> impl Iterator<Item = Tensor> + 'a {
    params.iter().filter_map(|p| grads.get(p).cloned())
}

/// Steps through the gradients; per parameter its values and states after every step.
fn run(c: &Case, algorithm: impl Algorithm, states: &[&str]) -> Result<Vec<Tensor>> {
    let inputs = c.inputs();
    let (values, grads) = inputs.split_at(inputs.len() / 2);
    let params: Vec<Param> =
        values.iter().enumerate().map(|(i, v)| Param::new(&format!("p{i}"), (*v).clone())).collect();
    let rates = c.opt_f64s("lr_steps")?;
    let missing = c.arg("no_grad")?;
    let lacks = |t: usize, i: usize| {
        missing.as_array().is_some_and(|pairs| pairs.iter().any(|p| p[0] == t && p[1] == i))
    };
    let mut optimizer = algorithm.over(&params, &[])?;
    let mut seen = vec![vec![Vec::new(); states.len() + 1]; params.len()];
    for t in 0..grads[0].shape()[0] {
        let mut step = Gradients::default();
        for (i, (p, g)) in params.iter().zip(grads).enumerate() {
            if !lacks(t, i) {
                step.insert(p, row(g, t)?);
            }
        }
        let lr = match &rates {
            Some(rates) => rates[t],
            None => c.f64("lr")?,
        };
        optimizer.step(&step, lr)?;
        let state = optimizer.state();
        for (p, seen) in params.iter().zip(&mut seen) {
            seen[0].push(p.value());
            for (what, seen) in states.iter().zip(&mut seen[1..]) {
                let name = format!("{}.{what}", p.name());
                let found = state.iter().find(|(n, _)| *n == name).map(|(_, t)| t.clone());
                seen.push(found.map_or_else(|| p.value().zeros_like(), Ok)?);
            }
        }
    }
    seen.iter().flatten().map(|rows| stack(rows)).collect()
}
