//! The work of one call, divided between threads.
//!
//! Heads (or batch rows) are independent and go to threads whole. When there are fewer of them than threads,
//! threads share a head by ranges of value columns: each forms the scores for itself, which costs less than to
//! wait for those of another. Every element goes through the same operations in the same order either way.

use super::LightningAttention;
use crate::kernels::ahead::Ahead;
use crate::kernels::chunk::{
    Advance, ChunkShape, FromPanels, Head, Scores, ToPanels, Turned, Workspace,
};
use crate::kernels::decay::{DecayTable, Forget};
use crate::kernels::recurrence::Step;
use crate::kernels::staging::each_row;
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Kernel, PANEL, Task, Tiles};
use crate::tensor::{Element, View, ViewMut};

/// Sequences up to this length go token by token: bringing the state into panels and back costs as much as
/// two passes of the recurrence over it.
const RECURRENT: usize = 3;
/// Bytes of states that are advanced together: they and a chunk's buffers stay in the second cache level.
const RESIDENT: usize = 1 << 20;

/// Some heads, or some batch rows, of a call.
struct Job<'a, E> {
    q: View<'a, E, 4>,
    k: View<'a, E, 4>,
    v: View<'a, E, 4>,
    out: ViewMut<'a, E, 4>,
    state: ViewMut<'a, f32, 4>,
    tables: &'a [DecayTable],
    /// The hint for the number of rows in a chunk.
    chunk: Option<usize>,
    scale: f32,
    /// Factors of `q`, `k` and `v` in a call that reads from the last token to the first and lets the state decay
    /// after each of them; `scale` is 1 then.
    turned: Option<[f32; 3]>,
    by_batch: bool,
}

impl<'a, E: Element> Job<'a, E> {
    fn shape<B: Backend>(&self) -> ChunkShape {
        let ([_, len, _, dk], [.., dv]) = (self.q.shape(), self.v.shape());
        shape::<B>(self.chunk, len, [dk, dv])
    }

    fn head(&self, b: usize, h: usize) -> Head<'a, E> {
        Head {
            q: self.q.head(b, h),
            k: self.k.head(b, h),
            v: self.v.head(b, h),
            decay: self.tables[h].before(),
            scale: self.scale,
        }
    }

    /// Batch rows or heads: independent of each other.
    fn outer(&self) -> usize {
        if self.by_batch { self.q.shape()[0] } else { self.tables.len() }
    }

    fn is_short(&self) -> bool {
        is_short(self.q.shape()[1], self.turned.is_some())
    }

    /// Ranges of columns that threads may share a head by; a step needs whole rows of the state.
    fn panels(&self) -> usize {
        if self.is_short() { 1 } else { self.v.shape()[3].div_ceil(PANEL).max(1) }
    }

    fn split_columns(self, border: usize) -> (Self, Self) {
        let dv = self.v.shape()[3];
        let (out_a, out_b) = self.out.split_at(3, border);
        let (state_a, state_b) = self.state.split_at(3, border);
        let part = |from, to, out, state| Job { v: self.v.slice(3, from, to), out, state, ..self };
        (part(0, border, out_a, state_a), part(border, dv, out_b, state_b))
    }

    fn bytes<B: Backend>(&self) -> usize {
        let ([_, len, _, dk], [.., dv]) = (self.q.shape(), self.v.shape());
        Run { len, dk, dv, turned: self.turned.is_some() }.bytes::<B>(self.chunk, self.tables.len())
    }
}

/// Whether a call goes token by token.
fn is_short(len: usize, turned: bool) -> bool {
    !turned && len <= RECURRENT
}

fn shape<B: Backend>(chunk: Option<usize>, len: usize, [dk, dv]: [usize; 2]) -> ChunkShape {
    ChunkShape { chunk: rows::<B>(chunk).min(len).max(1), dk, dv }
}

