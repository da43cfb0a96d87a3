//! Performer attention.

use super::difference::{close, differences, differs_little, dot};
use crate::support::{bits, engines, isas, normal, rel_err, widen, with_threads};
use half::bf16;
use linattn::attention::performer::{
    FavorKernel, PerformerAttention, PerformerConfig, PerformerState, RowNorm, Stabiliser, naive,
    orthogonal_projection,
};
use linattn::attention::{Gradients, Inputs, StreamState};
use linattn::tensor::{Element, Rng, View, ViewMut};
use linattn::{Error, Runtime};

struct Problem {
    /// `[batch, heads, lq, lk, dk, dv]`
    size: [usize; 6],
    config: PerformerConfig,
    /// `[m, dk]`
    projection: Vec<f32>,
    /// `q`, `k`, `v`, `dout`, contiguous `[batch, len, heads, dim]`.
    tensors: [Vec<f32>; 4],
}

impl Problem {
    fn new(size: [usize; 6], m: usize, config: PerformerConfig) -> Self {
        let ([b, h, lq, lk, dk, dv], seed) = (size, size.iter().sum::<usize>() as u64);
        println!("{size:?}, {m} features, {config:?}: seed {seed}");
        let projection = orthogonal_projection(m, dk, RowNorm::Gaussian, seed).expect("sizes");
        // Not the numbers of the projection, whose rows would be orthogonal to those of queries.
        let mut rng = Rng::new(seed + 1);
        let lens = [lq * dk, lk * dk, lk * dv, lq * dv].map(|n| b * h * n);
        let tensors = lens.map(|n| normal(&mut rng, n));
        Self { size, config, projection: projection.as_slice().to_vec(), tensors }
    }

    fn op(&self) -> PerformerAttention {
        let dk = self.size[4];
        let projection = View::new(&self.projection, [self.projection.len() / dk, dk]);
        PerformerAttention::new(self.config, projection.expect("rows")).expect("a configuration")
    }

    fn shapes(&self) -> [[usize; 4]; 4] {
        let [b, h, lq, lk, dk, dv] = self.size;
        [[b, lq, h, dk], [b, lk, h, dk], [b, lk, h, dv], [b, lq, h, dv]]
    }

    /// `q`, `k`, `v`, `dout` of one head, in `f64`.
    fn head(&self, n: usize, h: usize) -> [Vec<f64>; 4] {
        let shapes = self.shapes();
        [0, 1, 2, 3].map(|i| {
            let [_, len, heads, d] = shapes[i];
            let row = |t| ((n * len + t) * heads + h) * d;
            (0..len).flat_map(|t| widen(&self.tensors[i][row(t)..][..d])).collect()
        })
    }

    fn naive(&self) -> [Vec<f64>; 3] {
        let [b, heads, lq, lk, dk, dv] = self.size;
        let mut out = [0, 1, 2].map(|i| vec![0.0; self.tensors[i].len()]);
        let w = widen(&self.projection);
        for (n, h) in (0..b).flat_map(|n| (0..heads).map(move |h| (n, h))) {
            let [q, k, v, dout] = self.head(n, h);
            let shape = [lq, lk, dk, dv];
            let grads = naive::backward([&q, &k, &v], &w, shape, &self.config, &dout);
            for ((out, x), [_, len, heads, d]) in out.iter_mut().zip(grads).zip(self.shapes()) {
                for (i, x) in x.into_iter().enumerate() {
                    out[((n * len + i / d) * heads + h) * d + i % d] = x;
                }
            }
        }
        out
    }

    fn run<E: Element>(&self, rt: &Runtime) -> [Vec<f32>; 3] {
        let [qs, ks, vs, os] = self.shapes();
        let x =
            self.tensors.each_ref().map(|x| x.iter().map(|x| E::from_f32(*x)).collect::<Vec<E>>());
        let [q, k, v, dout] = &x;
        let nan = |x: &Vec<E>| vec![E::from_f32(f32::NAN); x.len()];
        let (mut dq, mut dk, mut dv) = (nan(q), nan(k), nan(v));
        let inputs = Inputs {
            q: View::new(q, qs).expect("a tensor"),
            k: View::new(k, ks).expect("a tensor"),
            v: View::new(v, vs).expect("a tensor"),
            state: None,
            dout: View::new(dout, os).expect("a tensor"),
        };
        let grads = Gradients {
            q: ViewMut::new(&mut dq, qs).expect("a tensor"),
            k: ViewMut::new(&mut dk, ks).expect("a tensor"),
            v: ViewMut::new(&mut dv, vs).expect("a tensor"),
            state: None,
        };
        self.op().backward(rt, inputs, grads).expect("a good call");
        [dq, dk, dv].map(|x| x.into_iter().map(E::to_f32).collect())
    }
}

