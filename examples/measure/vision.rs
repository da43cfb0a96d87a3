//! The attention cores of vision models on random inputs.

use crate::attention::{Case, tolerance};
use crate::{Args, Dtype, Outcome, timing};
use half::{bf16, f16};
use linattn::attention::agent::{self, AgentAttention, AgentExtra};
use linattn::attention::focused::{self, FocusedConfig, FocusedLinearAttention};
use linattn::layers::Resample;
use linattn::simd::convert::Generic;
use linattn::tensor::{Element, Rng, View, ViewMut};
use linattn::{Result, Runtime};

fn normal(args: &Args, stream: u64, len: usize) -> Vec<f32> {
    let mut x = vec![0.0; len];
    Rng::new(args.seed + stream).fill_normal(&mut x, 1.0);
    x
}

/// All rows of a `[batch, len, heads, dim]` view of one batch row, token by token.
fn tokens<E: Element>(x: View<'_, E, 4>, b: usize) -> Vec<f64> {
    let [_, n, heads, _] = x.shape();
    let rows = (0..n).flat_map(|t| (0..heads).map(move |h| [b, t, h, 0]));
    rows.flat_map(|at| x.row(at)).map(|x| f64::from(x.to_f32())).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

/// Two softmax steps over `--agents` agents; with `--pool` the agents are means of `q` over a square map.
pub fn agent(args: &Args, rt: &Runtime) -> Result<Outcome> {
    match args.dtype {
        Dtype::F32 => agent_as::<f32>(args, rt),
        Dtype::Bf16 => agent_as::<bf16>(args, rt),
        Dtype::F16 => agent_as::<f16>(args, rt),
    }
}

fn agent_as<E: Element>(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, heads, dim, agents, .. } = *args;
    let dv = args.dv.unwrap_or(dim);
    let mut case = Case::<E>::new(args)?;
    let shape = [batch, agents, heads, dim];
    let mut own = normal(args, 1, shape.iter().product());
    let mut given: Vec<E> = own.iter().map(|x| E::from_f32(*x)).collect();
    let side = |n: usize| (1..n).find(|s| s * s >= n).unwrap_or(1);
    let ([from, to], width) = ([side(n), side(agents)], heads * dim);
    let pool = Resample::average([from; 2], [to; 2])?;
    let map: Vec<f32> = case.q.as_slice().iter().map(|x| x.to_f32()).collect();
    let biases = [2, 3].map(|stream| normal(args, stream, heads * agents * n));
    let extra = || -> Result<AgentExtra<'_>> {
        let mut extra = AgentExtra::default();
        if args.bias {
            extra.agent_bias = Some(View::new(&biases[0], [heads, agents, n])?);
            extra.query_bias = Some(View::new(&biases[1], [heads, n, agents])?);
        }
        Ok(extra)
    };
    let op = AgentAttention::new();
    let times = timing::measure(args, rt, || {
        if args.pool {
            let map = View::new(&map, [batch, from, from, width]).expect("a square map");
            let bins = ViewMut::new(&mut own, [batch, to, to, width]).expect("square bins");
            pool.forward(rt, map, bins).expect("a call");
            E::narrow(Generic, &own, &mut given);
        }
        let given = View::new(&given, shape).expect("agents");
        let ([q, k, v], out) = case.views();
        op.forward_with(rt, q, k, v, given, out, extra().expect("biases")).expect("a call");
    });
    let (scale, given) = ((dim as f64).powf(-0.5), View::new(&given, shape)?);
    let error = args.check.then(|| {
        let mut at = 0;
        case.error(args, |h, q, k, v| {
            let a = Case::head(given, at / heads, h);
            at += 1;
            let part = |x: &[f32]| match args.bias {
                true => wide(&x[h * agents * n..][..agents * n]),
                false => vec![],
            };
            let [agent_bias, query_bias] = biases.each_ref().map(|x| part(x));
            let terms = agent::naive::Terms {
                scales: [scale; 2],
                k_shortcut: 0.0,
                agent_bias: &agent_bias,
                query_bias: &query_bias,
            };
            agent::naive::head(&a, [q, k, v], [n, n, agents, dim, dv], terms, |_| true).0
        })
    });
    let flops = 4.0 * (batch * n * heads * agents * (dim + dv)) as f64;
    Ok(Outcome { times, flops, tokens: Some((batch * n) as f64), error, ..Outcome::default() })
}

/// Focused linear attention with the published numbers and scales of 0.
pub fn focused(args: &Args, rt: &Runtime) -> Result<Outcome> {
    match args.dtype {
        Dtype::F32 => focused_as::<f32>(args, rt),
        Dtype::Bf16 => focused_as::<bf16>(args, rt),
        Dtype::F16 => focused_as::<f16>(args, rt),
    }
}

fn focused_as<E: Element>(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, heads, dim, .. } = *args;
    let dv = args.dv.unwrap_or(dim);
    let config = FocusedConfig { heads, ..FocusedConfig::default() };
    let op = FocusedLinearAttention::new(config, &vec![0.0; heads * dim])?;
    let mut case = Case::<E>::new(args)?;
    let times = timing::measure(args, rt, || {
        let ([q, k, v], out) = case.views();
        op.forward(rt, q, k, v, out).expect("a call");
    });
    let error = args.check.then(|| {
        let terms = focused::naive::Terms {
            power: 3.0,
            relu_eps: 1e-6,
            z_eps: 1e-6,
            normaliser: focused::Normaliser::Mean,
            scale: &vec![0.0; heads * dim],
        };
        let ([q, k, v], mut out) = case.views();
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for b in 0..batch {
            let [q, k, v] = [q, k, v].map(|x| tokens(x, b));
            want.extend(focused::naive::attend([&q, &k, &v], [n, n, heads, dim, dv], terms));
            for at in (0..n).flat_map(|t| (0..heads).map(move |h| [b, t, h, 0])) {
                got.extend(out.row_mut(at).iter().map(|x| x.to_f32()));
            }
        }
        (timing::relative(&got, &want), tolerance(args.dtype))
    });
    let flops = 4.0 * (batch * n * heads * dim * dv) as f64;
    Ok(Outcome { times, flops, tokens: Some((batch * n) as f64), error, ..Outcome::default() })
}
