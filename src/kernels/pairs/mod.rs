//! Gradients of attention, block of queries by block of queries.
//!
//! ```text
//! X = scale Q K^T + factor b      P = link(X)      O = P V
//! dP = dO V^T      dX = link'(X) dP      dQ = scale dX K      dK = scale dX^T Q      dV = P^T dO
//! ```
//!
//! Whole rows of `X` and `dP` of a block of queries are held, so that weights are exact without running maxima, and
//! memory is linear in the number of keys. Every sum goes through blocks of queries in order.
//!
//! `Q` `[lq, dk]`, `K` `[lk, dk]`, `V` `[lk, dv]`, `dO` `[lq, dv]`; `X`, `P` and their gradients `[ROWS, lk]`.

mod careful;
mod rule;

pub use rule::{BiasGrads, Link, PairRule};

use super::gemm::{Gemm, Pack, gemm, gemm_bytes, matmul, rows};
use super::quadratic::stride;
use super::staging::finite_rows;
use super::store::{Keep, Store};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Kernel, Left, Order, Source, Tiles};
use crate::tensor::{View, ViewMut};
use rule::{LinkRows, WeighRows};

/// Queries of a block.
pub const ROWS: usize = 96;

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;
type ScoreElem<B> = <<B as Backend>::S as Tiles>::Elem;

/// Sizes of a head, the largest ones if they differ.
#[derive(Clone, Copy, Debug)]
pub struct PairShape {
    /// Queries.
    pub lq: usize,
    /// Keys.
    pub lk: usize,
    /// Width of queries and keys.
    pub dk: usize,
    /// Width of values.
    pub dv: usize,
}

impl PairShape {
    /// Rows of a block.
    fn rows(&self) -> usize {
        self.lq.min(ROWS)
    }

    /// Floats of scores; keys and values packed as scores are computed, and as other products are; bytes of products.
    fn lens<B: Backend>(&self) -> (usize, [usize; 2], [usize; 2], usize) {
        let Self { lk, dk, dv, .. } = *self;
        let m = self.rows();
        let (t_left, t_right) = (<B::T as Tiles>::left_len, B::T::right_len);
        let products = [
            gemm_bytes::<B::S>(m, dk),
            gemm_bytes::<B::S>(m, dv),
            // Fewer keys or queries may meet, in blocks of more rows.
            bytes_of::<Elem<B>>(t_left(m, lk.min(B::T::DEPTH))),
            gemm_bytes::<B::T>(m, lk),
            bytes_of::<Elem<B>>(t_left(lk, m)) + bytes_of::<Elem<B>>(t_right(m, dk.max(dv))),
        ];
        (
            m * stride(lk),
            [B::S::right_len(dk, lk), B::S::right_len(dv, lk)],
            [B::T::right_len(lk, dv), B::T::right_len(lk, dk)],
            products.into_iter().max().unwrap_or(0),
        )
    }

    /// Bytes of a [`PairWork`].
    #[must_use]
    pub fn bytes<B: Backend>(&self) -> usize {
        let (scores, keys, packed, products) = self.lens::<B>();
        2 * bytes_of::<f32>(scores)
            + keys.map(bytes_of::<ScoreElem<B>>).iter().sum::<usize>()
            + packed.map(bytes_of::<Elem<B>>).iter().sum::<usize>()
            + bytes_of::<usize>(self.lk)
            + bytes_of::<u8>(products)
    }
}

/// Keys and values of one head in the forms that products read, and room for a block of queries.
pub struct PairWork<'a, B: Backend> {
    scores: &'a mut [f32],
    dp: &'a mut [f32],
    /// `K^T` and `V^T`: `dP` loses most of itself to its mean over a row, and is formed as the scores are.
    score_keys: &'a mut [ScoreElem<B>],
    score_values: &'a mut [ScoreElem<B>],
    /// `V` and `K`
    values: &'a mut [Elem<B>],
    keys: &'a mut [Elem<B>],
    list: &'a mut [usize],
    products: &'a mut [u8],
    finite: bool,
}

impl<B: Backend> core::fmt::Debug for PairWork<'_, B> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("PairWork").finish_non_exhaustive()
    }
}

