//! Attention of one head without softmax.

use crate::attention::mixed_chunk::{self, MixedChunkAttention};
use crate::attention::quadratic::{self, Bias, BiasGrads, QuadraticAttention};
use crate::candle::Result;
use crate::candle::call::{Arg, Op, apply_packed, apply3, floats};
use crate::error::{Error, Result as Outcome};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};
use candle_core::{DType, Tensor};
use std::sync::Arc;

/// Quadratic attention, as [`QuadraticAttention`]; `q`: `[batch, queries, s]`, `k`: `[batch, keys, s]`, `v`:
/// `[batch, keys, e]`, and a bias of scores or none: a table of `2 n - 1` numbers by distance, or a matrix
/// `[queries, keys]`. Differentiable in all.
///
/// # Errors
/// What the operation refuses, and element types that differ.
pub fn quadratic(
    rt: &Arc<Runtime>,
    op: &QuadraticAttention,
    [q, k, v]: [&Tensor; 3],
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let op = OneHead(*op);
    match bias {
        Some(bias) => apply_packed(rt, op, [q, k, v, bias]),
        None => apply3(rt, op, [q, k, v]),
    }
}

/// Mixed chunk attention, as [`MixedChunkAttention`], each sequence from an empty state; `qk`: quadratic queries and keys,
/// linear queries and keys (`[batch, len, s]`), `v`: `[batch, len, e]`, and a bias of scores or none: a table of
/// `2 C - 1` numbers by distance, or a matrix `[C, C]`. Differentiable in all.
///
/// # Errors
/// What the operation refuses, and element types that differ.
pub fn mixed_chunk(
    rt: &Arc<Runtime>,
    op: &MixedChunkAttention,
    [a, b, c, d]: [&Tensor; 4],
    v: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let op = OneHead(*op);
    match bias {
        Some(bias) => apply_packed(rt, op, [a, b, c, d, v, bias]),
        None => apply_packed(rt, op, [a, b, c, d, v]),
    }
}

/// One thing per kind of queries and keys.
pub(super) fn kinds<T, const H: usize>(
    op: &'static str,
    all: impl Iterator<Item = Outcome<T>>,
) -> Outcome<[T; H]> {
    let all = all.collect::<Outcome<Vec<T>>>()?;
    all.try_into().map_err(|_| Error::shape(op, "q and k", "one per kind", H))
}

