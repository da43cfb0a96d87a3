//! Mixed chunk attention and quadratic attention without softmax against their definitions in `f64`, and the laws
//! that they promise, on every instruction set.

use crate::support::{isas, normal, rel_err, runtime, same_bits, widen, with_threads};
use half::{bf16, f16};
use linattn::attention::mixed_chunk::{
    self, Bias, Factor, LinReduce, MixedChunkAttention, MixedChunkConfig, MixedChunkState,
    ScoreActivation,
};
use linattn::attention::quadratic::{self, QuadraticAttention};
use linattn::tensor::{Element, Rng, View, ViewMut};
use linattn::{Result, Runtime};

/// Relative L2 distance of a correct `f32` form from the definition.
const F32: f64 = 3e-6;
/// Of the same computation in another order.
const SPLIT: f64 = 1e-6;
const ACTS: [ScoreActivation; 2] = [ScoreActivation::Relu2, ScoreActivation::Laplace];

/// Arguments of mixed chunk attention; tensors are contiguous.
#[derive(Clone, Debug)]
struct Mixed {
    config: MixedChunkConfig,
    /// `[batch, n, s, e]`
    dims: [usize; 4],
    seed: u64,
    qk: [Vec<f32>; 4],
    v: Vec<f32>,
    /// A table, a matrix.
    bias: [Option<Vec<f32>>; 2],
    mask: Option<Vec<bool>>,
}

impl Mixed {
    fn new(config: MixedChunkConfig, dims: [usize; 4], seed: u64) -> Self {
        let ([batch, n, s, e], mut rng) = (dims, Rng::new(seed));
        let qk = [(); 4].map(|()| normal(&mut rng, batch * n * s));
        let v = normal(&mut rng, batch * n * e);
        Self { config, dims, seed, qk, v, bias: [None, None], mask: None }
    }

    /// Both kinds of bias.
    fn biased(mut self) -> Self {
        let (c, mut rng) = (self.config.chunk, Rng::new(self.seed + 1));
        self.bias = [Some(normal(&mut rng, 2 * c + 1)), Some(normal(&mut rng, c * c))];
        self
    }

    /// About a third of the keys hidden.
    fn masked(mut self) -> Self {
        let ([batch, n, ..], mut rng) = (self.dims, Rng::new(self.seed + 2));
        self.mask = Some((0..batch * n).map(|_| rng.below(3) > 0).collect());
        self
    }

    fn naive<E: Element>(&self) -> Vec<f64> {
        let ([batch, n, s, e], c) = (self.dims, self.config.chunk);
        let bias: Vec<f64> = match &self.bias {
            [Some(table), Some(matrix)] => (0..c * c)
                .map(|at| f64::from(table[c + at % c - at / c]) + f64::from(matrix[at]))
                .collect(),
            _ => Vec::new(),
        };
        let mut out = Vec::new();
        for i in 0..batch {
            let part = |x: &[f32], w: usize| -> Vec<f64> {
                x[i * n * w..][..n * w]
                    .iter()
                    .map(|x| f64::from(E::from_f32(*x).to_f32()))
                    .collect()
            };
            let qk = self.qk.each_ref().map(|x| part(x, s));
            let terms = mixed_chunk::naive::Terms {
                chunk: c,
                causal: self.config.causal,
                act: self.config.act,
                quad_scale: f64::from(self.config.quad_scale),
                lin_scale: f64::from(self.config.lin_scale.of(n)),
                reduce: self.config.lin_reduce,
                bias: &bias,
                mask: self.mask.as_ref().map_or(&[], |m| &m[i * n..][..n]),
            };
            let qk = qk.each_ref().map(Vec::as_slice);
            out.extend(mixed_chunk::naive::head(qk, &part(&self.v, e), [n, s, e], terms));
        }
        out
    }

