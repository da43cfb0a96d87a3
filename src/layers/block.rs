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

/// Runs `work` on any view whose rows lie the same distance apart, with `bytes` of memory: the stream is copied to and
/// fro because a view of it cannot be read and written at once.
pub(super) fn on_view(
    rt: &Runtime,
    x: ViewMut<'_, f32, 3>,
    bytes: usize,
    work: impl FnOnce(&mut [f32], Cut<'_>) -> Result<()>,
) -> Result<()> {
    let ([batch, len, width], mut x) = (x.shape(), x.merge_rows()?);
    let n = batch * len;
    rt.with_scratch(bytes_of::<f32>(n * width) + bytes, |mut cut| {
        let stream = cut.take::<f32>(n * width);
        for i in 0..n {
            stream[i * width..][..width].copy_from_slice(x.row_mut([i, 0]));
        }
        work(stream, cut)?;
        for i in 0..n {
            x.row_mut([i, 0]).copy_from_slice(&stream[i * width..][..width]);
        }
        Ok(())
    })?
}
