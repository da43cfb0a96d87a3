//! Linear attention without decay: keys and values summed into a state, queries read from it.
//!
//! With `F = phi(Q)`, `G = phi(K)` of a block of rows, state `S` (`dk x dv`) and `z` (`dk`):
//!
//! ```text
//! Absorb:  S = S + G^T V              z = z + column sums of G
//! Read:    O = diag(w) F S            w_r = scale / (scale * F_r . z + eps), or scale
//! Chunk:   P = tril(F G^T)            O = diag(w) (F S + P V), row sums of P added to F_r . z; then Absorb
//! ```
//!
//! States lie in panels of [`PANEL`] value columns, as right operands of the matrix engine do.

pub mod backward;
mod blocks;
mod causal;

pub use blocks::{Absorb, Read};
pub use causal::{Chunk, Token};

use super::ahead::Ahead;
use super::feature_map::{FeatureMap, Features, MOST};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, PANEL, Tiles, right_len};

/// Most rows of a [`Chunk`]: its quadratic part stays cheap, and a pass over the state pays.
pub const CHUNK: usize = 48;
/// Most rows of an [`Absorb`] or a [`Read`]: mapped rows and a panel of the state fit the first cache level.
pub const BLOCK: usize = MOST;

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;

/// What every step of a call shares.
#[derive(Clone, Copy, Debug)]
pub struct Form<M = FeatureMap> {
    /// `phi`
    pub map: M,
    /// Factor of `phi(q)`.
    pub scale: f32,
    /// What is added to the normaliser, if there is one.
    pub eps: Option<f32>,
    /// What every element of `z` begins with where there is no state.
    pub start: f32,
}

impl<M: Features> Form<M> {
    /// The same for one head of a call.
    #[must_use]
    pub fn head(&self, batch: usize, head: usize) -> Self {
        Self { map: self.map.head(batch, head), ..*self }
    }

    /// The same for some batch rows or heads of a call, as [`Features::part`].
    #[must_use]
    pub fn part(&self, axis: usize, from: usize, to: usize) -> Self {
        Self { map: self.map.part(axis, from, to), ..*self }
    }

    /// The factor of an output row with `phi(q) . z = dot`.
    #[inline(always)]
    #[must_use]
    pub fn weight(&self, dot: f32) -> f32 {
        match self.eps {
            Some(eps) => self.scale / (self.scale * dot + eps),
            None => self.scale,
        }
    }
}

/// Widths of a head.
#[derive(Clone, Copy, Debug)]
pub struct LinearShape {
    /// Of queries and keys.
    pub inputs: usize,
    /// Of their features.
    pub dk: usize,
    /// Of values.
    pub dv: usize,
}

impl LinearShape {
    /// Of a head whose queries and keys are `inputs` wide.
    #[must_use]
    pub fn new<M: Features>(form: &Form<M>, inputs: usize, dv: usize) -> Self {
        Self { inputs, dk: form.map.width(inputs), dv }
    }

    /// Floats of a state in panels.
    #[must_use]
    pub fn state_len(&self) -> usize {
        right_len(self.dk, self.dv)
    }

    /// Rows of tiles that an [`Absorb`] computes.
    #[must_use]
    pub fn absorb_rows(&self) -> usize {
        self.dk * self.dv.div_ceil(PANEL)
    }

    /// Rows of tiles that a [`Read`] of `rows` queries computes.
    #[must_use]
    pub fn read_rows(&self, rows: usize) -> usize {
        rows * self.dv.div_ceil(PANEL)
    }

    /// Distance between mapped queries: not a power of two, so that rows do not meet in the same cache sets.
    fn q_stride(&self) -> usize {
        self.dk.next_multiple_of(16) + 16
    }

    /// Lengths of the buffers of [`LinearWork`], in order: floats, then packed elements.
    fn lens<B: Backend>(&self) -> ([usize; 7], [usize; 6]) {
        let Self { dk, dv, .. } = *self;
        let rows = BLOCK.max(CHUNK);
        (
            [rows * self.q_stride(), rows * dk, CHUNK * dv, dv, rows, rows, CHUNK * SCORES],
            [
                B::T::right_len(dk, CHUNK),
                B::T::right_len(rows, dv),
                <B::T as Tiles>::left_len(rows, dk),
                <B::T as Tiles>::left_len(dk, rows),
                <B::T as Tiles>::left_len(CHUNK, CHUNK),
                <B::T as Tiles>::view_len(dk, PANEL),
            ],
        )
    }

    /// Bytes of a [`LinearWork`].
    #[must_use]
    pub fn bytes<B: Backend>(&self, map: &impl Features) -> usize {
        let (floats, packed) = self.lens::<B>();
        let floats: usize = floats.iter().map(|n| bytes_of::<f32>(*n)).sum();
        let packed: usize = packed.iter().map(|n| bytes_of::<Elem<B>>(*n)).sum();
        floats + packed + map.bytes::<B>(self.inputs)
    }
}

/// Distance between rows of scores.
const SCORES: usize = CHUNK.next_multiple_of(PANEL) + PANEL / 2;

/// Buffers for one block of rows of one head at a time.
pub struct LinearWork<'a, B: Backend, M: Features = FeatureMap> {
    shape: LinearShape,
    map: M::Work<'a, B>,
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    out: &'a mut [f32],
    weight: &'a mut [f32],
    ones: &'a mut [f32],
    scores: &'a mut [f32],
    keys: &'a mut [Elem<B>],
    values: &'a mut [Elem<B>],
    left_q: &'a mut [Elem<B>],
    left_k: &'a mut [Elem<B>],
    left_p: &'a mut [Elem<B>],
    view_s: &'a mut [Elem<B>],
    session: <B::T as Tiles>::Session,
    q_stride: usize,
    /// What is needed next, asked for during the products of the next kernel.
    pub ahead: Ahead,
}

impl<'a, B: Backend, M: Features> LinearWork<'a, B, M> {
    /// Cuts the buffers off `scratch`.
    pub fn new(b: B, shape: LinearShape, map: &M, scratch: &mut Cut<'a>) -> Self {
        let (floats, packed) = shape.lens::<B>();
        let [q, k, v, out, weight, ones, scores] = floats.map(|n| scratch.take::<f32>(n));
        let [keys, values, left_q, left_k, left_p, view_s] =
            packed.map(|n| scratch.take::<Elem<B>>(n));
        ones.fill(1.0);
        let q_stride = shape.q_stride();
        Self {
            shape,
            map: map.work(b, shape.inputs, scratch),
            q,
            k,
            v,
            out,
            weight,
            ones,
            scores,
            keys,
            values,
            left_q,
            left_k,
            left_p,
            view_s,
            session: b.tiles().session(),
            q_stride,
            ahead: Ahead::none(),
        }
    }
}

impl<B: Backend, M: Features> core::fmt::Debug for LinearWork<'_, B, M> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("LinearWork").finish_non_exhaustive()
    }
}
