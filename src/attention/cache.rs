//! What exact attention remembers: all of it.

use super::StreamState;
use crate::error::{Error, Result};
use crate::tensor::{Tensor, View, ViewMut};

/// Keys and values of all tokens seen, `[batch, heads, room, dim]` each, so that the rows of a head lie one after the
/// other. Room at least doubles when it runs out: reading a token at a time costs memory now and then, and none after
/// [`reserve`](StreamState::reserve).
///
/// ```
/// use linattn::attention::{KvCache, StreamState};
/// let mut cache = KvCache::new(1, 2, 8, 8)?;
/// cache.reserve(5)?;
/// let (mut k, mut v) = cache.append(5)?;
/// k.row_mut([0, 4, 1, 0]).fill(1.0);
/// v.row_mut([0, 4, 1, 0]).fill(2.0);
/// assert_eq!((cache.len(), cache.keys().shape()), (5, [1, 5, 2, 8]));
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct KvCache {
    k: Tensor<4>,
    v: Tensor<4>,
    len: usize,
}

/// The used part of a buffer `[batch, heads, room, dim]`, tokens before heads.
fn used(data: &Tensor<4>, from: usize, to: usize) -> View<'_, f32, 4> {
    let whole = data.view().permute([0, 2, 1, 3]).expect("a permutation");
    whole.slice(1, from, to)
}

/// As [`used`], to be written.
fn used_mut(data: &mut Tensor<4>, from: usize, to: usize) -> ViewMut<'_, f32, 4> {
    let whole = data.view_mut().permute([0, 2, 1, 3]).expect("a permutation");
    whole.slice(1, from, to)
}

/// The first `len` rows of every head, in a buffer with more room.
fn moved(old: &Tensor<4>, len: usize, room: usize) -> Result<Tensor<4>> {
    let [batch, heads, before, dim] = old.shape();
    let mut new = Tensor::zeros([batch, heads, room, dim])?;
    let to = new.as_mut_slice().chunks_exact_mut((room * dim).max(1));
    for (to, from) in to.zip(old.as_slice().chunks((before * dim).max(1))) {
        to[..len * dim].copy_from_slice(&from[..len * dim]);
    }
    Ok(new)
}

impl KvCache {
    /// A cache that has seen nothing; keys are `dk` wide, values `dv`.
    ///
    /// # Errors
    /// [`Error::Layout`] for sizes that no memory has.
    pub fn new(batch: usize, heads: usize, dk: usize, dv: usize) -> Result<Self> {
        let empty = |dim| Tensor::zeros([batch, heads, 0, dim]);
        Ok(Self { k: empty(dk)?, v: empty(dv)?, len: 0 })
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

    /// `[batch, heads, dk, dv]`
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        let ([batch, heads, _, dk], [.., dv]) = (self.k.shape(), self.v.shape());
        [batch, heads, dk, dv]
    }

    /// All keys, `[batch, len, heads, dk]`.
    #[must_use]
    pub fn keys(&self) -> View<'_, f32, 4> {
        used(&self.k, 0, self.len)
    }

    /// All values, `[batch, len, heads, dv]`.
    #[must_use]
    pub fn values(&self) -> View<'_, f32, 4> {
        used(&self.v, 0, self.len)
    }

    /// Counts `n` more tokens and hands out their keys and values to be written, `[batch, n, heads, dk or dv]`.
    ///
    /// # Errors
    /// As [`reserve`](StreamState::reserve); nothing has changed then.
    pub fn append(&mut self, n: usize) -> Result<(ViewMut<'_, f32, 4>, ViewMut<'_, f32, 4>)> {
        self.reserve(n)?;
        let from = self.len;
        self.len += n;
        Ok((used_mut(&mut self.k, from, self.len), used_mut(&mut self.v, from, self.len)))
    }

    /// All rooms, `[batch, heads, room, dim]`.
    pub(crate) fn rooms_mut(&mut self) -> (ViewMut<'_, f32, 4>, ViewMut<'_, f32, 4>) {
        (self.k.view_mut(), self.v.view_mut())
    }

    /// Counts as many tokens as have been written to their rooms.
    pub(crate) fn set_len(&mut self, len: usize) {
        debug_assert!(len <= self.k.shape()[2]);
        self.len = len;
    }

    /// Forgets the tokens behind the first `len`.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl StreamState for KvCache {
    fn len(&self) -> usize {
        self.len
    }
    fn bytes(&self) -> usize {
        let [batch, heads, dk, dv] = self.shape();
        batch * heads * self.len * (dk + dv) * size_of::<f32>()
    }
    fn bytes_at(&self, len: usize) -> usize {
        let [batch, heads, dk, dv] = self.shape();
        (batch * heads * (dk + dv) * size_of::<f32>()).saturating_mul(len)
    }
    fn reset(&mut self) {
        self.len = 0;
    }
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        let need = self.len.checked_add(tokens);
        let need = need.ok_or_else(|| {
            Error::value("cache", "state", "a token count within usize", self.len)
        })?;
        let room = self.k.shape()[2];
        if need > room {
            let new = need.max(room.saturating_mul(2)).saturating_add(15) / 16 * 16;
            let (k, v) = (moved(&self.k, self.len, new)?, moved(&self.v, self.len, new)?);
            (self.k, self.v) = (k, v);
        }
        Ok(())
    }
    fn blank(&self, len: usize) -> Result<Self> {
        let [batch, heads, dk, dv] = self.shape();
        let mut new = Self::new(batch, heads, dk, dv)?;
        new.append(len)?;
        Ok(new)
    }
    fn contents(&self, see: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        for x in [&self.k, &self.v] {
            let [.., room, dim] = x.shape();
            for head in x.as_slice().chunks((room * dim).max(1)) {
                see(&head[..self.len * dim])?;
            }
        }
        Ok(())
    }
    fn contents_mut(&mut self, fill: &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
        for x in [&mut self.k, &mut self.v] {
            let [.., room, dim] = x.shape();
            for head in x.as_mut_slice().chunks_mut((room * dim).max(1)) {
                fill(&mut head[..self.len * dim])?;
            }
        }
        Ok(())
    }
}
