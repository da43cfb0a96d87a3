//! The operations of vision attention against their definitions in `f64`: sizes that fill no vector, strided views, element
//! types, what is optional, threads, and what they refuse.

use crate::support::{engines, normal, rel_err, same_bits, widen, with_threads};
use half::bf16;
use linattn::attention::Scale;
use linattn::attention::agent::{self, AgentAttention, AgentExtra};
use linattn::attention::merge::TokenMerging;
use linattn::layers::{DepthwiseConfig, DepthwiseConv2d, Resample};
use linattn::tensor::{Element, Rng, View, ViewMut};
use linattn::{Error, Result, Runtime};

/// Relative L2 error of an operation in `f32`.
const OPERATION: f64 = 3e-6;

/// Sizes of a call of agent attention, and what it has besides.
#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    lq: usize,
    lk: usize,
    n: usize,
    heads: usize,
    dk: usize,
    dv: usize,
    biases: bool,
    mask: bool,
    shortcut: f32,
}

const PLAIN: Shape = Shape {
    batch: 1,
    lq: 196,
    lk: 196,
    n: 49,
    heads: 2,
    dk: 64,
    dv: 64,
    biases: true,
    mask: false,
    shortcut: 0.0,
};

fn shapes() -> [Shape; 9] {
    [
        PLAIN,
        Shape { batch: 2, lq: 7, lk: 33, n: 5, dk: 12, dv: 9, mask: true, ..PLAIN },
        Shape { lq: 1, lk: 1, n: 1, heads: 1, dk: 1, dv: 1, ..PLAIN },
        Shape { lq: 50, lk: 50, n: 9, dk: 32, dv: 32, shortcut: 0.075, biases: false, ..PLAIN },
        Shape { lq: 130, lk: 261, n: 100, dk: 24, dv: 40, heads: 1, ..PLAIN },
        Shape { lq: 20, lk: 300, n: 200, dk: 8, dv: 8, heads: 3, biases: false, ..PLAIN },
        Shape { batch: 3, lq: 64, lk: 64, n: 16, dk: 17, dv: 33, mask: true, ..PLAIN },
        Shape { lq: 0, ..PLAIN },
        Shape { batch: 0, ..PLAIN },
    ]
}

/// The operands of a call, rounded to `E`.
struct Call<E> {
    s: Shape,
    q: Vec<E>,
    k: Vec<E>,
    v: Vec<E>,
    agents: Vec<E>,
    agent_bias: Vec<f32>,
    query_bias: Vec<f32>,
    mask: Vec<bool>,
}

fn rounded<E: Element>(rng: &mut Rng, len: usize) -> Vec<E> {
    normal(rng, len).into_iter().map(E::from_f32).collect()
}

impl<E: Element> Call<E> {
    fn new(s: Shape, seed: u64) -> Self {
        let (mut rng, h) = (Rng::new(seed), s.heads);
        let mut mask: Vec<bool> = (0..s.batch * s.lk).map(|_| rng.below(3) > 0).collect();
        // One batch row without any key.
        mask.iter_mut().take(if s.batch > 1 { s.lk } else { 0 }).for_each(|m| *m = false);
        Self {
            s,
            q: rounded(&mut rng, s.batch * s.lq * h * s.dk),
            k: rounded(&mut rng, s.batch * s.lk * h * s.dk),
            v: rounded(&mut rng, s.batch * s.lk * h * s.dv),
            agents: rounded(&mut rng, s.batch * s.n * h * s.dk),
            agent_bias: normal(&mut rng, h * s.n * s.lk),
            query_bias: normal(&mut rng, h * s.lq * s.n),
            mask,
        }
    }

