use super::*;
use crate::{DType, Rng, gradcheck};

fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
    Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
}

fn unit(shape: &[usize], seed: u64) -> Result<Tensor> {
    let x = random(shape, seed)?;
    let norm = x.mul(&x)?.sum_keepdim(1)?.sqrt()?;
    x.div(&norm)
}

fn scalar(value: f64) -> Result<Tensor> {
    Tensor::full((), value, DType::F64)
}

fn vec(t: &Tensor) -> Result<Vec<f64>> {
    t.to_dtype(DType::F64)?.to_vec::<f64>()
}

/// Relative to the largest of `b`.
#[track_caller]
fn close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(a.shape(), b.shape(), "{what}");
    let (a, b) = (vec(a)?, vec(b)?);
    let scale = b.iter().fold(1e-300f64, |m, v| m.max(v.abs()));
    for (a, b) in a.iter().zip(&b) {
        assert!((a - b).abs() <= tolerance * scale, "{what}: {a:e} is not {b:e} (largest {scale:e})");
    }
    Ok(())
}

/// Sizes of several of the CPU's blocks; an emulated GPU is too slow for them.
fn on_cpu() -> Result<bool> {
    Ok(crate::Device::current()? == crate::Device::Cpu)
}

/// Mean of logsumexp(row) - row[label], in tensor operations.
fn direction(logits: &Tensor, offset: usize) -> Result<Tensor> {
    let n = logits.shape()[0];
    let labels = Tensor::from_slice(&(0..n).map(|i| (i + offset) as i64).collect::<Vec<_>>(), [n])?;
    logits.cross_entropy(&labels, &crate::CrossEntropy::default())
}

fn naive(q: &Tensor, k: &Tensor, scale: &Tensor, offset: usize) -> Result<Tensor> {
    direction(&q.matmul(&k.t()?)?.mul(scale)?, offset)
}

fn naive_both(q: &Tensor, k: &Tensor, scale: &Tensor) -> Result<Tensor> {
    naive(q, k, scale, 0)?.add(&naive(k, q, scale, 0)?)?.mul_scalar(0.5)
}

/// Value and gradients of two functions at the same leaves.
fn compare(
    what: &str,
    inputs: &[Tensor],
    tolerance: f64,
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
    exact: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    let leaves: Vec<Tensor> = inputs.iter().map(Tensor::requires_grad).collect();
    let wide: Vec<Tensor> =
        inputs.iter().map(|t| Ok(t.to_dtype(DType::F64)?.requires_grad())).collect::<Result<_>>()?;
    let (y, truth) = (f(&leaves)?, exact(&wide)?);
    close(what, &y, &truth, tolerance)?;
    let (grads, truth) = (y.backward()?, truth.backward()?);
    for (i, (leaf, wide)) in leaves.iter().zip(&wide).enumerate() {
        match (grads.get(leaf), truth.get(wide)) {
            (Some(a), Some(b)) => close(&format!("{what}, gradient {i}"), a, b, tolerance)?,
            (a, b) => panic!("{what}: gradient {i} is there: {} {}", a.is_some(), b.is_some()),
        }
    }
    Ok(())
}

#[test]
fn values_and_gradients_of_both_directions() -> Result<()> {
    // one row; odd sizes; several blocks of rows and columns
    for (n, d, scale) in [(2, 3, 1.0), (5, 1, 0.3), (33, 17, 14.3), (130, 64, 100.0), (2100, 5, 2.0)] {
        if n > 1000 && !on_cpu()? {
            continue;
        }
        let inputs = [unit(&[n, d], 1)?, unit(&[n, d], 2)?, scalar(scale)?];
        let run = |t: &[Tensor]| t[0].contrastive_loss(&t[1], &t[2]);
        let exact = |t: &[Tensor]| naive_both(&t[0], &t[1], &t[2]);
        compare(&format!("{n} x {d}"), &inputs, 1e-10, run, exact)?;
        let [q, k, s] = inputs;
        let single = [q.to_dtype(DType::F32)?, k.to_dtype(DType::F32)?, s.to_dtype(DType::F32)?];
        compare(&format!("{n} x {d} f32"), &single, 3e-5, run, exact)?;
    }
    Ok(())
}

#[test]
fn values_and_gradients_of_one_direction() -> Result<()> {
    for (n, m, d, offset) in [(1, 7, 3, 4), (3, 3, 2, 0), (20, 45, 9, 25), (1100, 2100, 4, 1000)] {
        if n > 1000 && !on_cpu()? {
            continue;
        }
        let (q, k, s) = (unit(&[n, d], 1)?, unit(&[m, d], 2)?, scalar(5.0)?);
        let what = format!("{n} x {m} x {d} from {offset}");
        let all = [q.clone(), k.clone(), s.clone()];
        compare(
            &what,
            &all,
            1e-10,
            |t| t[0].contrastive_cross_entropy(&t[1], &t[2], offset),
            |t| naive(&t[0], &t[1], &t[2], offset),
        )?;
        // MoCo v3: the keys are not tracked
        compare(
            &what,
            &[q, s],
            1e-10,
            |t| t[0].contrastive_cross_entropy(&k, &t[1], offset),
            |t| naive(&t[0], &k, &t[1], offset),
        )?;
    }
    Ok(())
}

