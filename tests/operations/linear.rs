//! The fast forms of linear attention against its definition in `f64`, on every instruction set.

use crate::support::{
    cases, heads_first, heads_first_mut, isas, normal, rel_err, runtime, same_bits, widen,
    with_threads,
};
use half::{bf16, f16};
use linattn::attention::Scale;
use linattn::attention::linear::naive::{self, Terms};
use linattn::attention::linear::{FeatureMap, LinearAttention, LinearState};
use linattn::tensor::{Element, Rng, View, ViewMut};
use linattn::{Error, Runtime};
use proptest::prelude::*;

/// Relative L2 distance of a correct `f32` form from the definition.
const F32: f64 = 3e-6;
const MAPS: [FeatureMap; 4] =
    [FeatureMap::Identity, FeatureMap::Elu1, FeatureMap::Relu, FeatureMap::Silu];

/// Arguments of a call; tensors are contiguous `[batch, heads, len, dim]`.
#[derive(Clone, Debug)]
struct Problem {
    batch: usize,
    heads: usize,
    lq: usize,
    lk: usize,
    dk: usize,
    dv: usize,
    map: FeatureMap,
    causal: bool,
    eps: Option<f32>,
    scale: f32,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Contents of `S` and `z` at the beginning.
    start: Option<(Vec<f32>, Vec<f32>)>,
}

/// Output, `S` and `z`.
type Results<T> = [Vec<T>; 3];

impl Problem {
    /// `[batch, heads, lq, lk, dk, dv]`; causal if the lengths are to be the same.
    fn new([batch, heads, lq, lk, dk, dv]: [usize; 6], causal: bool, seed: u64) -> Self {
        let (mut rng, rows) = (Rng::new(seed), batch * heads);
        let start = normal(&mut rng, rows * dk * dv);
        let sum: Vec<f32> = normal(&mut rng, rows * dk).iter().map(|x| x.abs() + 0.1).collect();
        Self {
            batch,
            heads,
            lq,
            lk: if causal { lq } else { lk },
            dk,
            dv,
            map: FeatureMap::Elu1,
            causal,
            eps: Some(1e-6),
            scale: 1.0,
            q: normal(&mut rng, rows * lq * dk),
            k: normal(&mut rng, rows * if causal { lq } else { lk } * dk),
            v: normal(&mut rng, rows * if causal { lq } else { lk } * dv),
            start: Some((start, sum)),
        }
    }

    /// Without a normaliser where it may cross zero.
    fn with_map(self, map: FeatureMap) -> Self {
        let signed = matches!(map, FeatureMap::Identity | FeatureMap::Silu);
        Self { map, eps: if signed { None } else { Some(1e-6) }, ..self }
    }

    fn op(&self) -> LinearAttention {
        let op = LinearAttention::new(self.map).with_eps(self.eps).expect("eps");
        let op = op.with_scale(Scale::Value(self.scale)).expect("scale");
        if self.causal { op.causal() } else { op }
    }