    /// Feeds rows in parts that end at `borders` (and at the end).
    fn feed<E: Element>(
        &self,
        rt: &Runtime,
        borders: &[usize],
        mut state: Option<&mut MixedChunkState>,
    ) -> Vec<f32> {
        let ([batch, n, s, e], c) = (self.dims, self.config.chunk);
        let round = |x: &[f32]| -> Vec<E> { x.iter().map(|x| E::from_f32(*x)).collect() };
        let (qk, v) = (self.qk.each_ref().map(|x| round(x)), round(&self.v));
        let mut out = vec![E::from_f32(f32::NAN); batch * n * e];
        let op = MixedChunkAttention::new(self.config).expect("a configuration");
        let [table, matrix] = self.bias.each_ref().map(Option::as_deref);
        let matrix = matrix.map(|m| View::new(m, [c, c]).expect("a matrix"));
        let mask = self.mask.as_ref().map(|m| View::new(m, [batch, n]).expect("a mask"));
        let mut from = 0;
        for to in borders.iter().copied().chain([n]) {
            let qk = qk
                .each_ref()
                .map(|x| View::new(x, [batch, n, s]).expect("a tensor").slice(1, from, to));
            let v = View::new(&v, [batch, n, e]).expect("a tensor").slice(1, from, to);
            let out = ViewMut::new(&mut out, [batch, n, e]).expect("a tensor").slice(1, from, to);
            let key_mask = mask.map(|m| m.slice(1, from, to));
            let extra = mixed_chunk::Extra { key_mask, bias: Bias { table, matrix } };
            op.forward_with(rt, qk, v, out, extra, state.as_deref_mut()).expect("valid arguments");
            from = to;
        }
        out.iter().map(|x| x.to_f32()).collect()
    }

    fn state(&self) -> MixedChunkState {
        let [batch, _, s, e] = self.dims;
        MixedChunkState::new(batch, self.config.chunk, s, e).expect("a state")
    }

    #[track_caller]
    fn agrees_as<E: Element>(&self, rt: &Runtime, tolerance: f64) {
        let want = self.naive::<E>();
        let err = rel_err(&self.feed::<E>(rt, &[], None), &want);
        assert!(err <= tolerance, "{self} on {}: off by {err:.2e}", rt.kernel());
        if self.config.causal {
            let mut state = self.state();
            let err = rel_err(&self.feed::<E>(rt, &[], Some(&mut state)), &want);
            assert!(err <= tolerance, "{self} on {}, with a state: {err:.2e}", rt.kernel());
            assert_eq!(state.len(), self.dims[1]);
        }
    }

    #[track_caller]
    fn agrees(&self, rt: &Runtime) {
        self.agrees_as::<f32>(rt, F32);
    }
}

impl std::fmt::Display for Mixed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (bias, mask) = (self.bias[0].is_some(), self.mask.is_some());
        write!(f, "{:?}, {:?}, seed {}, ", self.config, self.dims, self.seed)?;
        write!(f, "bias {bias}, mask {mask}")
    }
}

/// All conventions for a chunk.
fn conventions(chunk: usize) -> Vec<MixedChunkConfig> {
    let mut all = Vec::new();
    for causal in [true, false] {
        all.extend([
            MixedChunkConfig::paper(chunk, causal),
            MixedChunkConfig::package(chunk, causal),
        ]);
    }
    let own = MixedChunkConfig::package(chunk, false);
    all.push(MixedChunkConfig { lin_reduce: LinReduce::OwnChunk, ..own });
    let odd = Factor::Value(-0.7);
    all.push(MixedChunkConfig {
        quad_scale: 0.3,
        lin_scale: odd,
        ..MixedChunkConfig::paper(chunk, true)
    });
    all
}

#[test]
fn shapes_of_real_models() {
    for isa in isas() {
        let rt = runtime(isa);
        for causal in [true, false] {
            // A chunk and a tail, more columns than one block.
            Mixed::new(MixedChunkConfig::package(256, causal), [1, 256 + 40, 128, 1536], 1)
                .agrees(&rt);
            let config = MixedChunkConfig::package(128, causal);
            Mixed::new(config, [2, 3 * 128 + 7, 64, 100], 2).biased().agrees(&rt);
            // More rows than scores are held for at a time.
            Mixed::new(MixedChunkConfig::paper(600, causal), [1, 1100, 16, 40], 3)
                .biased()
                .agrees(&rt);
        }
    }
}

#[test]
fn every_convention_and_every_length_around_a_chunk() {
    for isa in isas() {
        let rt = runtime(isa);
        for chunk in [1, 7, 16] {
            for config in conventions(chunk) {
                for (n, act) in
                    [1, 2, 5, 6, 7, 8, 13, 16, 17, 33, 50].into_iter().zip(ACTS.into_iter().cycle())
                {
                    let config = MixedChunkConfig { act, ..config };
                    let p = Mixed::new(config, [2, n, 5, 37], n as u64);
                    p.agrees(&rt);
                    p.clone().biased().agrees(&rt);
                    p.biased().masked().agrees(&rt);
                }
            }
        }
        // A chunk that nothing fills.
        Mixed::new(MixedChunkConfig::package(1 << 20, true), [1, 9, 4, 8], 4).feed::<f32>(
            &rt,
            &[],
            None,
        );
    }
}

