//! What a causal FLASH layer remembers.

use crate::attention::StreamState;
use crate::attention::mixed_chunk::MixedChunkState;
use crate::error::Result;
use crate::tensor::Tensor;

/// The memory of a causal [`Flash`](super::Flash) layer: that of its attention, and what token shift takes from the
/// last token. Its size does not depend on the number of tokens seen.
#[derive(Clone, Debug)]
pub struct FlashState {
    pub(super) mixed: MixedChunkState,
    /// `[batch, shifted channels]`
    pub(super) last: Tensor<2>,
}

impl FlashState {
    pub(super) fn new(batch: usize, [chunk, s, e]: [usize; 3], shifted: usize) -> Result<Self> {
        let last = Tensor::zeros([batch, shifted])?;
        Ok(Self { mixed: MixedChunkState::new(batch, chunk, s, e)?, last })
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.mixed.reset();
        self.last.as_mut_slice().fill(0.0);
    }

    /// Tokens seen: the position of the next one.
    #[must_use]
    pub fn len(&self) -> usize {
        self.mixed.len()
    }

    /// Whether no token was seen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mixed.is_empty()
    }

    /// Memory of the contents, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.mixed.bytes() + size_of_val(self.last.as_slice())
    }

    /// That of the attention.
    #[must_use]
    pub fn attention(&self) -> &MixedChunkState {
        &self.mixed
    }
}

impl StreamState for FlashState {
    fn len(&self) -> usize {
        self.len()
    }
    fn bytes(&self) -> usize {
        self.bytes()
    }
    fn reset(&mut self) {
        self.reset();
    }
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.mixed.reserve(tokens)
    }
    fn blank(&self, len: usize) -> Result<Self> {
        Ok(Self { mixed: self.mixed.blank(len)?, last: Tensor::zeros(self.last.shape())? })
    }
    fn contents(&self, see: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        self.mixed.contents(see)?;
        see(self.last.as_slice())
    }
    fn contents_mut(&mut self, fill: &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
        self.mixed.contents_mut(fill)?;
        fill(self.last.as_mut_slice())
    }
}