/// Whether all elements are finite, entered as one kernel.
struct Finite<'a>(View<'a, f32, 2>);
impl<B: Backend> Kernel<B> for Finite<'_> {
    type Output = bool;
    #[inline(always)]
    fn run(self, b: B) -> bool {
        finite_rows(b, self.0, [0, self.0.shape()[0]])
    }
}

/// What goes into the gradients of one head of queries.
#[derive(Clone, Copy, Debug)]
pub struct PairInputs<'a> {
    /// `[lq, dk]`
    pub q: View<'a, f32, 2>,
    /// `[lk, dk]`
    pub k: View<'a, f32, 2>,
    /// `[lk, dv]`
    pub v: View<'a, f32, 2>,
    /// `[lq, dv]`
    pub dout: View<'a, f32, 2>,
}

/// Where the gradients of one head go.
#[derive(Debug)]
pub struct PairGrads<'a> {
    /// `[lq, dk]`, overwritten.
    pub dq: ViewMut<'a, f32, 2>,
    /// `[lk, dk]`, added to.
    pub dk: ViewMut<'a, f32, 2>,
    /// `[lk, dv]`, added to.
    pub dv: ViewMut<'a, f32, 2>,
    /// Added to.
    pub bias: BiasGrads<'a>,
}

impl<'a, B: Backend> PairWork<'a, B> {
    /// Cuts the buffers off `cut`.
    pub fn new(shape: PairShape, cut: &mut Cut<'a>) -> Self {
        let (scores, keys, packed, products) = shape.lens::<B>();
        let [scores, dp] = [scores; 2].map(|n| cut.take(n));
        let [score_keys, score_values] = keys.map(|n| cut.take(n));
        let [values, keys] = packed.map(|n| cut.take(n));
        let (list, products) = (cut.take(shape.lk), cut.take(products));
        Self { scores, dp, score_keys, score_values, values, keys, list, products, finite: true }
    }

    /// Packs the keys and values of a head; they may be used by any number of heads of queries.
    pub fn pack(&mut self, b: B, k: View<'_, f32, 2>, v: View<'_, f32, 2>) {
        let ([lk, dk], dv) = (k.shape(), v.shape()[1]);
        let ((keys, k_stride), (values, v_stride)) = (k.parts(), v.parts());
        let src = Source::Columns(keys, k_stride);
        b.call(Pack { tiles: b.scores(), src, k: dk, n: lk, dst: &mut *self.score_keys });
        let src = Source::Columns(values, v_stride);
        b.call(Pack { tiles: b.scores(), src, k: dv, n: lk, dst: &mut *self.score_values });
        let src = Source::Rows(keys, k_stride);
        b.call(Pack { tiles: b.tiles(), src, k: lk, n: dk, dst: &mut *self.keys });
        self.finite = b.call(Finite(k)) && b.call(Finite(v));
    }

