//! Every backward pass as one call, beside those of `calls.rs`.
#![allow(dead_code)] // every test program uses its own part of it

use crate::calls::{Call, Size, contents};
use crate::memory::Memory;
use linattn::attention::agent::AgentAttention;
use linattn::attention::combiner::{CombinerAttention, CombinerConfig};
use linattn::attention::focused::{FocusedConfig, FocusedLinearAttention};
use linattn::attention::lightning::LightningAttention;
use linattn::attention::linear::{FeatureMap, LinearAttention, LinearState};
use linattn::attention::mixed_chunk::{MixedChunkAttention, MixedChunkConfig};
use linattn::attention::performer::{PerformerAttention, PerformerConfig, PerformerState};
use linattn::attention::quadratic::{Factor, QuadraticAttention, ScoreActivation};
use linattn::attention::softmax::{self, SoftmaxAttention};
use linattn::attention::{Gradients, Inputs, Mask, State};
use linattn::layers::{
    Activation, DepthwiseConfig, DepthwiseConv2d, DepthwiseGradients, Lrpe, Norm, NormGradients,
    Positions, Rope, RopeStyle, affine, pointwise,
};
use linattn::{Result, Runtime};

/// Gradients of every operation, and of what layers are made of.
pub const BACKWARD: [(&str, Call); 24] = [
    ("gradients of softmax", softmax),
    ("gradients of softmax, bias and mask", softmax_with),
    ("gradients of linear", linear),
    ("gradients of linear, causal", linear_causal),
    ("gradients of lightning", lightning),
    ("gradients of agent", agent),
    ("gradients of focused", focused),
    ("gradients of quadratic", quadratic),
    ("gradients of mixed chunk", mixed_chunk::<false>),
    ("gradients of mixed chunk, causal", mixed_chunk::<true>),
    ("gradients of performer", performer),
    ("gradients of performer, causal", performer_causal),
    ("gradients of combiner, fixed", combiner_fixed),
    ("gradients of combiner, mixture", combiner_mixture),
    ("gradients of a map", map),
    ("gradients of RMS norm", rms),
    ("gradients of layer norm", layer_norm),
    ("gradients of GELU", activation),
    ("gradients of a gate", gate),
    ("gradients of offset and scale", offset_scale),
    ("gradients of LRPE", lrpe),
    ("gradients of LRPE's angles", lrpe_angles),
    ("gradients of RoPE", rope),
    ("gradients of a depthwise convolution", depthwise),
];

/// Those with a result that is a sum over the batch.
pub const SUMS: [&str; 3] = [
    "gradients of softmax, bias and mask",
    "gradients of LRPE's angles",
    "gradients of a depthwise convolution",
];

/// `q`, `k`, `v`, `dout`, and where the gradients of the first three go, with `lq` queries.
macro_rules! operands {
    ($m:ident, $s:ident, $lq:expr, $heads:expr) => {{
        let Size { batch, len, heads, dk, dv } = $s;
        let (q, k) =
            ($m.input::<f32, 4>([batch, $lq, $heads, dk]), $m.input([batch, len, heads, dk]));
        let (v, dout) = ($m.input([batch, len, heads, dv]), $m.input([batch, $lq, $heads, dv]));
        let to = [
            $m.output([batch, $lq, $heads, dk]),
            $m.output([batch, len, heads, dk]),
            $m.output([batch, len, heads, dv]),
        ];
        ([q, k, v, dout], to)
    }};
}

fn softmax(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let op = SoftmaxAttention::new().with_mask(Mask::Causal);
    let ([q, k, v, dout], to) = operands!(m, s, s.len, 2 * s.heads);
    m.call(|| op.backward(rt, q, k, v, dout, to))
}

fn softmax_with(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let ([q, k, v, dout], to) = operands!(m, s, 5, s.heads);
    let extra = softmax::Extra {
        key_mask: Some(m.flags([s.batch, s.len])),
        bias: Some(m.input([s.heads, 5, s.len])),
    };
    let dbias = Some(m.output([s.heads, 5, s.len]));
    m.call(|| SoftmaxAttention::new().backward_with(rt, q, k, v, dout, to, extra, dbias))
}