#[test]
fn elements_of_half_size() {
    for isa in isas() {
        let rt = runtime(isa);
        for config in conventions(16) {
            let p = Mixed::new(config, [1, 41, 20, 72], 5).biased();
            p.agrees_as::<bf16>(&rt, F32 + 2f64.powi(-9));
            p.agrees_as::<f16>(&rt, F32 + 2f64.powi(-12));
            p.masked().agrees_as::<bf16>(&rt, F32 + 2f64.powi(-9));
        }
    }
}

#[test]
fn splitting_changes_nothing_but_rounding() {
    for isa in isas() {
        let (rt, mut rng) = (runtime(isa), Rng::new(6));
        for config in conventions(16).into_iter().filter(|c| c.causal) {
            for masked in [false, true] {
                let mut p = Mixed::new(config, [2, 75, 9, 40], 7).biased();
                if masked {
                    p = p.masked();
                }
                let mut whole = p.state();
                let want = widen(&p.feed::<f32>(&rt, &[], Some(&mut whole)));
                let sum = widen(whole.sum().expect("a sum").as_slice());
                // Token by token, at borders of chunks, and anywhere.
                let mut borders = vec![(1..75).collect::<Vec<_>>(), vec![16, 32, 48], vec![64]];
                borders.extend((0..6).map(|_| {
                    let mut b: Vec<_> = (0..1 + rng.below(5)).map(|_| rng.below(76)).collect();
                    b.sort_unstable();
                    b
                }));
                for borders in borders {
                    let mut state = p.state();
                    let got = p.feed::<f32>(&rt, &borders, Some(&mut state));
                    let err = rel_err(&got, &want)
                        .max(rel_err(state.sum().expect("a sum").as_slice(), &sum));
                    assert!(
                        err <= SPLIT,
                        "{p} on {}, split at {borders:?}: {err:.2e}",
                        rt.kernel()
                    );
                    assert_eq!((state.len(), state.pending()), (75, 75 % 16));
                }
            }
        }
    }
}

#[test]
fn a_state_is_a_value() {
    let rt = runtime(crate::support::best());
    let p = Mixed::new(MixedChunkConfig::paper(16, true), [1, 40, 8, 24], 8);
    let mut state = p.state();
    let bytes = state.bytes();
    let first = p.feed::<f32>(&rt, &[], Some(&mut state));
    let mut copy = state.clone();
    let again = p.feed::<f32>(&rt, &[], Some(&mut state));
    same_bits(&p.feed::<f32>(&rt, &[], Some(&mut copy)), &again, "a clone");
    state.reset();
    assert!(state.is_empty() && state.bytes() == bytes);
    same_bits(&p.feed::<f32>(&rt, &[], Some(&mut state)), &first, "after a reset");
}

#[test]
fn threads_change_no_bit() {
    for isa in isas() {
        for config in conventions(32) {
            for dims in [[1, 150, 40, 330], [3, 70, 40, 330]] {
                let p = Mixed::new(config, dims, 9).biased();
                let run = |threads| {
                    let (rt, mut state) = (with_threads(isa, Some(threads)), p.state());
                    match config.causal {
                        true => p.feed::<f32>(&rt, &[37], Some(&mut state)),
                        false => p.feed::<f32>(&rt, &[], None),
                    }
                };
                let want = run(1);
                for threads in [2, 3, 7] {
                    same_bits(&run(threads), &want, &format!("{p}, {threads} threads"));
                }
            }
        }
    }
}

