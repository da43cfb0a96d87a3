//! How far every engine is from the definitions in `f64`: on the inputs as they are, and on the inputs as the engine
//! stores them, which leaves the errors of its arithmetic.
//!
//! `LINATTN_WRITE_DOCS=1` writes the table of `docs/numerics.md`, on a machine that has every engine of it.

use crate::support::{Engine, engines, heads_first, heads_first_mut, normal};
use half::bf16;
use linattn::attention::lightning::naive as decayed;
use linattn::attention::linear::naive::{self as linear, Terms};
use linattn::attention::linear::{FeatureMap, LinearAttention};
use linattn::attention::softmax::{SoftmaxAttention, naive as softmax};
use linattn::attention::{Mask, Scale};
use linattn::kernels::gemm::{matmul, matmul_bytes};
use linattn::kernels::store::Store;
use linattn::scratch::Cut;
use linattn::simd::{Backend, Left, Order, Source, Task};
use linattn::tensor::{Rng, Tensor, ViewMut};
use linattn::{Isa, Precision, Runtime};

const SEED: u64 = 20_240;
const HEADS: usize = 2;
/// Four chunks of any engine that has chunks of 64, and a tail.
const LEN: usize = 4 * 64 + 37;
const EPS: f32 = 1e-6;
const DOC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/numerics.md");
const BEGIN: &str = "<!-- table: accuracy -->\n";
const END: &str = "<!-- end -->";

#[derive(Clone, Copy, Debug, PartialEq)]
enum Op {
    Product,
    Lightning,
    LinearCausal,
    LinearWhole,
    Softmax,
}

/// What is measured, and its sizes: `[m, k, n]` of a product, `[dk, dv]` of attention with [`LEN`] rows.
const ALL: [(Op, &str, &[[usize; 3]]); 5] = [
    (Op::Product, "product", &[[256, 256, 256], [293, 1000, 77], [37, 2048, 128]]),
    (Op::Lightning, "Lightning Attention", &[[0, 64, 64], [0, 128, 128]]),
    (Op::LinearCausal, "linear attention, causal", &[[0, 64, 64], [0, 128, 128]]),
    (Op::LinearWhole, "linear attention, not causal", &[[0, 64, 64], [0, 128, 128]]),
    (Op::Softmax, "softmax attention, causal", &[[0, 64, 64], [0, 128, 128]]),
];

/// How an engine stores operands: in `f32`, or in so many parts of `bf16`.
#[derive(Clone, Copy, Debug)]
enum Stored {
    Whole,
    Parts(usize),
}

impl Stored {
    /// As the products of an engine see a number.
    fn values(engine: Engine) -> Self {
        match engine.precision {
            Precision::Bf16 => Stored::Parts(1),
            Precision::Bf16x3 => Stored::Parts(2),
            _ => Stored::Whole,
        }
    }

    /// As those products see it that feed an exponential.
    fn scores(engine: Engine) -> Self {
        match engine.precision {
            Precision::Bf16 => Stored::Parts(2),
            _ => Stored::Whole,
        }
    }

    fn of(self, x: f64) -> f64 {
        let mut parts = 0.0;
        match self {
            Stored::Whole => return x,
            Stored::Parts(n) => (0..n).for_each(|_| {
                let rest = (x - parts) as f32;
                parts += bf16::from_f32(rest).to_f64();
            }),
        }
        parts
    }

    fn all(self, x: &[f32]) -> Vec<f64> {
        x.iter().map(|x| self.of(f64::from(*x))).collect()
    }
}

/// Tensors of one call, `[heads, len, dim]`; a product has `a` and `b`, `[m, k]` and `[k, n]`.
struct Problem {
    op: Op,
    size: [usize; 3],
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
}

impl Problem {
    fn new(op: Op, size: [usize; 3], rng: &mut Rng) -> Self {
        let [m, x, y] = size;
        let rows = HEADS * LEN;
        let [a, b, c] = match op {
            Op::Product => [m * x, x * y, 0],
            _ => [rows * x, rows * x, rows * y],
        };
        let [a, b, c] = [a, b, c].map(|n| normal(rng, n));
        Self { op, size, a, b, c }
    }

