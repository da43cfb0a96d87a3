//! The run from the last token to the first, which gives the gradients of keys and values.
//!
//! With `dS_t` the gradient of the state behind token `t`, every token does
//!
//! ```text
//! dS <- dS + (scale q_t)^T do_t     dk_t = v_t dS^T     dv_t = k_t dS     dS <- lambda dS
//! ```
//!
//! Both gradients read the same state, one of them its transpose: it is advanced once and transposed panel by panel
//! while it is read. Heads (or batch rows) go to threads whole. When there are fewer of them than threads, `dk` and `dv`
//! part, and ranges of their columns after that: `dv` then advances columns of the state, and `dk` rows of a copy.
//! Every element goes through the same operations in the same order either way.

use super::LightningAttention;
use super::walk::{Chunk, Chunks, Walk, shape};
use crate::kernels::ahead::{Ahead, Part};
use crate::kernels::chunk::{Carried, ChunkShape, FromPanels, Head, ToPanels, Turn, TurnBack};
use crate::kernels::decay::DecayTable;
use crate::kernels::staging::each_row;
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, PANEL, Task};
use crate::tensor::{Element, View, ViewMut};

/// Some heads, or some batch rows, of a call.
struct Job<'a, E> {
    q: View<'a, E, 4>,
    k: View<'a, E, 4>,
    v: View<'a, E, 4>,
    dout: View<'a, E, 4>,
    dk: Option<ViewMut<'a, E, 4>>,
    dv: Option<ViewMut<'a, E, 4>>,
    /// The gradient of the final state, which becomes that of the initial one; zeros that nobody wants if there is none.
    state: Option<ViewMut<'a, f32, 4>>,
    /// Another one, for `dk` by itself.
    copy: Option<ViewMut<'a, f32, 4>>,
    tables: &'a [DecayTable],
    op: &'a LightningAttention,
    by_batch: bool,
}

fn split<T>(
    x: Option<ViewMut<'_, T, 4>>,
    axis: usize,
    mid: usize,
) -> [Option<ViewMut<'_, T, 4>>; 2] {
    match x.map(|x| x.split_at(axis, mid)) {
        Some((a, b)) => [Some(a), Some(b)],
        None => [None, None],
    }
}

impl<'a, E: Element> Job<'a, E> {
    /// Widths of the state, or of the part of it.
    fn widths(&self) -> [usize; 2] {
        [self.q.shape()[3], self.dout.shape()[3]]
    }

    /// Batch rows or heads: independent of each other.
    fn outer(&self) -> usize {
        if self.by_batch { self.q.shape()[0] } else { self.tables.len() }
    }

    /// Ranges of columns that threads may share a head by.
    fn panels(&self) -> usize {
        let [q, v] = self.widths().map(|width| width.div_ceil(PANEL));
        usize::from(self.dk.is_some()) * q + usize::from(self.dv.is_some()) * v
    }

    fn split_head(self, border: usize) -> (Self, Self) {
        if self.dk.is_some() && self.dv.is_some() {
            let Self { dk, dv, state, copy, .. } = self;
            return (
                Job { dk: None, dv, state, copy: None, ..self },
                Job { dk, dv: None, state: copy, copy: None, ..self },
            );
        }
        // Rows of the state belong to columns of `q`, its columns to those of `dout`.
        let (by_rows, [q, v]) = (self.dk.is_some(), self.widths());
        let ([dk_a, dk_b], [dv_a, dv_b]) = (split(self.dk, 3, border), split(self.dv, 3, border));
        let [state_a, state_b] = split(self.state, if by_rows { 2 } else { 3 }, border);
        let part = |from, to, dk, dv, state| {
            let (mut q, mut dout) = (self.q, self.dout);
            let narrowed = if by_rows { &mut q } else { &mut dout };
            *narrowed = narrowed.slice(3, from, to);
            Job { q, dout, dk, dv, state, copy: None, ..self }
        };
        let end = if by_rows { q } else { v };
        (part(0, border, dk_a, dv_a, state_a), part(border, end, dk_b, dv_b, state_b))
    }
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        self.outer() * self.panels()
    }

    fn flops(&self) -> usize {
        let [b, n, h, dk] = self.q.shape();
        6 * b * n * h * dk * self.dout.shape()[3]
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let outer = self.outer();
        if outer == 1 {
            return self.split_head(mid * PANEL);
        }
        let (axis, mid) =
            (if self.by_batch { 0 } else { 2 }, mid.div_ceil(self.panels()).clamp(1, outer - 1));
        let ([dk_a, dk_b], [dv_a, dv_b]) = (split(self.dk, axis, mid), split(self.dv, axis, mid));
        let [[state_a, state_b], [copy_a, copy_b]] =
            [self.state, self.copy].map(|x| split(x, axis.min(1), mid));
        let (tables_a, tables_b) =
            if self.by_batch { (self.tables, self.tables) } else { self.tables.split_at(mid) };
        let part = |from, to, dk, dv, state, copy, tables| {
            let [q, k, v, dout] =
                [self.q, self.k, self.v, self.dout].map(|x| x.slice(axis, from, to));
            Job { q, k, v, dout, dk, dv, state, copy, tables, ..self }
        };
        (
            part(0, mid, dk_a, dv_a, state_a, copy_a, tables_a),
            part(mid, outer, dk_b, dv_b, state_b, copy_b, tables_b),
        )
    }
}

