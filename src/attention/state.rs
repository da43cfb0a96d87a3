//! What a linear recurrence remembers.

use crate::error::{Error, Result};
use crate::tensor::{Tensor, View, ViewMut};
use core::fmt::Debug;

/// What a stream of tokens leaves behind in one layer, whatever the mechanism: a value that can be cloned, counted,
/// written out and read back.
pub trait StreamState: Clone + Debug + Send + Sync {
    /// Tokens seen.
    fn len(&self) -> usize;

    /// Whether no token was seen.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory of the contents, in bytes.
    fn bytes(&self) -> usize;

    /// Memory that the contents would take after `len` tokens, in bytes: what a saved state must bring along before
    /// memory is taken for it.
    fn bytes_at(&self, len: usize) -> usize {
        let _ = len;
        self.bytes()
    }

    /// Forgets everything.
    fn reset(&mut self);

    /// Makes room for `tokens` more, so that reading them takes no memory.
    ///
    /// # Errors
    /// [`Error::Value`] if the count would overflow, [`Error::Alloc`] if memory cannot be had; nothing is lost then.
    fn reserve(&mut self, tokens: usize) -> Result<()>;

    /// A state of the same form that has seen `len` tokens, with contents still to be filled in.
    ///
    /// # Errors
    /// [`Error::Alloc`] if memory cannot be had.
    fn blank(&self, len: usize) -> Result<Self>;

    /// Shows all contents, piece by piece, in an order and of sizes that form and length alone decide.
    ///
    /// # Errors
    /// That of `see`, at once.
    fn contents(&self, see: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()>;

    /// As [`contents`](Self::contents), to be filled in.
    ///
    /// # Errors
    /// That of `fill`, at once.
    fn contents_mut(&mut self, fill: &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()>;
}

/// The memory of a linear recurrence: one `[dk, dv]` matrix of `f32` per batch row and head, and the number of
/// tokens it has seen. Its size does not depend on that number.
#[derive(Clone, Debug)]
pub struct State {
    kv: Tensor<4>,
    len: usize,
}

impl State {
    /// A state that has seen nothing. [`Error::Alloc`] if the memory cannot be had.
    pub fn new(batch: usize, heads: usize, dk: usize, dv: usize) -> Result<Self> {
        Ok(Self { kv: Tensor::zeros([batch, heads, dk, dv])?, len: 0 })
    }

    /// A state with given contents `[batch, heads, dk, dv]` after `len` tokens.
    pub fn from_slice(kv: &[f32], shape: [usize; 4], len: usize) -> Result<Self> {
        Ok(Self { kv: Tensor::from_slice(kv, shape)?, len })
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.kv.as_mut_slice().fill(0.0);
        self.len = 0;
    }

    /// Tokens seen.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token was seen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Memory of the contents, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        size_of_val(self.kv.as_slice())
    }

    /// `[batch, heads, dk, dv]`
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        self.kv.shape()
    }

    /// The contents, row-major `[batch, heads, dk, dv]`.
    #[must_use]
    pub fn view(&self) -> View<'_, f32, 4> {
        self.kv.view()
    }

    pub(crate) fn view_mut(&mut self) -> ViewMut<'_, f32, 4> {
        self.kv.view_mut()
    }

    pub(crate) fn expect(&self, op: &'static str, shape: [usize; 4]) -> Result<()> {
        crate::error::expect_shape(op, "state", "[batch, heads, dk, dv]", shape, self.shape())
    }

    /// Counts `n` more tokens; an [`Error`] if the count would overflow.
    pub(crate) fn room(&self, op: &'static str, n: usize) -> Result<()> {
        match self.len.checked_add(n) {
            Some(_) => Ok(()),
            None => Err(Error::value(op, "state", "a token count within usize", self.len)),
        }
    }

    pub(crate) fn advance(&mut self, n: usize) {
        self.len += n;
    }
}

impl StreamState for State {
    fn len(&self) -> usize {
        self.len
    }
    fn bytes(&self) -> usize {
        self.bytes()
    }
    fn reset(&mut self) {
        self.reset();
    }
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.room("state", tokens)
    }
    fn blank(&self, len: usize) -> Result<Self> {
        Ok(Self { kv: Tensor::zeros(self.kv.shape())?, len })
    }
    fn contents(&self, see: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        see(self.kv.as_slice())
    }
    fn contents_mut(&mut self, fill: &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
        fill(self.kv.as_mut_slice())
    }
}
