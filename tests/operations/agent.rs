//! Agent attention against its definition in `f64`, on every engine.

use crate::laid::{Laid, ORDERS, Order};
use crate::support::{
    best, cases, engines, isas, normal, rel_err, runtime, same_bits, widen, with_threads,
};
use half::{bf16, f16};
use linattn::attention::Scale;
use linattn::attention::agent::{AgentAttention, AgentExtra, naive};
use linattn::tensor::{Element, Rng, View, ViewMut};
use linattn::{Error, Runtime};
use proptest::prelude::*;

/// Relative L2 distance of a correct `f32` form from the definition.
const F32: f64 = 3e-6;

/// Arguments of a call; tensors are contiguous `[batch, len, heads, dim]`.
#[derive(Clone, Debug)]
struct Problem {
    batch: usize,
    heads: usize,
    lq: usize,
    lk: usize,
    n: usize,
    dk: usize,
    dv: usize,
    scales: [Scale; 2],
    k_shortcut: f32,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    agents: Vec<f32>,
    agent_bias: Option<Vec<f32>>,
    query_bias: Option<Vec<f32>>,
    key_mask: Option<Vec<bool>>,
}

impl Problem {
    /// `[batch, heads, lq, lk, n, dk, dv]`
    fn new([batch, heads, lq, lk, n, dk, dv]: [usize; 7], seed: u64) -> Self {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let mut tensor = |len: usize, dim: usize| normal(&mut rng, batch * heads * len * dim);
        let (q, k, v, agents) = (tensor(lq, dk), tensor(lk, dk), tensor(lk, dv), tensor(n, dk));
        Self {
            batch,
            heads,
            lq,
            lk,
            n,
            dk,
            dv,
            scales: [Scale::InvSqrtDim; 2],
            k_shortcut: 0.0,
            q,
            k,
            v,
            agents,
            agent_bias: None,
            query_bias: None,
            key_mask: None,
        }
    }

    fn with_biases(mut self, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        self.agent_bias = Some(normal(&mut rng, self.heads * self.n * self.lk));
        self.query_bias = Some(normal(&mut rng, self.heads * self.lq * self.n));
        self
    }

    /// Some keys hidden, all of them in the last batch row.
    fn with_key_mask(mut self, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let last = (self.batch - 1) * self.lk;
        let mask = (0..self.batch * self.lk).map(|i| i < last && rng.uniform() < 0.6);
        self.key_mask = Some(mask.collect());
        self
    }

    fn shape(&self, len: usize, dim: usize) -> [usize; 4] {
        [self.batch, len, self.heads, dim]
    }

    fn rounded<E: Element>(mut self) -> Self {
        for x in [&mut self.q, &mut self.k, &mut self.v, &mut self.agents] {
            x.iter_mut().for_each(|x| *x = E::from_f32(*x).to_f32());
        }
        self
    }

