//! The token mixer of transformers: attention over several heads of one sequence.

use super::gla::{expect_linear, matrix, table};
use super::{Linear, Positions, Rope};
use crate::attention::combiner::{CombinerAttention, CombinerState};
use crate::attention::performer::{PerformerAttention, PerformerState};
use crate::attention::softmax::SoftmaxAttention;
use crate::attention::{KvCache, Mask, StreamState};
use crate::error::{Error, Result, expect_shape};
use crate::kernels::store::Keep;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{View, ViewMut};

const OP: &str = "self-attention";

/// Sizes of a [`SelfAttention`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelfAttentionConfig {
    /// Width of input and output.
    pub dim: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether a token sees only itself and what came before.
    pub causal: bool,
}

/// What weighs values by queries and keys.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Mechanism {
    /// Exact attention.
    #[default]
    Softmax,
    /// Random features; as causal as the layer, and as many key heads as heads.
    Performer(PerformerAttention),
    /// Summaries of groups of keys; as causal as the layer, and as many key heads as heads.
    Combiner(CombinerAttention),
}

/// What a [`SelfAttention`] remembers.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SelfAttentionState {
    /// Of [`Mechanism::Softmax`].
    Cache(KvCache),
    /// Of [`Mechanism::Performer`].
    Performer(PerformerState),
    /// Of [`Mechanism::Combiner`].
    Combiner(CombinerState),
}

/// Runs an expression on the state of whichever mechanism.
macro_rules! each_state {
    ($this:expr, $s:ident => $e:expr) => {
        match $this {
            Self::Cache($s) => $e,
            Self::Performer($s) => $e,
            Self::Combiner($s) => $e,
        }
    };
}

impl StreamState for SelfAttentionState {
    fn len(&self) -> usize {
        each_state!(self, s => StreamState::len(s))
    }
    fn bytes(&self) -> usize {
        each_state!(self, s => StreamState::bytes(s))
    }
    fn bytes_at(&self, len: usize) -> usize {
        each_state!(self, s => s.bytes_at(len))
    }
    fn reset(&mut self) {
        each_state!(self, s => StreamState::reset(s))
    }
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        each_state!(self, s => s.reserve(tokens))
    }
    fn blank(&self, len: usize) -> Result<Self> {
        Ok(match self {
            Self::Cache(s) => Self::Cache(s.blank(len)?),
            Self::Performer(s) => Self::Performer(s.blank(len)?),
            Self::Combiner(s) => Self::Combiner(s.blank(len)?),
        })
    }
    fn contents(&self, see: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        each_state!(self, s => s.contents(see))
    }
    fn contents_mut(&mut self, fill: &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
        each_state!(self, s => s.contents_mut(fill))
    }
}

/// Attention over several heads of one sequence, with rotary positions and shared key heads.
///
/// ```text
/// q, k, v = x Wq^T + b, x Wk^T + b, x Wv^T + b      [batch, len, heads or kv_heads, head_dim]
/// q, k = rope(q), rope(k)                           optional, from the position that the state has reached
/// y = attention(q, k, v) Wo^T + b                   scores scaled by head_dim^-1/2
/// ```
///
/// `2 dim head_dim (2 heads + 2 kv_heads)` flops per token for the projections, and those of the mechanism. Sources:
/// Attention is all you need (arXiv 1706.03762), section 3.2; RoFormer (2104.09864); shared key heads (2305.13245).
///
/// ```
/// use linattn::layers::{Linear, Mechanism, SelfAttention, SelfAttentionConfig};
/// use linattn::{Runtime, tensor::Tensor};
/// let linear = |outputs, inputs| Linear::new(Tensor::<2>::zeros([outputs, inputs])?.view(), None);
/// let config = SelfAttentionConfig { dim: 16, heads: 4, kv_heads: 2, head_dim: 4, causal: true };
/// let maps = [linear(16, 16)?, linear(8, 16)?, linear(8, 16)?, linear(16, 16)?];
/// let layer = SelfAttention::new(config, maps, None, Mechanism::Softmax)?;
/// let (x, mut y) = (Tensor::<3>::zeros([1, 5, 16])?, Tensor::<3>::zeros([1, 5, 16])?);
/// layer.forward(&Runtime::new()?, x.view(), y.view_mut(), None)?;
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SelfAttention {
    config: SelfAttentionConfig,
    wq: Linear,
    wk: Linear,
    wv: Linear,
    wo: Linear,
    rope: Option<Rope>,
    mechanism: Mechanism,
}

/// One checked call: rows are batch-major.
pub(super) struct Call<'a> {
    pub x: View<'a, f32, 2>,
    pub batch: usize,
    pub out: ViewMut<'a, f32, 2>,
    pub keep: Keep<'static>,
}

