//! Attention cores, one thread, eight heads.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use linattn::attention::agent::AgentAttention;
use linattn::attention::combiner::{CombinerAttention, CombinerConfig};
use linattn::attention::focused::{FocusedConfig, FocusedLinearAttention};
use linattn::attention::lightning::LightningAttention;
use linattn::attention::linear::{FeatureMap, LinearAttention};
use linattn::attention::mixed_chunk::{MixedChunkAttention, MixedChunkConfig};
use linattn::attention::performer::{
    PerformerAttention, PerformerConfig, RowNorm, default_features, orthogonal_projection,
};
use linattn::attention::softmax::SoftmaxAttention;
use linattn::attention::{Mask, State};
use linattn::tensor::{Rng, Tensor, View, ViewMut};
use linattn::{Isa, Runtime};

const HEADS: usize = 8;

fn normal(shape: [usize; 4], seed: u64) -> Tensor<4> {
    let mut t = Tensor::zeros(shape).expect("a tensor");
    Rng::new(seed).fill_normal(t.as_mut_slice(), 0.3);
    t
}

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    group.sample_size(10);
    for isa in Isa::detected().filter(|i| *i != Isa::Amx) {
        let rt = Runtime::builder().isa(isa).threads(1).build().expect("detected");
        for (len, dim) in [(1, 128), (2048, 64), (2048, 128)] {
            let shape = [1, len, HEADS, dim];
            let (q, k, v, mut out) =
                (normal(shape, 1), normal(shape, 2), normal(shape, 3), normal(shape, 4));
            group.throughput(Throughput::Elements(len as u64));
            let id = |what: &str| {
                BenchmarkId::new(format!("{what}/{}", rt.kernel()), format!("n{len}-d{dim}"))
            };
            let slopes: Vec<f64> = (1..=HEADS).map(|h| (-(h as f64)).exp2()).collect();
            let lightning = LightningAttention::new(&slopes).expect("slopes");
            let mut state = State::new(1, HEADS, dim, dim).expect("a state");
            group.bench_function(id("lightning"), |b| {
                b.iter(|| {
                    lightning.forward(&rt, q.view(), k.view(), v.view(), out.view_mut(), &mut state)
                });
            });
            let linear = LinearAttention::new(FeatureMap::Elu1);
            group.bench_function(id("linear"), |b| {
                b.iter(|| linear.forward(&rt, q.view(), k.view(), v.view(), out.view_mut(), None));
            });
            let agents = normal([1, 49, HEADS, dim], 5);
            group.bench_function(id("agent"), |b| {
                let (q, k, v, a) = (q.view(), k.view(), v.view(), agents.view());
                b.iter(|| AgentAttention::new().forward(&rt, q, k, v, a, out.view_mut()));
            });
            let config = FocusedConfig { heads: HEADS, ..FocusedConfig::default() };
            let focused = FocusedLinearAttention::new(config, &vec![0.0; HEADS * dim]);
            let focused = focused.expect("scales");
            group.bench_function(id("focused"), |b| {
                b.iter(|| focused.forward(&rt, q.view(), k.view(), v.view(), out.view_mut()));
            });
            let features = default_features(dim);
            let projection = orthogonal_projection(features, dim, RowNorm::Gaussian, 6);
            let projection = projection.expect("a projection");
            let performer = PerformerAttention::new(PerformerConfig::relu(), projection.view());
            let performer = performer.expect("a configuration");
            group.bench_function(id("performer"), |b| {
                b.iter(|| {
                    performer.forward(&rt, q.view(), k.view(), v.view(), out.view_mut(), None)
                });
            });
            let combiner = CombinerAttention::new(CombinerConfig::fixed(64).causal());
            let combiner = combiner.expect("a configuration");
            group.bench_function(id("combiner-causal"), |b| {
                b.iter(|| {
                    combiner.forward(&rt, q.view(), k.view(), v.view(), out.view_mut(), None)
                });
            });
            let softmax = SoftmaxAttention::new().with_mask(Mask::Causal);
            group.bench_function(id("softmax-causal"), |b| {
                b.iter(|| softmax.forward(&rt, q.view(), k.view(), v.view(), out.view_mut()));
            });
        }
    }
    group.finish();
}

fn one_head(t: &Tensor<4>) -> View<'_, f32, 3> {
    let [batch, len, _, width] = t.shape();
    View::new(t.as_slice(), [batch, len, width]).expect("one head")
}

/// The core of a FLASH layer of width 768.
fn mixed_chunk(c: &mut Criterion) {
    let mut group = c.benchmark_group("mixed-chunk");
    group.sample_size(10);
    let (len, s, e) = (2048, 128, 1536);
    for isa in Isa::detected().filter(|i| *i != Isa::Amx) {
        let rt = Runtime::builder().isa(isa).threads(1).build().expect("detected");
        let heads = [1, 2, 3, 4].map(|seed| normal([1, len, 1, s], seed));
        let (v, mut out) = (normal([1, len, 1, e], 5), normal([1, len, 1, e], 6));
        group.throughput(Throughput::Elements(len as u64));
        for causal in [true, false] {
            let op = MixedChunkAttention::new(MixedChunkConfig::package(256, causal));
            let op = op.expect("a configuration");
            let id = BenchmarkId::new(rt.kernel(), if causal { "causal" } else { "full" });
            group.bench_function(id, |b| {
                let qk = heads.each_ref().map(one_head);
                b.iter(|| {
                    let out = ViewMut::new(out.as_mut_slice(), [1, len, e]).expect("one head");
                    op.forward(&rt, qk, one_head(&v), out, None)
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, attention, mixed_chunk);
criterion_main!(benches);
