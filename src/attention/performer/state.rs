//! What Performer remembers.

use crate::attention::StreamState;
use crate::attention::linear::LinearState;
use crate::error::Result;
use crate::tensor::View;

/// The memory of causal [`PerformerAttention`](super::PerformerAttention): the sums `S = sum phi(k) v^T` and
/// `z = denom_eps + sum phi(k)` per batch row and head. Its size does not depend on the number of tokens seen.
#[derive(Clone, Debug)]
pub struct PerformerState {
    pub(super) sums: LinearState,
    start: f32,
}

impl PerformerState {
    /// A state that has seen nothing, with `z` all `start`.
    pub(super) fn new([batch, heads, m, dv]: [usize; 4], start: f32) -> Result<Self> {
        let mut sums = LinearState::new(batch, heads, m, dv)?;
        sums.reset_to(start);
        Ok(Self { sums, start })
    }

    /// `[batch, heads, features, dv]`
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        self.sums.shape()
    }

    /// `S`, `[batch, heads, features, dv]`.
    #[must_use]
    pub fn kv(&self) -> View<'_, f32, 4> {
        self.sums.kv()
    }

    /// `z`, row-major `[batch, heads, features]`.
    #[must_use]
    pub fn z(&self) -> &[f32] {
        self.sums.z()
    }
}

impl StreamState for PerformerState {
    fn len(&self) -> usize {
        self.sums.len()
    }
    fn bytes(&self) -> usize {
        self.sums.bytes()
    }
    fn reset(&mut self) {
        self.sums.reset_to(self.start);
    }
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.sums.reserve(tokens)
    }
    fn blank(&self, len: usize) -> Result<Self> {
        Ok(Self { sums: self.sums.blank(len)?, start: self.start })
    }
    fn contents(&self, see: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        self.sums.contents(see)
    }
    fn contents_mut(&mut self, fill: &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
        self.sums.contents_mut(fill)
    }
}