    /// `out = P V`, overwritten. What was packed is lost.
    pub fn forward(
        &mut self,
        b: B,
        rule: &PairRule<'_>,
        [q, k, v]: [View<'_, f32, 2>; 3],
        mut out: ViewMut<'_, f32, 2>,
    ) {
        let ([lq, s], [lk, e]) = (q.shape(), v.shape());
        if !(b.call(Finite(q)) && b.call(Finite(k)) && b.call(Finite(v))) {
            return careful::forward(b, self, rule, [q, k, v], out);
        }
        let ((keys, k_stride), (values, v_stride)) = (k.parts(), v.parts());
        let src = Source::Columns(keys, k_stride);
        b.call(Pack { tiles: b.scores(), src, k: s, n: lk, dst: &mut *self.score_keys });
        let src = Source::Rows(values, v_stride);
        b.call(Pack { tiles: b.tiles(), src, k: lk, n: e, dst: &mut *self.values });
        for first in (0..lq).step_by(ROWS) {
            let end = lq.min(first + ROWS);
            let (m, width) = (end - first, rule.seen(end - 1, lk));
            let stride = stride(width);
            if width > 0 {
                self.score(b, q.slice(0, first, end), width);
                let (rows, scores) = ([first, m], &mut *self.scores);
                b.call(WeighRows { rule, rows, width, stride, scores });
            }
            let left = Left::new(&*self.scores, Order::Rows(stride));
            let right = B::T::right(&*self.values, lk);
            let store = Store::new(out.reborrow().slice(0, first, end));
            let product = Gemm { m, k: width, n: e, left, right, store };
            gemm(b, b.tiles(), product, &mut Cut::new(&mut *self.products));
        }
    }

    /// Products of queries and the first `width` keys.
    fn score(&mut self, b: B, q: View<'_, f32, 2>, width: usize) {
        let ([m, s], stride) = (q.shape(), stride(width));
        let right = B::S::right(&*self.score_keys, s);
        let store = Store::new(square(self.scores, [m, width], stride));
        let product = Gemm { m, k: s, n: width, left: rows(q), right, store };
        gemm(b, b.scores(), product, &mut Cut::new(&mut *self.products));
    }

    /// The gradients of one head of queries against the keys that are packed.
    pub fn backward(&mut self, b: B, rule: &PairRule<'_>, x: PairInputs<'_>, to: PairGrads<'_>) {
        let (lq, lk) = (x.q.shape()[0], x.k.shape()[0]);
        if !(self.finite && b.call(Finite(x.q)) && b.call(Finite(x.dout))) {
            return careful::backward(b, self, rule, x, to);
        }
        let PairGrads { mut dq, mut dk, mut dv, mut bias } = to;
        for first in (0..lq).step_by(ROWS) {
            let end = lq.min(first + ROWS);
            let x =
                PairInputs { q: x.q.slice(0, first, end), dout: x.dout.slice(0, first, end), ..x };
            let width = rule.seen(end - 1, lk);
            let mut dq = dq.reborrow().slice(0, first, end);
            if width == 0 {
                (0..end - first).for_each(|r| dq.row_mut([r, 0]).fill(0.0));
                continue;
            }
            let dk = dk.reborrow().slice(0, 0, width);
            let dv = dv.reborrow().slice(0, 0, width);
            let to = PairGrads { dq, dk, dv, bias: bias.reborrow() };
            self.block(b, rule, x, to, [first, width]);
        }
    }

    /// The queries from `first` on, which see no key from `width` on.
    fn block(
        &mut self,
        b: B,
        rule: &PairRule<'_>,
        x: PairInputs<'_>,
        to: PairGrads<'_>,
        [first, width]: [usize; 2],
    ) {
        let PairInputs { q, v, dout, .. } = x;
        let ([m, s], [lk, e], t) = (q.shape(), v.shape(), b.tiles());
        let (stride, scale) = (stride(width), rule.scale);
        self.score(b, q, width);
        let products = &mut *self.products;
        let right = B::S::right(&*self.score_values, e);
        let store = Store::new(square(self.dp, [m, width], stride));
        let product = Gemm { m, k: e, n: width, left: rows(dout), right, store };
        gemm(b, b.scores(), product, &mut Cut::new(&mut *products));
        b.call(LinkRows {
            rule,
            rows: [first, m],
            width,
            stride,
            scores: &mut *self.scores,
            dp: &mut *self.dp,
            bias: to.bias,
        });
        let left = Left::new(&*self.dp, Order::Rows(stride));
        let right = B::T::right(&*self.keys, lk);
        let store = Store { alpha: scale, ..Store::new(to.dq) };
        let product = Gemm { m, k: width, n: s, left, right, store };
        gemm(b, t, product, &mut Cut::new(&mut *products));
        let parts = [(&*self.dp, q, to.dk, scale), (&*self.scores, dout, to.dv, 1.0)];
        for (data, src, out, alpha) in parts {
            let left = Left::new(data, Order::Columns(stride));
            let (data, row) = src.parts();
            let store = Store { alpha, keep: Keep::All, ..Store::new(out) };
            let sizes = [width, m, src.shape()[1]];
            let cut = &mut Cut::new(&mut *products);
            matmul(b, t, sizes, left, Source::Rows(data, row), store, cut);
        }
    }
}

/// A matrix whose rows lie `stride` apart.
fn square(data: &mut [f32], shape: [usize; 2], stride: usize) -> ViewMut<'_, f32, 2> {
    ViewMut::with_strides(data, shape, [stride, 1]).expect("planned size")
}
