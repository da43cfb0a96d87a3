//! Focused linear attention.

use super::difference::{close, differences, differs_little, dot};
use crate::support::{bits, engines, isas, normal, widen, with_threads};
use half::bf16;
use linattn::attention::focused::naive::{self, Terms};
use linattn::attention::focused::{FocusedConfig, FocusedLinearAttention, Normaliser};
use linattn::tensor::{Element, Rng, View, ViewMut};
use linattn::{Error, Runtime};

struct Problem {
    /// `[batch, heads, lq, lk, dk, dv]`
    size: [usize; 6],
    config: FocusedConfig,
    scale: Vec<f32>,
    /// `q`, `k`, `v`, `dout`, contiguous `[batch, len, heads, dim]`.
    tensors: [Vec<f32>; 4],
}

impl Problem {
    fn new(size: [usize; 6], focusing_factor: f32, normaliser: Normaliser) -> Self {
        let ([b, h, lq, lk, dk, dv], seed) = (size, size.iter().sum::<usize>() as u64);
        println!("{size:?}, p = {focusing_factor}, {normaliser:?}: seed {seed}");
        let mut rng = Rng::new(seed);
        let config =
            FocusedConfig { heads: h, focusing_factor, normaliser, ..FocusedConfig::default() };
        let scale = normal(&mut rng, h * dk);
        let lens = [lq * dk, lk * dk, lk * dv, lq * dv].map(|n| b * h * n);
        Self { size, config, scale, tensors: lens.map(|n| normal(&mut rng, n)) }
    }

    fn shapes(&self) -> [[usize; 4]; 4] {
        let [b, h, lq, lk, dk, dv] = self.size;
        [[b, lq, h, dk], [b, lk, h, dk], [b, lk, h, dv], [b, lq, h, dv]]
    }

    fn terms<'a>(&self, scale: &'a [f64]) -> Terms<'a> {
        Terms {
            power: f64::from(self.config.focusing_factor),
            relu_eps: f64::from(self.config.relu_eps),
            z_eps: f64::from(self.config.z_eps),
            normaliser: self.config.normaliser,
            scale,
        }
    }

    /// Gradients of `q`, `k`, `v` and the scale.
    fn naive(&self) -> [Vec<f64>; 4] {
        let [b, h, lq, lk, dk, dv] = self.size;
        let (scale, all) = (widen(&self.scale), self.tensors.each_ref().map(|x| widen(x)));
        let mut out: [Vec<f64>; 4] = Default::default();
        out[3] = vec![0.0; h * dk];
        for n in 0..b {
            let [q, k, v, dout] = all.each_ref().map(|x| &x[x.len() / b * n..][..x.len() / b]);
            let shape = [lq, lk, h, dk, dv];
            let [dq, dk, dv, dscale] = naive::backward([q, k, v], shape, self.terms(&scale), dout);
            out.iter_mut().zip([dq, dk, dv]).for_each(|(out, x)| out.extend(x));
            out[3].iter_mut().zip(dscale).for_each(|(out, x)| *out += x);
        }
        out
    }

    fn run<E: Element>(&self, rt: &Runtime) -> [Vec<f32>; 4] {
        let [qs, ks, vs, os] = self.shapes();
        let x =
            self.tensors.each_ref().map(|x| x.iter().map(|x| E::from_f32(*x)).collect::<Vec<E>>());
        let [q, k, v, dout] = &x;
        let view = |x, shape| View::new(x, shape).expect("a tensor");
        let nan = |x: &Vec<E>| vec![E::from_f32(f32::NAN); x.len()];
        let (mut dq, mut dk, mut dv) = (nan(q), nan(k), nan(v));
        let mut dscale = vec![f32::NAN; self.scale.len()];
        let grads = [
            ViewMut::new(&mut dq, qs).expect("a tensor"),
            ViewMut::new(&mut dk, ks).expect("a tensor"),
            ViewMut::new(&mut dv, vs).expect("a tensor"),
        ];
        let op = FocusedLinearAttention::new(self.config, &self.scale).expect("a configuration");
        let (q, k, v, dout) = (view(q, qs), view(k, ks), view(v, vs), view(dout, os));
        op.backward(rt, q, k, v, dout, grads, Some(&mut dscale)).expect("a good call");
        let [dq, dk, dv] = [dq, dk, dv].map(|x| x.into_iter().map(E::to_f32).collect());
        [dq, dk, dv, dscale]
    }
}

#[test]
fn definition_is_that_of_differences() {
    for (p, normaliser) in [(3.0, Normaliser::Mean), (2.5, Normaliser::Sum)] {
        let problem = Problem::new([1, 2, 3, 4, 3, 2], p, normaliser);
        let [_, h, lq, lk, dk, dv] = problem.size;
        let shape = [lq, lk, h, dk, dv];
        let [q, k, v, dout] = problem.tensors.each_ref().map(|x| widen(x));
        let scale = widen(&problem.scale);
        let by = |q: &[f64], k: &[f64], v: &[f64], scale: &[f64]| {
            dot(&dout, &naive::attend([q, k, v], shape, problem.terms(scale)))
        };
        let [dq, dk, dv, dscale] = problem.naive();
        differs_little(&dq, &differences(&q, |q| by(q, &k, &v, &scale)), "dq");
        differs_little(&dk, &differences(&k, |k| by(&q, k, &v, &scale)), "dk");
        differs_little(&dv, &differences(&v, |v| by(&q, &k, v, &scale)), "dv");
        differs_little(&dscale, &differences(&scale, |s| by(&q, &k, &v, s)), "dscale");
    }
}

