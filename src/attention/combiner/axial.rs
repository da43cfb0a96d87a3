//! One head of the axial variants: segments are the rows of a table, and columns are sequences, too.

use super::fixed::Head;
use super::meet::{Finish, Meeting, Queries, Sees, Stage, every, q_stride, table};
use super::{CombinerConfig, KeySummary, Variant};
use crate::kernels::pool::Prefix;
use crate::scratch::Cut;
use crate::simd::Backend;
use crate::tensor::{Element, View};

/// Floats of the buffers of [`Table`], and of keys and values of the head.
pub(super) fn lens(c: &CombinerConfig, [n, dk, dv]: [usize; 3]) -> [usize; 17] {
    let (qs, w) = (q_stride(dk), c.segment.min(n).max(1));
    let mixture = c.variant == Variant::AxialMixture;
    let only = |len: usize| if mixture { len } else { 0 };
    let (rows, whole) = (n.div_ceil(w), n.next_multiple_of(w));
    let line = w.max(rows);
    [
        n * qs,
        n * dv,
        n,
        n,
        line,
        line,
        n * dk,
        n * dv,
        only(n * dk),
        only(n * dv),
        only(whole * dk),
        only(whole * dv),
        only(line * dk),
        only(2 * line * (dk + dv)),
        only(w * w),
        only(n * dk),
        only(n * dv),
    ]
}

/// Everything that is kept of one head while it is computed.
pub(super) struct Table<'a> {
    q: &'a mut [f32],
    acc: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    /// Maxima and sums of weights of one row or column of summaries.
    line_max: &'a mut [f32],
    line_sum: &'a mut [f32],
    /// Keys and values of summaries, one per token: of rows; of what is left, of what is right, of what is above.
    keys: &'a mut [f32],
    values: &'a mut [f32],
    right_keys: &'a mut [f32],
    right_values: &'a mut [f32],
    above_keys: &'a mut [f32],
    above_values: &'a mut [f32],
    /// Pooled queries of a row or column.
    pooled: &'a mut [f32],
    /// A row in reverse, and its summaries.
    mirror: &'a mut [f32],
    /// Hides the diagonal.
    diagonal: &'a mut [f32],
}

impl<'a> Table<'a> {
    pub fn new(
        c: &CombinerConfig,
        sizes: [usize; 3],
        cut: &mut Cut<'a>,
    ) -> (Self, [&'a mut [f32]; 2]) {
        let [
            q,
            acc,
            max,
            sum,
            line_max,
            line_sum,
            keys,
            values,
            right_keys,
            right_values,
            above_keys,
            above_values,
            pooled,
            mirror,
            diagonal,
            own_k,
            own_v,
        ] = lens(c, sizes).map(|n| cut.take(n));
        let table = Self {
            q,
            acc,
            max,
            sum,
            line_max,
            line_sum,
            keys,
            values,
            right_keys,
            right_values,
            above_keys,
            above_values,
            pooled,
            mirror,
            diagonal,
        };
        (table, [own_k, own_v])
    }

    /// All queries scaled, with nothing summed up.
    fn begin<B: Backend, E: Element>(&mut self, b: B, q: View<'_, E, 2>, scale: f32) {
        let [n, dk] = q.shape();
        b.call(Stage { src: q, scale, dst: &mut *self.q, stride: q_stride(dk) });
        self.acc.fill(0.0);
        self.max[..n].fill(f32::NEG_INFINITY);
        self.sum[..n].fill(0.0);
    }

    /// Every `step`-th query from `from` on, `rows` of them.
    fn queries(&mut self, [from, step, rows]: [usize; 3], [dk, dv]: [usize; 2]) -> Queries<'_> {
        let stride = q_stride(dk);
        Queries {
            q: &self.q[from * stride..],
            q_stride: step * stride,
            acc: &mut self.acc[from * dv..],
            acc_stride: step * dv,
            max: &mut self.max[from..],
            sum: &mut self.sum[from..],
            step,
            rows,
        }
    }
}

