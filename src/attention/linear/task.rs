//! The work of one call, divided between threads.
//!
//! Heads (or batch rows) are independent and go to threads whole. Without causality a call with too few of them
//! is divided along its tokens: keys and values are summed in segments of fixed length, the sums of segments
//! are added from left to right whoever formed them, and queries read the total in any order.

use crate::error::Result;
use crate::kernels::chunk::{FromPanels, ToPanels};
use crate::kernels::linear::{
    Absorb, BLOCK, CHUNK, Chunk, Form, LinearShape, LinearWork, Read, Token,
};
use crate::kernels::staging::Combine;
use crate::runtime::{Divide, Runtime, divide};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Task};
use crate::tensor::{Element, View, ViewMut};

/// Causal sequences up to this length go token by token.
const RECURRENT: usize = 3;
/// Bytes of states that are advanced together: they and a block's buffers stay in the second cache level.
const RESIDENT: usize = 1 << 19;
/// Keys of a segment.
const SEGMENT: usize = 10 * BLOCK;
/// Segments that are summed before their sums are added up.
const AHEAD: usize = 64;

/// `S` and `z` (as `[batch, heads, 1, dk]`).
pub(super) type States<'a> = (ViewMut<'a, f32, 4>, ViewMut<'a, f32, 4>);

/// Some heads, or some batch rows, of a call.
struct Job<'a, E> {
    q: View<'a, E, 4>,
    k: View<'a, E, 4>,
    v: View<'a, E, 4>,
    out: ViewMut<'a, E, 4>,
    states: Option<States<'a>>,
    form: Form,
    causal: bool,
    by_batch: bool,
}

impl<E: Element> Job<'_, E> {
    fn shape(&self) -> LinearShape {
        LinearShape {
            dk: self.q.shape()[3],
            dv: self.v.shape()[3],
        }
    }

    /// Heads that advance together.
    fn group(&self) -> usize {
        group(self.shape(), self.q.shape()[2])
    }
}

fn group(shape: LinearShape, heads: usize) -> usize {
    (RESIDENT / total_bytes(shape).max(1)).clamp(1, heads.max(1))
}

/// Floats of a state in panels with its normaliser behind.
fn total_len(shape: LinearShape) -> usize {
    (shape.state_len() + shape.dk).next_multiple_of(16)
}

fn total_bytes(shape: LinearShape) -> usize {
    bytes_of::<f32>(total_len(shape))
}

/// Scratch of one part: totals and partial sums of a group, and a workspace.
fn part_bytes<B: Backend>(shape: LinearShape, heads: usize) -> usize {
    2 * group(shape, heads) * total_bytes(shape) + shape.bytes::<B>()
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        self.q.shape()[if self.by_batch { 0 } else { 2 }]
    }

    fn flops(&self) -> usize {
        let ([b, lq, h, dk], [_, lk, _, dv]) = (self.q.shape(), self.v.shape());
        [b, lq.saturating_add(lk), h, dk, dv]
            .iter()
            .fold(2, |a: usize, n| a.saturating_mul(*n))
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let (axis, n) = (if self.by_batch { 0 } else { 2 }, self.units());
        let (out_a, out_b) = self.out.split_at(axis, mid);
        let (states_a, states_b) = match self.states {
            Some((s, z)) => {
                let ((s_a, s_b), (z_a, z_b)) =
                    (s.split_at(axis.min(1), mid), z.split_at(axis.min(1), mid));
                (Some((s_a, z_a)), Some((s_b, z_b)))
            }
            None => (None, None),
        };
        let part = |from, to, out, states| Job {
            q: self.q.slice(axis, from, to),
            k: self.k.slice(axis, from, to),
            v: self.v.slice(axis, from, to),
            out,
            states,
            form: self.form,
            causal: self.causal,
            by_batch: self.by_batch,
        };
        (part(0, mid, out_a, states_a), part(mid, n, out_b, states_b))
    }
}

/// Brings the states of heads `first ..` into `totals`, zeros if there are none.
fn load<B: Backend>(
    b: B,
    states: &mut Option<States<'_>>,
    [n, first]: [usize; 2],
    shape: LinearShape,
    totals: &mut [f32],
) {
    totals.fill(0.0);
    let Some((s, z)) = states else { return };
    for (h, total) in totals.chunks_exact_mut(total_len(shape).max(1)).enumerate() {
        let (panels, sum) = total.split_at_mut(shape.state_len());
        b.call(ToPanels {
            state: s.matrix_mut(n, first + h),
            dv: shape.dv,
            panels,
        });
        sum[..shape.dk].copy_from_slice(z.matrix_mut(n, first + h));
    }
}

