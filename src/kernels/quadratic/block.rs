//! One block of queries against one block of keys: `A = A + act(scale Q K^T + factor bias) V`.

use super::{Area, Rule, ScoreRow, Scores, pack_keys, stride};
use crate::kernels::attend::{Plain, gather};
use crate::kernels::gemm::output;
use crate::kernels::staging::{finite_rows, rows_of, stage};
use crate::kernels::store::{Keep, Store};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Kernel, Left, Order, Product, Term, Tiles};
use crate::tensor::{Element, View, ViewMut};

/// Queries of a block: their scores stay in the second cache level while the values pass by.
pub const ROWS: usize = 96;
/// Keys of a block: enough that sums are written and read again rarely.
pub const KEYS: usize = 512;
/// Up to this many queries keys and values are read as they lie: packing them would cost more.
pub const FEW: usize = 4;

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;
type ScoreElem<B> = <<B as Backend>::S as Tiles>::Elem;

/// Sizes that decide how much scratch a block takes.
#[derive(Clone, Copy, Debug)]
pub struct QuadraticShape {
    /// Queries of a call.
    pub queries: usize,
    /// Keys of a call.
    pub keys: usize,
    /// Width of queries and keys.
    pub s: usize,
    /// Width of values.
    pub e: usize,
    /// Whether keys and values are copied as `f32` first.
    pub copied: bool,
}

impl QuadraticShape {
    /// Lengths of the buffers of [`QuadraticWork`], in order: floats, those of the engine for scores, of the other.
    fn lens<B: Backend>(&self) -> ([usize; 5], [usize; 2], [usize; 2]) {
        let Self { s, e, copied, .. } = *self;
        let (m, n) = (self.queries.min(ROWS), self.keys.min(KEYS));
        let packed = |len: usize| if self.queries > FEW { len } else { 0 };
        let copy = |len: usize| if copied { len } else { 0 };
        (
            [m * stride(n), s, copy(n * s), copy(n * e), e],
            [packed(B::S::right_len(s, n)), packed(<B::S as Tiles>::left_len(m, s))],
            [packed(B::T::right_len(n, e)), packed(<B::T as Tiles>::left_len(m, n))],
        )
    }

    /// Bytes of a [`QuadraticWork`].
    #[must_use]
    pub fn bytes<B: Backend>(&self) -> usize {
        let (floats, scores, packed) = self.lens::<B>();
        floats.map(bytes_of::<f32>).iter().sum::<usize>()
            + scores.map(bytes_of::<ScoreElem<B>>).iter().sum::<usize>()
            + packed.map(bytes_of::<Elem<B>>).iter().sum::<usize>()
    }
}

/// Buffers for one block at a time.
pub struct QuadraticWork<'a, B: Backend> {
    scores: &'a mut [f32],
    query: &'a mut [f32],
    /// Copied keys, `n x s`.
    pub keys_plain: &'a mut [f32],
    /// Copied values, `n x e`.
    pub values_plain: &'a mut [f32],
    row: &'a mut [f32],
    keys: &'a mut [ScoreElem<B>],
    left_scores: &'a mut [ScoreElem<B>],
    values: &'a mut [Elem<B>],
    left_p: &'a mut [Elem<B>],
    // Dropped in this order: the later session goes first.
    session: <B::T as Tiles>::Session,
    score_session: <B::S as Tiles>::Session,
}

impl<'a, B: Backend> QuadraticWork<'a, B> {
    /// Cuts the buffers off `scratch`.
    pub fn new(b: B, shape: QuadraticShape, scratch: &mut Cut<'a>) -> Self {
        let (floats, of_scores, packed) = shape.lens::<B>();
        let [scores, query, keys_plain, values_plain, row] = floats.map(|n| scratch.take(n));
        let [keys, left_scores] = of_scores.map(|n| scratch.take(n));
        let [values, left_p] = packed.map(|n| scratch.take(n));
        Self {
            scores,
            query,
            keys_plain,
            values_plain,
            row,
            keys,
            left_scores,
            values,
            left_p,
            score_session: b.scores().session(),
            session: b.tiles().session(),
        }
    }
}

impl<B: Backend> core::fmt::Debug for QuadraticWork<'_, B> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("QuadraticWork").finish_non_exhaustive()
    }
}

