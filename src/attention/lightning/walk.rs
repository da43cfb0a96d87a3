//! The order in which a part of a call goes through its chunks.

use super::LightningAttention;
use crate::kernels::ahead::Ahead;
use crate::kernels::chunk::{Advance, Carried, ChunkShape, Head, Scores, Workspace};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Tiles};
use crate::tensor::{Element, ViewMut};

/// Bytes of states that are advanced together: they and a chunk's buffers stay in the second cache level.
const RESIDENT: usize = 1 << 20;

/// Sizes of the chunks of a call of `len` tokens.
pub(super) fn shape<B: Backend>(
    op: &LightningAttention,
    len: usize,
    [dk, dv]: [usize; 2],
) -> ChunkShape {
    let rows = op.chunk.unwrap_or(<B::T as Tiles>::CHUNK);
    ChunkShape { chunk: rows.min(len).max(1), dk, dv }
}

/// The chunks of some heads.
pub(super) trait Chunks {
    /// Brings the state of head `h` of batch row `n` into panels.
    fn load(&mut self, n: usize, h: usize, panels: &mut [f32]);
    /// The chunk of head `h` behind `done` rows, given as `[h, done]`, of batch row `n`; `next` is the one that follows.
    fn advance(&mut self, n: usize, this: [usize; 2], next: [usize; 2], panels: &mut [f32]);
    /// The way back of [`load`](Self::load).
    fn store(&mut self, n: usize, h: usize, panels: &[f32]);
}

/// Chunks outside, heads inside, so that the rows of a chunk are read from memory page by page while the states wait
/// in the second cache level.
pub(super) struct Walk {
    /// Batch rows, tokens and heads.
    sizes: [usize; 3],
    chunk: usize,
    /// Floats of a state.
    state: usize,
}

impl Walk {
    /// Over batch rows, tokens and heads.
    pub fn new(sizes: [usize; 3], shape: ChunkShape) -> Self {
        Self { sizes, chunk: shape.chunk, state: shape.state_len() }
    }

    /// How many heads advance together.
    fn group(&self) -> usize {
        (RESIDENT / bytes_of::<f32>(self.state).max(1)).clamp(1, self.sizes[2].max(1))
    }

    /// Scratch for the states. A walk over parts of them never needs more.
    pub fn bytes(&self) -> usize {
        let one = bytes_of::<f32>(self.state);
        one.max(RESIDENT.min(one * self.sizes[2]))
    }

    /// All chunks of all heads.
    pub fn run(&self, scratch: &mut Cut<'_>, job: &mut impl Chunks) {
        let [batch, len, heads] = self.sizes;
        let states = scratch.take::<f32>(self.group() * self.state);
        for n in 0..batch {
            for first in (0..heads).step_by(self.group()) {
                let last = heads.min(first + self.group());
                for (h, panels) in (first..last).zip(states.chunks_exact_mut(self.state)) {
                    job.load(n, h, panels);
                }
                for done in (0..len).step_by(self.chunk) {
                    for (h, panels) in (first..last).zip(states.chunks_exact_mut(self.state)) {
                        let next = match h + 1 < last {
                            true => [h + 1, done],
                            false => [first, len.min(done + self.chunk)],
                        };
                        job.advance(n, [h, done], next, panels);
                    }
                }
                for (h, panels) in (first..last).zip(states.chunks_exact(self.state)) {
                    job.store(n, h, panels);
                }
            }
        }
    }
}

/// Buffers of the chunk form for one chunk of one head.
pub(super) struct Chunk<'a, B: Backend> {
    stride: usize,
    scores: &'a mut [f32],
    work: Workspace<'a, B>,
}

impl<'a, B: Backend> Chunk<'a, B> {
    pub fn new(b: B, shape: ChunkShape, scratch: &mut Cut<'a>) -> Self {
        let scores = scratch.take::<f32>(shape.score_len());
        Self { stride: shape.score_stride(), scores, work: Workspace::new(b, shape, scratch) }
    }

    pub fn bytes(shape: ChunkShape) -> usize {
        bytes_of::<f32>(shape.score_len()) + shape.workspace_bytes::<B>()
    }

    /// Rows `at .. at + rows` of a head: its outputs, if they are wanted, and the state behind it.
    pub fn advance<E: Element>(
        &mut self,
        b: B,
        head: Head<'_, E>,
        [at, rows]: [usize; 2],
        out: Option<ViewMut<'_, E, 2>>,
        state: Carried<'_>,
        ahead: &mut Ahead,
    ) {
        let (work, scores, stride) = (&mut self.work, &mut *self.scores, self.stride);
        if out.is_some() {
            b.call_tiles(Scores {
                head,
                at,
                rows,
                work: &mut *work,
                scores: &mut *scores,
                stride,
                ahead: &mut *ahead,
            });
        }
        b.call_tiles(Advance { head, at, rows, work, scores, stride, out, state, ahead });
    }
}
