//! A transformer whose agents are a second stream.

use super::step::Step;
use crate::error::{Result, expect_shape};
use crate::io::TensorSource;
use crate::kernels::activation::Activate;
use crate::kernels::elementwise::GateHeads;
use crate::kernels::store::Keep;
use crate::layers::gla::{matrix, table};
use crate::layers::rows::rows;
use crate::layers::{Activation, Linear, Mlp, MlpConfig, Norm, Parameters};
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{Tensor, View, ViewMut};
use alloc::vec::Vec;

const OP: &str = "agent transformer";
/// Under the root of RMS norms, so that a row of zeros stays one.
const RMS_EPS: f32 = 1e-30;
/// Of the norms of heads.
const HEAD_EPS: f32 = 1e-5;

/// Sizes and choices of an [`AgentTransformer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgentTransformerConfig {
    /// Width of tokens and agents.
    pub dim: usize,
    /// Number of layers.
    pub depth: usize,
    /// Number of heads.
    pub heads: usize,
    /// Width of a head.
    pub dim_head: usize,
    /// Number of agents.
    pub agents: usize,
    /// Width inside of the channel mixers, over that of tokens.
    pub ff_mult: usize,
    /// Whether heads mix their maps after each softmax.
    pub talking_heads: bool,
    /// Whether outputs are gated, by one gate per head and row.
    pub gate: bool,
    /// Whether outputs of heads are normed.
    pub sub_layernorm: bool,
    /// Whether both streams are normed at the end.
    pub final_norm: bool,
}

/// A transformer over tokens `x` and agents `a` that advance together.
///
/// ```text
/// xn, an = RMSNorm(x), RMSNorm(a)              one weight, as all maps but the last two serve both streams
/// [q | k | v] = xn Wqkv^T    [qa | ka | _] = an Wqkv^T
/// VA = talk(softmax(s qa k^T)) v               keys of hidden tokens do not count
/// O  = talk(softmax(s q ka^T)) VA              0 for hidden tokens
/// x += norm(O * sigmoid(xn Wg^T + bg)) Wout^T      a += norm(VA * sigmoid(an Wg^T + bg)) Wagent^T
/// [a ; x] += W2 gelu(W1 RMSNorm([a ; x]) + b1) + b2
/// ```
///
/// Gates, the LayerNorm per head and `talk` are optional; the latter is that of
/// [`AgentSelfAttention`](super::AgentSelfAttention), as are costs. Not causal.
///
/// Source: Agent Attention (arXiv 2312.08874) in the form of the package `agent-attention-pytorch`.
///
/// ```
/// use linattn::layers::Parameters;
/// use linattn::layers::agent1d::{AgentTransformer, AgentTransformerConfig};
/// use linattn::{Runtime, tensor::Tensor};
/// # struct Zeros;
/// # impl linattn::io::TensorSource for Zeros {
/// #     fn contains(&self, _: &str) -> bool {
/// #         true
/// #     }
/// #     fn tensor<const N: usize>(&self, _: &str, shape: [usize; N]) -> linattn::Result<Tensor<N>> {
/// #         Tensor::zeros(shape)
/// #     }
/// # }
/// // Zeros is a source of tensors; a checkpoint is another.
/// let config = AgentTransformerConfig {
///     dim: 16,
///     depth: 2,
///     heads: 2,
///     dim_head: 8,
///     agents: 4,
///     ff_mult: 2,
///     talking_heads: true,
///     gate: true,
///     sub_layernorm: false,
///     final_norm: true,
/// };
/// let model = AgentTransformer::load(config, &Parameters::new(&Zeros))?;
/// let x = Tensor::<3>::zeros([1, 100, 16])?;
/// let mut y = x.clone();
/// model.forward(&Runtime::new()?, x.view(), None, y.view_mut(), None)?;
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AgentTransformer {
    config: AgentTransformerConfig,
    /// `[n, dim]`
    agents: Tensor<2>,
    layers: Vec<Layer>,
    norm: Option<Norm>,
}