/// What differs between operations of `H` kinds of queries and keys.
pub(super) trait Scored<const H: usize>: Send + Sync + 'static {
    const NAME: &'static str;

    fn attend<E: Element>(
        &self,
        rt: &Runtime,
        qkv: ([View<'_, E, 3>; H], View<'_, E, 3>),
        out: ViewMut<'_, E, 3>,
        extra: quadratic::Extra<'_>,
    ) -> Outcome<()>;

    /// `grads`: of queries and keys, and of values.
    fn gradients<E: Element>(
        &self,
        rt: &Runtime,
        qkv: ([View<'_, E, 3>; H], View<'_, E, 3>),
        dout: View<'_, E, 3>,
        grads: ([ViewMut<'_, E, 3>; H], ViewMut<'_, E, 3>),
        extra: quadratic::Extra<'_>,
        dbias: BiasGrads<'_>,
    ) -> Outcome<()>;
}

impl Scored<2> for QuadraticAttention {
    const NAME: &'static str = "quadratic attention";

    fn attend<E: Element>(
        &self,
        rt: &Runtime,
        ([q, k], v): ([View<'_, E, 3>; 2], View<'_, E, 3>),
        out: ViewMut<'_, E, 3>,
        extra: quadratic::Extra<'_>,
    ) -> Outcome<()> {
        self.forward_with(rt, q, k, v, out, extra)
    }

    fn gradients<E: Element>(
        &self,
        rt: &Runtime,
        ([q, k], v): ([View<'_, E, 3>; 2], View<'_, E, 3>),
        dout: View<'_, E, 3>,
        ([dq, dk], dv): ([ViewMut<'_, E, 3>; 2], ViewMut<'_, E, 3>),
        extra: quadratic::Extra<'_>,
        dbias: BiasGrads<'_>,
    ) -> Outcome<()> {
        self.backward_with(rt, q, k, v, dout, [dq, dk, dv], extra, dbias)
    }
}

impl Scored<4> for MixedChunkAttention {
    const NAME: &'static str = "mixed chunk attention";

    fn attend<E: Element>(
        &self,
        rt: &Runtime,
        (qk, v): ([View<'_, E, 3>; 4], View<'_, E, 3>),
        out: ViewMut<'_, E, 3>,
        quadratic::Extra { key_mask, bias }: quadratic::Extra<'_>,
    ) -> Outcome<()> {
        self.forward_with(rt, qk, v, out, mixed_chunk::Extra { key_mask, bias }, None)
    }

    fn gradients<E: Element>(
        &self,
        rt: &Runtime,
        (qk, v): ([View<'_, E, 3>; 4], View<'_, E, 3>),
        dout: View<'_, E, 3>,
        ([a, b, c, d], dv): ([ViewMut<'_, E, 3>; 4], ViewMut<'_, E, 3>),
        quadratic::Extra { key_mask, bias }: quadratic::Extra<'_>,
        dbias: BiasGrads<'_>,
    ) -> Outcome<()> {
        let extra = mixed_chunk::Extra { key_mask, bias };
        self.backward_with(rt, qk, v, dout, [a, b, c, d, dv], extra, dbias)
    }
}

/// Which keys count.
#[derive(Clone)]
pub(super) struct Hidden {
    keep: Vec<bool>,
    shape: [usize; 2],
}

impl Hidden {
    /// From zeros for hidden ones, `[batch, len]`.
    pub fn new(mask: &Tensor) -> Result<Self> {
        let shape = mask.dims2()?.into();
        let mask = mask.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Self { keep: mask.into_iter().map(|x| x != 0.0).collect(), shape })
    }

    pub fn view(&self) -> Outcome<View<'_, bool, 2>> {
        View::new(&self.keep, self.shape)
    }

    /// Zeros the rows of hidden tokens.
    pub fn clear(&self, rows: &mut [f32], width: usize) {
        let rows = rows.chunks_exact_mut(width.max(1)).zip(&self.keep);
        rows.filter(|(_, keep)| !**keep).for_each(|(row, _)| row.fill(0.0));
    }
}

/// A table or a matrix, by its shape, as a bias of scores.
pub(super) fn bias<'a>(
    op: &'static str,
    (data, shape): (&'a [f32], &[usize]),
) -> Outcome<Bias<'a>> {
    match *shape {
        [_] => Ok(Bias { table: Some(data), matrix: None }),
        [rows, columns] => {
            Ok(Bias { table: None, matrix: Some(View::new(data, [rows, columns])?) })
        }
        _ => Err(Error::shape(op, "bias", "a table or a matrix", shape)),
    }
}

/// Where its gradient belongs.
pub(super) fn bias_gradient<'a>(
    bias: Bias<'_>,
    next: impl FnOnce(usize) -> &'a mut [f32],
) -> Outcome<BiasGrads<'a>> {
    Ok(match bias {
        Bias { table: Some(table), .. } => {
            BiasGrads { table: Some(next(table.len())), matrix: None }
        }
        Bias { matrix: Some(m), .. } => {
            let shape @ [rows, columns] = m.shape();
            let matrix = Some(ViewMut::new(next(rows * columns), shape)?);
            BiasGrads { table: None, matrix }
        }
        _ => BiasGrads::default(),
    })
}

/// Queries and keys of all kinds, values, and a bias or none.
struct OneHead<A, const H: usize>(A);

impl<A: Scored<H>, const H: usize> OneHead<A, H> {
    /// Queries and keys, and values.
    fn inputs<'a, E: Element>(
        args: &'a [Arg<'_, E>],
    ) -> Outcome<([View<'a, E, 3>; H], View<'a, E, 3>)> {
        let v = args[H].view(A::NAME, "v")?;
        let mut qk = [v; H];
        for (view, arg) in qk.iter_mut().zip(args) {
            *view = arg.view(A::NAME, "q and k")?;
        }
        Ok((qk, v))
    }
}

/// A bias among the arguments, in `f32`.
fn argument<E: Element>(bias: Option<&Arg<'_, E>>) -> Option<(Vec<f32>, Vec<usize>)> {
    bias.map(|bias| (bias.to_vec(), bias.shape().to_vec()))
}

/// What is added to scores.
fn extra<'a>(
    op: &'static str,
    argument: Option<&'a (Vec<f32>, Vec<usize>)>,
) -> Outcome<quadratic::Extra<'a>> {
    let bias = argument.map(|(data, shape)| bias(op, (data, shape))).transpose()?;
    Ok(quadratic::Extra { key_mask: None, bias: bias.unwrap_or_default() })
}

impl<A: Scored<H>, const H: usize, const K: usize> Op<K> for OneHead<A, H> {
    const NAME: &'static str = A::NAME;

    fn shape(&self, args: [&[usize]; K]) -> Outcome<Vec<usize>> {
        let (q, v) = (args[0], args[H]);
        match (q, v) {
            (&[batch, len, ..], &[_, _, e]) => Ok(vec![batch, len, e]),
            _ => Err(Error::shape(A::NAME, "q and v", "[batch, len, width]", (q, v))),
        }
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        out: &mut [E],
    ) -> Outcome<()> {
        let (qk, v) = Self::inputs(&args)?;
        let out = ViewMut::new(out, [qk[0].shape()[0], qk[0].shape()[1], v.shape()[2]])?;
        let bias = argument(args.get(H + 1));
        self.0.attend(rt, (qk, v), out, extra(A::NAME, bias.as_ref())?)
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        dout: Arg<'_, E>,
        grads: [&mut [E]; K],
    ) -> Outcome<()> {
        let (qk, v) = Self::inputs(&args)?;
        let bias = argument(args.get(H + 1));
        let (extra, dout) = (extra(A::NAME, bias.as_ref())?, dout.view(A::NAME, "dout")?);
        let mut grads = grads.into_iter();
        let mut next = || grads.next().unwrap_or_default();
        let own = kinds(A::NAME, qk.iter().map(|x| ViewMut::new(next(), x.shape())))?;
        let dv = ViewMut::new(next(), v.shape())?;
        floats([next()], |[d]| {
            let dbias = bias_gradient(extra.bias, |_| d)?;
            self.0.gradients(rt, (qk, v), dout, (own, dv), extra, dbias)
        })
    }
}