#[test]
fn gradients() -> Result<()> {
    let (q, k, s) = (random(&[4, 3], 1)?, random(&[4, 3], 2)?, scalar(0.7)?);
    let columns = random(&[3, 4], 3)?.t()?;
    gradcheck(|t| t[0].contrastive_loss(&t[1], &t[2]), &[q.clone(), k.clone(), s.clone()])?;
    gradcheck(|t| t[0].contrastive_loss(&t[1], &s), &[columns.clone(), q.clone()])?;
    gradcheck(|t| q.contrastive_loss(&k, &t[0]), &[s.reshape([1])?])?;
    gradcheck(|t| q.contrastive_loss(&t[0], &s), &[k.clone()])?;
    let many = random(&[9, 3], 4)?;
    gradcheck(|t| t[0].contrastive_cross_entropy(&t[1], &t[2], 5), &[q.clone(), many.clone(), s.clone()])?;
    gradcheck(|t| t[0].contrastive_cross_entropy(&many, &t[1], 2), &[q.clone(), s.clone()])?;
    gradcheck(|t| q.contrastive_cross_entropy(&many, &t[0], 2), &[s])?;
    let queue = random(&[3, 11], 5)?;
    gradcheck(|t| Ok(t[0].info_nce(&t[1], &queue, 0.5)?.loss), &[q.clone(), columns])?;
    gradcheck(|t| Ok(t[0].info_nce(&q, &many.t()?, 0.5)?.loss), &[k.clone()])?;
    gradcheck(|t| Ok(k.info_nce(&t[0], &queue, 0.5)?.loss), &[q])
}

#[test]
fn queue() -> Result<()> {
    for (n, d, keys) in [(1, 1, 1), (3, 5, 17), (70, 16, 4099), (4, 3, 0)] {
        if keys > 1000 && !on_cpu()? {
            continue;
        }
        let (q, p, queue) = (unit(&[n, d], 1)?, unit(&[n, d], 2)?, random(&[d, keys], 3)?);
        let labels = Tensor::zeros([n], DType::I64)?;
        let logits = |q: &Tensor, p: &Tensor| -> Result<Tensor> {
            let positive = q.mul(p)?.sum_keepdim(1)?;
            if keys == 0 {
                return positive.mul_scalar(5.0);
            }
            Tensor::cat(&[positive, q.matmul(&queue)?], 1)?.mul_scalar(5.0)
        };
        let exact =
            |t: &[Tensor]| logits(&t[0], &t[1])?.cross_entropy(&labels, &crate::CrossEntropy::default());
        let stored_by_rows = queue.t()?.contiguous()?;
        for queue in [&queue, &stored_by_rows.t()?, &spread(&queue)?] {
            let what = format!("queue {n} x {keys} x {d}");
            let run = |t: &[Tensor]| Ok(t[0].info_nce(&t[1], queue, 0.2)?.loss);
            compare(&what, &[q.clone(), p.clone()], 1e-10, run, exact)?;
            let rank = q.info_nce(&p, queue, 0.2)?.rank.to_vec::<i64>()?;
            let logits = logits(&q, &p)?.to_vec::<f64>()?;
            for (i, rank) in rank.iter().enumerate() {
                let row = &logits[i * (keys + 1)..(i + 1) * (keys + 1)];
                assert_eq!(*rank, row.iter().filter(|&&x| x > row[0]).count() as i64);
            }
        }
    }
    Ok(())
}

/// The same values with gaps between both rows and columns.
fn spread(t: &Tensor) -> Result<Tensor> {
    let [rows, columns] = t.dims("spread")?;
    let twice = Tensor::cat(&[t.reshape([rows, columns, 1])?, t.reshape([rows, columns, 1])?], 2)?;
    twice.narrow(2, 0, 1)?.reshape([rows, columns])
}

