//! Contrastive losses, fused and composed, forward and backward: `cargo bench --bench contrastive`. Prints the most
//! memory that each takes beside its inputs, results included.

use criterion::{Criterion, criterion_group, criterion_main};
use smalti::{CrossEntropy, DType, Result, Rng, Tensor, cpu::pool};
use std::hint::black_box;

fn ok<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|e| panic!("{e}"))
}

fn unit(shape: &[usize], seed: u64) -> Result<Tensor> {
    let x = Tensor::randn(shape, &mut Rng::new(seed))?;
    x.div(&x.mul(&x)?.sum_keepdim(1)?.sqrt()?)
}

fn bench(c: &mut Criterion, name: &str, f: impl Fn() -> Result<Tensor>) {
    let run = || ok(ok(f()).backward());
    let before = pool::reset_peak();
    black_box(run());
    println!("{name}: {:.1} MiB", (pool::stats().peak - before) as f64 / (1 << 20) as f64);
    c.bench_function(name, |b| b.iter(|| black_box(run())));
}

fn clip(c: &mut Criterion) {
    let (image, text) =
        (ok(unit(&[4096, 512], 1)).requires_grad(), ok(unit(&[4096, 512], 2)).requires_grad());
    let scale = ok(ok(Tensor::full((), 14.0, DType::F32)).contiguous()).requires_grad();
    bench(c, "clip 4096 x 512 fused", || image.contrastive_loss(&text, &scale));
    let labels = ok(Tensor::arange(4096, DType::I64));
    bench(c, "clip 4096 x 512 composed", || {
        let logits = image.matmul(&text.t()?)?.mul(&scale)?;
        let images = logits.cross_entropy(&labels, &CrossEntropy::default())?;
        images.add(&logits.t()?.cross_entropy(&labels, &CrossEntropy::default())?)?.mul_scalar(0.5)
    });
}

fn moco(c: &mut Criterion) {
    let (q, key) = (ok(unit(&[256, 128], 1)).requires_grad(), ok(unit(&[256, 128], 2)));
    let queue = ok(ok(ok(unit(&[65536, 128], 3)).t()).contiguous());
    bench(c, "moco 256 x 65536 x 128 fused", || Ok(q.info_nce(&key, &queue, 0.07)?.loss));
    let labels = ok(Tensor::zeros([256], DType::I64));
    bench(c, "moco 256 x 65536 x 128 composed", || {
        let positive = q.mul(&key)?.sum_keepdim(1)?;
        let logits = Tensor::cat(&[positive, q.matmul(&queue)?], 1)?.mul_scalar(1.0 / 0.07)?;
        logits.cross_entropy(&labels, &CrossEntropy::default())
    });
}

criterion_group!(benches, clip, moco);
criterion_main!(benches);
