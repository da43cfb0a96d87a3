//! Operations of FLASH: one head, no softmax.

use super::Result;
use super::call::{Arg, Op, apply_packed, apply3, floats};
use crate::attention::mixed_chunk::{self, MixedChunkAttention};
use crate::attention::quadratic::{self, Bias, BiasGrads, QuadraticAttention};
use crate::error::{Error, Result as Outcome};
use crate::runtime::Runtime;
use crate::tensor::{Element, ViewMut};
use candle_core::Tensor;
use std::sync::Arc;

/// Quadratic attention, as [`QuadraticAttention`]; `q`: `[batch, queries, s]`, `k`: `[batch, keys, s]`, `v`:
/// `[batch, keys, e]`, and a `table` of `2 n - 1` numbers that is added to scores by distance, or none.
/// Differentiable in all.
///
/// # Errors
/// What the operation refuses, and element types that differ.
pub fn quadratic(
    rt: &Arc<Runtime>,
    op: &QuadraticAttention,
    [q, k, v]: [&Tensor; 3],
    table: Option<&Tensor>,
) -> Result<Tensor> {
    match table {
        Some(table) => apply_packed(rt, Quadratic(*op), [q, k, v, table]),
        None => apply3(rt, Quadratic(*op), [q, k, v]),
    }
}

/// Mixed chunk attention, as [`MixedChunkAttention`], each sequence from an empty state; `qk`: quadratic queries and keys,
/// linear queries and keys (`[batch, len, s]`), `v`: `[batch, len, e]`, and a `table` of `2 C - 1` numbers that is
/// added to scores by distance, or none. Differentiable in all.
///
/// # Errors
/// What the operation refuses, and element types that differ.
pub fn mixed_chunk(
    rt: &Arc<Runtime>,
    op: &MixedChunkAttention,
    [a, b, c, d]: [&Tensor; 4],
    v: &Tensor,
    table: Option<&Tensor>,
) -> Result<Tensor> {
    match table {
        Some(table) => apply_packed(rt, MixedChunk(*op), [a, b, c, d, v, table]),
        None => apply_packed(rt, MixedChunk(*op), [a, b, c, d, v]),
    }
}

/// `[batch, queries, e]`
fn shape(op: &'static str, q: &[usize], v: &[usize]) -> Outcome<Vec<usize>> {
    match (q, v) {
        (&[batch, len, _], &[_, _, e]) => Ok(vec![batch, len, e]),
        _ => Err(Error::shape(op, "q and v", "[batch, len, width]", (q, v))),
    }
}

/// The bias that the table among the last arguments is, if there is one.
fn table<'a>(op: &'static str, args: &'a [Arg<'_, f32>]) -> Outcome<Bias<'a>> {
    let table = args.first().map(|t| Ok(t.view::<1>(op, "table")?.row([0])));
    Ok(Bias { table: table.transpose()?, ..Bias::default() })
}

struct Quadratic(QuadraticAttention);

/// Queries, keys, values, and a table or none.
impl<const K: usize> Op<K> for Quadratic {
    const NAME: &'static str = "quadratic attention";

    fn shape(&self, args: [&[usize]; K]) -> Outcome<Vec<usize>> {
        shape(<Self as Op<K>>::NAME, args[0], args[2])
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        out: &mut [E],
    ) -> Outcome<()> {
        let name = <Self as Op<K>>::NAME;
        let tables: Vec<_> = args[3..].iter().map(Arg::float).collect();
        let extra = quadratic::Extra { bias: table(name, &tables)?, ..Default::default() };
        let [q, k, v] =
            [args[0].view(name, "q")?, args[1].view(name, "k")?, args[2].view(name, "v")?];
        let out = ViewMut::new(out, [q.shape()[0], q.shape()[1], v.shape()[2]])?;
        self.0.forward_with(rt, q, k, v, out, extra)
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        dout: Arg<'_, E>,
        grads: [&mut [E]; K],
    ) -> Outcome<()> {
        let name = <Self as Op<K>>::NAME;
        let tables: Vec<_> = args[3..].iter().map(Arg::float).collect();
        let extra = quadratic::Extra { bias: table(name, &tables)?, ..Default::default() };
        let [q, k, v] =
            [args[0].view(name, "q")?, args[1].view(name, "k")?, args[2].view(name, "v")?];
        let dout = dout.view(name, "dout")?;
        let mut grads = grads.into_iter();
        let mut next = |shape| ViewMut::new(grads.next().unwrap_or_default(), shape);
        let own = [next(q.shape())?, next(k.shape())?, next(v.shape())?];
        floats([grads.next().unwrap_or_default()], |[dtable]| {
            let dbias = BiasGrads { table: (K > 3).then_some(dtable), matrix: None };
            self.0.backward_with(rt, q, k, v, dout, own, extra, dbias)
        })
    }
}

struct MixedChunk(MixedChunkAttention);

/// Four kinds of queries and keys, values, and a table or none.
impl<const K: usize> Op<K> for MixedChunk {
    const NAME: &'static str = "mixed chunk attention";

    fn shape(&self, args: [&[usize]; K]) -> Outcome<Vec<usize>> {
        shape(<Self as Op<K>>::NAME, args[0], args[4])
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        out: &mut [E],
    ) -> Outcome<()> {
        let name = <Self as Op<K>>::NAME;
        let tables: Vec<_> = args[5..].iter().map(Arg::float).collect();
        let extra = mixed_chunk::Extra { bias: table(name, &tables)?, ..Default::default() };
        let view = |i: usize| args[i].view::<3>(name, "q, k, v");
        let (qk, v) = ([view(0)?, view(1)?, view(2)?, view(3)?], view(4)?);
        self.0.forward_with(rt, qk, v, ViewMut::new(out, v.shape())?, extra, None)
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        dout: Arg<'_, E>,
        grads: [&mut [E]; K],
    ) -> Outcome<()> {
        let name = <Self as Op<K>>::NAME;
        let tables: Vec<_> = args[5..].iter().map(Arg::float).collect();
        let extra = mixed_chunk::Extra { bias: table(name, &tables)?, ..Default::default() };
        let view = |i: usize| args[i].view::<3>(name, "q, k, v");
        let (qk, v) = ([view(0)?, view(1)?, view(2)?, view(3)?], view(4)?);
        let dout = dout.view(name, "dout")?;
        let mut grads = grads.into_iter();
        let mut next = |shape| ViewMut::new(grads.next().unwrap_or_default(), shape);
        let [a, b, c, d] = qk.map(|x| x.shape());
        let own = [next(a)?, next(b)?, next(c)?, next(d)?, next(v.shape())?];
        floats([grads.next().unwrap_or_default()], |[dtable]| {
            let dbias = BiasGrads { table: (K > 5).then_some(dtable), matrix: None };
            self.0.backward_with(rt, qk, v, dout, own, extra, dbias)
        })
    }
}
