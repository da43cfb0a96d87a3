//! The chunk form of a decayed linear recurrence, shared by every mechanism that has one.
//!
//! A chunk of `m` rows with incoming state `S` (`d x e`), `a_r = lambda^(r+1)`, `b_r = lambda^(m-1-r)`,
//! `M_rc = lambda^(r-c)` for `c <= r` and 0 above (Lightning Attention-2, Algorithm 1):
//!
//! ```text
//! P = scale * (Q K^T) o M                       m x m, the lower triangle only
//! O = diag(scale * a) Q S + P V                 one accumulation, written once
//! S = forget_m(S) + (diag(b) K)^T V
//! ```
//!
//! The state is kept in panels of [`PANEL`] value columns. A panel (`d x 32`) is read into the first cache
//! level once per chunk: it serves the output product and is updated in place right after.

mod advance;
mod panels;
mod scores;
mod turned;

pub use advance::Advance;
pub use panels::{FromPanels, ToPanels};
pub use scores::Scores;
pub use turned::{Turn, TurnBack};

use super::decay::Decay;
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, PANEL, Tiles, right_len};
use crate::tensor::View;

/// Sizes that decide how much scratch a chunk takes.
#[derive(Clone, Copy, Debug)]
pub struct ChunkShape {
    /// Largest number of rows.
    pub chunk: usize,
    /// Width of queries and keys.
    pub dk: usize,
    /// Width of values.
    pub dv: usize,
}

impl ChunkShape {
    /// Distance between rows of a score matrix.
    #[must_use]
    pub fn score_stride(&self) -> usize {
        self.chunk.next_multiple_of(PANEL)
    }

    /// Floats of one score matrix.
    #[must_use]
    pub fn score_len(&self) -> usize {
        self.chunk * self.score_stride()
    }

    /// Floats of a state in panels.
    #[must_use]
    pub fn state_len(&self) -> usize {
        right_len(self.dk, self.dv)
    }

    /// Rows of tiles that the sinks of a chunk take: those of its scores and outputs, and those of its state.
    #[must_use]
    pub fn taken(&self, outputs: bool, state: bool) -> usize {
        let panels = self.dv.div_ceil(PANEL);
        let outputs = usize::from(outputs) * (self.score_stride() + self.chunk * panels);
        outputs + usize::from(state) * self.dk * panels
    }

    /// Bytes of a [`Workspace`].
    #[must_use]
    pub fn workspace_bytes<B: Backend>(&self) -> usize {
        2 * bytes_of::<f32>(self.dk)
            + bytes_of::<f32>(self.dv)
            + bytes_of::<f32>(PANEL)
            + bytes_of::<f32>(self.chunk)
            + bytes_of::<Elem<B>>(B::T::right_len(self.dk, self.chunk))
            + bytes_of::<Elem<B>>(B::T::right_len(self.chunk, self.dv))
            + bytes_of::<Elem<B>>(<B::T as Tiles>::left_len(self.chunk, self.dk))
            + bytes_of::<Elem<B>>(<B::T as Tiles>::left_len(self.dk, self.chunk))
            + bytes_of::<Elem<B>>(<B::T as Tiles>::left_len(self.chunk, self.chunk))
            + bytes_of::<Elem<B>>(<B::T as Tiles>::view_len(self.dk, PANEL))
    }
}

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;

/// Buffers for one chunk of one head at a time.
pub struct Workspace<'a, B: Backend> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    out: &'a mut [f32],
    session: <B::T as Tiles>::Session,
    query_scale: &'a mut [f32],
    keys: &'a mut [Elem<B>],
    values: &'a mut [Elem<B>],
    left_q: &'a mut [Elem<B>],
    left_k: &'a mut [Elem<B>],
    left_p: &'a mut [Elem<B>],
    view_s: &'a mut [Elem<B>],
}

impl<'a, B: Backend> Workspace<'a, B> {
    /// Cuts the buffers off `scratch`.
    pub fn new(b: B, shape: ChunkShape, scratch: &mut Cut<'a>) -> Self {
        let ChunkShape { chunk, dk, dv } = shape;
        Self {
            q: scratch.take(dk),
            k: scratch.take(dk),
            v: scratch.take(dv),
            out: scratch.take(PANEL),
            session: b.tiles().session(),
            query_scale: scratch.take(chunk),
            keys: scratch.take(B::T::right_len(dk, chunk)),
            values: scratch.take(B::T::right_len(chunk, dv)),
            left_q: scratch.take(<B::T as Tiles>::left_len(chunk, dk)),
            left_k: scratch.take(<B::T as Tiles>::left_len(dk, chunk)),
            left_p: scratch.take(<B::T as Tiles>::left_len(chunk, chunk)),
            view_s: scratch.take(<B::T as Tiles>::view_len(dk, PANEL)),
        }
    }
}

/// The state of one head.
#[derive(Debug)]
pub enum Carried<'a> {
    /// In panels: read, then advanced.
    Panels(&'a mut [f32]),
    /// Transposed, in panels that another head advances: read through `panel`, which holds [`PANEL`] columns.
    Transposed {
        /// `[dv, dk]`
        panels: &'a [f32],
        /// `[dk, PANEL]`
        panel: &'a mut [f32],
    },
}

/// The sequence of one head, and how it decays.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a, E> {
    /// `[n, dk]`
    pub q: View<'a, E, 2>,
    /// `[n, dk]`
    pub k: View<'a, E, 2>,
    /// `[n, dv]`
    pub v: View<'a, E, 2>,
    /// Powers of the decay.
    pub decay: Decay<'a>,
    /// Factor of the output.
    pub scale: f32,
}

impl<B: Backend> core::fmt::Debug for Workspace<'_, B> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Workspace").finish_non_exhaustive()
    }
}
