//! Operations against their definitions.

use super::{Call, Rows, flags, near, near_within};
use linattn::attention::agent::{AgentAttention, AgentExtra, naive as agent_naive};
use linattn::attention::combiner::{CombinerAttention, CombinerConfig, naive as combiner_naive};
use linattn::attention::focused::{
    FocusedConfig, FocusedLinearAttention, Normaliser, naive as focused_naive,
};
use linattn::attention::lightning::{LightningAttention, naive as lightning_naive};
use linattn::attention::linear::{FeatureMap, LinearAttention, LinearState, naive as linear_naive};
use linattn::attention::mixed_chunk::{
    self, LinReduce, MixedChunkAttention, MixedChunkConfig, ScoreActivation,
    naive as mixed_chunk_naive,
};
use linattn::attention::performer::{
    PerformerAttention, PerformerConfig, naive as performer_naive,
};
use linattn::attention::quadratic::{self, Factor, QuadraticAttention, naive as quadratic_naive};
use linattn::attention::softmax::{self, SoftmaxAttention, naive as softmax_naive};
use linattn::attention::{Mask, Scale, State};
use linattn::tensor::{View, ViewMut};

/// Results smaller than this are what is left of terms of about 1, and compared as if they were as large.
const LEAST: f64 = 0.1;

/// Compares every head of `out` with `want(batch row, head)`.
fn compare(out: &Rows, want: impl Fn(usize, usize) -> Vec<f64>) {
    let [batch, _, heads, _] = out.shape;
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        near(&out.head(b, h), &want(b, h), LEAST);
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Slopes between steep and none.
fn slopes(call: &Call) -> Vec<f64> {
    let kinds = [0.0, 1e-6, 1e-3, 0.1, 0.69, 0.7, 3.0, 100.0, f64::INFINITY];
    (0..call.heads()).map(|h| kinds[usize::from(call.options[h % 4]) % kinds.len()]).collect()
}

pub fn lightning(call: Call) {
    let (mut rng, [b, n, h, dk, dv]) =
        (call.rng(), [call.batch(), call.len(), call.heads(), call.dk(), call.dv()]);
    let [q, k] = [(); 2].map(|()| Rows::normal(&mut rng, [b, n, h, dk]));
    let (v, mut out) = (Rows::normal(&mut rng, [b, n, h, dv]), Rows::nan([b, n, h, dv]));
    let (op, slopes) = (LightningAttention::new(&slopes(&call)).expect("slopes"), slopes(&call));
    let mut state = State::new(b, h, dk, dv).expect("a state");
    op.forward(&call.runtime(), q.view(), k.view(), v.view(), out.view_mut(), &mut state)
        .expect("a good call");
    compare(&out, |b, h| {
        let mut state = vec![0.0; dk * dv];
        let [q, k, v] = [&q, &k, &v].map(|x| x.head(b, h));
        lightning_naive::head(&q, &k, &v, [dk, dv], slopes[h], 1.0, &mut state)
    });
}

/// Two parts give what the whole gives, but for roundings.
pub fn split(call: Call) {
    let (mut rng, [n, h, dk, dv]) = (call.rng(), [call.len(), call.heads(), call.dk(), call.dv()]);
    let [q, k] = [(); 2].map(|()| Rows::normal(&mut rng, [1, n, h, dk]));
    let v = Rows::normal(&mut rng, [1, n, h, dv]);
    let (rt, mid) = (call.runtime(), call.keys().min(n));
    let op = LightningAttention::new(&slopes(&call)).expect("slopes");
    let run = |parts: &[[usize; 2]]| {
        let (mut out, mut state) = (Rows::nan(v.shape), State::new(1, h, dk, dv).expect("a state"));
        for [from, to] in parts.iter().copied() {
            let [q, k, v] = [&q, &k, &v].map(|x| x.view().slice(1, from, to));
            let out = out.view_mut().slice(1, from, to);
            op.forward(&rt, q, k, v, out, &mut state).expect("a good call");
        }
        (wide(&out.data), wide(state.view().as_slice().expect("a whole state")))
    };
    let (whole, parts) = (run(&[[0, n]]), run(&[[0, mid], [mid, n]]));
    near_within(1e-6, &parts.0, &whole.0, 1.0);
    near_within(1e-6, &parts.1, &whole.1, 1.0);
}

/// A packed call is refused, or equals separate calls bit for bit.
pub fn cu_seqlens(call: Call, borders: &[usize]) {
    let (mut rng, [n, h, dk, dv]) = (call.rng(), [call.len(), call.heads(), call.dk(), call.dv()]);
    let [q, k] = [(); 2].map(|()| Rows::normal(&mut rng, [1, n, h, dk]));
    let (v, rt) = (Rows::normal(&mut rng, [1, n, h, dv]), call.runtime());
    let op = LightningAttention::new(&slopes(&call)).expect("slopes");
    let mut out = Rows::nan(v.shape);
    let parts = borders.len().saturating_sub(1);
    let mut state = State::new(parts, h, dk, dv).expect("a state");
    let [a, b, c] = [&q, &k, &v].map(Rows::view);
    if op.forward_packed(&rt, a, b, c, out.view_mut(), borders, &mut state).is_err() {
        assert!(out.data.iter().all(|x| x.is_nan()), "a refused call wrote");
        return;
    }
    let mut alone = Rows::nan(v.shape);
    for pair in borders.windows(2) {
        let [q, k, v] = [a, b, c].map(|x| x.slice(1, pair[0], pair[1]));
        let out = alone.view_mut().slice(1, pair[0], pair[1]);
        let mut state = State::new(1, h, dk, dv).expect("a state");
        op.forward(&rt, q, k, v, out, &mut state).expect("a good call");
    }
    let bits = |x: &Rows| x.data.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&out), bits(&alone));
}