#[derive(Clone, Debug)]
struct Layer {
    norm: Norm,
    qkv: Linear,
    gates: Option<Linear>,
    gather: Step,
    ask: Step,
    /// Of agents and of tokens: the norm of heads, and the way back to the stream.
    outs: [(Option<Norm>, Linear); 2],
    ff_norm: Norm,
    ff: Mlp,
}

impl AgentTransformerConfig {
    fn check(&self) -> Result<()> {
        let sizes = [
            ("dim", self.dim),
            ("depth", self.depth.saturating_add(1)),
            ("heads", self.heads),
            ("dim_head", self.dim_head),
            ("agents", self.agents),
            ("heads", self.heads.saturating_mul(self.dim_head)),
            ("ff_mult", self.ff_mult.saturating_mul(self.dim)),
        ];
        sizes.into_iter().try_for_each(|(arg, n)| super::size(OP, arg, n))
    }
}

fn rms(parameters: &Parameters<'_, impl TensorSource>, name: &str, dim: usize) -> Result<Norm> {
    let gamma = parameters.tensor(&alloc::format!("{name}.gamma"), [dim])?;
    Norm::rms(gamma.as_slice(), RMS_EPS)
}

impl Layer {
    fn load(
        config: &AgentTransformerConfig,
        parameters: &Parameters<'_, impl TensorSource>,
    ) -> Result<Self> {
        let AgentTransformerConfig { dim, heads, dim_head, talking_heads: talk, .. } = *config;
        let (inner, hidden) = (heads * dim_head, dim * config.ff_mult);
        let (mixer, ff) = (parameters.at(0), parameters.at(1));
        let out = |name: &str| -> Result<(Option<Norm>, Linear)> {
            let own = mixer.at(name);
            let norm = || own.layer_norm("0", dim_head, HEAD_EPS);
            let norm = config.sub_layernorm.then(norm).transpose()?;
            Ok((norm, own.linear("2", [dim, inner], false)?))
        };
        let gates = || mixer.linear("to_gates.0", [heads, dim], true);
        let (w1, w2) = (ff.linear("1", [hidden, dim], true)?, ff.linear("3", [dim, hidden], true)?);
        Ok(Self {
            norm: rms(&mixer, "norm", dim)?,
            qkv: mixer.linear("to_qkv.0", [3 * inner, dim], false)?,
            gates: config.gate.then(gates).transpose()?,
            gather: Step::load(heads, talk, &mixer, "ak_talking_heads")?,
            ask: Step::load(heads, talk, &mixer, "qa_talking_heads")?,
            outs: [out("to_agent_out")?, out("to_out")?],
            ff_norm: rms(&ff, "0", dim)?,
            ff: Mlp::new(MlpConfig { dim, hidden }, w1, w2)?,
        })
    }
}

/// The shape of a call.
#[derive(Clone, Copy)]
struct Size {
    batch: usize,
    agents: usize,
    len: usize,
    dim: usize,
    heads: usize,
    inner: usize,
}

impl Size {
    /// Rows of both streams.
    fn rows(&self) -> usize {
        self.batch * (self.agents + self.len)
    }
}

impl AgentTransformer {
    /// From `agent_tokens`, `layers.{l}.0.{norm, to_qkv.0, to_gates.0, ak_talking_heads, qa_talking_heads, to_out.2,
    /// to_agent_out.2}`, the norms `to_out.0` and `to_agent_out.0`, `layers.{l}.1.{0, 1, 3}` and `final_norm`.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for sizes of 0, [`Error::Checkpoint`](crate::Error::Checkpoint) for a
    /// tensor that is missing or does not fit, [`Error::Alloc`](crate::Error::Alloc) if memory cannot be had.
    pub fn load(
        config: AgentTransformerConfig,
        parameters: &Parameters<'_, impl TensorSource>,
    ) -> Result<Self> {
        config.check()?;
        let agents = parameters.tensor("agent_tokens", [config.agents, config.dim])?;
        let layers =
            (0..config.depth).map(|l| Layer::load(&config, &parameters.at("layers").at(l)));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = || rms(parameters, "final_norm", config.dim);
        Ok(Self { config, agents, layers, norm: config.final_norm.then(norm).transpose()? })
    }

