//! Every operation as one call, for what must hold for all of them.
#![allow(dead_code)] // every test program uses its own part of it

use crate::memory::Memory;
use linattn::attention::agent::{AgentAttention, AgentExtra};
use linattn::attention::combiner::{CombinerAttention, CombinerConfig};
use linattn::attention::focused::{FocusedConfig, FocusedLinearAttention};
use linattn::attention::lightning::LightningAttention;
use linattn::attention::linear::{FeatureMap, LinearAttention, LinearState};
use linattn::attention::merge::TokenMerging;
use linattn::attention::mixed_chunk::{MixedChunkAttention, MixedChunkConfig, MixedChunkState};
use linattn::attention::performer::{PerformerAttention, PerformerConfig};
use linattn::attention::quadratic::{self, Factor, QuadraticAttention, ScoreActivation};
use linattn::attention::softmax::{self, SoftmaxAttention};
use linattn::attention::{Mask, State, StreamState};
use linattn::io::TensorSource;
use linattn::layers::agent1d::{AgentSelfAttention, AgentSelfAttentionConfig};
use linattn::layers::flash::{Flash, FlashConfig, FlashForm, GateNorm};
use linattn::layers::vision::{Mechanism as Mixing, Scope, VisionAttention, VisionAttentionConfig};
use linattn::layers::{
    Activation, Conv2d, Conv2dConfig, DepthwiseConfig, DepthwiseConv2d, FeedForward,
    FeedForwardConfig, Linear, Lrpe, Mechanism, Norm, Parameters, Positions, Resample, Rope,
    RopeStyle, SelfAttention, SelfAttentionConfig, WeightFormat,
};
use linattn::tensor::{Element, Rng, Tensor};
use linattn::{Result, Runtime};

/// Extents of a call; operations take what they know.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub batch: usize,
    pub len: usize,
    pub heads: usize,
    pub dk: usize,
    pub dv: usize,
}

/// A call with operands from the memory.
pub type Call = fn(&Runtime, Size, &Memory) -> Result<()>;

/// All attention operations on elements `E`.
pub fn attention<E: Element>() -> Vec<(&'static str, Call)> {
    vec![
        ("softmax", softmax::<E>),
        ("softmax, bias and mask", softmax_with::<E>),
        ("linear", linear::<E>),
        ("linear, causal", linear_causal::<E>),
        ("lightning", lightning::<E>),
        ("agent", agent::<E>),
        ("agent, biases and mask", agent_with::<E>),
        ("focused", focused::<E>),
        ("quadratic", quadratic::<E>),
        ("mixed chunk", mixed_chunk::<E>),
        ("mixed chunk, causal", mixed_chunk_causal::<E>),
        ("performer", performer::<E>),
        ("performer, causal", performer_causal::<E>),
        ("combiner, fixed", combiner_fixed::<E>),
        ("combiner, axial", combiner_axial::<E>),
        ("combiner, mixture", combiner_mixture::<E>),
    ]
}

/// What layers are made of.
pub const LAYERS: [(&str, Call); 19] = [
    ("map of f32", map::<0>),
    ("map of bf16", map::<1>),
    ("map of int8", map::<2>),
    ("RMS norm", rms),
    ("layer norm", layer_norm),
    ("gated map, SiLU", feed_forward::<0>),
    ("gated map, GELU", feed_forward::<1>),
    ("gated map, 1 + ELU", feed_forward::<2>),
    ("LRPE", lrpe),
    ("RoPE", rope),
    ("depthwise convolution", depthwise),
    ("convolution", conv),
    ("resampling", resample),
    ("token merging", merge),
    ("the way back", unmerge),
    ("self-attention", self_attention),
    ("attention of a map", vision_attention),
    ("agents of a sequence", agent_sequence),
    ("FLASH", flash),
];