pub fn linear(call: Call) {
    let causal = call.flag(0);
    let lk = if causal { call.len() } else { call.keys() };
    let (mut rng, [b, n, h, dk, dv]) =
        (call.rng(), [call.batch(), call.len(), call.heads(), call.dk(), call.dv()]);
    let q = Rows::normal(&mut rng, [b, n, h, dk]);
    let (k, v) = (Rows::normal(&mut rng, [b, lk, h, dk]), Rows::normal(&mut rng, [b, lk, h, dv]));
    let mut out = Rows::nan([b, n, h, dv]);
    // Positive features: those of another sign may cancel in the normaliser.
    let map = if call.flag(1) { FeatureMap::Elu1 } else { FeatureMap::Relu };
    let eps = call.flag(2).then_some(1e-3);
    let scale = if call.flag(4) { 0.3 } else { 1.0 };
    let op = LinearAttention::new(map).with_eps(eps).expect("an eps");
    let op = op.with_scale(Scale::Value(scale)).expect("a scale");
    let op = if causal { op.causal() } else { op };
    let mut state = LinearState::new(b, h, dk, dv).expect("a state");
    let state = call.flag(3).then_some(&mut state);
    op.forward(&call.runtime(), q.view(), k.view(), v.view(), out.view_mut(), state)
        .expect("a good call");
    compare(&out, |b, h| {
        let (mut s, mut z) = (vec![0.0; dk * dv], vec![0.0; dk]);
        let terms =
            linear_naive::Terms { map, causal, eps: eps.map(f64::from), scale: scale.into() };
        let [q, k, v] = [&q, &k, &v].map(|x| x.head(b, h));
        linear_naive::head(&q, &k, &v, [n, lk, dk, dv], terms, &mut s, &mut z)
    });
}

