//! The engine: accumulation, retained graphs, second order, checkpoints, deep chains.

use smalti::{
    BackwardOptions, DType, Error, Result, Rng, Tensor, checkpoint, detect_anomaly, gradcheck, no_grad,
};

fn value(t: Option<&Tensor>) -> f64 {
    t.and_then(|t| t.item().ok()).unwrap_or(f64::NAN)
}

#[test]
fn contributions_add_up() -> Result<()> {
    let x = Tensor::scalar(3.0).requires_grad();
    let y = x.mul(&x)?.add(&x.mul(&x)?.mul(&x)?)?.add(&x)?;
    assert_eq!(value(y.backward()?.get(&x)), 2. * 3. + 3. * 9. + 1.);
    Ok(())
}

#[test]
fn broadcast_gradients_are_summed() -> Result<()> {
    let mut rng = Rng::new(1);
    let a = Tensor::randn([2, 1, 3], &mut rng)?.to_dtype(DType::F64)?;
    let b = Tensor::randn([4, 1], &mut rng)?.to_dtype(DType::F64)?.add_scalar(3.0)?;
    gradcheck(|t| t[0].mul(&t[1])?.div(&t[1])?.exp()?.sub(&t[1]), &[a, b])
}

#[test]
fn second_order() -> Result<()> {
    let x = Tensor::scalar(0.7).requires_grad();
    let y = x.tanh()?.mul(&x.exp()?)?;
    let options = BackwardOptions { create_graph: true, ..Default::default() };
    let first = y.backward_with(&options)?;
    let second = first.get(&x).map(|g| g.backward()).transpose()?;
    let f = |x: f64| x.exp() * x.tanh();
    let exact = (f(0.7 + 1e-4) - 2. * f(0.7) + f(0.7 - 1e-4)) / 1e-8;
    let got = value(second.as_ref().and_then(|s| s.get(&x)));
    assert!((got - exact).abs() < 1e-4, "{got} {exact}");
    Ok(())
}

#[test]
fn a_graph_runs_once_unless_retained() -> Result<()> {
    let x = Tensor::scalar(2.0).requires_grad();
    let y = x.mul(&x)?;
    let options = BackwardOptions { retain_graph: true, ..Default::default() };
    y.backward_with(&options)?;
    y.backward()?;
    assert!(matches!(y.backward(), Err(Error::GraphFreed { .. })));
    Ok(())
}

#[test]
fn intermediate_gradients_on_request() -> Result<()> {
    let x = Tensor::scalar(2.0).requires_grad();
    let h = x.mul(&x)?;
    let y = h.mul_scalar(5.0)?;
    let grads = y.backward_with(&BackwardOptions { keep: vec![h.clone()], ..Default::default() })?;
    assert_eq!((value(grads.get(&h)), value(grads.get(&x))), (5., 20.));
    Ok(())
}

#[test]
fn nothing_is_recorded_without_need() -> Result<()> {
    let x = Tensor::scalar(2.0);
    assert!(!x.mul(&x)?.tracked());
    let w = x.requires_grad();
    assert!(!no_grad(|| w.mul(&w))?.tracked());
    assert!(w.detach().backward().is_err());
    let grads = w.mul(&x)?.backward()?;
    assert_eq!(grads.len(), 1, "no gradient of the constant is computed or kept");
    Ok(())
}

#[test]
fn a_million_nodes_do_not_overflow_the_stack() -> Result<()> {
    let x = Tensor::scalar(1.0).requires_grad();
    let mut y = x.clone();
    for _ in 0..200_000 {
        y = y.neg()?;
    }
    assert_eq!(value(y.backward()?.get(&x)), 1.0);
    let mut y = x.clone();
    for _ in 0..200_000 {
        y = y.neg()?;
    }
    drop(y);
    Ok(())
}

#[test]
fn checkpoint_gives_the_same_gradients() -> Result<()> {
    let w = Tensor::scalar(1.5).requires_grad();
    let x = Tensor::scalar(0.3).requires_grad();
    let block = |w: &Tensor, x: &Tensor| x.mul(w)?.tanh()?.mul(w);
    let plain = block(&w, &block(&w, &x)?)?.backward()?;
    let inner = w.clone();
    let step = move |t: &[Tensor]| block(&inner, &t[0]);
    let y = checkpoint(step.clone(), &[&checkpoint(step, &[&x])?])?;
    let grads = y.backward()?;
    assert_eq!(value(grads.get(&w)), value(plain.get(&w)));
    assert_eq!(value(grads.get(&x)), value(plain.get(&x)));
    // a tracked tensor that is not an input would be differentiated twice; it is refused
    let h = x.exp()?;
    let y = checkpoint(move |t: &[Tensor]| t[0].mul(&h), &[&x])?;
    assert!(y.backward().is_err_and(|e| e.to_string().contains("not among its inputs")));
    Ok(())
}

#[test]
fn the_operation_that_goes_wrong_is_named() -> Result<()> {
    let x = Tensor::from_slice(&[4f32, -1.0], [2])?.requires_grad();
    // without a look at it, NaN is a value like others
    assert!(x.sqrt()?.sum(())?.item()?.is_nan());
    let forward = detect_anomaly(|| x.add_scalar(1.0)?.mul_scalar(2.0)?.add_scalar(-1.0)?.log()?.sum(()));
    let message = forward.unwrap_err().to_string();
    assert!(message.starts_with("log: gave NaN") && message.contains("tests/autograd.rs:"), "{message}");
    // sqrt at 0 has a value, and no gradient
    let zero = Tensor::scalar(0.0).requires_grad();
    let backward = detect_anomaly(|| zero.sqrt()?.backward());
    let message = backward.err().map(|e| e.to_string()).unwrap_or_default();
    assert!(message.starts_with("sqrt: gave inf in its backward"), "{message}");
    // masks are made of infinities below zero
    let scores = Tensor::from_slice(&[1f32, f32::NEG_INFINITY], [1, 2])?.requires_grad();
    detect_anomaly(|| scores.softmax(1)?.sum(())?.backward()).map(drop)
}