    fn state_shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.dk, self.dv]
    }

    fn begin(&self) -> LinearState {
        let [b, h, dk, dv] = self.state_shape();
        let state = match &self.start {
            Some((kv, z)) => LinearState::from_slices(kv, z, self.state_shape(), 0),
            None => LinearState::new(b, h, dk, dv),
        };
        state.expect("a state")
    }

    fn naive(&self) -> Results<f64> {
        let Problem { dk, dv, lq, lk, .. } = *self;
        let start = self.begin();
        let (mut kv, mut z) = (widen(start.kv().as_slice().unwrap_or(&[])), widen(start.z()));
        let terms = Terms {
            map: self.map,
            causal: self.causal,
            eps: self.eps.map(f64::from),
            scale: f64::from(self.scale),
        };
        let mut out = Vec::new();
        for i in 0..self.batch * self.heads {
            let part = |x: &[f32], n: usize| widen(&x[i * n..][..n]);
            out.extend(naive::head(
                &part(&self.q, lq * dk),
                &part(&self.k, lk * dk),
                &part(&self.v, lk * dv),
                [lq, lk, dk, dv],
                terms,
                &mut kv[i * dk * dv..][..dk * dv],
                &mut z[i * dk..][..dk],
            ));
        }
        [out, kv, z]
    }

    /// Feeds rows in parts that end at `borders` (and at the end).
    fn run_parts<E: Element>(&self, rt: &Runtime, borders: &[usize]) -> Results<f32> {
        let Problem { batch, heads, lq, lk, dk, dv, .. } = *self;
        let round = |x: &[f32]| -> Vec<E> { x.iter().map(|x| E::from_f32(*x)).collect() };
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| round(x));
        let mut out = vec![E::from_f32(f32::NAN); batch * heads * lq * dv];
        let mut state = self.begin();
        let mut target = heads_first_mut(&mut out, [batch, heads, lq, dv]);
        let q = heads_first(&q, [batch, heads, lq, dk]);
        let k = heads_first(&k, [batch, heads, lk, dk]);
        let v = heads_first(&v, [batch, heads, lk, dv]);
        let mut from = 0;
        for to in borders.iter().copied().chain([lq]) {
            let [q, k, v] =
                if self.causal { [q, k, v].map(|x| x.slice(1, from, to)) } else { [q, k, v] };
            let out = target.reborrow();
            let out = if self.causal { out.slice(1, from, to) } else { out };
            self.op().forward(rt, q, k, v, out, Some(&mut state)).expect("valid arguments");
            from = to;
        }
        assert_eq!(state.len(), lk);
        let kv = state.kv().as_slice().unwrap_or(&[]).to_vec();
        [out.iter().map(|x| x.to_f32()).collect(), kv, state.z().to_vec()]
    }

    fn run(&self, rt: &Runtime) -> Results<f32> {
        self.run_parts::<f32>(rt, &[])
    }

    fn describe(&self) -> String {
        let Problem { batch, heads, lq, lk, dk, dv, map, causal, .. } = self;
        format!("[{batch}, {heads}], {lq} x {lk}, {dk} -> {dv}, {map:?}, causal: {causal}")
    }
}

#[track_caller]
fn agrees(p: &Problem, rt: &Runtime) {
    let (got, want) = (p.run(rt), p.naive());
    for (name, (got, want)) in ["out", "S", "z"].iter().zip(got.iter().zip(&want)) {
        let err = rel_err(got, want);
        assert!(err <= F32, "{} on {}: {name} off by {err:.2e}", p.describe(), rt.kernel());
    }
}

#[test]
fn shapes_of_real_models() {
    for isa in isas() {
        let rt = runtime(isa);
        for (dk, dv) in [(64, 64), (128, 128), (64, 96), (33, 40), (1, 1)] {
            // Four chunks and a tail; more than one segment of keys.
            agrees(&Problem::new([1, 2, 4 * 48 + 21, 0, dk, dv], true, 1), &rt);
            agrees(&Problem::new([1, 2, 100, 2021, dk, dv], false, 2), &rt);
        }
    }
}

#[test]
fn every_feature_map() {
    for isa in isas() {
        let rt = runtime(isa);
        for (lq, causal) in [(1, true), (3, true), (100, true), (100, false)] {
            for map in MAPS {
                let p = Problem::new([2, 2, lq, 200, 24, 36], causal, 3).with_map(map);
                agrees(&p, &rt);
                agrees(&Problem { eps: None, scale: -0.3, ..p.clone() }, &rt);
                let positive = matches!(map, FeatureMap::Elu1 | FeatureMap::Relu);
                if positive {
                    agrees(&Problem { eps: Some(0.5), scale: 0.3, ..p.clone() }, &rt);
                }
            }
        }
    }
}

