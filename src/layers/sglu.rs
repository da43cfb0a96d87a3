//! Simple gated linear unit.
use super::{Activation, Linear};
use crate::error::Result;
use crate::runtime::Runtime;
use crate::tensor::{View, ViewMut};
/// Sizes of an [`Sglu`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgluConfig {
    /// Width of input and output.
    pub embed_dim: usize,
    /// Width inside.
    pub glu_dim: usize,
    /// On the first factor.
    pub act: Activation,
}
/// `l3(act(l1 x) o l2 x)`
#[derive(Clone, Debug)]
pub struct Sglu {}
impl Sglu {
    /// `l1`, `l2`: `[glu, embed]`, `l3`: `[embed, glu]`.
    pub fn new(_config: SgluConfig, _l1: Linear, _l2: Linear, _l3: Linear) -> Result<Self> {
        todo!()
    }
    /// `x`, `out`: `[rows, embed]`.
    pub fn forward(
        &self,
        _rt: &Runtime,
        _x: View<'_, f32, 2>,
        _out: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        todo!()
    }
}
