//! The cheap heads of a gated attention unit.

use crate::candle::Result;
use crate::candle::call::{Arg, Op, apply3, floats};
use crate::error::{Error, Result as Outcome};
use crate::layers::pointwise;
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};
use candle_core::Tensor;
use std::sync::Arc;

/// `z * gamma_h + beta_h` for every head `h`, as [`pointwise::offset_scale`]; `z`: `[.., s]`, `gamma` and `beta`: `[heads, s]`;
/// the result is `[.., heads, s]`. Differentiable in all three.
pub(super) fn offset_scale(
    rt: &Arc<Runtime>,
    z: &Tensor,
    [gamma, beta]: [&Tensor; 2],
) -> Result<Tensor> {
    apply3(rt, Heads, [z, gamma, beta])
}

struct Heads;

const OP: &str = "offset and scale";

impl Op<3> for Heads {
    const NAME: &'static str = OP;

    fn shape(&self, [z, gamma, _]: [&[usize]; 3]) -> Outcome<Vec<usize>> {
        let (&[ref rows @ .., s], &[heads, width]) = (z, gamma) else {
            return Err(Error::shape(OP, "z and gamma", "[.., s] and [heads, s]", (z, gamma)));
        };
        if s != width {
            return Err(Error::shape(OP, "gamma", alloc::format!("heads of {s}"), gamma));
        }
        Ok([rows, &[heads, s]].concat())
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [z, gamma, beta]: [Arg<'_, E>; 3],
        out: &mut [E],
    ) -> Outcome<()> {
        let (z, [gamma, beta]) = (z.float(), [gamma, beta].map(|x| x.to_vec()));
        let z = z.rows()?;
        let shape = [z.shape()[0], gamma.len()];
        floats([out], |[out]| {
            pointwise::offset_scale(rt, z, [&gamma, &beta], ViewMut::new(out, shape)?)
        })
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [z, gamma, _]: [Arg<'_, E>; 3],
        dout: Arg<'_, E>,
        grads: [&mut [E]; 3],
    ) -> Outcome<()> {
        let (z, dout, gamma) = (z.float(), dout.float(), gamma.to_vec());
        let (z, rows) = (z.rows()?, dout.rows()?);
        let ((data, stride), [_, s]) = (rows.parts(), rows.shape());
        let copy = if stride == s { Vec::new() } else { dout.to_vec() };
        let shape = [z.shape()[0], gamma.len()];
        let data = if stride == s { data.get(..shape[0] * shape[1]) } else { Some(&*copy) };
        let dout = View::new(data.unwrap_or(&[]), shape)?;
        floats(grads, |[dz, dgamma, dbeta]| {
            let (dz, len) = (ViewMut::new(dz, z.shape())?, [gamma.len()]);
            let sums = [ViewMut::new(dgamma, len)?, ViewMut::new(dbeta, len)?];
            pointwise::offset_scale_backward(rt, z, &gamma, dout, dz, sums)
        })
    }
}
