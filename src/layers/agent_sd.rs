//! The self-attention of AgentSD.

use super::gla::{matrix, table};
use super::{Linear, Parameters};
use crate::attention::Scale;
use crate::attention::agent::AgentAttention;
use crate::attention::merge::TokenMerging;
use crate::attention::softmax::SoftmaxAttention;
use crate::error::{Error, Result, expect_shape};
use crate::io::TensorSource;
use crate::kernels::store::Keep;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{Tensor, View, ViewMut};

const OP: &str = "agent sd attention";

/// Sizes and choices of an [`AgentSdAttention`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AgentSdConfig {
    /// Width of tokens.
    pub dim: usize,
    /// Number of heads.
    pub heads: usize,
    /// Width of a head.
    pub dim_head: usize,
    /// Height and width of the map.
    pub map: [usize; 2],
    /// Rows and columns of the cells that have one destination each.
    pub cell: [usize; 2],
    /// Which part of the tokens merges.
    pub ratio: f64,
    /// Which part of the tokens merges for the agents.
    pub agent_ratio: f64,
    /// The second scale is the first to this power.
    pub k_scale2: f32,
    /// How much of its own value a token adds to its output.
    pub k_shortcut: f32,
    /// Destinations are random, from this seed, not at the top left of their cells.
    pub seed: Option<u64>,
}

impl AgentSdConfig {
    /// The published choices for the first 20 of 50 steps.
    #[must_use]
    pub fn early(dim: usize, heads: usize, dim_head: usize, map: [usize; 2]) -> Self {
        Self {
            dim,
            heads,
            dim_head,
            map,
            cell: [4; 2],
            ratio: 0.4,
            agent_ratio: 0.95,
            k_scale2: 0.3,
            k_shortcut: 0.075,
            seed: None,
        }
    }

    /// The published choices for later steps, which come down to merging before softmax attention.
    #[must_use]
    pub fn late(dim: usize, heads: usize, dim_head: usize, map: [usize; 2]) -> Self {
        Self { cell: [2; 2], agent_ratio: 0.5, ..Self::early(dim, heads, dim_head, map) }
    }
}

/// The self-attention of a Stable Diffusion block with merged tokens and agents, without training.
///
/// ```text
/// F, T = merge(x, ratio), merge(x, agent_ratio)
/// q, k, v = F Wq^T, F Wk^T, F Wv^T      A = T Wq^T      s1 = dim_head^-1/2, s2 = s1^k_scale2
/// O = softmax(s2 q A^T) softmax(s1 A k^T) v + k_shortcut v
/// out = unmerge(O Wout^T + b)
/// ```
///
/// Where the agents are half as many as the merged tokens or more, `O` is softmax attention. Costs are those of
/// [`TokenMerging`] and [`AgentAttention`] and `2 inner dim` flops per merged token for each projection.
///
/// Source: Agent Attention (arXiv 2312.08874), section 4.4, and its code; [`TokenMerging`].
///
/// ```
/// use linattn::layers::{AgentSdAttention, AgentSdConfig, Parameters};
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
/// let config = AgentSdConfig::early(32, 2, 16, [16, 16]);
/// let attention = AgentSdAttention::load(config, &Parameters::new(&Zeros))?;
/// assert_eq!((attention.features(), attention.agents()), (154, 16));
/// let x = Tensor::<3>::from_slice(&vec![1.0; 256 * 32], [1, 256, 32])?;
/// let mut y = x.clone();
/// attention.forward(&Runtime::new()?, x.view(), y.view_mut())?;
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AgentSdAttention {
    config: AgentSdConfig,
    merging: TokenMerging,
    q: Linear,
    kv: Linear,
    out: Linear,
}

impl AgentSdAttention {
    /// From `to_q`, `to_k`, `to_v` (without biases) and `to_out.0`.
    ///
    /// # Errors
    /// [`Error::Value`] for impossible sizes and choices, [`Error::Checkpoint`] for a tensor that is missing or does not
    /// fit, [`Error::Alloc`] if memory cannot be had.
    pub fn load(
        config: AgentSdConfig,
        parameters: &Parameters<'_, impl TensorSource>,
    ) -> Result<Self> {
        let AgentSdConfig { dim, heads, dim_head, map, cell, .. } = config;
        let inner = heads.saturating_mul(dim_head);
        for (arg, n) in [("dim", dim), ("heads", heads), ("dim_head", dim_head), ("heads", inner)] {
            super::vision::size(OP, arg, n)?;
        }
        for (arg, x) in [("ratio", config.ratio), ("agent_ratio", config.agent_ratio)] {
            if !(0.0..=1.0).contains(&x) {
                return Err(Error::value(OP, arg, "from 0 to 1", x));
            }
        }
        for (arg, x) in [("k_scale2", config.k_scale2), ("k_shortcut", config.k_shortcut)] {
            if !x.is_finite() {
                return Err(Error::value(OP, arg, "finite", x));
            }
        }
        let merging = match config.seed {
            None => TokenMerging::new(map, cell)?,
            Some(seed) => TokenMerging::random(map, cell, seed)?,
        };
        let mut pair = Tensor::<2>::zeros([2 * inner, dim])?;
        let (keys, values) = pair.as_mut_slice().split_at_mut(inner * dim);
        keys.copy_from_slice(parameters.tensor("to_k.weight", [inner, dim])?.as_slice());
        values.copy_from_slice(parameters.tensor("to_v.weight", [inner, dim])?.as_slice());
        Ok(Self {
            config,
            merging,
            q: parameters.linear("to_q", [inner, dim], false)?,
            kv: Linear::with_format(pair.view(), None, parameters.format())
                .map_err(|e| parameters.blame("to_k.weight", e))?,
            out: parameters.linear("to_out.0", [dim, inner], true)?,
        })
    }