impl SelfAttention {
    /// From the maps to queries (`[heads head_dim, dim]`), keys and values (`[kv_heads head_dim, dim]`), and to the
    /// output (`[dim, heads head_dim]`).
    ///
    /// # Errors
    /// [`Error::Value`] if `kv_heads` does not divide `heads`, or for a mechanism that does not suit the layer;
    /// [`Error::Shape`] if a weight does not fit.
    pub fn new(
        config: SelfAttentionConfig,
        [wq, wk, wv, wo]: [Linear; 4],
        rope: Option<Rope>,
        mechanism: Mechanism,
    ) -> Result<Self> {
        let SelfAttentionConfig { dim, heads, kv_heads, head_dim, causal } = config;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let expected = alloc::format!("a divisor of heads = {heads}");
            return Err(Error::value(OP, "kv_heads", expected, kv_heads));
        }
        let [wide, shared] = [heads, kv_heads].map(|n| n.saturating_mul(head_dim));
        expect_linear(OP, "wq", &wq, [wide, dim])?;
        expect_linear(OP, "wk", &wk, [shared, dim])?;
        expect_linear(OP, "wv", &wv, [shared, dim])?;
        expect_linear(OP, "wo", &wo, [dim, wide])?;
        if let Some(rope) = rope.as_ref().filter(|r| r.rot_dim() > head_dim) {
            let expected = alloc::format!("at most head_dim = {head_dim}");
            return Err(Error::value(OP, "rope", expected, rope.rot_dim()));
        }
        let (shares, fits) = match &mechanism {
            Mechanism::Softmax => (true, true),
            Mechanism::Performer(op) => {
                (false, op.config().causal == causal && op.dim() == head_dim)
            }
            Mechanism::Combiner(op) => (false, op.config().causal == causal),
        };
        if !shares && kv_heads != heads {
            let expected = alloc::format!("heads = {heads} for this mechanism");
            return Err(Error::value(OP, "kv_heads", expected, kv_heads));
        }
        if !fits {
            let expected = alloc::format!("for heads of {head_dim}, causal: {causal}");
            return Err(Error::value(OP, "mechanism", expected, "another"));
        }
        Ok(Self { config, wq, wk, wv, wo, rope, mechanism })
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &SelfAttentionConfig {
        &self.config
    }