#[test]
fn every_length_around_a_chunk() {
    for isa in isas() {
        let rt = runtime(isa);
        for len in (1..=9).chain([15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 95, 96, 97, 200]) {
            agrees(&Problem::new([2, 2, len, 0, 20, 12], true, len as u64), &rt);
            agrees(&Problem::new([2, 2, len, 13, 20, 12], false, len as u64), &rt);
            agrees(&Problem::new([2, 2, 13, len, 20, 12], false, len as u64), &rt);
        }
    }
}

#[test]
fn splitting_a_sequence_changes_nothing() {
    for isa in isas() {
        let rt = runtime(isa);
        let p = Problem::new([1, 2, 150, 0, 40, 56], true, 4);
        let want = p.run(&rt);
        let steps: Vec<usize> = (1..150).collect();
        for borders in [&[][..], &[1], &[48], &[50, 51, 53, 140], &steps] {
            let got = p.run_parts::<f32>(&rt, borders);
            for (got, want) in got.iter().zip(&want) {
                let err = rel_err(got, &widen(want));
                assert!(err <= 1e-6, "{isa}: {borders:?}: {err:.2e}");
            }
        }
    }
}

#[test]
fn without_a_state_sums_begin_at_zero() {
    for isa in isas() {
        let rt = runtime(isa);
        for (lq, causal) in [(2, true), (70, true), (70, false)] {
            let p = Problem { start: None, ..Problem::new([2, 3, lq, 80, 24, 40], causal, 5) };
            let shape = [2, 3, lq, 40];
            let mut out = vec![f32::NAN; shape.iter().product()];
            let op = p.op();
            op.forward(
                &rt,
                heads_first(&p.q, [2, 3, lq, 24]),
                heads_first(&p.k, [2, 3, p.lk, 24]),
                heads_first(&p.v, [2, 3, p.lk, 40]),
                heads_first_mut(&mut out, shape),
                None,
            )
            .expect("valid arguments");
            same_bits(&out, &p.run(&rt)[0], "no state");
        }
    }
}

#[test]
fn what_is_not_finite_reaches_only_later_rows() {
    for isa in isas() {
        let rt = runtime(isa);
        let (n, at) = (150, 61);
        let p = Problem::new([1, 2, n, 0, 32, 40], true, 6);
        let want = p.run(&rt);
        for poison in [f32::NAN, f32::INFINITY] {
            for arg in 0..3 {
                let mut p = p.clone();
                match arg {
                    0 => p.q[at * 32] = poison,
                    1 => p.k[at * 32] = poison,
                    _ => p.v[at * 40] = poison,
                }
                let [out, ..] = p.run(&rt);
                for (r, (got, want)) in out.chunks(40).zip(want[0].chunks(40)).enumerate() {
                    let clean = r < at || r >= n || arg == 0 && r != at;
                    if clean {
                        let err = rel_err(got, &widen(want));
                        assert!(err <= 1e-5, "{isa}: argument {arg}, row {r}: {err:.2e}");
                    } else if poison.is_nan() {
                        assert!(got[0].is_nan(), "{isa}: argument {arg}, row {r} hides a NaN");
                    }
                    if arg == 2 && r < n {
                        let err = rel_err(&got[1..], &widen(&want[1..]));
                        assert!(err <= 1e-5, "{isa}: other columns of row {r}: {err:.2e}");
                    }
                }
            }
        }
    }
}

#[test]
fn half_precision_tensors() {
    fn check<E: Element>(rt: &Runtime, lq: usize, causal: bool, unit: f64) {
        let mut p = Problem::new([2, 2, lq, 130, 24, 40], causal, 7);
        for x in [&mut p.q, &mut p.k, &mut p.v] {
            x.iter_mut().for_each(|x| *x = E::from_f32(*x).to_f32());
        }
        let (got, want) = (p.run_parts::<E>(rt, &[]), p.naive());
        let (name, err) = (E::DTYPE.name(), rel_err(&got[0], &want[0]));
        assert!(err <= unit, "{name} on {}: {err:.2e}", rt.kernel());
        let wide = p.run(rt);
        let rounded: Vec<f32> = wide[0].iter().map(|x| E::from_f32(*x).to_f32()).collect();
        same_bits(&got[0], &rounded, "the rounded f32 output");
        same_bits(&got[1], &wide[1], "S");
        same_bits(&got[2], &wide[2], "z");
    }
    for isa in isas() {
        let rt = runtime(isa);
        for (lq, causal) in [(1, true), (75, true), (75, false)] {
            check::<bf16>(&rt, lq, causal, 2f64.powi(-8));
            check::<f16>(&rt, lq, causal, 2f64.powi(-11));
        }
    }
}

