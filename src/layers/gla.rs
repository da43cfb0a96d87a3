//! TransNormerLLM gated linear attention.
use super::{Activation, Linear, Lrpe};
use crate::attention::State;
use crate::error::Result;
use crate::runtime::Runtime;
use crate::tensor::{View, ViewMut};
/// Sizes of a [`GatedLinearAttention`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GlaConfig {
    /// Width of input and output.
    pub embed_dim: usize,
    /// Width of q, k, v and u together over all heads.
    pub hidden_dim: usize,
    /// Heads.
    pub heads: usize,
    /// On q and k.
    pub act: Activation,
    /// Inside the root of the output norm.
    pub norm_eps: f32,
}
/// The token mixer of TransNormerLLM.
#[derive(Clone, Debug)]
pub struct GatedLinearAttention {}
impl GatedLinearAttention {
    /// `qkvu_proj` `[4 hidden, embed]`, `out_proj` `[embed, hidden]`, `lrpe` with `[heads, hidden / heads]`.
    pub fn new(
        _config: GlaConfig,
        _qkvu_proj: Linear,
        _out_proj: Linear,
        _lrpe: Option<Lrpe>,
        _slopes: &[f64],
    ) -> Result<Self> {
        todo!()
    }
    /// A fresh state: `[batch, heads, hd or 2 hd, hd]`.
    pub fn new_state(&self, _batch: usize) -> Result<State> {
        todo!()
    }
    /// `x`, `out`: `[batch, len, embed]` (already normed). Positions of LRPE continue at `state.len()`.
    pub fn forward(
        &self,
        _rt: &Runtime,
        _x: View<'_, f32, 3>,
        _out: ViewMut<'_, f32, 3>,
        _state: &mut State,
    ) -> Result<()> {
        todo!()
    }
    /// As `forward`; where `mask` `[batch, len]` is 0 the token's v counts as 0.
    pub fn forward_masked(
        &self,
        _rt: &Runtime,
        _x: View<'_, f32, 3>,
        _mask: View<'_, f32, 2>,
        _out: ViewMut<'_, f32, 3>,
        _state: &mut State,
    ) -> Result<()> {
        todo!()
    }
}
