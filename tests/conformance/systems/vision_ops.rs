//! The operations of vision attention: agents, and the convolution beside them.

use crate::case::Array;
use crate::run::Run;
use crate::support::{heads_first, heads_first_mut};
use linattn::Result;
use linattn::attention::Scale;
use linattn::attention::agent::{AgentAttention, AgentBiasGrads, AgentExtra};
use linattn::attention::focused::{FocusedConfig, FocusedLinearAttention, Normaliser};
use linattn::layers::{DepthwiseConfig, DepthwiseConv2d, DepthwiseGradients};
use linattn::tensor::{View, ViewMut};

fn agent_operation(run: &Run<'_>) -> Result<AgentAttention> {
    let scale = |name| Scale::Value(run.case.number(name) as f32);
    AgentAttention::new()
        .with_scales(scale("scale1"), scale("scale2"))?
        .with_shortcut(run.case.number("k_shortcut") as f32)
}

pub fn agent_gradients(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let inputs = ["in.q", "in.k", "in.v", "in.agents"].map(|n| case.tensor(n));
    let bias = |name| case.get(name).map(|t| View::new(&t.data, t.shape::<3>())).transpose();
    let [b1, b2] = [bias("in.bias1")?, bias("in.bias2")?];
    let mut dbiases = [b1, b2].map(|b| vec![f32::NAN; b.map_or(0, |b| b.shape().iter().product())]);
    let mut grads = inputs.map(|x| vec![f32::NAN; x.data.len()]);
    let mut shapes = inputs.iter().map(|x| x.shape());
    let views = grads.each_mut().map(|g| heads_first_mut(g, shapes.next().expect("a shape")));
    let [d1, d2] = &mut dbiases;
    let biases = AgentBiasGrads {
        agent_bias: b1.map(|b| ViewMut::new(d1, b.shape())).transpose()?,
        query_bias: b2.map(|b| ViewMut::new(d2, b.shape())).transpose()?,
    };
    let extra = AgentExtra { agent_bias: b1, query_bias: b2, ..AgentExtra::default() };
    let [q, k, v, agents] = inputs.map(|x| heads_first(&x.data, x.shape()));
    let dout = case.tensor("in.dout");
    let dout = heads_first(&dout.data, dout.shape());
    agent_operation(run)?.backward_with(run.rt, q, k, v, agents, dout, views, extra, biases)?;
    for (name, grad) in ["q", "k", "v", "agents"].into_iter().zip(&grads) {
        run.check(name, grad);
    }
    run.check("bias1", &dbiases[0]);
    run.check("bias2", &dbiases[1]);
    Ok(())
}

pub fn agent(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let [q, k, v, agents] = ["in.q", "in.k", "in.v", "in.agents"].map(|n| case.tensor(n));
    let ([b, h, lq, _], [_, _, n, _], [_, _, lk, dv]) = (q.shape(), agents.shape::<4>(), v.shape());
    let op = agent_operation(run)?;
    let bias = |name, shape| case.get(name).map(|t| View::new(&t.data, shape)).transpose();
    let (mut out, mut values) = (vec![f32::NAN; b * h * lq * dv], vec![f32::NAN; b * h * n * dv]);
    let extra = AgentExtra {
        agent_bias: bias("in.bias1", [h, n, lk])?,
        query_bias: bias("in.bias2", [h, lq, n])?,
        key_mask: None,
        agent_values: Some(heads_first_mut(&mut values, [b, h, n, dv])),
    };
    op.forward_with(
        run.rt,
        heads_first(&q.data, q.shape()),
        heads_first(&k.data, k.shape()),
        heads_first(&v.data, v.shape()),
        heads_first(&agents.data, agents.shape()),
        heads_first_mut(&mut out, [b, h, lq, dv]),
        extra,
    )?;
    run.check("out", &out);
    run.check("agent_v", &values);
    Ok(())
}

/// `[batch, channels, h, w]` memory with channels innermost.
pub fn channels_last(data: &[f32], [b, c, h, w]: [usize; 4]) -> Vec<f32> {
    let at = |n: usize, i: usize, k: usize| data[(n * c + k) * h * w + i];
    (0..b * h * w).flat_map(|i| (0..c).map(move |k| at(i / (h * w), i % (h * w), k))).collect()
}

/// And back.
pub fn channels_first(data: &[f32], [b, c, h, w]: [usize; 4]) -> Vec<f32> {
    let at = |n: usize, k: usize, i: usize| data[(n * h * w + i) * c + k];
    let all = (0..b * c).flat_map(|i| (0..h * w).map(move |p| at(i / c, i % c, p)));
    all.collect()
}

/// The convolution of a case.
fn convolution(run: &Run<'_>) -> Result<DepthwiseConv2d> {
    let (case, weight) = (run.case, run.case.tensor("w.weight"));
    let pair = |name| match case.key(name).as_array() {
        Some(list) => [0, 1].map(|d| list[d].as_u64().expect("a number") as usize),
        None => [case.size(name); 2],
    };
    let config = DepthwiseConfig { padding: pair("padding"), stride: pair("stride") };
    let bias = case.get("w.bias").map(|t| &t.data[..]);
    DepthwiseConv2d::new(View::new(&weight.data, weight.shape())?, bias, config)
}