const NAMES: [&str; 4] = ["dq", "dk", "dv", "dscale"];

fn check(problem: &Problem) {
    let want = problem.naive();
    for engine in engines() {
        let got = problem.run::<f32>(&engine.runtime());
        for ((got, want), name) in got.iter().zip(&want).zip(NAMES) {
            let tolerance = engine.bound(3e-6, true);
            close(got, want, tolerance, &format!("{engine:?} {:?} {name}", problem.size));
        }
    }
}

#[test]
fn gradients_are_those_of_the_definition() {
    for (size, p, normaliser) in [
        ([1, 4, 130, 150, 16, 12], 3.0, Normaliser::Mean),
        ([2, 3, 37, 141, 10, 7], 4.0, Normaliser::Sum),
        ([3, 2, 5, 9, 7, 3], 2.5, Normaliser::Mean),
        ([1, 1, 20, 3, 33, 5], 1.0, Normaliser::Mean),
        ([1, 2, 12, 14, 16, 16], 8.0, Normaliser::Sum),
    ] {
        check(&Problem::new(size, p, normaliser));
    }
}

#[test]
fn tokens_without_a_positive_channel_stay_in_range() {
    for p in [3.0, 6.0, 12.0] {
        let mut problem = Problem::new([1, 2, 20, 24, 16, 16], p, Normaliser::Mean);
        let [q, k, ..] = &mut problem.tensors;
        q[..64].iter_mut().chain(&mut k[..96]).for_each(|x| *x = -x.abs());
        check(&problem);
    }
}

#[test]
fn half_tensors_are_rounded_once() {
    let mut problem = Problem::new([2, 3, 33, 40, 16, 24], 3.0, Normaliser::Mean);
    for x in problem.tensors.iter_mut().flatten() {
        *x = bf16::from_f32(*x).to_f32();
    }
    let want = problem.naive();
    for isa in isas() {
        let got = problem.run::<bf16>(&with_threads(isa, None));
        for ((got, want), name) in got.iter().zip(&want).zip(NAMES) {
            close(got, want, 3e-3, &format!("{isa} {name}"));
        }
    }
}

#[test]
fn threads_do_not_matter() {
    for size in [[1, 2, 700, 300, 32, 32], [3, 3, 200, 200, 24, 16]] {
        let problem = Problem::new(size, 3.0, Normaliser::Mean);
        for isa in isas() {
            let [one, three] = [1, 3].map(|n| problem.run::<f32>(&with_threads(isa, Some(n))));
            for (a, b) in one.iter().zip(&three) {
                assert_eq!(bits(a), bits(b), "{isa} {size:?}");
            }
        }
    }
}

#[test]
fn nothing_to_attend_to_has_no_gradient() {
    for size in [[2, 2, 5, 0, 4, 3], [2, 2, 0, 5, 4, 3], [0, 2, 5, 5, 4, 3], [1, 2, 5, 5, 4, 0]] {
        let problem = Problem::new(size, 3.0, Normaliser::Mean);
        let got = problem.run::<f32>(&Runtime::new().expect("a runtime"));
        for (x, name) in got.iter().zip(NAMES) {
            assert!(x.iter().all(|x| *x == 0.0), "{size:?} {name}: {x:?}");
        }
    }
}

#[test]
fn wrong_calls_write_nothing() {
    let rt = Runtime::new().expect("a runtime");
    let config = FocusedConfig { heads: 2, ..FocusedConfig::default() };
    let op = FocusedLinearAttention::new(config, &[0.0; 6]).expect("a configuration");
    let good = [1, 4, 2, 3];
    let (x, mut room) = ([0.5; 24], [[f32::NAN; 24]; 3]);
    for (bad, arg) in ["q", "k", "v", "dout", "dq", "dk", "dv", "dscale"].into_iter().enumerate() {
        let shape = |at| if at == bad { [2, 2, 3, 2] } else { good };
        let view = |at| View::new(&x, shape(at)).expect("a tensor");
        let mut dscale = vec![f32::NAN; if bad == 7 { 5 } else { 6 }];
        let [dq, dk, dv] = &mut room;
        let grads = [
            ViewMut::new(dq, shape(4)).expect("a tensor"),
            ViewMut::new(dk, shape(5)).expect("a tensor"),
            ViewMut::new(dv, shape(6)).expect("a tensor"),
        ];
        let scale = Some(&mut dscale[..]);
        let err = op.backward(&rt, view(0), view(1), view(2), view(3), grads, scale);
        let err = err.expect_err("a wrong call");
        assert!(matches!(err, Error::Shape { arg: a, .. } if a == arg), "{arg}: {err}");
        let all = room.iter().flatten().chain(&dscale);
        assert!(all.into_iter().all(|x| x.is_nan()), "{arg}: something was written");
    }
}