#[test]
fn threads_do_not_matter() {
    for isa in isas() {
        for (dims, causal) in [
            ([1, 1, 700, 4000, 64, 64], false),
            ([1, 3, 300, 2500, 64, 40], false),
            ([5, 2, 300, 300, 64, 40], false),
            ([5, 3, 300, 0, 64, 40], true),
        ] {
            let p = Problem::new(dims, causal, 8);
            let want = p.run(&with_threads(isa, Some(1)));
            for threads in [2, 3, 4] {
                let got = p.run(&with_threads(isa, Some(threads)));
                for (got, want) in got.iter().zip(&want) {
                    same_bits(got, want, "threads");
                }
            }
        }
    }
}

#[test]
fn strides_do_not_matter() {
    for isa in isas() {
        let rt = runtime(isa);
        for causal in [true, false] {
            let (b, n, h, dk, dv) = (2, 60, 3, 20, 24);
            let p = Problem::new([b, h, n, n, dk, dv], causal, 9);
            let [want, ..] = p.run(&rt);
            // The same tensors as [batch, len, heads, dim] with gaps.
            let spread = |x: &[f32], d: usize| {
                let mut out = vec![f32::NAN; b * n * h * (d + 5)];
                for (r, row) in x.chunks(d).enumerate() {
                    let (i, j, t) = (r / n / h, r / n % h, r % n);
                    out[((i * n + t) * h + j) * (d + 5)..][..d].copy_from_slice(row);
                }
                out
            };
            let strides = |d: usize| [n * h * (d + 5), h * (d + 5), d + 5, 1];
            let [q, k, v] = [(&p.q, dk), (&p.k, dk), (&p.v, dv)].map(|(x, d)| spread(x, d));
            let view = |x, d| View::with_strides(x, [b, n, h, d], strides(d)).expect("a view");
            let mut out = vec![f32::NAN; b * n * h * (dv + 5)];
            let target = ViewMut::with_strides(&mut out, [b, n, h, dv], strides(dv));
            let (mut state, op) = (p.begin(), p.op());
            let [q, k, v] = [view(&q, dk), view(&k, dk), view(&v, dv)];
            op.forward(&rt, q, k, v, target.expect("a view"), Some(&mut state)).expect("valid");
            let want = spread(&want, dv);
            for (got, want) in out.iter().zip(&want) {
                assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan());
            }
        }
    }
}

#[test]
fn empty_shapes_are_fine() {
    let rt = Runtime::new().expect("a runtime");
    for dims in [
        [0, 2, 5, 5, 8, 8],
        [2, 0, 5, 5, 8, 8],
        [2, 2, 0, 5, 8, 8],
        [2, 2, 5, 0, 8, 8],
        [2, 2, 5, 5, 8, 0],
        [2, 2, 60, 60, 8, 0],
        [2, 2, 0, 0, 0, 0],
    ] {
        for causal in [false, true] {
            agrees(&Problem::new(dims, causal, 10), &rt);
        }
    }
    for causal in [false, true] {
        let p = Problem { start: None, ..Problem::new([1, 2, 5, 5, 0, 8], causal, 11) };
        assert!(p.run(&rt)[0].iter().all(|x| *x == 0.0));
    }
}

