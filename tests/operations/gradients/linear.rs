//! Linear attention.

use super::F32;
use super::difference::{differences, differs_little, dot};
use crate::support::{bits, isas, normal, rel_err, runtime, widen};
use linattn::attention::linear::{FeatureMap, LinearAttention, LinearState, naive};
use linattn::attention::{Gradients, Inputs, Scale};
use linattn::tensor::{Rng, View, ViewMut};
use linattn::{Isa, Runtime};

/// A call of one head per batch row, with the gradients of its output and final state.
#[derive(Clone)]
struct Call {
    /// `[batch, lq, lk, dk, dv]`
    dims: [usize; 5],
    map: FeatureMap,
    causal: bool,
    eps: Option<f32>,
    /// `q`, `k`, `v`, `dout`
    x: [Vec<f32>; 4],
    /// `S` and `z`, and the gradients of the final ones.
    states: [Vec<f32>; 4],
}

impl Call {
    fn new(dims: [usize; 5], map: FeatureMap, causal: bool, eps: Option<f32>, seed: u64) -> Self {
        let [b, lq, lk, dk, dv] = dims;
        let mut rng = Rng::new(seed);
        let x = [b * lq * dk, b * lk * dk, b * lk * dv, b * lq * dv].map(|n| normal(&mut rng, n));
        let mut states = [b * dk * dv, b * dk, b * dk * dv, b * dk].map(|n| normal(&mut rng, n));
        // Normalisers are sums of features, which keeps denominators away from zero.
        states[1].iter_mut().for_each(|z| *z = z.abs() + 1.0);
        Self { dims, map, causal, eps, x, states }
    }

    fn terms(&self) -> naive::Terms {
        let scale = f64::from(Scale::InvSqrtDim.of(self.dims[3]));
        let Self { map, causal, .. } = *self;
        naive::Terms { map, causal, eps: self.eps.map(f64::from), scale }
    }

    /// Gradients of `q`, `k`, `v`, `S` and `z`.
    fn naive(&self) -> [Vec<f64>; 5] {
        let [batch, lq, lk, dk, dv] = self.dims;
        let mut all: [Vec<f64>; 5] = Default::default();
        for n in 0..batch {
            let one = |x: &[f32], len: usize| widen(&x[n * len..(n + 1) * len]);
            let [q, k, v, dout] = &self.x;
            let [s, z, ds, dz] = &self.states;
            let (mut ds, mut dz) = (one(ds, dk * dv), one(dz, dk));
            let grads = naive::backward(
                &one(q, lq * dk),
                &one(k, lk * dk),
                &one(v, lk * dv),
                [lq, lk, dk, dv],
                self.terms(),
                [&one(s, dk * dv), &one(z, dk)],
                &one(dout, lq * dv),
                [&mut ds, &mut dz],
            );
            all.iter_mut().zip(grads.into_iter().chain([ds, dz])).for_each(|(a, g)| a.extend(g));
        }
        all
    }

    fn run(&self, rt: &Runtime) -> [Vec<f32>; 5] {
        let [b, lq, lk, dk, dv] = self.dims;
        let (sq, sk, sv, so) = ([b, lq, 1, dk], [b, lk, 1, dk], [b, lk, 1, dv], [b, lq, 1, dv]);
        let [q, k, v, dout] = &self.x;
        let [s, z, ds, dz] = &self.states;
        let state = LinearState::from_slices(s, z, [b, 1, dk, dv], 0).expect("a state");
        let mut dstate = LinearState::from_slices(ds, dz, [b, 1, dk, dv], 0).expect("a state");
        let [mut gq, mut gk, mut gv] = [q, k, v].map(|x| vec![f32::NAN; x.len()]);
        let op = LinearAttention::new(self.map).with_eps(self.eps).expect("an eps");
        let op = op.with_scale(Scale::InvSqrtDim).expect("a scale");
        let op = if self.causal { op.causal() } else { op };
        let inputs = Inputs {
            q: View::new(q, sq).expect("a tensor"),
            k: View::new(k, sk).expect("a tensor"),
            v: View::new(v, sv).expect("a tensor"),
            state: Some(&state),
            dout: View::new(dout, so).expect("a tensor"),
        };
        let grads = Gradients {
            q: ViewMut::new(&mut gq, sq).expect("a tensor"),
            k: ViewMut::new(&mut gk, sk).expect("a tensor"),
            v: ViewMut::new(&mut gv, sv).expect("a tensor"),
            state: Some(&mut dstate),
        };
        op.backward(rt, inputs, grads).expect("a good call");
        let kv = dstate.kv().as_slice().expect("a contiguous state").to_vec();
        [gq, gk, gv, kv, dstate.z().to_vec()]
    }
}

