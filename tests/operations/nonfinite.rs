//! One value that is not finite: the bits of an output do not depend on the number of threads, and rows that
//! cannot see it stay what they are without it.

use crate::support::{isas, normal, with_threads};
use linattn::Runtime;
use linattn::attention::lightning::LightningAttention;
use linattn::attention::linear::{FeatureMap, LinearAttention};
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
        };
        done.expect("valid arguments");
        data
    }
}

fn sees(op: Op, row: usize, token: usize) -> bool {
    let causal = match op {
        Op::Lightning => true,
        Op::Linear(causal, _) | Op::Softmax(causal) => causal,
    };
    !causal || row >= token
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
    for (seed, dims) in (200..).zip(shapes) {
        let [b, n, h, dk, dv] = dims;
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