#[test]
fn refusals_name_the_argument() {
    let rt = Runtime::new().expect("a runtime");
    let data = vec![0.0f32; 4096];
    let view =
        |shape: [usize; 4]| View::new(&data[..shape.iter().product()], shape).expect("a view");
    let op = LinearAttention::new(FeatureMap::Elu1);
    let good = [[1, 3, 2, 8], [1, 5, 2, 8], [1, 5, 2, 6], [1, 3, 2, 6]];
    let refuse = |op: LinearAttention, change: usize, shape: [usize; 4], name: &str| {
        let mut shapes = good;
        shapes[change] = shape;
        let [q, k, v, o] = shapes;
        let mut out = vec![7.0f32; o.iter().product()];
        let mut state =
            LinearState::from_slices(&[3.0; 96], &[3.0; 16], [1, 2, 8, 6], 4).expect("a state");
        let target = ViewMut::new(&mut out, o).expect("a view");
        let got = op.forward(&rt, view(q), view(k), view(v), target, Some(&mut state));
        let Err(Error::Shape { op: "linear attention", arg, .. }) = got else {
            panic!("{shapes:?}: {got:?}")
        };
        assert_eq!(arg, name);
        assert!(out.iter().all(|x| *x == 7.0), "a refused call wrote");
        assert!(state.z().iter().all(|x| *x == 3.0) && state.len() == 4, "a refused call wrote");
    };
    refuse(op, 1, [1, 5, 3, 8], "k");
    refuse(op, 1, [2, 5, 2, 8], "k");
    refuse(op, 1, [1, 5, 2, 7], "k");
    refuse(op, 2, [1, 4, 2, 6], "v");
    refuse(op, 2, [1, 5, 2, 5], "out");
    refuse(op, 3, [1, 3, 2, 8], "out");
    refuse(op.causal(), 3, [1, 3, 2, 6], "k");
    let mut state = LinearState::new(1, 2, 8, 7).expect("a state");
    let mut out = vec![7.0f32; 36];
    let target = ViewMut::new(&mut out, good[3]).expect("a view");
    let got =
        op.forward(&rt, view(good[0]), view(good[1]), view(good[2]), target, Some(&mut state));
    assert!(matches!(got, Err(Error::Shape { arg: "state", .. })), "{got:?}");
    for eps in [f32::NAN, f32::INFINITY, -1e-6, 1e-40] {
        assert!(matches!(op.with_eps(Some(eps)), Err(Error::Value { arg: "eps", .. })));
    }
    for scale in [f32::NAN, f32::INFINITY] {
        let got = op.with_scale(Scale::Value(scale));
        assert!(matches!(got, Err(Error::Value { arg: "scale", .. })));
    }
}

#[test]
fn states_are_values() {
    let mut state =
        LinearState::from_slices(&[1.0; 24], &[1.0; 6], [1, 2, 3, 4], 9).expect("a state");
    assert_eq!((state.len(), state.bytes(), state.shape()), (9, 120, [1, 2, 3, 4]));
    let copy = state.clone();
    state.reset();
    assert!(state.is_empty() && state.z().iter().all(|x| *x == 0.0));
    assert!(copy.z().iter().all(|x| *x == 1.0));
    assert!(LinearState::from_slices(&[1.0; 24], &[1.0; 5], [1, 2, 3, 4], 0).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases(80)) })]
    #[test]
    fn any_shape(
        batch in 1usize..3,
        heads in 1usize..4,
        lq in 1usize..200,
        lk in 0usize..400,
        dk in 1usize..70,
        dv in 1usize..70,
        map in 0usize..4,
        causal: bool,
        threads in 1usize..4,
        seed: u64,
    ) {
        let p = Problem::new([batch, heads, lq, lk, dk, dv], causal, seed).with_map(MAPS[map]);
        let want = p.naive();
        for isa in isas() {
            let rt = with_threads(isa, Some(threads));
            for (name, (got, want)) in ["out", "S", "z"].iter().zip(p.run(&rt).iter().zip(&want)) {
                let err = rel_err(got, want);
                prop_assert!(err <= F32, "{}: {}: {name} off by {err:.2e}", rt.kernel(), p.describe());
            }
        }
    }
}