    /// The sizes and choices.
    #[must_use]
    pub fn config(&self) -> &AgentTransformerConfig {
        &self.config
    }

    /// `x`, `out`: `[batch, len, dim]`; `mask`: `[batch, len]`, whether a token counts; `agents` receives the agents at
    /// the end, `[batch, n, dim]`. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for arguments that do not fit, [`Error::Alloc`](crate::Error::Alloc) if
    /// scratch memory cannot be had; outputs are untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        mask: Option<View<'_, bool, 2>>,
        mut out: ViewMut<'_, f32, 3>,
        agents: Option<ViewMut<'_, f32, 3>>,
    ) -> Result<()> {
        let ([batch, len, _], dim, n) = (x.shape(), self.config.dim, self.config.agents);
        expect_shape(OP, "x", "[batch, len, dim]", [batch, len, dim], x.shape())?;
        expect_shape(OP, "out", "[batch, len, dim]", [batch, len, dim], out.shape())?;
        if let Some(mask) = mask {
            expect_shape(OP, "mask", "[batch, len]", [batch, len], mask.shape())?;
        }
        if let Some(agents) = &agents {
            expect_shape(OP, "agents", "[batch, n, dim]", [batch, n, dim], agents.shape())?;
        }
        if batch == 0 {
            return Ok(());
        }
        let size = self.size(batch, len);
        rt.with_scratch(self.scratch_bytes(rt, batch, len), |mut cut| {
            let stream = cut.take::<f32>(size.rows() * dim);
            for (b, rows) in stream.chunks_exact_mut((n + len) * dim).enumerate() {
                let (own, tokens) = rows.split_at_mut(n * dim);
                own.copy_from_slice(self.agents.as_slice());
                for (t, row) in tokens.chunks_exact_mut(dim).enumerate() {
                    row.copy_from_slice(x.row([b, t, 0]));
                }
            }
            let normed = cut.take::<f32>(size.rows() * dim);
            let work = cut.take::<u8>(self.layer_bytes(rt, &size));
            for layer in &self.layers {
                layer.run(rt, &size, stream, normed, mask, work)?;
            }
            let last = match &self.norm {
                None => &*stream,
                Some(norm) => {
                    norm.run(rt, table(stream, size.rows()), matrix(normed, size.rows()));
                    &*normed
                }
            };
            let all = View::new(last, [batch, n + len, dim])?;
            for (b, t) in (0..batch).flat_map(|b| (0..len).map(move |t| (b, t))) {
                out.row_mut([b, t, 0]).copy_from_slice(all.row([b, n + t, 0]));
            }
            if let Some(mut agents) = agents {
                for (b, a) in (0..batch).flat_map(|b| (0..n).map(move |a| (b, a))) {
                    agents.row_mut([b, a, 0]).copy_from_slice(all.row([b, a, 0]));
                }
            }
            Ok(())
        })?
    }

    fn size(&self, batch: usize, len: usize) -> Size {
        let AgentTransformerConfig { dim, heads, dim_head, agents, .. } = self.config;
        Size { batch, agents, len, dim, heads, inner: heads * dim_head }
    }

    /// Scratch bytes that a call takes from the runtime, besides those of the attention itself.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, batch: usize, len: usize) -> usize {
        let size = self.size(batch, len);
        2 * bytes_of::<f32>(size.rows() * size.dim) + self.layer_bytes(rt, &size)
    }

    fn layer_bytes(&self, rt: &Runtime, size: &Size) -> usize {
        self.layers.iter().map(|l| l.bytes(rt, size)).max().map_or(0, bytes_of::<u8>)
    }
}

impl Layer {
    /// Scratch bytes of [`run`](Self::run).
    fn bytes(&self, rt: &Runtime, s: &Size) -> usize {
        let n = s.rows();
        let mixer = bytes_of::<f32>(n * 3 * s.inner)
            + bytes_of::<f32>(s.batch * s.agents * s.inner)
            + 2 * bytes_of::<f32>(n * s.inner)
            + bytes_of::<f32>(n * s.heads)
            + self.work_bytes(rt, s);
        mixer.max(self.ff.residual_bytes(rt, n))
    }