    /// Outputs, and what the agents gathered.
    fn run(&self, rt: &Runtime) -> (Vec<f32>, Vec<f32>) {
        let Shape { batch, lq, lk, n, heads, dk, dv, biases, mask, shortcut } = self.s;
        let op = AgentAttention::new().with_shortcut(shortcut).expect("a shortcut");
        let op = op.with_scales(Scale::InvSqrtDim, Scale::Value(0.3)).expect("scales");
        let mut out = vec![E::from_f32(f32::NAN); batch * lq * heads * dv];
        let mut gathered = vec![f32::NAN; batch * n * heads * dv];
        let extra = AgentExtra {
            agent_bias: biases
                .then(|| View::new(&self.agent_bias, [heads, n, lk]).expect("a bias")),
            query_bias: biases
                .then(|| View::new(&self.query_bias, [heads, lq, n]).expect("a bias")),
            key_mask: mask.then(|| View::new(&self.mask, [batch, lk]).expect("a mask")),
            agent_values: Some(ViewMut::new(&mut gathered, [batch, n, heads, dv]).expect("values")),
        };
        let view = |x: &'static str| -> View<'_, E, 4> {
            let (data, len, dim) = match x {
                "q" => (&self.q, lq, dk),
                "k" => (&self.k, lk, dk),
                "v" => (&self.v, lk, dv),
                _ => (&self.agents, n, dk),
            };
            View::new(data, [batch, len, heads, dim]).expect("an operand")
        };
        let target = ViewMut::new(&mut out, [batch, lq, heads, dv]).expect("an output");
        let result = op.forward_with(rt, view("q"), view("k"), view("v"), view("a"), target, extra);
        result.expect("a call");
        (out.into_iter().map(E::to_f32).collect(), gathered)
    }

    /// The same by definition.
    fn want(&self) -> (Vec<f64>, Vec<f64>) {
        let Shape { batch, lq, lk, n, heads, dk, dv, biases, mask, shortcut } = self.s;
        let pick = |x: &[E], b: usize, h: usize, len: usize, dim: usize| -> Vec<f64> {
            let row = |t: usize| ((b * len + t) * heads + h) * dim;
            (0..len)
                .flat_map(|t| x[row(t)..row(t) + dim].iter().map(|x| f64::from(x.to_f32())))
                .collect()
        };
        let bias = |x: &[f32], h: usize, len: usize| match biases {
            true => widen(&x[h * len..(h + 1) * len]),
            false => Vec::new(),
        };
        let (mut out, mut gathered) =
            (vec![0.0; batch * lq * heads * dv], vec![0.0; batch * n * heads * dv]);
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let (agent_bias, query_bias) =
                (bias(&self.agent_bias, h, n * lk), bias(&self.query_bias, h, lq * n));
            let terms = agent::naive::Terms {
                scales: [1.0 / (dk as f64).sqrt(), f64::from(0.3f32)],
                k_shortcut: f64::from(shortcut),
                agent_bias: &agent_bias,
                query_bias: &query_bias,
            };
            let (q, k) = (pick(&self.q, b, h, lq, dk), pick(&self.k, b, h, lk, dk));
            let (v, agents) = (pick(&self.v, b, h, lk, dv), pick(&self.agents, b, h, n, dk));
            let seen = |j: usize| !mask || self.mask[b * lk + j];
            let size = [lq, lk, n, dk, dv];
            let (o, g) = agent::naive::head(&agents, [&q, &k, &v], size, terms, seen);
            for (to, from, len) in [(&mut out, o, lq), (&mut gathered, g, n)] {
                for t in 0..len {
                    let at = ((b * len + t) * heads + h) * dv;
                    to[at..at + dv].copy_from_slice(&from[t * dv..(t + 1) * dv]);
                }
            }
        }
        (out, gathered)
    }
}

fn agent_agrees<E: Element>(rounding: f64) {
    for (i, shape) in shapes().into_iter().enumerate() {
        let seed = 100 + i as u64;
        println!("seed {seed}: {shape:?}");
        let call = Call::<E>::new(shape, seed);
        let (want, want_gathered) = call.want();
        for engine in engines() {
            let (out, gathered) = call.run(&engine.runtime());
            let (err, near) = (rel_err(&out, &want), engine.bound(OPERATION, false));
            assert!(err <= near + rounding, "{engine:?} {shape:?}: {err:e}");
            if shape.lq > 0 {
                let err = rel_err(&gathered, &want_gathered);
                assert!(err <= near, "{engine:?} {shape:?}: gathered {err:e}");
            }
        }
    }
}

