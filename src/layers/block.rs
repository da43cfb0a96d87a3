//! What stacks into a decoder.

use crate::attention::StreamState;
use crate::error::Result;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::ViewMut;
use core::fmt::Debug;

/// A block of a decoder: it reads the residual stream, adds to it, and remembers what later tokens need.
///
/// Models call [`run`](Self::run) block after block on one buffer, with memory that they planned once.
pub trait Block: Clone + Debug + Send + Sync {
    /// What it remembers.
    type State: StreamState;

    /// Width of the residual stream.
    fn width(&self) -> usize;

    /// Memory of the packed weights, in bytes.
    fn weight_bytes(&self) -> usize;

    /// A state that has seen nothing, for `batch` sequences that advance together.
    ///
    /// # Errors
    /// [`Error::Alloc`](crate::Error::Alloc) if memory cannot be had.
    fn new_state(&self, batch: usize) -> Result<Self::State>;

    /// Scratch bytes of [`run`](Self::run) for `rows = batch * len` tokens, besides what attention itself takes from
    /// the runtime.
    fn run_bytes(&self, rt: &Runtime, rows: usize) -> usize;

    /// Advances `stream` (`[batch, len, width]`, contiguous) in place, with [`run_bytes`](Self::run_bytes) of memory
    /// and a state that has room ([`StreamState::reserve`]).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a state of another form, [`Error::Alloc`](crate::Error::Alloc) if
    /// memory cannot be had; `stream` and `state` are untouched then.
    fn run(
        &self,
        rt: &Runtime,
        stream: &mut [f32],
        batch: usize,
        state: &mut Self::State,
        cut: Cut<'_>,
    ) -> Result<()>;
}

/// Scratch bytes of [`forward`].
pub(super) fn forward_bytes<B: Block>(block: &B, rt: &Runtime, rows: usize) -> usize {
    bytes_of::<f32>(rows * block.width()) + block.run_bytes(rt, rows)
}

/// A call on any view whose rows lie the same distance apart: the stream is copied to and fro because a view of it
/// cannot be read and written at once.
pub(super) fn forward<B: Block>(
    block: &B,
    rt: &Runtime,
    x: ViewMut<'_, f32, 3>,
    state: &mut B::State,
) -> Result<()> {
    let ([batch, len, width], mut x) = (x.shape(), x.merge_rows()?);
    let n = batch * len;
    state.reserve(len)?;
    rt.with_scratch(forward_bytes(block, rt, n), |mut cut| {
        let stream = cut.take::<f32>(n * width);
        for i in 0..n {
            stream[i * width..][..width].copy_from_slice(x.row_mut([i, 0]));
        }
        block.run(rt, stream, batch, state, cut)?;
        for i in 0..n {
            x.row_mut([i, 0]).copy_from_slice(&stream[i * width..][..width]);
        }
        Ok(())
    })?
}
