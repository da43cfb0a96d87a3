//! Layers as single operations: a norm before, the layer itself, and the sum with its input behind. What lies between is
//! kept from the forward to the backward pass here instead of becoming tensors, each of which would cost memory and a sum
//! of gradients.

use super::call::{Arg, Op, apply3, floats};
use super::norm::Rows;
use super::{Linear, Result};
use crate::error::{Error, Result as Outcome, expect_shape};
use crate::layers::{Norm, NormGradients, affine, pointwise};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};
use candle_core::Tensor;
use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

/// A differentiable function of rows and of parameters, from and to the same shape.
pub(super) trait Layer: Send + Sync + 'static {
    /// In messages.
    const NAME: &'static str;
    /// What the backward pass needs of the forward pass.
    type Kept: Send + Sync + 'static;

    /// Overwrites `out`, and asks for all parameters in order.
    fn forward(
        &self,
        rt: &Runtime,
        x: Input<'_>,
        params: &mut Params<'_>,
        out: ViewMut<'_, f32, 2>,
    ) -> Outcome<Self::Kept>;

    /// Overwrites all gradients, which it asks for in the order of the parameters.
    fn backward(
        &self,
        rt: &Runtime,
        x: Input<'_>,
        params: &mut Params<'_>,
        kept: &Self::Kept,
        dout: View<'_, f32, 2>,
        grads: (ViewMut<'_, f32, 2>, &mut Grads<'_>),
    ) -> Outcome<()>;
}

/// What a layer reads.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    /// `[batch * len, width]`
    pub rows: View<'a, f32, 2>,
    pub batch: usize,
    pub len: usize,
}

/// Parameters in order.
pub(super) struct Params<'a> {
    op: &'static str,
    /// The first one, where it lies.
    first: Option<View<'a, f32, 2>>,
    /// Those behind it, one after the other.
    rest: &'a [f32],
    shapes: core::slice::Iter<'a, Vec<usize>>,
}

impl<'a> Params<'a> {
    fn missing(&self) -> Error {
        Error::shape(self.op, "parameters", "as many as the layer has", "fewer")
    }

    /// The next one, row-major, and its shape.
    pub fn next(&mut self) -> Outcome<(&'a [f32], &'a [usize])> {
        let shape = self.shapes.next().ok_or_else(|| self.missing())?;
        let size = shape.iter().product();
        let (data, rest) = self.rest.split_at_checked(size).ok_or_else(|| self.missing())?;
        self.rest = rest;
        Ok((data, shape))
    }

    /// The next one as a matrix.
    pub fn matrix(&mut self) -> Outcome<View<'a, f32, 2>> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        let (data, shape) = self.next()?;
        let rank = || Error::shape(self.op, "parameters", "a matrix", shape);
        View::new(data, shape.try_into().map_err(|_| rank())?)
    }

    /// A matrix and, if it has one, its bias.
    pub fn map(&mut self, bias: bool) -> Outcome<Map<'a>> {
        let weight = self.matrix()?;
        let bias = if bias { Some(self.next()?.0) } else { None };
        let bias = bias.map(|b| View::new(b, [b.len()])).transpose()?;
        Ok(Map { weight, bias })
    }
}

/// Gradients of parameters, asked for as the parameters were.
pub(super) struct Grads<'a> {
    first: Option<&'a mut [f32]>,
    rest: &'a mut [f32],
}

impl<'a> Grads<'a> {
    /// Of the next `size` elements.
    pub fn next(&mut self, size: usize) -> &'a mut [f32] {
        let rest = core::mem::take(&mut self.rest);
        let (next, rest) = rest.split_at_mut(size.min(rest.len()));
        self.rest = rest;
        next
    }

    /// Of the next matrix.
    pub fn matrix(&mut self, shape: [usize; 2]) -> Outcome<ViewMut<'a, f32, 2>> {
        let first = self.first.take();
        ViewMut::new(first.unwrap_or_else(|| self.next(shape[0] * shape[1])), shape)
    }
}

/// An affine map.
#[derive(Clone, Copy)]
pub(super) struct Map<'a> {
    /// `[outputs, inputs]`
    pub weight: View<'a, f32, 2>,
    bias: Option<View<'a, f32, 1>>,
}