#[test]
fn agent_attention_agrees_with_its_definition() {
    agent_agrees::<f32>(0.0);
}

#[test]
fn agent_attention_of_bf16_agrees_with_its_definition() {
    agent_agrees::<bf16>(2f64.powi(-8));
}

#[test]
fn hidden_keys_are_not_looked_at() {
    let shape = Shape { batch: 1, mask: true, biases: false, lk: 90, ..PLAIN };
    for isa in crate::support::isas() {
        let rt = with_threads(isa, None);
        let mut call = Call::<f32>::new(shape, 7);
        let before = call.run(&rt).0;
        let row = shape.heads * shape.dk;
        for (j, seen) in call.mask.iter().enumerate() {
            if !seen {
                call.k[j * row..(j + 1) * row].fill(f32::NAN);
                call.v[j * row..(j + 1) * row].fill(f32::INFINITY);
            }
        }
        let err = rel_err(&call.run(&rt).0, &widen(&before));
        assert!(err < 1e-6, "{isa}: {err:e}");
    }
}

#[test]
fn the_number_of_threads_does_not_matter() {
    for isa in crate::support::isas() {
        for (batch, heads) in [(1, 8), (1, 1), (5, 3)] {
            let shape = Shape { batch, heads, lq: 700, lk: 900, dk: 32, dv: 32, ..PLAIN };
            let call = Call::<f32>::new(shape, 8);
            let one = call.run(&with_threads(isa, Some(1)));
            let many = call.run(&with_threads(isa, Some(3)));
            same_bits(&many.0, &one.0, "outputs of agents");
            same_bits(&many.1, &one.1, "what agents gathered");
        }
    }
}

#[test]
fn depthwise_convolutions_are_sums_over_windows() {
    let seed = 41;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    for (map, c, kernels, size, padding, stride) in [
        ([5, 6], 3, 3, [3, 3], [1, 1], [1, 1]),
        ([14, 14], 64, 32, [5, 5], [2, 2], [1, 1]),
        ([3, 2], 40, 8, [7, 7], [3, 3], [1, 1]),
        ([9, 8], 5, 5, [2, 4], [0, 1], [2, 3]),
        ([1, 1], 1, 1, [3, 3], [1, 1], [1, 1]),
    ] {
        let ([h, w], [kh, kw]) = (map, size);
        let weight = normal(&mut rng, kernels * kh * kw);
        let (bias, x) = (normal(&mut rng, kernels), normal(&mut rng, 2 * h * w * c));
        let view = View::new(&weight, [kernels, 1, kh, kw]).expect("a weight");
        let config = DepthwiseConfig { padding, stride };
        let conv = DepthwiseConv2d::new(view, Some(&bias), config).expect("a convolution");
        let [rows, cols] = conv.output_size(map).expect("a size");
        let mut want = vec![0.0; 2 * rows * cols * c];
        for (at, y) in want.iter_mut().enumerate() {
            let (b, i, j, ch) =
                (at / (rows * cols * c), at / (cols * c) % rows, at / c % cols, at % c);
            *y = f64::from(bias[ch % kernels]);
            for (u, v) in (0..kh).flat_map(|u| (0..kw).map(move |v| (u, v))) {
                let place =
                    |at: usize, d: usize| at.checked_sub(padding[d]).filter(|p| *p < map[d]);
                if let (Some(a), Some(e)) =
                    (place(i * stride[0] + u, 0), place(j * stride[1] + v, 1))
                {
                    let w_at = (ch % kernels * kh + u) * kw + v;
                    *y += f64::from(weight[w_at]) * f64::from(x[((b * h + a) * w + e) * c + ch]);
                }
            }
        }
        for isa in crate::support::isas() {
            let x = View::new(&x, [2, h, w, c]).expect("a map");
            let call = |threads| {
                let mut y = vec![1.0; want.len()];
                let out = ViewMut::new(&mut y, [2, rows, cols, c]).expect("an output");
                conv.accumulate(&with_threads(isa, Some(threads)), x, out).expect("a call");
                y
            };
            let added: Vec<f32> = call(1).iter().map(|y| y - 1.0).collect();
            let err = rel_err(&added, &want);
            assert!(err <= 1e-6, "{isa} {map:?} {size:?}: {err:e}");
            same_bits(&call(3), &call(1), "threads");
        }
    }
}

