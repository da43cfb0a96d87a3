//! Tensors of `bf16` and `f16` in and out of every operation: the result is that of the same call with the
//! numbers as `f32`, rounded once at the end, to the bit.

use crate::laid::{Laid, ORDERS, Order};
use crate::support::{isas, normal, same_bits, with_threads};
use half::{bf16, f16};
use linattn::Runtime;
use linattn::attention::Mask;
use linattn::attention::State;
use linattn::attention::lightning::LightningAttention;
use linattn::attention::linear::{FeatureMap, LinearAttention, LinearState};
use linattn::attention::softmax::{Extra, SoftmaxAttention};
use linattn::layers::Linear;
use linattn::tensor::{Element, Rng, View, ViewMut};

/// What is called.
#[derive(Clone, Debug)]
enum Op {
    /// The sequence in parts of these lengths, the state carried.
    Lightning(Vec<usize>),
    /// Sequences that end here.
    Packed(Vec<usize>),
    Linear {
        causal: bool,
        eps: Option<f32>,
        map: FeatureMap,
        parts: Vec<usize>,
    },
    Softmax {
        mask: Mask,
        key_mask: bool,
        bias: bool,
    },
}

/// A call and its arguments, contiguous.
struct Case {
    op: Op,
    seed: u64,
    /// `[batch, lq, lk, heads, kv_heads, dk, dv]`
    dims: [usize; 7],
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    fn new(op: Op, dims: [usize; 7], seed: u64) -> Self {
        let [b, lq, lk, h, kv, dk, dv] = dims;
        let mut rng = Rng::new(seed);
        let (q, k) = (normal(&mut rng, b * lq * h * dk), normal(&mut rng, b * lk * kv * dk));
        Self { op, seed, dims, q, k, v: normal(&mut rng, b * lk * kv * dv) }
    }

    fn rounded<E: Element>(&self) -> Self {
        let round = |x: &[f32]| x.iter().map(|x| E::from_f32(*x).to_f32()).collect();
        let (q, k, v) = (round(&self.q), round(&self.k), round(&self.v));
        Self { op: self.op.clone(), q, k, v, ..*self }
    }

