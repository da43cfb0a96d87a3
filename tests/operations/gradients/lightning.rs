//! Lightning Attention.

use super::F32;
use super::difference::{differences, differs_little, dot};
use crate::problem::Problem;
use crate::support::{bits, isas, normal, rel_err, runtime, widen};
use half::bf16;
use linattn::attention::lightning::naive;
use linattn::attention::{Gradients, Inputs, State};
use linattn::tensor::{Element, Rng, View, ViewMut};
use linattn::{Isa, Runtime};

/// Gradients of `q`, `k`, `v` and the initial state.
type All<T> = [Vec<T>; 4];

/// A call with the gradients of its output and final state.
struct Backward {
    p: Problem,
    dout: Vec<f32>,
    dstate: Vec<f32>,
}

impl Backward {
    fn new(dims: [usize; 4], slopes: &[f64], seed: u64) -> Self {
        let p = Problem::new(dims, slopes, seed);
        let mut rng = Rng::new(seed ^ 0xdead);
        let dout = normal(&mut rng, p.v.len());
        let dstate = normal(&mut rng, p.state.len());
        Self { p, dout, dstate }
    }

    /// One head of a `[batch, len, heads, dim]` tensor.
    fn head(&self, x: &[f32], d: usize, n: usize, h: usize) -> Vec<f64> {
        let (len, heads) = (self.p.len, self.p.heads());
        let row = |t| &x[((n * len + t) * heads + h) * d..][..d];
        (0..len).flat_map(|t| widen(row(t))).collect()
    }

    fn naive(&self) -> All<f64> {
        let p = &self.p;
        let (heads, one) = (p.heads(), p.dk * p.dv);
        let mut all = [&p.q, &p.k, &p.v].map(|x| vec![0.0; x.len()]);
        let mut states = widen(&self.dstate);
        for (n, h) in (0..p.batch).flat_map(|n| (0..heads).map(move |h| (n, h))) {
            let at = (n * heads + h) * one;
            let [q, k] = [&p.q, &p.k].map(|x| self.head(x, p.dk, n, h));
            let [v, dout] = [&p.v, &self.dout].map(|x| self.head(x, p.dv, n, h));
            let grads = naive::backward(
                &q,
                &k,
                &v,
                [p.dk, p.dv],
                p.slopes[h],
                f64::from(p.scale),
                &widen(&p.state[at..at + one]),
                &dout,
                &mut states[at..at + one],
            );
            for ((all, grad), d) in all.iter_mut().zip(grads).zip([p.dk, p.dk, p.dv]) {
                for t in 0..p.len {
                    let row = &mut all[((n * p.len + t) * heads + h) * d..][..d];
                    row.copy_from_slice(&grad[t * d..][..d]);
                }
            }
        }
        let [q, k, v] = all;
        [q, k, v, states]
    }

    fn run<E: Element>(&self, rt: &Runtime, borders: Option<&[usize]>) -> All<f32> {
        let p = &self.p;
        let narrow = |x: &[f32]| x.iter().map(|x| E::from_f32(*x)).collect::<Vec<E>>();
        let [q, k, v, dout] = [&p.q, &p.k, &p.v, &self.dout].map(|x| narrow(x));
        let rows = borders.map_or(p.batch, |b| b.len() - 1);
        let state =
            |x: &[f32]| State::from_slice(x, [rows, p.heads(), p.dk, p.dv], 0).expect("a state");
        let (start, mut dstate) = (state(&p.state), state(&self.dstate));
        let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|x| vec![E::from_f32(f32::NAN); x.len()]);
        let inputs = Inputs {
            q: View::new(&q, p.qk()).expect("a tensor"),
            k: View::new(&k, p.qk()).expect("a tensor"),
            v: View::new(&v, p.vo()).expect("a tensor"),
            state: Some(&start),
            dout: View::new(&dout, p.vo()).expect("a tensor"),
        };
        let grads = Gradients {
            q: ViewMut::new(&mut dq, p.qk()).expect("a tensor"),
            k: ViewMut::new(&mut dk, p.qk()).expect("a tensor"),
            v: ViewMut::new(&mut dv, p.vo()).expect("a tensor"),
            state: Some(&mut dstate),
        };
        match borders {
            Some(borders) => p.op().backward_packed(rt, inputs, borders, grads),
            None => p.op().backward(rt, inputs, grads),
        }
        .expect("a good call");
        let wide = |x: Vec<E>| x.iter().map(|x| x.to_f32()).collect();
        let dstate = dstate.view().as_slice().expect("a contiguous state").to_vec();
        [wide(dq), wide(dk), wide(dv), dstate]
    }
}