/// The way back of [`load`].
fn store<B: Backend>(
    b: B,
    states: &mut Option<States<'_>>,
    [n, first]: [usize; 2],
    shape: LinearShape,
    totals: &[f32],
) {
    let Some((s, z)) = states else { return };
    for (h, total) in totals.chunks_exact(total_len(shape).max(1)).enumerate() {
        let (panels, sum) = total.split_at(shape.state_len());
        if shape.dv > 0 {
            b.call(FromPanels {
                panels,
                state: s.reborrow().head_rows(n, first + h),
            });
        }
        z.matrix_mut(n, first + h).copy_from_slice(&sum[..shape.dk]);
    }
}

/// All tokens of all heads of a causal job, one after the other.
fn recurrent<B: Backend, E: Element>(b: B, mut job: Job<'_, E>, mut scratch: Cut<'_>) {
    let ([batch, len, heads, _], LinearShape { dk, dv }) = (job.q.shape(), job.shape());
    let (own_s, own_z) = (scratch.take::<f32>(dk * dv), scratch.take::<f32>(dk));
    let mut rows = [dk, dk, dv, dv].map(|n| scratch.take::<f32>(n));
    for n in 0..batch {
        for h in 0..heads {
            let (state, z) = match &mut job.states {
                Some((s, z)) => (s.matrix_mut(n, h), z.matrix_mut(n, h)),
                None => {
                    own_s.fill(0.0);
                    own_z.fill(0.0);
                    (&mut *own_s, &mut *own_z)
                }
            };
            for at in 0..len {
                let (q, k, v) = (job.q.head(n, h), job.k.head(n, h), job.v.head(n, h));
                let rows = rows.each_mut().map(|r| &mut **r);
                let (state, z, out) = (&mut *state, &mut *z, job.out.head_mut(n, h));
                b.call(Token {
                    form: job.form,
                    q,
                    k,
                    v,
                    at,
                    rows,
                    state,
                    z,
                    out,
                });
            }
        }
    }
}

/// A job in blocks: blocks outside, heads inside, so that rows are read from memory page by page while the
/// states wait in the second cache level.
fn blocked<B: Backend, E: Element>(b: B, mut job: Job<'_, E>, mut scratch: Cut<'_>) {
    let ([batch, lq, heads, _], [_, lk, ..]) = (job.q.shape(), job.k.shape());
    let (shape, form, group) = (job.shape(), job.form, job.group());
    let one = total_len(shape).max(1);
    let (totals, parts) = (
        scratch.take::<f32>(group * one),
        scratch.take::<f32>(group * one),
    );
    let mut work = LinearWork::<B>::new(shape, &mut scratch);
    for n in 0..batch {
        for first in (0..heads).step_by(group) {
            let count = group.min(heads - first);
            let totals = &mut totals[..count * one];
            let parts = &mut parts[..count * one];
            load(b, &mut job.states, [n, first], shape, totals);
            if job.causal {
                for at in (0..lq).step_by(CHUNK) {
                    let rows = [at, CHUNK.min(lq - at)];
                    for (h, total) in (first..).zip(totals.chunks_exact_mut(one)) {
                        let (state, z) = total.split_at_mut(shape.state_len());
                        let (q, k, v) = (job.q.head(n, h), job.k.head(n, h), job.v.head(n, h));
                        let (z, work, out) =
                            (&mut z[..shape.dk], &mut work, job.out.head_mut(n, h));
                        b.call(Chunk {
                            form,
                            q,
                            k,
                            v,
                            rows,
                            work,
                            state,
                            z,
                            out,
                        });
                    }
                }
            } else {
                for at in (0..lk).step_by(SEGMENT) {
                    let keys = [at, SEGMENT.min(lk - at)];
                    segment(
                        b,
                        form,
                        [job.k, job.v],
                        [n, first],
                        keys,
                        parts,
                        shape,
                        &mut work,
                    );
                    b.call(Combine {
                        total: &mut *totals,
                        part: &*parts,
                    });
                }
                read(
                    b,
                    form,
                    job.q,
                    [n, first],
                    [0, lq],
                    totals,
                    shape,
                    &mut work,
                    job.out.reborrow(),
                );
            }
            store(b, &mut job.states, [n, first], shape, totals);
        }
    }
}