    /// The sizes and choices.
    #[must_use]
    pub fn config(&self) -> &AgentSdConfig {
        &self.config
    }

    /// Tokens that attend, after merging.
    #[must_use]
    pub fn features(&self) -> usize {
        self.merging.tokens() - self.merging.count(self.config.ratio)
    }

    /// Agents; none if tokens attend to each other by softmax.
    #[must_use]
    pub fn agents(&self) -> usize {
        let n = self.merging.tokens() - self.merging.count(self.config.agent_ratio);
        if 2 * n < self.features() { n } else { 0 }
    }

    /// `x`, `out`: `[batch, h * w, dim]`, the input already normed. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`] for arguments that do not fit, [`Error::Alloc`] if scratch memory cannot be had; `out` is untouched
    /// then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        mut out: ViewMut<'_, f32, 3>,
    ) -> Result<()> {
        let ([batch, ..], dim) = (x.shape(), self.config.dim);
        let expected = [batch, self.merging.tokens(), dim];
        expect_shape(OP, "x", "[batch, h * w, dim]", expected, x.shape())?;
        expect_shape(OP, "out", "[batch, h * w, dim]", expected, out.shape())?;
        rt.with_scratch(self.scratch_bytes(rt), |mut cut| {
            let cut = cut.take::<u8>(self.scratch_bytes(rt));
            for b in 0..batch {
                let x = x.slice(0, b, b + 1).merge_rows()?;
                let out = out.reborrow().slice(0, b, b + 1).merge_rows()?;
                self.run(rt, x, out, Cut::new(&mut *cut))?;
            }
            Ok(())
        })?
    }

    /// Scratch bytes that a call takes from the runtime, besides those of the attention itself.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime) -> usize {
        let AgentSdConfig { dim, heads, dim_head, .. } = self.config;
        let (n, a, inner) = (self.features(), self.agents(), heads * dim_head);
        let floats = [n * dim, a * dim, n * inner, 2 * n * inner, a * inner, n * inner, n * dim];
        floats.into_iter().map(bytes_of::<f32>).sum::<usize>()
            + 2 * bytes_of::<usize>(self.merging.others())
            + self.linear_bytes(rt)
    }

    fn linear_bytes(&self, rt: &Runtime) -> usize {
        let maps = [&self.q, &self.kv, &self.out];
        maps.map(|l| l.scratch_bytes(rt, self.features())).into_iter().max().unwrap_or(0)
    }

    /// One map.
    fn run(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let AgentSdConfig { dim, heads, dim_head, ratio, agent_ratio, .. } = self.config;
        let (n, a, inner) = (self.features(), self.agents(), heads * dim_head);
        let floats = [n * dim, a * dim, n * inner, 2 * n * inner, a * inner, n * inner, n * dim];
        let [merged, seeds, q, kv, agents, mixed, y] = floats.map(|len| cut.take::<f32>(len));
        let [order, best] = [(); 2].map(|()| cut.take::<usize>(self.merging.others()));
        let work = cut.take::<u8>(self.linear_bytes(rt));
        let matching = self.merging.matching(rt, x, order, best)?;
        let r = self.merging.count(ratio);
        matching.merge(r, x, matrix(merged, n))?;
        let new = Keep::Nothing;
        self.q.run(rt, table(merged, n), matrix(q, n), new, Cut::new(&mut *work));
        self.kv.run(rt, table(merged, n), matrix(kv, n), new, Cut::new(&mut *work));
        let pair = View::new(&*kv, [1, n, 2 * inner])?;
        let part = |i: usize| pair.slice(2, i * inner, (i + 1) * inner).split_heads(heads);
        let (q, k, v) = (View::new(&*q, [1, n, heads, dim_head])?, part(0)?, part(1)?);
        let answer = ViewMut::new(&mut *mixed, [1, n, heads, dim_head])?;
        if a == 0 {
            SoftmaxAttention::new().forward(rt, q, k, v, answer)?;
        } else {
            matching.merge(self.merging.count(agent_ratio), x, matrix(seeds, a))?;
            self.q.run(rt, table(seeds, a), matrix(agents, a), new, Cut::new(&mut *work));
            let agents = View::new(&*agents, [1, a, heads, dim_head])?;
            let power = -0.5 * f64::from(self.config.k_scale2);
            let second = libm::pow(dim_head as f64, power) as f32;
            let attention = AgentAttention::new()
                .with_scales(Scale::InvSqrtDim, Scale::Value(second))?
                .with_shortcut(self.config.k_shortcut)?;
            attention.forward(rt, q, k, v, agents, answer)?;
        }
        self.out.run(rt, table(mixed, n), matrix(y, n), new, Cut::new(work));
        matching.unmerge(r, table(y, n), out)
    }
}
