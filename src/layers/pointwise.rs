//! Activations and gates of rows, forward and backward, without a layer around them: for training.
//!
//! ```text
//! activate: y = act(x)               dx = act'(x) dy
//! gate:     y = act(gate) * x        dgate = act'(gate) x dy      dx = act(gate) dy
//! ```
//!
//! All matrices are `[rows, width]` with any distance between rows. About 20 flops per element; nothing of the forward pass
//! is needed for the backward one. Results do not depend on the number of threads.
//!
//! ```
//! use linattn::layers::{Activation, pointwise};
//! use linattn::{Runtime, tensor::{View, ViewMut}};
//! let (rt, act) = (Runtime::new()?, Activation::Relu);
//! let (gate, x) = ([2.0, -1.0], [3.0, 5.0]);
//! let (gate, x) = (View::new(&gate, [1, 2])?, View::new(&x, [1, 2])?);
//! let (mut y, mut dgate, mut dx) = ([0.0; 2], [0.0; 2], [0.0; 2]);
//! pointwise::gate(&rt, act, gate, x, ViewMut::new(&mut y, [1, 2])?)?;
//! let grads = [ViewMut::new(&mut dgate, [1, 2])?, ViewMut::new(&mut dx, [1, 2])?];
//! pointwise::gate_backward(&rt, act, gate, x, View::new(&[1.0; 2], [1, 2])?, grads)?;
//! assert_eq!((y, dgate, dx), ([6.0, 0.0], [3.0, 0.0], [2.0, 0.0]));
//! # Ok::<(), linattn::Error>(())
//! ```

use super::Activation;
use super::rows::rows;
use crate::error::{Result, expect_shape};
use crate::kernels::elementwise::Add;
use crate::kernels::slope::{Activated, GateSlope, Gated, Slope};
use crate::runtime::Runtime;
use crate::tensor::{View, ViewMut};

const OP: &str = "activation";

/// `out = act(x)`
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if the shapes differ; `out` is untouched then.
pub fn activate(
    rt: &Runtime,
    act: Activation,
    x: View<'_, f32, 2>,
    out: ViewMut<'_, f32, 2>,
) -> Result<()> {
    like(x, [("out", out.shape())])?;
    rows(rt, Activated(act), [x], out);
    Ok(())
}

/// `dx = act'(x) * dout`; the largest element that [`Activation::Exp`] subtracts counts as a constant.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if the shapes differ; `dx` is untouched then.
pub fn activate_backward(
    rt: &Runtime,
    act: Activation,
    x: View<'_, f32, 2>,
    dout: View<'_, f32, 2>,
    dx: ViewMut<'_, f32, 2>,
) -> Result<()> {
    like(x, [("dout", dout.shape()), ("dx", dx.shape())])?;
    rows(rt, Slope(act), [x, dout], dx);
    Ok(())
}

/// `out = act(gate) * x`
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if the shapes differ; `out` is untouched then.
pub fn gate(
    rt: &Runtime,
    act: Activation,
    gate: View<'_, f32, 2>,
    x: View<'_, f32, 2>,
    out: ViewMut<'_, f32, 2>,
) -> Result<()> {
    like(gate, [("x", x.shape()), ("out", out.shape())])?;
    rows(rt, Gated(act), [gate, x], out);
    Ok(())
}

/// The gradients of a sum `<dout, act(gate) * x>` by `gate` and `x`; they are overwritten.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if the shapes differ; nothing is written then.
pub fn gate_backward(
    rt: &Runtime,
    act: Activation,
    gate: View<'_, f32, 2>,
    x: View<'_, f32, 2>,
    dout: View<'_, f32, 2>,
    [dgate, dx]: [ViewMut<'_, f32, 2>; 2],
) -> Result<()> {
    let shapes = [("x", x.shape()), ("dout", dout.shape())];
    like(gate, shapes)?;
    like(gate, [("dgate", dgate.shape()), ("dx", dx.shape())])?;
    rows(rt, GateSlope(act), [gate, x, dout], dgate);
    rows(rt, Gated(act), [gate, dout], dx);
    Ok(())
}

/// `out += x`
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if the shapes differ; `out` is untouched then.
pub fn add(rt: &Runtime, x: View<'_, f32, 2>, out: ViewMut<'_, f32, 2>) -> Result<()> {
    like(x, [("out", out.shape())])?;
    rows(rt, Add, [x], out);
    Ok(())
}

fn like<const N: usize>(
    x: View<'_, f32, 2>,
    others: [(&'static str, [usize; 2]); N],
) -> Result<()> {
    others
        .into_iter()
        .try_for_each(|(arg, got)| expect_shape(OP, arg, "[rows, width]", x.shape(), got))
}