pub fn softmax(call: Call) {
    let (mut rng, [b, n, lk, kv, dk, dv]) =
        (call.rng(), [call.batch(), call.len(), call.keys(), call.heads(), call.dk(), call.dv()]);
    let (group, causal) = (1 + usize::from(call.options[1] % 3), call.flag(0));
    let q = Rows::normal(&mut rng, [b, n, kv * group, dk]);
    let (k, v) = (Rows::normal(&mut rng, [b, lk, kv, dk]), Rows::normal(&mut rng, [b, lk, kv, dv]));
    let mut out = Rows::nan([b, n, kv * group, dv]);
    let mask = call.flag(1).then(|| flags(&mut rng, b * lk));
    let bias = call.flag(2).then(|| Rows::normal(&mut rng, [1, kv * group, n, lk]));
    let (mask_kind, ahead) = match call.options[2] % 2 {
        _ if !causal => (Mask::Full, 0),
        0 => (Mask::Causal, 0),
        _ => (Mask::CausalEnd, lk as isize - n as isize),
    };
    let op = SoftmaxAttention::new().with_mask(mask_kind);
    let extra = softmax::Extra {
        key_mask: mask.as_ref().map(|m| View::new(m, [b, lk]).expect("a mask")),
        bias: bias.as_ref().map(|x| View::new(&x.data, [kv * group, n, lk]).expect("a bias")),
    };
    op.forward_with(&call.runtime(), q.view(), k.view(), v.view(), out.view_mut(), extra)
        .expect("a good call");
    compare(&out, |row, h| {
        let seen = |i: usize, j: usize| {
            (!causal || j as isize <= i as isize + ahead)
                && mask.as_ref().is_none_or(|m| m[row * lk + j])
        };
        let (q, k, v) = (q.head(row, h), k.head(row, h / group), v.head(row, h / group));
        let bias = bias.as_ref().map(|x| wide(&x.data[h * n * lk..][..n * lk]));
        let scale = (dk.max(1) as f64).powf(-0.5);
        let bias = bias.unwrap_or_default();
        softmax_naive::head(&q, &k, &v, &bias, [n, lk, dk, dv], scale, seen)
    });
}

pub fn agent(call: Call) {
    let shortcut = if call.flag(0) { 0.5 } else { 0.0 };
    let lk = if call.flag(0) { call.len() } else { call.keys() };
    let (mut rng, [b, n, h, dk, dv]) =
        (call.rng(), [call.batch(), call.len(), call.heads(), call.dk(), call.dv()]);
    let m = usize::from(call.options[1]) % 60;
    let [q, a] = [n, m].map(|len| Rows::normal(&mut rng, [b, len, h, dk]));
    let (k, v) = (Rows::normal(&mut rng, [b, lk, h, dk]), Rows::normal(&mut rng, [b, lk, h, dv]));
    let mut out = Rows::nan([b, n, h, dv]);
    let mask = call.flag(1).then(|| flags(&mut rng, b * lk));
    let biases = [m * lk, n * m].map(|len| Rows::normal(&mut rng, [1, 1, h, len]));
    let of = |i: usize, shape| {
        call.flag(2 + i).then(|| View::new(&biases[i].data, shape).expect("a bias"))
    };
    let extra = AgentExtra {
        agent_bias: of(0, [h, m, lk]),
        query_bias: of(1, [h, n, m]),
        key_mask: mask.as_ref().map(|x| View::new(x, [b, lk]).expect("a mask")),
        agent_values: None,
    };
    let op = AgentAttention::new().with_shortcut(shortcut).expect("a factor");
    let [qv, kv, vv, av] = [&q, &k, &v, &a].map(Rows::view);
    op.forward_with(&call.runtime(), qv, kv, vv, av, out.view_mut(), extra).expect("a good call");
    compare(&out, |row, h| {
        let bias = |i: usize, len: usize| match call.flag(2 + i) {
            true => wide(&biases[i].data[h * len..][..len]),
            false => Vec::new(),
        };
        let terms = agent_naive::Terms {
            scales: [(dk.max(1) as f64).powf(-0.5); 2],
            k_shortcut: f64::from(shortcut),
            agent_bias: &bias(0, m * lk),
            query_bias: &bias(1, n * m),
        };
        let seen = |j: usize| mask.as_ref().is_none_or(|x| x[row * lk + j]);
        let [a, q, k, v] = [&a, &q, &k, &v].map(|x| x.head(row, h));
        agent_naive::head(&a, [&q, &k, &v], [n, lk, m, dk, dv], terms, seen).0
    });
}

