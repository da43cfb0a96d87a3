//! One value that is not finite: the bits of an output do not depend on the number of threads, and rows that
//! cannot see it stay what they are without it.

use crate::support::{isas, normal, with_threads};
use linattn::Runtime;
use linattn::attention::agent::AgentAttention;
use linattn::attention::combiner::{CombinerAttention, CombinerConfig};
use linattn::attention::focused::{FocusedConfig, FocusedLinearAttention};
use linattn::attention::lightning::LightningAttention;
use linattn::attention::linear::{FeatureMap, LinearAttention};
use linattn::attention::mixed_chunk::{MixedChunkAttention, MixedChunkConfig};
use linattn::attention::performer::{PerformerAttention, PerformerConfig};
use linattn::attention::quadratic::{Factor, QuadraticAttention, ScoreActivation};
use linattn::attention::softmax::SoftmaxAttention;
use linattn::attention::{Mask, State};
use linattn::tensor::{Rng, View, ViewMut};

#[derive(Clone, Copy, Debug)]
enum Op {
    Lightning,
    /// Causal or not, normalised or not.
    Linear(bool, bool),
    /// Causal or not.
    Softmax(bool),
    /// Causal or not.
    Performer(bool),
    /// Causal or not. One head.
    Quadratic(bool),
    /// Causal or not. One head.
    MixedChunk(bool),
    /// One of the factorisations.
    Combiner(fn(usize) -> CombinerConfig),
    Agent,
    Focused,
}

/// `[batch, len, heads, dk, dv]` and contiguous tensors.
#[derive(Clone)]
struct Case {
    dims: [usize; 5],
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    fn new(dims: [usize; 5], seed: u64) -> Self {
        let ([b, n, h, dk, dv], mut rng) = (dims, Rng::new(seed));
        let [q, k, v] = [dk, dk, dv].map(|d| normal(&mut rng, b * n * h * d));
        Self { dims, q, k, v }
    }

    fn run(&self, rt: &Runtime, op: Op) -> Vec<f32> {
        let [b, n, h, dk, dv] = self.dims;
        let mut data = vec![7.0; self.v.len()];
        let [q, k] = [&self.q, &self.k].map(|x| View::new(x, [b, n, h, dk]).expect("a tensor"));
        let v = View::new(&self.v, [b, n, h, dv]).expect("a tensor");
        let out = ViewMut::new(&mut data, [b, n, h, dv]).expect("a tensor");
        let done = match op {
            Op::Lightning => {
                let op = LightningAttention::new(&vec![0.01; h]).expect("slopes");
                let mut state = State::new(b, h, dk, dv).expect("a state");
                op.forward(rt, q, k, v, out, &mut state)
            }
            Op::Linear(causal, normalised) => {
                let op = LinearAttention::new(FeatureMap::Elu1);
                let op = op.with_eps(normalised.then_some(1e-6)).expect("eps");
                let op = if causal { op.causal() } else { op };
                op.forward(rt, q, k, v, out, None)
            }
            Op::Softmax(causal) => {
                let mask = if causal { Mask::Causal } else { Mask::Full };
                SoftmaxAttention::new().with_mask(mask).forward(rt, q, k, v, out)
            }
            Op::Performer(causal) => {
                let config = PerformerConfig::relu();
                let config = if causal { config.causal() } else { config };
                let projection = normal(&mut Rng::new(7), 40 * dk);
                let projection = View::new(&projection, [40, dk]).expect("a projection");
                let op = PerformerAttention::new(config, projection).expect("a projection");
                op.forward(rt, q, k, v, out, None)
            }
            Op::Quadratic(causal) => {
                let op = QuadraticAttention::new(ScoreActivation::Laplace, Factor::InvLen);
                let op = op.expect("a factor");
                let op = if causal { op.causal() } else { op };
                op.forward(rt, q.one_head(0), k.one_head(0), v.one_head(0), out.one_head(0))
            }
            Op::MixedChunk(causal) => {
                let op = MixedChunkAttention::new(MixedChunkConfig::package(64, causal));
                let (q, k) = (q.one_head(0), k.one_head(0));
                let (v, out) = (v.one_head(0), out.one_head(0));
                op.expect("a configuration").forward(rt, [q, k, q, k], v, out, None)
            }
            Op::Combiner(config) => {
                let op = CombinerAttention::new(config(16)).expect("a configuration");
                op.forward(rt, q, k, v, out, None)
            }
            Op::Agent => {
                let agents = normal(&mut Rng::new(7), b * 9 * h * dk);
                let agents = View::new(&agents, [b, 9, h, dk]).expect("a tensor");
                AgentAttention::new().forward(rt, q, k, v, agents, out)
            }
            Op::Focused => {
                let config = FocusedConfig { heads: h, ..FocusedConfig::default() };
                let op = FocusedLinearAttention::new(config, &vec![1.0; h * dk]);
                op.expect("a scale").forward(rt, q, k, v, out)
            }
        };
        done.expect("valid arguments");
        data
    }
}

