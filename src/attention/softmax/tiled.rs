//! The work of one call, divided between threads.
//!
//! The queries that share keys (all positions of all heads of a group) are numbered position by position and
//! cut into spans. A span keeps its running sums in scratch memory while blocks of keys and values are packed
//! one after the other and meet all blocks of queries of the span. What a row of the result goes through does
//! not depend on its neighbours, so that any division of the queries gives the same bits.

use super::Extra;
use crate::error::Result;
use crate::kernels::attend::{
    Attend, Bias, Block, KEYS, Keys, PackKeys, Plain, ROWS, STRIDE, StageKeys, Values,
};
use crate::kernels::softmax::{Online, Visible, scale_row};
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Kernel, Task, Tiles, right_len};
use crate::tensor::{Element, View, ViewMut};

/// Rows that share one pass over the keys.
const SPAN: usize = 20 * ROWS;
/// Up to this many rows per group of heads, keys are read as they lie: packing them would cost more.
const FEW: usize = 8;

/// Along which dimension a call is divided.
#[derive(Clone, Copy)]
enum Axis {
    Batch,
    Heads,
    Queries,
}

/// Some batch rows, some heads or some queries of a call.
struct Job<'a, E> {
    q: View<'a, E, 4>,
    k: View<'a, E, 4>,
    v: View<'a, E, 4>,
    out: ViewMut<'a, E, 4>,
    extra: Extra<'a>,
    scale: f32,
    /// Query `i` sees keys up to `i + offset`.
    offset: Option<isize>,
    few: bool,
    axis: Axis,
}

impl<E: Element> Job<'_, E> {
    /// Query heads per key head.
    fn group(&self) -> usize {
        self.q.shape()[2] / self.k.shape()[2].max(1)
    }

    /// How many of the first keys query `i` may see.
    fn limit(&self, i: usize) -> usize {
        let lk = self.k.shape()[1];
        let Some(offset) = self.offset else { return lk };
        let end = (i as isize).saturating_add(offset).saturating_add(1);
        usize::try_from(end).unwrap_or(0).min(lk)
    }

    /// Queries that are kept together, in positions.
    fn step(&self) -> usize {
        ROWS.div_ceil(self.group().max(1))
    }

    /// Work of the first `n` queries, in keys seen, counted step by step.
    fn work(&self, n: usize) -> usize {
        let seen = |i: usize| {
            self.limit(i)
                .saturating_add(KEYS)
                .saturating_mul(self.step())
        };
        (0..n)
            .step_by(self.step())
            .map(seen)
            .fold(0, usize::saturating_add)
    }

    /// The number of queries whose work is nearest to `work`, a multiple of the step.
    fn border(&self, work: usize) -> usize {
        let (mut done, mut at, lq) = (0usize, 0, self.q.shape()[1]);
        while at < lq && done < work {
            done = done.saturating_add(
                self.limit(at)
                    .saturating_add(KEYS)
                    .saturating_mul(self.step()),
            );
            at += self.step();
        }
        at.min(lq)
    }

    fn shape(&self) -> Shape {
        let ([_, lq, heads, dk], [.., dv]) = (self.q.shape(), self.v.shape());
        let rows = lq.saturating_mul(heads);
        Shape {
            rows: rows.min(SPAN),
            dk,
            dv,
            few: self.few,
        }
    }
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        match self.axis {
            Axis::Batch => self.q.shape()[0],
            Axis::Heads => self.k.shape()[2],
            Axis::Queries => self.work(self.q.shape()[1]),
        }
    }

    fn flops(&self) -> usize {
        let ([b, lq, h, dk], [_, lk, _, dv]) = (self.q.shape(), self.v.shape());
        [b, lq, h, lk, dk.saturating_add(dv)]
            .iter()
            .fold(2, |a: usize, n| a.saturating_mul(*n))
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let (axis, at) = match self.axis {
            Axis::Batch => (0, mid),
            Axis::Heads => (2, mid * self.group()),
            Axis::Queries => (1, self.border(mid)),
        };
        let (out_a, out_b) = self.out.split_at(axis, at);
        let part = |from, to, kv_from, kv_to, out| {
            let Extra {
                mut key_mask,
                mut bias,
            } = self.extra;
            let (mut k, mut v, mut offset) = (self.k, self.v, self.offset);
            match self.axis {
                Axis::Batch => key_mask = key_mask.map(|m| m.slice(0, from, to)),
                Axis::Heads => bias = bias.map(|b| b.slice(0, from, to)),
                Axis::Queries => {
                    bias = bias.map(|b| b.slice(1, from, to));
                    offset = offset.map(|o| o.saturating_add(from as isize));
                }
            }
            if !matches!(self.axis, Axis::Queries) {
                (k, v) = (k.slice(axis, kv_from, kv_to), v.slice(axis, kv_from, kv_to));
            }
            let extra = Extra { key_mask, bias };
            Job {
                q: self.q.slice(axis, from, to),
                k,
                v,
                out,
                extra,
                offset,
                ..self
            }
        };
        let (n, kv) = (self.q.shape()[axis], self.k.shape()[axis]);
        (part(0, at, 0, mid, out_a), part(at, n, mid, kv, out_b))
    }
}

