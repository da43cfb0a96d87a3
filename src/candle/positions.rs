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
    apply1(rt, Turned { lrpe: lrpe.clone(), offset }, x)
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
    apply1(rt, Rotary { rope: rope.clone(), start }, x)
}

struct Turned {
    lrpe: Lrpe,
    offset: usize,
}

/// `[batch, len, heads, factor dim]`
fn shape(op: &'static str, x: &[usize], factor: usize) -> Outcome<Vec<usize>> {
    match x {
        &[batch, len, heads, dim] => Ok(vec![batch, len, heads, factor * dim]),
        _ => Err(Error::shape(op, "x", "[batch, len, heads, dim]", x)),
    }
}

impl Op<1> for Turned {
    const NAME: &'static str = "lrpe";

    fn shape(&self, [x]: [&[usize]; 1]) -> Outcome<Vec<usize>> {
        shape(<Self as Op<1>>::NAME, x, 2)
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [x]: [Arg<'_, E>; 1],
        out: &mut [E],
    ) -> Outcome<()> {
        let x = x.float();
        let x = x.view::<4>(Self::NAME, "x")?;
        let [batch, len, heads, dim] = x.shape();
        floats([out], |[out]| {
            let out = ViewMut::new(out, [batch, len, heads, 2 * dim])?;
            self.lrpe.forward(rt, x, self.offset, out)
        })
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [x]: [Arg<'_, E>; 1],
        dout: Arg<'_, E>,
        [dx]: [&mut [E]; 1],
    ) -> Outcome<()> {
        let (shape, dout) = (x.view::<4>(Self::NAME, "x")?.shape(), dout.float());
        let dout = dout.view(Self::NAME, "dout")?;
        floats([dx], |[dx]| self.lrpe.backward(rt, self.offset, dout, ViewMut::new(dx, shape)?))
    }
}

struct Rotary {
    rope: Rope,
    start: usize,
}

impl Op<1> for Rotary {
    const NAME: &'static str = "rope";

    fn shape(&self, [x]: [&[usize]; 1]) -> Outcome<Vec<usize>> {
        shape(<Self as Op<1>>::NAME, x, 1)
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [x]: [Arg<'_, E>; 1],
        out: &mut [E],
    ) -> Outcome<()> {
        let x = x.float();
        let x = x.view::<4>(Self::NAME, "x")?;
        let at = Positions::From(self.start);
        floats([out], |[out]| self.rope.forward(rt, x, at, ViewMut::new(out, x.shape())?))
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [x]: [Arg<'_, E>; 1],
        dout: Arg<'_, E>,
        [dx]: [&mut [E]; 1],
    ) -> Outcome<()> {
        let (shape, dout) = (x.view::<4>(Self::NAME, "x")?.shape(), dout.float());
        let dout = dout.view(Self::NAME, "dout")?;
        let at = Positions::From(self.start);
        floats([dx], |[dx]| self.rope.backward(rt, at, dout, ViewMut::new(dx, shape)?))
    }
}