    /// The output and what the operation remembers.
    fn run<E: Element>(&self, rt: &Runtime, order: Order) -> [Vec<f32>; 3] {
        let [b, lq, lk, h, kv, dk, dv] = self.dims;
        let q = Laid::<E>::new(&self.q, [b, lq, h, dk], order);
        let k = Laid::<E>::new(&self.k, [b, lk, kv, dk], order);
        let v = Laid::<E>::new(&self.v, [b, lk, kv, dv], order);
        let mut out = Laid::<E>::new(&[], [b, lq, h, dv], order);
        let (views, mut target) = ([q.view(), k.view(), v.view()], out.view_mut());
        // States, masks and biases are drawn anew for every run, the same each time.
        let mut rng = Rng::new(self.seed ^ 0x5eed);
        let slopes: Vec<f64> = (1..=h).map(|i| 0.3 / i as f64).collect();
        let lightning = || LightningAttention::new(&slopes).expect("slopes");
        let mut memory = [vec![], vec![]];
        match &self.op {
            Op::Lightning(parts) => {
                let start = normal(&mut rng, b * h * dk * dv);
                let mut state = State::from_slice(&start, [b, h, dk, dv], 0).expect("a state");
                for (from, to) in spans(parts) {
                    let [q, k, v] = views.map(|x| x.slice(1, from, to));
                    let out = target.reborrow().slice(1, from, to);
                    lightning().forward(rt, q, k, v, out, &mut state).expect("valid arguments");
                }
                memory[0] = state.view().as_slice().expect("a whole state").to_vec();
            }
            Op::Packed(ends) => {
                let (n, [q, k, v]) = (ends.len() - 1, views);
                let start = normal(&mut rng, n * h * dk * dv);
                let mut state = State::from_slice(&start, [n, h, dk, dv], 0).expect("a state");
                let op = lightning();
                op.forward_packed(rt, q, k, v, target, ends, &mut state).expect("valid arguments");
                memory[0] = state.view().as_slice().expect("a whole state").to_vec();
            }
            Op::Linear { causal, eps, map, parts } => {
                let op = LinearAttention::new(*map).with_eps(*eps).expect("eps");
                let op = if *causal { op.causal() } else { op };
                let kv_start = normal(&mut rng, b * h * dk * dv);
                let z: Vec<f32> = normal(&mut rng, b * h * dk).iter().map(|x| x.abs()).collect();
                let shape = [b, h, dk, dv];
                let mut state = LinearState::from_slices(&kv_start, &z, shape, 0).expect("sums");
                for (from, to) in spans(parts) {
                    let [q, k, v] =
                        if *causal { views.map(|x| x.slice(1, from, to)) } else { views };
                    let out = target.reborrow().slice(1, from, to);
                    let q = if *causal { q } else { q.slice(1, from, to) };
                    op.forward(rt, q, k, v, out, Some(&mut state)).expect("valid arguments");
                }
                let kv = state.kv().as_slice().expect("whole sums").to_vec();
                memory = [kv, state.z().to_vec()];
            }
            Op::Softmax { mask, key_mask, bias } => {
                let hidden: Vec<bool> = (0..b * lk).map(|_| rng.uniform() < 0.7).collect();
                let added = normal(&mut rng, h * lq * lk);
                let extra = Extra {
                    key_mask: key_mask.then(|| View::new(&hidden, [b, lk]).expect("a mask")),
                    bias: bias.then(|| View::new(&added, [h, lq, lk]).expect("a bias")),
                };
                let (op, [q, k, v]) = (SoftmaxAttention::new().with_mask(*mask), views);
                op.forward_with(rt, q, k, v, target, extra).expect("valid arguments");
            }
        }
        let [first, second] = memory;
        [out.take(), first, second]
    }
}

/// Parts of these lengths as ranges.
fn spans(parts: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    parts.iter().scan(0, |at, n| {
        *at += n;
        Some((*at - n, *at))
    })
}

/// Equal bits, or NaN both.
#[track_caller]
fn same_or_nan(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let same = g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan();
        assert!(same, "{what}: element {i}: {g:e} and {w:e}");
    }
}

/// One call as `E` and as `f32`, on every instruction set, in every order, with one thread and two.
#[track_caller]
fn check_as<E: Element>(case: &Case) {
    let case = case.rounded::<E>();
    for isa in isas() {
        for threads in [1, 2] {
            let rt = with_threads(isa, Some(threads));
            let [out, memory @ ..] = case.run::<f32>(&rt, Order::Whole);
            let finite = |x: &[f32]| x.iter().all(|x| x.is_finite());
            if [&case.q, &case.k, &case.v].iter().all(|x| finite(x)) {
                assert!(finite(&out), "{:?}: the f32 output", case.op);
            }
            let want: Vec<f32> = out.iter().map(|x| E::from_f32(*x).to_f32()).collect();
            for order in ORDERS {
                let what = format!(
                    "{} {:?} on {isa}, {:?}, {order:?}, threads {threads}, seed {}",
                    E::DTYPE.name(),
                    case.op,
                    case.dims,
                    case.seed
                );
                let [got, kept @ ..] = case.run::<E>(&rt, order);
                same_or_nan(&got, &want, &what);
                for (got, want) in kept.iter().zip(&memory) {
                    same_or_nan(got, want, &what);
                }
            }
        }
    }
}

#[track_caller]
fn check(case: &Case) {
    println!("{:?}, {:?}, seed {}", case.op, case.dims, case.seed);
    check_as::<bf16>(case);
    check_as::<f16>(case);
}

/// Widths of real heads and ones that fill no vector.
const WIDTHS: [[usize; 2]; 4] = [[64, 64], [64, 33], [7, 19], [33, 100]];

