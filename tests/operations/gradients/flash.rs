//! Mixed chunk attention and quadratic attention without softmax.

use super::difference::{agree, dot};
use crate::support::{engines, isas, normal, rel_err, runtime, same_bits, widen, with_threads};
use half::bf16;
use linattn::attention::mixed_chunk::{
    self, Bias, BiasGrads, Factor, LinReduce, MixedChunkAttention, MixedChunkConfig,
};
use linattn::attention::quadratic::{self, QuadraticAttention, ScoreActivation};
use linattn::tensor::{Element, Rng, View, ViewMut};
use linattn::{Error, Runtime};

/// Relative L2 distance of a correct `f32` form from the definition.
const F32: f64 = 3e-6;
const ACTS: [ScoreActivation; 2] = [ScoreActivation::Relu2, ScoreActivation::Laplace];

/// The sum of a table and a `rows x columns` matrix, as one matrix.
fn added(table: &[f32], matrix: &[f32], [rows, columns]: [usize; 2]) -> Vec<f64> {
    let entry = |at: usize| {
        let (i, j) = (at / columns, at % columns);
        f64::from(table[table.len() / 2 + j - i]) + f64::from(matrix[at])
    };
    (0..rows * columns).map(entry).collect()
}

/// The gradient of a table from that of a matrix.
fn diagonals(len: usize, matrix: &[f64], columns: usize) -> Vec<f64> {
    let mut out = vec![0.0; len];
    for (at, x) in matrix.iter().enumerate() {
        out[len / 2 + at % columns - at / columns] += x;
    }
    out
}

fn round<E: Element>(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(E::from_f32(*x).to_f32())).collect()
}

fn typed<E: Element>(x: &[f32]) -> Vec<E> {
    x.iter().map(|x| E::from_f32(*x)).collect()
}

fn back<E: Element>(x: Vec<E>) -> Vec<f32> {
    x.into_iter().map(|x| x.to_f32()).collect()
}

/// Arguments of mixed chunk attention; tensors are contiguous.
struct Mixed {
    config: MixedChunkConfig,
    /// `[batch, n, s, e]`
    dims: [usize; 4],
    /// Quadratic and linear queries and keys, values, and the gradient of the output.
    inputs: [Vec<f32>; 6],
    /// A table, a matrix.
    bias: Option<[Vec<f32>; 2]>,
    mask: Option<Vec<bool>>,
}

impl Mixed {
    fn new(config: MixedChunkConfig, dims: [usize; 4], seed: u64) -> Self {
        println!("seed {seed}");
        let ([batch, n, s, e], mut rng) = (dims, Rng::new(seed));
        let inputs = [s, s, s, s, e, e].map(|w| normal(&mut rng, batch * n * w));
        Self { config, dims, inputs, bias: None, mask: None }
    }

    fn biased(mut self, seed: u64) -> Self {
        let (c, mut rng) = (self.config.chunk, Rng::new(seed));
        self.bias = Some([2 * c + 1, c * c].map(|n| normal(&mut rng, n)));
        self
    }

    fn masked(mut self, seed: u64) -> Self {
        let ([batch, n, ..], mut rng) = (self.dims, Rng::new(seed));
        self.mask = Some((0..batch * n).map(|_| rng.below(3) > 0).collect());
        self
    }

    /// Gradients of the inputs, of the table and of the matrix.
    fn naive<E: Element>(&self) -> Vec<Vec<f64>> {
        let ([batch, n, s, e], c) = (self.dims, self.config.chunk);
        let bias = self.bias.as_ref().map(|[t, m]| added(t, m, [c, c])).unwrap_or_default();
        let mut grads = vec![Vec::new(); 5];
        let mut dbias = vec![0.0; c * c];
        for i in 0..batch {
            let part = |x: &[f32], w: usize| round::<E>(&x[i * n * w..][..n * w]);
            let [q, k, l, g, v, dout] = &self.inputs;
            let qk = [q, k, l, g].map(|x| part(x, s));
            let qk = qk.each_ref().map(Vec::as_slice);
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
            let (v, dout) = (part(v, e), part(dout, e));
            let (got, db) = mixed_chunk::naive::backward(qk, &v, &dout, [n, s, e], terms);
            grads.iter_mut().zip(got).for_each(|(to, x)| to.extend(x));
            dbias.iter_mut().zip(db).for_each(|(to, x)| *to += x);
        }
        if self.bias.is_some() {
            grads.push(diagonals(2 * c + 1, &dbias, c));
            grads.push(dbias);
        }
        grads
    }

