//! What linear attention remembers.

use crate::attention::{State, StreamState};
use crate::error::{Result, expect_shape};
use crate::tensor::{Tensor, View, ViewMut};

/// The memory of [`LinearAttention`](super::LinearAttention): `S`, the sum of `phi(k) v^T`, and `z`, the sum of
/// `phi(k)`, per batch row and head, in `f32`. Its size does not depend on the number of tokens seen.
#[derive(Clone, Debug)]
pub struct LinearState {
    kv: State,
    z: Tensor<4>,
}

impl LinearState {
    /// A state that has seen nothing. An [`Error`](crate::Error) if the memory cannot be had.
    pub fn new(batch: usize, heads: usize, dk: usize, dv: usize) -> Result<Self> {
        Ok(Self { kv: State::new(batch, heads, dk, dv)?, z: Tensor::zeros([batch, heads, 1, dk])? })
    }

    /// A state with given contents after `len` tokens: `kv` row-major `[batch, heads, dk, dv]`, `z`
    /// `[batch, heads, dk]`.
    pub fn from_slices(kv: &[f32], z: &[f32], shape: [usize; 4], len: usize) -> Result<Self> {
        let [batch, heads, dk, _] = shape;
        Ok(Self {
            kv: State::from_slice(kv, shape, len)?,
            z: Tensor::from_slice(z, [batch, heads, 1, dk])?,
        })
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.kv.reset();
        self.z.as_mut_slice().fill(0.0);
    }

    /// Tokens seen.
    #[must_use]
    pub fn len(&self) -> usize {
        self.kv.len()
    }

    /// Whether no token was seen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.kv.is_empty()
    }

    /// Memory of the contents, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.kv.bytes() + size_of_val(self.z.as_slice())
    }

    /// `[batch, heads, dk, dv]`
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        self.kv.shape()
    }

    /// `S`, `[batch, heads, dk, dv]`.
    #[must_use]
    pub fn kv(&self) -> View<'_, f32, 4> {
        self.kv.view()
    }

    /// `z`, row-major `[batch, heads, dk]`.
    #[must_use]
    pub fn z(&self) -> &[f32] {
        self.z.as_slice()
    }

    pub(in crate::attention) fn expect(&self, op: &'static str, shape: [usize; 4]) -> Result<()> {
        expect_shape(op, "state", "[batch, heads, dk, dv]", shape, self.shape())
    }

    pub(in crate::attention) fn room(&self, op: &'static str, n: usize) -> Result<()> {
        self.kv.room(op, n)
    }

    pub(in crate::attention) fn advance(&mut self, n: usize) {
        self.kv.advance(n);
    }

    /// As [`reset`](Self::reset), with a normaliser that does not begin at zero.
    pub(in crate::attention) fn reset_to(&mut self, z: f32) {
        self.kv.reset();
        self.z.as_mut_slice().fill(z);
    }

    /// `S`, and `z` as `[batch, heads, 1, dk]`.
    pub(in crate::attention) fn views_mut(&mut self) -> (ViewMut<'_, f32, 4>, ViewMut<'_, f32, 4>) {
        (self.kv.view_mut(), self.z.view_mut())
    }
}

impl StreamState for LinearState {
    fn len(&self) -> usize {
        self.kv.len()
    }
    fn bytes(&self) -> usize {
        self.bytes()
    }
    fn reset(&mut self) {
        self.reset();
    }
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.kv.reserve(tokens)
    }
    fn blank(&self, len: usize) -> Result<Self> {
        Ok(Self { kv: self.kv.blank(len)?, z: Tensor::zeros(self.z.shape())? })
    }
    fn contents(&self, see: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        self.kv.contents(see)?;
        see(self.z.as_slice())
    }
    fn contents_mut(&mut self, fill: &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
        self.kv.contents_mut(fill)?;
        fill(self.z.as_mut_slice())
    }
}
