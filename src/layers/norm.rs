//! Norms over the last dimension.
use crate::error::Result;
use crate::runtime::Runtime;
use crate::tensor::{View, ViewMut};
/// A norm over the last dimension.
#[derive(Clone, Debug)]
pub struct Norm {}
impl Norm {
    /// `x / sqrt(mean(x^2) + eps)`, any width (SRMSNorm).
    pub fn simple_rms(_eps: f32) -> Result<Self> {
        todo!()
    }
    /// `weight * x / sqrt(mean(x^2) + eps)`
    pub fn rms(_weight: &[f32], _eps: f32) -> Result<Self> {
        todo!()
    }
    /// `weight * (x - mean) / sqrt(var + eps) + bias`
    pub fn layer(_weight: Option<&[f32]>, _bias: Option<&[f32]>, _eps: f32) -> Result<Self> {
        todo!()
    }
    /// `x`, `out`: `[rows, width]`.
    pub fn forward(
        &self,
        _rt: &Runtime,
        _x: View<'_, f32, 2>,
        _out: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        todo!()
    }
}