    fn run<E: Element>(&self, rt: &Runtime) -> Vec<Vec<f32>> {
        let ([batch, n, s, e], c) = (self.dims, self.config.chunk);
        let inputs = self.inputs.each_ref().map(|x| typed::<E>(x));
        let widths = [s, s, s, s, e, e];
        let mut at = 0;
        let [q, k, l, g, v, dout] = inputs.each_ref().map(|x| {
            at += 1;
            View::new(x, [batch, n, widths[at - 1]]).expect("a tensor")
        });
        let nan = E::from_f32(f32::NAN);
        let mut grads = [0, 1, 2, 3, 4].map(|i| vec![nan; inputs[i].len()]);
        let mut at = 0;
        let views = grads.each_mut().map(|x| {
            at += 1;
            ViewMut::new(x, [batch, n, widths[at - 1]]).expect("a tensor")
        });
        let mut dbias = self.bias.as_ref().map(|b| b.each_ref().map(|x| vec![f32::NAN; x.len()]));
        let matrix = |x| View::new(x, [c, c]).expect("a matrix");
        let bias = self.bias.as_ref();
        let extra = mixed_chunk::Extra {
            key_mask: self.mask.as_ref().map(|m| View::new(m, [batch, n]).expect("a mask")),
            bias: Bias { table: bias.map(|b| &b[0][..]), matrix: bias.map(|b| matrix(&b[1])) },
        };
        let to = match dbias.as_mut() {
            None => BiasGrads::default(),
            Some([table, matrix]) => BiasGrads {
                table: Some(table),
                matrix: Some(ViewMut::new(matrix, [c, c]).expect("a matrix")),
            },
        };
        let op = MixedChunkAttention::new(self.config).expect("a configuration");
        let done = op.backward_with(rt, [q, k, l, g], v, dout, views, extra, to);
        done.expect("valid arguments");
        grads.into_iter().map(back).chain(dbias.into_iter().flatten()).collect()
    }

    #[track_caller]
    fn agrees_as<E: Element>(&self, rt: &Runtime, tolerance: f64) {
        for (i, (got, want)) in self.run::<E>(rt).iter().zip(&self.naive::<E>()).enumerate() {
            let (err, c) = (rel_err(got, want), self.config);
            assert!(err <= tolerance, "{i} of {c:?} {:?}, {}: {err:.2e}", self.dims, rt.kernel());
        }
    }
}

/// All that a configuration may ask for.
fn configs(chunk: usize) -> Vec<MixedChunkConfig> {
    let mut all = Vec::new();
    for act in ACTS {
        for causal in [false, true] {
            for base in
                [MixedChunkConfig::paper(chunk, causal), MixedChunkConfig::package(chunk, causal)]
            {
                all.push(MixedChunkConfig { act, ..base });
            }
        }
        let lin_reduce = LinReduce::OwnChunk;
        all.push(MixedChunkConfig { act, lin_reduce, ..MixedChunkConfig::package(chunk, false) });
    }
    all
}

