//! Combiner: full attention at sparse cost, through direct keys and summaries of groups of keys.

mod axial;
mod backward;
mod fixed;
mod job;
mod meet;
pub mod naive;
mod state;

pub use crate::kernels::pool::Pool;
pub use state::CombinerState;

use super::{Scale, StreamState};
use crate::error::{Error, Result, expect_shape};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};

const OP: &str = "combiner attention";

/// What stands for a row of tokens in [`Variant::AxialRowMajor`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeySummary {
    /// The key at the query's own column.
    #[default]
    None,
    /// The expectation of the row's keys, with the weights of its values.
    WeightedSum,
}

/// How tokens that a query does not see directly are grouped. Segments of `w` tokens are the rows of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Variant {
    /// One group per segment; the own segment is seen directly.
    Fixed,
    /// One group per row, summarised anew for every column; the own row is seen directly.
    AxialRowMajor(KeySummary),
    /// The own row and the own column are seen directly; every other column above, and the parts of every earlier row
    /// left and right of the own column, are groups. Causal only, pooled by maxima.
    AxialMixture,
}

/// Settings of a [`CombinerAttention`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CombinerConfig {
    /// The groups.
    pub variant: Variant,
    /// Tokens of a segment, `w`; about the root of the length costs least.
    pub segment: usize,
    /// Whether a token sees only itself and what came before.
    pub causal: bool,
    /// How keys and queries of a group become one ([`Variant::Fixed`]; others pool by maxima or not at all).
    pub pool: Pool,
    /// Factor of queries, before pooling.
    pub scale: Scale,
}

impl CombinerConfig {
    /// Segments that are groups, pooled by maxima.
    #[must_use]
    pub const fn fixed(segment: usize) -> Self {
        let (variant, pool, scale) = (Variant::Fixed, Pool::Max, Scale::InvSqrtDim);
        Self { variant, segment, causal: false, pool, scale }
    }

    /// Rows and columns of a table of `segment` columns.
    #[must_use]
    pub const fn axial_row_major(segment: usize) -> Self {
        Self { variant: Variant::AxialRowMajor(KeySummary::None), ..Self::fixed(segment) }
    }

    /// Rows, columns and their parts; causal.
    #[must_use]
    pub const fn axial_mixture(segment: usize) -> Self {
        Self { variant: Variant::AxialMixture, causal: true, ..Self::fixed(segment) }
    }

    /// The same, causal.
    #[must_use]
    pub const fn causal(self) -> Self {
        Self { causal: true, ..self }
    }
}

/// Combiner attention.
///
/// A query attends directly to a few keys, and to one summary of each group of keys that covers the rest; one softmax
/// weighs both. A group `R` is summarised by
///
/// ```text
/// k_R = pool_(j in R) k_j      q_R = pool_(j in R) q_j      v_R = sum_j softmax_j(q_R . k_j) v_j      over j in R
/// ```
///
/// or as [`Variant`] says. A last segment that is not full is pooled over the tokens it has. Every key keeps a weight
/// above zero, but for those of such a segment in [`Variant::AxialRowMajor`] when it is not causal: columns that the
/// segment does not reach have no summary of it.
///
/// State ([`Variant::Fixed`], causal): summaries of finished segments, and keys, values and pools of the open one;
/// it grows by `dk + dv` numbers per segment. Splitting a sequence anywhere and feeding the parts gives the same result.
///
/// Cost per token and head: about `2 (dk + dv) (w + len / w)` flops, half of it when causal, and for the axial variants
/// once or thrice `2 (dk + dv) w` more for summaries.
///
/// Source: Combiner (arXiv 2107.05768), sections 4.1 and 4.2, and its public code.
///
/// ```
/// use linattn::attention::combiner::{CombinerAttention, CombinerConfig};
/// use linattn::{Runtime, tensor::Tensor};
/// let rt = Runtime::new()?;
/// let attention = CombinerAttention::new(CombinerConfig::fixed(10).causal())?;
/// let (batch, len, heads, dim) = (1, 100, 2, 16);
/// let q = Tensor::<4>::zeros([batch, len, heads, dim])?;
/// let v = Tensor::<4>::from_slice(&vec![1.0; len * heads * dim], q.shape())?;
/// let mut out = q.clone();
/// attention.forward(&rt, q.view(), q.view(), v.view(), out.view_mut(), None)?;
/// assert!(out.as_slice().iter().all(|x| (x - 1.0).abs() < 1e-5));
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CombinerAttention {
    config: CombinerConfig,
}

