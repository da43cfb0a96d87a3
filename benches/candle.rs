//! What the way through candle costs: operations of three, four and five tensors on views, on candle's tensors, and the
//! copies of those that candle's interface has no place for. One thread.

use candle_core::{Device, Tensor as Candle, Var};
use criterion::{Criterion, criterion_group, criterion_main};
use linattn::Runtime;
use linattn::attention::agent::AgentAttention;
use linattn::attention::mixed_chunk::{MixedChunkAttention, MixedChunkConfig};
use linattn::attention::softmax::SoftmaxAttention;
use linattn::candle;
use linattn::tensor::{Rng, Tensor, View, ViewMut};
use std::hint::black_box;
use std::sync::Arc;

type Result<T> = core::result::Result<T, Box<dyn std::error::Error>>;

/// The same numbers for both: `K` arguments, and rooms for an output and for gradients.
struct Case<const N: usize, const K: usize> {
    views: [Tensor<N>; K],
    grads: [Tensor<N>; K],
    out: Tensor<N>,
    dout: Tensor<N>,
    vars: [Var; K],
}

fn normal<const N: usize>(shape: [usize; N], seed: u64) -> Tensor<N> {
    let mut t = Tensor::zeros(shape).expect("a tensor");
    Rng::new(seed).fill_normal(t.as_mut_slice(), 0.3);
    t
}

fn of<const N: usize>(t: &Tensor<N>) -> Candle {
    Candle::from_slice(t.as_slice(), &t.shape()[..], &Device::Cpu).expect("a tensor")
}

impl<const N: usize, const K: usize> Case<N, K> {
    fn new(shapes: [[usize; N]; K], out: [usize; N]) -> Self {
        let seeds: [u64; K] = core::array::from_fn(|i| i as u64);
        let views = seeds.map(|i| normal(shapes[i as usize], i));
        let vars = views.each_ref().map(|t| Var::from_tensor(&of(t)).expect("a variable"));
        let grads = seeds.map(|i| normal(shapes[i as usize], i));
        Self { views, grads, out: normal(out, 17), dout: normal(out, 18), vars }
    }

    /// Times the operation on views (`forward` and `backward`), on tensors (`through`), and copies of tensors.
    fn time(
        mut self,
        c: &mut Criterion,
        name: &str,
        forward: impl Fn([View<'_, f32, N>; K], ViewMut<'_, f32, N>) -> linattn::Result<()>,
        backward: impl Fn(
            [View<'_, f32, N>; K],
            View<'_, f32, N>,
            [ViewMut<'_, f32, N>; K],
        ) -> linattn::Result<()>,
        through: impl Fn([&Candle; K]) -> candle_core::Result<Candle>,
    ) {
        let mut group = c.benchmark_group(name);
        group.sample_size(10);
        group.bench_function("views/forward", |b| {
            b.iter(|| forward(self.views.each_ref().map(Tensor::view), self.out.view_mut()));
        });
        group.bench_function("views/backward", |b| {
            b.iter(|| {
                let grads = self.grads.each_mut().map(Tensor::view_mut);
                backward(self.views.each_ref().map(Tensor::view), self.dout.view(), grads)
            });
        });
        let plain = self.vars.each_ref().map(|v| v.as_tensor().detach());
        group.bench_function("candle/forward", |b| b.iter(|| through(plain.each_ref())));
        let dout = of(&self.dout);
        let step = || -> Result<_> {
            let out = through(self.vars.each_ref().map(Var::as_tensor))?;
            // The gradient of this sum with respect to the output is `dout`.
            Ok((out * &dout)?.sum_all()?.backward()?)
        };
        group.bench_function("candle/forward and backward", |b| b.iter(step));
        if K > 3 {
            group.bench_function("copies", |b| {
                b.iter(|| -> Result<_> {
                    let flat = plain[2..].iter().map(Candle::flatten_all);
                    Ok(Candle::cat(&flat.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
                });
            });
        }
        group.finish();
        black_box(&self.out);
    }
}

fn operations(c: &mut Criterion) {
    let rt = Arc::new(Runtime::builder().threads(1).build().expect("a runtime"));
    let tokens = [1, 3136, 8, 64];

    let op = SoftmaxAttention::new();
    let [rows, short] = [[1, 1024, 8, 64]; 2];
    Case::new([short; 3], rows).time(
        c,
        "softmax attention, 3 tensors",
        |[q, k, v], out| op.forward(&rt, q, k, v, out),
        |[q, k, v], dout, grads| op.backward(&rt, q, k, v, dout, grads),
        |qkv| candle::attend(&rt, &op, qkv),
    );

    let op = AgentAttention::new();
    Case::new([tokens, tokens, tokens, [1, 49, 8, 64]], tokens).time(
        c,
        "agent attention, 4 tensors",
        |[q, k, v, a], out| op.forward(&rt, q, k, v, a, out),
        |[q, k, v, a], dout, grads| op.backward(&rt, q, k, v, a, dout, grads),
        |[q, k, v, a]| candle::agent(&rt, &op, [q, k, v], a, None),
    );

    let op = MixedChunkAttention::new(MixedChunkConfig::package(256, true));
    let op = op.expect("a configuration");
    let (s, e) = ([1, 2048, 128], [1, 2048, 1536]);
    Case::new([s, s, s, s, e], e).time(
        c,
        "mixed chunk attention, 5 tensors",
        |[a, b, c, d, v], out| op.forward(&rt, [a, b, c, d], v, out, None),
        |[a, b, c, d, v], dout, grads| op.backward(&rt, [a, b, c, d], v, dout, grads),
        |[a, b, c, d, v]| candle::mixed_chunk(&rt, &op, [a, b, c, d], v, None),
    );
}

criterion_group!(benches, operations);
criterion_main!(benches);