/// The softmax kernel whose stabilisers cancel, or are constant: what differences may be taken of.
fn smooth() -> PerformerConfig {
    PerformerConfig {
        kernel: FavorKernel::Softmax { eps: 0.0 },
        stabiliser: Stabiliser::Fixed(0.5),
        ..PerformerConfig::softmax()
    }
}

#[test]
fn definition_is_that_of_differences() {
    // With other sums than zero to begin with, the stabiliser of a query would not cancel, but it does in a quotient.
    for config in
        [smooth(), smooth().causal(), PerformerConfig::relu(), PerformerConfig::relu().causal()]
    {
        let problem = Problem::new([1, 1, 4, 4, 3, 2], 5, config);
        let [_, _, lq, lk, dk, dv] = problem.size;
        let ([q, k, v, dout], w) = (problem.head(0, 0), widen(&problem.projection));
        let by = |q: &[f64], k: &[f64], v: &[f64]| {
            dot(&dout, &naive::head(q, k, v, &w, [lq, lk, dk, dv], &config))
        };
        let [dq, dk, dv] = problem.naive();
        differs_little(&dq, &differences(&q, |q| by(q, &k, &v)), &format!("{config:?} dq"));
        differs_little(&dk, &differences(&k, |k| by(&q, k, &v)), &format!("{config:?} dk"));
        differs_little(&dv, &differences(&v, |v| by(&q, &k, v)), &format!("{config:?} dv"));
    }
}

const NAMES: [&str; 3] = ["dq", "dk", "dv"];

#[test]
fn gradients_are_those_of_the_definition() {
    let plain = PerformerConfig { normalize: false, ..PerformerConfig::relu() };
    for (size, m, config) in [
        ([1, 2, 130, 110, 16, 12], 44, PerformerConfig::softmax()),
        ([2, 3, 70, 70, 12, 20], 30, PerformerConfig::softmax().causal()),
        ([1, 2, 9, 100, 16, 5], 33, PerformerConfig::relu()),
        ([2, 1, 101, 101, 7, 16], 20, PerformerConfig::relu().causal()),
        ([1, 1, 20, 20, 8, 8], 16, plain),
        ([2, 2, 3, 3, 8, 8], 16, smooth().causal()),
        ([1, 1, 1, 1, 8, 8], 16, PerformerConfig::softmax().causal()),
    ] {
        let problem = Problem::new(size, m, config);
        let want = problem.naive();
        for engine in engines() {
            let got = problem.run::<f32>(&engine.runtime());
            for ((got, want), name) in got.iter().zip(&want).zip(NAMES) {
                let what = format!("{engine:?} {size:?} {config:?} {name}");
                let tolerance = engine.bound(3e-6, true);
                if size[3] == 1 && name != "dv" {
                    // One key has all the weight, whatever it is: what is left are differences of terms of the size
                    // of `dout v`.
                    let [_, _, v, dout] = problem.head(0, 0);
                    let size = (dot(&v, &v) * dot(&dout, &dout)).sqrt();
                    let off = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2));
                    assert!(off.sum::<f64>().sqrt() <= tolerance * size, "{what}");
                } else {
                    close(got, want, tolerance, &what);
                }
            }
        }
    }
}

#[test]
fn half_tensors_are_rounded_once() {
    let mut problem = Problem::new([2, 3, 33, 33, 16, 24], 20, PerformerConfig::softmax());
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
    for config in [PerformerConfig::softmax(), PerformerConfig::relu().causal()] {
        let problem = Problem::new([1, 3, 400, 400, 32, 32], 64, config);
        for isa in isas() {
            let [one, three] = [1, 3].map(|n| problem.run::<f32>(&with_threads(isa, Some(n))));
            for (a, b) in one.iter().zip(&three) {
                assert_eq!(bits(a), bits(b), "{isa} {config:?}");
            }
        }
    }
}