fn softmax<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let Size { batch, len, heads, dk, dv } = s;
    let op = SoftmaxAttention::new().with_mask(Mask::Causal);
    let (q, k) = (m.input::<E, 4>([batch, len, 2 * heads, dk]), m.input([batch, len, heads, dk]));
    let (v, out) = (m.input([batch, len, heads, dv]), m.output([batch, len, 2 * heads, dv]));
    m.call(|| op.forward(rt, q, k, v, out))
}

fn softmax_with<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let Size { batch, len, heads, dk, dv } = s;
    let (q, k) = (m.input::<E, 4>([batch, 5, heads, dk]), m.input([batch, len, heads, dk]));
    let (v, out) = (m.input([batch, len, heads, dv]), m.output([batch, 5, heads, dv]));
    let extra = softmax::Extra {
        key_mask: Some(m.flags([batch, len])),
        bias: Some(m.input([heads, 5, len])),
    };
    m.call(|| SoftmaxAttention::new().forward_with(rt, q, k, v, out, extra))
}

fn linear<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let Size { batch, len, heads, dk, dv } = s;
    let op = LinearAttention::new(FeatureMap::Elu1);
    let (q, k) = (m.input::<E, 4>([batch, 5, heads, dk]), m.input([batch, len, heads, dk]));
    let (v, out) = (m.input([batch, len, heads, dv]), m.output([batch, 5, heads, dv]));
    m.call(|| op.forward(rt, q, k, v, out, None))
}

fn linear_causal<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let Size { batch, len, heads, dk, dv } = s;
    let op = LinearAttention::new(FeatureMap::Elu1).causal();
    let [q, k] = [(); 2].map(|()| m.input::<E, 4>([batch, len, heads, dk]));
    let (v, out) = (m.input([batch, len, heads, dv]), m.output([batch, len, heads, dv]));
    let mut state = LinearState::new(batch, heads, dk, dv)?;
    m.call(|| op.forward(rt, q, k, v, out, Some(&mut state)))?;
    contents(&state, m)
}

/// The state is a result too.
pub fn contents(state: &impl StreamState, m: &Memory) -> Result<()> {
    state.contents(&mut |x| {
        m.also(x);
        Ok(())
    })
}

pub fn lightning<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let Size { batch, len, heads, dk, dv } = s;
    let slopes: Vec<f64> = (0..heads).map(|h| 0.3 * h as f64).collect();
    let op = LightningAttention::with_chunk(&slopes, 32)?;
    let [q, k] = [(); 2].map(|()| m.input::<E, 4>([batch, len, heads, dk]));
    let (v, out) = (m.input([batch, len, heads, dv]), m.output([batch, len, heads, dv]));
    let mut state = State::new(batch, heads, dk, dv)?;
    m.call(|| op.forward(rt, q, k, v, out, &mut state))?;
    contents(&state, m)
}

fn agent<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let Size { batch, len, heads, dk, dv } = s;
    let op = AgentAttention::new().with_shortcut(0.5)?;
    let [q, k] = [(); 2].map(|()| m.input::<E, 4>([batch, len, heads, dk]));
    let (v, agents) = (m.input([batch, len, heads, dv]), m.input([batch, 9, heads, dk]));
    let out = m.output([batch, len, heads, dv]);
    m.call(|| op.forward(rt, q, k, v, agents, out))
}

fn agent_with<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let Size { batch, len, heads, dk, dv } = s;
    let (q, k) = (m.input::<E, 4>([batch, 7, heads, dk]), m.input([batch, len, heads, dk]));
    let (v, agents) = (m.input([batch, len, heads, dv]), m.input([batch, 5, heads, dk]));
    let out = m.output([batch, 7, heads, dv]);
    let extra = AgentExtra {
        agent_bias: Some(m.input([heads, 5, len])),
        query_bias: Some(m.input([heads, 7, 5])),
        key_mask: Some(m.flags([batch, len])),
        agent_values: Some(m.output([batch, 5, heads, dv])),
    };
    m.call(|| AgentAttention::new().forward_with(rt, q, k, v, agents, out, extra))
}