#[test]
fn maps_are_resampled_between_the_centres_of_places() {
    let mut rng = Rng::new(51);
    for (from, to) in [([7, 7], [14, 3]), ([14, 14], [4, 9]), ([2, 5], [3, 3]), ([1, 1], [2, 2])] {
        let x = normal(&mut rng, from[0] * from[1] * 3);
        let bin = |d: usize, i: usize| i * from[d] / to[d]..((i + 1) * from[d]).div_ceil(to[d]);
        let between = |d: usize, i: usize| {
            let at = (i as f64 + 0.5) * from[d] as f64 / to[d] as f64 - 0.5;
            let at = at.max(0.0);
            let low = (at as usize).min(from[d] - 1);
            (low, (low + 1).min(from[d] - 1), at - low as f64)
        };
        let value = |i: usize, j: usize, c: usize| f64::from(x[(i * from[1] + j) * 3 + c]);
        let (mut mean, mut linear) = (Vec::new(), Vec::new());
        for at in 0..to[0] * to[1] * 3 {
            let (i, j, c) = (at / 3 / to[1], at / 3 % to[1], at % 3);
            let (rows, cols) = (bin(0, i), bin(1, j));
            let n = (rows.len() * cols.len()) as f64;
            let all = rows.flat_map(|a| cols.clone().map(move |b| (a, b)));
            mean.push(all.map(|(a, b)| value(a, b, c)).sum::<f64>() / n);
            let ((a, b, s), (e, f, t)) = (between(0, i), between(1, j));
            let row = |a| value(a, e, c) * (1.0 - t) + value(a, f, c) * t;
            linear.push(row(a) * (1.0 - s) + row(b) * s);
        }
        for isa in crate::support::isas() {
            let rt = with_threads(isa, None);
            for (plan, want) in
                [(Resample::average(from, to), &mean), (Resample::bilinear(from, to), &linear)]
            {
                let mut y = vec![f32::NAN; want.len()];
                let x = View::new(&x, [1, from[0], from[1], 3]).expect("a map");
                let out = ViewMut::new(&mut y, [1, to[0], to[1], 3]).expect("an output");
                plan.expect("a plan").forward(&rt, x, out).expect("a call");
                let err = rel_err(&y, want);
                assert!(err <= 1e-6, "{isa} {from:?} {to:?}: {err:e}");
            }
        }
    }
}