fn linear(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let op = LinearAttention::new(FeatureMap::Silu);
    let ([q, k, v, dout], [dq, dk, dv]) = operands!(m, s, 5, s.heads);
    let inputs = Inputs { q, k, v, state: None, dout };
    m.call(|| op.backward(rt, inputs, Gradients { q: dq, k: dk, v: dv, state: None }))
}

fn linear_causal(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let op = LinearAttention::new(FeatureMap::Elu1).causal();
    let ([q, k, v, dout], [dq, dk, dv]) = operands!(m, s, s.len, s.heads);
    let state = LinearState::new(s.batch, s.heads, s.dk, s.dv)?;
    let inputs = Inputs { q, k, v, state: Some(&state), dout };
    m.call(|| op.backward(rt, inputs, Gradients { q: dq, k: dk, v: dv, state: None }))
}

fn lightning(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let slopes: Vec<f64> = (0..s.heads).map(|h| 0.3 * h as f64).collect();
    let op = LightningAttention::with_chunk(&slopes, 32)?;
    let ([q, k, v, dout], [dq, dk, dv]) = operands!(m, s, s.len, s.heads);
    let state = State::new(s.batch, s.heads, s.dk, s.dv)?;
    let mut dstate = State::new(s.batch, s.heads, s.dk, s.dv)?;
    let inputs = Inputs { q, k, v, state: Some(&state), dout };
    let grads = Gradients { q: dq, k: dk, v: dv, state: Some(&mut dstate) };
    m.call(|| op.backward(rt, inputs, grads))?;
    contents(&dstate, m)
}

fn agent(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let op = AgentAttention::new().with_shortcut(0.5)?;
    let ([q, k, v, dout], [dq, dk, dv]) = operands!(m, s, s.len, s.heads);
    let agents = m.input([s.batch, 9, s.heads, s.dk]);
    let to = [dq, dk, dv, m.output([s.batch, 9, s.heads, s.dk])];
    m.call(|| op.backward(rt, q, k, v, agents, dout, to))
}

fn focused(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let config = FocusedConfig { heads: s.heads, ..FocusedConfig::default() };
    let op = FocusedLinearAttention::new(config, m.numbers(s.heads * s.dk))?;
    let ([q, k, v, dout], to) = operands!(m, s, s.len, s.heads);
    m.call(|| op.backward(rt, q, k, v, dout, to, None))
}

fn quadratic(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let Size { batch, len, dk, dv, .. } = s;
    let op = QuadraticAttention::new(ScoreActivation::Laplace, Factor::InvLen)?;
    let (q, k) = (m.input::<f32, 3>([batch, 7, dk]), m.input([batch, len, dk]));
    let (v, dout) = (m.input([batch, len, dv]), m.input([batch, 7, dv]));
    let to = [m.output([batch, 7, dk]), m.output([batch, len, dk]), m.output([batch, len, dv])];
    m.call(|| op.backward(rt, q, k, v, dout, to))
}

fn mixed_chunk<const CAUSAL: bool>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let Size { batch, len, dk, dv, .. } = s;
    let op = MixedChunkAttention::new(MixedChunkConfig::paper(24, CAUSAL))?;
    let qk = [(); 4].map(|()| m.input::<f32, 3>([batch, len, dk]));
    let [v, dout] = [(); 2].map(|()| m.input([batch, len, dv]));
    let to = [dk, dk, dk, dk, dv].map(|d| m.output([batch, len, d]));
    m.call(|| op.backward(rt, qk, v, dout, to))
}

fn performers(rt: &Runtime, s: Size, m: &Memory, config: PerformerConfig) -> Result<()> {
    let op = PerformerAttention::new(config, m.input([s.dk + 3, s.dk]))?;
    let ([q, k, v, dout], [dq, dk, dv]) = operands!(m, s, s.len, s.heads);
    let inputs = Inputs { q, k, v, state: None::<&PerformerState>, dout };
    m.call(|| op.backward(rt, inputs, Gradients { q: dq, k: dk, v: dv, state: None }))
}

fn performer(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    performers(rt, s, m, PerformerConfig::softmax())
}

fn performer_causal(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    performers(rt, s, m, PerformerConfig::relu().causal())
}