fn sees(op: Op, row: usize, token: usize) -> bool {
    let causal = match op {
        Op::Lightning => true,
        Op::Linear(causal, _)
        | Op::Softmax(causal)
        | Op::Performer(causal)
        | Op::Quadratic(causal)
        | Op::MixedChunk(causal) => causal,
        Op::Combiner(config) => config(1).causal,
        Op::Agent | Op::Focused => false,
    };
    !causal || row >= token
}

/// The shape with as many heads as the operation has.
fn heads(op: Op, [b, n, h, dk, dv]: [usize; 5]) -> [usize; 5] {
    match op {
        Op::Quadratic(_) | Op::MixedChunk(_) => [b * h, n, 1, dk, dv],
        _ => [b, n, h, dk, dv],
    }
}

/// A NaN in a query reaches its own row, one in a key the rows that see it, and neither another head: those are the same
/// to the last bit.
#[track_caller]
fn check_queries_and_keys(op: Op) {
    for (seed, dims) in (300..).zip([[1, 70, 3, 20, 24], [2, 150, 2, 32, 40]]) {
        let dims @ [b, n, h, dk, dv] = heads(op, dims);
        println!("queries and keys of {op:?}, {dims:?}, seed {seed}");
        let clean = Case::new(dims, seed);
        for (isa, token) in isas().into_iter().flat_map(|i| [0, n / 2, n - 1].map(|t| (i, t))) {
            let rt = with_threads(isa, Some(2));
            let want = clean.run(&rt, op);
            for key in [false, true] {
                let (mut case, (batch, head)) = (clean.clone(), (b - 1, h / 2));
                let rows = if key { &mut case.k } else { &mut case.q };
                rows[((batch * n + token) * h + head) * dk + dk / 2] = f32::NAN;
                let out = case.run(&rt, op);
                for (r, (row, want)) in out.chunks(dv).zip(want.chunks(dv)).enumerate() {
                    // Focusing looks at the length of a row of all heads.
                    let one = matches!(op, Op::Focused) || r % h == head;
                    let (t, own) = (r / h % n, r / h / n == batch && one);
                    // Queries are pooled as keys are.
                    let as_key = key || matches!(op, Op::Combiner(_));
                    let reached = own && if as_key { sees(op, t, token) } else { t == token };
                    for (x, want) in row.iter().zip(want) {
                        let what = format!("{op:?} on {isa}, key: {key}, token {token}, row {r}");
                        let close = (x - want).abs() <= 1e-4 * (1.0 + want.abs().max(scale(op)));
                        assert!(reached || close, "{what}: {x}, {want} without it");
                        assert!(own || x.to_bits() == want.to_bits(), "{what}: another head");
                    }
                }
            }
        }
    }
}

