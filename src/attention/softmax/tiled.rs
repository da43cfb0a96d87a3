//! The work of one call, divided between threads.
//!
//! The queries that share keys (all positions of all heads of a group) are numbered position by position and
//! cut into spans. A span keeps its running sums in scratch memory while blocks of keys and values are packed
//! one after the other and meet all blocks of queries of the span. What a row of the result goes through does
//! not depend on its neighbours, so that any division of the queries gives the same bits.

use super::Extra;
use super::job::{Axis, Job};
use super::work::{Shape, Work};
use crate::error::Result;
use crate::kernels::attend::{
    Attend, Bias, Block, KEYS, Keys, PackKeys, Plain, ROWS, StageKeys, Values,
};
use crate::kernels::softmax::{Online, Visible, scale_row};
use crate::runtime::Runtime;
use crate::scratch::Cut;
use crate::simd::{Backend, Kernel, Task};
use crate::tensor::{Element, View, ViewMut};

/// Rows that share one pass over the keys.
const SPAN: usize = 22 * ROWS;
/// Up to this many rows per group of heads, keys are read as they lie: packing them would cost more.
const FEW: usize = 8;

/// What the scratch of a job depends on.
fn shape_of<E: Element>(job: &Job<'_, E>) -> Shape {
    let ([_, lq, heads, dk], [.., dv]) = (job.q.shape(), job.v.shape());
    let rows = lq.saturating_mul(heads).min(SPAN);
    Shape { rows, dk, dv, few: job.few }
}

/// Rows `first .. first + rows` of the group that shares key head `kv` of batch row `batch`.
#[derive(Clone, Copy)]
struct Span {
    batch: usize,
    kv: usize,
    group: usize,
    first: usize,
    rows: usize,
}

impl Span {
    /// Where row `r` lies in a `[batch, len, heads, dim]` view.
    #[inline(always)]
    fn at(&self, r: usize) -> [usize; 4] {
        let r = self.first + r;
        [self.batch, r / self.group, self.kv * self.group + r % self.group, 0]
    }
}

/// Scaled queries of a span as `f32` rows.
struct StageQueries<'a, E> {
    q: View<'a, E, 4>,
    span: Span,
    scale: f32,
    dst: &'a mut [f32],
    stride: usize,
}

impl<B: Backend, E: Element> Kernel<B> for StageQueries<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let dk = self.q.shape()[3];
        if dk == 0 {
            return;
        }
        for r in 0..self.span.rows {
            let row = &mut self.dst[r * self.stride..][..dk];
            E::widen(b.convert(), self.q.row(self.span.at(r)), row);
            scale_row(b.lanes(), row, self.scale);
        }
    }
}

/// `out = acc / sum` for the rows of a span, 0 where nothing was seen.
struct Finish<'a, E> {
    acc: &'a mut [f32],
    sum: &'a [f32],
    span: Span,
    out: ViewMut<'a, E, 4>,
}

impl<B: Backend, E: Element> Kernel<B> for Finish<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let dv = self.out.shape()[3];
        for (r, row) in self.acc.chunks_exact_mut(dv).take(self.span.rows).enumerate() {
            let sum = self.sum[r];
            scale_row(b.lanes(), row, if sum == 0.0 { 0.0 } else { 1.0 / sum });
            E::narrow(b.convert(), row, self.out.row_mut(self.span.at(r)));
        }
    }
}

/// All rows of a job.
fn work<B: Backend, E: Element>(b: B, mut job: Job<'_, E>, mut scratch: Cut<'_>) {
    let ([batch, lq, ..], kv_heads, group) = (job.q.shape(), job.k.shape()[2], job.group());
    let shape = shape_of(&job);
    let mut work = Work::<B>::new(b, shape, &mut scratch);
    let (rows, long) = (lq * group, shape.rows.max(1));
    for batch in 0..batch {
        for kv in 0..kv_heads {
            for first in (0..rows).step_by(long) {
                let rows = long.min(rows - first);
                span(b, &mut job, Span { batch, kv, group, first, rows }, shape, &mut work);
            }
        }
    }
}

