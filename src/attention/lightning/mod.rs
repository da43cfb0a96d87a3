//! Lightning Attention-2: causal linear attention with one decay per head.

pub(super) mod backward;
pub mod naive;
mod reverse;
mod slopes;
pub(super) mod task;
mod walk;

pub use slopes::SlopeSchedule;

use self::task::Run;
use super::state::State;
use crate::error::{Error, Result, expect_shape};
use crate::kernels::decay::DecayTable;
use crate::runtime::Runtime;
use crate::scratch::room;
use crate::tensor::{Element, View, ViewMut};
use alloc::vec::Vec;

/// Rows of the chunks that engines choose without a hint, at most.
const CHUNK: usize = 128;
/// Hints above this are taken as this.
const MAX_CHUNK: usize = 512;

/// Causal linear attention with a fixed decay `lambda = exp(-slope)` per head.
///
/// ```text
/// S_t = lambda S_(t-1) + k_t v_t^T          o_t = scale * q_t S_t
/// ```
///
/// Sequences longer than a few tokens run in the chunk form of Lightning Attention-2, single tokens in the
/// recurrent form; splitting a sequence anywhere and feeding the parts gives the same result. Forming and
/// applying powers of `lambda` is exact to `f32` rounding for every slope from 0 to infinity.
///
/// Cost per token and head with chunk `C`: `C (dk + dv) + 4 dk dv` flops; decode reads and writes the state once.
///
/// Source: Lightning Attention-2 (arXiv 2401.04658), algorithm 1; TransNormerLLM (2307.14995), section 3.4.
///
/// ```
/// use linattn::attention::{State, lightning::LightningAttention};
/// use linattn::{Runtime, tensor::Tensor};
/// let rt = Runtime::new()?;
/// let (batch, len, heads, dim) = (1, 100, 2, 16);
/// let (q, k, v) = (Tensor::<4>::zeros([batch, len, heads, dim])?, Tensor::<4>::zeros([batch, len, heads, dim])?,
///     Tensor::<4>::zeros([batch, len, heads, dim])?);
/// let mut out = Tensor::<4>::zeros([batch, len, heads, dim])?;
/// let attention = LightningAttention::new(&[0.5, 0.25])?;
/// let mut state = State::new(batch, heads, dim, dim)?;
/// attention.forward(&rt, q.view(), k.view(), v.view(), out.view_mut(), &mut state)?;
/// assert_eq!(state.len(), 100);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LightningAttention {
    tables: Vec<DecayTable>,
    chunk: Option<usize>,
    scale: f32,
}

impl LightningAttention {
    /// One slope per head, 0 (no decay) to infinity (each token replaces the state).
    ///
    /// # Errors
    /// [`Error::Value`] for a slope that is NaN or negative, [`Error::Alloc`] if memory cannot be had.
    pub fn new(slopes: &[f64]) -> Result<Self> {
        Self::of(slopes.len(), |h| slopes[h], None)
    }

    /// As [`new`](Self::new) with a hint for the rows of a chunk, which changes speed but not results.
    pub fn with_chunk(slopes: &[f64], chunk: usize) -> Result<Self> {
        Self::of(slopes.len(), |h| slopes[h], Some(chunk.clamp(1, MAX_CHUNK)))
    }

    /// Without any decay.
    pub(crate) fn plain(heads: usize) -> Result<Self> {
        Self::of(heads, |_| 0.0, None)
    }

    fn of(heads: usize, slope: impl Fn(usize) -> f64, chunk: Option<usize>) -> Result<Self> {
        let bad = |h| Some(slope(h)).filter(|s| s.is_nan() || *s < 0.0);
        if let Some(bad) = (0..heads).find_map(bad) {
            return Err(Error::value(OP, "slopes", "0 or positive", bad));
        }
        let most = chunk.unwrap_or(CHUNK);
        // Each table has three numbers and a rule per row.
        let failed = || Error::Alloc { op: OP, bytes: heads.saturating_mul(20 * most) };
        let mut tables = room(heads).ok_or_else(failed)?;
        for h in 0..heads {
            // Zero without a sign.
            tables.push(DecayTable::new(slope(h).abs(), most).ok_or_else(failed)?);
        }
        Ok(Self { tables, chunk, scale: 1.0 })
    }

    /// Multiplies every output by `scale` (1 by default; some models use `dk^-1/2`).
    ///
    /// # Errors
    /// [`Error::Value`] if it is not finite.
    pub fn with_scale(mut self, scale: f32) -> Result<Self> {
        if !scale.is_finite() {
            return Err(Error::value(OP, "scale", "finite", scale));
        }
        self.scale = scale;
        Ok(self)
    }