#[test]
fn definitions_equal_differences() {
    let (n, s, e, chunk) = (7, 3, 2, 3);
    let mut rng = Rng::new(1);
    let lens = [n * s, n * s, n * s, n * s, n * e, chunk * chunk];
    let inputs = lens.map(|n| widen(&normal(&mut rng, n)));
    let dout = widen(&normal(&mut rng, n * e));
    let mask = [true, true, false, true, true, true, true];
    for c in configs(chunk) {
        let base = mixed_chunk::naive::Terms {
            chunk,
            causal: c.causal,
            act: c.act,
            quad_scale: 0.4,
            lin_scale: 0.3,
            reduce: c.lin_reduce,
            bias: &inputs[5],
            mask: &mask,
        };
        let [q, k, l, g, v, _] = inputs.each_ref().map(Vec::as_slice);
        let (sizes, qk) = ([n, s, e], [q, k, l, g]);
        let (got, dbias) = mixed_chunk::naive::backward(qk, v, &dout, sizes, base);
        let got: Vec<_> = got.into_iter().chain([dbias]).collect();
        agree(&got, &inputs, |x| {
            let qk = [x[0], x[1], x[2], x[3]];
            let terms = mixed_chunk::naive::Terms { bias: x[5], ..base };
            dot(&mixed_chunk::naive::head(qk, x[4], sizes, terms), &dout)
        });
    }
    let (lq, lk) = (3, 5);
    let inputs = [lq * s, lk * s, lk * e, lq * lk].map(|n| widen(&normal(&mut rng, n)));
    let dout = widen(&normal(&mut rng, lq * e));
    for (act, causal) in ACTS.into_iter().flat_map(|a| [(a, false), (a, true)]) {
        let (scale, bias_scale) = (0.4, 0.6);
        let base = quadratic::naive::Terms {
            causal,
            act,
            scale,
            bias_scale,
            bias: &inputs[3],
            mask: &mask[..lk],
        };
        let [q, k, v, _] = inputs.each_ref().map(Vec::as_slice);
        let sizes = [lq, lk, s, e];
        let got = quadratic::naive::backward([q, k, v], &dout, sizes, base);
        agree(&got, &inputs, |x| {
            let terms = quadratic::naive::Terms { bias: x[3], ..base };
            dot(&quadratic::naive::head(x[0], x[1], x[2], sizes, terms), &dout)
        });
    }
}

#[test]
fn mixed_chunks() {
    for engine in engines() {
        let (rt, tolerance) = (engine.runtime(), engine.bound(F32, true));
        for (i, c) in configs(16).into_iter().enumerate() {
            let seed = 10 * i as u64;
            Mixed::new(c, [1, 53, 9, 40], seed).agrees_as::<f32>(&rt, tolerance);
            let p = Mixed::new(c, [2, 37, 16, 21], seed + 1).biased(seed + 2);
            p.agrees_as::<f32>(&rt, tolerance);
            p.masked(seed + 3).agrees_as::<f32>(&rt, tolerance);
        }
        let c = MixedChunkConfig::package(128, true);
        Mixed::new(c, [1, 230, 17, 33], 90).agrees_as::<f32>(&rt, tolerance);
        Mixed::new(c, [1, 1, 17, 33], 91).agrees_as::<f32>(&rt, tolerance);
        let c = MixedChunkConfig::paper(1, true);
        Mixed::new(c, [1, 9, 5, 6], 92).agrees_as::<f32>(&rt, tolerance);
        let c = MixedChunkConfig::paper(16, false);
        Mixed::new(c, [2, 37, 8, 21], 93).masked(94).agrees_as::<bf16>(&rt, 1e-2);
    }
}

#[test]
fn threads_do_not_matter() {
    for engine in engines() {
        for bias in [false, true] {
            let mut p = Mixed::new(MixedChunkConfig::paper(64, true), [3, 200, 32, 96], 100);
            if bias {
                p = p.biased(101);
            }
            let want = p.run::<f32>(&engine.with_threads(Some(1)));
            for threads in [2, 3] {
                let got = p.run::<f32>(&engine.with_threads(Some(threads)));
                got.iter().zip(&want).for_each(|(g, w)| same_bits(g, w, "gradients"));
            }
        }
    }
}

/// Arguments of quadratic attention; tensors are contiguous.
struct Quadratic {
    op: QuadraticAttention,
    terms: (ScoreActivation, bool),
    /// `[batch, lq, lk, s, e]`
    dims: [usize; 5],
    /// Queries, keys, values, and the gradient of the output.
    inputs: [Vec<f32>; 4],
    /// A table, a matrix.
    bias: [Vec<f32>; 2],
    mask: Vec<bool>,
}

const SCALES: [f32; 2] = [0.2, 0.7];