#[test]
fn nearly_no_loss_keeps_its_digits() -> Result<()> {
    // text = image: the positives' logits are 100, the others' far below; p - 1 is some 1e-20
    let image = unit(&[40, 64], 1)?.to_dtype(DType::F32)?;
    let text = image.add(&random(&[40, 64], 2)?.to_dtype(DType::F32)?.mul_scalar(0.05)?)?;
    let inputs = [image, text, Tensor::full((), 100.0, DType::F32)?];
    let wide = inputs.each_ref().map(|t| t.to_dtype(DType::F64));
    let [q, k, s] = wide;
    let (q, k, s) = (q?.requires_grad(), k?.requires_grad(), s?);
    let y = q.contrastive_loss(&k, &s)?;
    assert!(y.item()? < 1e-9 && y.item()? > 0.0, "{}", y.item()?);
    compare(
        "small loss",
        &inputs,
        2e-4,
        |t| t[0].contrastive_loss(&t[1], &t[2]),
        |t| t[0].contrastive_loss(&t[1], &t[2]),
    )?;
    // f64 against its own definition in sums of exponentials of differences
    let logits = q.matmul(&k.t()?)?.mul(&s)?.to_vec::<f64>()?;
    let mut sum = 0.0;
    for i in 0..40 {
        let r: f64 = (0..40).filter(|&j| j != i).map(|j| (logits[i * 40 + j] - logits[i * 41]).exp()).sum();
        let c: f64 = (0..40).filter(|&j| j != i).map(|j| (logits[j * 40 + i] - logits[i * 41]).exp()).sum();
        sum += (r.ln_1p() + c.ln_1p()) / 80.0;
    }
    assert!((y.item()? - sum).abs() < 1e-9 * sum);
    Ok(())
}

#[test]
fn extreme_logits() -> Result<()> {
    // far beyond what exp can take, of either sign
    let q = Tensor::from_slice(&[300.0f32, -200.0, 10.0, -5000.0], [2, 2])?;
    let k = Tensor::from_slice(&[1.0f32, 3.0, -2.0, 40.0], [2, 2])?;
    let s = Tensor::full((), 3.0, DType::F32)?;
    compare(
        "large",
        &[q.clone(), k.clone(), s.clone()],
        1e-5,
        |t| t[0].contrastive_loss(&t[1], &t[2]),
        |t| naive_both(&t[0], &t[1], &t[2]),
    )?;
    let nan = Tensor::from_slice(&[f32::NAN, 1.0, 1.0, 1.0], [2, 2])?;
    assert!(nan.contrastive_loss(&k, &s)?.item()?.is_nan());
    assert!(k.contrastive_cross_entropy(&nan, &s, 0)?.item()?.is_nan());
    assert!(q.info_nce(&k, &nan, 1.0)?.loss.item()?.is_nan());
    Ok(())
}

#[test]
fn one_pair_has_no_loss() -> Result<()> {
    let (q, k) = (random(&[1, 5], 1)?.requires_grad(), random(&[1, 5], 2)?.requires_grad());
    let s = scalar(9.0)?.requires_grad();
    for y in [q.contrastive_loss(&k, &s)?, q.contrastive_cross_entropy(&k, &s, 0)?] {
        assert_eq!(y.item()?, 0.0);
        let grads = y.backward()?;
        for leaf in [&q, &k, &s] {
            assert!(grads.get(leaf).is_some_and(|g| vec(g).is_ok_and(|v| v.iter().all(|&g| g == 0.0))));
        }
    }
    Ok(())
}

#[test]
fn features_of_no_width() -> Result<()> {
    let none = Tensor::zeros([3, 0], DType::F64)?;
    let (q, s) = (none.requires_grad(), scalar(2.0)?.requires_grad());
    let y = q.contrastive_loss(&none, &s)?;
    assert!((y.item()? - 3f64.ln()).abs() < 1e-15);
    let grads = y.backward()?;
    assert_eq!(grads.get(&q).map(Tensor::shape), Some(&[3, 0][..]));
    assert_eq!(grads.get(&s).map(Tensor::item).transpose()?, Some(0.0));
    Ok(())
}

#[test]
fn ranks_together_are_the_whole() -> Result<()> {
    let (n, world, d) = (6, 3, 5);
    let (image, text) =
        (unit(&[n * world, d], 1)?.requires_grad(), unit(&[n * world, d], 2)?.requires_grad());
    let s = scalar(8.0)?.requires_grad();
    let mut sum = scalar(0.0)?;
    for rank in 0..world {
        let (i, t) = (image.narrow(0, rank * n, n)?, text.narrow(0, rank * n, n)?);
        sum = sum.add(&i.contrastive_loss_gathered(&t, &image, &text, &s, rank * n)?)?;
    }
    let (ranks, whole) = (sum.mul_scalar(1.0 / world as f64)?, image.contrastive_loss(&text, &s)?);
    close("loss", &ranks, &whole, 1e-12)?;
    let (ranks, whole) = (ranks.backward()?, whole.backward()?);
    for leaf in [&image, &text, &s] {
        match (ranks.get(leaf), whole.get(leaf)) {
            (Some(a), Some(b)) => close("gradient", a, b, 1e-12)?,
            _ => panic!("a gradient is missing"),
        }
    }
    Ok(())
}