fn span<B: Backend, E: Element>(
    b: B,
    job: &mut Job<'_, E>,
    span: Span,
    shape: Shape,
    work: &mut Work<'_, B>,
) {
    let Span { batch, kv, group, rows, .. } = span;
    let (Shape { dk, dv, few, .. }, q_stride) = (shape, shape.q_stride());
    let (k, v) = (job.k.head(batch, kv), job.v.head(batch, kv));
    b.call(StageQueries { q: job.q, span, scale: job.scale, dst: &mut *work.q, stride: q_stride });
    work.acc[..rows * dv].fill(0.0);
    work.max[..rows].fill(f32::NEG_INFINITY);
    work.sum[..rows].fill(0.0);
    let limit = |r: usize| job.limit((span.first + r) / group);
    let end = limit(rows - 1);
    // An empty mask has no rows to look at.
    let mask = job.extra.key_mask.filter(|_| end > 0).map(|m| m.row([batch, 0]));
    let mut at = 0;
    while at < end {
        let (block, next) = Block::next(mask, [at, end], KEYS, work.list);
        at = next;
        if block.is_empty() {
            continue;
        }
        let (staged, staged_values) = (&mut *work.staged, &mut *work.staged_values);
        let (keys, values) = if few {
            let (k, v) = b.call(StageKeys { k, v, block, keys: staged, values: staged_values });
            (Keys::Plain(k), Values::Plain(v))
        } else {
            let (keys, values) = (&mut *work.keys, &mut *work.values);
            let pack = PackKeys {
                k,
                v,
                block,
                staged: &mut *staged,
                keys: &mut *keys,
                values: &mut *values,
            };
            let finite = b.call_tiles(pack);
            let plain = Values::Plain(Plain { data: staged, stride: dv });
            (Keys::Packed(&*keys), if finite { Values::Packed(&*values) } else { plain })
        };
        for from in (0..rows).step_by(ROWS) {
            let to = rows.min(from + ROWS);
            let width = block.before(limit(to - 1));
            if width == 0 {
                continue;
            }
            let visible = if block.before(limit(from)) == width {
                Visible::All(width)
            } else {
                for (n, r) in work.visible.iter_mut().zip(from..to) {
                    *n = block.before(limit(r));
                }
                Visible::Rows(&*work.visible, width)
            };
            let bias = job.extra.bias.map(|all| Bias {
                all,
                head: kv * group,
                group,
                first: span.first + from,
            });
            b.call_tiles(Attend {
                q: &work.q[from * q_stride..],
                q_stride,
                dk,
                dv,
                block,
                keys,
                values,
                visible,
                bias,
                online: Online {
                    max: &mut work.max[from..to],
                    sum: &mut work.sum[from..to],
                    factor: &mut *work.factor,
                },
                acc: &mut work.acc[from * dv..to * dv],
                acc_stride: dv,
                scores: &mut *work.scores,
                score_session: &work.score_session,
                session: &work.session,
                left_q: &mut *work.left_q,
                left_p: &mut *work.left_p,
            });
        }
    }
    b.call(Finish { acc: &mut *work.acc, sum: &*work.sum, span, out: job.out.reborrow() });
}

/// A call, ready to be dispatched.
struct Forward<'r, 'a, E> {
    rt: &'r Runtime,
    job: Job<'a, E>,
}

impl<E: Element> Task for Forward<'_, '_, E> {
    type Output = Result<()>;
    fn run<B: Backend>(self, b: B) -> Result<()> {
        let bytes = shape_of(&self.job).bytes::<B>();
        self.rt.divide(self.job, bytes, &|job, cut| work(b, job, cut))
    }
}

/// Runs a checked call with something to write.
pub(super) fn run<E: Element>(
    rt: &Runtime,
    [q, k, v]: [View<'_, E, 4>; 3],
    out: ViewMut<'_, E, 4>,
    extra: Extra<'_>,
    scale: f32,
    offset: Option<isize>,
) -> Result<()> {
    let ([batch, lq, heads, _], [_, _, kv_heads, _]) = (q.shape(), k.shape());
    let (threads, few) = (rt.threads(), lq.saturating_mul(heads / kv_heads.max(1)) <= FEW);
    // Whole heads pack their keys once; queries can always be shared out evenly.
    let even = |n: usize| n.is_multiple_of(threads) || n >= 8 * threads;
    let axis = if even(kv_heads) {
        Axis::Heads
    } else if even(batch) || (few && batch > 1) {
        Axis::Batch
    } else if few {
        Axis::Heads
    } else {
        Axis::Queries
    };
    rt.run(Forward { rt, job: Job { q, k, v, out, extra, scale, offset, few, axis } })
}

/// Scratch of one part of a long call.
pub(super) fn scratch_bytes(rt: &Runtime, dk: usize, dv: usize) -> usize {
    struct Ask(Shape);
    impl Task for Ask {
        type Output = usize;
        fn run<B: Backend>(self, _: B) -> usize {
            self.0.bytes::<B>()
        }
    }
    rt.run(Ask(Shape { rows: SPAN, dk, dv, few: false }))
}