    /// Output and values of the agents, tensors in some order of memory.
    fn run_as<E: Element>(&self, rt: &Runtime, order: Order) -> (Vec<f32>, Vec<f32>) {
        let laid = |x: &[f32], len, dim| Laid::<E>::new(x, self.shape(len, dim), order);
        let (q, k) = (laid(&self.q, self.lq, self.dk), laid(&self.k, self.lk, self.dk));
        let (v, a) = (laid(&self.v, self.lk, self.dv), laid(&self.agents, self.n, self.dk));
        let poison = vec![f32::NAN; self.batch * self.lq * self.heads * self.dv];
        let mut out = laid(&poison, self.lq, self.dv);
        let values = self.shape(self.n, self.dv);
        let mut own = vec![f32::NAN; values.iter().product()];
        let (h, b) = (self.heads, self.batch);
        fn bias(x: &Option<Vec<f32>>, shape: [usize; 3]) -> Option<View<'_, f32, 3>> {
            x.as_ref().map(|x| View::new(x, shape).expect("a bias"))
        }
        let extra = AgentExtra {
            agent_bias: bias(&self.agent_bias, [h, self.n, self.lk]),
            query_bias: bias(&self.query_bias, [h, self.lq, self.n]),
            key_mask: self.key_mask.as_ref().map(|m| View::new(m, [b, self.lk]).expect("a mask")),
            agent_values: Some(ViewMut::new(&mut own, values).expect("values")),
        };
        let op = AgentAttention::new().with_scales(self.scales[0], self.scales[1]);
        let op = op.and_then(|op| op.with_shortcut(self.k_shortcut)).expect("an operation");
        op.forward_with(rt, q.view(), k.view(), v.view(), a.view(), out.view_mut(), extra)
            .expect("a call");
        (out.take(), own)
    }

    fn run(&self, rt: &Runtime) -> Vec<f32> {
        self.run_as::<f32>(rt, Order::Whole).0
    }

    fn naive(&self) -> (Vec<f64>, Vec<f64>) {
        let Problem { batch, heads, lq, lk, n, dk, dv, .. } = *self;
        let (mut out, mut own) =
            (vec![0.0; batch * lq * heads * dv], vec![0.0; batch * n * heads * dv]);
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let at = |len: usize, t: usize, dim: usize| ((b * len + t) * heads + h) * dim;
            let head = |x: &[f32], len: usize, dim: usize| -> Vec<f64> {
                (0..len).flat_map(|t| widen(&x[at(len, t, dim)..][..dim])).collect()
            };
            let bias = |x: &Option<Vec<f32>>| {
                x.as_ref().map_or(vec![], |x| widen(&x[h * x.len() / heads..][..x.len() / heads]))
            };
            let (agent_bias, query_bias) = (bias(&self.agent_bias), bias(&self.query_bias));
            let terms = naive::Terms {
                scales: self.scales.map(|s| f64::from(s.of(dk))),
                k_shortcut: f64::from(self.k_shortcut),
                agent_bias: &agent_bias,
                query_bias: &query_bias,
            };
            let [q, k] = [(&self.q, lq), (&self.k, lk)].map(|(x, len)| head(x, len, dk));
            let (v, a) = (head(&self.v, lk, dv), head(&self.agents, n, dk));
            let seen = |j: usize| self.key_mask.as_ref().is_none_or(|m| m[b * lk + j]);
            let (o, va) = naive::head(&a, [&q, &k, &v], [lq, lk, n, dk, dv], terms, seen);
            for t in 0..lq {
                out[at(lq, t, dv)..][..dv].copy_from_slice(&o[t * dv..][..dv]);
            }
            for t in 0..n {
                own[at(n, t, dv)..][..dv].copy_from_slice(&va[t * dv..][..dv]);
            }
        }
        (out, own)
    }

    #[track_caller]
    fn agrees(&self, rt: &Runtime, most: f64) {
        let ((out, own), (want, values)) = (self.run_as::<f32>(rt, Order::Whole), self.naive());
        let (o, v) = (rel_err(&out, &want), rel_err(&own, &values));
        let Problem { batch, heads, lq, lk, n, dk, dv, .. } = self;
        let what = [batch, heads, lq, lk, n, dk, dv];
        assert!(o <= most && v <= most, "{what:?} on {}: {o:.2e}, {v:.2e}", rt.kernel());
    }
}

#[test]
fn shapes_of_real_models() {
    for engine in engines() {
        let (rt, most) = (engine.runtime(), engine.bound(F32, false));
        for size in [
            [1, 2, 784, 784, 49, 64, 64],
            [2, 3, 197, 197, 49, 64, 64],
            [4, 2, 49, 49, 9, 32, 32],
            [1, 1, 300, 300, 256, 40, 40],
        ] {
            Problem::new(size, 1).with_biases(2).agrees(&rt, most);
            Problem::new(size, 3).agrees(&rt, most);
        }
    }
}

#[test]
fn odd_sizes() {
    for isa in isas() {
        let rt = runtime(isa);
        for size in [
            [1, 2, 37, 101, 5, 24, 40],
            [2, 1, 1, 1, 1, 1, 1],
            [1, 3, 97, 193, 33, 7, 65],
            [2, 2, 95, 1, 17, 33, 3],
            [1, 1, 1, 200, 100, 130, 20],
            [1, 1, 20, 30, 4, 0, 5],
        ] {
            Problem::new(size, 4).agrees(&rt, F32);
            Problem::new(size, 5).with_biases(6).with_key_mask(7).agrees(&rt, F32);
            let mut p = Problem::new(size, 8);
            p.scales = [Scale::Value(0.3), Scale::Value(-0.7)];
            p.agrees(&rt, F32);
        }
        let mut p = Problem::new([2, 2, 120, 120, 12, 20, 20], 9).with_biases(10);
        (p.k_shortcut, p.scales[1]) = (0.075, Scale::Value(0.64));
        p.agrees(&rt, F32);
    }
}