    /// Number of heads.
    #[must_use]
    pub fn heads(&self) -> usize {
        self.tables.len()
    }

    /// Attends over `len` more tokens of every batch row.
    ///
    /// `q`, `k`: `[batch, len, heads, dk]`; `v`, `out`: `[batch, len, heads, dv]`; `state`:
    /// `[batch, heads, dk, dv]`, read and written. Allocates nothing once the runtime has seen the shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not belong together, [`Error::Alloc`] if scratch memory cannot be had;
    /// `out` and `state` are untouched then.
    pub fn forward<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        out: ViewMut<'_, E, 4>,
        state: &mut State,
    ) -> Result<()> {
        let [batch, len, ..] = self.check([q, k, v], out.shape())?;
        let [.., dk] = q.shape();
        let [.., dv] = v.shape();
        state.expect(OP, [batch, self.heads(), dk, dv])?;
        state.room(OP, len)?;
        let bytes = Run { len, dk, dv }.scratch(rt, self);
        let to = state.view_mut();
        rt.with_scratch(bytes, |cut| task::run(rt, self, [q, k, v], out, to, cut))?;
        state.advance(len);
        Ok(())
    }

    /// Attends over sequences of different lengths packed one after the other.
    ///
    /// Shapes as in [`forward`](Self::forward) with `batch = 1`; `cu_seqlens` holds `0`, the end of the first
    /// sequence, .. the end of the last, `len`. Sequence `s` starts from and leaves row `s` of `state`
    /// (`[sequences, heads, dk, dv]`); the result is bit for bit that of separate calls.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::Value`] if `cu_seqlens` does not rise from 0 to `len`.
    #[expect(clippy::too_many_arguments, reason = "those of `forward` and where sequences end")]
    pub fn forward_packed<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        mut out: ViewMut<'_, E, 4>,
        cu_seqlens: &[usize],
        state: &mut State,
    ) -> Result<()> {
        let [_, len, ..] = self.check([q, k, v], out.shape())?;
        Self::check_packed(q.shape(), cu_seqlens)?;
        let ([.., dk], [.., dv]) = (q.shape(), v.shape());
        state.expect(OP, [cu_seqlens.len() - 1, self.heads(), dk, dv])?;
        state.room(OP, len)?;
        let mut states = state.view_mut();
        let bytes = Run { len: longest(cu_seqlens), dk, dv }.scratch(rt, self);
        rt.with_scratch(bytes, |mut cut| {
            for (s, w) in cu_seqlens.windows(2).enumerate() {
                let qkv = [q, k, v].map(|x| x.slice(1, w[0], w[1]));
                let out = out.reborrow().slice(1, w[0], w[1]);
                let state = states.reborrow().slice(0, s, s + 1);
                task::run(rt, self, qkv, out, state, cut.reborrow());
            }
        })?;
        state.advance(len);
        Ok(())
    }

    /// Scratch bytes that [`forward`](Self::forward) takes from the runtime for one thread.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, dk: usize, dv: usize) -> usize {
        task::scratch_bytes(rt, self, dk, dv)
    }

    fn check_packed([batch, len, ..]: [usize; 4], cu_seqlens: &[usize]) -> Result<()> {
        if batch != 1 {
            return Err(Error::value(OP, "batch", "1 for packed sequences", batch));
        }
        let rises = cu_seqlens.windows(2).all(|w| w[0] <= w[1]);
        if !rises || cu_seqlens.first() != Some(&0) || cu_seqlens.last() != Some(&len) {
            let expected = alloc::format!("rising from 0 to {len}");
            return Err(Error::value(OP, "cu_seqlens", expected, alloc::format!("{cu_seqlens:?}")));
        }
        Ok(())
    }

    fn check<E: Element>(
        &self,
        [q, k, v]: [View<'_, E, 4>; 3],
        out: [usize; 4],
    ) -> Result<[usize; 4]> {
        let [batch, len, heads, dk] = q.shape();
        let letters = "[batch, len, heads, dim]";
        if heads != self.heads() {
            let expected = alloc::format!("{} heads, one per slope", self.heads());
            return Err(Error::shape(OP, "q", expected, q.shape()));
        }
        expect_shape(OP, "k", letters, [batch, len, heads, dk], k.shape())?;
        expect_shape(OP, "v", letters, [batch, len, heads, v.shape()[3]], v.shape())?;
        expect_shape(OP, "out", letters, v.shape(), out)?;
        Ok(q.shape())
    }
}

/// Tokens of the longest packed sequence.
fn longest(cu_seqlens: &[usize]) -> usize {
    cu_seqlens.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0)
}

const OP: &str = "lightning attention";