impl Quadratic {
    fn new((act, causal): (ScoreActivation, bool), dims: [usize; 5], seed: u64) -> Self {
        println!("seed {seed}");
        let ([batch, lq, lk, s, e], mut rng) = (dims, Rng::new(seed));
        let [scale, bias_scale] = SCALES.map(Factor::Value);
        let op = QuadraticAttention::new(act, scale).expect("a factor");
        let op = op.with_bias_scale(bias_scale).expect("a factor");
        let inputs = [lq * s, lk * s, lk * e, lq * e].map(|n| normal(&mut rng, batch * n));
        let rows = if causal { lk } else { lq };
        let bias = [2 * lq.max(lk) + 1, rows * lk].map(|n| normal(&mut rng, n));
        let mask = (0..batch * lk).map(|_| rng.below(3) > 0).collect();
        let op = if causal { op.causal() } else { op };
        Self { op, terms: (act, causal), dims, inputs, bias, mask }
    }

    /// Rows of the matrix, and the one of the first query.
    fn rows(&self) -> [usize; 2] {
        let [_, lq, lk, ..] = self.dims;
        if self.terms.1 { [lk, lk - lq] } else { [lq, 0] }
    }

    /// Gradients of the inputs, of the table and of the matrix.
    fn naive<E: Element>(&self) -> Vec<Vec<f64>> {
        let ([batch, lq, lk, s, e], [rows, first]) = (self.dims, self.rows());
        let bias = added(&self.bias[0], &self.bias[1], [rows, lk]);
        let (mut grads, mut dbias) = (vec![Vec::new(); 3], vec![0.0; rows * lk]);
        for i in 0..batch {
            let part = |x: &[f32], n: usize| round::<E>(&x[i * n..][..n]);
            let [q, k, v, dout] = &self.inputs;
            let [q, k] = [part(q, lq * s), part(k, lk * s)];
            let [v, dout] = [part(v, lk * e), part(dout, lq * e)];
            let [scale, bias_scale] = SCALES.map(f64::from);
            let (act, causal) = self.terms;
            let (bias, mask) = (&bias[first * lk..], &self.mask[i * lk..][..lk]);
            let terms = quadratic::naive::Terms { causal, act, scale, bias_scale, bias, mask };
            let sizes = [lq, lk, s, e];
            let [dq, dk, dv, db] = quadratic::naive::backward([&q, &k, &v], &dout, sizes, terms);
            grads.iter_mut().zip([dq, dk, dv]).for_each(|(to, x)| to.extend(x));
            dbias[first * lk..].iter_mut().zip(db).for_each(|(to, x)| *to += x);
        }
        grads.push(diagonals(self.bias[0].len(), &dbias, lk));
        grads.push(dbias);
        grads
    }

    fn run<E: Element>(&self, rt: &Runtime) -> Vec<Vec<f32>> {
        let ([batch, lq, lk, s, e], [rows, _]) = (self.dims, self.rows());
        let inputs = self.inputs.each_ref().map(|x| typed::<E>(x));
        let shapes = [[batch, lq, s], [batch, lk, s], [batch, lk, e], [batch, lq, e]];
        let view = |i: usize| View::new(&inputs[i], shapes[i]).expect("a tensor");
        let nan = E::from_f32(f32::NAN);
        let mut grads = [0, 1, 2].map(|i| vec![nan; inputs[i].len()]);
        let mut at = 0;
        let views = grads.each_mut().map(|x| {
            at += 1;
            ViewMut::new(x, shapes[at - 1]).expect("a tensor")
        });
        let [mut table, mut matrix] = self.bias.each_ref().map(|x| vec![f32::NAN; x.len()]);
        let bias = View::new(&self.bias[1], [rows, lk]).expect("a matrix");
        let extra = quadratic::Extra {
            key_mask: Some(View::new(&self.mask, [batch, lk]).expect("a mask")),
            bias: Bias { table: Some(&self.bias[0]), matrix: Some(bias) },
        };
        let to = BiasGrads {
            table: Some(&mut table),
            matrix: Some(ViewMut::new(&mut matrix, [rows, lk]).expect("a matrix")),
        };
        let [q, k, v, dout] = [0, 1, 2, 3].map(view);
        let done = self.op.backward_with(rt, q, k, v, dout, views, extra, to);
        done.expect("valid arguments");
        grads.into_iter().map(back).chain([table, matrix]).collect()
    }