/// Copies of one chunk of one head, the last row first.
struct Rows<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    dout: &'a mut [f32],
    /// Of either gradient.
    out: &'a mut [f32],
    /// A panel of the transposed state.
    panel: &'a mut [f32],
}

/// Sizes of a chunk as both gradients see it.
fn widest(shape: ChunkShape) -> ChunkShape {
    let most = shape.dk.max(shape.dv);
    ChunkShape { dk: most, dv: most, ..shape }
}

/// Scratch of [`chunked`]; never less for a longer call.
fn bytes<B: Backend>(op: &LightningAttention, len: usize, widths: [usize; 2]) -> usize {
    let shape = shape::<B>(op, len, widths);
    let wide = widest(shape);
    Walk::new([1, 1, op.heads()], shape).bytes()
        + Chunk::<B>::bytes(wide)
        + 5 * bytes_of::<f32>(shape.chunk * wide.dk)
        + bytes_of::<f32>(PANEL * wide.dk)
}

/// A job in the chunk form.
struct Chunked<'s, 'a, B: Backend, E> {
    b: B,
    job: Job<'a, E>,
    shape: ChunkShape,
    chunk: Chunk<'s, B>,
    rows: Rows<'s>,
}

/// Rows of a chunk in `dst`, the last one first.
fn turn<'d, B: Backend, E: Element>(
    b: B,
    src: View<'_, E, 2>,
    factor: f32,
    dst: &'d mut [f32],
) -> View<'d, f32, 2> {
    let [rows, width] = src.shape();
    let dst = &mut dst[..rows * width];
    b.call(Turn { src, factor, dst: &mut *dst });
    View::new(dst, [rows, width]).expect("rows of a chunk")
}

fn matrix(x: &mut [f32], [rows, width]: [usize; 2]) -> ViewMut<'_, f32, 2> {
    ViewMut::new(&mut x[..rows * width], [rows, width]).expect("rows of a chunk")
}

impl<'a, B: Backend, E: Element> Chunks for Chunked<'_, 'a, B, E> {
    fn load(&mut self, n: usize, h: usize, panels: &mut [f32]) {
        match &mut self.job.state {
            Some(state) => {
                let state = state.reborrow().head_rows(n, h);
                self.b.call(ToPanels { state, panels });
            }
            None => panels.fill(0.0),
        }
    }

    fn advance(
        &mut self,
        n: usize,
        [h, done]: [usize; 2],
        [next, after]: [usize; 2],
        state: &mut [f32],
    ) {
        let Self { b, job, shape, chunk, rows } = self;
        let (b, len) = (*b, job.q.shape()[1]);
        // The chunk behind which `done` rows were read before.
        let range = |done: usize| {
            let rows = shape.chunk.min(len - done);
            [len - done - rows, rows]
        };
        let ([at, m], soon) = (range(done), range(after));
        let this = |x: View<'a, E, 4>| x.head(n, h).slice(0, at, at + m);
        let coming = |x: View<'_, E, 4>| Part::of(x.head(n, next), soon);
        let coming_out = |x: &mut Option<ViewMut<'_, E, 4>>| {
            x.as_mut().map_or(Part::NONE, |x| Part::of_mut(&x.head_mut(n, next), soon))
        };
        let q = turn(b, this(job.q), job.op.scale, rows.q);
        let dout = turn(b, this(job.dout), 1.0, rows.dout);
        let decay = job.tables[h].after();
        if let Some(dk) = &mut job.dk {
            let v = turn(b, this(job.v), 1.0, rows.v);
            let head = Head { q: v, k: dout, v: q, decay, scale: 1.0 };
            let flipped = ChunkShape { dk: shape.dv, dv: shape.dk, ..*shape };
            let parts = [coming(job.q), coming(job.v)];
            let ahead = &mut Ahead::new(parts, flipped.taken(true, false));
            let out = Some(matrix(rows.out, [m, shape.dk]));
            let state = Carried::Transposed { panels: &*state, panel: &mut *rows.panel };
            chunk.advance(b, head, [0, m], out, state, ahead);
            b.call(TurnBack { src: &*rows.out, out: dk.head_mut(n, h).slice(0, at, at + m) });
        }
        let outs = [coming_out(&mut job.dk), coming_out(&mut job.dv)];
        let parts = [coming(job.dout), coming(job.k), outs[0], outs[1]];
        let ahead = &mut Ahead::new(parts, shape.taken(job.dv.is_some(), true));
        let mut head = Head { q, k: q, v: dout, decay, scale: 1.0 };
        let mut out = None;
        if job.dv.is_some() {
            head.q = turn(b, this(job.k), 1.0, rows.k);
            out = Some(matrix(rows.out, [m, shape.dv]));
        }
        chunk.advance(b, head, [0, m], out, Carried::Panels(state), ahead);
        if let Some(dv) = &mut job.dv {
            b.call(TurnBack { src: &*rows.out, out: dv.head_mut(n, h).slice(0, at, at + m) });
        }
    }

    fn store(&mut self, n: usize, h: usize, panels: &[f32]) {
        if let Some(state) = &mut self.job.state {
            let state = state.reborrow().head_rows(n, h);
            self.b.call(FromPanels { panels, state });
        }
    }
}