impl Map<'_> {
    /// `x W^T + b`
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
    ) -> Outcome<()> {
        affine::forward(rt, x, self.weight, self.bias, out)
    }

    /// Where its gradients belong: they are asked for in the order of the parameters, whenever they are written.
    pub fn grads<'a>(&self, grads: &mut Grads<'a>) -> Outcome<MapGrads<'a>> {
        let shape @ [outputs, _] = self.weight.shape();
        let weight = grads.matrix(shape)?;
        let bias = self.bias.map(|_| ViewMut::new(grads.next(outputs), [outputs])).transpose()?;
        Ok(MapGrads { weight, bias })
    }

    /// The gradients of `x`, and of weight and bias.
    pub fn backward(
        &self,
        rt: &Runtime,
        [x, dout]: [View<'_, f32, 2>; 2],
        dx: ViewMut<'_, f32, 2>,
        MapGrads { weight, bias }: MapGrads<'_>,
    ) -> Outcome<()> {
        affine::backward(rt, x, self.weight, dout, [dx, weight], bias)
    }
}

/// Gradients of the parameters of a [`Map`].
pub(super) struct MapGrads<'a> {
    weight: ViewMut<'a, f32, 2>,
    bias: Option<ViewMut<'a, f32, 1>>,
}

/// The parameters of maps of the same rows as those of one map, one below the other.
pub(super) fn stacked(maps: &[&Linear]) -> Result<Vec<Tensor>> {
    let [weights, biases]: [Vec<&Tensor>; 2] = [
        maps.iter().map(|map| map.weight()).collect(),
        maps.iter().filter_map(|map| map.bias()).collect(),
    ];
    let parts = [weights, biases].into_iter().filter(|all| !all.is_empty());
    parts.map(|all| Tensor::cat(&all, 0)).collect()
}

/// What surrounds a layer `f`: `f(x)`, `f(norm(x))`, or either with `x` added.
#[derive(Clone, Debug, Default)]
pub(super) struct Stream {
    /// A norm and its parameters.
    pub norm: Option<(Rows, Vec<Tensor>)>,
    pub residual: bool,
}

/// Applies a layer to `[.., len, width]`; the first parameter is a matrix.
pub(super) fn apply(
    rt: &Arc<Runtime>,
    layer: impl Layer,
    stream: &Stream,
    x: &Tensor,
    params: &[Tensor],
) -> Result<Tensor> {
    let [first, others @ ..] = params else {
        candle_core::bail!("layer: parameters must be at least one, got none")
    };
    let norm = stream.norm.as_ref();
    let rest: Vec<&Tensor> = norm.iter().flat_map(|norm| &norm.1).chain(others).collect();
    let whole = Whole {
        layer,
        norm: norm.map(|norm| norm.0),
        residual: stream.residual,
        shapes: rest.iter().map(|t| t.dims().to_vec()).collect(),
        kept: OnceLock::new(),
    };
    // Candle's interface takes three tensors.
    let flat = match rest[..] {
        [one] => one.clone(),
        _ => {
            let flat = rest.into_iter().map(Tensor::flatten_all).collect::<Result<Vec<_>>>()?;
            Tensor::cat(&flat, 0)?
        }
    };
    apply3(rt, whole, [x, first, &flat])
}

/// A layer as candle sees it: of its input, its first parameter, and those of the norm with all others.
struct Whole<L: Layer> {
    layer: L,
    norm: Option<Rows>,
    residual: bool,
    /// Of all parameters but the first.
    shapes: Vec<Vec<usize>>,
    /// Whoever asks first keeps it: an operation is called once.
    kept: OnceLock<L::Kept>,
}

/// What both passes of a layer read.
struct Open<'a> {
    /// Before the norm.
    x: View<'a, f32, 2>,
    input: Input<'a>,
    params: Params<'a>,
    norm: Option<Norm>,
}