#[test]
fn values_that_are_not_finite_stay_where_they_may_be_seen() {
    for isa in isas() {
        let rt = runtime(isa);
        let p = Mixed::new(MixedChunkConfig::package(32, true), [1, 100, 8, 300], 10);
        let want = p.feed::<f32>(&rt, &[], None);
        for (token, bad) in [(0, f32::NAN), (17, f32::INFINITY), (40, f32::NAN), (99, f32::NAN)] {
            let mut q = p.clone();
            q.v[token * 300 + 5] = bad;
            let got = q.feed::<f32>(&rt, &[], None);
            let err = rel_err(&got[..token * 300], &widen(&want[..token * 300]));
            assert!(err <= SPLIT, "{p}: rows before {token} are off by {err:.2e}");
            for threads in [1, 2, 3] {
                let again = q.feed::<f32>(&with_threads(isa, Some(threads)), &[], None);
                same_bits(&again, &got, &format!("{p}: {threads} threads"));
            }
            assert!(!got[token * 300 + 5].is_finite() || bad.is_infinite(), "row {token} sees it");
            // Hidden, it is never looked at.
            let mask = |p: &Mixed| Mixed {
                mask: Some((0..100).map(|t| t != token).collect()),
                ..p.clone()
            };
            q.qk.iter_mut().skip(1).step_by(2).for_each(|k| k[token * 8] = bad);
            let (got, want) =
                (mask(&q).feed::<f32>(&rt, &[], None), mask(&p).feed::<f32>(&rt, &[], None));
            same_bits(&got, &want, &format!("{p}: hidden at {token}"));
        }
    }
}

/// Arguments of quadratic attention.
#[derive(Clone, Debug)]
struct Quad {
    op: QuadraticAttention,
    terms: (bool, ScoreActivation, f64, f64),
    /// `[batch, lq, lk, s, e]`
    dims: [usize; 5],
    seed: u64,
    qkv: [Vec<f32>; 3],
    bias: [Option<Vec<f32>>; 2],
    mask: Option<Vec<bool>>,
}

impl Quad {
    fn new(dims: [usize; 5], causal: bool, act: ScoreActivation, scale: Factor, seed: u64) -> Self {
        let ([batch, lq, lk, s, e], mut rng) = (dims, Rng::new(seed));
        let op = QuadraticAttention::new(act, scale).expect("a factor");
        let op = op.with_bias_scale(Factor::Value(0.5)).expect("a factor");
        let scale = f64::from(scale.of(lk));
        Self {
            op: if causal { op.causal() } else { op },
            terms: (causal, act, scale, 0.5),
            dims,
            seed,
            qkv: [lq * s, lk * s, lk * e].map(|n| normal(&mut rng, batch * n)),
            bias: [None, None],
            mask: None,
        }
    }

    fn biased(mut self) -> Self {
        let ([_, lq, lk, ..], mut rng) = (self.dims, Rng::new(self.seed + 1));
        let rows = if self.terms.0 { lk } else { lq };
        let n = rows.max(lk);
        self.bias = [Some(normal(&mut rng, 2 * n + 1)), Some(normal(&mut rng, rows * lk))];
        self
    }

    fn masked(mut self) -> Self {
        let ([batch, _, lk, ..], mut rng) = (self.dims, Rng::new(self.seed + 2));
        self.mask = Some((0..batch * lk).map(|_| rng.below(3) > 0).collect());
        self
    }

    fn naive<E: Element>(&self) -> Vec<f64> {
        let [batch, lq, lk, s, e] = self.dims;
        let (causal, act, scale, bias_scale) = self.terms;
        let first = if causal { lk - lq } else { 0 };
        let bias: Vec<f64> = match &self.bias {
            [Some(table), Some(matrix)] => (0..lq * lk)
                .map(|at| (first + at / lk, at % lk))
                .map(|(i, j)| {
                    f64::from(table[table.len() / 2 + j - i]) + f64::from(matrix[i * lk + j])
                })
                .collect(),
            _ => Vec::new(),
        };
        let mut out = Vec::new();
        for i in 0..batch {
            let part = |x: &[f32], n: usize| -> Vec<f64> {
                x[i * n..][..n].iter().map(|x| f64::from(E::from_f32(*x).to_f32())).collect()
            };
            let [q, k, v] = &self.qkv;
            let mask = self.mask.as_ref().map_or(&[][..], |m| &m[i * lk..][..lk]);
            let terms =
                quadratic::naive::Terms { causal, act, scale, bias_scale, bias: &bias, mask };
            let (q, k, v) = (part(q, lq * s), part(k, lk * s), part(v, lk * e));
            out.extend(quadratic::naive::head(&q, &k, &v, [lq, lk, s, e], terms));
        }
        out
    }

