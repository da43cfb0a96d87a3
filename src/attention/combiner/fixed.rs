//! One head of the fixed variant: segments of tokens, each summarised once.

use super::CombinerConfig;
use super::meet::{Finish, Meeting, Queries, Sees, Stage, q_stride, table};
use crate::kernels::pool::Gather;
use crate::scratch::Cut;
use crate::simd::Backend;
use crate::tensor::{Element, View, ViewMut};

/// Summaries of finished segments, and what is known of the open one.
pub(super) struct Open<'a> {
    /// `[.., dk]`
    pub keys: &'a mut [f32],
    /// `[.., dv]`
    pub values: &'a mut [f32],
    /// Keys and values of the open segment, `[w, dk]` and `[w, dv]`.
    pub own: [&'a mut [f32]; 2],
    /// Pooled queries and keys of it, `[2, dk]`.
    pub pools: &'a mut [f32],
    /// Tokens before the call.
    pub seen: usize,
    /// Whether more tokens may follow.
    pub keep: bool,
}

/// Floats of the buffers of [`Segment`]: queries, sums, maxima and sums of weights, a pooled query, a row.
pub(super) fn lens(segment: usize, [n, dk, dv]: [usize; 3]) -> [usize; 6] {
    let rows = segment.min(n);
    [rows * q_stride(dk), rows * dv, rows, rows, dk, dk.max(dv)]
}

/// Buffers for the queries of one segment.
pub(super) struct Segment<'a> {
    q: &'a mut [f32],
    acc: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    pooled: &'a mut [f32],
    row: &'a mut [f32],
}

impl<'a> Segment<'a> {
    pub fn new(segment: usize, sizes: [usize; 3], cut: &mut Cut<'a>) -> Self {
        let [q, acc, max, sum, pooled, row] = lens(segment, sizes).map(|n| cut.take(n));
        Self { q, acc, max, sum, pooled, row }
    }

    /// The queries of some tokens, with nothing summed up.
    fn queries<B: Backend, E: Element>(
        &mut self,
        b: B,
        q: View<'_, E, 2>,
        scale: f32,
        dv: usize,
    ) -> Queries<'_> {
        let ([rows, dk], src) = (q.shape(), q);
        let stride = q_stride(dk);
        b.call(Stage { src, scale, dst: &mut *self.q, stride });
        let mut queries = Queries {
            q: self.q,
            q_stride: stride,
            acc: self.acc,
            acc_stride: dv,
            max: self.max,
            sum: self.sum,
            step: 1,
            rows,
        };
        queries.clear(dv);
        queries
    }
}

/// One head of a call.
pub(super) struct Head<'a, E> {
    pub q: View<'a, E, 2>,
    pub k: View<'a, E, 2>,
    pub v: View<'a, E, 2>,
    pub out: ViewMut<'a, E, 2>,
    pub scale: f32,
}