    fn run(&self, rt: &Runtime) -> Vec<f32> {
        let [m, dk, dv] = self.size;
        if self.op == Op::Product {
            let mut out = vec![f32::NAN; m * dv];
            rt.run(Run(self, &mut out));
            return out;
        }
        if self.op == Op::Lightning {
            let mut p = crate::problem::Problem::new([1, LEN, dk, dv], &[0.0; HEADS], 0);
            p.slopes = slopes().to_vec();
            [p.q, p.k] = [&self.a, &self.b].map(|x| tokens_first(x, dk));
            (p.v, p.state) = (tokens_first(&self.c, dv), vec![0.0; HEADS * dk * dv]);
            return heads_again(&p.run(rt).0, dv);
        }
        let mut out = vec![f32::NAN; HEADS * LEN * dv];
        let [q, k] = [&self.a, &self.b].map(|x| heads_first(x, [1, HEADS, LEN, dk]));
        let v = heads_first(&self.c, [1, HEADS, LEN, dv]);
        let to = heads_first_mut(&mut out, [1, HEADS, LEN, dv]);
        let done = match self.op {
            Op::Softmax => {
                let op = SoftmaxAttention::new().with_mask(Mask::Causal);
                let op = op.with_scale(Scale::InvSqrtDim).expect("a scale");
                op.forward(rt, q, k, v, to)
            }
            op => {
                let attention = LinearAttention::new(FeatureMap::Elu1);
                let attention = attention.with_eps(Some(EPS)).expect("eps");
                let causal = op == Op::LinearCausal;
                let attention = if causal { attention.causal() } else { attention };
                attention.forward(rt, q, k, v, to, None)
            }
        };
        done.expect("a good call");
        out
    }

    /// By definition, operands stored so.
    fn naive(&self, scores: Stored, values: Stored) -> Vec<f64> {
        let [m, dk, dv] = self.size;
        let (mut out, scale) = (Vec::new(), f64::from(Scale::InvSqrtDim.of(dk)));
        if self.op == Op::Product {
            let (a, b) = (values.all(&self.a), values.all(&self.b));
            for i in 0..m {
                let dot = |j| (0..dk).map(|p| a[i * dk + p] * b[p * dv + j]).sum::<f64>();
                out.extend((0..dv).map(dot));
            }
            return out;
        }
        for h in 0..HEADS {
            let [q, k] = [&self.a, &self.b].map(|x| &x[h * LEN * dk..][..LEN * dk]);
            let v = values.all(&self.c[h * LEN * dv..][..LEN * dv]);
            let mut state = vec![0.0; dk * dv];
            out.extend(match self.op {
                Op::Lightning => {
                    let (q, k) = (values.all(q), values.all(k));
                    decayed::head(&q, &k, &v, [dk, dv], slopes()[h], 1.0, &mut state)
                }
                Op::Softmax => {
                    // The queries are scaled before they are stored.
                    let q: Vec<_> = q.iter().map(|x| scores.of(f64::from(*x) * scale)).collect();
                    let seen = |i: usize, j: usize| j <= i;
                    let k = scores.all(k);
                    softmax::head(&q, &k, &v, &[], [LEN, LEN, dk, dv], 1.0, seen)
                }
                op => {
                    // Features are stored, not what they are features of.
                    let map = |x: &[f32]| -> Vec<f64> {
                        let features = x.iter().map(|x| FeatureMap::Elu1.at(f64::from(*x)));
                        features.map(|x| values.of(x)).collect()
                    };
                    let terms = Terms {
                        map: FeatureMap::Identity,
                        causal: op == Op::LinearCausal,
                        eps: Some(f64::from(EPS)),
                        scale: 1.0,
                    };
                    let size = [LEN, LEN, dk, dv];
                    linear::head(&map(q), &map(k), &v, size, terms, &mut state, &mut vec![0.0; dk])
                }
            });
        }
        out
    }

    /// What a correct result may be off by, on inputs as they are and as they are stored.
    fn bounds(&self, engine: Engine) -> [f64; 2] {
        let own = if matches!(engine.precision, Precision::F32) { 3e-6 } else { 1e-5 };
        let most = engine.tolerance(own, true);
        // Of stored operands, products are as exact as in `f32`; attention rounds what it forms on the way.
        [most, if self.op == Op::Product { own } else { most }]
    }
}

fn slopes() -> [f64; HEADS] {
    [0.01, 0.3]
}

/// `[heads, len, dim]` as `[len, heads, dim]`.
fn tokens_first(x: &[f32], d: usize) -> Vec<f32> {
    let row = |t: usize, h: usize| &x[(h * LEN + t) * d..][..d];
    (0..LEN).flat_map(|t| (0..HEADS).flat_map(move |h| row(t, h).to_vec())).collect()
}

/// And back.
fn heads_again(x: &[f32], d: usize) -> Vec<f32> {
    let row = |h: usize, t: usize| &x[(t * HEADS + h) * d..][..d];
    (0..HEADS).flat_map(|h| (0..LEN).flat_map(move |t| row(h, t).to_vec())).collect()
}

