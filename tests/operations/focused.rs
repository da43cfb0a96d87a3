//! Focused linear attention against its definition in `f64`, on every engine.

use crate::support::{
    bits, engines, isas, normal, rel_err, runtime, same_bits, widen, with_threads,
};
use half::bf16;
use linattn::attention::focused::naive::{self, Terms};
use linattn::attention::focused::{FocusedConfig, FocusedLinearAttention, Normaliser};
use linattn::tensor::{Element, Rng, View, ViewMut};
use linattn::{Error, Runtime};

/// Arguments of a call; tensors are contiguous `[batch, len, heads, dim]`.
struct Problem {
    size: [usize; 6],
    config: FocusedConfig,
    scale: Vec<f32>,
    tensors: [Vec<f32>; 3],
}

impl Problem {
    /// `[batch, heads, lq, lk, dk, dv]`
    fn new(size: [usize; 6], focusing_factor: f32, normaliser: Normaliser, seed: u64) -> Self {
        println!("{size:?}, p = {focusing_factor}, {normaliser:?}: seed {seed}");
        let ([b, h, lq, lk, dk, dv], mut rng) = (size, Rng::new(seed));
        let config =
            FocusedConfig { heads: h, focusing_factor, normaliser, ..FocusedConfig::default() };
        let scale = normal(&mut rng, h * dk);
        let tensors = [b * lq * h * dk, b * lk * h * dk, b * lk * h * dv];
        Self { size, config, scale, tensors: tensors.map(|n| normal(&mut rng, n)) }
    }

    fn shapes(&self) -> [[usize; 4]; 4] {
        let [b, h, lq, lk, dk, dv] = self.size;
        [[b, lq, h, dk], [b, lk, h, dk], [b, lk, h, dv], [b, lq, h, dv]]
    }

    fn op(&self) -> FocusedLinearAttention {
        FocusedLinearAttention::new(self.config, &self.scale).expect("a configuration")
    }

    fn run<E: Element>(&self, rt: &Runtime, [q, k, v]: [&[E]; 3]) -> Vec<E> {
        let [qs, ks, vs, os] = self.shapes();
        let mut out = vec![E::from_f32(f32::NAN); os.iter().product()];
        let view = |x, shape| View::new(x, shape).expect("a tensor");
        let to = ViewMut::new(&mut out, os).expect("a tensor");
        let op = self.op();
        op.forward(rt, view(q, qs), view(k, ks), view(v, vs), to).expect("a call");
        out
    }

    fn forward(&self, rt: &Runtime) -> Vec<f32> {
        self.run(rt, self.tensors.each_ref().map(Vec::as_slice))
    }

    fn naive(&self) -> Vec<f64> {
        let [b, h, lq, lk, dk, dv] = self.size;
        let [q, k, v] = self.tensors.each_ref().map(|x| widen(x));
        let scale = widen(&self.scale);
        let terms = Terms {
            power: f64::from(self.config.focusing_factor),
            relu_eps: f64::from(self.config.relu_eps),
            z_eps: f64::from(self.config.z_eps),
            normaliser: self.config.normaliser,
            scale: &scale,
        };
        let row = |x: &[f64], n: usize, len: usize| x[n * len..][..len].to_vec();
        let mut out = Vec::new();
        for n in 0..b {
            let [q, k, v] =
                [row(&q, n, lq * h * dk), row(&k, n, lk * h * dk), row(&v, n, lk * h * dv)];
            out.extend(naive::attend([&q, &k, &v], [lq, lk, h, dk, dv], terms));
        }
        out
    }
}

#[test]
fn agrees_with_the_definition() {
    let sizes = [
        ([1, 8, 600, 600, 64, 64], 3.0, Normaliser::Mean),
        ([2, 3, 1100, 37, 24, 40], 3.0, Normaliser::Sum),
        ([7, 2, 49, 49, 32, 32], 2.0, Normaliser::Mean),
        ([1, 6, 5, 530, 7, 3], 4.0, Normaliser::Sum),
        ([3, 5, 1, 1, 10, 10], 8.0, Normaliser::Mean),
        ([1, 2, 20, 30, 33, 65], 2.5, Normaliser::Mean),
    ];
    for (at, (size, p, normaliser)) in sizes.into_iter().enumerate() {
        let problem = Problem::new(size, p, normaliser, 100 + at as u64);
        let want = problem.naive();
        for engine in engines() {
            let err = rel_err(&problem.forward(&engine.runtime()), &want);
            let most = engine.bound(5e-6, false);
            assert!(err <= most, "{size:?}, {p}, {engine:?}: off by {err:e}");
        }
    }
}

#[test]
fn tokens_without_a_positive_channel_stay_in_range() {
    for p in [3.0, 6.0, 12.0, 3.5] {
        let mut problem = Problem::new([1, 2, 20, 24, 16, 16], p, Normaliser::Mean, 7);
        let [q, k, _] = &mut problem.tensors;
        q[..64].iter_mut().chain(&mut k[..96]).for_each(|x| *x = -x.abs());
        // Large ones, too.
        q[64..96].iter_mut().for_each(|x| *x *= 1e12);
        let want = problem.naive();
        for isa in isas() {
            let err = rel_err(&problem.forward(&runtime(isa)), &want);
            assert!(err < 1e-5, "{isa}, p = {p}: off by {err:e}");
        }
    }
}

