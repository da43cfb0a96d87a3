//! Whole vision models, batch 1, 224 x 224 pixels, one thread.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use linattn::models::{VisionConfig, VisionTransformer};
use linattn::tensor::{View, ViewMut};
use linattn::{Isa, Runtime};

fn models(c: &mut Criterion) {
    let mut group = c.benchmark_group("models");
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

criterion_group!(benches, models);
criterion_main!(benches);
