//! The fast forms of Performer attention against the definition in `f64`, its laws, and what it refuses.

use crate::laid::{Laid, ORDERS, Order};
use crate::support::{bits, engines, isas, normal, rel_err, runtime, widen, with_threads};
use half::{bf16, f16};
use linattn::attention::performer::{
    FavorKernel, PerformerAttention, PerformerConfig, PerformerState, RowNorm, Stabiliser,
    default_features, naive, orthogonal_projection,
};
use linattn::attention::{Gradients, Inputs, StreamState};
use linattn::tensor::{Element, Rng, Tensor, View, ViewMut};
use linattn::{Error, Runtime};

/// Relative L2 distance of a correct `f32` form from the definition.
const F32: f64 = 5e-6;

/// Arguments of a call; tensors are contiguous `[batch, len, heads, dim]`.
struct Problem {
    config: PerformerConfig,
    batch: usize,
    lens: [usize; 2],
    heads: usize,
    dims: [usize; 2],
    w: Tensor<2>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Problem {
    /// `[batch, lq, lk, heads, dk, dv, features]`; one length if causal.
    fn new(config: PerformerConfig, sizes: [usize; 7], seed: u64) -> Self {
        let [batch, lq, lk, heads, dk, dv, m] = sizes;
        let lk = if config.causal { lq } else { lk };
        let mut rng = Rng::new(seed);
        let mut make = |len: usize, dim: usize| normal(&mut rng, batch * len * heads * dim);
        let (q, k, v) = (make(lq, dk), make(lk, dk), make(lk, dv));
        let w = orthogonal_projection(m, dk, RowNorm::Gaussian, seed).expect("a projection");
        Self { config, batch, lens: [lq, lk], heads, dims: [dk, dv], w, q, k, v }
    }

    fn op(&self) -> PerformerAttention {
        PerformerAttention::new(self.config, self.w.view()).expect("an operation")
    }

    fn shapes(&self) -> [[usize; 4]; 4] {
        let ([lq, lk], [dk, dv]) = (self.lens, self.dims);
        [(lq, dk), (lk, dk), (lk, dv), (lq, dv)].map(|(n, d)| [self.batch, n, self.heads, d])
    }

    fn run_as<E: Element>(&self, rt: &Runtime, order: Order) -> Vec<f32> {
        let [sq, sk, sv, so] = self.shapes();
        let laid = |x, s| Laid::<E>::new(x, s, order);
        let (q, k, v) = (laid(&self.q, sq), laid(&self.k, sk), laid(&self.v, sv));
        let mut out = laid(&vec![0.0; so.iter().product()], so);
        let op = self.op();
        op.forward(rt, q.view(), k.view(), v.view(), out.view_mut(), None).expect("a call");
        out.take()
    }

    fn run(&self, rt: &Runtime) -> Vec<f32> {
        self.run_as::<f32>(rt, Order::Whole)
    }

    fn run_parts(&self, rt: &Runtime, parts: &[usize]) -> (Vec<f32>, PerformerState) {
        let (op, [sq, sk, sv, so]) = (self.op(), self.shapes());
        let mut state = op.new_state(self.batch, self.heads, self.dims[1]).expect("a state");
        let mut out = vec![f32::NAN; so.iter().product()];
        let view = |x, s| View::new(x, s).expect("a tensor");
        let (q, k, v) = (view(&self.q, sq), view(&self.k, sk), view(&self.v, sv));
        let mut at = 0;
        for n in parts {
            let [q, k, v] = [q, k, v].map(|x| x.slice(1, at, at + n));
            let part = ViewMut::new(&mut out, so).expect("a tensor").slice(1, at, at + n);
            op.forward(rt, q, k, v, part, Some(&mut state)).expect("a part");
            at += n;
        }
        (out, state)
    }

    /// The definition, on elements rounded to `E`.
    fn want<E: Element>(&self) -> Vec<f64> {
        let ([sq, sk, sv, so], w) = (self.shapes(), widen(self.w.as_slice()));
        let mut out = vec![0.0; so.iter().product()];
        for (b, h) in (0..self.batch).flat_map(|b| (0..self.heads).map(move |h| (b, h))) {
            let head = |x: &[f32], s: [usize; 4]| -> Vec<f64> {
                let view = View::new(x, s).expect("a tensor").head(b, h);
                let rows = (0..s[1]).flat_map(|t| view.row([t, 0]));
                rows.map(|x| f64::from(E::from_f32(*x).to_f32())).collect()
            };
            let (q, k, v) = (head(&self.q, sq), head(&self.k, sk), head(&self.v, sv));
            let ([lq, lk], [dk, dv]) = (self.lens, self.dims);
            let rows = naive::head(&q, &k, &v, &w, [lq, lk, dk, dv], &self.config);
            for (t, row) in rows.chunks_exact(dv).enumerate() {
                out[((b * lq + t) * self.heads + h) * dv..][..dv].copy_from_slice(row);
            }
        }
        out
    }
}

fn configs() -> [PerformerConfig; 6] {
    let fixed =
        PerformerConfig { stabiliser: Stabiliser::Fixed(1.0), ..PerformerConfig::softmax() };
    let plain = PerformerConfig { normalize: false, ..PerformerConfig::relu() };
    [
        PerformerConfig::softmax(),
        PerformerConfig::softmax().causal(),
        PerformerConfig::relu(),
        PerformerConfig::relu().causal(),
        fixed.causal(),
        plain,
    ]
}

#[test]
fn fast_forms_equal_the_definition() {
    for engine in engines() {
        let rt = engine.runtime();
        for (i, config) in configs().into_iter().enumerate() {
            for (j, sizes) in [
                [2, 1, 5, 2, 16, 12, 44],
                [1, 3, 7, 1, 8, 8, 5],
                [1, 49, 97, 2, 16, 40, 33],
                [1, 150, 220, 1, 64, 64, 266],
            ]
            .into_iter()
            .enumerate()
            {
                let p = Problem::new(config, sizes, (10 * i + j) as u64);
                let err = rel_err(&p.run(&rt), &p.want::<f32>());
                let tolerance = engine.bound(F32, false);
                assert!(err <= tolerance, "{} {config:?} {sizes:?}: {err:e}", rt.kernel());
            }
        }
    }
}

#[test]
fn large_logits_stay_finite() {
    for isa in isas() {
        let rt = runtime(isa);
        for config in [PerformerConfig::softmax(), PerformerConfig::softmax().causal()] {
            let mut p = Problem::new(config, [1, 60, 60, 1, 16, 8, 44], 3);
            p.q.iter_mut().chain(&mut p.k).for_each(|x| *x *= 12.0);
            let err = rel_err(&p.run(&rt), &p.want::<f32>());
            assert!(err <= 1e-4, "{isa} {config:?}: {err:e}");
        }
    }
}

#[test]
fn views_and_elements_of_any_kind_are_read() {
    for isa in isas() {
        let rt = runtime(isa);
        for config in [PerformerConfig::softmax(), PerformerConfig::relu().causal()] {
            let p = Problem::new(config, [2, 50, 50, 3, 16, 24, 44], 4);
            let plain = p.run(&rt);
            for order in ORDERS {
                assert_eq!(bits(&p.run_as::<f32>(&rt, order)), bits(&plain), "{isa} {order:?}");
            }
            let err = rel_err(&p.run_as::<bf16>(&rt, Order::Columns), &p.want::<bf16>());
            assert!(err <= 3e-3, "{isa} bf16: {err:e}");
            let err = rel_err(&p.run_as::<f16>(&rt, Order::HeadsFirst), &p.want::<f16>());
            assert!(err <= 4e-4, "{isa} f16: {err:e}");
        }
    }
}

#[test]
fn a_sequence_may_be_split_anywhere() {
    for isa in isas() {
        let rt = runtime(isa);
        for config in [configs()[3], configs()[4]] {
            let p = Problem::new(config, [2, 101, 101, 2, 16, 24, 44], 5);
            let (whole, state) = p.run_parts(&rt, &[101]);
            let err = rel_err(&whole, &p.want::<f32>());
            assert!(err <= F32, "{isa} {config:?}: {err:e}");
            for parts in [vec![1; 101], vec![0, 50, 1, 50, 0], vec![48, 49, 4], vec![100, 1]] {
                let (out, last) = p.run_parts(&rt, &parts);
                let err = rel_err(&out, &widen(&whole));
                let z = rel_err(last.z(), &widen(state.z()));
                assert!(err <= 2e-6 && z <= 2e-6, "{isa} {config:?} {parts:?}: {err:e}, {z:e}");
                assert_eq!(last.len(), 101);
            }
        }
    }
}

#[test]
fn threads_change_nothing() {
    for isa in isas() {
        for config in configs() {
            for heads in [1, 3] {
                let p = Problem::new(config, [2, 300, 400, heads, 16, 24, 44], 6);
                let [a, b] = [1, 4].map(|n| p.run(&with_threads(isa, Some(n))));
                assert_eq!(bits(&a), bits(&b), "{isa} {config:?}");
            }
        }
    }
}

#[test]
fn later_tokens_do_not_reach_earlier_ones() {
    for isa in isas() {
        let rt = runtime(isa);
        let p = Problem::new(PerformerConfig::relu().causal(), [1, 120, 120, 1, 16, 8, 44], 7);
        let mut later = Problem::new(p.config, [1, 120, 120, 1, 16, 8, 44], 7);
        later.v[100 * 8] = f32::NAN;
        later.k[101 * 16] = 1e3;
        let (a, b) = (p.run(&rt), later.run(&rt));
        let err = rel_err(&b[..100 * 8], &widen(&a[..100 * 8]));
        assert!(err <= 1e-6, "{isa}: {err:e}");
        assert!(b[100 * 8].is_nan());
    }
}

#[test]
fn projections_are_orthogonal() {
    let (dk, m) = (12, 30);
    for norm in [RowNorm::Gaussian, RowNorm::Fixed] {
        let w = orthogonal_projection(m, dk, norm, 9).expect("a projection");
        let dot = |a: usize, b: usize| -> f64 {
            let [a, b] = [a, b].map(|r| widen(w.view().row([r, 0])));
            a.iter().zip(&b).map(|(a, b)| a * b).sum()
        };
        for a in 0..m {
            for b in (0..a).filter(|b| b / dk == a / dk) {
                assert!(dot(a, b).abs() < 1e-5, "{norm:?}: rows {a} and {b}");
            }
            if norm == RowNorm::Fixed {
                assert!((dot(a, a) - dk as f64).abs() < 1e-4);
            }
        }
        let again = orthogonal_projection(m, dk, norm, 9).expect("a projection");
        assert_eq!(w.as_slice(), again.as_slice());
    }
    assert_eq!(default_features(64), 266);
    assert!(matches!(
        orthogonal_projection(0, 4, RowNorm::Fixed, 1),
        Err(Error::Value { arg: "features", .. })
    ));
}

#[test]
fn bad_arguments_are_refused() {
    let w = orthogonal_projection(20, 8, RowNorm::Fixed, 1).expect("a projection");
    let build = |config| PerformerAttention::new(config, w.view()).err();
    let with = |kernel| PerformerConfig { kernel, ..PerformerConfig::relu() };
    let value = |e: Option<Error>, name: &str| {
        assert!(matches!(&e, Some(Error::Value { arg, .. }) if *arg == name), "{name}: {e:?}");
    };
    value(build(with(FavorKernel::Relu { eps: f32::NAN })), "eps");
    value(build(with(FavorKernel::Softmax { eps: -1.0 })), "eps");
    value(
        build(PerformerConfig { denom_eps: f32::INFINITY, ..PerformerConfig::relu() }),
        "denom_eps",
    );
    let stabiliser = Stabiliser::Fixed(f32::NAN);
    value(build(PerformerConfig { stabiliser, ..PerformerConfig::softmax() }), "stabiliser");
    let empty = Tensor::<2>::zeros([0, 8]).expect("a tensor");
    value(PerformerAttention::new(PerformerConfig::relu(), empty.view()).err(), "projection");

    let rt = runtime(crate::support::best());
    let call = |config, shapes: [[usize; 4]; 4], state: Option<&mut PerformerState>| {
        let op = PerformerAttention::new(config, w.view()).expect("an operation");
        let x = |s: [usize; 4]| Tensor::<4>::zeros(s).expect("a tensor");
        let [q, k, v, mut out] = shapes.map(x);
        out.as_mut_slice().fill(7.0);
        let got = op.forward(&rt, q.view(), k.view(), v.view(), out.view_mut(), state);
        let touched = out.as_slice().iter().any(|x| *x != 7.0);
        assert_eq!(touched, got.is_ok() && !out.as_slice().is_empty());
        got.err()
    };
    let good = [[2, 9, 2, 8], [2, 9, 2, 8], [2, 9, 2, 5], [2, 9, 2, 5]];
    let causal = PerformerConfig::relu().causal();
    assert!(call(causal, good, None).is_none());
    for (which, shape, name) in [
        (0, [2, 9, 2, 7], "q"),
        (1, [2, 8, 2, 8], "k"),
        (1, [2, 9, 1, 8], "k"),
        (2, [2, 8, 2, 5], "v"),
        (3, [2, 9, 2, 6], "out"),
    ] {
        let mut shapes = good;
        shapes[which] = shape;
        let e = call(causal, shapes, None);
        assert!(matches!(&e, Some(Error::Shape { arg, .. }) if *arg == name), "{name}: {e:?}");
    }
    let op = PerformerAttention::new(causal, w.view()).expect("an operation");
    let mut state = op.new_state(2, 2, 5).expect("a state");
    value(call(PerformerConfig::softmax().causal(), good, Some(&mut state)), "state");
    let mut other = op.new_state(2, 1, 5).expect("a state");
    assert!(matches!(
        call(causal, good, Some(&mut other)),
        Some(Error::Shape { arg: "state", .. })
    ));
    assert!(state.is_empty() && other.is_empty());
    state.reset();
    assert!(state.z().iter().all(|z| *z == 1e-6));
    let empty = [[0, 9, 2, 8], [0, 9, 2, 8], [0, 9, 2, 5], [0, 9, 2, 5]];
    assert!(call(PerformerConfig::softmax(), empty, None).is_none());
}

#[test]
fn of_no_keys_nothing_is_the_mean() {
    for config in [PerformerConfig::softmax(), PerformerConfig::relu()] {
        let p = Problem::new(config, [2, 3, 0, 2, 4, 5, 6], 31);
        let [sq, sk, sv, so] = p.shapes();
        for isa in isas() {
            let (rt, mut dq, dout) = (runtime(isa), vec![f32::NAN; p.q.len()], vec![1.0; 60]);
            let zeros = |x: &[f32]| x.iter().all(|x| *x == 0.0);
            assert!(zeros(&p.run_as::<f32>(&rt, ORDERS[0])), "{config:?} on {isa}");
            let part = |x, shape| View::new(x, shape).expect("a tensor");
            let (q, k, v) = (part(&p.q, sq), part(&p.k, sk), part(&p.v, sv));
            let inputs = Inputs { q, k, v, state: None, dout: part(&dout, so) };
            let (mut dk, mut dv) = ([], []);
            let grads = Gradients {
                q: ViewMut::new(&mut dq, sq).expect("a tensor"),
                k: ViewMut::new(&mut dk, sk).expect("a tensor"),
                v: ViewMut::new(&mut dv, sv).expect("a tensor"),
                state: None,
            };
            p.op().backward(&rt, inputs, grads).expect("a call");
            assert!(zeros(&dq), "gradient, {config:?} on {isa}");
        }
    }
}
