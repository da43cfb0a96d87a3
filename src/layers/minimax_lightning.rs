//! The lightning attention layer of MiniMax-01.
use super::Linear;
use crate::attention::State;
use crate::error::Result;
use crate::runtime::Runtime;
use crate::tensor::{View, ViewMut};
/// Sizes of a [`MiniMaxLightning`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MiniMaxConfig {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Inside the root of the output norm.
    pub norm_eps: f32,
}
/// The lightning attention layer of MiniMax-01.
#[derive(Clone, Debug)]
pub struct MiniMaxLightning {}
impl MiniMaxLightning {
    /// `qkv_proj` `[3 H hd, C]` (rows interleaved per head), `output_gate` `[H hd, C]`, `norm_weight` `[H hd]`,
    /// `out_proj` `[C, H hd]`.
    pub fn new(
        _config: MiniMaxConfig,
        _qkv_proj: Linear,
        _output_gate: Linear,
        _norm_weight: &[f32],
        _out_proj: Linear,
        _slopes: &[f64],
    ) -> Result<Self> {
        todo!()
    }
    /// A fresh state: `[batch, heads, hd, hd]`.
    pub fn new_state(&self, _batch: usize) -> Result<State> {
        todo!()
    }
    /// `x`, `out`: `[batch, len, C]` (already normed).
    pub fn forward(
        &self,
        _rt: &Runtime,
        _x: View<'_, f32, 3>,
        _out: ViewMut<'_, f32, 3>,
        _state: &mut State,
    ) -> Result<()> {
        todo!()
    }
}