pub fn focused(call: Call) {
    let (mut rng, [b, n, lk, h, dk, dv]) = (
        call.rng(),
        [call.batch(), call.len(), call.keys(), call.heads() + 1, call.dk() + 1, call.dv()],
    );
    let normaliser = if call.flag(0) { Normaliser::Mean } else { Normaliser::Sum };
    let config = FocusedConfig { heads: h, normaliser, ..FocusedConfig::default() };
    let scale = Rows::normal(&mut rng, [1, 1, 1, h * dk]);
    let q = Rows::normal(&mut rng, [b, n, h, dk]);
    let (k, v) = (Rows::normal(&mut rng, [b, lk, h, dk]), Rows::normal(&mut rng, [b, lk, h, dv]));
    let mut out = Rows::nan([b, n, h, dv]);
    let op = FocusedLinearAttention::new(config, &scale.data).expect("a scale");
    op.forward(&call.runtime(), q.view(), k.view(), v.view(), out.view_mut()).expect("a good call");
    let terms = focused_naive::Terms {
        power: f64::from(config.focusing_factor),
        relu_eps: f64::from(config.relu_eps),
        z_eps: f64::from(config.z_eps),
        normaliser,
        scale: &wide(&scale.data),
    };
    for row in 0..b {
        let part = |x: &Rows| wide(&x.data[row * x.data.len() / b..][..x.data.len() / b]);
        let [q, k, v] = [&q, &k, &v].map(part);
        let want = focused_naive::attend([&q, &k, &v], [n, lk, h, dk, dv], terms);
        near(&part(&out), &want, LEAST);
    }
}

pub fn mixed_chunk(call: Call) {
    let (mut rng, [b, n, s, e]) =
        (call.rng(), [call.batch(), call.len(), call.dk() + 1, call.dv() + 1]);
    let (chunk, causal) = (1 + usize::from(call.options[1]) % 70, call.flag(0));
    let mut config = MixedChunkConfig::package(chunk, causal);
    config.act = if call.flag(1) { ScoreActivation::Laplace } else { ScoreActivation::Relu2 };
    config.lin_reduce = match call.options[2] % 3 {
        0 => LinReduce::Sum,
        1 => LinReduce::MeanChunks,
        _ if causal => LinReduce::Sum,
        _ => LinReduce::OwnChunk,
    };
    let mask = call.flag(2).then(|| flags(&mut rng, b * n));
    let qk = [(); 4].map(|()| Rows::normal(&mut rng, [b, n, 1, s]));
    let (v, mut out) = (Rows::normal(&mut rng, [b, n, 1, e]), Rows::nan([b, n, 1, e]));
    let op = MixedChunkAttention::new(config).expect("a configuration");
    let extra = mixed_chunk::Extra {
        key_mask: mask.as_ref().map(|x| View::new(x, [b, n]).expect("a mask")),
        ..mixed_chunk::Extra::default()
    };
    let inputs = [0, 1, 2, 3].map(|i| View::new(&qk[i].data, [b, n, s]).expect("a tensor"));
    let values = View::new(&v.data, [b, n, e]).expect("a tensor");
    let to = ViewMut::new(&mut out.data, [b, n, e]).expect("a tensor");
    op.forward_with(&call.runtime(), inputs, values, to, extra, None).expect("a good call");
    compare(&out, |row, _| {
        let terms = mixed_chunk_naive::Terms {
            chunk,
            causal,
            act: config.act,
            quad_scale: f64::from(config.quad_scale),
            lin_scale: match config.lin_scale {
                mixed_chunk::Factor::Value(x) => f64::from(x),
                _ => 1.0 / n.max(1) as f64,
            },
            reduce: config.lin_reduce,
            bias: &[],
            mask: mask.as_ref().map_or(&[], |x| &x[row * n..][..n]),
        };
        let [q, k, l, g] = [0, 1, 2, 3].map(|i| qk[i].head(row, 0));
        mixed_chunk_naive::head([&q, &k, &l, &g], &v.head(row, 0), [n, s, e], terms)
    });
}