const MAPS: [FeatureMap; 4] =
    [FeatureMap::Identity, FeatureMap::Elu1, FeatureMap::Relu, FeatureMap::Silu];

/// Normalisers of features that are never negative only: others may be zero.
fn calls(dims: [usize; 5], seed: u64) -> Vec<Call> {
    let causal = if dims[1] == dims[2] { &[false, true][..] } else { &[false] };
    let all = MAPS.iter().flat_map(|m| causal.iter().map(move |c| (*m, *c)));
    all.flat_map(|(map, causal)| {
        let positive = matches!(map, FeatureMap::Elu1 | FeatureMap::Relu);
        let eps = if positive { &[None, Some(1e-6)][..] } else { &[None] };
        eps.iter().map(move |eps| Call::new(dims, map, causal, *eps, seed))
    })
    .collect()
}

#[test]
fn definition_is_the_derivative() {
    for mut call in calls([1, 4, 4, 3, 2], 3).into_iter().chain(calls([1, 3, 5, 2, 3], 4)) {
        // Differences need a denominator that is not tiny.
        call.eps = call.eps.map(|_| 0.5);
        let [_, lq, lk, dk, dv] = call.dims;
        let [q, k, v, dout] = [0, 1, 2, 3].map(|i| widen(&call.x[i]));
        let [s, z, ds, dz] = [0, 1, 2, 3].map(|i| widen(&call.states[i]));
        let weights: Vec<f64> = [dout, ds, dz].concat();
        let inputs = [q, k, v, s, z];
        for (i, want) in call.naive().into_iter().enumerate() {
            let got = differences(&inputs[i], |x| {
                let mut all = inputs.clone();
                all[i] = x.to_vec();
                let [q, k, v, mut s, mut z] = all;
                let dims = [lq, lk, dk, dv];
                let out = naive::head(&q, &k, &v, dims, call.terms(), &mut s, &mut z);
                let z = if call.eps.is_some() { z } else { vec![0.0; dk] };
                dot(&[out, s, z].concat(), &weights)
            });
            let (map, causal) = (call.map, call.causal);
            differs_little(&got, &want, &format!("{map:?} {causal}: gradient {i}"));
        }
    }
}

#[test]
fn agrees_with_the_definition() {
    for isa in isas() {
        let rt = runtime(isa);
        let shapes = [[1, 70, 70, 24, 32], [2, 37, 37, 20, 33], [1, 9, 40, 17, 5], [1, 1, 1, 4, 4]];
        for (seed, dims) in shapes.into_iter().enumerate() {
            for call in calls(dims, seed as u64) {
                let names = ["q", "k", "v", "S", "z"];
                for ((name, got), want) in names.iter().zip(call.run(&rt)).zip(call.naive()) {
                    let err = rel_err(&got, &want);
                    let Call { dims, map, causal, eps, .. } = call;
                    assert!(
                        err <= F32,
                        "{isa}: gradient of {name} is off by {err:.2e} ({dims:?}, {map:?}, causal {causal}, eps {eps:?})"
                    );
                }
            }
        }
    }
}

#[test]
fn threads_do_not_matter() {
    for isa in isas() {
        for causal in [false, true] {
            let call = Call::new([2, 150, 150, 40, 40], FeatureMap::Elu1, causal, Some(1e-6), 5);
            let on = |n| Runtime::builder().isa(isa).threads(n).build().expect("a runtime");
            let one = call.run(&on(1)).map(|x| bits(&x));
            for n in [2, 3] {
                assert_eq!(call.run(&on(n)).map(|x| bits(&x)), one, "{isa}, {n} threads");
            }
        }
    }
}

#[test]
fn empty_dimensions() {
    let rt = runtime(Isa::Portable);
    for dims in
        [[0, 3, 3, 2, 2], [1, 0, 0, 2, 2], [1, 3, 3, 0, 2], [1, 3, 3, 2, 0], [1, 3, 0, 2, 2]]
    {
        for call in calls(dims, 1) {
            call.run(&rt);
        }
    }
}
