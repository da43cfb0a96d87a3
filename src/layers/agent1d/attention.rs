//! Agent attention over a sequence.

use super::step::Step;
use crate::error::{Result, expect_shape};
use crate::io::TensorSource;
use crate::kernels::activation::Activate;
use crate::kernels::elementwise::GateHeads;
use crate::kernels::store::Keep;
use crate::layers::gla::{matrix, table};
use crate::layers::rows::rows;
use crate::layers::{Activation, Linear, Parameters};
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{Tensor, View, ViewMut};

const OP: &str = "agent self-attention";

/// Sizes and choices of an [`AgentSelfAttention`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgentSelfAttentionConfig {
    /// Width of tokens.
    pub dim: usize,
    /// Number of heads.
    pub heads: usize,
    /// Width of a head.
    pub dim_head: usize,
    /// Number of agents.
    pub agents: usize,
    /// Whether heads mix their maps after each softmax.
    pub talking_heads: bool,
    /// Whether outputs are gated, by one gate per head and token.
    pub gate: bool,
}

/// Agent attention over a sequence, with agents that are parameters.
///
/// ```text
/// [q | k | v] = x Wqkv^T                       s = dim_head^-1/2
/// VA = talk(softmax(s A K^T)) V                keys of hidden tokens do not count
/// O  = talk(softmax(s Q A^T)) VA               0 for hidden tokens
/// out = (O * sigmoid(x Wg^T + bg)) Wout^T      one gate per head
/// ```
///
/// `talk` replaces the map of head `o` by `sum_h W[o, h] map_h`. In a batch row that hides all keys, all weigh the same.
/// Not causal. `8 dim inner` flops per token for the projections, `inner = heads * dim_head`, and `4 n inner` for the
/// attention with `n` agents, the latter times the number of heads if they talk.
///
/// Source: Agent Attention (arXiv 2312.08874) in the form of the package `agent-attention-pytorch`.
///
/// ```
/// use linattn::layers::Parameters;
/// use linattn::layers::agent1d::{AgentSelfAttention, AgentSelfAttentionConfig};
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
/// let config = AgentSelfAttentionConfig {
///     dim: 16,
///     heads: 2,
///     dim_head: 8,
///     agents: 4,
///     talking_heads: true,
///     gate: true,
/// };
/// let attention = AgentSelfAttention::load(config, &Parameters::new(&Zeros))?;
/// let x = Tensor::<3>::zeros([1, 100, 16])?;
/// let mut y = x.clone();
/// attention.forward(&Runtime::new()?, x.view(), y.view_mut())?;
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AgentSelfAttention {
    config: AgentSelfAttentionConfig,
    qkv: Linear,
    gates: Option<Linear>,
    /// `[heads, n, dim_head]`
    agents: Tensor<3>,
    gather: Step,
    ask: Step,
    out: Linear,
}

/// What a call over a sequence may have besides its tokens.
#[derive(Debug, Default)]
pub struct SequenceExtra<'a> {
    /// `[batch, len]`: whether a token counts.
    pub mask: Option<View<'a, bool, 2>>,
    /// `[batch, n, heads, dim_head]`: agents in place of the parameters, any number of them.
    pub agents: Option<View<'a, f32, 4>>,
    /// `[batch, n, heads, dim_head]`: receives what the agents gathered.
    pub gathered: Option<ViewMut<'a, f32, 4>>,
}

impl AgentSelfAttentionConfig {
    fn check(&self) -> Result<()> {
        let sizes = [
            ("dim", self.dim),
            ("heads", self.heads),
            ("dim_head", self.dim_head),
            ("agents", self.agents),
        ];
        sizes.into_iter().try_for_each(|(arg, n)| super::size(OP, arg, n))?;
        super::size(OP, "heads", self.heads.saturating_mul(self.dim_head))
    }
}

impl AgentSelfAttention {
    /// From `to_qkv.0`, `agent_tokens`, `to_out.1`, with gates `to_gates.0`, with talking heads `ak_talking_heads` and
    /// `qa_talking_heads`.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for sizes of 0, [`Error::Checkpoint`](crate::Error::Checkpoint) for a
    /// tensor that is missing or does not fit, [`Error::Alloc`](crate::Error::Alloc) if memory cannot be had.
    pub fn load(
        config: AgentSelfAttentionConfig,
        parameters: &Parameters<'_, impl TensorSource>,
    ) -> Result<Self> {
        config.check()?;
        let AgentSelfAttentionConfig { dim, heads, dim_head, agents, talking_heads: talk, gate } =
            config;
        let inner = heads * dim_head;
        let gates = || parameters.linear("to_gates.0", [heads, dim], true);
        Ok(Self {
            config,
            qkv: parameters.linear("to_qkv.0", [3 * inner, dim], false)?,
            gates: gate.then(gates).transpose()?,
            agents: parameters.tensor("agent_tokens", [heads, agents, dim_head])?,
            gather: Step::load(heads, talk, parameters, "ak_talking_heads")?,
            ask: Step::load(heads, talk, parameters, "qa_talking_heads")?,
            out: parameters.linear("to_out.1", [dim, inner], false)?,
        })
    }

    /// The sizes and choices.
    #[must_use]
    pub fn config(&self) -> &AgentSelfAttentionConfig {
        &self.config
    }