struct Run<'a>(&'a Problem, &'a mut [f32]);

impl Task for Run<'_> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let Run(p, out) = self;
        let [m, k, n] = p.size;
        let bytes = matmul_bytes::<B::T>(m, k, n);
        let mut words = Tensor::<1>::zeros([bytes / 4]).expect("scratch");
        let mut scratch = Cut::new(bytemuck::cast_slice_mut(words.as_mut_slice()));
        let store = Store::new(ViewMut::new(out, [m, n]).expect("an output"));
        let (left, right) = (Left::new(&p.a, Order::Rows(k)), Source::Rows(&p.b, n));
        matmul(b, b.tiles(), [m, k, n], left, right, store, &mut scratch);
    }
}

/// The error in the Euclidean norm, relative, and the largest one, in units of the root of the mean square.
fn errors(got: &[f32], want: &[f64]) -> [f64; 2] {
    let size: f64 = want.iter().map(|x| x * x).sum();
    let rms = (size / want.len() as f64).sqrt();
    let pairs = got.iter().zip(want);
    let largest = pairs.map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, f64::max);
    [crate::support::rel_err(got, want), largest / rms]
}

/// The largest element, in the same units.
fn peak(want: &[f64]) -> f64 {
    let size: f64 = want.iter().map(|x| x * x).sum();
    let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    largest / (size / want.len() as f64).sqrt()
}

/// A line of the table without its figures.
fn row(kernel: &str, what: &str) -> String {
    format!("| `{kernel}` | {what} |")
}

#[test]
fn engines_keep_their_bounds() {
    println!("seed {SEED}");
    let (mut table, mut faults) = (Vec::new(), String::new());
    let all = engines();
    for (op, what, sizes) in ALL {
        let mut rng = Rng::new(SEED);
        let problems: Vec<_> = sizes.iter().map(|s| Problem::new(op, *s, &mut rng)).collect();
        let exact: Vec<_> =
            problems.iter().map(|p| p.naive(Stored::Whole, Stored::Whole)).collect();
        for engine in &all {
            let (rt, mut worst) = (engine.runtime(), [[0.0f64; 2]; 2]);
            for (p, exact) in problems.iter().zip(&exact) {
                let got = p.run(&rt);
                let stored = p.naive(Stored::scores(*engine), Stored::values(*engine));
                for (i, want) in [exact, &stored].into_iter().enumerate() {
                    let [l2, largest] = errors(&got, want);
                    let most = p.bounds(*engine)[i];
                    if l2 > most || largest > most * peak(want) || !largest.is_finite() {
                        let place = (rt.kernel(), what, p.size, ["as they are", "as stored"][i]);
                        faults += &format!("{place:?}: {l2:.1e}, {largest:.1e} at most\n");
                    }
                    worst[i] = [worst[i][0].max(l2), worst[i][1].max(largest)];
                }
            }
            let [[a, b], [c, d]] = worst;
            let figures = format!(" {a:.1e} | {b:.1e} | {c:.1e} | {d:.1e} |");
            table.push((row(rt.kernel(), what), figures));
        }
    }
    for (row, figures) in &table {
        println!("{row}{figures}");
    }
    assert!(faults.is_empty(), "seed {SEED}:\n{faults}");
    let write = std::env::var_os("LINATTN_WRITE_DOCS").is_some_and(|x| x == "1");
    let whole = [Isa::Portable, Isa::Amx].iter().all(|isa| all.iter().any(|e| e.isa == *isa));
    assert!(whole || !write, "the table is of a machine with every engine");
    if whole {
        documented(&table, write);
    }
}

/// Writes the table, or compares its lines.
fn documented(table: &[(String, String)], write: bool) {
    let text = std::fs::read_to_string(DOC).expect("the document");
    let (before, rest) = text.split_once(BEGIN).expect("the beginning of the table");
    let (old, after) = rest.split_once(END).expect("the end of the table");
    if write {
        let mut new = String::from(
            "| engine | operation | exact inputs | largest | stored inputs | largest |\n\
             |---|---|---|---|---|---|\n",
        );
        table.iter().for_each(|(row, figures)| new += &format!("{row}{figures}\n"));
        std::fs::write(DOC, format!("{before}{BEGIN}{new}{END}{after}")).expect("a document");
        return;
    }
    let head = |line: &str| line.split_inclusive('|').take(3).collect::<String>();
    let old: Vec<_> = old.lines().skip(2).map(head).collect();
    let new: Vec<_> = table.iter().map(|(row, _)| row.clone()).collect();
    assert_eq!(old, new, "LINATTN_WRITE_DOCS=1 writes the table anew");
}
