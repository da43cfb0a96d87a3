//! Whole models, one thread: vision, batch 1, 224 x 224 pixels; language, 512 tokens that are read.

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use linattn::models::transformer::TransformerConfig;
use linattn::models::{
    Architecture, Decoder, FlashLmConfig, TransNormerConfig, VisionConfig, VisionTransformer,
};
use linattn::tensor::{View, ViewMut};
use linattn::{Isa, Runtime};

fn vision(c: &mut Criterion) {
    let mut group = c.benchmark_group("vision");
    group.sample_size(10);
    for name in
        ["deit_t", "agent_deit_t", "flatten_deit_t", "swin_t", "agent_swin_t", "flatten_swin_t"]
    {
        let config = VisionConfig::named(name).expect("published");
        let model = VisionTransformer::random(config, 1).expect("a model");
        let [channels, h, w] = model.image();
        let image = vec![0.5; channels * h * w];
        let mut logits = vec![0.0; model.classes()];
        for isa in Isa::detected().filter(|i| !matches!(i, Isa::Amx | Isa::Portable)) {
            let rt = Runtime::builder().isa(isa).threads(1).build().expect("detected");
            group.bench_function(BenchmarkId::new(name, rt.kernel()), |b| {
                b.iter(|| {
                    let image = View::new(&image, [1, channels, h, w]).expect("an image");
                    let out = ViewMut::new(&mut logits, [1, model.classes()]).expect("logits");
                    model.forward(&rt, image, out)
                });
            });
        }
    }
    group.finish();
}

/// Two blocks of width 256, and their equal in FLASH layers.
fn language(c: &mut Criterion) {
    let mut group = c.benchmark_group("language");
    group.sample_size(10).throughput(Throughput::Elements(TOKENS as u64));
    read(&mut group, "transnormer", TransNormerConfig::sized(256, 256, 2, 4, 704));
    read(&mut group, "flash", FlashLmConfig::sized(256, 256, 4));
    read(&mut group, "transformer_pp", TransformerConfig::plus_plus(256, 256, 2, 4, 1024));
    group.finish();
}

const TOKENS: usize = 512;

fn read<C: Architecture>(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, config: C) {
    let model = Decoder::random(config, 1).expect("a model");
    let mut state = model.new_state(1).expect("a state");
    let (tokens, mut logits) = ([7; TOKENS], vec![0.0; model.vocab_size()]);
    for isa in Isa::detected().filter(|i| !matches!(i, Isa::Amx | Isa::Portable)) {
        let rt = Runtime::builder().isa(isa).threads(1).build().expect("detected");
        group.bench_function(BenchmarkId::new(name, rt.kernel()), |b| {
            b.iter(|| {
                state.reset();
                model.prefill(&rt, &tokens, &mut state, &mut logits)
            });
        });
    }
}

criterion_group!(benches, vision, language);
criterion_main!(benches);
