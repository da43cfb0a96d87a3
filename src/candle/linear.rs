//! Affine maps.

use super::Result;
use super::call::{Arg, Op, apply2, apply3};
use crate::error::{Error, Result as Outcome};
use crate::layers::affine;
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};
use candle_core::{Module, Tensor};
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

const OP: &str = "linear";

/// `x W^T + bias`, as [`affine::forward`]; `x`: `[.., inputs]`, `weight`: `[outputs, inputs]`, `bias`: `[outputs]`.
/// Differentiable in all three.
///
/// # Errors
/// For shapes that do not fit and element types that differ.
pub fn linear(
    rt: &Arc<Runtime>,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    match bias {
        Some(bias) => apply3(rt, Affine, [x, weight, bias]),
        None => apply2(rt, Affine, [x, weight]),
    }
}

struct Affine;

fn shape(x: &[usize], weight: &[usize]) -> Outcome<Vec<usize>> {
    let ([.., _], [outputs, _]) = (x, weight) else {
        let letters = "[.., inputs] and [outputs, inputs]";
        return Err(Error::shape(OP, "x and weight", letters, (x, weight)));
    };
    let mut shape = x.to_vec();
    shape.iter_mut().next_back().into_iter().for_each(|width| *width = *outputs);
    Ok(shape)
}

fn forward<E: Element>(
    rt: &Runtime,
    [x, weight]: [&Arg<'_, E>; 2],
    bias: Option<View<'_, E, 1>>,
    out: &mut [E],
) -> Outcome<()> {
    let (x, weight) = (x.rows()?, weight.view(OP, "weight")?);
    let shape = [x.shape()[0], weight.shape()[0]];
    affine::forward(rt, x, weight, bias, ViewMut::new(out, shape)?)
}

fn backward<E: Element>(
    rt: &Runtime,
    [x, weight, dout]: [&Arg<'_, E>; 3],
    [dx, dweight]: [&mut [E]; 2],
    dbias: Option<&mut [E]>,
) -> Outcome<()> {
    let (x, weight) = (x.rows()?, weight.view::<2>(OP, "weight")?);
    let grads = [ViewMut::new(dx, x.shape())?, ViewMut::new(dweight, weight.shape())?];
    let dbias = match dbias {
        Some(b) => {
            let len = b.len();
            Some(ViewMut::new(b, [len])?)
        }
        None => None,
    };
    affine::backward(rt, x, weight, dout.rows()?, grads, dbias)
}

impl Op<2> for Affine {
    const NAME: &'static str = OP;
    fn shape(&self, [x, weight]: [&[usize]; 2]) -> Outcome<Vec<usize>> {
        shape(x, weight)
    }
    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [x, w]: [Arg<'_, E>; 2],
        out: &mut [E],
    ) -> Outcome<()> {
        forward(rt, [&x, &w], None, out)
    }
    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [x, w]: [Arg<'_, E>; 2],
        dout: Arg<'_, E>,
        grads: [&mut [E]; 2],
    ) -> Outcome<()> {
        backward(rt, [&x, &w, &dout], grads, None)
    }
}

impl Op<3> for Affine {
    const NAME: &'static str = OP;
    fn shape(&self, [x, weight, _]: [&[usize]; 3]) -> Outcome<Vec<usize>> {
        shape(x, weight)
    }
    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [x, w, bias]: [Arg<'_, E>; 3],
        out: &mut [E],
    ) -> Outcome<()> {
        forward(rt, [&x, &w], Some(bias.view(OP, "bias")?), out)
    }
    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [x, w, _]: [Arg<'_, E>; 3],
        dout: Arg<'_, E>,
        [dx, dw, dbias]: [&mut [E]; 3],
    ) -> Outcome<()> {
        backward(rt, [&x, &w, &dout], [dx, dw], Some(dbias))
    }
}

/// An affine map with parameters `weight` (`[outputs, inputs]`) and, with a bias, `bias` (`[outputs]`): in the place of
/// candle's own, whose names it has.
#[derive(Clone, Debug)]
pub struct Linear {
    rt: Arc<Runtime>,
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// From tensors.
    #[must_use]
    pub fn new(rt: Arc<Runtime>, weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { rt, weight, bias }
    }

    /// Reads or creates the parameters; new ones are normal with a standard deviation of `inputs^-1/2`, biases 0.
    ///
    /// # Errors
    /// If the parameters are missing or of another shape.
    pub fn load(
        rt: &Arc<Runtime>,
        [inputs, outputs]: [usize; 2],
        bias: bool,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: (inputs.max(1) as f64).powf(-0.5) };
        let weight = vb.get_with_hints((outputs, inputs), "weight", init)?;
        let zero = Init::Const(0.0);
        let bias = bias.then(|| vb.get_with_hints(outputs, "bias", zero)).transpose()?;
        Ok(Self::new(rt.clone(), weight, bias))
    }

    /// `[outputs, inputs]`
    #[must_use]
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `[outputs]`
    #[must_use]
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(&self.rt, x, &self.weight, self.bias.as_ref())
    }
}

/// The table of embeddings and the head, which is the same tensor when tied.
pub(super) fn embedding_and_head(
    rt: &Arc<Runtime>,
    [vocab, width]: [usize; 2],
    tied: bool,
    [table, head]: [VarBuilder<'_>; 2],
) -> Result<(Tensor, Linear)> {
    let init = Init::Randn { mean: 0.0, stdev: (width.max(1) as f64).powf(-0.5) };
    let table = table.get_with_hints((vocab, width), "weight", init)?;
    let head = match tied {
        true => Linear::new(rt.clone(), table.clone(), None),
        false => Linear::load(rt, [width, vocab], false, head)?,
    };
    Ok((table, head))
}

/// Rows of a table: `[batch, len]` ids to `[batch, len, width]`.
pub(super) fn embed(table: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    let (batch, len) = tokens.dims2()?;
    table.index_select(&tokens.flatten_all()?, 0)?.reshape((batch, len, table.dim(1)?))
}