/// Going back through the parts of a sequence, from the last one on, gives the gradients of the whole.
#[test]
fn parts_give_the_gradients_of_the_whole() {
    let problem = Problem::new([2, 2, 60, 60, 8, 12], 24, PerformerConfig::relu().causal());
    let ([b, h, len, _, _, dv], [qs, ks, vs, os], mid) = (problem.size, problem.shapes(), 37);
    for isa in isas() {
        let (rt, op) = (with_threads(isa, None), problem.op());
        let whole = problem.run::<f32>(&rt);
        let [q, k, v, dout] = &problem.tensors;
        let views = [
            View::new(q, qs).expect("a tensor"),
            View::new(k, ks).expect("a tensor"),
            View::new(v, vs).expect("a tensor"),
            View::new(dout, os).expect("a tensor"),
        ];
        let new = || op.new_state(b, h, dv).expect("a state");
        let mut middle: PerformerState = new();
        let [q, k, v, _] = views.map(|x| x.slice(1, 0, mid));
        let mut out = vec![0.0; b * mid * h * dv];
        let to = ViewMut::new(&mut out, [b, mid, h, dv]).expect("a tensor");
        op.forward(&rt, q, k, v, to, Some(&mut middle)).expect("a good call");
        let mut dstate = new();
        let fill = &mut |x: &mut [f32]| {
            x.fill(0.0);
            Ok(())
        };
        dstate.contents_mut(fill).expect("room");
        let mut got = problem.tensors.each_ref().map(|x| vec![f32::NAN; x.len()]);
        for (from, to, state) in [(mid, len, &middle), (0, mid, &new())] {
            let [q, k, v, dout] = views.map(|x| x.slice(1, from, to));
            let [dq, dk, dv, _] = &mut got;
            let part = |x, shape| ViewMut::new(x, shape).expect("a tensor").slice(1, from, to);
            let grads = Gradients {
                q: part(dq, qs),
                k: part(dk, ks),
                v: part(dv, vs),
                state: Some(&mut dstate),
            };
            let inputs = Inputs { q, k, v, state: Some(state), dout };
            op.backward(&rt, inputs, grads).expect("a good call");
        }
        for ((got, whole), name) in got.iter().zip(&whole).zip(NAMES) {
            let error = rel_err(got, &widen(whole));
            assert!(error <= 1e-6, "{isa} {name}: off by {error:e}");
        }
    }
}

#[test]
fn wrong_calls_write_nothing() {
    let rt = Runtime::new().expect("a runtime");
    let problem = Problem::new([1, 2, 4, 4, 3, 3], 5, PerformerConfig::softmax().causal());
    let (op, good) = (problem.op(), [1, 4, 2, 3]);
    let (x, mut room) = ([0.5; 24], [[f32::NAN; 24]; 3]);
    let relu = Problem::new([1, 2, 4, 4, 3, 3], 5, PerformerConfig::relu().causal()).op();
    let state = relu.new_state(1, 2, 3).expect("a state");
    for (bad, arg) in ["q", "k", "v", "dout", "dq", "dk", "dv", "state"].into_iter().enumerate() {
        let shape = |at| if at == bad { [2, 2, 3, 2] } else { good };
        let view = |at| View::new(&x, shape(at)).expect("a tensor");
        let [dq, dk, dv] = &mut room;
        let grads = Gradients {
            q: ViewMut::new(dq, shape(4)).expect("a tensor"),
            k: ViewMut::new(dk, shape(5)).expect("a tensor"),
            v: ViewMut::new(dv, shape(6)).expect("a tensor"),
            state: None,
        };
        let state = (bad == 7).then_some(&state);
        let inputs = Inputs { q: view(0), k: view(1), v: view(2), state, dout: view(3) };
        let err = op.backward(&rt, inputs, grads).expect_err("a wrong call");
        let (Error::Shape { arg: got, .. } | Error::Value { arg: got, .. }) = &err else {
            panic!("{err}")
        };
        assert_eq!(*got, arg, "{err}");
        let all = room.iter().flatten();
        assert!(all.into_iter().all(|x| x.is_nan()), "{arg}: something was written");
    }
}