/// What the scratch of a call depends on.
#[derive(Clone, Copy)]
pub(in crate::attention) struct Run {
    pub len: usize,
    pub dk: usize,
    pub dv: usize,
    /// Whether it reads from the last token to the first.
    pub turned: bool,
}

impl Run {
    /// Of one part.
    fn bytes<B: Backend>(self, chunk: Option<usize>, heads: usize) -> usize {
        let s = shape::<B>(chunk, self.len, [self.dk, self.dv]);
        if is_short(self.len, self.turned) {
            return 2 * bytes_of::<f32>(s.dk) + 2 * bytes_of::<f32>(s.dv);
        }
        chunked_bytes::<B>(s, heads) + if self.turned { Turned::bytes(s) } else { 0 }
    }

    /// Of all parts; never less for a longer call.
    pub(in crate::attention) fn scratch(self, rt: &Runtime, op: &LightningAttention) -> usize {
        struct Ask<'a>(Run, &'a LightningAttention);
        impl Task for Ask<'_> {
            type Output = usize;
            fn run<B: Backend>(self, _: B) -> usize {
                self.0.bytes::<B>(self.1.chunk, self.1.heads())
            }
        }
        rt.threads() * bytes_of::<u8>(rt.run(Ask(self, op)))
    }
}

/// Rows of a chunk.
fn rows<B: Backend>(hint: Option<usize>) -> usize {
    hint.unwrap_or(<B::T as Tiles>::CHUNK)
}

/// How many of `heads` heads advance together.
fn group(shape: ChunkShape, heads: usize) -> usize {
    (RESIDENT / bytes_of::<f32>(shape.state_len()).max(1)).clamp(1, heads.max(1))
}

/// Scratch of [`chunked`].
fn chunked_bytes<B: Backend>(shape: ChunkShape, heads: usize) -> usize {
    bytes_of::<f32>(group(shape, heads) * shape.state_len())
        + bytes_of::<f32>(shape.score_len())
        + shape.workspace_bytes::<B>()
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        self.outer() * self.panels()
    }

    fn flops(&self) -> usize {
        let [b, n, h, dk] = self.q.shape();
        4 * b * n * h * dk * self.v.shape()[3]
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let outer = self.outer();
        if outer == 1 {
            return self.split_columns(mid * PANEL);
        }
        let (axis, mid) =
            (if self.by_batch { 0 } else { 2 }, mid.div_ceil(self.panels()).clamp(1, outer - 1));
        let (out_a, out_b) = self.out.split_at(axis, mid);
        let (state_a, state_b) = self.state.split_at(axis.min(1), mid);
        let (tables_a, tables_b) =
            if self.by_batch { (self.tables, self.tables) } else { self.tables.split_at(mid) };
        let part = |from, to, out, state, tables| Job {
            q: self.q.slice(axis, from, to),
            k: self.k.slice(axis, from, to),
            v: self.v.slice(axis, from, to),
            out,
            state,
            tables,
            ..self
        };
        (part(0, mid, out_a, state_a, tables_a), part(mid, outer, out_b, state_b, tables_b))
    }
}

/// One token of one head: converted, advanced and converted back in one kernel.
struct Token<'a, E> {
    rows: [&'a [E]; 3],
    buffers: [&'a mut [f32]; 4],
    state: &'a mut [f32],
    forget: Forget,
    scale: f32,
    out: &'a mut [E],
}

impl<B: Backend, E: Element> Kernel<B> for Token<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Token { rows: [q, k, v], buffers: [qf, kf, vf, out], state, forget, scale, .. } = self;
        E::widen(b.convert(), q, qf);
        E::widen(b.convert(), k, kf);
        E::widen(b.convert(), v, vf);
        let stride = vf.len();
        Step { state, stride, forget, q: qf, k: kf, v: vf, out: &mut *out, scale }.run(b);
        E::narrow(b.convert(), out, self.out);
    }
}

