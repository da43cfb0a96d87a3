//! Positions as rotations.
use crate::error::Result;
use crate::runtime::Runtime;
use crate::tensor::{View, ViewMut};
/// LRPE: `x -> [x cos(theta p) | x sin(theta p)]`.
#[derive(Clone, Debug)]
pub struct Lrpe {}
impl Lrpe {
    /// `theta`: `[heads, dim]`.
    pub fn new(_theta: View<'_, f32, 2>) -> Result<Self> {
        todo!()
    }
    /// `x` `[batch, len, heads, dim]`, `out` `[batch, len, heads, 2 dim]`; token `t` has position `offset + t`.
    pub fn forward(
        &self,
        _rt: &Runtime,
        _x: View<'_, f32, 4>,
        _offset: usize,
        _out: ViewMut<'_, f32, 4>,
    ) -> Result<()> {
        todo!()
    }
}
/// Which elements make a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// `(2 i, 2 i + 1)`
    Interleaved,
    /// `(i, i + rot_dim / 2)`
    Half,
}
/// Positions of the tokens of a sequence.
#[derive(Clone, Copy, Debug)]
pub enum Positions<'a> {
    /// `start, start + 1, ..`
    From(usize),
    /// One per token.
    At(&'a [usize]),
}
/// Rotary position embedding of the first `rot_dim` elements of every head.
#[derive(Clone, Debug)]
pub struct Rope {}
impl Rope {
    /// Angle of pair `i` at position `p`: `p base^(-2 i / rot_dim)`.
    pub fn new(_style: RopeStyle, _rot_dim: usize, _base: f64) -> Result<Self> {
        todo!()
    }
    /// `x`, `out`: `[batch, len, heads, dim]`.
    pub fn forward(
        &self,
        _rt: &Runtime,
        _x: View<'_, f32, 4>,
        _positions: Positions<'_>,
        _out: ViewMut<'_, f32, 4>,
    ) -> Result<()> {
        todo!()
    }
}
