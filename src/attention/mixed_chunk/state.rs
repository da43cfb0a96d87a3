//! What causal mixed chunk attention remembers.

use crate::attention::StreamState;
use crate::error::{Error, Result, expect_shape};
use crate::simd::{PANEL, right_len};
use crate::tensor::{Tensor, View, ViewMut};

/// The memory of causal [`MixedChunkAttention`](super::MixedChunkAttention) in `f32`: the sum of `lin_k^T v` over
/// finished chunks, and the keys and values of the chunk that is being filled. Its size does not depend on the number
/// of tokens seen.
#[derive(Clone, Debug)]
pub struct MixedChunkState {
    /// `[batch, 1, panels, s * PANEL]`
    sum: Tensor<4>,
    /// Quadratic and linear keys, `[batch, chunk, s]`.
    keys: [Tensor<3>; 2],
    /// `[batch, 1, panels, chunk * PANEL]`
    values: Tensor<4>,
    e: usize,
    len: usize,
}

/// A state, to be read and advanced.
pub(super) struct Open<'a> {
    pub sum: ViewMut<'a, f32, 4>,
    pub keys: [View<'a, f32, 3>; 2],
    pub values: ViewMut<'a, f32, 4>,
    /// Tokens of the open chunk.
    pub fill: usize,
    /// Finished chunks.
    pub chunks: usize,
}

impl MixedChunkState {
    /// A state that has seen nothing, for chunks of `chunk` rows, queries and keys of width `s` and values of width
    /// `e`.
    ///
    /// # Errors
    /// [`Error::Value`] if a size other than `batch` is 0, [`Error::Layout`] and [`Error::Alloc`] if the memory
    /// cannot be had.
    pub fn new(batch: usize, chunk: usize, s: usize, e: usize) -> Result<Self> {
        for (arg, n) in [("chunk", chunk), ("s", s), ("e", e)] {
            if n == 0 {
                return Err(Error::value("mixed chunk state", arg, "at least 1", n));
            }
        }
        let panels = e.div_ceil(PANEL);
        let keys = || Tensor::zeros([batch, chunk, s]);
        let wide = |rows: usize| Tensor::zeros([batch, 1, panels, rows.saturating_mul(PANEL)]);
        Ok(Self { sum: wide(s)?, keys: [keys()?, keys()?], values: wide(chunk)?, e, len: 0 })
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.sum.as_mut_slice().fill(0.0);
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

    /// Tokens of the chunk that is being filled.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.len % self.shape()[1]
    }

    /// Memory of the contents, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.parts().map(size_of_val).iter().sum()
    }

    /// `[batch, chunk, s, e]`
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        let [batch, chunk, s] = self.keys[0].shape();
        [batch, chunk, s, self.e]
    }

    /// The sum of `lin_k^T v` over finished chunks, without any factor, as `[batch, s, e]`.
    ///
    /// # Errors
    /// [`Error::Alloc`] if the memory cannot be had.
    pub fn sum(&self) -> Result<Tensor<3>> {
        let [batch, _, s, e] = self.shape();
        let mut out = Tensor::zeros([batch, s, e])?;
        let panels = self.sum.as_slice().chunks_exact(right_len(s, e));
        for (sum, panels) in out.as_mut_slice().chunks_exact_mut(s * e).zip(panels) {
            for (i, row) in sum.chunks_exact_mut(e).enumerate() {
                for (p, part) in row.chunks_mut(PANEL).enumerate() {
                    part.copy_from_slice(&panels[(p * s + i) * PANEL..][..part.len()]);
                }
            }
        }
        Ok(out)
    }

    fn parts(&self) -> [&[f32]; 4] {
        let [quad, lin] = &self.keys;
        [self.sum.as_slice(), quad.as_slice(), lin.as_slice(), self.values.as_slice()]
    }

    pub(super) fn expect(&self, op: &'static str, shape: [usize; 4]) -> Result<()> {
        expect_shape(op, "state", "[batch, chunk, s, e]", shape, self.shape())
    }

    /// Refuses `n` more tokens if their count would overflow.
    pub(crate) fn room(&self, op: &'static str, n: usize) -> Result<()> {
        match self.len.checked_add(n) {
            Some(_) => Ok(()),
            None => Err(Error::value(op, "state", "a token count within usize", self.len)),
        }
    }

    pub(super) fn advance(&mut self, n: usize) {
        self.len += n;
    }

    /// Quadratic and linear keys of the open chunk, to be written.
    pub(super) fn keys_mut(&mut self) -> [ViewMut<'_, f32, 3>; 2] {
        self.keys.each_mut().map(Tensor::view_mut)
    }

    pub(super) fn open(&mut self) -> Open<'_> {
        let chunk = self.keys[0].shape()[1];
        Open {
            sum: self.sum.view_mut(),
            keys: self.keys.each_ref().map(Tensor::view),
            values: self.values.view_mut(),
            fill: self.len % chunk,
            chunks: self.len / chunk,
        }
    }
}

impl StreamState for MixedChunkState {
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
        self.room("mixed chunk state", tokens)
    }
    fn blank(&self, len: usize) -> Result<Self> {
        let [batch, chunk, s, e] = self.shape();
        Ok(Self { len, ..Self::new(batch, chunk, s, e)? })
    }
    fn contents(&self, see: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        self.parts().into_iter().try_for_each(see)
    }
    fn contents_mut(&mut self, fill: &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
        fill(self.sum.as_mut_slice())?;
        self.keys.iter_mut().try_for_each(|k| fill(k.as_mut_slice()))?;
        fill(self.values.as_mut_slice())
    }
}