#[test]
fn lightning() {
    // Four chunks and a tail, the state carried over parts of every form.
    let n = 4 * 64 + 21;
    for (i, [dk, dv]) in WIDTHS.into_iter().enumerate() {
        for parts in [vec![n], vec![1, 1, 3, n - 5], vec![100, 64, n - 164]] {
            check(&Case::new(Op::Lightning(parts), [1, n, n, 3, 3, dk, dv], 100 + i as u64));
        }
        let short = Case::new(Op::Lightning(vec![1, 2]), [3, 3, 3, 2, 2, dk, dv], 110);
        check(&short);
    }
}

#[test]
fn lightning_packed() {
    let ends = vec![0, 0, 1, 4, 90, 90, 225, 277];
    for (i, [dk, dv]) in WIDTHS.into_iter().enumerate() {
        check(&Case::new(Op::Packed(ends.clone()), [1, 277, 277, 2, 2, dk, dv], 120 + i as u64));
    }
}

#[test]
fn linear() {
    let n = 4 * 48 + 21;
    for (i, [dk, dv]) in WIDTHS.into_iter().enumerate() {
        let seed = 130 + i as u64;
        for (eps, map) in [
            (Some(1e-6), FeatureMap::Elu1),
            (None, FeatureMap::Elu1),
            (Some(0.5), FeatureMap::Relu),
            (None, FeatureMap::Silu),
            (None, FeatureMap::Identity),
        ] {
            for parts in [vec![n], vec![1, 2, 60, n - 63]] {
                let op = Op::Linear { causal: true, eps, map, parts };
                check(&Case::new(op, [1, n, n, 3, 3, dk, dv], seed));
            }
            let op = Op::Linear { causal: false, eps, map, parts: vec![70] };
            check(&Case::new(op, [1, 70, n, 3, 3, dk, dv], seed));
        }
    }
}

#[test]
fn softmax() {
    for (i, [dk, dv]) in WIDTHS.into_iter().enumerate() {
        let seed = 140 + i as u64;
        for mask in [Mask::Full, Mask::CausalEnd] {
            for (lq, key_mask, bias) in
                [(1, false, false), (61, false, false), (61, true, false), (5, true, true)]
            {
                let op = Op::Softmax { mask, key_mask, bias };
                // More than two blocks of keys and a tail; six heads on two of keys.
                check(&Case::new(op, [2, lq, 277, 6, 2, dk, dv], seed));
            }
        }
    }
}

