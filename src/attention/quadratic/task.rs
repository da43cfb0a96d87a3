//! The work of one call, divided between threads.
//!
//! Rows of the result are independent of each other: any division of the queries gives the same bits. A span of
//! queries keeps its sums in scratch while blocks of keys and values, packed once, pass by.

use super::{Extra, QuadraticAttention};
use crate::error::Result;
use crate::kernels::mixed_chunk::StageKeys;
use crate::kernels::quadratic::{
    FEW, Finish, KEYS, KeyBlock, QuadraticShape, QuadraticWork, ROWS, Rule,
};
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Task};
use crate::tensor::{Element, View, ViewMut};

/// Queries that share one pass over the keys: whole blocks, so that blocks do not depend on the division.
const SPAN: usize = 22 * ROWS;

/// Some batch rows, or some queries, of a call.
struct Job<'a, E> {
    op: QuadraticAttention,
    q: View<'a, E, 3>,
    k: View<'a, E, 3>,
    v: View<'a, E, 3>,
    out: ViewMut<'a, E, 3>,
    extra: Extra<'a>,
    /// Position of the first query.
    first: usize,
    few: bool,
    by_batch: bool,
}

impl<E: Element> Job<'_, E> {
    fn shape(&self) -> QuadraticShape {
        let ([_, queries, s], [_, keys, e]) = (self.q.shape(), self.v.shape());
        let copied = self.extra.key_mask.is_some() || E::as_f32(&[]).is_none();
        QuadraticShape {
            queries: if self.few { 1 } else { queries.max(FEW + 1) },
            keys,
            s,
            e,
            copied,
        }
    }

    /// Keys that the queries before row `n` see together, block by block.
    fn seen(&self, n: usize) -> usize {
        let lk = self.k.shape()[1];
        let of = |at: usize| if self.op.causal { self.first + at + ROWS } else { lk };
        (0..n).step_by(ROWS).map(of).fold(0, usize::saturating_add)
    }
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        let [batch, lq, _] = self.q.shape();
        if self.by_batch { batch } else { self.seen(lq) }
    }

    fn flops(&self) -> usize {
        let ([batch, lq, s], [_, lk, e]) = (self.q.shape(), self.v.shape());
        [batch, lq, lk, s.saturating_add(e)].iter().fold(2, |a: usize, n| a.saturating_mul(*n))
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let [batch, lq, _] = self.q.shape();
        let (axis, at, end) = if self.by_batch {
            (0, mid, batch)
        } else {
            let mut at = 0;
            while at < lq && self.seen(at) < mid {
                at += ROWS;
            }
            (1, at.min(lq), lq)
        };
        let (near, far) = self.out.split_at(axis, at);
        let part = |from: usize, to: usize, out| {
            let (mut k, mut v, mut extra, mut first) = (self.k, self.v, self.extra, self.first);
            if self.by_batch {
                (k, v) = (k.slice(0, from, to), v.slice(0, from, to));
                extra.key_mask = extra.key_mask.map(|m| m.slice(0, from, to));
            } else {
                first += from;
            }
            Job { q: self.q.slice(axis, from, to), k, v, out, extra, first, ..self }
        };
        (part(0, at, near), part(at, end, far))
    }
}

