//! Agent attention.

use super::difference::{agree, dot};
use crate::laid::{Laid, Order};
use crate::support::{engines, isas, normal, rel_err, runtime, same_bits, widen};
use half::bf16;
use linattn::Runtime;
use linattn::attention::Scale;
use linattn::attention::agent::{AgentAttention, AgentBiasGrads, AgentExtra, naive};
use linattn::tensor::{Element, Rng, View, ViewMut};

/// Relative L2 distance of a correct `f32` form from the definition.
const F32: f64 = 3e-6;
const SCALES: [f32; 2] = [0.3, 0.5];

/// Arguments of a call; tensors are contiguous `[batch, len, heads, dim]`.
struct Problem {
    /// `[batch, heads, lq, lk, n, dk, dv]`
    dims: [usize; 7],
    k_shortcut: f32,
    /// Queries, keys, values, agents, and the gradient of the output.
    inputs: [Vec<f32>; 5],
    /// Of agents against keys, of queries against agents.
    biases: Option<[Vec<f32>; 2]>,
    key_mask: Option<Vec<bool>>,
}

impl Problem {
    fn new(dims: [usize; 7], k_shortcut: f32, seed: u64) -> Self {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let inputs = Self::shapes(dims).map(|s| normal(&mut rng, s.iter().product()));
        Self { dims, k_shortcut, inputs, biases: None, key_mask: None }
    }

    fn shapes([b, h, lq, lk, n, dk, dv]: [usize; 7]) -> [[usize; 4]; 5] {
        [[b, lq, h, dk], [b, lk, h, dk], [b, lk, h, dv], [b, n, h, dk], [b, lq, h, dv]]
    }

    fn biased(mut self, seed: u64) -> Self {
        let ([_, h, lq, lk, n, ..], mut rng) = (self.dims, Rng::new(seed));
        self.biases = Some([h * n * lk, h * lq * n].map(|len| normal(&mut rng, len)));
        self
    }

    /// Some keys hidden, all of them in the last batch row.
    fn masked(mut self, seed: u64) -> Self {
        let ([b, _, _, lk, ..], mut rng) = (self.dims, Rng::new(seed));
        let mask = (0..b * lk).map(|i| i / lk + 1 < b && rng.below(3) > 0);
        self.key_mask = Some(mask.collect());
        self
    }

    /// Gradients of the inputs and of both biases.
    fn naive<E: Element>(&self) -> Vec<Vec<f64>> {
        let [batch, heads, lq, lk, n, dk, dv] = self.dims;
        let shapes = Self::shapes(self.dims);
        let mut grads: Vec<Vec<f64>> =
            shapes[..4].iter().map(|s| vec![0.0; s.iter().product()]).collect();
        let mut dbiases = [vec![0.0; heads * n * lk], vec![0.0; heads * lq * n]];
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let place = |i: usize, at: usize| {
                let [_, len, heads, dim] = shapes[i];
                ((b * len + at / dim) * heads + h) * dim + at % dim
            };
            let part = |i: usize| -> Vec<f64> {
                let round = |x: f32| f64::from(E::from_f32(x).to_f32());
                let len = shapes[i][1] * shapes[i][3];
                (0..len).map(|at| round(self.inputs[i][place(i, at)])).collect()
            };
            let [q, k, v, agents, dout] = [0, 1, 2, 3, 4].map(part);
            let bias = |i: usize, len: usize| -> Vec<f64> {
                self.biases.as_ref().map(|x| widen(&x[i][h * len..][..len])).unwrap_or_default()
            };
            let (agent_bias, query_bias) = (bias(0, n * lk), bias(1, lq * n));
            let terms = naive::Terms {
                scales: SCALES.map(f64::from),
                k_shortcut: f64::from(self.k_shortcut),
                agent_bias: &agent_bias,
                query_bias: &query_bias,
            };
            let seen = |j: usize| self.key_mask.as_ref().is_none_or(|m| m[b * lk + j]);
            let sizes = [lq, lk, n, dk, dv];
            let got = naive::backward(&agents, [&q, &k, &v], &dout, sizes, terms, seen);
            for (i, x) in got.inputs.iter().enumerate() {
                x.iter().enumerate().for_each(|(at, x)| grads[i][place(i, at)] += x);
            }
            for (to, x) in dbiases.iter_mut().zip(&got.biases) {
                to[h * x.len()..].iter_mut().zip(x).for_each(|(to, x)| *to += x);
            }
        }
        grads.extend(dbiases);
        grads
    }

    fn run<E: Element>(&self, rt: &Runtime, order: Order) -> Vec<Vec<f32>> {
        let [batch, heads, lq, lk, n, ..] = self.dims;
        let shapes = Self::shapes(self.dims);
        let laid = [0, 1, 2, 3, 4].map(|i| Laid::<E>::new(&self.inputs[i], shapes[i], order));
        let mut grads = [0, 1, 2, 3].map(|i| {
            let nan = vec![f32::NAN; self.inputs[i].len()];
            Laid::<E>::new(&nan, shapes[i], order)
        });
        let bias_shapes = [[heads, n, lk], [heads, lq, n]];
        let bias = |i: usize| {
            let x = self.biases.as_ref()?;
            Some(View::new(&x[i][..], bias_shapes[i]).expect("a bias"))
        };
        let mut dbiases = bias_shapes.map(|s| vec![f32::NAN; s.iter().product()]);
        let extra = AgentExtra {
            agent_bias: bias(0),
            query_bias: bias(1),
            key_mask: self.key_mask.as_ref().map(|m| View::new(m, [batch, lk]).expect("a mask")),
            agent_values: None,
        };
        let [d1, d2] = &mut dbiases;
        let to = AgentBiasGrads {
            agent_bias: Some(ViewMut::new(d1, bias_shapes[0]).expect("a bias")),
            query_bias: Some(ViewMut::new(d2, bias_shapes[1]).expect("a bias")),
        };
        let [s1, s2] = SCALES.map(Scale::Value);
        let op = AgentAttention::new().with_scales(s1, s2).expect("scales");
        let op = op.with_shortcut(self.k_shortcut).expect("a shortcut");
        let [q, k, v, agents, dout] = laid.each_ref().map(Laid::view);
        let views = grads.each_mut().map(Laid::view_mut);
        let done = op.backward_with(rt, q, k, v, agents, dout, views, extra, to);
        done.expect("valid arguments");
        grads.into_iter().map(Laid::take).chain(dbiases).collect()
    }

    #[track_caller]
    fn agrees_as<E: Element>(&self, rt: &Runtime, order: Order, tolerance: f64) {
        let got = self.run::<E>(rt, order);
        for (i, (got, want)) in got.iter().zip(&self.naive::<E>()).enumerate() {
            let (err, dims) = (rel_err(got, want), self.dims);
            assert!(err <= tolerance, "gradient {i} of {dims:?}, {}: {err:.2e}", rt.kernel());
        }
    }
}