/// What is not finite or beyond the largest half number.
#[test]
fn special_numbers_stay_what_they_are() {
    let n = 150;
    let causal =
        |eps| Op::Linear { causal: true, eps, map: FeatureMap::Elu1, parts: vec![1, n - 1] };
    let ops = [
        (Op::Lightning(vec![1, n - 1]), true),
        (Op::Packed(vec![0, n]), true),
        (causal(Some(1e-6)), true),
        (causal(None), true),
        (Op::Softmax { mask: Mask::Causal, key_mask: false, bias: false }, true),
        (Op::Softmax { mask: Mask::Full, key_mask: false, bias: false }, false),
        (Op::Linear { causal: false, eps: None, map: FeatureMap::Elu1, parts: vec![n] }, false),
    ];
    fn visible<E: Element>(case: &Case, [at, n, dv]: [usize; 3], causal: bool) {
        for isa in isas() {
            let [out, ..] = case.run::<E>(&with_threads(isa, Some(1)), Order::Whole);
            for (t, row) in out.chunks(dv).enumerate().take(n) {
                let (name, op) = (E::DTYPE.name(), &case.op);
                let wrong = !causal || t >= at;
                assert_eq!(row[2].is_nan(), wrong, "{name} {op:?} on {isa}: row {t}");
                let others = row[..2].iter().chain(&row[3..]);
                assert!(others.clone().all(|x| x.is_finite()), "{name} {op:?} on {isa}: {t}");
            }
        }
    }
    for (op, causal) in ops {
        let dims = [1, n, n, 1, 1, 64, 40];
        let mut case = Case::new(op.clone(), dims, 150);
        // One NaN among the values: every row that sees it shows it, in that column alone.
        case.v[77 * 40 + 2] = f32::NAN;
        check(&case);
        visible::<bf16>(&case, [77, n, 40], causal);
        visible::<f16>(&case, [77, n, 40], causal);
        // A NaN in a query or a key.
        for arg in 0..2 {
            let mut case = Case::new(op.clone(), dims, 151 + arg);
            (if arg == 0 { &mut case.q } else { &mut case.k })[80 * 64] = f32::NAN;
            check(&case);
            for isa in isas() {
                let [out, ..] = case.run::<f16>(&with_threads(isa, Some(1)), Order::Whole);
                let row = &out[80 * 40..81 * 40];
                assert!(row.iter().all(|x| x.is_nan()), "{op:?} on {isa} hides a NaN");
            }
        }
        // Outputs beyond 65504 are infinite as f16, those of tiny values subnormal or zero.
        for (size, seed) in [(3e4, 153), (1e-6, 154), (1e-7, 155)] {
            let mut case = Case::new(op.clone(), dims, seed);
            case.v.iter_mut().for_each(|x| *x *= size);
            check(&case);
        }
        let mut case = Case::new(op, dims, 156);
        case.v[30 * 40] = f32::INFINITY;
        case.v[31 * 40 + 1] = f32::NEG_INFINITY;
        check(&case);
    }
}

/// The order of the sums of a call that is rounded to infinity.
#[test]
fn f16_overflows_to_infinity() {
    for isa in isas() {
        let mut case = Case::new(Op::Lightning(vec![60]), [1, 60, 60, 1, 1, 8, 40], 160);
        case.q.fill(1.0);
        case.k.fill(1.0);
        case.v.fill(6e4);
        case.v.chunks_mut(40).for_each(|row| row[7] = -6e4);
        let [out, ..] = case.run::<f16>(&with_threads(isa, Some(1)), Order::Columns);
        for (t, row) in out.chunks(40).enumerate() {
            for (c, x) in row.iter().enumerate() {
                let want = if c == 7 { f32::NEG_INFINITY } else { f32::INFINITY };
                assert_eq!(*x, want, "{isa}: row {t}, column {c}");
            }
        }
    }
}

/// Weights of a layer are packed as the numbers they are.
#[test]
fn weights_of_a_layer() {
    fn check<E: Element>(seed: u64) {
        let (rows, inputs, outputs) = (5, 37, 75);
        let mut rng = Rng::new(seed);
        let weight: Vec<E> =
            normal(&mut rng, inputs * outputs).into_iter().map(E::from_f32).collect();
        let wide: Vec<f32> = weight.iter().map(|x| x.to_f32()).collect();
        let (x, bias) = (normal(&mut rng, rows * inputs), normal(&mut rng, outputs));
        let shape = [outputs, inputs];
        let half = Linear::new(View::new(&weight, shape).expect("a weight"), Some(&bias));
        let full = Linear::new(View::new(&wide, shape).expect("a weight"), Some(&bias));
        for isa in isas() {
            let rt = with_threads(isa, Some(1));
            let mut out = [vec![f32::NAN; rows * outputs], vec![f32::NAN; rows * outputs]];
            for (layer, out) in [&half, &full].into_iter().zip(&mut out) {
                let layer = layer.as_ref().expect("a layer");
                let x = View::new(&x, [rows, inputs]).expect("an input");
                let out = ViewMut::new(out, [rows, outputs]).expect("an output");
                layer.forward(&rt, x, out).expect("valid arguments");
            }
            same_bits(&out[0], &out[1], &format!("{} on {isa}, seed {seed}", E::DTYPE.name()));
        }
    }
    check::<bf16>(170);
    check::<f16>(171);
}
