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
use crate::kernels::elementwise::{Add, OffsetScale, OffsetScaleSlope, OffsetScaleSums};
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

/// Several heads of every row: `out = [x * gamma_0 + beta_0 | x * gamma_1 + beta_1 | ..]`; `x`: `[rows, width]`, `gamma` and
/// `beta`: `[heads, width]`, `out`: `[rows, heads * width]`. Two flops per element of `out`.
///
/// ```
/// use linattn::{Runtime, layers::pointwise, tensor::{View, ViewMut}};
/// let mut heads = [0.0; 4];
/// let (x, out) = (View::new(&[1.0, 2.0], [1, 2])?, ViewMut::new(&mut heads, [1, 4])?);
/// let (gamma, beta) = ([1.0, 1.0, 10.0, 10.0], [0.0, 0.0, 0.0, 5.0]);
/// pointwise::offset_scale(&Runtime::new()?, x, [&gamma, &beta], out)?;
/// assert_eq!(heads, [1.0, 2.0, 10.0, 25.0]);
/// # Ok::<(), linattn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if the shapes do not fit; `out` is untouched then.
pub fn offset_scale(
    rt: &Runtime,
    x: View<'_, f32, 2>,
    [gamma, beta]: [&[f32]; 2],
    out: ViewMut<'_, f32, 2>,
) -> Result<()> {
    fit(x, out.shape(), [("gamma", gamma.len()), ("beta", beta.len())])?;
    rows(rt, OffsetScale { gamma, beta }, [x], out);
    Ok(())
}

/// The gradients of a sum `<dout, offset_scale(x)>` by `x`, `gamma` and `beta`; they are overwritten. `dout` has the shape of
/// the result. Six flops per element of it.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if the shapes do not fit; nothing is written then.
pub fn offset_scale_backward(
    rt: &Runtime,
    x: View<'_, f32, 2>,
    gamma: &[f32],
    dout: View<'_, f32, 2>,
    dx: ViewMut<'_, f32, 2>,
    mut grads: [ViewMut<'_, f32, 1>; 2],
) -> Result<()> {
    like(x, [("dx", dx.shape())])?;
    let [[n], [m]] = grads.each_ref().map(ViewMut::shape);
    fit(x, dout.shape(), [("gamma", gamma.len()), ("dgamma", n), ("dbeta", m)])?;
    rows(rt, OffsetScaleSlope { gamma }, [dout], dx);
    let grads = grads.each_mut().map(|x| x.row_mut([0]));
    rt.run(OffsetScaleSums { x, dout, grads });
    Ok(())
}

/// Checks that `shape` is that of heads of `x`, with as many parameters.
fn fit<const N: usize>(
    x: View<'_, f32, 2>,
    shape: [usize; 2],
    parameters: [(&'static str, usize); N],
) -> Result<()> {
    let [rows, width] = x.shape();
    let heads = shape[1] / width.max(1);
    let expected = [rows, heads * width];
    expect_shape("offset and scale", "heads", "[rows, heads * width]", expected, shape)?;
    parameters.into_iter().try_for_each(|(arg, got)| {
        expect_shape("offset and scale", arg, "[heads * width]", [shape[1]], [got])
    })
}

fn like<const N: usize>(
    x: View<'_, f32, 2>,
    others: [(&'static str, [usize; 2]); N],
) -> Result<()> {
    others
        .into_iter()
        .try_for_each(|(arg, got)| expect_shape(OP, arg, "[rows, width]", x.shape(), got))
}