#[test]
fn hidden_keys_are_not_looked_at() {
    for isa in isas() {
        let rt = runtime(isa);
        let p = Problem::new([3, 2, 60, 230, 9, 16, 24], 11).with_key_mask(12).with_biases(13);
        let want = p.run(&rt);
        let (mut q, mask) = (p.clone(), p.key_mask.clone().expect("a mask"));
        for (j, _) in mask.iter().enumerate().filter(|(_, seen)| !**seen) {
            q.k[j * 2 * 16..][..2 * 16].fill(f32::NAN);
            // Without any key that is seen, all values count.
            if j < 2 * 230 {
                q.v[j * 2 * 24..][..2 * 24].fill(f32::NAN);
            }
        }
        same_bits(&q.run(&rt), &want, "masked keys");
    }
}

#[test]
fn what_is_not_finite_stays_in_its_head_and_column() {
    for isa in isas() {
        let rt = runtime(isa);
        let p = Problem::new([2, 2, 130, 130, 9, 16, 24], 14);
        let want = p.run(&rt);
        for poison in [f32::NAN, f32::INFINITY] {
            // A value of batch row 0, head 1, column 3; then a query of token 100.
            let mut q = p.clone();
            q.v[(70 * 2 + 1) * 24 + 3] = poison;
            let out = q.run(&rt);
            for (i, (got, want)) in out.iter().zip(&want).enumerate() {
                let (column, head, batch) = (i % 24, i / 24 % 2, i / 24 / 2 / 130);
                if [batch, head, column] == [0, 1, 3] {
                    assert!(!got.is_finite(), "{isa}: {i} hides it");
                } else {
                    assert_eq!(got.to_bits(), want.to_bits(), "{isa}: {i}");
                }
            }
            let mut q = p.clone();
            q.q[(100 * 2 + 1) * 16] = poison;
            for (i, (got, want)) in q.run(&rt).iter().zip(&want).enumerate() {
                if i / 24 != 100 * 2 + 1 {
                    assert_eq!(got.to_bits(), want.to_bits(), "{isa}: {i}");
                }
            }
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    for isa in isas() {
        let mut p = Problem::new([1, 1, 150, 150, 9, 32, 32], 15);
        p.scales = [Scale::Value(1e4); 2];
        assert!(p.run(&runtime(isa)).iter().all(|x| x.is_finite()), "{isa}");
    }
}

#[test]
fn half_precision_tensors() {
    fn check<E: Element>(rt: &Runtime, unit: f64) {
        let p = Problem::new([2, 2, 150, 210, 9, 40, 24], 16).with_biases(17).with_key_mask(18);
        let p = p.rounded::<E>();
        let ((out, own), (want, values)) = (p.run_as::<E>(rt, Order::Whole), p.naive());
        let (o, v) = (rel_err(&out, &want), rel_err(&own, &values));
        assert!(o <= unit && v <= F32, "{} on {}: {o:.2e}, {v:.2e}", E::DTYPE.name(), rt.kernel());
        let wide: Vec<f32> = p.run(rt).iter().map(|x| E::from_f32(*x).to_f32()).collect();
        same_bits(&out, &wide, "the rounded f32 output");
    }
    for isa in isas() {
        let rt = runtime(isa);
        check::<bf16>(&rt, 2f64.powi(-8));
        check::<f16>(&rt, 2f64.powi(-11));
    }
}

#[test]
fn threads_and_strides_do_not_matter() {
    for isa in isas() {
        for size in [[1, 3, 600, 500, 49, 64, 64], [3, 2, 300, 200, 20, 40, 33]] {
            let mut p = Problem::new(size, 19).with_biases(20);
            p.k_shortcut = 0.0;
            let (want, values) = p.run_as::<f32>(&with_threads(isa, Some(1)), Order::Whole);
            for threads in [2, 3, 5] {
                let rt = with_threads(isa, Some(threads));
                let (out, own) = p.run_as::<f32>(&rt, Order::Whole);
                same_bits(&out, &want, "threads");
                same_bits(&own, &values, "threads");
            }
            for order in ORDERS {
                let (out, own) = p.run_as::<f32>(&runtime(isa), order);
                same_bits(&out, &want, "strides");
                same_bits(&own, &values, "strides");
            }
        }
    }
}

#[test]
fn empty_shapes_are_fine() {
    let rt = runtime(best());
    for size in [
        [0, 2, 3, 3, 2, 8, 8],
        [1, 0, 3, 3, 2, 8, 8],
        [1, 2, 0, 3, 2, 8, 8],
        [1, 2, 3, 0, 2, 8, 8],
        [1, 2, 3, 3, 0, 8, 8],
        [1, 2, 3, 3, 2, 8, 0],
    ] {
        let p = Problem::new(size, 21).with_biases(22);
        let (out, own) = p.run_as::<f32>(&rt, Order::Whole);
        if size[3] == 0 || size[4] == 0 {
            assert!(out.iter().chain(&own).all(|x| *x == 0.0), "{size:?}");
        }
    }
}

#[test]
fn memory_depends_on_no_length() {
    let rt = runtime(best());
    let need = AgentAttention::new().scratch_bytes(&rt, [1, 8, 49], 64, 64);
    // The scores of one head over 12544 keys alone would take more.
    assert!(need < (4 << 20) * rt.threads().max(1), "{need} bytes");
}

#[test]
fn refusals_name_the_argument() {
    let rt = runtime(best());
    let data = vec![0.0f32; 4096];
    let view = |s: [usize; 4]| View::new(&data[..s.iter().product()], s).expect("a view");
    let good = [[1, 3, 4, 8], [1, 5, 4, 8], [1, 5, 4, 6], [1, 2, 4, 8], [1, 3, 4, 6]];
    let call = |shapes: [[usize; 4]; 5], op: AgentAttention, extra: AgentExtra<'_>| {
        let [q, k, v, a, o] = shapes;
        let mut out = vec![7.0f32; o.iter().product()];
        let target = ViewMut::new(&mut out, o).expect("a view");
        let got = op.forward_with(&rt, view(q), view(k), view(v), view(a), target, extra);
        assert!(got.is_ok() || out.iter().all(|x| *x == 7.0), "a refused call wrote");
        got
    };
    #[track_caller]
    fn refused(got: Result<(), Error>, name: &str) {
        let Err(Error::Shape { op: "agent attention", arg, .. }) = got else { panic!("{got:?}") };
        assert_eq!(arg, name);
    }
    let plain = AgentAttention::new();
    call(good, plain, AgentExtra::default()).expect("a good call");
    for (which, shape, name) in [
        (1, [2, 5, 4, 8], "k"),
        (1, [1, 5, 3, 8], "k"),
        (1, [1, 5, 4, 7], "k"),
        (2, [1, 4, 4, 6], "v"),
        (3, [1, 2, 4, 6], "agents"),
        (3, [1, 2, 2, 8], "agents"),
        (4, [1, 3, 4, 8], "out"),
    ] {
        let mut shapes = good;
        shapes[which] = shape;
        refused(call(shapes, plain, AgentExtra::default()), name);
    }
    let three = |s: [usize; 3]| Some(View::new(&data[..s.iter().product()], s).expect("a bias"));
    let extra = AgentExtra { agent_bias: three([4, 5, 2]), ..AgentExtra::default() };
    refused(call(good, plain, extra), "agent_bias");
    let extra = AgentExtra { query_bias: three([4, 2, 3]), ..AgentExtra::default() };
    refused(call(good, plain, extra), "query_bias");
    let mask = [true; 3];
    let key_mask = Some(View::new(&mask, [1, 3]).expect("a mask"));
    refused(call(good, plain, AgentExtra { key_mask, ..AgentExtra::default() }), "key_mask");
    let mut own = [7.0; 2 * 4 * 8];
    let agent_values = Some(ViewMut::new(&mut own, [1, 2, 4, 8]).expect("values"));
    refused(
        call(good, plain, AgentExtra { agent_values, ..AgentExtra::default() }),
        "agent_values",
    );
    let shortcut = plain.with_shortcut(0.5).expect("a shortcut");
    refused(call(good, shortcut, AgentExtra::default()), "k");
    for bad in [f32::NAN, f32::INFINITY] {
        let got = plain.with_scales(Scale::One, Scale::Value(bad));
        assert!(matches!(got, Err(Error::Value { arg: "scale", .. })), "{got:?}");
        let got = plain.with_shortcut(bad);
        assert!(matches!(got, Err(Error::Value { arg: "k_shortcut", .. })), "{got:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases(40)) })]
    #[test]
    fn any_shape(
        batch in 1usize..3,
        heads in 1usize..4,
        lq in 0usize..250,
        lk in 0usize..250,
        n in 1usize..70,
        dk in 1usize..70,
        dv in 1usize..70,
        biased: bool,
        masked: bool,
        threads in 1usize..4,
        seed: u64,
    ) {
        let mut p = Problem::new([batch, heads, lq, lk, n, dk, dv], seed);
        if biased {
            p = p.with_biases(seed ^ 1);
        }
        if masked {
            p = p.with_key_mask(seed ^ 2);
        }
        for isa in isas() {
            p.agrees(&with_threads(isa, Some(threads)), F32);
        }
    }
}
