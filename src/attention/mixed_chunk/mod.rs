//! Mixed chunk attention (FLASH): quadratic attention inside of chunks, linear attention across them.

mod backward;
pub mod naive;
mod state;
mod task;

pub use super::quadratic::{BiasGrads, Factor};
pub use crate::kernels::quadratic::{Bias, ScoreActivation};
pub use state::MixedChunkState;

use super::quadratic::{check_bias, check_bias_grads};
use crate::error::{Error, Result, expect_shape};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};

const OP: &str = "mixed chunk attention";

/// How the sums of chunks become what a query reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LinReduce {
    /// Their sum: over earlier chunks when causal, else over all.
    #[default]
    Sum,
    /// Their mean, 0 in the first chunk when causal.
    MeanChunks,
    /// The sum of the own chunk alone; not when causal.
    OwnChunk,
}

/// Choices of [`MixedChunkAttention`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixedChunkConfig {
    /// Rows of a chunk, `C`.
    pub chunk: usize,
    /// Query `i` sees keys `j <= i` of its chunk, and finished chunks through the sum.
    pub causal: bool,
    /// What becomes of a score.
    pub act: ScoreActivation,
    /// Factor of `q . k` inside of the activation, `alpha`.
    pub quad_scale: f32,
    /// Factor of the linear part, `beta`.
    pub lin_scale: Factor,
    /// How chunks are summed.
    pub lin_reduce: LinReduce,
}

impl MixedChunkConfig {
    /// The pseudo-code of the paper: both factors `1 / C`, means over chunks.
    #[must_use]
    pub fn paper(chunk: usize, causal: bool) -> Self {
        Self { lin_reduce: LinReduce::MeanChunks, ..Self::package(chunk, causal) }.with_inv_chunk()
    }

    /// The public PyTorch package: `1 / C`, and sums over chunks times `1 / C`, or `1 / N` when not causal.
    #[must_use]
    pub fn package(chunk: usize, causal: bool) -> Self {
        let base = Self {
            chunk,
            causal,
            act: ScoreActivation::Relu2,
            quad_scale: (1.0 / chunk.max(1) as f64) as f32,
            lin_scale: Factor::InvLen,
            lin_reduce: LinReduce::Sum,
        };
        if causal { base.with_inv_chunk() } else { base }
    }

    fn with_inv_chunk(self) -> Self {
        Self { lin_scale: Factor::Value(self.quad_scale), ..self }
    }
}

/// Mixed chunk attention: one head, narrow queries and keys, wide values, no softmax.
///
/// ```text
/// o_i = sum_j act(alpha quad_q_i . quad_k_j + b_ij) v_j         over the keys of the own chunk (j <= i if causal)
///     + beta c lin_q_i sum_h T_h,      T_h = sum of lin_k_j v_j^T over chunk h
/// ```
///
/// The second sum runs over earlier chunks when causal (the own one excluded), else over all or over the own one;
/// `c` is 1, or one over their number ([`LinReduce`]). `b` depends on positions inside of the chunk. The last chunk
/// may be short; the factors stay. A causal sequence may be split anywhere: with a state, feeding the parts gives the
/// same result as feeding the whole, single tokens included. Results do not depend on the number of threads.
///
/// Cost per token: `2 C (s + e) + 4 s e` flops, half of the first term when causal, whatever the length. Scratch per
/// thread: the scores of a chunk (at most 256 rows), and when there is no state a sum, `s e` floats.
///
/// Views have three dimensions, because the mechanism has one head by construction: `e` is several times the model
/// width, and queries and keys are shared by all of it.
///
/// Source: Transformer Quality in Linear Time (arXiv 2202.10447), section 3.
///
/// ```
/// use linattn::attention::mixed_chunk::{MixedChunkAttention, MixedChunkConfig, MixedChunkState};
/// use linattn::{Runtime, tensor::Tensor};
/// let rt = Runtime::new()?;
/// let (batch, len, chunk, s, e) = (1, 100, 16, 8, 24);
/// let x = Tensor::<3>::zeros([batch, len, s])?;
/// let v = Tensor::<3>::zeros([batch, len, e])?;
/// let mut out = Tensor::<3>::zeros([batch, len, e])?;
/// let attention = MixedChunkAttention::new(MixedChunkConfig::paper(chunk, true))?;
/// let mut state = MixedChunkState::new(batch, chunk, s, e)?;
/// let heads = [x.view(), x.view(), x.view(), x.view()]; // quadratic q and k, linear q and k
/// attention.forward(&rt, heads, v.view(), out.view_mut(), Some(&mut state))?;
/// assert_eq!((state.len(), state.pending()), (100, 4));
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixedChunkAttention {
    config: MixedChunkConfig,
}