fn combiners(rt: &Runtime, s: Size, m: &Memory, config: CombinerConfig) -> Result<()> {
    let op = CombinerAttention::new(config)?;
    let ([q, k, v, dout], to) = operands!(m, s, s.len, s.heads);
    m.call(|| op.backward(rt, q, k, v, dout, to))
}

fn combiner_fixed(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    combiners(rt, s, m, CombinerConfig::fixed(8).causal())
}

fn combiner_mixture(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    combiners(rt, s, m, CombinerConfig::axial_mixture(8))
}

fn map(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let (x, weight) = (m.input::<f32, 2>([s.len, s.dk]), m.input([s.dv, s.dk]));
    let (dout, dbias) = (m.input([s.len, s.dv]), Some(m.output([s.dv])));
    let to = [m.output([s.len, s.dk]), m.output([s.dv, s.dk])];
    m.call(|| affine::backward(rt, x, weight, dout, to, dbias))
}

fn norm(rt: &Runtime, s: Size, m: &Memory, norm: Norm) -> Result<()> {
    let [x, dout] = [(); 2].map(|()| m.input([s.len, s.dk]));
    let gradients = NormGradients { x: m.output([s.len, s.dk]), weight: None, bias: None };
    m.call(|| norm.backward(rt, x, dout, gradients))
}

fn rms(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    norm(rt, s, m, Norm::rms(m.numbers(s.dk), 1e-6)?)
}

fn layer_norm(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    norm(rt, s, m, Norm::layer(Some(m.numbers(s.dk)), Some(m.numbers(s.dk)), 1e-6)?)
}

fn activation(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let [x, dout] = [(); 2].map(|()| m.input([s.len, s.dk]));
    let dx = m.output([s.len, s.dk]);
    m.call(|| pointwise::activate_backward(rt, Activation::Gelu, x, dout, dx))
}

fn gate(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let [gate, x, dout] = [(); 3].map(|()| m.input([s.len, s.dk]));
    let to = [(); 2].map(|()| m.output([s.len, s.dk]));
    m.call(|| pointwise::gate_backward(rt, Activation::Silu, gate, x, dout, to))
}

fn offset_scale(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let (x, dout) = (m.input([s.len, s.dk]), m.input([s.len, s.heads * s.dk]));
    let (gamma, dx) = (m.numbers(s.heads * s.dk), m.output([s.len, s.dk]));
    let grads = [(); 2].map(|()| m.output([s.heads * s.dk]));
    m.call(|| pointwise::offset_scale_backward(rt, x, gamma, dout, dx, grads))
}

fn lrpe(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let op = Lrpe::new(m.input([s.heads, s.dk]))?;
    let dout = m.input([s.batch, s.len, s.heads, 2 * s.dk]);
    let dx = m.output([s.batch, s.len, s.heads, s.dk]);
    m.call(|| op.backward(rt, 3, dout, dx))
}

fn lrpe_angles(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let op = Lrpe::new(m.input([s.heads, s.dk]))?;
    let [x, dout] = [1, 2].map(|n| m.input([s.batch, s.len, s.heads, n * s.dk]));
    let dtheta = m.output([s.heads, s.dk]);
    m.call(|| op.backward_angles(rt, x, 3, dout, dtheta))
}

fn rope(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let op = Rope::new(RopeStyle::Half, s.dk / 2 * 2, 1e4)?;
    let [b, n, h, d] = [s.batch, s.len, s.heads, s.dk];
    let (dout, dx) = (m.input([b, n, h, d]), m.output([b, n, h, d]));
    m.call(|| op.backward(rt, Positions::From(5), dout, dx))
}

fn depthwise(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let weight = m.input([s.dk, 1, 3, 3]);
    let op = DepthwiseConv2d::new(weight, Some(m.numbers(s.dk)), DepthwiseConfig::same(3))?;
    let shape = [s.batch, 3, s.len.div_ceil(3), s.dk];
    let [x, dout] = [(); 2].map(|()| m.input(shape));
    let gradients = DepthwiseGradients {
        x: m.output(shape),
        weight: Some(m.output([s.dk, 1, 3, 3])),
        bias: None,
    };
    m.call(|| op.backward(rt, x, dout, gradients))
}