/// The summary of a segment, from its pools and all of its keys and values.
fn summarise<B: Backend, E: Element>(
    b: B,
    c: &CombinerConfig,
    open: &mut Open<'_>,
    [s, fill, m]: [usize; 3],
    [k, v]: [View<'_, E, 2>; 2],
    room: &mut Segment<'_>,
    work: &mut Meeting<'_, B>,
) {
    let (dk, dv, factor) = (work.dk, work.dv, c.pool.factor(fill + m));
    let (query, key) = open.pools.split_at(dk);
    for (to, x) in room.pooled.iter_mut().zip(query) {
        *to = factor * x;
    }
    for (to, x) in open.keys[s * dk..][..dk].iter_mut().zip(key) {
        *to = factor * x;
    }
    let acc = &mut open.values[s * dv..][..dv];
    let (max, sum) = (&mut [0.0], &mut [0.0]);
    let mut one =
        Queries { q: room.pooled, q_stride: dk, acc, acc_stride: dv, max, sum, step: 1, rows: 1 };
    one.clear(dv);
    let [own_k, own_v] = &open.own;
    if fill > 0 {
        let before = [table(&own_k[..fill * dk], dk), table(&own_v[..fill * dv], dv)];
        work.meet(b, before, &mut one, Sees::All);
    }
    work.meet(b, [k, v], &mut one, Sees::All);
    let inverse = 1.0 / one.sum[0];
    one.acc.iter_mut().for_each(|x| *x *= inverse);
}

/// Pools of some rows, added to those of the open segment.
fn gather<B: Backend, E: Element>(
    b: B,
    c: &CombinerConfig,
    [q, k]: [View<'_, E, 2>; 2],
    scale: f32,
    open: &mut Open<'_>,
    buffer: &mut [f32],
) {
    let [n, dk] = q.shape();
    let (query, key) = open.pools.split_at_mut(dk);
    for (src, scale, into) in [(q, scale, query), (k, 1.0, key)] {
        b.call(Gather { src, rows: [0, n], scale, pool: c.pool, into, buffer: &mut *buffer });
    }
}

/// All tokens of a causal head, segment by segment.
pub(super) fn causal<B: Backend, E: Element>(
    b: B,
    c: &CombinerConfig,
    head: Head<'_, E>,
    mut open: Open<'_>,
    room: &mut Segment<'_>,
    work: &mut Meeting<'_, B>,
) {
    let Head { q, k, v, mut out, scale } = head;
    let (n, w, dk, dv) = (q.shape()[0], c.segment, work.dk, work.dv);
    let mut at = 0;
    while at < n {
        let (s, fill) = (open.seen / w, open.seen % w);
        let m = (w - fill).min(n - at);
        let [q, k, v] = [q, k, v].map(|x| x.slice(0, at, at + m));
        let mut queries = room.queries(b, q, scale, dv);
        let done = [table(&open.keys[..s * dk], dk), table(&open.values[..s * dv], dv)];
        work.meet(b, done, &mut queries, Sees::All);
        if fill > 0 {
            let [own_k, own_v] = &open.own;
            let before = [table(&own_k[..fill * dk], dk), table(&own_v[..fill * dv], dv)];
            work.meet(b, before, &mut queries, Sees::All);
        }
        work.meet(b, [k, v], &mut queries, Sees::Before(1));
        let out = out.reborrow().slice(0, at, at + m);
        b.call(Finish { queries: &mut queries, out });
        at += m;
        open.seen += m;
        if at == n && !open.keep {
            return;
        }
        if fill == 0 {
            open.pools.fill(c.pool.start());
        }
        gather(b, c, [q, k], scale, &mut open, room.row);
        if fill + m == w {
            summarise(b, c, &mut open, [s, fill, m], [k, v], room, work);
        } else {
            let [own_k, own_v] = &mut open.own;
            let (dst, stride) = (&mut own_k[fill * dk..], dk);
            b.call(Stage { src: k, scale: 1.0, dst, stride });
            let (dst, stride) = (&mut own_v[fill * dv..], dv);
            b.call(Stage { src: v, scale: 1.0, dst, stride });
        }
    }
}

/// All tokens of a head that see all segments.
pub(super) fn full<B: Backend, E: Element>(
    b: B,
    c: &CombinerConfig,
    head: Head<'_, E>,
    mut open: Open<'_>,
    room: &mut Segment<'_>,
    work: &mut Meeting<'_, B>,
) {
    let Head { q, k, v, mut out, scale } = head;
    let (n, w, dk, dv) = (q.shape()[0], c.segment, work.dk, work.dv);
    let part = |at: usize| [q, k, v].map(|x| x.slice(0, at, n.min(at.saturating_add(w))));
    let starts = || (0..n).step_by(w);
    for (s, at) in starts().enumerate() {
        let [q, k, v] = part(at);
        open.pools.fill(c.pool.start());
        gather(b, c, [q, k], scale, &mut open, room.row);
        summarise(b, c, &mut open, [s, 0, q.shape()[0]], [k, v], room, work);
    }
    let segments = n.div_ceil(w);
    let all = [table(&open.keys[..segments * dk], dk), table(&open.values[..segments * dv], dv)];
    for at in starts() {
        let [q, k, v] = part(at);
        let mut queries = room.queries(b, q, scale, dv);
        work.meet(b, all, &mut queries, Sees::All);
        work.meet(b, [k, v], &mut queries, Sees::All);
        let out = out.reborrow().slice(0, at, at + q.shape()[0]);
        b.call(Finish { queries: &mut queries, out });
    }
}
