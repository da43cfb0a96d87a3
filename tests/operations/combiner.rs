//! The fast forms of Combiner attention against the definition in `f64`, its laws, and what it refuses.

use crate::laid::{Laid, ORDERS, Order};
use crate::support::{bits, engines, isas, normal, rel_err, runtime, widen, with_threads};
use half::bf16;
use linattn::attention::combiner::{
    CombinerAttention, CombinerConfig, CombinerState, KeySummary, Pool, Variant, naive,
};
use linattn::attention::{Scale, StreamState};
use linattn::tensor::{Element, Rng, Tensor, View, ViewMut};
use linattn::{Error, Runtime};

/// Relative L2 distance of a correct `f32` form from the definition.
const F32: f64 = 3e-6;

/// Arguments of a call; tensors are contiguous `[batch, len, heads, dim]`.
struct Problem {
    config: CombinerConfig,
    qk: [usize; 4],
    vo: [usize; 4],
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Problem {
    /// `[batch, len, heads, dk, dv]`
    fn new(config: CombinerConfig, [batch, len, heads, dk, dv]: [usize; 5], seed: u64) -> Self {
        let (qk, vo) = ([batch, len, heads, dk], [batch, len, heads, dv]);
        let mut rng = Rng::new(seed);
        let mut make = |s: [usize; 4]| normal(&mut rng, s.iter().product());
        Self { config, qk, vo, q: make(qk), k: make(qk), v: make(vo) }
    }

    fn op(&self) -> CombinerAttention {
        CombinerAttention::new(self.config).expect("an operation")
    }

    fn run_as<E: Element>(&self, rt: &Runtime, order: Order) -> Vec<f32> {
        let laid = |x, s| Laid::<E>::new(x, s, order);
        let (q, k, v) = (laid(&self.q, self.qk), laid(&self.k, self.qk), laid(&self.v, self.vo));
        let mut out = laid(&vec![0.0; self.v.len()], self.vo);
        let op = self.op();
        op.forward(rt, q.view(), k.view(), v.view(), out.view_mut(), None).expect("a call");
        out.take()
    }

    fn run(&self, rt: &Runtime) -> Vec<f32> {
        self.run_as::<f32>(rt, Order::Whole)
    }

    fn run_parts(&self, rt: &Runtime, parts: &[usize]) -> (Vec<f32>, CombinerState) {
        let (op, [batch, _, heads, dk]) = (self.op(), self.qk);
        let mut state = op.new_state(batch, heads, dk, self.vo[3]).expect("a state");
        let mut out = vec![f32::NAN; self.v.len()];
        let view = |x, s| View::new(x, s).expect("a tensor");
        let (q, k, v) = (view(&self.q, self.qk), view(&self.k, self.qk), view(&self.v, self.vo));
        let mut at = 0;
        for n in parts {
            let [q, k, v] = [q, k, v].map(|x| x.slice(1, at, at + n));
            let part = ViewMut::new(&mut out, self.vo).expect("a tensor").slice(1, at, at + n);
            op.forward(rt, q, k, v, part, Some(&mut state)).expect("a part");
            at += n;
        }
        (out, state)
    }

    /// The definition, on elements rounded to `E`.
    fn want<E: Element>(&self) -> Vec<f64> {
        let ([batch, len, heads, dk], dv) = (self.qk, self.vo[3]);
        let mut out = vec![0.0; self.v.len()];
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let head = |x: &[f32], s: [usize; 4]| -> Vec<f64> {
                let view = View::new(x, s).expect("a tensor").head(b, h);
                let rows = (0..len).flat_map(|t| view.row([t, 0]));
                rows.map(|x| f64::from(E::from_f32(*x).to_f32())).collect()
            };
            let (q, k, v) =
                (head(&self.q, self.qk), head(&self.k, self.qk), head(&self.v, self.vo));
            let scale = f64::from(self.config.scale.of(dk));
            let rows = naive::head(&q, &k, &v, [len, dk, dv], scale, &self.config);
            for (t, row) in rows.chunks_exact(dv).enumerate() {
                out[((b * len + t) * heads + h) * dv..][..dv].copy_from_slice(row);
            }
        }
        out
    }
}

