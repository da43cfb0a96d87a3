//! One chunk of mixed chunk attention: exact scores inside of the chunk, a sum over chunks for all the rest.
//!
//! With queries `Q`, `L` (`m x s`), keys `K`, `G` (`n x s`) and values `V` (`n x e`) of a chunk, and the sum `S`
//! (`s x e`) of `G^T V` over chunks:
//!
//! ```text
//! Chunk:   P = act(scale Q K^T + bias), masked       O = factor L S + P V       then S = S + G^T V if asked
//! Absorb:  S = S + G^T V
//! ```
//!
//! Scores are formed once per chunk and stay in the second cache level, while the columns of `V`, `S` and `O` pass
//! by, [`COLUMNS`] at a time: each block of values is packed once and serves both products. Sums lie in panels of
//! [`PANEL`] value columns, as right operands of the matrix engine do.

mod absorb;
mod answer;
mod operands;
mod row;

pub use absorb::Absorb;
pub use answer::Chunk;
pub use operands::{Keys, StageKeys, StageValues, Values};

use super::quadratic::stride;
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, PANEL, Tiles};

/// Queries whose scores are held at a time.
pub const ROWS: usize = 256;
/// Value columns that pass by at a time: with 256 rows of them packed, the scores still stay in the second cache
/// level.
pub const COLUMNS: usize = 2 * PANEL;
/// Up to this many rows keys and values are read as they lie: packing them would cost more.
pub const FEW: usize = 4;

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;
type ScoreElem<B> = <<B as Backend>::S as Tiles>::Elem;

/// Sizes that decide how much scratch a chunk takes.
#[derive(Clone, Copy, Debug)]
pub struct MixedShape {
    /// Most keys of a chunk.
    pub chunk: usize,
    /// Width of queries and keys.
    pub s: usize,
}

impl MixedShape {
    fn rows(&self) -> usize {
        self.chunk.min(ROWS)
    }

    /// Lengths of the buffers of [`MixedWork`], in order: floats, packed elements, those of the engine for scores.
    fn lens<B: Backend>(&self) -> ([usize; 5], [usize; 6], [usize; 2]) {
        let (Self { chunk: n, s }, m) = (*self, self.rows());
        let left = <B::T as Tiles>::left_len;
        (
            [m * stride(n), m, s, n * s.max(COLUMNS), COLUMNS],
            [
                B::T::right_len(n, COLUMNS),
                left(m, n),
                left(m, s),
                left(s, n),
                <B::T as Tiles>::view_len(s, PANEL),
                <B::T as Tiles>::view_len(n, PANEL),
            ],
            [B::S::right_len(s, n), <B::S as Tiles>::left_len(m, s)],
        )
    }

    /// Bytes of a [`MixedWork`].
    #[must_use]
    pub fn bytes<B: Backend>(&self) -> usize {
        let (floats, packed, scores) = self.lens::<B>();
        floats.map(bytes_of::<f32>).iter().sum::<usize>()
            + packed.map(bytes_of::<Elem<B>>).iter().sum::<usize>()
            + scores.map(bytes_of::<ScoreElem<B>>).iter().sum::<usize>()
    }
}

/// Buffers for one chunk at a time.
pub struct MixedWork<'a, B: Backend> {
    scores: &'a mut [f32],
    factors: &'a mut [f32],
    query: &'a mut [f32],
    staged: &'a mut [f32],
    out: &'a mut [f32],
    values: &'a mut [Elem<B>],
    left_p: &'a mut [Elem<B>],
    left_q: &'a mut [Elem<B>],
    left_k: &'a mut [Elem<B>],
    view_s: &'a mut [Elem<B>],
    view_v: &'a mut [Elem<B>],
    keys: &'a mut [ScoreElem<B>],
    left_scores: &'a mut [ScoreElem<B>],
    // Dropped in this order: the later session goes first.
    session: <B::T as Tiles>::Session,
    score_session: <B::S as Tiles>::Session,
}

impl<'a, B: Backend> MixedWork<'a, B> {
    /// Cuts the buffers off `scratch`.
    pub fn new(b: B, shape: MixedShape, scratch: &mut Cut<'a>) -> Self {
        let (floats, packed, of_scores) = shape.lens::<B>();
        let [scores, factors, query, staged, out] = floats.map(|n| scratch.take(n));
        let [values, left_p, left_q, left_k, view_s, view_v] = packed.map(|n| scratch.take(n));
        let [keys, left_scores] = of_scores.map(|n| scratch.take(n));
        Self {
            scores,
            factors,
            query,
            staged,
            out,
            values,
            left_p,
            left_q,
            left_k,
            view_s,
            view_v,
            keys,
            left_scores,
            score_session: b.scores().session(),
            session: b.tiles().session(),
        }
    }
}

impl<B: Backend> core::fmt::Debug for MixedWork<'_, B> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("MixedWork").finish_non_exhaustive()
    }
}