    fn try_run<E: Element>(&self, rt: &Runtime, out: &mut [E]) -> Result<()> {
        let [batch, lq, lk, s, e] = self.dims;
        let [q, k, v] =
            self.qkv.each_ref().map(|x| -> Vec<E> { x.iter().map(|x| E::from_f32(*x)).collect() });
        let [table, matrix] = self.bias.each_ref().map(Option::as_deref);
        let matrix = matrix.map(|m| View::new(m, [m.len() / lk, lk]).expect("a matrix"));
        let extra = quadratic::Extra {
            key_mask: self.mask.as_ref().map(|m| View::new(m, [batch, lk]).expect("a mask")),
            bias: Bias { table, matrix },
        };
        let (q, k) = (View::new(&q, [batch, lq, s])?, View::new(&k, [batch, lk, s])?);
        let (v, out) = (View::new(&v, [batch, lk, e])?, ViewMut::new(out, [batch, lq, e])?);
        self.op.forward_with(rt, q, k, v, out, extra)
    }

    fn run<E: Element>(&self, rt: &Runtime) -> Vec<f32> {
        let [batch, lq, .., e] = self.dims;
        let mut out = vec![E::from_f32(f32::NAN); batch * lq * e];
        self.try_run(rt, &mut out).expect("valid arguments");
        out.iter().map(|x| x.to_f32()).collect()
    }

    #[track_caller]
    fn agrees_as<E: Element>(&self, rt: &Runtime, tolerance: f64) {
        let err = rel_err(&self.run::<E>(rt), &self.naive::<E>());
        let Self { dims, terms, seed, .. } = self;
        assert!(err <= tolerance, "{dims:?}, {terms:?}, seed {seed} on {}: {err:.2e}", rt.kernel());
    }
}

#[test]
fn quadratic_attention_is_its_definition() {
    for isa in isas() {
        let rt = runtime(isa);
        for (causal, act) in [(true, ACTS[0]), (false, ACTS[0]), (true, ACTS[1]), (false, ACTS[1])]
        {
            let new = |dims, seed| Quad::new(dims, causal, act, Factor::InvLen, seed);
            // More keys than a block, more queries than one; a cache; single queries.
            for dims in [
                [1, 220, 700, 24, 72],
                [2, 97, 97, 16, 40],
                [1, 1, 1, 3, 5],
                [2, 1, 60, 9, 33],
                [1, 4, 530, 9, 33],
                [1, 5, 9, 8, 20],
            ] {
                let p = new(dims, 11);
                p.agrees_as::<f32>(&rt, F32);
                p.clone().biased().agrees_as::<f32>(&rt, F32);
                p.biased().masked().agrees_as::<f32>(&rt, F32);
            }
            let p = new([1, 100, 130, 20, 50], 12).biased();
            p.agrees_as::<bf16>(&rt, F32 + 2f64.powi(-9));
            p.agrees_as::<f16>(&rt, F32 + 2f64.powi(-12));
            new([1, 3, 130, 20, 50], 13).masked().agrees_as::<bf16>(&rt, F32 + 2f64.powi(-9));
        }
        Quad::new([1, 300, 300, 128, 768], true, ACTS[0], Factor::Value(0.01), 14)
            .agrees_as::<f32>(&rt, F32);
    }
}

#[test]
fn quadratic_attention_does_not_depend_on_threads_or_hidden_values() {
    for isa in isas() {
        for causal in [true, false] {
            let p = Quad::new([1, 400, 600, 16, 48], causal, ACTS[0], Factor::InvLen, 15).biased();
            let want = p.run::<f32>(&with_threads(isa, Some(1)));
            for threads in [2, 3, 5] {
                let got = p.run::<f32>(&with_threads(isa, Some(threads)));
                same_bits(&got, &want, &format!("causal {causal}, {threads} threads"));
            }
            let rt = runtime(isa);
            let mut q = p.clone();
            let hide = Some((0..600).map(|j| j != 250).collect());
            q.qkv[1][250 * 16] = f32::NAN;
            q.qkv[2][250 * 48 + 3] = f32::NAN;
            if causal {
                let (rows, got) = (50 * 48, q.run::<f32>(&rt));
                assert!(rel_err(&got[..rows], &widen(&want[..rows])) <= SPLIT, "rows before a NaN");
                for threads in [1, 2, 3] {
                    let again = q.run::<f32>(&with_threads(isa, Some(threads)));
                    same_bits(&again, &got, &format!("a NaN, {threads} threads"));
                }
            }
            q.mask = hide.clone();
            let p = Quad { mask: hide, ..p };
            same_bits(&q.run::<f32>(&rt), &p.run::<f32>(&rt), "a hidden NaN");
        }
    }
}