fn focused<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let Size { batch, len, heads, dk, dv } = s;
    let config = FocusedConfig { heads, ..FocusedConfig::default() };
    let op = FocusedLinearAttention::new(config, m.numbers(heads * dk))?;
    let [q, k] = [(); 2].map(|()| m.input::<E, 4>([batch, len, heads, dk]));
    let (v, out) = (m.input([batch, len, heads, dv]), m.output([batch, len, heads, dv]));
    m.call(|| op.forward(rt, q, k, v, out))
}

fn quadratic<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let Size { batch, len, dk, dv, .. } = s;
    let op = QuadraticAttention::new(ScoreActivation::Laplace, Factor::InvLen)?;
    let (q, k) = (m.input::<E, 3>([batch, 7, dk]), m.input([batch, len, dk]));
    let (v, out) = (m.input([batch, len, dv]), m.output([batch, 7, dv]));
    let extra =
        quadratic::Extra { key_mask: Some(m.flags([batch, len])), ..quadratic::Extra::default() };
    m.call(|| op.forward_with(rt, q, k, v, out, extra))
}

fn chunks<E: Element>(rt: &Runtime, s: Size, m: &Memory, causal: bool) -> Result<()> {
    let Size { batch, len, dk, dv, .. } = s;
    let op = MixedChunkAttention::new(MixedChunkConfig::paper(24, causal))?;
    let qk = [(); 4].map(|()| m.input::<E, 3>([batch, len, dk]));
    let (v, out) = (m.input([batch, len, dv]), m.output([batch, len, dv]));
    if !causal {
        return m.call(|| op.forward(rt, qk, v, out, None));
    }
    let mut state = MixedChunkState::new(batch, 24, dk, dv)?;
    m.call(|| op.forward(rt, qk, v, out, Some(&mut state)))
}

fn mixed_chunk<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    chunks::<E>(rt, s, m, false)
}

fn mixed_chunk_causal<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    chunks::<E>(rt, s, m, true)
}

fn performers<E: Element>(
    rt: &Runtime,
    s: Size,
    m: &Memory,
    config: PerformerConfig,
) -> Result<()> {
    let Size { batch, len, heads, dk, dv } = s;
    let op = PerformerAttention::new(config, m.input([dk + 3, dk]))?;
    let [q, k] = [(); 2].map(|()| m.input::<E, 4>([batch, len, heads, dk]));
    let (v, out) = (m.input([batch, len, heads, dv]), m.output([batch, len, heads, dv]));
    m.call(|| op.forward(rt, q, k, v, out, None))
}

fn performer<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    performers::<E>(rt, s, m, PerformerConfig::softmax())
}

fn performer_causal<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    performers::<E>(rt, s, m, PerformerConfig::relu().causal())
}

fn combiners<E: Element>(rt: &Runtime, s: Size, m: &Memory, config: CombinerConfig) -> Result<()> {
    let Size { batch, len, heads, dk, dv } = s;
    let op = CombinerAttention::new(config)?;
    let [q, k] = [(); 2].map(|()| m.input::<E, 4>([batch, len, heads, dk]));
    let (v, out) = (m.input([batch, len, heads, dv]), m.output([batch, len, heads, dv]));
    m.call(|| op.forward(rt, q, k, v, out, None))
}

fn combiner_fixed<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    combiners::<E>(rt, s, m, CombinerConfig::fixed(8).causal())
}

fn combiner_axial<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    combiners::<E>(rt, s, m, CombinerConfig::axial_row_major(8))
}

fn combiner_mixture<E: Element>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    combiners::<E>(rt, s, m, CombinerConfig::axial_mixture(8))
}

fn map<const FORMAT: usize>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let weight = m.input::<f32, 2>([s.dv, s.dk]);
    let bias = Some(m.numbers(s.dv));
    let op = Linear::with_format(weight, bias, WeightFormat::ALL[FORMAT])?;
    let (x, out) = (m.input([s.len, s.dk]), m.output([s.len, s.dv]));
    m.call(|| op.forward(rt, x, out))
}