/// All rows of a part.
fn work<B: Backend, E: Element>(b: B, mut job: Job<'_, E>, mut scratch: Cut<'_>) {
    let ([batch, lq, _], [_, lk, e], op) = (job.q.shape(), job.v.shape(), job.op);
    let rule = Rule {
        act: op.act,
        scale: op.scale.of(lk),
        factor: op.bias_scale.of(lk),
        bias: job.extra.bias,
        causal: op.causal,
    };
    let acc = scratch.take::<f32>(lq.min(SPAN) * e);
    let mut work = QuadraticWork::<B>::new(b, job.shape(), &mut scratch);
    for n in 0..batch {
        let one = "one batch row";
        let [q, k, v] =
            [job.q, job.k, job.v].map(|x| x.slice(0, n, n + 1).merge_rows().expect(one));
        let mut out = job.out.reborrow().slice(0, n, n + 1).merge_rows().expect(one);
        let mask = job.extra.key_mask.map(|m| m.row([n, 0]));
        for from in (0..lq).step_by(SPAN) {
            let to = lq.min(from + SPAN);
            let (q, acc) = (q.slice(0, from, to), &mut acc[..(to - from) * e]);
            acc.fill(0.0);
            let end = if op.causal { job.first + to } else { lk };
            for key in (0..end).step_by(KEYS) {
                let rows = [key, end.min(key + KEYS)];
                let [k, v] = [k, v].map(|x| x.slice(0, rows[0], rows[1]));
                let (at, few) = ([job.first + from, key], job.few);
                let Some(mask) = mask else {
                    let (work, acc) = (&mut work, &mut *acc);
                    b.call_tiles(KeyBlock { rule, q, k, v, at, few, work, acc });
                    continue;
                };
                hidden(b, [k, v], &mask[rows[0]..rows[1]], &mut work, |k, v, work| {
                    let acc = &mut *acc;
                    b.call_tiles(KeyBlock { rule, q, k, v, at, few, work, acc });
                });
            }
            let out = out.reborrow().slice(0, from, to);
            b.call(Finish { acc: &*acc, out });
        }
    }
}

/// Runs `then` on copies of keys and values with zeros where they do not count.
fn hidden<B: Backend, E: Element>(
    b: B,
    [k, v]: [View<'_, E, 2>; 2],
    mask: &[bool],
    work: &mut QuadraticWork<'_, B>,
    then: impl FnOnce(View<'_, f32, 2>, View<'_, f32, 2>, &mut QuadraticWork<'_, B>),
) {
    let keys = core::mem::take(&mut work.keys_plain);
    let values = core::mem::take(&mut work.values_plain);
    for (src, dst) in [(k, &mut *keys), (v, &mut *values)] {
        let dst = ViewMut::new(&mut dst[..src.shape()[0] * src.shape()[1]], src.shape());
        b.call(StageKeys { k: src, mask: Some(mask), dst: dst.expect("planned size") });
    }
    let [nk, nv] = [k, v].map(|x| x.shape()[0] * x.shape()[1]);
    then(
        View::new(&keys[..nk], k.shape()).expect("planned size"),
        View::new(&values[..nv], v.shape()).expect("planned size"),
        work,
    );
    (work.keys_plain, work.values_plain) = (keys, values);
}

/// A call, ready to be dispatched.
struct Forward<'r, 'a, E> {
    rt: &'r Runtime,
    job: Job<'a, E>,
}

impl<E: Element> Task for Forward<'_, '_, E> {
    type Output = Result<()>;
    fn run<B: Backend>(self, b: B) -> Result<()> {
        let ([_, lq, _], [.., e]) = (self.job.q.shape(), self.job.v.shape());
        let bytes = bytes_of::<f32>(lq.min(SPAN) * e) + self.job.shape().bytes::<B>();
        self.rt.divide(self.job, bytes, &|job, cut| work(b, job, cut))
    }
}

/// Runs a checked call.
pub(super) fn run<E: Element>(
    rt: &Runtime,
    op: QuadraticAttention,
    [q, k, v]: [View<'_, E, 3>; 3],
    out: ViewMut<'_, E, 3>,
    extra: Extra<'_>,
) -> Result<()> {
    let ([batch, lq, _], [_, lk, _], threads) = (q.shape(), k.shape(), rt.threads());
    let by_batch = batch.is_multiple_of(threads) || batch >= 8 * threads;
    let first = if op.causal { lk - lq } else { 0 };
    let few = lq <= FEW;
    rt.run(Forward { rt, job: Job { op, q, k, v, out, extra, first, few, by_batch } })
}

/// Scratch of one part.
pub(super) fn scratch_bytes(rt: &Runtime, [queries, keys, s, e]: [usize; 4]) -> usize {
    struct Ask(QuadraticShape);
    impl Task for Ask {
        type Output = usize;
        fn run<B: Backend>(self, _: B) -> usize {
            self.0.bytes::<B>()
        }
    }
    let shape = QuadraticShape { queries: queries.max(FEW + 1), keys, s, e, copied: true };
    bytes_of::<f32>(queries.min(SPAN) * e) + rt.run(Ask(shape))
}
