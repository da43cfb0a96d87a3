//! The work of one call, divided between threads.
//!
//! Heads (or batch rows) are independent and go to threads whole. When there are fewer of them than threads,
//! threads share a head by ranges of value columns: each forms the scores for itself, which costs less than to
//! wait for those of another. Every element goes through the same operations in the same order either way.

use super::LightningAttention;
use super::walk::{Chunk, Chunks, Walk, shape};
use crate::kernels::ahead::{Ahead, Part};
use crate::kernels::chunk::{Carried, ChunkShape, FromPanels, Head, ToPanels};
use crate::kernels::decay::{DecayTable, Forget};
use crate::kernels::recurrence::Step;
use crate::kernels::staging::each_row;
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Kernel, PANEL, Task};
use crate::tensor::{Element, View, ViewMut};

/// Sequences up to this length go token by token: bringing the state into panels and back costs as much as
/// two passes of the recurrence over it.
const RECURRENT: usize = 3;

/// Some heads, or some batch rows, of a call.
struct Job<'a, E> {
    q: View<'a, E, 4>,
    k: View<'a, E, 4>,
    v: View<'a, E, 4>,
    out: ViewMut<'a, E, 4>,
    state: ViewMut<'a, f32, 4>,
    tables: &'a [DecayTable],
    op: &'a LightningAttention,
    by_batch: bool,
}

impl<'a, E: Element> Job<'a, E> {
    fn shape<B: Backend>(&self) -> ChunkShape {
        let ([_, len, _, dk], [.., dv]) = (self.q.shape(), self.v.shape());
        shape::<B>(self.op, len, [dk, dv])
    }

    fn head(&self, b: usize, h: usize) -> Head<'a, E> {
        Head {
            q: self.q.head(b, h),
            k: self.k.head(b, h),
            v: self.v.head(b, h),
            decay: self.tables[h].before(),
            scale: self.op.scale,
        }
    }

    /// Batch rows or heads: independent of each other.
    fn outer(&self) -> usize {
        if self.by_batch { self.q.shape()[0] } else { self.tables.len() }
    }

    fn is_short(&self) -> bool {
        self.q.shape()[1] <= RECURRENT
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
        Run { len, dk, dv }.bytes::<B>(self.op, self.tables.len())
    }
}

/// What the scratch of a call depends on.
#[derive(Clone, Copy)]
pub(in crate::attention) struct Run {
    pub len: usize,
    pub dk: usize,
    pub dv: usize,
}

impl Run {
    /// Of one part.
    fn bytes<B: Backend>(self, op: &LightningAttention, heads: usize) -> usize {
        let s = shape::<B>(op, self.len, [self.dk, self.dv]);
        match self.len <= RECURRENT {
            true => 2 * bytes_of::<f32>(s.dk) + 2 * bytes_of::<f32>(s.dv),
            false => chunked_bytes::<B>(s, heads),
        }
    }

    /// Of all parts; never less for a longer call.
    pub(in crate::attention) fn scratch(self, rt: &Runtime, op: &LightningAttention) -> usize {
        struct Ask<'a>(Run, &'a LightningAttention);
        impl Task for Ask<'_> {
            type Output = usize;
            fn run<B: Backend>(self, _: B) -> usize {
                self.0.bytes::<B>(self.1, self.1.heads())
            }
        }
        rt.threads() * bytes_of::<u8>(rt.run(Ask(self, op)))
    }
}

/// Scratch of [`chunked`].
fn chunked_bytes<B: Backend>(shape: ChunkShape, heads: usize) -> usize {
    Walk::new([1, 1, heads], shape).bytes() + Chunk::<B>::bytes(shape)
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
                    scale: job.op.scale,
                    out: job.out.row_mut(at),
                });
            }
        }
    }
}

/// A job in the chunk form.
struct Chunked<'s, 'a, B: Backend, E> {
    b: B,
    job: Job<'a, E>,
    shape: ChunkShape,
    chunk: Chunk<'s, B>,
}

impl<B: Backend, E: Element> Chunks for Chunked<'_, '_, B, E> {
    fn load(&mut self, n: usize, h: usize, panels: &mut [f32]) {
        let state = self.job.state.reborrow().head_rows(n, h);
        self.b.call(ToPanels { state, panels });
    }

    fn advance(&mut self, n: usize, [h, done]: [usize; 2], next: [usize; 2], state: &mut [f32]) {
        let Self { b, job, shape, chunk } = self;
        let (head, rows) = (job.head(n, h), shape.chunk.min(job.q.shape()[1] - done));
        let soon = (job.head(n, next[0]), [next[1], shape.chunk]);
        let [k, q, v] = [soon.0.k, soon.0.q, soon.0.v].map(|x| Part::of(x, soon.1));
        let out = Part::of_mut(&job.out.head_mut(n, next[0]), soon.1);
        let ahead = &mut Ahead::new([k, q, v, out], shape.taken(true, true));
        let (out, state) = (Some(job.out.head_mut(n, h)), Carried::Panels(state));
        chunk.advance(*b, head, [done, rows], out, state, ahead);
    }

    fn store(&mut self, n: usize, h: usize, panels: &[f32]) {
        let state = self.job.state.reborrow().head_rows(n, h);
        self.b.call(FromPanels { panels, state });
    }
}

fn chunked<B: Backend, E: Element>(b: B, job: Job<'_, E>, mut scratch: Cut<'_>) {
    let ([batch, len, ..], shape) = (job.q.shape(), job.shape::<B>());
    let chunk = Chunk::new(b, shape, &mut scratch);
    let walk = Walk::new([batch, len, job.tables.len()], shape);
    walk.run(&mut scratch, &mut Chunked { b, job, shape, chunk });
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
    [q, k, v]: [View<'_, E, 4>; 3],
    out: ViewMut<'_, E, 4>,
    state: ViewMut<'_, f32, 4>,
    cut: Cut<'_>,
) {
    let [batch, _, heads, _] = q.shape();
    let by_batch = heads < rt.threads() && heads < batch;
    let job = Job { q, k, v, out, state, tables: &op.tables, op, by_batch };
    rt.run(Forward { rt, job, cut });
}

/// Scratch of one part of a long call.
pub(super) fn scratch_bytes(rt: &Runtime, op: &LightningAttention, dk: usize, dv: usize) -> usize {
    struct Ask<'a>(&'a LightningAttention, usize, usize);
    impl Task for Ask<'_> {
        type Output = usize;
        fn run<B: Backend>(self, _: B) -> usize {
            let shape = shape::<B>(self.0, usize::MAX, [self.1, self.2]);
            chunked_bytes::<B>(shape, self.0.heads())
        }
    }
    rt.run(Ask(op, dk, dv))
}