/// Sums the keys `at .. at + len` of the heads `first ..`, as many as `parts` holds, into `parts`.
#[allow(clippy::too_many_arguments)] // the innermost loops of two callers, not an interface
fn segment<B: Backend, E: Element>(
    b: B,
    form: Form,
    [k, v]: [View<'_, E, 4>; 2],
    [n, first]: [usize; 2],
    [from, len]: [usize; 2],
    parts: &mut [f32],
    shape: LinearShape,
    work: &mut LinearWork<'_, B>,
) {
    parts.fill(0.0);
    for at in (0..len).step_by(BLOCK) {
        let rows = [from + at, BLOCK.min(len - at)];
        for (h, part) in (first..).zip(parts.chunks_exact_mut(total_len(shape).max(1))) {
            let (state, z) = part.split_at_mut(shape.state_len());
            let (k, v, z) = (k.head(n, h), v.head(n, h), &mut z[..shape.dk]);
            b.call(Absorb {
                form,
                k,
                v,
                rows,
                work: &mut *work,
                state,
                z,
            });
        }
    }
}

/// Reads queries `from .. from + len` of the heads `first ..`, as many as `totals` holds.
#[allow(clippy::too_many_arguments)] // the innermost loops of two callers, not an interface
fn read<B: Backend, E: Element>(
    b: B,
    form: Form,
    q: View<'_, E, 4>,
    [n, first]: [usize; 2],
    [from, len]: [usize; 2],
    totals: &[f32],
    shape: LinearShape,
    work: &mut LinearWork<'_, B>,
    mut out: ViewMut<'_, E, 4>,
) {
    if shape.dv == 0 {
        return;
    }
    for at in (0..len).step_by(BLOCK) {
        let rows = [from + at, BLOCK.min(len - at)];
        for (h, total) in (first..).zip(totals.chunks_exact(total_len(shape).max(1))) {
            let (state, z) = total.split_at(shape.state_len());
            let (q, out, z) = (q.head(n, h), out.head_mut(n, h), &z[..shape.dk]);
            b.call(Read {
                form,
                q,
                rows,
                work: &mut *work,
                state,
                z,
                out,
            });
        }
    }
}

/// Segments `at ..` of all heads of one batch row, as many as `parts` holds.
struct SegmentJob<'a, E> {
    k: View<'a, E, 4>,
    v: View<'a, E, 4>,
    shape: LinearShape,
    at: usize,
    parts: &'a mut [f32],
}

impl<E: Element> SegmentJob<'_, E> {
    fn one(&self) -> usize {
        self.k.shape()[2] * total_len(self.shape)
    }
}

impl<E: Element> Divide for SegmentJob<'_, E> {
    fn units(&self) -> usize {
        self.parts.len() / self.one()
    }
    fn flops(&self) -> usize {
        2 * SEGMENT * self.parts.len()
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (a, b) = self
            .parts
            .split_at_mut(mid * self.k.shape()[2] * total_len(self.shape));
        let part = |at, parts| SegmentJob { at, parts, ..self };
        (part(self.at, a), part(self.at + mid, b))
    }
}

/// Queries of all heads of one batch row.
struct ReadJob<'a, E> {
    q: View<'a, E, 4>,
    out: ViewMut<'a, E, 4>,
}

impl<E: Element> Divide for ReadJob<'_, E> {
    fn units(&self) -> usize {
        self.q.shape()[1].div_ceil(BLOCK)
    }
    fn flops(&self) -> usize {
        self.q.shape()[1]
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (at, lq) = (mid * BLOCK, self.q.shape()[1]);
        let (out_a, out_b) = self.out.split_at(1, at);
        (
            ReadJob {
                q: self.q.slice(1, 0, at),
                out: out_a,
            },
            ReadJob {
                q: self.q.slice(1, at, lq),
                out: out_b,
            },
        )
    }
}