impl<L: Layer> Whole<L> {
    fn open<E: Element>(
        &self,
        rt: &Runtime,
        [x, first, rest]: [Arg<'_, E>; 3],
        f: impl FnOnce(Open<'_>) -> Outcome<()>,
    ) -> Outcome<()> {
        let (x, first, rest) = (x.float(), first.float(), rest.float());
        let len = x.shape().iter().rev().nth(1).copied().unwrap_or(1);
        let x = x.rows()?;
        let [n, width] = x.shape();
        let rest = match rest.rows()?.as_slice() {
            Some(all) => Cow::Borrowed(all),
            None => Cow::Owned(rest.to_vec()),
        };
        let (rest, shapes) = (&*rest, self.shapes.iter());
        let first = first.view::<2>(L::NAME, "parameters")?;
        expect_shape(L::NAME, "x", "[rows, width]", [n, first.shape()[1]], x.shape())?;
        let mut params = Params { op: L::NAME, first: Some(first), rest, shapes };
        let norm = match self.norm {
            Some(rows) => {
                let own = (0..rows.parameters()).map(|_| Ok(params.next()?.0));
                Some(rows.norm(&own.collect::<Outcome<Vec<_>>>()?)?)
            }
            None => None,
        };
        let mut normed = rt.floats(if norm.is_some() { n * width } else { 0 })?;
        let mut rows = x;
        if let Some(norm) = &norm {
            norm.forward(rt, x, ViewMut::new(&mut normed, x.shape())?)?;
            rows = View::new(&normed, x.shape())?;
        }
        let input = Input { rows, batch: n.checked_div(len).unwrap_or(0), len };
        f(Open { x, input, params, norm })
    }

    /// What passes by the layer.
    fn add(&self, rt: &Runtime, by: View<'_, f32, 2>, to: &mut [f32]) -> Outcome<()> {
        match self.residual {
            true => pointwise::add(rt, by, ViewMut::new(to, by.shape())?),
            false => Ok(()),
        }
    }
}

impl<L: Layer> Op<3> for Whole<L> {
    const NAME: &'static str = L::NAME;

    fn shape(&self, [x, _, _]: [&[usize]; 3]) -> Outcome<Vec<usize>> {
        match x {
            [] => Err(Error::shape(L::NAME, "x", "[.., width]", x)),
            _ => Ok(x.to_vec()),
        }
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; 3],
        out: &mut [E],
    ) -> Outcome<()> {
        self.open(rt, args, |Open { x, input, mut params, .. }| {
            floats([out], |[out]| {
                let to = ViewMut::new(out, x.shape())?;
                let kept = self.layer.forward(rt, input, &mut params, to)?;
                self.kept.get_or_init(|| kept);
                self.add(rt, x, out)
            })
        })
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; 3],
        dout: Arg<'_, E>,
        grads: [&mut [E]; 3],
    ) -> Outcome<()> {
        // A gradient may be asked for before there is a result.
        let early = || Error::value(L::NAME, "dout", "one after a forward pass", "none before it");
        let (kept, dout) = (self.kept.get().ok_or_else(early)?, dout.float());
        let dout = dout.rows()?;
        self.open(rt, args, |Open { x, input, mut params, norm }| {
            let shape = x.shape();
            expect_shape(L::NAME, "dout", "[rows, width]", shape, dout.shape())?;
            floats(grads, |[dx, first, rest]| {
                let mut grads = Grads { first: Some(first), rest };
                let own = self.shapes.iter().map(|shape| grads.next(shape.iter().product()));
                let mut own = own.take(self.norm.map_or(0, Rows::parameters));
                let (weight, bias) = (own.next(), own.next());
                let mut dnormed = rt.floats(if norm.is_some() { dx.len() } else { 0 })?;
                let to = if norm.is_some() { &mut *dnormed } else { &mut *dx };
                let to = (ViewMut::new(to, shape)?, &mut grads);
                self.layer.backward(rt, input, &mut params, kept, dout, to)?;
                if let Some(norm) = norm {
                    let to = NormGradients { x: ViewMut::new(dx, shape)?, weight, bias };
                    norm.backward(rt, x, View::new(&dnormed, shape)?, to)?;
                }
                self.add(rt, dout, dx)
            })
        })
    }
}