pub fn depthwise(run: &Run<'_>) -> Result<()> {
    let (x, conv) = (run.case.tensor("in.x"), convolution(run)?);
    let [b, c, h, w] = x.shape();
    let [rows, columns] = conv.output_size([h, w]).expect("a window that fits");
    let mut out = vec![f32::NAN; b * rows * columns * c];
    let x = channels_last(&x.data, x.shape());
    let target = ViewMut::new(&mut out, [b, rows, columns, c])?;
    conv.forward(run.rt, View::new(&x, [b, h, w, c])?, target)?;
    run.check("out", &channels_first(&out, [b, c, rows, columns]));
    Ok(())
}

pub fn depthwise_gradients(run: &Run<'_>) -> Result<()> {
    let [x, dout, weight] = ["in.x", "in.dout", "w.weight"].map(|name| run.case.tensor(name));
    let ([b, c, h, w], [_, _, rows, columns]) = (x.shape(), dout.shape::<4>());
    let conv = convolution(run)?;
    let mut dx = vec![f32::NAN; x.data.len()];
    let mut dw = vec![f32::NAN; weight.data.len()];
    let mut db = vec![f32::NAN; conv.kernels()];
    let gradients = DepthwiseGradients {
        x: ViewMut::new(&mut dx, [b, h, w, c])?,
        weight: Some(ViewMut::new(&mut dw, weight.shape())?),
        bias: Some(&mut db),
    };
    let [x, dout] = [x, dout].map(|t| channels_last(&t.data, t.shape()));
    let [x, dout] = [View::new(&x, [b, h, w, c])?, View::new(&dout, [b, rows, columns, c])?];
    conv.backward(run.rt, x, dout, gradients)?;
    run.check("x", &channels_first(&dx, [b, c, h, w]));
    run.check("weight", &dw);
    run.check("bias", &db);
    Ok(())
}

/// The normaliser that a case names, the current one if it names none.
pub fn normaliser(run: &Run<'_>) -> Normaliser {
    match run.case.config.get("normaliser").and_then(|x| x.as_str()) {
        None | Some("mean") => Normaliser::Mean,
        Some("sum") => Normaliser::Sum,
        Some(other) => panic!("unknown normaliser `{other}`"),
    }
}

fn focused_operation(run: &Run<'_>) -> Result<FocusedLinearAttention> {
    let case = run.case;
    let config = FocusedConfig {
        heads: case.size("heads"),
        focusing_factor: case.number("focusing_factor") as f32,
        normaliser: normaliser(run),
        relu_eps: case.number("relu_eps") as f32,
        z_eps: case.number("z_eps") as f32,
    };
    FocusedLinearAttention::new(config, &case.tensor("w.scale").data)
}

/// `[batch, len, channels]` as heads.
fn heads(t: &Array, heads: usize) -> Result<View<'_, f32, 4>> {
    View::new(&t.data, t.shape::<3>())?.split_heads(heads)
}

pub fn focused_gradients(run: &Run<'_>) -> Result<()> {
    let op = focused_operation(run)?;
    let h = op.config().heads;
    let [q, k, v, dout] = ["in.q", "in.k", "in.v", "in.dout"].map(|n| run.case.tensor(n));
    let mut grads = [q, k, v].map(|x| vec![f32::NAN; x.data.len()]);
    let mut dscale = vec![f32::NAN; run.case.tensor("w.scale").data.len()];
    let [dq, dk, dv] = &mut grads;
    let views = [
        ViewMut::new(dq, q.shape::<3>())?.split_heads(h)?,
        ViewMut::new(dk, k.shape::<3>())?.split_heads(h)?,
        ViewMut::new(dv, v.shape::<3>())?.split_heads(h)?,
    ];
    let (q, k, v, dout) = (heads(q, h)?, heads(k, h)?, heads(v, h)?, heads(dout, h)?);
    op.backward(run.rt, q, k, v, dout, views, Some(&mut dscale))?;
    for (name, x) in ["q", "k", "v"].into_iter().zip(&grads) {
        run.check(name, x);
    }
    run.check("scale", &dscale);
    Ok(())
}

pub fn focused(run: &Run<'_>) -> Result<()> {
    let op = focused_operation(run)?;
    let h = op.config().heads;
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|n| run.case.tensor(n));
    let ([b, n, c], [_, m, _], [.., wide]) = (q.shape(), k.shape::<3>(), v.shape::<3>());
    let mut out = vec![f32::NAN; b * n * wide];
    let view = ViewMut::new(&mut out, [b, n, wide])?.split_heads(h)?;
    op.forward(run.rt, heads(q, h)?, heads(k, h)?, heads(v, h)?, view)?;
    run.check("out", &out);
    for (name, x, len) in [("phi_q", q, n), ("phi_k", k, m)] {
        let mut phi = vec![f32::NAN; b * len * c];
        op.features(run.rt, heads(x, h)?, ViewMut::new(&mut phi, [b, len, c])?)?;
        run.check(name, &phi);
    }
    Ok(())
}
