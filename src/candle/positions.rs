//! Positions.

use super::call::{Arg, Op, apply1, floats};
use super::{Result, wrap};
use crate::error::{Error, Result as Outcome};
use crate::layers::{Lrpe, Positions, Rope};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};
use candle_core::Tensor;
use std::sync::Arc;

/// LRPE, as [`Lrpe`]: `x`: `[batch, len, heads, dim]` to `[batch, len, heads, 2 dim]`; token `t` is at position
/// `offset + t`. Angles have no gradient.
///
/// # Errors
/// For shapes that do not fit.
pub fn lrpe(rt: &Arc<Runtime>, x: &Tensor, lrpe: &Lrpe, offset: usize) -> Result<Tensor> {
    apply1(rt, From { position: lrpe.clone(), start: offset }, x)
}

/// The angles of [`lrpe`] from a tensor `[heads, 1, dim]`.
pub(super) fn angles(theta: &Tensor) -> Result<Lrpe> {
    let (heads, _, dim) = theta.dims3()?;
    let theta = theta.flatten_all()?.to_dtype(candle_core::DType::F32)?.to_vec1::<f32>()?;
    View::new(&theta, [heads, dim]).and_then(Lrpe::new).map_err(wrap)
}

/// Rotary positions, as [`Rope`]; `x`: `[batch, len, heads, dim]`, whose first token is at position `start`.
///
/// # Errors
/// For heads that are narrower than what turns.
pub fn rope(rt: &Arc<Runtime>, x: &Tensor, rope: &Rope, start: usize) -> Result<Tensor> {
    apply1(rt, From { position: rope.clone(), start }, x)
}

/// What differs between positions.
trait Position: Send + Sync + 'static {
    const NAME: &'static str;
    /// How much wider a head becomes.
    const FACTOR: usize;

    fn turn(&self, rt: &Runtime, x: Head<'_>, start: usize, out: HeadMut<'_>) -> Outcome<()>;

    fn back(&self, rt: &Runtime, start: usize, dout: Head<'_>, dx: HeadMut<'_>) -> Outcome<()>;
}

/// `[batch, len, heads, dim]`
type Head<'a> = View<'a, f32, 4>;
type HeadMut<'a> = ViewMut<'a, f32, 4>;

impl Position for Lrpe {
    const NAME: &'static str = "lrpe";
    const FACTOR: usize = 2;

    fn turn(&self, rt: &Runtime, x: Head<'_>, start: usize, out: HeadMut<'_>) -> Outcome<()> {
        self.forward(rt, x, start, out)
    }

    fn back(&self, rt: &Runtime, start: usize, dout: Head<'_>, dx: HeadMut<'_>) -> Outcome<()> {
        self.backward(rt, start, dout, dx)
    }
}

impl Position for Rope {
    const NAME: &'static str = "rope";
    const FACTOR: usize = 1;

    fn turn(&self, rt: &Runtime, x: Head<'_>, start: usize, out: HeadMut<'_>) -> Outcome<()> {
        self.forward(rt, x, Positions::From(start), out)
    }

    fn back(&self, rt: &Runtime, start: usize, dout: Head<'_>, dx: HeadMut<'_>) -> Outcome<()> {
        self.backward(rt, Positions::From(start), dout, dx)
    }
}

/// Tokens from position `start` on.
struct From<P> {
    position: P,
    start: usize,
}

impl<P: Position> From<P> {
    fn shape([batch, len, heads, dim]: [usize; 4]) -> Outcome<[usize; 4]> {
        let wide = dim.checked_mul(P::FACTOR);
        let wide = wide.ok_or_else(|| Error::value(P::NAME, "x", "an addressable width", dim))?;
        Ok([batch, len, heads, wide])
    }
}

impl<P: Position> Op<1> for From<P> {
    const NAME: &'static str = P::NAME;

    fn shape(&self, [x]: [&[usize]; 1]) -> Outcome<Vec<usize>> {
        let rank = |_| Error::shape(P::NAME, "x", "[batch, len, heads, dim]", x);
        Ok(Self::shape(x.try_into().map_err(rank)?)?.to_vec())
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [x]: [Arg<'_, E>; 1],
        out: &mut [E],
    ) -> Outcome<()> {
        let x = x.float();
        let x = x.view(P::NAME, "x")?;
        let shape = Self::shape(x.shape())?;
        floats([out], |[out]| self.position.turn(rt, x, self.start, ViewMut::new(out, shape)?))
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [x]: [Arg<'_, E>; 1],
        dout: Arg<'_, E>,
        [dx]: [&mut [E]; 1],
    ) -> Outcome<()> {
        let (shape, dout) = (x.view::<4>(P::NAME, "x")?.shape(), dout.float());
        let dout = dout.view(P::NAME, "dout")?;
        floats([dx], |[dx]| self.position.back(rt, self.start, dout, ViewMut::new(dx, shape)?))
    }
}