/// All tokens of all heads of a job, one after the other.
fn recurrent<B: Backend, E: Element>(b: B, mut job: Job<'_, E>, mut scratch: Cut<'_>) {
    let ([batch, len, heads, dk], [.., dv]) = (job.q.shape(), job.v.shape());
    let mut buffers = [dk, dk, dv, dv].map(|n| scratch.take::<f32>(n));
    for n in 0..batch {
        for h in 0..heads {
            for t in 0..len {
                let at = [n, t, h, 0];
                b.call(Token {
                    rows: [job.q, job.k, job.v].map(|x| x.row(at)),
                    buffers: buffers.each_mut().map(|x| &mut **x),
                    state: job.state.matrix_mut(n, h),
                    forget: job.tables[h].before().forget(1),
                    scale: job.scale,
                    out: job.out.row_mut(at),
                });
            }
        }
    }
}

/// Buffers of the chunk form for one chunk of one head.
struct Chunk<'a, B: Backend> {
    shape: ChunkShape,
    scores: &'a mut [f32],
    work: Workspace<'a, B>,
}

impl<'a, B: Backend> Chunk<'a, B> {
    /// Rows `at .. at + rows` of a head: its outputs, and the state behind it.
    fn advance<E: Element>(
        &mut self,
        b: B,
        head: Head<'_, E>,
        [at, rows]: [usize; 2],
        out: ViewMut<'_, E, 2>,
        state: &mut [f32],
        ahead: &mut Ahead,
    ) {
        let (work, scores, stride) = (&mut self.work, &mut *self.scores, self.shape.score_stride());
        b.call_tiles(Scores {
            head,
            at,
            rows,
            work: &mut *work,
            scores: &mut *scores,
            stride,
            ahead: &mut *ahead,
        });
        b.call_tiles(Advance { head, at, rows, work, scores, stride, out, state, ahead });
    }
}

/// A job in the chunk form: chunks outside, heads inside, so that the rows of a chunk are read from memory
/// page by page while the states wait in the second cache level.
fn chunked<B: Backend, E: Element>(b: B, mut job: Job<'_, E>, mut scratch: Cut<'_>) {
    let ([batch, len, heads, _], shape, group) =
        (job.q.shape(), job.shape::<B>(), group(job.shape::<B>(), job.tables.len()));
    let states = scratch.take::<f32>(group * shape.state_len());
    let scores = scratch.take::<f32>(shape.score_len());
    let mut chunk = Chunk { shape, scores, work: Workspace::<B>::new(b, shape, &mut scratch) };
    let mut turned = job.turned.map(|factors| (factors, Turned::new(shape, &mut scratch)));
    for n in 0..batch {
        for first in (0..heads).step_by(group) {
            let last = heads.min(first + group);
            for (h, panels) in (first..last).zip(states.chunks_exact_mut(shape.state_len())) {
                let state = job.state.reborrow().head_rows(n, h);
                b.call(ToPanels { state, panels });
            }
            for done in (0..len).step_by(shape.chunk) {
                let rows = shape.chunk.min(len - done);
                for (h, state) in (first..last).zip(states.chunks_exact_mut(shape.state_len())) {
                    let head = job.head(n, h);
                    if let Some((factors, turned)) = &mut turned {
                        let rows = [len - done - rows, rows];
                        turned.fill(b, [head.q, head.k, head.v], rows, *factors);
                        let (copy, out) = turned.head(rows[1], job.tables[h].after());
                        let (next, start) = match h + 1 < last {
                            true => (h + 1, rows[0]),
                            false => (first, rows[0].saturating_sub(shape.chunk)),
                        };
                        let (next, next_out) = (job.head(n, next), job.out.head_mut(n, next));
                        let ahead = &mut shape.ahead(&next, &next_out, start);
                        chunk.advance(b, copy, [0, rows[1]], out, state, ahead);
                        turned.store(b, job.out.head_mut(n, h), rows);
                        continue;
                    }
                    let (next, start) =
                        if h + 1 < last { (h + 1, done) } else { (first, done + rows) };
                    let ahead =
                        &mut shape.ahead(&job.head(n, next), &job.out.head_mut(n, next), start);
                    chunk.advance(b, head, [done, rows], job.out.head_mut(n, h), state, ahead);
                }
            }
            for (h, panels) in (first..last).zip(states.chunks_exact(shape.state_len())) {
                let state = job.state.reborrow().head_rows(n, h);
                b.call(FromPanels { panels, state });
            }
        }
    }
}

