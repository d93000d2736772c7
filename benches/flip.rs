//! What leaving patches out saves: FLIP's training step with a ViT-S/16 at 224 pixels, batch 16, nothing, half and
//! three quarters of the patches masked: `cargo bench -p smalti-models --bench flip`.

use criterion::{Criterion, criterion_group, criterion_main};
use smalti::{
    DType, Result, Rng, Tensor,
    comm::single,
    optim::{AdamW, Algorithm, Optimizer},
};
use smalti_models::flip::{Flip, FlipConfig};
use std::hint::black_box;

const BATCH: usize = 16;

fn ok<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|e| panic!("{e}"))
}

/// The base model with a ViT-S for images and a text tower that is small beside it.
fn config(mask_ratio: f64) -> FlipConfig {
    let mut config = FlipConfig::official("base").unwrap_or_else(|| panic!("no base model"));
    (config.image.width, config.image.heads) = (384, 6);
    (config.text.width, config.text.heads, config.text.layers, config.text.vocab_size) = (256, 4, 4, 1000);
    config.mask_ratio = mask_ratio;
    config
}

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("flip step ViT-S/16 at 224");
    group.sample_size(10);
    let mut rng = Rng::new(0);
    let images = ok(Tensor::randn([BATCH, 3, 224, 224], &mut rng));
    let tokens = ok(ok(Tensor::arange(BATCH * 32, DType::I64)).reshape([BATCH, 32]));
    for ratio in [0.0, 0.5, 0.75] {
        let model = ok(Flip::new(&config(ratio), &mut rng));
        let mut optimizer = ok(AdamW::default().over(&model.params().trained(), &[]));
        group.bench_function(format!("masked {ratio}"), |b| {
            b.iter(|| {
                let masking = ok(model.random_masking(&tokens, &mut rng));
                let loss = ok(model.forward(&images, &tokens, &masking, &single())).loss;
                ok(optimizer.step(&ok(loss.backward()), 1e-4));
                black_box(loss)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
