//! The FLASH layer: a gated layer around mixed chunk attention.

use super::gated::{Buffers, Gated, Names, Projected, check};
use super::{FlashState, GateNorm, PaperBias, RelativeBias};
use crate::attention::mixed_chunk::{
    Bias, Extra, LinReduce, MixedChunkAttention, MixedChunkConfig, ScoreActivation,
};
use crate::error::{Error, Result, expect_shape};
use crate::io::TensorSource;
use crate::layers::{Block, Parameters, Rope, RopeStyle};
use crate::runtime::Runtime;
use crate::scratch::Cut;
use crate::tensor::{Tensor, View, ViewMut};
use alloc::vec;
use alloc::vec::Vec;

const OP: &str = "flash";
/// Tokens of all sequences together that a causal layer with a state handles at a time: enough for products at full
/// speed, and activations that stay in the third cache level.
const SEGMENT: usize = 512;

/// Whose conventions and parameter names a [`Flash`] layer has.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum FlashForm {
    /// The pseudo-code of the paper: all of queries and keys turned, halves apart; factors `1 / C`.
    Paper {
        /// The bias of scores.
        bias: PaperBias,
        /// How chunks are summed; not the own chunk alone.
        reduce: LinReduce,
    },
    /// The PyTorch package `FLASH-pytorch`: the first channels turned, neighbours paired; T5 buckets; factor of the
    /// linear part `1 / C` when causal and `1 / N` otherwise.
    Package {
        /// Half of the channels come from the token before.
        shift_tokens: bool,
        /// Turned channels; 0 for none.
        rotary_dim: usize,
        /// The linear part is that of the own chunk alone. Not when causal.
        own_chunk: bool,
    },
}

/// Sizes and choices of a [`Flash`] layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FlashConfig {
    /// Whose conventions.
    pub form: FlashForm,
    /// Width of input and output, `d`.
    pub dim: usize,
    /// Width of queries and keys, `s`.
    pub query_key_dim: usize,
    /// Width of values and gates, `e`.
    pub hidden: usize,
    /// Rows of a chunk, `C`.
    pub group_size: usize,
    /// A token sees no later one.
    pub causal: bool,
    /// What becomes of a score.
    pub act: ScoreActivation,
    /// The norm of the input.
    pub norm: GateNorm,
    /// Of the norm.
    pub eps: f32,
}

/// A FLASH layer: one gated layer in place of attention and feed-forward network, linear in the length.
///
/// ```text
/// [u | v | z] = silu(Norm(x) Wuvz + b)             widths e, e, s; half of the channels of Norm(x) may be shifted
/// quad_q, quad_k, lin_q, lin_k = rotary(z * gamma_h + beta_h)                    h = 0, 1, 2, 3
/// y = x + (u * mixed_chunk(quad_q, quad_k, lin_q, lin_k, v)) Wo + bo
/// ```
///
/// Cost per token: `2 d (2 e + s) + 2 e d` flops for the projections, and those of
/// [`MixedChunkAttention`]. A causal layer streams: its state has a fixed size, and prompts of any length take the
/// memory of 512 tokens.
///
/// Parameters of the paper's form: `norm`, `uv` (`[2 e + s, d]`: u, v, z), `gamma` and `beta` (`[4, s]`: quad_q,
/// quad_k, lin_q, lin_k), `w` (`[2 C - 1]`) or `a` and `b` (`[1, s]`), `o`. Of the package: `norm`, `to_hidden.0`
/// (v, u), `to_qk.0`, `qk_offset_scale.{gamma,beta}` (quad_q, lin_q, quad_k, lin_k),
/// `rel_pos_bias.relative_attention_bias.weight` (`[32, 1]`), `rotary_pos_emb.freqs`, `to_out`.
///
/// Source: Transformer Quality in Linear Time (arXiv 2202.10447), section 3 and its code listing.
///
/// ```
/// use linattn::attention::mixed_chunk::{LinReduce, ScoreActivation};
/// use linattn::io::TensorMap;
/// use linattn::layers::flash::{Flash, FlashConfig, FlashForm, GateNorm, PaperBias};
/// use linattn::layers::Parameters;
/// use linattn::{Runtime, tensor::Tensor};
/// let config = FlashConfig {
///     form: FlashForm::Paper { bias: PaperBias::Toeplitz, reduce: LinReduce::MeanChunks },
///     dim: 4, query_key_dim: 2, hidden: 8, group_size: 3, causal: true,
///     act: ScoreActivation::Relu2, norm: GateNorm::Scale, eps: 1e-5,
/// };
/// let mut tensors = TensorMap::default();
/// for (name, shape) in [("norm.scala", &[1][..]), ("uv.weight", &[18, 4]), ("uv.bias", &[18]), ("gamma", &[4, 2]),
///     ("beta", &[4, 2]), ("w", &[5]), ("o.weight", &[4, 8]), ("o.bias", &[4])] {
///     tensors.insert(name, shape, vec![0.5; shape.iter().product()])?;
/// }
/// let layer = Flash::from_parameters(config, &Parameters::new(&tensors))?;
/// let (x, mut y) = (Tensor::<3>::zeros([1, 7, 4])?, Tensor::<3>::zeros([1, 7, 4])?);
/// let mut state = layer.new_state(1)?;
/// layer.forward(&Runtime::new()?, x.view(), y.view_mut(), Some(&mut state))?;
/// assert_eq!(state.len(), 7);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Flash {
    config: FlashConfig,
    gated: Gated,
    attention: MixedChunkAttention,
    /// `2 C - 1` biases.
    table: Vec<f32>,
}