fn norm(rt: &Runtime, s: Size, m: &Memory, norm: Norm) -> Result<()> {
    let (x, out) = (m.input([s.len, s.dk]), m.output([s.len, s.dk]));
    m.call(|| norm.forward(rt, x, out))
}

fn rms(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    norm(rt, s, m, Norm::rms(m.numbers(s.dk), 1e-6)?)
}

fn layer_norm(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    norm(rt, s, m, Norm::layer(Some(m.numbers(s.dk)), Some(m.numbers(s.dk)), 1e-6)?)
}

fn feed_forward<const ACT: usize>(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let act = [Activation::Silu, Activation::Gelu, Activation::Elu1][ACT];
    let config = FeedForwardConfig { dim: s.dk, hidden: s.dv, act };
    let linear = |n, k| Linear::new(m.input::<f32, 2>([n, k]), None);
    let gate = Some(linear(s.dv, s.dk)?);
    let op = FeedForward::new(config, gate, linear(s.dv, s.dk)?, linear(s.dk, s.dv)?)?;
    let (x, out) = (m.input([s.len, s.dk]), m.output([s.len, s.dk]));
    m.call(|| op.forward(rt, x, out))
}

fn lrpe(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let op = Lrpe::new(m.input([s.heads, s.dk]))?;
    let x = m.input([s.batch, s.len, s.heads, s.dk]);
    let out = m.output([s.batch, s.len, s.heads, 2 * s.dk]);
    m.call(|| op.forward(rt, x, 3, out))
}

fn rope(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let style = if s.len.is_multiple_of(2) { RopeStyle::Half } else { RopeStyle::Interleaved };
    let op = Rope::new(style, s.dk / 2 * 2, 1e4)?;
    let [b, n, h, d] = [s.batch, s.len, s.heads, s.dk];
    let (x, out) = (m.input([b, n, h, d]), m.output([b, n, h, d]));
    m.call(|| op.forward(rt, x, Positions::From(5), out))
}

/// Rows and columns of a map of `len` places or a few more.
fn side(s: Size) -> [usize; 2] {
    [3, s.len.div_ceil(3)]
}

fn depthwise(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let weight = m.input([s.dk, 1, 3, 3]);
    let op = DepthwiseConv2d::new(weight, Some(m.numbers(s.dk)), DepthwiseConfig::same(3))?;
    let [h, w] = side(s);
    let (x, out) = (m.input([s.batch, h, w, s.dk]), m.output([s.batch, h, w, s.dk]));
    m.call(|| op.forward(rt, x, out))
}

fn conv(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let config = Conv2dConfig::square(s.dk, s.dv, 3, 2, 1);
    let op = Conv2d::new(config, m.input([s.dv, s.dk, 3, 3]), Some(m.numbers(s.dv)))?;
    let map = side(s);
    let [h, w] = op.config().output(map)?;
    let x = m.input([s.batch, map[0], map[1], s.dk]);
    let out = m.output([s.batch, h * w, s.dv]);
    m.call(|| op.forward(rt, x, out))
}

fn resample(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let [h, w] = side(s);
    let op = Resample::bilinear([h, w], [4, 5])?;
    let (x, out) = (m.input([s.batch, h, w, s.dk]), m.output([s.batch, 4, 5, s.dk]));
    m.call(|| op.forward(rt, x, out))
}

fn merge(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let map = side(s);
    let op = TokenMerging::new(map, [2.min(map[0]), 2.min(map[1])])?;
    let (mut order, mut best) = (vec![0; op.others()], vec![0; op.others()]);
    let (x, r) = (m.input([op.tokens(), s.dk]), op.count(0.3));
    let out = m.output([op.tokens() - r, s.dk]);
    m.call(|| op.matching(rt, x, &mut order, &mut best)?.merge(r, x, out))
}

