//! Affine maps.
use crate::error::Result;
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};
/// `y = x W^T + bias`, the weight packed in panels once.
#[derive(Clone, Debug)]
pub struct Linear {}
impl Linear {
    /// From a row-major weight `[outputs, inputs]` (`f32`, `bf16` or `f16`) and a bias `[outputs]`.
    pub fn new<E: Element>(_weight: View<'_, E, 2>, _bias: Option<&[f32]>) -> Result<Self> {
        todo!()
    }
    /// `out = x W^T + bias`; `x` `[rows, inputs]`, `out` `[rows, outputs]`.
    pub fn forward(
        &self,
        _rt: &Runtime,
        _x: View<'_, f32, 2>,
        _out: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        todo!()
    }
    /// `out += x W^T + bias`
    pub fn accumulate(
        &self,
        _rt: &Runtime,
        _x: View<'_, f32, 2>,
        _out: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        todo!()
    }
}