impl FlashConfig {
    /// The attention of a layer.
    pub(crate) fn attention(&self) -> Result<MixedChunkAttention> {
        let (s, c) = (self.query_key_dim, self.group_size);
        for (arg, n) in
            [("dim", self.dim), ("query_key_dim", s), ("hidden", self.hidden), ("group_size", c)]
        {
            if n == 0 || n > 1 << 24 {
                return Err(Error::value(OP, arg, "a size from 1 to 2^24", n));
            }
        }
        let own = MixedChunkConfig { act: self.act, ..MixedChunkConfig::package(c, self.causal) };
        MixedChunkAttention::new(match self.form {
            FlashForm::Paper { reduce, .. } => {
                let lin_scale = MixedChunkConfig::paper(c, self.causal).lin_scale;
                MixedChunkConfig { lin_scale, lin_reduce: reduce, ..own }
            }
            FlashForm::Package { rotary_dim, own_chunk, .. } => {
                if !rotary_dim.is_multiple_of(2) || rotary_dim > s {
                    let expected = "even and at most query_key_dim";
                    return Err(Error::value(OP, "rotary_dim", expected, rotary_dim));
                }
                let lin_reduce = if own_chunk { LinReduce::OwnChunk } else { LinReduce::Sum };
                MixedChunkConfig { lin_reduce, ..own }
            }
        })
    }

    /// Channels that come from the token before.
    pub(crate) fn shifted(&self) -> usize {
        match self.form {
            FlashForm::Package { shift_tokens: true, .. } => self.dim.div_ceil(2),
            _ => 0,
        }
    }
}

/// Quadratic and linear queries and keys among the stored heads of the package.
const PACKAGE: [usize; 4] = [0, 2, 1, 3];

impl Flash {
    /// From named parameters, see above.
    ///
    /// # Errors
    /// [`Error::Value`] for sizes of 0 and choices that do not go together, [`Error::Checkpoint`] for a parameter
    /// that is missing or does not fit, [`Error::Alloc`] if memory cannot be had.
    pub fn from_parameters<T: TensorSource>(
        config: FlashConfig,
        p: &Parameters<'_, T>,
    ) -> Result<Self> {
        let attention = config.attention()?;
        let FlashConfig { dim: d, query_key_dim: s, hidden: e, group_size: c, causal, .. } = config;
        let (names, rope, bias) = match config.form {
            FlashForm::Paper { bias, .. } => {
                let names = Names { paper: true, heads: "", out: "", order: &[0, 1, 2, 3] };
                let rope = Rope::new(RopeStyle::Half, s, 10000.0)?;
                (names, Some(rope), bias.load(p, c, s)?)
            }
            FlashForm::Package { rotary_dim, .. } => {
                let names = Names {
                    paper: false,
                    heads: "qk_offset_scale",
                    out: "to_out",
                    order: &PACKAGE,
                };
                let rope = match rotary_dim {
                    0 => None,
                    n => {
                        let freq: Tensor<1> = p.tensor("rotary_pos_emb.freqs", [n / 2])?;
                        Some(Rope::with_frequencies(RopeStyle::Interleaved, freq.as_slice())?)
                    }
                };
                let name = "rel_pos_bias.relative_attention_bias.weight";
                let buckets: Tensor<2> = p.tensor(name, [32, 1])?;
                let scale = libm::sqrt(s as f64) as f32;
                (names, rope, RelativeBias::t5(buckets.as_slice(), scale, causal)?)
            }
        };
        let mut table = vec![0.0; 2 * c - 1];
        bias.fill(c, &mut table);
        Ok(Self {
            gated: Gated::new(OP, [d, s, e], (config.norm, config.eps), names, rope, p)?,
            attention,
            config,
            table,
        })
    }

