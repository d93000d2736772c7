use super::*;
use crate::{
    Rng,
    nn::Params,
    optim::{AdamW, Group, Lars, Sgd, no_decay_1d},
};

fn network(dtype: DType) -> Result<Params> {
    let mut rng = Rng::new(5);
    let params = Params::new();
    for (name, shape) in [("a", vec![300, 301]), ("b", vec![17]), ("c", vec![])] {
        params.param(name, Tensor::randn(shape, &mut rng)?.to_dtype(dtype)?)?;
    }
    Ok(params)
}

fn grads(params: &Params) -> Result<Gradients> {
    let mut all = Gradients::default();
    for p in params.trained() {
        let x = p.get();
        all.accumulate(x.mul(&x)?.sum(())?.backward()?)?;
    }
    Ok(all)
}

/// Elementwise the parallel pass equals a plain loop in f64, also where a chunk ends within a lane block.
#[test]
fn adamw_against_a_plain_loop() -> Result<()> {
    let params = network(DType::F64)?;
    let mut expected: Vec<Vec<f64>> =
        params.all().iter().map(|p| p.value().to_vec()).collect::<Result<_>>()?;
    let mut moments: Vec<Vec<[f64; 2]>> = expected.iter().map(|v| vec![[0.0; 2]; v.len()]).collect();
    let mut optimizer = AdamW { weight_decay: 0.1, ..Default::default() }
        .over(&params.trained(), &[no_decay_1d(&params.all())])?;
    for t in 1..=3 {
        optimizer.step(&grads(&params)?, 0.01)?;
        for (i, (w, m)) in expected.iter_mut().zip(&mut moments).enumerate() {
            for (w, [m, v]) in w.iter_mut().zip(m) {
                let g = 2.0 * *w;
                *w *= 1.0 - if i == 0 { 0.01 * 0.1 } else { 0.0 };
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                let (m, v) = (*m / (1.0 - 0.9f64.powi(t)), *v / (1.0 - 0.999f64.powi(t)));
                *w -= 0.01 * m / (v.sqrt() + 1e-8);
            }
        }
    }
    for (p, expected) in params.all().iter().zip(&expected) {
        for (a, b) in p.value().to_vec::<f64>()?.iter().zip(expected) {
            assert!((a - b).abs() < 1e-12, "{}: {a} {b}", p.name());
        }
    }
    Ok(())
}

/// Going on from saved state is bit for bit the same as never having stopped.
#[test]
fn state_round_trip() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let params = network(dtype)?;
        let mut first = AdamW::default().over(&params.trained(), &[])?;
        first.step(&grads(&params)?, 0.1)?;
        let state = first.state();
        let kept: Vec<Tensor> = params.all().iter().map(Param::value).collect();
        first.step(&grads(&params)?, 0.1)?;
        let expected: Vec<Tensor> = params.all().iter().map(Param::value).collect();
        for (p, kept) in params.all().iter().zip(&kept) {
            p.set(kept)?;
        }
        let mut second = AdamW::default().over(&params.trained(), &[])?;
        second.load_state(&state)?;
        second.step(&grads(&params)?, 0.1)?;
        for (p, e) in params.all().iter().zip(&expected) {
            let bits = |t: &Tensor| t.to_dtype(DType::F32)?.to_vec::<f32>();
            assert_eq!(bits(&p.value())?, bits(e)?, "{} {dtype}", p.name());
        }
        let mut wrong = state.clone();
        wrong[1].0.push('x');
        assert!(second.load_state(&wrong).is_err());
        assert!(Sgd::default().over(&params.trained(), &[])?.load_state(&state).is_err());
    }
    Ok(())
}

/// Small steps that bf16 cannot hold add up in the f32 copy.
#[test]
fn half_precision_has_an_f32_copy() -> Result<()> {
    let params = Params::new();
    let w = params.param("w", Tensor::ones([40], DType::BF16)?)?;
    let mut optimizer = Sgd::default().over(&params.trained(), &[])?;
    for _ in 0..64 {
        optimizer.step(&w.get().sum(())?.backward()?, 1e-3)?;
    }
    let got = w.value().to_dtype(DType::F32)?.to_vec::<f32>()?;
    assert!(got.iter().all(|x| (x - 0.936).abs() < 4e-3), "{got:?}");
    Ok(())
}

#[test]
fn bad_arguments() -> Result<()> {
    let params = network(DType::F32)?;
    let twice: Vec<Param> = params.all().into_iter().chain(params.all()).collect();
    assert!(Lars::default().over(&twice, &[]).is_err());
    assert!(AdamW { betas: (1.0, 0.9), ..Default::default() }.over(&params.all(), &[]).is_err());
    assert!(Sgd { nesterov: true, ..Default::default() }.over(&params.all(), &[]).is_err());
    let mut optimizer = Sgd::default().over(&params.all(), &[])?;
    assert!(optimizer.step(&Gradients::default(), f64::NAN).is_err());
    let mut wrong = grads(&params)?;
    wrong.insert(&params.all()[0], Tensor::ones([2], DType::F32)?);
    assert!(optimizer.step(&wrong, 0.1).is_err() && optimizer.state().is_empty());
    Ok(())
}

/// A fixed rate does not follow that of the step; factors of other groups still count.
#[test]
fn a_group_with_a_rate_of_its_own() -> Result<()> {
    let params = network(DType::F64)?;
    let before: Vec<Vec<f64>> = params.all().iter().map(|p| p.value().to_vec()).collect::<Result<_>>()?;
    let groups = [Group::named(["b"]).fixed_lr(0.25), Group::named(["b", "c"]).lr_scale(0.5)];
    let mut optimizer = Sgd::default().over(&params.trained(), &groups)?;
    optimizer.step(&grads(&params)?, 0.125)?;
    optimizer.step(&grads(&params)?, 0.0)?;
    for ((p, before), factor) in params.all().iter().zip(&before).zip([0.75, 0.75 * 0.75, 0.875]) {
        for (now, before) in p.value().to_vec::<f64>()?.iter().zip(before) {
            assert!((now - before * factor).abs() < 1e-12, "{}: {before} to {now}", p.name());
        }
    }
    Ok(())
}