#[test]
fn similar_tokens_merge_and_come_back() {
    let (map, width, seed) = ([9, 10], 24, 61);
    println!("seed {seed}");
    let x = normal(&mut Rng::new(seed), 90 * width);
    let x_view = View::new(&x, [90, width]).expect("tokens");
    for merging in [TokenMerging::new(map, [4, 3]), TokenMerging::random(map, [4, 3], 5)] {
        let merging = merging.expect("a plan");
        assert_eq!((merging.tokens(), merging.others()), (90, 84));
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|r| merging.count(r)), [0, 45, 84, 84]);
        for isa in crate::support::isas() {
            let lists = |threads| {
                let (mut order, mut best) = (vec![0; 84], vec![0; 84]);
                let rt = with_threads(isa, Some(threads));
                merging.matching(&rt, x_view, &mut order, &mut best).expect("a matching");
                (order, best)
            };
            assert_eq!(lists(3), lists(1), "{isa}: threads");
            let (mut order, mut best) = (vec![0; 84], vec![0; 84]);
            let rt = with_threads(isa, None);
            let matching =
                merging.matching(&rt, x_view, &mut order, &mut best).expect("a matching");
            for r in [0, 1, 40, 84] {
                let (mut short, mut long) =
                    (vec![f32::NAN; (90 - r) * width], vec![f32::NAN; 90 * width]);
                let out = ViewMut::new(&mut short, [90 - r, width]).expect("an output");
                matching.merge(r, x_view, out).expect("merged");
                let short = View::new(&short, [90 - r, width]).expect("an input");
                let out = ViewMut::new(&mut long, [90, width]).expect("an output");
                matching.unmerge(r, short, out).expect("unmerged");
                // Means keep the sum, tokens that did not merge themselves.
                let same = long.chunks(width).zip(x.chunks(width)).filter(|(a, b)| a == b).count();
                assert!(same >= 84 - r, "{r}: {same} tokens are as they were");
                let sum = |x: &[f32]| x.iter().map(|x| f64::from(*x)).sum::<f64>();
                assert!((sum(&long) - sum(&x)).abs() < 1e-3, "{r}: the sum of all tokens changed");
            }
            let mut out = vec![0.0; 5 * width];
            let view = ViewMut::new(&mut out, [5, width]).expect("an output");
            refused(matching.merge(85, x_view, view), "r");
        }
    }
}

#[track_caller]
fn refused<T>(result: Result<T>, argument: &str) {
    match result.map(drop) {
        Err(Error::Shape { arg, .. } | Error::Value { arg, .. } | Error::Layout { arg, .. }) => {
            assert_eq!(arg, argument);
        }
        other => panic!("{argument}: {other:?}"),
    }
}

#[test]
fn wrong_arguments_are_refused_and_outputs_untouched() {
    let rt = with_threads(crate::support::best(), None);
    let agent = |q: [usize; 4], k: [usize; 4], v: [usize; 4], a: [usize; 4], o: [usize; 4]| {
        let data = [q, k, v, a].map(|s| vec![1.0f32; s.iter().product()]);
        let mut out = vec![7.0f32; o.iter().product()];
        let view = |i: usize, s| View::new(&data[i], s).expect("an operand");
        let target = ViewMut::new(&mut out, o).expect("an output");
        let op = AgentAttention::new();
        let result = op.forward(&rt, view(0, q), view(1, k), view(2, v), view(3, a), target);
        assert!(result.is_ok() || out.iter().all(|x| *x == 7.0), "written");
        result
    };
    let (q, k, v, a) = ([1, 4, 2, 3], [1, 5, 2, 3], [1, 5, 2, 6], [1, 2, 2, 3]);
    let o = [1, 4, 2, 6];
    assert!(agent(q, k, v, a, o).is_ok());
    refused(agent(q, [1, 5, 2, 4], v, a, o), "k");
    refused(agent(q, k, [1, 4, 2, 6], a, o), "v");
    refused(agent(q, k, v, [1, 2, 1, 3], o), "agents");
    refused(agent(q, k, v, a, [1, 4, 2, 5]), "out");
    let nan = Scale::Value(f32::NAN);
    refused(AgentAttention::new().with_scales(Scale::One, nan), "scale");
    refused(AgentAttention::new().with_shortcut(f32::INFINITY), "k_shortcut");
    refused(TokenMerging::new([0, 4], [1, 1]), "map");
    refused(TokenMerging::new([usize::MAX, 4], [1, 1]), "map");
    refused(TokenMerging::new([4, 4], [5, 1]), "cell");
    refused(TokenMerging::new([4, 4], [0, 1]), "cell");
    refused(Resample::average([0, 4], [1, 1]), "from");
    refused(Resample::bilinear([4, 4], [1, 0]), "to");
    let weight = View::new(&[1.0; 9], [1, 1, 3, 3]).expect("a weight");
    let still = DepthwiseConfig { padding: [0, 0], stride: [0, 1] };
    refused(DepthwiseConv2d::new(weight, None, still), "stride");
    refused(DepthwiseConv2d::new(weight, Some(&[1.0; 2]), DepthwiseConfig::same(3)), "bias");
}