    fn work_bytes(&self, rt: &Runtime, s: &Size) -> usize {
        let longest = s.agents.max(s.len);
        let outs = self.outs.iter().map(|(_, l)| l.scratch_bytes(rt, longest));
        let steps = [self.gather.bytes(s.agents, s.inner), self.ask.bytes(s.len, s.inner)];
        let gates = self.gates.as_ref().map_or(0, |g| g.scratch_bytes(rt, s.rows()));
        let maps = [self.qkv.scratch_bytes(rt, s.rows()), gates];
        outs.chain(steps).chain(maps).max().unwrap_or(0)
    }

    /// Advances both streams, `[batch, agents and tokens, dim]`; `normed` has room for as much.
    fn run(
        &self,
        rt: &Runtime,
        s: &Size,
        stream: &mut [f32],
        normed: &mut [f32],
        mask: Option<View<'_, bool, 2>>,
        cut: &mut [u8],
    ) -> Result<()> {
        let Size { batch, agents, len, inner, .. } = *s;
        let (n, both) = (s.rows(), agents + len);
        self.norm.run(rt, table(stream, n), matrix(normed, n));
        {
            let mut cut = Cut::new(&mut *cut);
            let qkv = cut.take::<f32>(n * 3 * inner);
            let values = cut.take::<f32>(batch * agents * inner);
            let [mixed, scaled] = [(); 2].map(|()| cut.take::<f32>(n * inner));
            let gates = cut.take::<f32>(n * s.heads);
            let work = cut.take::<u8>(self.work_bytes(rt, s));
            self.qkv.run(rt, table(normed, n), matrix(qkv, n), Keep::Nothing, Cut::new(work));
            let all = View::new(&*qkv, [batch, both, 3 * inner])?;
            let part =
                |i: usize, from, to| all.slice(2, i * inner, (i + 1) * inner).slice(1, from, to);
            let [q, k, v] = [0, 1, 2].map(|i| part(i, agents, both));
            let [agent_q, agent_k] = [0, 1].map(|i| part(i, 0, agents));
            let shape = [batch, agents, inner];
            let gathered = ViewMut::new(&mut *values, shape)?;
            self.gather.run(rt, [agent_q, k, v], mask, gathered, work)?;
            let values = View::new(&*values, shape)?;
            let answer = ViewMut::new(&mut *mixed, [batch, both, inner])?.slice(1, agents, both);
            self.ask.run(rt, [q, agent_k, values], None, answer, work)?;
            for (b, rows) in mixed.chunks_exact_mut(both * inner).enumerate() {
                for (a, row) in rows[..agents * inner].chunks_exact_mut(inner).enumerate() {
                    row.copy_from_slice(values.row([b, a, 0]));
                }
            }
            if let Some(map) = &self.gates {
                map.run(rt, table(normed, n), matrix(gates, n), Keep::Nothing, Cut::new(work));
                rows(rt, Activate(Activation::Sigmoid), [], matrix(gates, n));
                rows(rt, GateHeads, [table(gates, n)], matrix(mixed, n));
            }
            if let Some(mask) = mask {
                for i in (0..batch * len).filter(|i| !mask.row([i / len, 0])[i % len]) {
                    let row = i / len * both + agents + i % len;
                    mixed[row * inner..][..inner].fill(0.0);
                }
            }
            for b in 0..batch {
                for (at, (norm, out)) in [(0, agents), (agents, len)].into_iter().zip(&self.outs) {
                    let (first, rows) = (b * both + at.0, at.1);
                    if rows == 0 {
                        continue;
                    }
                    let mut x = &mixed[first * inner..][..rows * inner];
                    if let Some(norm) = norm {
                        let to = &mut scaled[first * inner..][..rows * inner];
                        norm.run(rt, table(x, rows * s.heads), matrix(to, rows * s.heads));
                        x = to;
                    }
                    let y = &mut stream[first * s.dim..][..rows * s.dim];
                    out.run(rt, table(x, rows), matrix(y, rows), Keep::All, Cut::new(work));
                }
            }
        }
        self.ff.residual(rt, &self.ff_norm, stream, Cut::new(cut))
    }
}
