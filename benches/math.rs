//! Vector math over a slice in the first cache level.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use linattn::simd::{Backend, Kernel, Lanes, Task, math};
use linattn::tensor::Rng;
use linattn::{Isa, Runtime};

const LEN: usize = 4096;

/// A function of vectors, a type so that it inlines.
trait Function: Copy {
    const NAME: &'static str;
    fn of<L: Lanes>(l: L, x: L::F) -> L::F;
}

macro_rules! functions {
    ($($name:ident: $function:path,)*) => {$(
        #[derive(Clone, Copy)]
        struct $name;
        impl Function for $name {
            const NAME: &'static str = stringify!($name);
            #[inline(always)]
            fn of<L: Lanes>(l: L, x: L::F) -> L::F {
                $function(l, x)
            }
        }
    )*};
}
functions! {
    Exp: math::exp,
    Ln: math::ln,
    Tanh: math::tanh,
    Sigmoid: math::sigmoid,
    Silu: math::silu,
    Erf: math::erf,
    Gelu: math::gelu,
}

struct Apply<'a, F>(&'a [f32], &'a mut [f32], F);

impl<B: Backend, F: Function> Kernel<B> for Apply<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let l = b.lanes();
        for (x, y) in l.split(self.0).0.iter().zip(l.split_mut(self.1).0) {
            *y = F::of(l, *x);
        }
    }
}

struct Bench<'a, 'c, F>(F, &'a mut criterion::BenchmarkGroup<'c, criterion::measurement::WallTime>);

impl<F: Function> Task for Bench<'_, '_, F> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let (mut x, mut y) = (vec![0.0; LEN], vec![0.0; LEN]);
        Rng::new(1).fill_normal(&mut x, 2.0);
        self.1.throughput(Throughput::Elements(LEN as u64));
        self.1.bench_function(BenchmarkId::new(B::NAME, F::NAME), |bench| {
            bench.iter(|| b.call(Apply(&x, &mut y, self.0)));
        });
    }
}

fn vector_math(c: &mut Criterion) {
    let mut group = c.benchmark_group("math");
    for isa in Isa::detected().filter(|i| *i != Isa::Amx) {
        let rt = Runtime::builder().isa(isa).threads(1).build().expect("detected");
        rt.run(Bench(Exp, &mut group));
        rt.run(Bench(Ln, &mut group));
        rt.run(Bench(Tanh, &mut group));
        rt.run(Bench(Sigmoid, &mut group));
        rt.run(Bench(Silu, &mut group));
        rt.run(Bench(Erf, &mut group));
        rt.run(Bench(Gelu, &mut group));
    }
    group.finish();
}

criterion_group!(benches, vector_math);
criterion_main!(benches);