/// A call, ready to be dispatched.
struct Forward<'r, 'a, E> {
    rt: &'r Runtime,
    job: Job<'a, E>,
    cut: Cut<'a>,
}

impl<E: Element> Task for Forward<'_, '_, E> {
    type Output = ();

    fn run<B: Backend>(self, b: B) {
        let Forward { rt, mut job, cut } = self;
        let ([batch, len, heads, dk], [.., dv]) = (job.q.shape(), job.v.shape());
        if batch * len * heads * dv == 0 {
            return;
        }
        if dk == 0 {
            each_row(job.v.shape()).for_each(|at| job.out.row_mut(at).fill(E::default()));
            return;
        }
        let bytes = job.bytes::<B>();
        if job.is_short() {
            return rt.divide_in(job, cut, bytes, &|job, cut| recurrent(b, job, cut));
        }
        rt.divide_in(job, cut, bytes, &|job, cut| chunked(b, job, cut));
    }
}

/// Runs a checked call in the scratch of its [`Run`].
pub(in crate::attention) fn run<E: Element>(
    rt: &Runtime,
    op: &LightningAttention,
    qkv: [View<'_, E, 4>; 3],
    out: ViewMut<'_, E, 4>,
    state: ViewMut<'_, f32, 4>,
    cut: Cut<'_>,
) {
    start(rt, op, qkv, out, state, None, cut);
}

/// Runs a checked call from the last token to the first, with `q`, `k` and `v` multiplied by `factors`:
/// `S <- S + k v^T`, `o = q S`, `S <- lambda S`.
pub(super) fn run_turned<E: Element>(
    rt: &Runtime,
    op: &LightningAttention,
    qkv: [View<'_, E, 4>; 3],
    factors: [f32; 3],
    out: ViewMut<'_, E, 4>,
    state: ViewMut<'_, f32, 4>,
    cut: Cut<'_>,
) {
    start(rt, op, qkv, out, state, Some(factors), cut);
}

fn start<E: Element>(
    rt: &Runtime,
    op: &LightningAttention,
    [q, k, v]: [View<'_, E, 4>; 3],
    out: ViewMut<'_, E, 4>,
    state: ViewMut<'_, f32, 4>,
    turned: Option<[f32; 3]>,
    cut: Cut<'_>,
) {
    let [batch, _, heads, _] = q.shape();
    let by_batch = heads < rt.threads() && heads < batch;
    let (tables, chunk) = (&op.tables, op.chunk);
    let scale = if turned.is_some() { 1.0 } else { op.scale };
    let job = Job { q, k, v, out, state, tables, chunk, scale, turned, by_batch };
    rt.run(Forward { rt, job, cut });
}

/// Scratch of one part of a long call.
pub(super) fn scratch_bytes(rt: &Runtime, op: &LightningAttention, dk: usize, dv: usize) -> usize {
    struct Ask<'a>(&'a LightningAttention, usize, usize);
    impl Task for Ask<'_> {
        type Output = usize;
        fn run<B: Backend>(self, _: B) -> usize {
            let shape = ChunkShape { chunk: rows::<B>(self.0.chunk), dk: self.1, dv: self.2 };
            chunked_bytes::<B>(shape, self.0.heads())
        }
    }
    rt.run(Ask(op, dk, dv))
}