/// What decides how much scratch a part takes.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    dk: usize,
    dv: usize,
    few: bool,
}

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;

/// The buffers of one part.
struct Work<'a, B: Backend> {
    q: &'a mut [f32],
    acc: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    factor: &'a mut [f32],
    scores: &'a mut [f32],
    visible: &'a mut [usize],
    list: &'a mut [usize],
    staged: &'a mut [f32],
    staged_values: &'a mut [f32],
    keys: &'a mut [Elem<B>],
    values: &'a mut [Elem<B>],
    left_q: &'a mut [Elem<B>],
    left_p: &'a mut [Elem<B>],
}

impl Shape {
    /// Distance between staged queries: not a power of two.
    fn q_stride(&self) -> usize {
        self.dk.next_multiple_of(16) + 16
    }

    /// Lengths of the buffers of [`Work`], in order: of `f32`, of `usize`, of packed elements.
    fn lens<B: Backend>(&self) -> ([usize; 8], [usize; 2], [usize; 4]) {
        let Shape { rows, dk, dv, few } = *self;
        let packed = |n: usize| if few { 0 } else { n };
        let staged = if few { dk } else { dk.max(dv) };
        (
            [
                rows * self.q_stride(),
                rows * dv,
                rows,
                rows,
                ROWS,
                ROWS * STRIDE,
                KEYS * staged,
                if few { KEYS * dv } else { 0 },
            ],
            [ROWS, KEYS],
            [
                packed(right_len(dk, KEYS)),
                packed(right_len(KEYS, dv)),
                packed(<B::T as Tiles>::left_len(ROWS, dk)),
                packed(<B::T as Tiles>::left_len(ROWS, KEYS)),
            ],
        )
    }

    fn bytes<B: Backend>(&self) -> usize {
        let (floats, indices, packed) = self.lens::<B>();
        let sum =
            |lens: &[usize], of: fn(usize) -> usize| lens.iter().map(|n| of(*n)).sum::<usize>();
        sum(&floats, bytes_of::<f32>)
            + sum(&indices, bytes_of::<usize>)
            + sum(&packed, bytes_of::<Elem<B>>)
    }
}

impl<'a, B: Backend> Work<'a, B> {
    fn new(shape: Shape, cut: &mut Cut<'a>) -> Self {
        let (floats, indices, packed) = shape.lens::<B>();
        let [q, acc, max, sum, factor, scores, staged, staged_values] = floats.map(|n| cut.take(n));
        let [visible, list] = indices.map(|n| cut.take(n));
        let [keys, values, left_q, left_p] = packed.map(|n| cut.take(n));
        Self {
            q,
            acc,
            max,
            sum,
            factor,
            scores,
            visible,
            list,
            staged,
            staged_values,
            keys,
            values,
            left_q,
            left_p,
        }
    }
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
        [
            self.batch,
            r / self.group,
            self.kv * self.group + r % self.group,
            0,
        ]
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
        for (r, row) in self
            .acc
            .chunks_exact_mut(dv)
            .take(self.span.rows)
            .enumerate()
        {
            let sum = self.sum[r];
            scale_row(b.lanes(), row, if sum == 0.0 { 0.0 } else { 1.0 / sum });
            E::narrow(b.convert(), row, self.out.row_mut(self.span.at(r)));
        }
    }
}

