//! Vector math and conversions over a slice in the first cache level.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use linattn::simd::convert::Generic;
use linattn::simd::{Backend, Kernel, Lanes, Task, math};
use linattn::tensor::{Element, Rng};
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
    ExpNonpositive: math::exp_nonpositive,
    Ln: math::ln,
    Tanh: math::tanh,
    Sigmoid: math::sigmoid,
    Silu: math::silu,
    NormalCdf: math::normal_cdf,
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

/// One direction of a conversion, by the backend or by the form that any target has.
struct OneWay<'a, E, const OWN: bool, const WIDEN: bool>(&'a mut [E], &'a mut [f32]);

impl<B: Backend, E: Element, const OWN: bool, const WIDEN: bool> Kernel<B>
    for OneWay<'_, E, OWN, WIDEN>
{
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        match (OWN, WIDEN) {
            (true, true) => E::widen(b.convert(), self.0, self.1),
            (false, true) => E::widen(Generic, self.0, self.1),
            (true, false) => E::narrow(b.convert(), self.1, self.0),
            (false, false) => E::narrow(Generic, self.1, self.0),
        }
    }
}

/// So many elements of a type both ways, with the instruction set's own conversions and without.
struct BenchConvert<'a, 'c, E>(
    &'a mut criterion::BenchmarkGroup<'c, criterion::measurement::WallTime>,
    std::marker::PhantomData<E>,
    usize,
);

impl<E: Element> Task for BenchConvert<'_, '_, E> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let (group, width, name) = (self.0, self.2, E::DTYPE.name());
        let mut wide = vec![0.0; width];
        Rng::new(1).fill_normal(&mut wide, 2.0);
        let mut half: Vec<E> = wide.iter().map(|x| E::from_f32(*x)).collect();
        group.throughput(Throughput::Elements(width as u64));
        macro_rules! bench {
            ($label:literal, $own:literal, $widen:literal) => {
                let id = BenchmarkId::new(B::NAME, format!("{name} {} {width}", $label));
                group.bench_function(id, |bench| {
                    bench.iter(|| b.call(OneWay::<E, $own, $widen>(&mut half, &mut wide)));
                });
            };
        }
        bench!("widen", true, true);
        bench!("widen generic", false, true);
        bench!("narrow", true, false);
        bench!("narrow generic", false, false);
    }
}

fn conversions(c: &mut Criterion) {
    use std::marker::PhantomData;
    let mut group = c.benchmark_group("convert");
    for isa in Isa::detected() {
        let rt = Runtime::builder().isa(isa).threads(1).build().expect("detected");
        for width in [64, 100, LEN] {
            rt.run(BenchConvert(&mut group, PhantomData::<bf16>, width));
            rt.run(BenchConvert(&mut group, PhantomData::<f16>, width));
        }
    }
    group.finish();
}

fn vector_math(c: &mut Criterion) {
    let mut group = c.benchmark_group("math");
    for isa in Isa::detected().filter(|i| *i != Isa::Amx) {
        let rt = Runtime::builder().isa(isa).threads(1).build().expect("detected");
        rt.run(Bench(Exp, &mut group));
        rt.run(Bench(ExpNonpositive, &mut group));
        rt.run(Bench(Ln, &mut group));
        rt.run(Bench(Tanh, &mut group));
        rt.run(Bench(Sigmoid, &mut group));
        rt.run(Bench(Silu, &mut group));
        rt.run(Bench(NormalCdf, &mut group));
        rt.run(Bench(Gelu, &mut group));
    }
    group.finish();
}

criterion_group!(benches, vector_math, conversions);
criterion_main!(benches);