#[track_caller]
fn agrees(c: &Backward, rt: &Runtime, tolerance: f64) {
    let (got, want) = (c.run::<f32>(rt, None), c.naive());
    for ((name, got), want) in ["q", "k", "v", "state"].into_iter().zip(got).zip(want) {
        let err = rel_err(&got, &want);
        let p = &c.p;
        assert!(
            err <= tolerance,
            "{}: gradient of {name} is off by {err:.2e} ({:?}, {:?}, slopes {:?}, chunk {:?})",
            rt.kernel(),
            p.qk(),
            p.vo(),
            p.slopes,
            p.chunk
        );
    }
}

#[test]
fn definition_is_the_derivative() {
    let slope = 0.3;
    let (mut c, [dk, dv]) = (Backward::new([1, 5, 3, 4], &[slope], 1), [3, 4]);
    c.p.scale = 0.7;
    let inputs = [&c.p.q, &c.p.k, &c.p.v, &c.p.state].map(|x| widen(x));
    let weights: Vec<f64> = widen(&c.dout).into_iter().chain(widen(&c.dstate)).collect();
    for (i, want) in c.naive().into_iter().enumerate() {
        let got = differences(&inputs[i], |x| {
            let mut all = inputs.clone();
            all[i] = x.to_vec();
            let [q, k, v, mut state] = all;
            let scale = f64::from(c.p.scale);
            let mut out = naive::head(&q, &k, &v, [dk, dv], slope, scale, &mut state);
            out.append(&mut state);
            dot(&out, &weights)
        });
        differs_little(&got, &want, &format!("gradient {i}"));
    }
}

#[test]
fn shapes_of_real_models_and_tails() {
    for isa in isas() {
        let rt = runtime(isa);
        for (dk, dv) in [(64, 64), (128, 128), (20, 33)] {
            let mut c = Backward::new([1, 4 * 64 + 21, dk, dv], &[0.3, 2e-3], 7);
            c.p.scale = 0.125;
            agrees(&c, &rt, F32);
        }
        for len in (1..=9).chain([15, 16, 17, 31, 32, 33, 65]) {
            let mut c = Backward::new([2, len, 20, 12], &[0.3, 0.01, 0.0], len as u64);
            c.p.chunk = Some(16);
            agrees(&c, &rt, F32);
        }
    }
}

#[test]
fn every_slope_from_none_to_total() {
    let slopes = [0.0, 1e-8, 1e-5, 0.021, 0.7, 3.0, 40.0, 1e4, f64::INFINITY];
    for isa in isas() {
        let rt = runtime(isa);
        for len in [1, 3, 300] {
            agrees(&Backward::new([1, len, 16, 16], &slopes, 3), &rt, F32);
        }
    }
}

#[test]
fn empty_dimensions() {
    let rt = runtime(Isa::Portable);
    for dims in [[0, 4, 3, 3], [1, 0, 3, 3], [1, 4, 0, 3], [1, 4, 3, 0]] {
        agrees(&Backward::new(dims, &[0.1], 3), &rt, F32);
    }
}

#[test]
fn packed_sequences_are_separate_ones() {
    for isa in isas() {
        let rt = runtime(isa);
        let borders = [0, 7, 7, 60, 131];
        // As many rows of states as sequences.
        let mut c = Backward::new([4, 131, 12, 20], &[0.2, 0.01], 11);
        c.p.batch = 1;
        for (x, d) in [(&mut c.p.q, 12), (&mut c.p.k, 12), (&mut c.p.v, 20), (&mut c.dout, 20)] {
            x.truncate(131 * 2 * d);
        }
        let [dq, .., dstate] = c.run::<f32>(&rt, Some(&borders));
        for (s, w) in borders.windows(2).enumerate() {
            let part = |x: &[f32], d: usize| x[w[0] * 2 * d..w[1] * 2 * d].to_vec();
            let one = |x: &[f32]| x[s * 2 * 240..(s + 1) * 2 * 240].to_vec();
            let p = Problem {
                len: w[1] - w[0],
                q: part(&c.p.q, 12),
                k: part(&c.p.k, 12),
                v: part(&c.p.v, 20),
                state: one(&c.p.state),
                ..c.p.clone()
            };
            let own = Backward { p, dout: part(&c.dout, 20), dstate: one(&c.dstate) };
            let [q, .., state] = own.run::<f32>(&rt, None);
            assert_eq!(bits(&part(&dq, 12)), bits(&q), "{isa}, sequence {s}");
            assert_eq!(bits(&one(&dstate)), bits(&state), "{isa}, sequence {s}");
        }
    }
}