/// What may be hidden or added.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extra<'a> {
    /// `[batch, len]`: whether a key counts. Hidden keys and values are never looked at.
    pub key_mask: Option<View<'a, bool, 2>>,
    /// Added to the scaled scores, by positions inside of the chunk: a table of at least `2 C - 1` numbers, a matrix
    /// `[C, C]`, or both.
    pub bias: Bias<'a>,
}

impl MixedChunkAttention {
    /// Checks the choices.
    ///
    /// # Errors
    /// [`Error::Value`] for an empty chunk, a factor that is not finite, and for what does not go together with
    /// `causal`: a factor that depends on the length, and [`LinReduce::OwnChunk`].
    pub fn new(config: MixedChunkConfig) -> Result<Self> {
        let MixedChunkConfig { chunk, causal, quad_scale, lin_scale, lin_reduce, .. } = config;
        if chunk == 0 {
            return Err(Error::value(OP, "chunk", "at least 1", chunk));
        }
        Factor::Value(quad_scale).check(OP, "quad_scale")?;
        lin_scale.check(OP, "lin_scale")?;
        if causal && lin_scale == Factor::InvLen {
            return Err(Error::value(
                OP,
                "lin_scale",
                "a number when causal",
                "one over the length",
            ));
        }
        if causal && lin_reduce == LinReduce::OwnChunk {
            return Err(Error::value(
                OP,
                "lin_reduce",
                "a sum or mean when causal",
                "the own chunk",
            ));
        }
        Ok(Self { config })
    }

    /// The choices.
    #[must_use]
    pub fn config(&self) -> &MixedChunkConfig {
        &self.config
    }

    /// Attends over more tokens of every batch row.
    ///
    /// `qk`: quadratic queries, quadratic keys, linear queries, linear keys, `[batch, len, s]` each; `v`, `out`:
    /// `[batch, len, e]`. `state`, for causal attention only, is what came before and what it becomes; without it the
    /// sequence begins here. Allocates nothing once the runtime has seen the shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not belong together or a width is 0, [`Error::Value`] for a state without
    /// causality, [`Error::Alloc`] if scratch memory cannot be had; `out` and `state` are untouched then.
    pub fn forward<E: Element>(
        &self,
        rt: &Runtime,
        qk: [View<'_, E, 3>; 4],
        v: View<'_, E, 3>,
        out: ViewMut<'_, E, 3>,
        state: Option<&mut MixedChunkState>,
    ) -> Result<()> {
        self.forward_with(rt, qk, v, out, Extra::default(), state)
    }

    /// As [`forward`](Self::forward) with hidden keys and a bias.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), the shapes of `extra` included.
    pub fn forward_with<E: Element>(
        &self,
        rt: &Runtime,
        qk: [View<'_, E, 3>; 4],
        v: View<'_, E, 3>,
        out: ViewMut<'_, E, 3>,
        extra: Extra<'_>,
        state: Option<&mut MixedChunkState>,
    ) -> Result<()> {
        self.check(qk, v, &extra)?;
        let ([batch, len, s], [.., e], chunk) = (qk[0].shape(), v.shape(), self.config.chunk);
        expect_shape(OP, "out", "[batch, len, e]", [batch, len, e], out.shape())?;
        if let Some(state) = &state {
            if !self.config.causal {
                return Err(Error::value(OP, "state", "none unless causal", "one"));
            }
            state.expect(OP, [batch, chunk, s, e])?;
            state.room(OP, len)?;
        }
        if batch == 0 || len == 0 {
            return Ok(());
        }
        task::run(rt, self.config, qk, v, out, extra, state)
    }

    /// Refuses inputs that do not belong together.
    fn check<E: Element>(
        &self,
        qk: [View<'_, E, 3>; 4],
        v: View<'_, E, 3>,
        extra: &Extra<'_>,
    ) -> Result<()> {
        let ([batch, len, s], [.., e], chunk) = (qk[0].shape(), v.shape(), self.config.chunk);
        for (arg, x) in ["quad_q", "quad_k", "lin_q", "lin_k"].into_iter().zip(qk) {
            expect_shape(OP, arg, "[batch, len, s]", [batch, len, s], x.shape())?;
        }
        expect_shape(OP, "v", "[batch, len, e]", [batch, len, e], v.shape())?;
        if s == 0 {
            return Err(Error::shape(OP, "quad_q", "s of at least 1", qk[0].shape()));
        }
        if e == 0 {
            return Err(Error::shape(OP, "v", "e of at least 1", v.shape()));
        }
        if let Some(mask) = extra.key_mask {
            expect_shape(OP, "key_mask", "[batch, len]", [batch, len], mask.shape())?;
        }
        check_bias(OP, &extra.bias, [chunk, chunk])
    }

    /// Scratch bytes that [`forward`](Self::forward) takes from the runtime for one thread, at most.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, len: usize, s: usize, e: usize) -> usize {
        task::scratch_bytes(rt, self.config.chunk.min(len), s, e)
    }
}