/// A summary per row of `q`: the expectation of values, written to `to`.
#[allow(clippy::too_many_arguments)] // queries, what they see, and where it goes
fn expect<B: Backend, E: Element>(
    b: B,
    work: &mut Meeting<'_, B>,
    [k, v]: [View<'_, E, 2>; 2],
    (q, q_stride): (&[f32], usize),
    sees: Sees<'_>,
    [max, sum]: [&mut [f32]; 2],
    (to, acc_stride): (&mut [f32], usize),
    rows: usize,
) {
    let dv = v.shape()[1];
    let mut queries = Queries { q, q_stride, acc: to, acc_stride, max, sum, step: 1, rows };
    queries.clear(dv);
    work.meet(b, [k, v], &mut queries, sees);
    for i in 0..rows {
        let sum = queries.sum[i];
        let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
        queries.acc[i * acc_stride..][..dv].iter_mut().for_each(|x| *x *= inverse);
    }
}

/// [`Variant::AxialRowMajor`]
pub(super) fn row_major<B: Backend, E: Element>(
    b: B,
    c: &CombinerConfig,
    summary: KeySummary,
    head: Head<'_, E>,
    room: &mut Table<'_>,
    work: &mut Meeting<'_, B>,
) {
    let Head { q, k, v, mut out, scale } = head;
    let (n, w, dk, dv) = (q.shape()[0], c.segment, work.dk, work.dv);
    let stride = q_stride(dk);
    room.begin(b, q, scale);
    for at in (0..n).step_by(w) {
        let m = w.min(n - at);
        let [k, v] = [k, v].map(|x| x.slice(0, at, at + m));
        let lines = [&mut *room.line_max, &mut *room.line_sum];
        let (queries, to) = ((&room.q[at * stride..], stride), (&mut room.values[at * dv..], dv));
        expect(b, work, [k, v], queries, Sees::All, lines, to, m);
        match summary {
            KeySummary::WeightedSum => {
                let lines = [&mut *room.line_max, &mut *room.line_sum];
                let to = (&mut room.keys[at * dk..], dk);
                expect(b, work, [k, k], queries, Sees::All, lines, to, m);
            }
            KeySummary::None => {
                let dst = &mut room.keys[at * dk..];
                b.call(Stage { src: k, scale: 1.0, dst, stride: dk });
            }
        }
        let sees = if c.causal { Sees::Before(1) } else { Sees::All };
        work.meet(b, [k, v], &mut room.queries([at, 1, m], [dk, dv]), sees);
    }
    for column in 0..w.min(n) {
        let rows = (n - column).div_ceil(w);
        let keys = every(table(&room.keys[..n * dk], dk), column, w);
        let values = every(table(&room.values[..n * dv], dv), column, w);
        let mut queries = Queries {
            q: &room.q[column * stride..],
            q_stride: w * stride,
            acc: &mut room.acc[column * dv..],
            acc_stride: w * dv,
            max: &mut room.max[column..],
            sum: &mut room.sum[column..],
            step: w,
            rows,
        };
        let sees = if c.causal { Sees::Before(0) } else { Sees::All };
        work.meet(b, [keys, values], &mut queries, sees);
    }
    let mut queries = room.queries([0, 1, n], [dk, dv]);
    b.call(Finish { queries: &mut queries, out: out.reborrow() });
}

/// Rows of `src` in reverse order.
fn reverse(src: View<'_, f32, 2>, dst: &mut [f32]) {
    let [n, width] = src.shape();
    for i in 0..n {
        dst[i * width..][..width].copy_from_slice(src.row([n - 1 - i, 0]));
    }
}

/// [`Variant::AxialMixture`], with keys and values staged in `own`.
pub(super) fn mixture<B: Backend, E: Element>(
    b: B,
    c: &CombinerConfig,
    head: Head<'_, E>,
    own: [&mut [f32]; 2],
    room: &mut Table<'_>,
    work: &mut Meeting<'_, B>,
) {
    let Head { q, mut out, scale, .. } = head;
    let (n, dk, dv) = (q.shape()[0], work.dk, work.dv);
    let w = c.segment.min(n);
    room.begin(b, q, scale);
    let [own_k, own_v] = own;
    for (src, dst) in [(head.k, &mut *own_k), (head.v, &mut *own_v)] {
        let stride = src.shape()[1];
        b.call(Stage { src, scale: 1.0, dst, stride });
    }
    let (k, v) = (table(&own_k[..n * dk], dk), table(&own_v[..n * dv], dv));
    for at in (0..n).step_by(w) {
        let m = w.min(n - at);
        let [k, v] = [k, v].map(|x| x.slice(0, at, at + m));
        work.meet(b, [k, v], &mut room.queries([at, 1, m], [dk, dv]), Sees::Before(1));
        if at + w < n {
            parts_of_row(b, [k, v], at, room, work);
        }
    }
    for column in 0..w {
        above(b, [k, v], [column, w, n.div_ceil(w)], room, work);
        let rows = (n - column).div_ceil(w);
        let mut queries = Queries {
            q: &room.q[column * q_stride(dk)..],
            q_stride: w * q_stride(dk),
            acc: &mut room.acc[column * dv..],
            acc_stride: w * dv,
            max: &mut room.max[column..],
            sum: &mut room.sum[column..],
            step: w,
            rows,
        };
        let [own_k, own_v] = [k, v].map(|x| every(x, column, w));
        work.meet(b, [own_k, own_v], &mut queries, Sees::Before(0));
        let parts = [
            (&*room.keys, &*room.values, column > 0),
            (&*room.right_keys, &*room.right_values, column + 1 < w),
        ];
        for (keys, values, _) in parts.into_iter().filter(|p| p.2) {
            let keys = every(table(&keys[..n * dk], dk), column, w);
            let values = every(table(&values[..n * dv], dv), column, w);
            work.meet(b, [keys, values], &mut queries, Sees::Before(0));
        }
    }
    room.diagonal.fill(0.0);
    (0..w).for_each(|i| room.diagonal[i * w + i] = f32::NEG_INFINITY);
    for at in (w..n).step_by(w) {
        let m = w.min(n - at);
        let hidden = View::new(&room.diagonal[..m * w], [1, m, w]).expect("rows of a square");
        let keys = table(&room.above_keys[at * dk..][..w * dk], dk);
        let values = table(&room.above_values[at * dv..][..w * dv], dv);
        let mut queries = Queries {
            q: &room.q[at * q_stride(dk)..],
            q_stride: q_stride(dk),
            acc: &mut room.acc[at * dv..],
            acc_stride: dv,
            max: &mut room.max[at..],
            sum: &mut room.sum[at..],
            step: 1,
            rows: m,
        };
        work.meet(b, [keys, values], &mut queries, Sees::Hidden(hidden));
    }
    let mut queries = room.queries([0, 1, n], [dk, dv]);
    b.call(Finish { queries: &mut queries, out: out.reborrow() });
}

/// Summaries of what is left and what is right of every column of one whole row. Those of nothing are never read.
fn parts_of_row<B: Backend>(
    b: B,
    [k, v]: [View<'_, f32, 2>; 2],
    at: usize,
    room: &mut Table<'_>,
    work: &mut Meeting<'_, B>,
) {
    let (m, dk, dv, stride) = (k.shape()[0], work.dk, work.dv, q_stride(work.dk));
    let pool = |src: &[f32], stride, out: &mut [f32]| {
        b.call(Prefix { src, stride, rows: m, width: dk, out });
    };
    pool(&room.q[at * stride..], stride, room.pooled);
    let lines = [&mut *room.line_max, &mut *room.line_sum];
    let to = (&mut room.values[at * dv..], dv);
    expect(b, work, [k, v], (&*room.pooled, dk), Sees::Before(0), lines, to, m);
    let (data, distance) = k.parts();
    pool(data, distance, &mut room.keys[at * dk..]);

    // What is right of a column is left of it in the mirror.
    let (q_back, rest) = room.mirror.split_at_mut(m * dk);
    let (k_back, rest) = rest.split_at_mut(m * dk);
    let (v_back, rest) = rest.split_at_mut(m * dv);
    let q = View::with_strides(&room.q[at * stride..], [m, dk], [stride, 1]);
    reverse(q.expect("queries of a row"), q_back);
    reverse(k, k_back);
    reverse(v, v_back);
    pool(q_back, dk, room.pooled);
    let lines = [&mut *room.line_max, &mut *room.line_sum];
    let mirrored = [table(k_back, dk), table(v_back, dv)];
    let summaries = &mut rest[..m * dv];
    let to = (&mut *summaries, dv);
    expect(b, work, mirrored, (&*room.pooled, dk), Sees::Before(0), lines, to, m);
    reverse(table(summaries, dv), &mut room.right_values[at * dv..]);
    pool(k_back, dk, room.pooled);
    reverse(table(&room.pooled[..m * dk], dk), &mut room.right_keys[at * dk..]);
}

/// Summaries of what is above every row of one column, for rows that have no such column, too: others see them.
fn above<B: Backend>(
    b: B,
    [k, v]: [View<'_, f32, 2>; 2],
    [column, w, rows]: [usize; 3],
    room: &mut Table<'_>,
    work: &mut Meeting<'_, B>,
) {
    let (dk, dv, stride) = (work.dk, work.dv, q_stride(work.dk));
    let [k, v] = [k, v].map(|x| every(x, column, w));
    let src = &room.q[column * stride..];
    b.call(Prefix { src, stride: w * stride, rows, width: dk, out: &mut *room.pooled });
    let lines = [&mut *room.line_max, &mut *room.line_sum];
    let to = (&mut room.above_values[column * dv..], w * dv);
    expect(b, work, [k, v], (&*room.pooled, dk), Sees::Before(0), lines, to, rows);
    let (src, stride) = k.parts();
    b.call(Prefix { src, stride, rows, width: dk, out: &mut *room.pooled });
    for (r, key) in room.pooled.chunks_exact(dk.max(1)).take(rows).enumerate() {
        room.above_keys[(column + r * w) * dk..][..dk].copy_from_slice(key);
    }
}