    #[track_caller]
    fn agrees_as<E: Element>(&self, rt: &Runtime, tolerance: f64) {
        for (i, (got, want)) in self.run::<E>(rt).iter().zip(&self.naive::<E>()).enumerate() {
            let (err, kernel) = (rel_err(got, want), rt.kernel());
            let (terms, dims) = (self.terms, self.dims);
            assert!(err <= tolerance, "{i} of {terms:?} {dims:?}, {kernel}: {err:.2e}");
        }
    }
}

#[test]
fn quadratic() {
    for engine in engines() {
        let (rt, tolerance) = (engine.runtime(), engine.bound(F32, true));
        for (act, causal) in ACTS.into_iter().flat_map(|a| [(a, false), (a, true)]) {
            let new = |dims, seed| Quadratic::new((act, causal), dims, seed);
            new([1, 1, 1, 1, 1], 200).agrees_as::<f32>(&rt, tolerance);
            new([2, 110, 113, 17, 40], 201).agrees_as::<f32>(&rt, tolerance);
            new([1, 5, 70, 8, 33], 202).agrees_as::<f32>(&rt, tolerance);
            new([2, 30, 31, 8, 9], 203).agrees_as::<bf16>(&rt, 1e-2);
        }
    }
}

/// Hidden keys and values hold NaN.
#[test]
fn what_is_hidden_is_not_looked_at() {
    for isa in isas() {
        let rt = with_threads(isa, None);
        let mut p = Mixed::new(MixedChunkConfig::paper(8, true), [2, 30, 6, 7], 300).masked(301);
        let want = p.naive::<f32>();
        let hidden = p.mask.clone().expect("a mask");
        for (i, width) in [(1, 6), (3, 6), (4, 7)] {
            for (row, seen) in p.inputs[i].chunks_exact_mut(width).zip(&hidden) {
                if !seen {
                    row.fill(f32::NAN);
                }
            }
        }
        for (got, want) in p.run::<f32>(&rt).iter().zip(&want) {
            assert!(rel_err(got, want) <= F32, "{isa:?}");
        }
    }
}

/// A query that is not a number spoils its own gradient and its own row of the bias, no other.
#[test]
fn one_query_spoils_one_row() {
    for isa in isas() {
        let (rt, act) = (with_threads(isa, None), ScoreActivation::Relu2);
        let mut p = Quadratic::new((act, false), [1, 7, 9, 5, 6], 500);
        let want = p.naive::<f32>();
        p.inputs[0][..5].fill(f32::NAN);
        let got = p.run::<f32>(&rt);
        for (i, width) in [(0, 5), (4, 9)] {
            assert!(got[i][..width].iter().any(|x| x.is_nan()), "{isa:?}");
            assert!(rel_err(&got[i][width..], &want[i][width..]) <= F32, "{isa:?}");
        }
    }
}

#[test]
fn bad_shapes_are_refused_untouched() {
    let rt = runtime(isas()[0]);
    let op = MixedChunkAttention::new(MixedChunkConfig::paper(4, true)).expect("a configuration");
    let (x, y) = (vec![1.0f32; 12], vec![1.0f32; 16]);
    let view = |n: usize| View::new(if n == 3 { &x } else { &y }, [1, 4, n]).expect("a tensor");
    for wrong in 0..8 {
        let width = |i: usize| if wrong == i { 4 } else { 3 };
        let mut grads = [0, 1, 2, 3, 4].map(|i| vec![7.0f32; 4 * width(i)]);
        let mut at = 0;
        let views = grads.each_mut().map(|g| {
            at += 1;
            ViewMut::new(g, [1, 4, width(at - 1)]).expect("a tensor")
        });
        let mut table = [7.0; 9];
        let table = &mut table[..if wrong == 7 { 7 } else { 9 }];
        let extra = mixed_chunk::Extra {
            bias: Bias { table: Some(&[0.0; 9]), matrix: None },
            ..mixed_chunk::Extra::default()
        };
        let to = BiasGrads { table: Some(table), matrix: None };
        let qk = [view(3), view(width(5)), view(3), view(3)];
        let err = op.backward_with(&rt, qk, view(3), view(width(6)), views, extra, to);
        let err = err.expect_err("a wrong shape");
        assert!(matches!(err, Error::Shape { op: "mixed chunk attention", .. }), "{wrong}: {err}");
        assert!(grads.iter().flatten().all(|x| *x == 7.0), "{wrong}: written");
    }
}
