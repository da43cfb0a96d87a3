//! A block of TransNormerLLM.
use super::{GatedLinearAttention, Sglu};
use crate::attention::State;
use crate::error::Result;
use crate::runtime::Runtime;
use crate::tensor::ViewMut;
/// `x += gla(norm(x)); x += sglu(norm(x))`
#[derive(Clone, Debug)]
pub struct TransNormerBlock {}
impl TransNormerBlock {
    /// Both with the same width.
    pub fn new(
        _token_mixer: GatedLinearAttention,
        _channel_mixer: Sglu,
        _norm_eps: f32,
    ) -> Result<Self> {
        todo!()
    }
    /// A fresh state.
    pub fn new_state(&self, _batch: usize) -> Result<State> {
        todo!()
    }
    /// In place on the residual stream `x` `[batch, len, embed]`.
    pub fn forward(
        &self,
        _rt: &Runtime,
        _x: ViewMut<'_, f32, 3>,
        _state: &mut State,
    ) -> Result<()> {
        todo!()
    }
}