/// The next at most [`KEYS`] keys that count among `from .. end`, and where to go on.
fn next_block<'a>(
    mask: Option<&[bool]>,
    from: usize,
    end: usize,
    list: &'a mut [usize],
) -> (Block<'a>, usize) {
    let Some(mask) = mask else {
        let n = KEYS.min(end - from);
        return (Block::Run(from, n), from + n);
    };
    let (mut n, mut at) = (0, from);
    while at < end && n < KEYS {
        list[n] = at;
        n += usize::from(mask[at]);
        at += 1;
    }
    let list = &list[..n];
    match (list.first(), list.last()) {
        (Some(first), Some(last)) if last - first + 1 == n => (Block::Run(*first, n), at),
        _ => (Block::List(list), at),
    }
}

/// All rows of a job.
fn work<B: Backend, E: Element>(b: B, mut job: Job<'_, E>, mut scratch: Cut<'_>) {
    let ([batch, lq, ..], kv_heads, group) = (job.q.shape(), job.k.shape()[2], job.group());
    let shape = job.shape();
    let mut work = Work::<B>::new(shape, &mut scratch);
    let (rows, long) = (lq * group, shape.rows.max(1));
    for batch in 0..batch {
        for kv in 0..kv_heads {
            for first in (0..rows).step_by(long) {
                let rows = long.min(rows - first);
                span(
                    b,
                    &mut job,
                    Span {
                        batch,
                        kv,
                        group,
                        first,
                        rows,
                    },
                    shape,
                    &mut work,
                );
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
    let Span {
        batch,
        kv,
        group,
        rows,
        ..
    } = span;
    let (Shape { dk, dv, few, .. }, q_stride) = (shape, shape.q_stride());
    let (k, v) = (job.k.head(batch, kv), job.v.head(batch, kv));
    b.call(StageQueries {
        q: job.q,
        span,
        scale: job.scale,
        dst: &mut *work.q,
        stride: q_stride,
    });
    work.acc[..rows * dv].fill(0.0);
    work.max[..rows].fill(f32::NEG_INFINITY);
    work.sum[..rows].fill(0.0);
    let limit = |r: usize| job.limit((span.first + r) / group);
    let end = limit(rows - 1);
    // An empty mask has no rows to look at.
    let mask = job
        .extra
        .key_mask
        .filter(|_| end > 0)
        .map(|m| m.row([batch, 0]));
    let mut at = 0;
    while at < end {
        let (block, next) = next_block(mask, at, end, work.list);
        at = next;
        if block.is_empty() {
            continue;
        }
        let (staged, staged_values) = (&mut *work.staged, &mut *work.staged_values);
        let (keys, values) = if few {
            let (k, v) = b.call(StageKeys {
                k,
                v,
                block,
                keys: staged,
                values: staged_values,
            });
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
            let finite = b.call(pack);
            let plain = Values::Plain(Plain {
                data: staged,
                stride: dv,
            });
            (
                Keys::Packed(&*keys),
                if finite {
                    Values::Packed(&*values)
                } else {
                    plain
                },
            )
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
            b.call(Attend {
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
                scores: &mut *work.scores,
                left_q: &mut *work.left_q,
                left_p: &mut *work.left_p,
            });
        }
    }
    b.call(Finish {
        acc: &mut *work.acc,
        sum: &*work.sum,
        span,
        out: job.out.reborrow(),
    });
}

/// A call, ready to be dispatched.
struct Forward<'r, 'a, E> {
    rt: &'r Runtime,
    job: Job<'a, E>,
}

impl<E: Element> Task for Forward<'_, '_, E> {
    type Output = Result<()>;
    fn run<B: Backend>(self, b: B) -> Result<()> {
        let bytes = self.job.shape().bytes::<B>();
        self.rt
            .divide(self.job, bytes, &|job, cut| work(b, job, cut))
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
    let (threads, few) = (
        rt.threads(),
        lq.saturating_mul(heads / kv_heads.max(1)) <= FEW,
    );
    // Whole heads pack their keys once; queries can always be shared out evenly.
    let even = |n: usize| n % threads == 0 || n >= 8 * threads;
    let axis = if even(kv_heads) {
        Axis::Heads
    } else if even(batch) || (few && batch > 1) {
        Axis::Batch
    } else if few {
        Axis::Heads
    } else {
        Axis::Queries
    };
    rt.run(Forward {
        rt,
        job: Job {
            q,
            k,
            v,
            out,
            extra,
            scale,
            offset,
            few,
            axis,
        },
    })
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
    rt.run(Ask(Shape {
        rows: SPAN,
        dk,
        dv,
        few: false,
    }))
}