fn unmerge(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let map = side(s);
    let op = TokenMerging::new(map, [2.min(map[0]), 2.min(map[1])])?;
    let (mut order, mut best) = (vec![0; op.others()], vec![0; op.others()]);
    let (x, out) = (m.input([op.tokens(), s.dk]), m.output([op.tokens(), s.dk]));
    let matching = op.matching(rt, x, &mut order, &mut best)?;
    m.call(|| matching.unmerge(0, x, out))
}

/// Tensors of any name and shape, random and of unit gain.
struct Anything;

impl TensorSource for Anything {
    fn contains(&self, _: &str) -> bool {
        true
    }
    fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> Result<Tensor<N>> {
        let mut out = Tensor::zeros(shape)?;
        let mut rng = Rng::new(name.bytes().fold(5, |h, b| h * 31 % 65537 + u64::from(b)));
        rng.fill_normal(out.as_mut_slice(), (shape[N - 1].max(1) as f32).powf(-0.5));
        Ok(out)
    }
}

fn self_attention(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let (wide, shared) = (2 * s.heads * 6, s.heads * 6);
    let linear = |name, n, k| Parameters::new(&Anything).linear(name, [n, k], true);
    let maps = [
        linear("q", wide, s.dk)?,
        linear("k", shared, s.dk)?,
        linear("v", shared, s.dk)?,
        linear("o", s.dk, wide)?,
    ];
    let (heads, kv_heads) = (2 * s.heads, s.heads);
    let config = SelfAttentionConfig { dim: s.dk, heads, kv_heads, head_dim: 6, causal: true };
    let rope = Rope::new(RopeStyle::Half, 4, 1e4)?;
    let op = SelfAttention::new(config, maps, Some(rope), Mechanism::Softmax)?;
    let (x, out) = (m.input([s.batch, s.len, s.dk]), m.output([s.batch, s.len, s.dk]));
    let mut state = op.new_state(s.batch)?;
    m.call(|| op.forward(rt, x, out, Some(&mut state)))
}

fn vision_attention(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let config = VisionAttentionConfig {
        dim: 4 * s.heads,
        heads: s.heads,
        map: [8, 8],
        scope: Scope::Whole { class_token: false },
        mechanism: Mixing::Agent { agents: 4 },
        qkv_bias: true,
    };
    let op = VisionAttention::load(config, &Parameters::new(&Anything))?;
    let shape = [s.batch, config.tokens(), config.dim];
    let (x, out) = (m.input(shape), m.output(shape));
    m.call(|| op.forward(rt, x, out))
}

fn agent_sequence(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let config = AgentSelfAttentionConfig {
        dim: s.dk,
        heads: s.heads,
        dim_head: 5,
        agents: 4,
        talking_heads: true,
        gate: true,
    };
    let op = AgentSelfAttention::load(config, &Parameters::new(&Anything))?;
    let (x, out) = (m.input([s.batch, s.len, s.dk]), m.output([s.batch, s.len, s.dk]));
    m.call(|| op.forward(rt, x, out))
}

fn flash(rt: &Runtime, s: Size, m: &Memory) -> Result<()> {
    let config = FlashConfig {
        form: FlashForm::Package { shift_tokens: true, rotary_dim: 6, own_chunk: false },
        dim: s.dk,
        query_key_dim: 10,
        hidden: s.dv,
        group_size: 8,
        causal: true,
        act: ScoreActivation::Laplace,
        norm: GateNorm::Layer,
        eps: 1e-5,
    };
    let op = Flash::from_parameters(config, &Parameters::new(&Anything))?;
    let (x, out) = (m.input([s.batch, s.len, s.dk]), m.output([s.batch, s.len, s.dk]));
    let mut state = op.new_state(s.batch)?;
    m.call(|| op.forward(rt, x, out, Some(&mut state)))
}
