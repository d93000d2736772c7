//! Single operations at the sizes of a ViT-B training step: `cargo bench --bench ops -- gelu`.
//!
//! Another operation is another line in one of the tables.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use smalti::{BackwardOptions, DType, Result, Rng, Tensor, no_grad};
use std::hint::black_box;

type Op = fn(&[Tensor]) -> Result<Tensor>;

/// Measures `name` on f32 inputs of normal random numbers: `forward` alone, and `both` with its backward.
fn bench(c: &mut Criterion, name: &str, shapes: &[&[usize]], f: Op) {
    let mut rng = Rng::new(1);
    let inputs: Result<Vec<Tensor>> = shapes.iter().map(|&shape| Tensor::randn(shape, &mut rng)).collect();
    let inputs = ok(inputs);
    let leaves: Vec<Tensor> = inputs.iter().map(Tensor::requires_grad).collect();
    let y = ok(f(&leaves));
    let grad = ok(ok(Tensor::full(y.shape(), 0.5, y.dtype())).contiguous());
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(inputs[0].numel() as u64));
    group.bench_function("forward", |b| b.iter(|| black_box(ok(no_grad(|| f(&inputs))))));
    if y.tracked() && y.dtype() == DType::F32 {
        group.bench_function("both", |b| {
            b.iter(|| {
                let options = BackwardOptions { grad: Some(grad.clone()), ..Default::default() };
                black_box(ok(ok(f(&leaves)).backward_with(&options)))
            })
        });
    }
    group.finish();
}

fn ok<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|e| panic!("{e}"))
}

/// The widest activation of ViT-B with 8 images.
const WIDE: &[usize] = &[8, 197, 3072];

fn elementwise(c: &mut Criterion) {
    let unary: [(&str, Op); 8] = [
        ("gelu", |x| x[0].gelu()),
        ("gelu_tanh", |x| x[0].gelu_tanh()),
        ("gelu_quick", |x| x[0].gelu_quick()),
        ("silu", |x| x[0].silu()),
        ("relu", |x| x[0].relu()),
        ("exp", |x| x[0].exp()),
        ("mul_scalar", |x| x[0].mul_scalar(1.5)),
        ("transpose", |x| x[0].permute([0, 2, 1])?.contiguous()),
    ];
    unary.iter().for_each(|(name, f)| bench(c, name, &[WIDE], *f));
    bench(c, "add", &[WIDE, WIDE], |x| x[0].add(&x[1]));
    bench(c, "mul", &[WIDE, WIDE], |x| x[0].mul(&x[1]));
    bench(c, "add bias", &[WIDE, &[3072]], |x| x[0].add(&x[1]));
    bench(c, "add channel", &[&[8, 64, 112, 112], &[64, 1, 1]], |x| x[0].add(&x[1]));
    bench(c, "gelu bf16", &[WIDE], |x| x[0].to_dtype(DType::BF16)?.gelu());
}

fn reduce(c: &mut Criterion) {
    let ops: [(&str, Op); 8] = [
        ("sum all", |x| x[0].sum(())),
        ("sum rows", |x| x[0].sum(-1)),
        ("sum columns", |x| x[0].sum([0, 1])),
        ("sum middle", |x| x[0].sum(1)),
        ("amax rows", |x| x[0].amax(-1)),
        ("argmax rows", |x| x[0].argmax(-1)),
        ("logsumexp rows", |x| x[0].logsumexp(-1)),
        ("norm", |x| x[0].norm(2.0, ())),
    ];
    ops.iter().for_each(|(name, f)| bench(c, name, &[WIDE], *f));
    bench(c, "sum of channels", &[&[8, 64, 112, 112]], |x| x[0].sum([0, 2, 3]));
    bench(c, "sum of narrow columns", &[&[800_000, 6]], |x| x[0].sum(0));
}

criterion_group!(benches, elementwise, reduce);
criterion_main!(benches);