    /// Memory of the packed weights of projections, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.qkv.bytes() + self.out.bytes() + self.gates.as_ref().map_or(0, Linear::bytes)
    }

    /// `x`, `out`: `[batch, len, dim]`. Rows of all batches must lie the same distance apart. No allocation after
    /// warm-up.
    ///
    /// # Errors
    /// As [`forward_with`](Self::forward_with).
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 3>,
    ) -> Result<()> {
        self.forward_with(rt, x, out, SequenceExtra::default())
    }

    /// As [`forward`](Self::forward) with hidden tokens and other agents; hands out what the agents gathered if asked.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and [`Error::Layout`](crate::Error::Layout) for arguments that do not fit,
    /// [`Error::Alloc`](crate::Error::Alloc) if scratch memory cannot be had; outputs are untouched then.
    pub fn forward_with(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 3>,
        extra: SequenceExtra<'_>,
    ) -> Result<()> {
        let AgentSelfAttentionConfig { dim, heads, dim_head, .. } = self.config;
        let [batch, len, _] = x.shape();
        expect_shape(OP, "x", "[batch, len, dim]", [batch, len, dim], x.shape())?;
        expect_shape(OP, "out", "[batch, len, dim]", [batch, len, dim], out.shape())?;
        let n = extra.agents.map_or(self.config.agents, |a| a.shape()[1]);
        let (letters, expected) = ("[batch, n, heads, dim_head]", [batch, n, heads, dim_head]);
        if let Some(agents) = extra.agents {
            expect_shape(OP, "agents", letters, expected, agents.shape())?;
        }
        if let Some(gathered) = &extra.gathered {
            expect_shape(OP, "gathered", letters, expected, gathered.shape())?;
        }
        if let Some(mask) = extra.mask {
            expect_shape(OP, "mask", "[batch, len]", [batch, len], mask.shape())?;
        }
        let (x, out) = (x.merge_rows()?, out.merge_rows()?);
        if batch * len == 0 {
            return Ok(());
        }
        let bytes = self.scratch_bytes(rt, [batch, len, n]);
        rt.with_scratch(bytes, |cut| self.run(rt, x, out, extra, [batch, len, n], cut))?
    }

    /// Scratch bytes that a call takes from the runtime for `[batch, len, agents]`, besides those of the attention
    /// itself.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, [batch, len, n]: [usize; 3]) -> usize {
        let (heads, inner) = (self.config.heads, self.config.heads * self.config.dim_head);
        let rows = batch * len;
        bytes_of::<f32>(rows * 3 * inner)
            + 2 * bytes_of::<f32>(batch * n * inner)
            + bytes_of::<f32>(rows * inner)
            + bytes_of::<f32>(rows * heads)
            + self.work_bytes(rt, [batch, len, n])
    }

    fn work_bytes(&self, rt: &Runtime, [batch, len, n]: [usize; 3]) -> usize {
        let (rows, inner) = (batch * len, self.config.heads * self.config.dim_head);
        let maps = [Some(&self.qkv), Some(&self.out), self.gates.as_ref()];
        let linear = maps.iter().flatten().map(|l| l.scratch_bytes(rt, rows));
        let steps = [self.gather.bytes(n, inner), self.ask.bytes(len, inner)];
        linear.chain(steps).max().unwrap_or(0)
    }

    fn run(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
        extra: SequenceExtra<'_>,
        size: [usize; 3],
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let ([batch, len, n], rows_all) = (size, size[0] * size[1]);
        let (heads, dim_head) = (self.config.heads, self.config.dim_head);
        let inner = heads * dim_head;
        let qkv = cut.take::<f32>(rows_all * 3 * inner);
        let [agents, values] = [(); 2].map(|()| cut.take::<f32>(batch * n * inner));
        let mixed = cut.take::<f32>(rows_all * inner);
        let gates = cut.take::<f32>(rows_all * heads);
        let work = cut.take::<u8>(self.work_bytes(rt, size));
        self.qkv.run(rt, x, matrix(qkv, rows_all), Keep::Nothing, Cut::new(work));
        let all = View::new(&*qkv, [batch, len, 3 * inner])?;
        let [q, k, v] = [0, 1, 2].map(|i| all.slice(2, i * inner, (i + 1) * inner));
        for (i, row) in agents.chunks_exact_mut(dim_head).enumerate() {
            let (b, a, h) = (i / heads / n, i / heads % n, i % heads);
            row.copy_from_slice(match &extra.agents {
                Some(given) => given.row([b, a, h, 0]),
                None => self.agents.view().row([h, a, 0]),
            });
        }
        let (agents, shape) = (View::new(&*agents, [batch, n, inner])?, [batch, n, inner]);
        let gathered = ViewMut::new(&mut *values, shape)?;
        self.gather.run(rt, [agents, k, v], extra.mask, gathered, work)?;
        let values = View::new(&*values, shape)?;
        let answer = ViewMut::new(&mut *mixed, [batch, len, inner])?;
        self.ask.run(rt, [q, agents, values], None, answer, work)?;
        if let Some(map) = &self.gates {
            map.run(rt, x, matrix(gates, rows_all), Keep::Nothing, Cut::new(work));
            rows(rt, Activate(Activation::Sigmoid), [], matrix(gates, rows_all));
            rows(rt, GateHeads, [table(gates, rows_all)], matrix(mixed, rows_all));
        }
        if let Some(mask) = extra.mask {
            for (i, row) in mixed.chunks_exact_mut(inner).enumerate() {
                if !mask.row([i / len, 0])[i % len] {
                    row.fill(0.0);
                }
            }
        }
        if let Some(mut out) = extra.gathered {
            for i in 0..batch * n * heads {
                let (b, a, h) = (i / heads / n, i / heads % n, i % heads);
                let row = &values.row([b, a, 0])[h * dim_head..][..dim_head];
                out.row_mut([b, a, h, 0]).copy_from_slice(row);
            }
        }
        self.out.run(rt, table(mixed, rows_all), out, Keep::Nothing, Cut::new(work));
        Ok(())
    }
}