pub fn quadratic(call: Call) {
    let (mut rng, [b, n, lk, s, e]) =
        (call.rng(), [call.batch(), call.len(), call.keys(), call.dk() + 1, call.dv() + 1]);
    let causal = call.flag(0);
    let act = if call.flag(1) { ScoreActivation::Laplace } else { ScoreActivation::Relu2 };
    let n = if causal { n.min(lk) } else { n };
    let mask = call.flag(2).then(|| flags(&mut rng, b * lk));
    // Queries are the last of the positions.
    let positions = if causal { lk } else { n };
    let bias = call.flag(3).then(|| Rows::normal(&mut rng, [1, positions, 1, lk]));
    let (q, k) = (Rows::normal(&mut rng, [b, n, 1, s]), Rows::normal(&mut rng, [b, lk, 1, s]));
    let (v, mut out) = (Rows::normal(&mut rng, [b, lk, 1, e]), Rows::nan([b, n, 1, e]));
    let scale = (s as f32).recip();
    let op = QuadraticAttention::new(act, Factor::Value(scale)).expect("a scale");
    let op = if causal { op.causal() } else { op };
    let matrix = bias.as_ref().map(|x| View::new(&x.data, [positions, lk]).expect("a bias"));
    let extra = quadratic::Extra {
        key_mask: mask.as_ref().map(|x| View::new(x, [b, lk]).expect("a mask")),
        bias: quadratic::Bias { matrix, ..quadratic::Bias::default() },
    };
    let [q3, k3, v3] = [(&q, n, s), (&k, lk, s), (&v, lk, e)]
        .map(|(x, n, d)| View::new(&x.data, [b, n, d]).expect("a tensor"));
    let to = ViewMut::new(&mut out.data, [b, n, e]).expect("a tensor");
    op.forward_with(&call.runtime(), q3, k3, v3, to, extra).expect("a good call");
    let rows = bias.as_ref().map_or(Vec::new(), |x| wide(&x.data[(positions - n) * lk..]));
    compare(&out, |row, _| {
        let terms = quadratic_naive::Terms {
            causal,
            act,
            scale: f64::from(scale),
            bias_scale: 1.0,
            bias: &rows,
            mask: mask.as_ref().map_or(&[], |x| &x[row * lk..][..lk]),
        };
        let [q, k, v] = [&q, &k, &v].map(|x| x.head(row, 0));
        quadratic_naive::head(&q, &k, &v, [n, lk, s, e], terms)
    });
}

pub fn performer(call: Call) {
    let causal = call.flag(0);
    let lk = if causal { call.len() } else { call.keys() };
    let (mut rng, [b, n, h, dk, dv]) =
        (call.rng(), [call.batch(), call.len(), call.heads(), call.dk() + 1, call.dv()]);
    let relu = call.flag(1);
    let config = if relu { PerformerConfig::relu() } else { PerformerConfig::softmax() };
    let config = if causal { config.causal() } else { config };
    let w = Rows::normal(&mut rng, [1, 1, 1 + usize::from(call.options[1]) % 90, dk]);
    let m = w.shape[2];
    let q = Rows::normal(&mut rng, [b, n, h, dk]);
    let (k, v) = (Rows::normal(&mut rng, [b, lk, h, dk]), Rows::normal(&mut rng, [b, lk, h, dv]));
    let mut out = Rows::nan([b, n, h, dv]);
    let projection = View::new(&w.data, [m, dk]).expect("a matrix");
    let op = PerformerAttention::new(config, projection).expect("a configuration");
    op.forward(&call.runtime(), q.view(), k.view(), v.view(), out.view_mut(), None)
        .expect("a good call");
    if lk == 0 {
        return assert!(out.data.iter().all(|x| x.is_finite()));
    }
    compare(&out, |row, h| {
        let [q, k, v] = [&q, &k, &v].map(|x| x.head(row, h));
        performer_naive::head(&q, &k, &v, &wide(&w.data), [n, lk, dk, dv], &config)
    });
}

pub fn combiner(call: Call) {
    let (mut rng, [b, n, h, dk, dv]) =
        (call.rng(), [call.batch(), call.len() % 150, call.heads(), call.dk() + 1, call.dv()]);
    let segment = 1 + usize::from(call.options[1]) % 20;
    let config = match call.options[2] % 5 {
        0 => CombinerConfig::fixed(segment),
        1 => CombinerConfig::fixed(segment).causal(),
        2 => CombinerConfig::axial_row_major(segment),
        3 => CombinerConfig::axial_row_major(segment).causal(),
        _ => CombinerConfig::axial_mixture(segment),
    };
    let [q, k] = [(); 2].map(|()| Rows::normal(&mut rng, [b, n, h, dk]));
    let (v, mut out) = (Rows::normal(&mut rng, [b, n, h, dv]), Rows::nan([b, n, h, dv]));
    let op = CombinerAttention::new(config).expect("a configuration");
    op.forward(&call.runtime(), q.view(), k.view(), v.view(), out.view_mut(), None)
        .expect("a good call");
    compare(&out, |row, h| {
        let [q, k, v] = [&q, &k, &v].map(|x| x.head(row, h));
        combiner_naive::head(&q, &k, &v, [n, dk, dv], (dk as f64).powf(-0.5), &config)
    });
}
