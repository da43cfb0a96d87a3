//! Positions.

use super::Result;
use super::call::{Arg, Op, apply1, apply2, floats};
use crate::error::{Error, Result as Outcome};
use crate::layers::{Lrpe, Positions, Rope};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};
use candle_core::Tensor;
use std::sync::Arc;

/// LRPE, as [`Lrpe`]: `x`: `[batch, len, heads, dim]` to `[batch, len, heads, 2 dim]`; token `t` is at position
/// `offset + t`. `theta` holds `heads * dim` angles in any shape. Differentiable in both.
///
/// # Errors
/// For shapes that do not fit, angles that are not finite, and element types that differ.
pub fn lrpe(rt: &Arc<Runtime>, x: &Tensor, theta: &Tensor, offset: usize) -> Result<Tensor> {
    apply2(rt, Angles { start: offset }, [x, &theta.flatten_all()?])
}

/// Rotary positions, as [`Rope`]; `x`: `[batch, len, heads, dim]`, whose first token is at position `start`.
///
/// # Errors
/// For heads that are narrower than what turns.
pub fn rope(rt: &Arc<Runtime>, x: &Tensor, rope: &Rope, start: usize) -> Result<Tensor> {
    apply1(rt, Turns { rope: rope.clone(), start }, x)
}

/// Learned angles, for tokens from position `start` on.
struct Angles {
    start: usize,
}

impl Angles {
    fn wide([batch, len, heads, dim]: [usize; 4]) -> Outcome<[usize; 4]> {
        let wide = dim.checked_mul(2);
        let wide =
            wide.ok_or_else(|| Error::value(Self::NAME, "x", "an addressable width", dim))?;
        Ok([batch, len, heads, wide])
    }

    fn lrpe(theta: &Arg<'_, f32>, [_, _, heads, dim]: [usize; 4]) -> Outcome<Lrpe> {
        let all = theta.view::<1>(Self::NAME, "theta")?;
        if heads.checked_mul(dim) != Some(all.shape()[0]) {
            let expected = alloc::format!("{heads} heads of {dim}");
            return Err(Error::shape(Self::NAME, "theta", expected, all.shape()));
        }
        Lrpe::new(View::new(all.row([0]), [heads, dim])?)
    }
}

impl Op<2> for Angles {
    const NAME: &'static str = "lrpe";

    fn shape(&self, [x, _]: [&[usize]; 2]) -> Outcome<Vec<usize>> {
        Ok(Self::wide(four(Self::NAME, x)?)?.to_vec())
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [x, theta]: [Arg<'_, E>; 2],
        out: &mut [E],
    ) -> Outcome<()> {
        let (x, theta) = (x.float(), theta.float());
        let x = x.view(Self::NAME, "x")?;
        let (lrpe, wide) = (Self::lrpe(&theta, x.shape())?, Self::wide(x.shape())?);
        floats([out], |[out]| lrpe.forward(rt, x, self.start, ViewMut::new(out, wide)?))
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [x, theta]: [Arg<'_, E>; 2],
        dout: Arg<'_, E>,
        [dx, dtheta]: [&mut [E]; 2],
    ) -> Outcome<()> {
        let (x, theta, dout) = (x.float(), theta.float(), dout.float());
        let (x, dout) = (x.view(Self::NAME, "x")?, dout.view(Self::NAME, "dout")?);
        let (lrpe, start) = (Self::lrpe(&theta, x.shape())?, self.start);
        let [.., heads, dim] = x.shape();
        floats([dx, dtheta], |[dx, dtheta]| {
            lrpe.backward_angles(rt, x, start, dout, ViewMut::new(dtheta, [heads, dim])?)?;
            lrpe.backward(rt, start, dout, ViewMut::new(dx, x.shape())?)
        })
    }
}

/// Rotary positions, for tokens from position `start` on.
struct Turns {
    rope: Rope,
    start: usize,
}

impl Op<1> for Turns {
    const NAME: &'static str = "rope";

    fn shape(&self, [x]: [&[usize]; 1]) -> Outcome<Vec<usize>> {
        Ok(four(Self::NAME, x)?.to_vec())
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [x]: [Arg<'_, E>; 1],
        out: &mut [E],
    ) -> Outcome<()> {
        let (x, start) = (x.float(), Positions::From(self.start));
        let x = x.view(Self::NAME, "x")?;
        floats([out], |[out]| self.rope.forward(rt, x, start, ViewMut::new(out, x.shape())?))
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [x]: [Arg<'_, E>; 1],
        dout: Arg<'_, E>,
        [dx]: [&mut [E]; 1],
    ) -> Outcome<()> {
        let (shape, dout) = (x.view::<4>(Self::NAME, "x")?.shape(), dout.float());
        let (dout, start) = (dout.view(Self::NAME, "dout")?, Positions::From(self.start));
        floats([dx], |[dx]| self.rope.backward(rt, start, dout, ViewMut::new(dx, shape)?))
    }
}

fn four(op: &'static str, x: &[usize]) -> Outcome<[usize; 4]> {
    x.try_into().map_err(|_| Error::shape(op, "x", "[batch, len, heads, dim]", x))
}