    /// Memory of the packed weights, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        [&self.wq, &self.wk, &self.wv, &self.wo].map(Linear::bytes).iter().sum()
    }

    /// A state that has seen nothing.
    ///
    /// # Errors
    /// [`Error::Value`] if attention is not causal or cannot be fed in parts, [`Error::Alloc`] if memory cannot be had.
    pub fn new_state(&self, batch: usize) -> Result<SelfAttentionState> {
        let SelfAttentionConfig { kv_heads, head_dim, causal, .. } = self.config;
        if !causal {
            return Err(Error::value(OP, "causal", "true for a state", false));
        }
        Ok(match &self.mechanism {
            Mechanism::Softmax => {
                SelfAttentionState::Cache(KvCache::new(batch, kv_heads, head_dim, head_dim)?)
            }
            Mechanism::Performer(op) => {
                SelfAttentionState::Performer(op.new_state(batch, kv_heads, head_dim)?)
            }
            Mechanism::Combiner(op) => {
                SelfAttentionState::Combiner(op.new_state(batch, kv_heads, head_dim, head_dim)?)
            }
        })
    }

    /// `x`, `out`: `[batch, len, dim]`. Rows of all batches must lie the same distance apart. With a state, tokens go on
    /// where it stands; without one they begin at position 0. No allocation after warm-up, but for the growth of a state.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::Layout`] for arguments that do not fit, [`Error::Alloc`] if memory cannot be had;
    /// `out` and `state` are untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 3>,
        state: Option<&mut SelfAttentionState>,
    ) -> Result<()> {
        let [batch, len, _] = x.shape();
        let expected = [batch, len, self.config.dim];
        let letters = "[batch, len, dim]";
        expect_shape(OP, "x", letters, expected, x.shape())?;
        expect_shape(OP, "out", letters, expected, out.shape())?;
        let call = Call { x: x.merge_rows()?, batch, out: out.merge_rows()?, keep: Keep::Nothing };
        rt.with_scratch(self.scratch_bytes(rt, batch * len), |cut| self.run(rt, call, state, cut))?
    }

    /// Scratch bytes that a call with `rows = batch * len` tokens takes from the runtime, besides those of the
    /// attention itself.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        let floats = self.lens(rows).map(bytes_of::<f32>);
        floats.iter().sum::<usize>() + self.linear_bytes(rt, rows)
    }

    /// Floats of the buffers of a call: two as wide as queries, keys, values, and rotated keys.
    fn lens(&self, rows: usize) -> [usize; 5] {
        let SelfAttentionConfig { heads, kv_heads, head_dim, .. } = self.config;
        let (wide, shared) = (rows * heads * head_dim, rows * kv_heads * head_dim);
        [wide, wide, shared, shared, if self.rope.is_some() { shared } else { 0 }]
    }

    fn linear_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        let maps = [&self.wq, &self.wk, &self.wv, &self.wo];
        maps.map(|l| l.scratch_bytes(rt, rows)).into_iter().max().unwrap_or(0)
    }

    /// A call with [`scratch_bytes`](Self::scratch_bytes) of memory. Only the attention itself can fail, before `out`
    /// and `state` are changed.
    pub(super) fn run(
        &self,
        rt: &Runtime,
        call: Call<'_>,
        mut state: Option<&mut SelfAttentionState>,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let SelfAttentionConfig { heads, kv_heads, head_dim, causal, .. } = self.config;
        let Call { x, batch, out, keep } = call;
        if let Some(state) = &mut state {
            self.expect(state, batch)?;
        }
        let n = x.shape()[0];
        if n == 0 {
            return Ok(());
        }
        let (len, seen) = (n / batch, state.as_ref().map_or(0, |s| s.len()));
        let [q, other, k, v, turned] = self.lens(n).map(|n| cut.take::<f32>(n));
        let work = cut.take::<u8>(self.linear_bytes(rt, n));
        for (map, to) in [(&self.wq, &mut *q), (&self.wk, &mut *k), (&self.wv, &mut *v)] {
            map.run(rt, x, matrix(to, n), Keep::Nothing, Cut::new(work));
        }
        let ([wide, shared], positions) =
            ([heads, kv_heads].map(|h| [batch, len, h, head_dim]), Positions::From(seen));
        // The output of attention goes where queries lie no more.
        let (q, mixed) = match &self.rope {
            Some(rope) => {
                rope.forward(rt, seen_as(q, wide), positions, seen_as_mut(other, wide))?;
                (other, q)
            }
            None => (q, other),
        };
        let (q, to) = (seen_as(q, wide), seen_as_mut(mixed, wide));
        match (&self.mechanism, state) {
            (Mechanism::Softmax, Some(SelfAttentionState::Cache(cache))) => {
                let (keys, mut values) = cache.append(len)?;
                match &self.rope {
                    Some(rope) => rope.forward(rt, seen_as(k, shared), positions, keys)?,
                    None => copy(seen_as(k, shared), keys),
                }
                copy(seen_as(v, shared), values.reborrow());
                let op = SoftmaxAttention::new().with_mask(Mask::CausalEnd);
                if let Err(e) = op.forward(rt, q, cache.keys(), cache.values(), to) {
                    cache.truncate(seen);
                    return Err(e);
                }
            }
            (mechanism, state) => {
                let k = match &self.rope {
                    Some(rope) => {
                        let to = seen_as_mut(turned, shared);
                        rope.forward(rt, seen_as(k, shared), positions, to)?;
                        turned
                    }
                    None => k,
                };
                let (k, v) = (seen_as(k, shared), seen_as(v, shared));
                match (mechanism, state) {
                    (Mechanism::Softmax, _) => {
                        let mask = if causal { Mask::Causal } else { Mask::Full };
                        SoftmaxAttention::new().with_mask(mask).forward(rt, q, k, v, to)?;
                    }
                    (Mechanism::Performer(op), Some(SelfAttentionState::Performer(state))) => {
                        op.forward(rt, q, k, v, to, Some(state))?;
                    }
                    (Mechanism::Performer(op), _) => op.forward(rt, q, k, v, to, None)?,
                    (Mechanism::Combiner(op), Some(SelfAttentionState::Combiner(state))) => {
                        op.forward(rt, q, k, v, to, Some(state))?;
                    }
                    (Mechanism::Combiner(op), _) => op.forward(rt, q, k, v, to, None)?,
                }
            }
        }
        self.wo.run(rt, table(mixed, n), out, keep, Cut::new(work));
        Ok(())
    }

    /// Refuses the state of another mechanism or size.
    fn expect(&self, state: &SelfAttentionState, batch: usize) -> Result<()> {
        let SelfAttentionConfig { kv_heads, head_dim, .. } = self.config;
        let own = [batch, kv_heads, head_dim, head_dim];
        let (expected, got) = match (&self.mechanism, state) {
            (Mechanism::Softmax, SelfAttentionState::Cache(s)) => (own, s.shape()),
            (Mechanism::Combiner(_), SelfAttentionState::Combiner(s)) => (own, s.shape()),
            (Mechanism::Performer(op), SelfAttentionState::Performer(s)) => {
                ([batch, kv_heads, op.features(), head_dim], s.shape())
            }
            _ => return Err(Error::value(OP, "state", "that of the same mechanism", "another")),
        };
        expect_shape(OP, "state", "[batch, heads, dk, dv]", expected, got)
    }
}

/// A buffer as `[batch, len, heads, dim]`.
fn seen_as(data: &[f32], shape: [usize; 4]) -> View<'_, f32, 4> {
    View::new(data, shape).expect("planned size")
}

/// As [`seen_as`], to be written.
fn seen_as_mut(data: &mut [f32], shape: [usize; 4]) -> ViewMut<'_, f32, 4> {
    ViewMut::new(data, shape).expect("planned size")
}

fn copy(from: View<'_, f32, 4>, mut to: ViewMut<'_, f32, 4>) {
    let [batch, len, heads, _] = from.shape();
    for b in 0..batch {
        for (h, t) in (0..heads).flat_map(|h| (0..len).map(move |t| (h, t))) {
            to.row_mut([b, t, h, 0]).copy_from_slice(from.row([b, t, h, 0]));
        }
    }
}