fn configs(segment: usize) -> [CombinerConfig; 9] {
    let fixed = CombinerConfig::fixed(segment);
    let rows = CombinerConfig::axial_row_major(segment);
    let sums = CombinerConfig { variant: Variant::AxialRowMajor(KeySummary::WeightedSum), ..rows };
    let scale = Scale::Value(0.3);
    [
        fixed.causal(),
        fixed,
        CombinerConfig { pool: Pool::Mean, scale, ..fixed.causal() },
        CombinerConfig { pool: Pool::ReluMax, ..fixed },
        rows.causal(),
        rows,
        sums.causal(),
        CombinerConfig { scale, ..sums },
        CombinerConfig::axial_mixture(segment),
    ]
}

#[test]
fn fast_forms_equal_the_definition() {
    for engine in engines() {
        let rt = engine.runtime();
        let tolerance = engine.bound(F32, false);
        for (segment, len) in
            [(1, 5), (5, 1), (5, 5), (5, 23), (6, 24), (9, 80), (60, 70), (100, 9)]
        {
            for config in configs(segment) {
                let p = Problem::new(config, [2, len, 2, 8, 12], (100 * segment + len) as u64);
                let err = rel_err(&p.run(&rt), &p.want::<f32>());
                assert!(err <= tolerance, "{} {config:?} {len}: {err:e}", rt.kernel());
            }
        }
    }
}

#[test]
fn blocks_of_keys_and_queries_join() {
    for engine in engines() {
        let rt = engine.runtime();
        // More than a block of queries and of keys in a segment; more segments than a block of keys.
        for config in [
            CombinerConfig::fixed(150).causal(),
            CombinerConfig::fixed(2).causal(),
            CombinerConfig::axial_row_major(140).causal(),
            CombinerConfig::axial_row_major(2),
            CombinerConfig::axial_mixture(55),
        ] {
            let p = Problem::new(config, [1, 300, 1, 16, 8], 11);
            let err = rel_err(&p.run(&rt), &p.want::<f32>());
            let tolerance = engine.bound(F32, false);
            assert!(err <= tolerance, "{} {config:?}: {err:e}", rt.kernel());
        }
    }
}

#[test]
fn views_and_elements_of_any_kind_are_read() {
    for isa in isas() {
        let rt = runtime(isa);
        for config in configs(7) {
            let p = Problem::new(config, [2, 40, 3, 8, 12], 4);
            let plain = p.run(&rt);
            for order in ORDERS {
                assert_eq!(bits(&p.run_as::<f32>(&rt, order)), bits(&plain), "{isa} {config:?}");
            }
            let err = rel_err(&p.run_as::<bf16>(&rt, Order::Columns), &p.want::<bf16>());
            assert!(err <= 3e-3, "{isa} {config:?} bf16: {err:e}");
        }
    }
}

#[test]
fn a_sequence_may_be_split_anywhere() {
    for isa in isas() {
        let rt = runtime(isa);
        for config in [configs(10)[0], configs(10)[2], configs(64)[0], configs(1)[0]] {
            let p = Problem::new(config, [2, 101, 2, 8, 12], 5);
            let (whole, state) = p.run_parts(&rt, &[101]);
            let err = rel_err(&whole, &p.want::<f32>());
            assert!(err <= F32, "{isa} {config:?}: {err:e}");
            for parts in [vec![1; 101], vec![0, 50, 1, 50, 0], vec![9, 12, 80], vec![100, 1]] {
                let (out, last) = p.run_parts(&rt, &parts);
                let err = rel_err(&out, &widen(&whole));
                assert!(err <= 2e-6, "{isa} {config:?} {parts:?}: {err:e}");
                assert_eq!((last.len(), last.bytes()), (101, state.bytes()));
            }
        }
    }
}

#[test]
fn a_state_that_was_reset_or_copied_is_as_good_as_new() {
    let (rt, p) =
        (runtime(crate::support::best()), Problem::new(configs(10)[0], [1, 45, 2, 8, 12], 6));
    let (first, mut state) = p.run_parts(&rt, &[45]);
    let mut copy = state.blank(45).expect("a state");
    let mut pieces = Vec::new();
    let see = &mut |x: &[f32]| {
        pieces.push(x.to_vec());
        Ok(())
    };
    state.contents(see).expect("pieces");
    let mut pieces = pieces.into_iter();
    let fill = &mut |x: &mut [f32]| {
        x.copy_from_slice(&pieces.next().expect("a piece"));
        Ok(())
    };
    copy.contents_mut(fill).expect("pieces");
    let op = p.op();
    let [q, k] = [&p.q, &p.k].map(|x| View::new(x, p.qk).expect("a tensor"));
    let v = View::new(&p.v, p.vo).expect("a tensor");
    let run = |state: &mut CombinerState| {
        let mut out = vec![f32::NAN; p.v.len()];
        let to = ViewMut::new(&mut out, p.vo).expect("a tensor");
        op.forward(&rt, q, k, v, to, Some(state)).expect("a call");
        out
    };
    assert_eq!(bits(&run(&mut copy)), bits(&run(&mut state.clone())));
    state.reset();
    assert_eq!(bits(&run(&mut state)), bits(&first));
}

