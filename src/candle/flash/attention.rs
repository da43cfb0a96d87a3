//! Attention of one head without softmax.

use crate::attention::mixed_chunk::{self, MixedChunkAttention};
use crate::attention::quadratic::{self, Bias, BiasGrads, QuadraticAttention};
use crate::candle::Result;
use crate::candle::call::{Arg, Op, apply_packed, apply2, apply3, floats};
use crate::error::{Error, Result as Outcome, expect_shape};
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
    let op = OneHead { op: *op, together: false, hidden: None };
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
    let op = OneHead { op: *op, together: false, hidden: None };
    match bias {
        Some(bias) => apply_packed(rt, op, [a, b, c, d, v, bias]),
        None => apply_packed(rt, op, [a, b, c, d, v]),
    }
}

/// As [`quadratic`] or [`mixed_chunk`] with all queries and keys in one tensor, `[batch, len, kinds, s]`, which is not
/// copied. Keys that `mask` (`[batch, len]`) has zeros for are hidden.
pub(super) fn attend_heads<const H: usize>(
    rt: &Arc<Runtime>,
    op: impl Scored<H>,
    [heads, v]: [&Tensor; 2],
    bias: Option<&Tensor>,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    let hidden = mask.map(Hidden::new).transpose()?;
    let op = OneHead { op, together: true, hidden };
    match bias {
        Some(bias) => apply3(rt, op, [heads, v, bias]),
        None => apply2(rt, op, [heads, v]),
    }
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
struct Hidden {
    keep: Vec<bool>,
    shape: [usize; 2],
}

impl Hidden {
    fn new(mask: &Tensor) -> Result<Self> {
        let shape = mask.dims2()?.into();
        let mask = mask.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Self { keep: mask.into_iter().map(|x| x != 0.0).collect(), shape })
    }
}

/// An operation with what is not differentiable.
struct OneHead<A, const H: usize> {
    op: A,
    /// All queries and keys are one argument, `[batch, len, kinds, s]`.
    together: bool,
    hidden: Option<Hidden>,
}

impl<A: Scored<H>, const H: usize> OneHead<A, H> {
    /// Queries and keys, and values.
    fn inputs<'a, E: Element>(
        &self,
        args: &'a [Arg<'_, E>],
    ) -> Outcome<([View<'a, E, 3>; H], View<'a, E, 3>)> {
        let name = A::NAME;
        if self.together {
            let all = args[0].view::<4>(name, "q and k")?;
            let [batch, len, _, s] = all.shape();
            let expected = [batch, len, H, s];
            expect_shape(name, "q and k", "[batch, len, kinds, s]", expected, all.shape())?;
            return Ok((std::array::from_fn(|h| all.one_head(h)), args[1].view(name, "v")?));
        }
        let v = args[H].view(name, "v")?;
        let mut qk = [v; H];
        for (view, arg) in qk.iter_mut().zip(args) {
            *view = arg.view(name, "q and k")?;
        }
        Ok((qk, v))
    }

    /// How many arguments come before the bias.
    fn before(&self) -> usize {
        1 + if self.together { 1 } else { H }
    }

    /// What hides keys, and a table or a matrix as a bias.
    fn extra<'a>(&'a self, bias: Option<&'a Arg<'_, f32>>) -> Outcome<quadratic::Extra<'a>> {
        let name = A::NAME;
        let mut extra = quadratic::Extra::default();
        if let Some(Hidden { keep, shape }) = &self.hidden {
            extra.key_mask = Some(View::new(keep, *shape)?);
        }
        match bias {
            Some(table) if table.shape().len() == 1 => {
                extra.bias.table = Some(table.view::<1>(name, "bias")?.row([0]));
            }
            Some(matrix) => extra.bias.matrix = Some(matrix.view(name, "bias")?),
            None => {}
        }
        Ok(extra)
    }
}

impl<A: Scored<H>, const H: usize, const K: usize> Op<K> for OneHead<A, H> {
    const NAME: &'static str = A::NAME;

    fn shape(&self, args: [&[usize]; K]) -> Outcome<Vec<usize>> {
        let (q, v) = (args[0], args[self.before() - 1]);
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
        let (qk, v) = self.inputs(&args)?;
        let out = ViewMut::new(out, [qk[0].shape()[0], qk[0].shape()[1], v.shape()[2]])?;
        let bias = args.get(self.before()).map(Arg::float);
        self.op.attend(rt, (qk, v), out, self.extra(bias.as_ref())?)
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        dout: Arg<'_, E>,
        grads: [&mut [E]; K],
    ) -> Outcome<()> {
        let (qk, v) = self.inputs(&args)?;
        let bias = args.get(self.before()).map(Arg::float);
        let extra = self.extra(bias.as_ref())?;
        let dout = dout.view(A::NAME, "dout")?;
        let mut grads = grads.into_iter();
        let mut next = || grads.next().unwrap_or_default();
        let mut own = Vec::with_capacity(H);
        if self.together {
            let [batch, len, s] = qk[0].shape();
            let mut rest = ViewMut::new(next(), [batch, len, H, s])?;
            for _ in 0..H {
                let (one, others) = rest.split_at(2, 1);
                own.push(one.one_head(0));
                rest = others;
            }
        } else {
            for x in &qk {
                own.push(ViewMut::new(next(), x.shape())?);
            }
        }
        let kinds = || Error::shape(A::NAME, "q and k", "one per kind", H);
        let own = own.try_into().map_err(|_| kinds())?;
        let dv = ViewMut::new(next(), v.shape())?;
        floats([next()], |[d]| {
            let dbias = match extra.bias {
                Bias { table: Some(_), .. } => BiasGrads { table: Some(d), matrix: None },
                Bias { matrix: Some(m), .. } => {
                    BiasGrads { table: None, matrix: Some(ViewMut::new(d, m.shape())?) }
                }
                _ => BiasGrads::default(),
            };
            self.op.gradients(rt, (qk, v), dout, (own, dv), extra, dbias)
        })
    }
}
