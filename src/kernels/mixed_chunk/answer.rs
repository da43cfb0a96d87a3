//! Queries of a chunk.

use super::absorb::add;
use super::operands::keys_left;
use super::row::Row;
use super::{Absorb, COLUMNS, FEW, Keys, MixedWork, ROWS, Values};
use crate::kernels::ahead::{Ahead, Meanwhile, Part};
use crate::kernels::quadratic::{Area, Rule, ScoreRow, Scores, pack_keys, stride};
use crate::kernels::store::Narrow;
use crate::simd::{Backend, Kernel, Left, Order, PANEL, Product, Term, Tiles};
use crate::tensor::{Element, View, ViewMut};

/// Answers queries of a chunk, as the top of the folder says.
#[derive(Debug)]
pub struct Chunk<'a, 'w, B: Backend, E> {
    /// How scores are formed.
    pub rule: Rule<'w>,
    /// Position of the first query inside of the chunk.
    pub first: usize,
    /// `[m, s]`
    pub quad_q: View<'w, E, 2>,
    /// `[m, s]`
    pub lin_q: View<'w, E, 2>,
    /// `[n, s]`
    pub quad_k: Keys<'w, E>,
    /// `[n, s]`
    pub lin_k: Keys<'w, E>,
    /// `[n, e]`
    pub v: Values<'w, E>,
    /// Number of keys.
    pub n: usize,
    /// Factor of what is read from the sum; nothing is read without one.
    pub read: Option<f32>,
    /// Whether the chunk is added to the sum at the end.
    pub add: bool,
    /// Buffers.
    pub work: &'w mut MixedWork<'a, B>,
    /// `S` in panels.
    pub sum: &'w mut [f32],
    /// `[m, e]`
    pub out: ViewMut<'w, E, 2>,
}

impl<B: Backend, E: Element> Kernel<B> for Chunk<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let ([m, _], [_, e], causal) = (self.quad_q.shape(), self.out.shape(), self.rule.causal);
        if m > FEW {
            match self.quad_k {
                Keys::Given(k) => pack_keys(b, k, self.work.keys),
                Keys::Plain(k) => pack_keys(b, k, self.work.keys),
            }
            for at in (0..m).step_by(ROWS) {
                let rows = ROWS.min(m - at);
                self.block(b, [at, rows], self.add && at + rows == m);
            }
            return;
        }
        for r in 0..m {
            let n = if causal { self.first + r + 1 } else { self.n };
            self.alone(b, r, n);
        }
        if self.add {
            let Chunk { lin_k, v, n, work, sum, .. } = self;
            Absorb { lin_k, v, n, e, work, sum }.run(b);
        }
    }
}

impl<B: Backend, E: Element> Chunk<'_, '_, B, E> {
    /// Rows `at .. at + m`; then the chunk is added to the sum if asked.
    #[inline(always)]
    fn block(&mut self, b: B, [at, m]: [usize; 2], add_up: bool) {
        let (t, causal, read, v) = (b.tiles(), self.rule.causal, self.read, self.v);
        let ([_, s], [_, e]) = (self.lin_q.shape(), self.out.shape());
        let n = if causal { self.first + at + m } else { self.n };
        let area = Area { m, n, query: self.first + at, key: 0 };
        let work = &mut *self.work;
        Scores {
            rule: self.rule,
            area,
            q: self.quad_q.slice(0, at, at + m),
            keys: &*work.keys,
            session: &work.score_session,
            left: &mut *work.left_scores,
            out: &mut *work.scores,
        }
        .run(b);
        work.factors[..m].fill(read.unwrap_or(0.0));
        let (scores, factors) = (&*work.scores, &work.factors[..m]);
        let lin_q = self.lin_q.slice(0, at, at + m);
        let left_p = Left::new(scores, Order::Rows(stride(n)));
        let left_p = t.pack_left(b, left_p, None, m, n, work.left_p);
        let (data, row) = lin_q.parts();
        let left_q = t.pack_left(b, Left::new(data, Order::Rows(row)), None, m, s, work.left_q);
        let left_k = add_up.then(|| keys_left(b, self.lin_k, [n, s], work.left_k));
        let mut out = self.out.reborrow().slice(0, at, at + m);
        for j in (0..e).step_by(COLUMNS) {
            let w = COLUMNS.min(e - j);
            v.pack(b, n, [j, w], work.values);
            let next = out.reborrow().slice(1, e.min(j + w), e.min(j + w + COLUMNS));
            let parts = [v.ahead(n, j + w), Part::of_mut(&next, [0, m])];
            let taken = m + if add_up { s } else { 0 };
            let mut ahead = Ahead::new(parts, taken * w.div_ceil(PANEL));
            for c in (j..j + w).step_by(PANEL) {
                let width = PANEL.min(j + w - c);
                let right = v.panel(b, n, [c - j, c], width, work.values, work.view_v);
                let second = Term { left: left_p, right, k: n };
                if causal && !v.finite(b, n, [c, width]) {
                    // A value that is not finite would reach earlier rows as 0 * inf; row by row it cannot.
                    for r in 0..m {
                        Row {
                            read: read.map(|f| (f, lin_q.slice(0, r, r + 1), &*self.sum)),
                            scores: &scores[r * stride(n)..][..area.seen(true, r)],
                            v,
                            columns: [c, width],
                            buffers: [&mut *work.query, &mut *work.staged, &mut *work.out],
                            out: out.row_mut([r, 0]),
                        }
                        .write(b);
                    }
                } else {
                    let first = read.map(|_| {
                        let panel = &self.sum[c * s..][..PANEL * s];
                        let right = t.view_right(b, panel, s, width, &mut *work.view_s);
                        (Term { left: left_q, right, k: s }, factors)
                    });
                    let causal = area.lower(causal);
                    let p =
                        Product { m, n: width, first, second: Some(second), causal, lower: false };
                    let out = out.reborrow().slice(1, c, c + width);
                    let sink = Narrow { out, convert: b.convert(), scale: None };
                    t.product(b, &work.session, &p, &mut Meanwhile { sink, ahead: &mut ahead });
                }
                if let Some(left) = left_k {
                    let sum = &mut self.sum[c * s..][..PANEL * s];
                    add(b, [s, width], Term { left, ..second }, sum, &work.session, &mut ahead);
                }
            }
        }
    }

    /// Row `r`, which sees `n` keys, without packing anything.
    #[inline(always)]
    fn alone(&mut self, b: B, r: usize, n: usize) {
        let area = Area { m: 1, n, query: self.first + r, key: 0 };
        let (rule, q) = (self.rule, self.quad_q.slice(0, r, r + 1));
        let MixedWork { query, staged, scores, out: y, .. } = &mut *self.work;
        let (out, keys) = (&mut scores[..n], &mut **staged);
        match self.quad_k {
            Keys::Given(k) => ScoreRow { rule, area, q, k, query, keys, out }.write(b),
            Keys::Plain(k) => ScoreRow { rule, area, q, k, query, keys, out }.write(b),
        }
        let e = self.out.shape()[1];
        for j in (0..e).step_by(COLUMNS) {
            Row {
                read: self.read.map(|f| (f, self.lin_q.slice(0, r, r + 1), &*self.sum)),
                scores: &scores[..n],
                v: self.v,
                columns: [j, COLUMNS.min(e - j)],
                buffers: [&mut *query, &mut *staged, &mut *y],
                out: self.out.row_mut([r, 0]),
            }
            .write(b);
        }
    }
}