/// Queries against a block of keys.
#[derive(Debug)]
pub struct KeyBlock<'a, 'w, B: Backend, E, K> {
    /// How scores are formed.
    pub rule: Rule<'w>,
    /// `[rows, s]`
    pub q: View<'w, E, 2>,
    /// `[n, s]`
    pub k: View<'w, K, 2>,
    /// `[n, e]`
    pub v: View<'w, K, 2>,
    /// Position of the first query and of the first key.
    pub at: [usize; 2],
    /// Whether there are few queries in the whole call.
    pub few: bool,
    /// Buffers.
    pub work: &'w mut QuadraticWork<'a, B>,
    /// `rows x e`, to be added to.
    pub acc: &'w mut [f32],
}

impl<B: Backend, E: Element, K: Element> Kernel<B> for KeyBlock<'_, '_, B, E, K> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let KeyBlock { rule, q, k, v, at: [query, key], few, work, acc } = self;
        let ([rows, _], [n, e], t) = (q.shape(), v.shape(), b.tiles());
        if few {
            for (r, acc) in acc.chunks_exact_mut(e).enumerate() {
                let area = Area { m: 1, n, query: query + r, key };
                let scores = &mut work.scores[..area.seen(rule.causal, 0)];
                let (q, query, keys) =
                    (q.slice(0, r, r + 1), &mut *work.query, &mut *work.keys_plain);
                ScoreRow { rule, area, q, k, query, keys, out: &mut *scores }.write(b);
                let (data, stride) = stage(b, v, [0, scores.len()], work.values_plain);
                gather(b.lanes(), scores, Plain { data, stride }, None, 1.0, acc);
            }
            return;
        }
        pack_keys(b, k, work.keys);
        t.pack_right(b, rows_of(v, 0), n, e, work.values);
        let finite = if rule.causal { finite_before(b, v) } else { n };
        for first in (0..rows).step_by(ROWS) {
            let m = ROWS.min(rows - first);
            let mut area = Area { m, n, query: query + first, key };
            area.n = area.seen(rule.causal, m - 1);
            if area.n == 0 {
                continue;
            }
            Scores {
                rule,
                area,
                q: q.slice(0, first, first + m),
                keys: &*work.keys,
                session: &work.score_session,
                left: &mut *work.left_scores,
                out: &mut *work.scores,
            }
            .run(b);
            let acc = &mut acc[first * e..][..m * e];
            if area.n > finite {
                // A value that is not finite would reach earlier rows as 0 * inf; row by row it cannot.
                for (r, acc) in acc.chunks_exact_mut(e).enumerate() {
                    let seen = area.seen(rule.causal, r);
                    let scores = &work.scores[r * stride(area.n)..][..seen];
                    for j in 0..seen {
                        let (row, _) = stage(b, v, [j, 1], work.row);
                        let one = Plain { data: row, stride: e };
                        gather(b.lanes(), &scores[j..=j], one, None, 1.0, acc);
                    }
                }
                continue;
            }
            let left = Left::new(&*work.scores, Order::Rows(stride(area.n)));
            let left = t.pack_left(b, left, None, m, area.n, work.left_p);
            let second = Some(Term { left, right: B::T::right(work.values, n), k: area.n });
            let causal = area.lower(rule.causal);
            let p = Product { m, n: e, first: None, second, causal, lower: false };
            let mut store = Store { keep: Keep::All, ..Store::new(output(acc, m, e)) };
            t.product(b, &work.session, &p, &mut store);
        }
    }
}

/// How many rows come before the first with an element that is not finite.
#[inline(always)]
fn finite_before<B: Backend, K: Element>(b: B, v: View<'_, K, 2>) -> usize {
    let n = v.shape()[0];
    if finite_rows(b, v, [0, n]) {
        return n;
    }
    let mut j = 0;
    while j < n && finite_rows(b, v, [j, 1]) {
        j += 1;
    }
    j
}

/// Sums on their way to an output of any element type.
#[derive(Debug)]
pub struct Finish<'a, E> {
    /// `rows x e`
    pub acc: &'a [f32],
    /// `[rows, e]`
    pub out: ViewMut<'a, E, 2>,
}

impl<B: Backend, E: Element> Kernel<B> for Finish<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let [rows, e] = self.out.shape();
        for (r, acc) in self.acc.chunks_exact(e).take(rows).enumerate() {
            E::narrow(b.convert(), acc, self.out.row_mut([r, 0]));
        }
    }
}
