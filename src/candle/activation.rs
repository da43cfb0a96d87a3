//! Activations and gates.

use super::Result;
use super::call::{Arg, Op, apply1, apply2, floats};
use crate::error::Result as Outcome;
use crate::layers::{Activation, pointwise};
use crate::runtime::Runtime;
use crate::tensor::{Element, ViewMut};
use candle_core::Tensor;
use std::sync::Arc;

/// Applies an activation to rows, as [`pointwise::activate`]; `x`: `[.., width]`. Differentiable.
///
/// # Errors
/// For element types other than `f32`, `bf16` and `f16`.
pub fn activate(rt: &Arc<Runtime>, x: &Tensor, act: Activation) -> Result<Tensor> {
    match act {
        Activation::Identity => Ok(x.clone()),
        act => apply1(rt, Activate(act), x),
    }
}

/// `act(gate) * x`, as [`pointwise::gate`]; both `[.., width]`. Differentiable in both.
///
/// # Errors
/// For shapes or element types that differ.
pub fn gate(rt: &Arc<Runtime>, act: Activation, gate: &Tensor, x: &Tensor) -> Result<Tensor> {
    apply2(rt, Gate(act), [gate, x])
}

struct Activate(Activation);

impl Op<1> for Activate {
    const NAME: &'static str = "activation";

    fn shape(&self, [x]: [&[usize]; 1]) -> Outcome<Vec<usize>> {
        Ok(x.to_vec())
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [x]: [Arg<'_, E>; 1],
        out: &mut [E],
    ) -> Outcome<()> {
        let x = x.float();
        let x = x.rows()?;
        floats([out], |[out]| pointwise::activate(rt, self.0, x, ViewMut::new(out, x.shape())?))
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [x]: [Arg<'_, E>; 1],
        dout: Arg<'_, E>,
        [dx]: [&mut [E]; 1],
    ) -> Outcome<()> {
        let (x, dout) = (x.float(), dout.float());
        let (x, dout) = (x.rows()?, dout.rows()?);
        floats([dx], |[dx]| {
            pointwise::activate_backward(rt, self.0, x, dout, ViewMut::new(dx, x.shape())?)
        })
    }
}

struct Gate(Activation);

impl Op<2> for Gate {
    const NAME: &'static str = "gate";

    fn shape(&self, [gate, _]: [&[usize]; 2]) -> Outcome<Vec<usize>> {
        Ok(gate.to_vec())
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [gate, x]: [Arg<'_, E>; 2],
        out: &mut [E],
    ) -> Outcome<()> {
        let (gate, x) = (gate.float(), x.float());
        let (gate, x) = (gate.rows()?, x.rows()?);
        floats([out], |[out]| {
            pointwise::gate(rt, self.0, gate, x, ViewMut::new(out, gate.shape())?)
        })
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [gate, x]: [Arg<'_, E>; 2],
        dout: Arg<'_, E>,
        grads: [&mut [E]; 2],
    ) -> Outcome<()> {
        let (gate, x, dout) = (gate.float(), x.float(), dout.float());
        let (gate, x, dout) = (gate.rows()?, x.rows()?, dout.rows()?);
        floats(grads, |[dgate, dx]| {
            let grads = [ViewMut::new(dgate, gate.shape())?, ViewMut::new(dx, x.shape())?];
            pointwise::gate_backward(rt, self.0, gate, x, dout, grads)
        })
    }
}