fn chunked<B: Backend, E: Element>(b: B, job: Job<'_, E>, mut scratch: Cut<'_>) {
    let ([batch, len, ..], widths) = (job.q.shape(), job.widths());
    let shape = shape::<B>(job.op, len, widths);
    let wide = widest(shape);
    let chunk = Chunk::new(b, wide, &mut scratch);
    let [q, k, v, dout, out] = [(); 5].map(|()| scratch.take(shape.chunk * wide.dk));
    let rows = Rows { q, k, v, dout, out, panel: scratch.take(PANEL * wide.dk) };
    let walk = Walk::new([batch, len, job.tables.len()], shape);
    walk.run(&mut scratch, &mut Chunked { b, job, shape, chunk, rows });
}

/// A call, ready to be dispatched.
struct Backward<'r, 'a, E> {
    rt: &'r Runtime,
    job: Job<'a, E>,
    cut: Cut<'a>,
}

impl<E: Element> Task for Backward<'_, '_, E> {
    type Output = ();

    fn run<B: Backend>(self, b: B) {
        let Backward { rt, mut job, cut } = self;
        let (len, widths) = (job.q.shape()[1], job.widths());
        if widths.contains(&0) {
            for x in [&mut job.dk, &mut job.dv].into_iter().flatten() {
                each_row(x.shape()).for_each(|at| x.row_mut(at).fill(E::default()));
            }
            return;
        }
        if job.q.shape().contains(&0) {
            return;
        }
        let bytes = bytes::<B>(job.op, len, widths);
        rt.divide_in(job, cut, bytes, &|job, cut| chunked(b, job, cut));
    }
}

/// Scratch of [`run`].
pub(super) fn scratch(
    rt: &Runtime,
    op: &LightningAttention,
    len: usize,
    widths: [usize; 2],
) -> usize {
    struct Ask<'a>(&'a LightningAttention, usize, [usize; 2]);
    impl Task for Ask<'_> {
        type Output = usize;
        fn run<B: Backend>(self, _: B) -> usize {
            bytes::<B>(self.0, self.1, self.2)
        }
    }
    rt.threads() * bytes_of::<u8>(rt.run(Ask(op, len, widths)))
}

/// Runs a checked call: `[q, k, v, dout]`, the gradients of `k` and `v`, and that of the final state with a copy of it,
/// or neither of the two if it is zero.
pub(super) fn run<E: Element>(
    rt: &Runtime,
    op: &LightningAttention,
    [q, k, v, dout]: [View<'_, E, 4>; 4],
    [dk, dv]: [ViewMut<'_, E, 4>; 2],
    [state, copy]: [Option<ViewMut<'_, f32, 4>>; 2],
    cut: Cut<'_>,
) {
    let [batch, _, heads, _] = q.shape();
    let by_batch = heads < rt.threads() && heads < batch;
    let (dk, dv) = (Some(dk), Some(dv));
    let job = Job { q, k, v, dout, dk, dv, state, copy, tables: &op.tables, op, by_batch };
    rt.run(Backward { rt, job, cut });
}