/// A job without causality whose tokens are divided between `parts` threads.
fn shared<B: Backend, E: Element>(
    b: B,
    mut job: Job<'_, E>,
    parts: usize,
    ahead: usize,
    mut scratch: Cut<'_>,
) {
    let ([batch, _, heads, _], [_, lk, ..]) = (job.q.shape(), job.k.shape());
    let (shape, form, per_part) = (job.shape(), job.form, job.shape().bytes::<B>());
    let one = heads * total_len(shape);
    let (totals, sums) = (scratch.take::<f32>(one), scratch.take::<f32>(ahead * one));
    let workspaces = scratch.take::<u8>(parts * per_part);
    let segments = lk.div_ceil(SEGMENT);
    for n in 0..batch {
        load(b, &mut job.states, [n, 0], shape, totals);
        let (k, v) = (job.k.slice(0, n, n + 1), job.v.slice(0, n, n + 1));
        for at in (0..segments).step_by(ahead) {
            let sums = &mut sums[..ahead.min(segments - at) * one];
            let all = SegmentJob {
                k,
                v,
                shape,
                at,
                parts: &mut *sums,
            };
            divide(
                all,
                parts,
                Cut::new(workspaces),
                per_part,
                &|part: SegmentJob<'_, E>, mut cut: Cut<'_>| {
                    let mut work = LinearWork::<B>::new(shape, &mut cut);
                    for (i, sums) in part.parts.chunks_exact_mut(one).enumerate() {
                        let from = (part.at + i) * SEGMENT;
                        let keys = [from, SEGMENT.min(lk - from)];
                        segment(b, form, [k, v], [0, 0], keys, sums, shape, &mut work);
                    }
                },
            );
            for part in sums.chunks_exact(one) {
                b.call(Combine {
                    total: &mut *totals,
                    part,
                });
            }
        }
        let all = ReadJob {
            q: job.q.slice(0, n, n + 1),
            out: job.out.reborrow().slice(0, n, n + 1),
        };
        divide(
            all,
            parts,
            Cut::new(workspaces),
            per_part,
            &|part: ReadJob<'_, E>, mut cut: Cut<'_>| {
                let mut work = LinearWork::<B>::new(shape, &mut cut);
                read(
                    b,
                    form,
                    part.q,
                    [0, 0],
                    [0, part.q.shape()[1]],
                    totals,
                    shape,
                    &mut work,
                    part.out,
                );
            },
        );
        store(b, &mut job.states, [n, 0], shape, totals);
    }
}

/// A call, ready to be dispatched.
struct Forward<'r, 'a, E> {
    rt: &'r Runtime,
    job: Job<'a, E>,
}

impl<E: Element> Task for Forward<'_, '_, E> {
    type Output = Result<()>;

    fn run<B: Backend>(self, b: B) -> Result<()> {
        let Forward { rt, mut job } = self;
        let ([batch, lq, heads, _], [_, lk, ..], shape) =
            (job.q.shape(), job.k.shape(), job.shape());
        if batch * heads == 0 || lq.max(lk) == 0 {
            return Ok(());
        }
        if shape.dk == 0 {
            for n in 0..batch * usize::from(shape.dv > 0) {
                for t in 0..lq {
                    (0..heads).for_each(|h| job.out.row_mut([n, t, h, 0]).fill(E::default()));
                }
            }
            return Ok(());
        }
        if job.causal && lq <= RECURRENT {
            let bytes = [
                shape.dk * shape.dv,
                shape.dk,
                shape.dk,
                shape.dk,
                shape.dv,
                shape.dv,
            ];
            let bytes = bytes.iter().map(|n| bytes_of::<f32>(*n)).sum();
            return rt.divide(job, bytes, &|job, cut| recurrent(b, job, cut));
        }
        let threads = rt.threads();
        let even = |n: usize| n % threads == 0 || n >= 8 * threads;
        if !job.causal && !even(heads) && !even(batch) {
            let ahead = lk.div_ceil(SEGMENT).clamp(1, AHEAD);
            let bytes = (1 + ahead) * heads * total_bytes(shape)
                + bytes_of::<u8>(threads * shape.bytes::<B>());
            return rt.with_scratch(bytes, |cut| shared(b, job, threads, ahead, cut));
        }
        let bytes = part_bytes::<B>(shape, heads);
        rt.divide(job, bytes, &|job, cut| blocked(b, job, cut))
    }
}

/// Runs a checked call.
pub(super) fn run<E: Element>(
    rt: &Runtime,
    form: Form,
    causal: bool,
    [q, k, v]: [View<'_, E, 4>; 3],
    out: ViewMut<'_, E, 4>,
    states: Option<States<'_>>,
) -> Result<()> {
    let ([batch, _, heads, _], threads) = (q.shape(), rt.threads());
    let by_batch = heads % threads != 0 && (batch % threads == 0 || heads < batch);
    rt.run(Forward {
        rt,
        job: Job {
            q,
            k,
            v,
            out,
            states,
            form,
            causal,
            by_batch,
        },
    })
}

/// Scratch of one part of a long call.
pub(super) fn scratch_bytes(rt: &Runtime, heads: usize, dk: usize, dv: usize) -> usize {
    struct Ask(LinearShape, usize);
    impl Task for Ask {
        type Output = usize;
        fn run<B: Backend>(self, _: B) -> usize {
            part_bytes::<B>(self.0, self.1)
        }
    }
    rt.run(Ask(LinearShape { dk, dv }, heads))
}