#[test]
fn threads_change_nothing() {
    for isa in isas() {
        for config in configs(20) {
            let p = Problem::new(config, [2, 150, 3, 16, 24], 6);
            let [a, b] = [1, 4].map(|n| p.run(&with_threads(isa, Some(n))));
            assert_eq!(bits(&a), bits(&b), "{isa} {config:?}");
        }
    }
}

#[test]
fn later_tokens_do_not_reach_earlier_ones() {
    for isa in isas() {
        let rt = runtime(isa);
        for config in configs(10).into_iter().filter(|c| c.causal) {
            let p = Problem::new(config, [1, 75, 1, 8, 8], 7);
            let mut later = Problem::new(config, [1, 75, 1, 8, 8], 7);
            for t in 53..75 {
                later.v[t * 8] = f32::NAN;
                later.k[t * 8] = f32::INFINITY;
                later.q[t * 8] = f32::NAN;
            }
            let (a, b) = (p.run(&rt), later.run(&rt));
            let err = rel_err(&b[..53 * 8], &widen(&a[..53 * 8]));
            assert!(err <= 1e-6, "{isa} {config:?}: {err:e}");
        }
    }
}

#[test]
fn bad_arguments_are_refused() {
    let value = |e: Option<Error>, name: &str| {
        assert!(matches!(&e, Some(Error::Value { arg, .. }) if *arg == name), "{name}: {e:?}");
    };
    let build = |c| CombinerAttention::new(c).err();
    value(build(CombinerConfig::fixed(0)), "segment");
    let mixture = CombinerConfig::axial_mixture(4);
    value(build(CombinerConfig { causal: false, ..mixture }), "causal");
    value(build(CombinerConfig { pool: Pool::Mean, ..mixture }), "pool");
    let scale = Scale::Value(f32::NAN);
    value(build(CombinerConfig { scale, ..CombinerConfig::fixed(4) }), "scale");

    let rt = runtime(crate::support::best());
    let call = |config, shapes: [[usize; 4]; 4], state: Option<&mut CombinerState>| {
        let op = CombinerAttention::new(config).expect("an operation");
        let x = |s: [usize; 4]| Tensor::<4>::zeros(s).expect("a tensor");
        let [q, k, v, mut out] = shapes.map(x);
        out.as_mut_slice().fill(7.0);
        let got = op.forward(&rt, q.view(), k.view(), v.view(), out.view_mut(), state);
        let touched = out.as_slice().iter().any(|x| *x != 7.0);
        assert_eq!(touched, got.is_ok() && !out.as_slice().is_empty());
        got.err()
    };
    let good = [[2, 9, 2, 8], [2, 9, 2, 8], [2, 9, 2, 5], [2, 9, 2, 5]];
    let causal = CombinerConfig::fixed(4).causal();
    assert!(call(causal, good, None).is_none());
    for (which, shape, name) in [
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
    let narrow = [[2, 9, 2, 0], [2, 9, 2, 0], [2, 9, 2, 5], [2, 9, 2, 5]];
    assert!(matches!(call(causal, narrow, None), Some(Error::Shape { arg: "q", .. })));
    let op = CombinerAttention::new(causal).expect("an operation");
    let mut state = op.new_state(2, 2, 8, 5).expect("a state");
    value(call(CombinerConfig::fixed(4), good, Some(&mut state)), "state");
    let other = CombinerConfig::fixed(5).causal();
    let e = call(other, good, Some(&mut state));
    assert!(matches!(e, Some(Error::Shape { arg: "state", .. })));
    assert!(state.is_empty());
    let full = CombinerAttention::new(mixture).expect("an operation");
    value(full.new_state(1, 1, 4, 4).err(), "state");
    for empty in [[0, 9, 2, 8], [2, 0, 2, 8], [2, 9, 0, 8]] {
        let [b, n, h, _] = empty;
        assert!(call(causal, [empty, empty, [b, n, h, 5], [b, n, h, 5]], None).is_none());
    }
}