#[test]
fn threads_do_not_matter() {
    for isa in isas() {
        for slopes in [&[0.1][..], &[0.1, 0.2, 0.3]] {
            let c = Backward::new([2, 700, 40, 70], slopes, 5);
            let on = |n| Runtime::builder().isa(isa).threads(n).build().expect("a runtime");
            let one = c.run::<f32>(&on(1), None).map(|x| bits(&x));
            for n in [2, 3, 8] {
                assert_eq!(c.run::<f32>(&on(n), None).map(|x| bits(&x)), one, "{isa}, {n} threads");
            }
        }
    }
}

#[test]
fn half_tensors_round_once() {
    for isa in isas() {
        let rt = runtime(isa);
        let mut c = Backward::new([1, 100, 32, 32], &[0.1, 0.01], 9);
        for x in [&mut c.p.q, &mut c.p.k, &mut c.p.v, &mut c.dout] {
            x.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
        }
        let (got, want) = (c.run::<bf16>(&rt, None), c.naive());
        for (got, want) in got.iter().zip(&want) {
            let err = rel_err(got, want);
            assert!(err < 4e-3, "{isa}: off by {err:.2e}");
        }
    }
}

#[test]
fn what_is_not_finite_stays_where_it_acts() {
    for isa in isas() {
        let rt = runtime(isa);
        let clean = Backward::new([1, 150, 16, 40], &[0.05], 13);
        let mut c = Backward::new([1, 150, 16, 40], &[0.05], 13);
        let (at, width) = (90, 40);
        c.dout[at * width + 3] = f32::INFINITY;
        let ([q, k, v, _], [cq, ck, cv, _]) =
            (c.run::<f32>(&rt, None), clean.run::<f32>(&rt, None));
        for t in 0..150 {
            let row = |x: &[f32], d: usize| x[t * d..(t + 1) * d].to_vec();
            let finite = |x: Vec<f32>| x.iter().all(|x| x.is_finite());
            assert_eq!(finite(row(&q, 16)), t != at, "{isa}: q at {t}");
            if t > at {
                assert!(rel_err(&row(&k, 16), &widen(&row(&ck, 16))) < F32, "{isa}: k at {t}");
                assert!(rel_err(&row(&v, 40), &widen(&row(&cv, 40))) < F32, "{isa}: v at {t}");
            } else {
                assert!(!finite(row(&k, 16)) && !finite(row(&v, 40)), "{isa}: {t}");
            }
            if t != at {
                assert_eq!(bits(&row(&q, 16)), bits(&row(&cq, 16)), "{isa}: q at {t}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_reaches_what_the_definition_says() {
    for (isa, input) in isas().into_iter().flat_map(|isa| (0..4).map(move |i| (isa, i))) {
        let (mut c, at, [dk, dv]) = (Backward::new([1, 150, 48, 70], &[0.05], 17), 90, [48, 70]);
        *match input {
            0 => &mut c.p.q[at * dk + 37],
            1 => &mut c.p.k[at * dk + 37],
            2 => &mut c.p.v[at * dv + 37],
            _ => &mut c.dout[at * dv + 37],
        } = f32::INFINITY;
        let on = |n| Runtime::builder().isa(isa).threads(n).build().expect("a runtime");
        let (got, want) = (c.run::<f32>(&on(1), None), c.naive());
        let shared = c.run::<f32>(&on(3), None);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let finite = |x: &[f32]| x.iter().map(|x| x.is_finite()).collect::<Vec<_>>();
            let expected: Vec<_> = want.iter().map(|x| x.is_finite()).collect();
            assert_eq!(finite(got), expected, "{isa}: gradient {i}, input {input}");
            let [got, shared]: [Vec<f32>; 2] = [got, &shared[i]].map(|x| {
                x.iter().zip(&expected).filter(|(_, fine)| **fine).map(|(x, _)| *x).collect()
            });
            let want: Vec<f64> = want.iter().copied().filter(|x| x.is_finite()).collect();
            assert_eq!(bits(&got), bits(&shared), "{isa}: gradient {i}, input {input}");
            let err = rel_err(&got, &want);
            assert!(err < F32, "{isa}: gradient {i}, input {input}: off by {err:.2e}");
        }
    }
}