impl CombinerAttention {
    /// As configured.
    ///
    /// # Errors
    /// [`Error::Value`] for segments without tokens, a factor that is not finite, or a mixture that is not causal or
    /// not pooled by maxima.
    pub fn new(config: CombinerConfig) -> Result<Self> {
        if config.segment == 0 {
            return Err(Error::value(OP, "segment", "at least 1", 0));
        }
        config.scale.check(OP)?;
        if config.variant == Variant::AxialMixture {
            if !config.causal {
                return Err(Error::value(OP, "causal", "true for this variant", false));
            }
            if config.pool != Pool::Max {
                let got = alloc::format!("{:?}", config.pool);
                return Err(Error::value(OP, "pool", "Max for this variant", got));
            }
        }
        Ok(Self { config })
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &CombinerConfig {
        &self.config
    }

    /// A state that has seen nothing.
    ///
    /// # Errors
    /// [`Error::Value`] for a variant without state, [`Error::Alloc`] if memory cannot be had.
    pub fn new_state(
        &self,
        batch: usize,
        heads: usize,
        dk: usize,
        dv: usize,
    ) -> Result<CombinerState> {
        self.streams()?;
        CombinerState::new([batch, heads, dk, dv], self.config.segment)
    }

    /// Refuses what cannot be fed in parts.
    fn streams(&self) -> Result<()> {
        match (self.config.variant, self.config.causal) {
            (Variant::Fixed, true) => Ok(()),
            _ => {
                let expected = "none, unless segments are fixed and causal";
                Err(Error::value(OP, "state", expected, "one"))
            }
        }
    }

    /// Attends.
    ///
    /// `q`, `k`: `[batch, len, heads, dk]`; `v`, `out`: `[batch, len, heads, dv]`. With a state, tokens go on where it
    /// stands. Allocates nothing once the runtime has seen the shape, but for the growth of a state.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not belong together, [`Error::Value`] for a state of a variant without one,
    /// [`Error::Alloc`] if memory cannot be had; `out` and `state` are untouched then.
    pub fn forward<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        out: ViewMut<'_, E, 4>,
        state: Option<&mut CombinerState>,
    ) -> Result<()> {
        let ([batch, len, heads, dk], [.., dv]) = (q.shape(), v.shape());
        expect_shape(OP, "k", "[batch, len, heads, dk]", [batch, len, heads, dk], k.shape())?;
        expect_shape(OP, "v", "[batch, len, heads, dv]", [batch, len, heads, dv], v.shape())?;
        expect_shape(OP, "out", "[batch, len, heads, dv]", [batch, len, heads, dv], out.shape())?;
        if dk == 0 {
            return Err(Error::shape(OP, "q", "heads of at least one element", q.shape()));
        }
        if let Some(state) = state {
            self.streams()?;
            state.expect(OP, [batch, heads, dk, dv], self.config.segment)?;
            state.reserve(len)?;
            job::run(rt, &self.config, [q, k, v], out, Some(state.parts_mut()))?;
            state.advance(len);
            return Ok(());
        }
        job::run(rt, &self.config, [q, k, v], out, None)
    }

    /// Scratch bytes that [`forward`](Self::forward) takes from the runtime for one thread, at most.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, len: usize, dk: usize, dv: usize) -> usize {
        job::scratch_bytes(rt, &self.config, [len, dk, dv])
    }
}
