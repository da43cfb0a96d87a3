//! The gated channel mixer, its norm and its residual stream as one operation.

use super::Result;
use super::call::{Arg, Op, apply3, floats};
use super::stream::{Kept, Stream};
use crate::error::{Error, Result as Outcome, expect_shape};
use crate::layers::{Activation, affine, pointwise};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};
use candle_core::Tensor;
use std::sync::Arc;

const OP: &str = "sglu";

/// `[x +] (act(norm(x) W1^T) * (norm(x) W2^T)) W3^T`; `w12` are the rows of `W1` and of `W2`.
pub(super) fn mix(
    rt: &Arc<Runtime>,
    act: Activation,
    stream: Stream,
    [x, w12, w3]: [&Tensor; 3],
) -> Result<Tensor> {
    apply3(rt, Mixer { act, stream, kept: Kept::new() }, [x, w12, w3])
}

struct Mixer {
    act: Activation,
    stream: Stream,
    /// `[rows, 2 glu]`: what the first two maps gave.
    kept: Kept<Vec<f32>>,
}

impl Mixer {
    /// `act(a) * b`
    fn gated(&self, rt: &Runtime, ab: View<'_, f32, 2>) -> Outcome<Vec<f32>> {
        let [n, wide] = ab.shape();
        let glu = wide / 2;
        let mut inner = vec![0.0; n * glu];
        let (a, b) = (ab.slice(1, 0, glu), ab.slice(1, glu, wide));
        pointwise::gate(rt, self.act, a, b, ViewMut::new(&mut inner, [n, glu])?)?;
        Ok(inner)
    }
}

impl Op<3> for Mixer {
    const NAME: &'static str = OP;

    fn shape(&self, [x, w12, w3]: [&[usize]; 3]) -> Outcome<Vec<usize>> {
        match (x, w12, w3) {
            (&[.., d], &[wide, from], &[to, glu])
                if d == from && d == to && glu.checked_mul(2) == Some(wide) =>
            {
                Ok(x.to_vec())
            }
            _ => {
                let letters = "[.., embed], [2 glu, embed], [embed, glu]";
                Err(Error::shape(OP, "x and weights", letters, (x, w12, w3)))
            }
        }
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [x, w12, w3]: [Arg<'_, E>; 3],
        out: &mut [E],
    ) -> Outcome<()> {
        let (x, w12, w3) = (x.float(), w12.float(), w3.float());
        let (x, w12, w3) = (x.rows()?, w12.view::<2>(OP, "w12")?, w3.view::<2>(OP, "w3")?);
        let shape = [x.shape()[0], w12.shape()[0]];
        let mut ab = vec![0.0; shape[0] * shape[1]];
        self.stream
            .normed(rt, x, |x| affine::forward(rt, x, w12, None, ViewMut::new(&mut ab, shape)?))?;
        let inner = self.gated(rt, View::new(&ab, shape)?)?;
        let inner = View::new(&inner, [shape[0], w3.shape()[1]])?;
        floats([out], |[out]| {
            affine::forward(rt, inner, w3, None, ViewMut::new(out, x.shape())?)?;
            self.stream.add(rt, x, out)
        })?;
        self.kept.keep(ab);
        Ok(())
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [x, w12, w3]: [Arg<'_, E>; 3],
        dout: Arg<'_, E>,
        grads: [&mut [E]; 3],
    ) -> Outcome<()> {
        let ab = self.kept.get(OP)?;
        let (x, w12, w3, dout) = (x.float(), w12.float(), w3.float(), dout.float());
        let (x, w12, w3) = (x.rows()?, w12.view::<2>(OP, "w12")?, w3.view::<2>(OP, "w3")?);
        let (dout, [n, wide], glu) = (dout.rows()?, [x.shape()[0], w12.shape()[0]], w3.shape()[1]);
        expect_shape(OP, "dout", "[rows, embed]", x.shape(), dout.shape())?;
        let ab = View::new(ab, [n, wide])?;
        floats(grads, |[dx, dw12, dw3]| {
            let (inner, mut dinner) = (self.gated(rt, ab)?, vec![0.0; n * glu]);
            let to = [ViewMut::new(&mut dinner, [n, glu])?, ViewMut::new(dw3, w3.shape())?];
            affine::backward(rt, View::new(&inner, [n, glu])?, w3, dout, to, None)?;
            let mut dab = vec![0.0; n * wide];
            let to = ViewMut::new(&mut dab, [n, wide])?.split_at(1, glu);
            let (a, b) = (ab.slice(1, 0, glu), ab.slice(1, glu, wide));
            let dinner = View::new(&dinner, [n, glu])?;
            pointwise::gate_backward(rt, self.act, a, b, dinner, to.into())?;
            let dab = View::new(&dab, [n, wide])?;
            self.stream.back(rt, [x, dout], dx, |x, dx| {
                affine::backward(rt, x, w12, dab, [dx, ViewMut::new(dw12, w12.shape())?], None)
            })
        })
    }
}