fn terms<'a>(agent_bias: &'a [f64], query_bias: &'a [f64]) -> naive::Terms<'a> {
    naive::Terms { scales: [0.7, 0.4], k_shortcut: 0.2, agent_bias, query_bias }
}

#[test]
fn the_definition_equals_differences() {
    let sizes @ [lq, lk, n, dk, dv] = [5, 5, 3, 2, 4];
    let mut rng = Rng::new(1);
    let lens = [lq * dk, lk * dk, lk * dv, n * dk, n * lk, lq * n];
    let inputs = lens.map(|n| widen(&normal(&mut rng, n)));
    let dout = widen(&normal(&mut rng, lq * dv));
    for hidden in [2, lk] {
        let seen = |j: usize| hidden < lk && j != hidden;
        let [q, k, v, agents, b1, b2] = inputs.each_ref().map(Vec::as_slice);
        let got = naive::backward(agents, [q, k, v], &dout, sizes, terms(b1, b2), seen);
        let got: Vec<_> = got.inputs.into_iter().chain(got.biases).collect();
        agree(&got, &inputs, |x| {
            let qkv = [x[0], x[1], x[2]];
            dot(&naive::head(x[3], qkv, sizes, terms(x[4], x[5]), seen).0, &dout)
        });
    }
}

#[test]
fn gradients_are_those_of_the_definition() {
    for engine in engines() {
        let (rt, tolerance) = (engine.runtime(), engine.bound(F32, true));
        let check = |p: &Problem| p.agrees_as::<f32>(&rt, Order::Whole, tolerance);
        check(&Problem::new([1, 1, 5, 7, 3, 4, 6], 0.0, 2));
        check(&Problem::new([2, 3, 100, 130, 49, 17, 33], 0.0, 3).biased(4));
        check(&Problem::new([1, 2, 70, 70, 100, 8, 8], 0.075, 5));
        check(&Problem::new([3, 1, 20, 20, 9, 8, 16], 0.1, 6).masked(7).biased(8));
    }
}

#[test]
fn any_order_and_type_of_elements() {
    for isa in isas() {
        let p = Problem::new([2, 2, 30, 41, 9, 24, 40], 0.0, 20);
        p.agrees_as::<f32>(&runtime(isa), Order::HeadsFirst, F32);
        p.agrees_as::<f32>(&runtime(isa), Order::Columns, F32);
        p.agrees_as::<bf16>(&runtime(isa), Order::Columns, 1e-2);
    }
}

#[test]
fn threads_do_not_matter() {
    for engine in engines() {
        let p = Problem::new([3, 6, 120, 120, 25, 32, 32], 0.0, 30).biased(31);
        let want = p.run::<f32>(&engine.with_threads(Some(1)), Order::Whole);
        for threads in [2, 5] {
            let got = p.run::<f32>(&engine.with_threads(Some(threads)), Order::Whole);
            got.iter().zip(&want).for_each(|(g, w)| same_bits(g, w, "gradients"));
        }
    }
}