/// Every place in turn, on every instruction set. The kinds of work that threads divide differ with the shape.
#[track_caller]
fn check(op: Op) {
    let shapes = [
        [1, 330, 1, 64, 96],
        [1, 330, 1, 64, 100],
        [1, 330, 2, 64, 72],
        [1, 250, 3, 48, 64],
        [2, 250, 2, 64, 40],
        [3, 200, 1, 64, 70],
        // More than two segments of keys.
        [1, 2021, 1, 32, 40],
    ];
    check_queries_and_keys(op);
    // Only those that go token by token where values are not finite have work of so many kinds.
    let every = matches!(op, Op::Lightning | Op::Linear(..) | Op::Softmax(_));
    let shapes = if every { &shapes[..] } else { &shapes[2..4] };
    for (seed, dims) in (200..).zip(shapes.iter().copied()) {
        let dims @ [b, n, h, dk, dv] = heads(op, dims);
        println!("{op:?}, [{b}, {n}, {h}, {dk}, {dv}], seed {seed}");
        let clean = Case::new(dims, seed);
        let places = [(0, 0), (n / 2, 0), (n / 2 + 7, dv / 2), (n - 3, dv - 1), (n - 1, dv / 3)];
        for isa in isas() {
            let rts = [1, 2, 3].map(|threads| with_threads(isa, Some(threads)));
            let want = clean.run(&rts[0], op);
            // Every value in some shape at every place.
            let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY]
                .into_iter()
                .cycle()
                .skip(seed as usize);
            for ((token, column), bad) in places.into_iter().zip(bad) {
                let (batch, head) = (b - 1, h / 2);
                let mut case = clean.clone();
                case.v[((batch * n + token) * h + head) * dv + column] = bad;
                let outs = rts.each_ref().map(|rt| case.run(rt, op));
                let what =
                    format!("{op:?} on {isa}, {dims:?}, seed {seed}: {bad} at {token}, {column}");
                for (i, want) in outs[0].iter().enumerate() {
                    for (threads, out) in (2..).zip(&outs[1..]) {
                        let same =
                            out[i].to_bits() == want.to_bits() || out[i].is_nan() && want.is_nan();
                        let (row, c) = (i / dv, i % dv);
                        assert!(
                            same,
                            "{what}: row {row}, column {c}: {} with {threads} threads, {want} with one",
                            out[i]
                        );
                    }
                }
                for (r, (row, want)) in outs[0].chunks(dv).zip(want.chunks(dv)).enumerate() {
                    let (t, own) = (r / h % n, r / h / n == batch && r % h == head);
                    let reached = own && sees(op, t, token);
                    for (c, (x, want)) in row.iter().zip(want).enumerate() {
                        if reached && c == column {
                            let shown = !bad.is_nan() || x.is_nan();
                            assert!(shown, "{what}: row {r} hides a NaN: {x}");
                            continue;
                        }
                        // A chunk with it goes token by token: sums of another order, not of other terms.
                        let close = (x - want).abs() <= 1e-4 * (1.0 + want.abs().max(scale(op)));
                        assert!(close, "{what}: row {r}, column {c}: {x}, {want} without it");
                    }
                }
            }
        }
    }
}

/// The size of terms that may cancel.
fn scale(op: Op) -> f32 {
    match op {
        Op::Lightning => 100.0,
        Op::Linear(_, false) => 1000.0,
        _ => 1.0,
    }
}

#[test]
fn lightning() {
    check(Op::Lightning);
}

#[test]
fn performer() {
    check(Op::Performer(true));
    check(Op::Performer(false));
}

#[test]
fn quadratic() {
    check(Op::Quadratic(true));
    check(Op::Quadratic(false));
}

#[test]
fn mixed_chunk() {
    check(Op::MixedChunk(true));
    check(Op::MixedChunk(false));
}

#[test]
fn combiner() {
    check(Op::Combiner(|span| CombinerConfig::fixed(span).causal()));
    check(Op::Combiner(|span| CombinerConfig::axial_row_major(span).causal()));
    check(Op::Combiner(CombinerConfig::axial_mixture));
}

#[test]
fn agent() {
    check(Op::Agent);
}

#[test]
fn focused() {
    check(Op::Focused);
}

#[test]
fn linear_causal() {
    check(Op::Linear(true, true));
    check(Op::Linear(true, false));
}

#[test]
fn linear_over_all_keys() {
    check(Op::Linear(false, true));
    check(Op::Linear(false, false));
}

#[test]
fn softmax_causal() {
    check(Op::Softmax(true));
}

#[test]
fn softmax_over_all_keys() {
    check(Op::Softmax(false));
}
