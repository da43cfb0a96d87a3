//! What Combiner remembers.

use crate::attention::{KvCache, StreamState};
use crate::error::{Error, Result, expect_shape};
use crate::tensor::{Tensor, ViewMut};

/// The memory of causal [`CombinerAttention`](super::CombinerAttention) with fixed segments: keys and values of the
/// summaries of finished segments, which grow by one per segment, and the tokens of the open one.
#[derive(Clone, Debug)]
pub struct CombinerState {
    summaries: KvCache,
    /// `[batch, heads, w, dk]` and `[batch, heads, w, dv]`
    k: Tensor<4>,
    v: Tensor<4>,
    /// Pooled queries and keys of the open segment, `[batch, heads, 2, dk]`.
    pools: Tensor<4>,
    len: usize,
}

/// A state for one call.
pub(super) struct Parts<'a> {
    pub keys: ViewMut<'a, f32, 4>,
    pub values: ViewMut<'a, f32, 4>,
    pub own_k: ViewMut<'a, f32, 4>,
    pub own_v: ViewMut<'a, f32, 4>,
    pub pools: ViewMut<'a, f32, 4>,
    pub seen: usize,
}

impl CombinerState {
    pub(super) fn new([batch, heads, dk, dv]: [usize; 4], segment: usize) -> Result<Self> {
        Ok(Self {
            summaries: KvCache::new(batch, heads, dk, dv)?,
            k: Tensor::zeros([batch, heads, segment, dk])?,
            v: Tensor::zeros([batch, heads, segment, dv])?,
            pools: Tensor::zeros([batch, heads, 2, dk])?,
            len: 0,
        })
    }

    fn segment(&self) -> usize {
        self.k.shape()[2]
    }

    /// `[batch, heads, dk, dv]`
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        self.summaries.shape()
    }

    pub(super) fn expect(&self, op: &'static str, shape: [usize; 4], segment: usize) -> Result<()> {
        let [batch, heads, dk, dv] = shape;
        let [b, h, k, v] = self.shape();
        let (expected, got) = ([batch, heads, segment, dk, dv], [b, h, self.segment(), k, v]);
        expect_shape(op, "state", "[batch, heads, segment, dk, dv]", expected, got)
    }

    pub(super) fn parts_mut(&mut self) -> Parts<'_> {
        let seen = self.len;
        let (keys, values) = self.summaries.rooms_mut();
        let (own_k, own_v) = (self.k.view_mut(), self.v.view_mut());
        Parts { keys, values, own_k, own_v, pools: self.pools.view_mut(), seen }
    }

    /// Counts `n` more tokens, whose summaries lie in their room.
    pub(super) fn advance(&mut self, n: usize) {
        self.len += n;
        self.summaries.set_len(self.len / self.segment());
    }

    /// Tokens of the open segment.
    fn open(&self) -> usize {
        self.len % self.segment()
    }
}

impl StreamState for CombinerState {
    fn len(&self) -> usize {
        self.len
    }
    fn bytes(&self) -> usize {
        let [batch, heads, dk, dv] = self.shape();
        let own = batch * heads * (self.open() * (dk + dv) + 2 * dk);
        self.summaries.bytes() + own * size_of::<f32>()
    }
    fn bytes_at(&self, len: usize) -> usize {
        self.summaries.bytes_at(len / self.segment())
    }
    fn reset(&mut self) {
        self.summaries.reset();
        self.len = 0;
    }
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        let total = self.len.checked_add(tokens).ok_or_else(|| {
            Error::value("cache", "state", "a token count within usize", self.len)
        })?;
        self.summaries.reserve(total / self.segment() - self.summaries.len())
    }
    fn blank(&self, len: usize) -> Result<Self> {
        let segment = self.segment();
        let mut new = Self::new(self.shape(), segment)?;
        new.summaries = self.summaries.blank(len / segment)?;
        new.len = len;
        Ok(new)
    }
    fn contents(&self, see: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        self.summaries.contents(see)?;
        let open = self.open();
        for x in [&self.k, &self.v] {
            let [.., w, width] = x.shape();
            for head in x.as_slice().chunks((w * width).max(1)) {
                see(&head[..open * width])?;
            }
        }
        see(self.pools.as_slice())
    }
    fn contents_mut(&mut self, fill: &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
        self.summaries.contents_mut(fill)?;
        let open = self.open();
        for x in [&mut self.k, &mut self.v] {
            let [.., w, width] = x.shape();
            for head in x.as_mut_slice().chunks_mut((w * width).max(1)) {
                fill(&mut head[..open * width])?;
            }
        }
        fill(self.pools.as_mut_slice())
    }
}