#[test]
fn half_tensors_are_rounded_once() {
    let mut problem = Problem::new([2, 3, 520, 70, 16, 24], 3.0, Normaliser::Mean, 8);
    let half = problem
        .tensors
        .each_ref()
        .map(|x| x.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<bf16>>());
    problem.tensors = half.each_ref().map(|x| x.iter().map(|x| x.to_f32()).collect());
    for engine in engines() {
        let rt = engine.runtime();
        let got = problem.run(&rt, half.each_ref().map(Vec::as_slice));
        let want: Vec<bf16> = problem.forward(&rt).iter().map(|x| bf16::from_f32(*x)).collect();
        assert_eq!(got, want, "{engine:?}");
    }
}

#[test]
fn threads_do_not_show() {
    for size in [[1, 3, 1300, 700, 32, 32], [9, 2, 60, 60, 16, 16]] {
        let problem = Problem::new(size, 3.0, Normaliser::Mean, 9);
        for isa in isas() {
            let want = problem.forward(&with_threads(isa, Some(1)));
            for threads in [2, 3, 5] {
                let got = problem.forward(&with_threads(isa, Some(threads)));
                same_bits(&got, &want, &format!("{isa}, {threads} threads"));
            }
        }
    }
}

#[test]
fn a_query_that_is_not_a_number_spoils_only_itself() {
    let mut problem = Problem::new([1, 2, 40, 30, 16, 16], 3.0, Normaliser::Mean, 10);
    for isa in isas() {
        let clean = problem.forward(&runtime(isa));
        let kept = core::mem::replace(&mut problem.tensors[0][17 * 32 + 5], f32::NAN);
        let got = problem.forward(&runtime(isa));
        problem.tensors[0][17 * 32 + 5] = kept;
        for (t, (got, clean)) in got.chunks(32).zip(clean.chunks(32)).enumerate() {
            match t {
                17 => assert!(got.iter().all(|x| x.is_nan()), "{isa}"),
                _ => assert_eq!(bits(got), bits(clean), "{isa}: token {t}"),
            }
        }
    }
}

#[test]
fn nothing_to_attend_to() {
    let rt = runtime(crate::support::best());
    let none = Problem::new([1, 2, 3, 0, 8, 4], 3.0, Normaliser::Mean, 11);
    assert!(none.forward(&rt).iter().all(|x| *x == 0.0));
    for size in [[1, 2, 0, 5, 8, 4], [0, 2, 3, 5, 8, 4], [1, 2, 3, 5, 8, 0]] {
        assert!(Problem::new(size, 3.0, Normaliser::Sum, 12).forward(&rt).is_empty());
    }
}

#[test]
fn scratch_does_not_grow_with_lengths() {
    let op = Problem::new([1, 2, 1, 1, 16, 16], 3.0, Normaliser::Mean, 13).op();
    // One segment of features of 512 tokens, converted values, and sums for as many batch rows as fit a segment.
    assert!(op.scratch_bytes(16) <= 4 * (512 * 64 + 512 * 2 * (256 + 16)) + 4 * 64);
}

#[test]
fn bad_configurations_are_refused() {
    let config = FocusedConfig { heads: 2, ..FocusedConfig::default() };
    let refused = |config, scale: &[f32], arg: &str| {
        let error = FocusedLinearAttention::new(config, scale).expect_err(arg);
        assert!(error.to_string().contains(arg), "{error}");
        assert!(matches!(error, Error::Value { .. } | Error::Shape { .. }), "{error}");
    };
    refused(FocusedConfig { heads: 0, ..config }, &[0.0; 4], "heads");
    for p in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        refused(FocusedConfig { focusing_factor: p, ..config }, &[0.0; 4], "focusing_factor");
    }
    for eps in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-40] {
        refused(FocusedConfig { relu_eps: eps, ..config }, &[0.0; 4], "relu_eps");
    }
    for eps in [-1.0, f32::NAN, f32::INFINITY] {
        refused(FocusedConfig { z_eps: eps, ..config }, &[0.0; 4], "z_eps");
    }
    refused(config, &[0.0; 3], "scale");
    refused(config, &[], "scale");
    for s in [f32::NAN, f32::INFINITY, -200.0] {
        refused(config, &[0.0, s], "scale");
    }
    let op = FocusedLinearAttention::new(config, &[0.0; 4]).expect("a configuration");
    let (x, mut out) = ([1.0; 12], [7.0; 12]);
    let view = |shape| View::new(&x, shape).expect("a tensor");
    let rt = runtime(crate::support::best());
    for (at, arg) in ["q", "k", "v", "out"].into_iter().enumerate() {
        let mut shapes = [[1, 3, 2, 2]; 4];
        shapes[at] = [1, 2, 3, 2];
        let [q, k, v, o] = shapes;
        let to = ViewMut::new(&mut out, o).expect("a tensor");
        let error = op.forward(&rt, view(q), view(k), view(v), to).expect_err(arg);
        assert!(error.to_string().contains(&format!("`{arg}`")), "{error}");
        assert_eq!(out, [7.0; 12]);
    }
}