#[test]
fn half_types() -> Result<()> {
    for (dtype, tolerance) in [(DType::BF16, 4e-3), (DType::F16, 1e-3)] {
        let inputs = [unit(&[20, 16], 1)?.to_dtype(dtype)?, unit(&[20, 16], 2)?.to_dtype(dtype)?];
        for scale in [DType::F32, dtype] {
            let s = Tensor::full((), 10.0, scale)?;
            let run = |t: &[Tensor]| t[0].contrastive_loss(&t[1], &s);
            compare("half", &inputs, tolerance, run, |t| naive_both(&t[0], &t[1], &scalar(10.0)?))?;
            assert_eq!(run(&inputs)?.dtype(), DType::F32, "the loss keeps its digits");
        }
        let queue = random(&[16, 9], 3)?.to_dtype(dtype)?;
        let y = inputs[0].requires_grad().info_nce(&inputs[1], &queue, 0.1)?;
        assert_eq!(y.loss.dtype(), DType::F32);
        assert!(y.loss.backward()?.values_mut().all(|g| g.dtype() == dtype));
    }
    Ok(())
}

#[test]
fn thread_count_changes_no_bit() -> Result<()> {
    if !on_cpu()? {
        return Ok(());
    }
    let run = || -> Result<Vec<Vec<f32>>> {
        let single = |shape: &[usize], seed| unit(shape, seed)?.to_dtype(DType::F32);
        let (q, k) = (single(&[700, 48], 1)?.requires_grad(), single(&[3100, 48], 2)?.requires_grad());
        let (i, t) = (single(&[1500, 32], 3)?.requires_grad(), single(&[1500, 32], 4)?.requires_grad());
        let s = Tensor::full((), 20.0, DType::F32)?.requires_grad();
        let mut all = Vec::new();
        let queue = k.detach().t()?;
        let positive = k.narrow(0, 0, 700)?;
        for y in [
            q.contrastive_cross_entropy(&k, &s, 900)?,
            q.contrastive_cross_entropy(&k.detach(), &s, 900)?,
            i.contrastive_loss(&t, &s)?,
            q.info_nce(&positive, &queue, 0.07)?.loss,
        ] {
            all.push(y.to_vec::<f32>()?);
            let grads = y.backward()?;
            for leaf in [&q, &k, &i, &t, &s] {
                all.push(grads.get(leaf).map(Tensor::to_vec::<f32>).transpose()?.unwrap_or_default());
            }
        }
        Ok(all)
    };
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build();
    let one = pool(1).map_err(|e| Error::msg(e.to_string()))?.install(run)?;
    for n in [2, 5] {
        assert_eq!(one, pool(n).map_err(|e| Error::msg(e.to_string()))?.install(run)?, "{n} threads");
    }
    Ok(())
}

#[test]
fn errors() -> Result<()> {
    let (q, k, s) = (random(&[4, 3], 1)?, random(&[6, 3], 2)?, scalar(1.0)?);
    let text = |r: Result<Tensor>| r.err().map(|e| e.to_string()).unwrap_or_default();
    assert!(text(q.contrastive_loss(&k, &s)).contains("as many images as texts, got 4 and 6"));
    assert!(
        text(q.contrastive_cross_entropy(&k, &s, 3))
            .contains("the labels 3 + row of 4 rows exceed the 6 keys")
    );
    assert!(q.contrastive_cross_entropy(&k, &s, usize::MAX).is_err());
    assert!(text(q.contrastive_loss(&random(&[4, 2], 1)?, &s)).contains("one width"));
    assert!(q.contrastive_loss(&q.to_dtype(DType::F32)?, &s).is_err());
    assert!(q.contrastive_loss(&q, &random(&[2], 1)?).is_err());
    assert!(q.contrastive_loss(&q, &Tensor::full((), 1.0, DType::I64)?).is_err());
    assert!(random(&[3], 1)?.contrastive_loss(&q, &s).is_err());
    let none = Tensor::zeros([0, 3], DType::F64)?;
    assert!(text(none.contrastive_loss(&none, &s)).contains("at least one row"));
    let loss = |r: Result<InfoNce>| r.map(|y| y.loss);
    let queue = random(&[3, 5], 1)?;
    assert!(text(loss(q.info_nce(&k, &queue, 1.0))).contains("one positive for each of 4 rows"));
    assert!(text(loss(q.info_nce(&q, &queue.t()?, 1.0))).contains("needs a queue [3, K], got [5, 3]"));
    assert!(q.info_nce(&q, &queue, 0.0).is_err() && q.info_nce(&q, &queue, f64::NAN).is_err());
    assert!(q.info_nce(&q, &queue.to_dtype(DType::F32)?, 1.0).is_err());
    assert!(matches!(q.info_nce(&q, &queue.requires_grad(), 1.0), Err(Error::NoGradient { .. })));
    Ok(())
}