    /// The sizes and choices.
    #[must_use]
    pub fn config(&self) -> &FlashConfig {
        &self.config
    }

    /// Memory of the packed weights, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.gated.weight_bytes()
    }

    /// A state that has seen nothing.
    ///
    /// # Errors
    /// [`Error::Value`] for a layer that is not causal, [`Error::Alloc`] if memory cannot be had.
    pub fn new_state(&self, batch: usize) -> Result<FlashState> {
        let FlashConfig { query_key_dim: s, hidden: e, group_size: c, causal, .. } = self.config;
        if !causal {
            return Err(Error::value(OP, "causal", "true for a state", causal));
        }
        FlashState::new(batch, [c, s, e], self.config.shifted())
    }

    /// `x`, `out`: `[batch, len, dim]`. `state`, for causal layers only, is what came before and what it becomes;
    /// without it the sequence begins here, and scratch memory grows with the length. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`] for arguments that do not fit, [`Error::Value`] for a state without causality,
    /// [`Error::Alloc`] if scratch memory cannot be had; `out` and `state` are untouched then, unless memory ran out
    /// between segments.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 3>,
        state: Option<&mut FlashState>,
    ) -> Result<()> {
        self.forward_masked(rt, x, None, out, state)
    }

    /// As [`forward`](Self::forward) with hidden keys: `mask`, `[batch, len]`, says which tokens count for others.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_masked(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        mask: Option<View<'_, bool, 2>>,
        out: ViewMut<'_, f32, 3>,
        state: Option<&mut FlashState>,
    ) -> Result<()> {
        let [batch, len] = check(OP, self.config.dim, x, &out)?;
        if let Some(mask) = mask {
            expect_shape(OP, "mask", "[batch, len]", [batch, len], mask.shape())?;
        }
        if let Some(state) = &state {
            if !self.config.causal {
                return Err(Error::value(OP, "state", "none unless causal", "one"));
            }
            self.expect(state, batch)?;
            state.mixed.room(OP, len)?;
        }
        if batch == 0 || len == 0 {
            return Ok(());
        }
        rt.with_scratch(self.scratch_bytes(rt, [batch, len], state.is_some()), |cut| {
            self.segments(rt, Some(x), out, mask, state, cut)
        })?
    }

    fn expect(&self, state: &FlashState, batch: usize) -> Result<()> {
        let FlashConfig { query_key_dim: s, hidden: e, group_size: c, .. } = self.config;
        let expected = [batch, c, s, e];
        expect_shape(OP, "state", "[batch, chunk, s, e]", expected, state.mixed.shape())?;
        let shape = [batch, self.config.shifted()];
        expect_shape(OP, "state", "[batch, shifted channels]", shape, state.last.shape())
    }

    /// Scratch bytes that a call with `[batch, len]` tokens takes from the runtime, with or without a state, besides
    /// those of the attention.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, [batch, len]: [usize; 2], streaming: bool) -> usize {
        let len = if streaming { len.min(self.segment(batch)) } else { len };
        self.gated.bytes(rt, batch.saturating_mul(len), batch)
    }

    /// Tokens per sequence that are handled at a time: whole chunks, if they are not longer.
    fn segment(&self, batch: usize) -> usize {
        let (most, chunk) = ((SEGMENT / batch.max(1)).max(1), self.config.group_size);
        if most > chunk { most / chunk * chunk } else { most }
    }

    /// A checked call, in place without `x`.
    fn segments(
        &self,
        rt: &Runtime,
        x: Option<View<'_, f32, 3>>,
        mut y: ViewMut<'_, f32, 3>,
        mask: Option<View<'_, bool, 2>>,
        mut state: Option<&mut FlashState>,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let [batch, len, _] = y.shape();
        let whole = if state.is_some() { self.segment(batch) } else { len };
        let mut buffers = self.gated.buffers(rt, [batch, len.min(whole)], &mut cut);
        let mut at = 0;
        while at < len {
            // Up to the next border of chunks first: whole chunks need no copy of their keys and values.
            let pending = state.as_ref().map_or(0, |s| s.mixed.pending());
            let step = if pending < whole { whole - pending } else { whole };
            let to = len.min(at.saturating_add(step));
            let mask = mask.map(|m| m.slice(1, at, to));
            let (x, y) = (x.map(|x| x.slice(1, at, to)), y.reborrow().slice(1, at, to));
            self.segment_in(rt, x, y, mask, state.as_deref_mut(), &mut buffers)?;
            at = to;
        }
        Ok(())
    }

    fn segment_in(
        &self,
        rt: &Runtime,
        x: Option<View<'_, f32, 3>>,
        mut y: ViewMut<'_, f32, 3>,
        key_mask: Option<View<'_, bool, 2>>,
        mut state: Option<&mut FlashState>,
        b: &mut Buffers<'_>,
    ) -> Result<()> {
        let [batch, len, _] = y.shape();
        let row = |at, to: &mut [f32]| match x {
            Some(x) => to.copy_from_slice(x.row(at)),
            None => to.copy_from_slice(y.row_mut(at)),
        };
        self.gated.normalise(rt, [batch, len], row, b);
        self.shift([batch, len], state.as_deref(), b);
        let position = state.as_ref().map_or(0, |s| s.len());
        let Projected { heads, v, mixed } = self.gated.project(rt, [batch, len], position, b);
        let heads = [0, 1, 2, 3].map(|h| heads.one_head(h));
        let bias = Bias { table: Some(&self.table), matrix: None };
        let extra = Extra { key_mask, bias };
        let inner = state.as_deref_mut().map(|s| &mut s.mixed);
        self.attention.forward_with(rt, heads, v, mixed, extra, inner)?;
        if let Some(state) = state {
            let last = state.last.as_mut_slice();
            last.copy_from_slice(&b.last[..last.len()]);
        }
        self.gated.finish(rt, y, true, b);
        Ok(())
    }

    /// Whole sequences in place, causal or not: `stream` is `[batch, len, dim]` without gaps, with
    /// [`Block::run_bytes`] of memory.
    pub(crate) fn encode(
        &self,
        rt: &Runtime,
        stream: &mut [f32],
        batch: usize,
        mask: Option<View<'_, bool, 2>>,
        cut: Cut<'_>,
    ) -> Result<()> {
        let len = stream.len() / self.config.dim / batch;
        let y = ViewMut::new(stream, [batch, len, self.config.dim])?;
        self.segments(rt, None, y, mask, None, cut)
    }

    /// Moves the first channels of normed rows to the next row. Those of the last rows go to `last`.
    fn shift(&self, [batch, len]: [usize; 2], state: Option<&FlashState>, b: &mut Buffers<'_>) {
        let (h, d) = (self.config.shifted(), self.config.dim);
        if h == 0 {
            return;
        }
        let sequences = b.normed[..batch * len * d].chunks_exact_mut(len * d);
        for (i, (rows, last)) in sequences.zip(b.last.chunks_exact_mut(h)).enumerate() {
            last.copy_from_slice(&rows[(len - 1) * d..][..h]);
            for t in (1..len).rev() {
                rows.copy_within((t - 1) * d..(t - 1) * d + h, t * d);
            }
            match state {
                Some(state) => rows[..h].copy_from_slice(&state.last.as_slice()[i * h..][..h]),
                None => rows[..h].fill(0.0),
            }
        }
    }
}

impl Block for Flash {
    type State = FlashState;

    fn width(&self) -> usize {
        self.config.dim
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes()
    }

    fn new_state(&self, batch: usize) -> Result<FlashState> {
        self.new_state(batch)
    }

    fn run_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        self.gated.bytes(rt, rows, rows)
    }

    fn run(
        &self,
        rt: &Runtime,
        stream: &mut [f32],
        batch: usize,
        state: &mut FlashState,
        cut: Cut<'_>,
    ) -> Result<()> {
        self.expect(state, batch)?;
        let d = self.config.dim;
        let len = stream.len() / d / batch.max(1);
        if len == 0 {
            return Ok(());
        }
        let y = ViewMut::new(stream, [batch, len, d])?;
        self.segments(rt, None, y, None, Some(state), cut)
    }
}
