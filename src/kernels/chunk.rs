//! The chunk form of a decayed linear recurrence, shared by every mechanism that has one.
//!
//! A chunk of `m` rows with incoming state `S` (`d x e`), `a_r = lambda^(r+1)`, `b_r = lambda^(m-1-r)`,
//! `M_rc = lambda^(r-c)` for `c <= r` and 0 above (Lightning Attention-2, Algorithm 1):
//!
//! ```text
//! P = scale * (Q K^T) o M                       m x m, the lower triangle only
//! O = diag(scale * a) Q S + P V                 one accumulation, written once
//! S = forget_m(S) + (diag(b) K)^T V
//! ```
//!
//! The state is kept in panels of [`PANEL`] value columns. A panel (`d x 32`) is read into the first cache
//! level once per chunk: it serves the output product and is updated in place right after.

use super::decay::{DecayTable, Flushed, Forget, Form, Fresh, Scaled, Shared};
use super::recurrence::Step;
use super::store::Store;
use crate::scratch::{Cut, bytes_of};
use crate::simd::{
    Backend, Kernel, Lanes, Left, Order, PANEL, Product, Right, Sink, Source, Term, Tiles,
    each_row, right_len,
};
use crate::tensor::{Element, Layout, View, ViewMut};

/// Sizes that decide how much scratch a chunk takes.
#[derive(Clone, Copy, Debug)]
pub struct ChunkShape {
    /// Largest number of rows.
    pub chunk: usize,
    /// Width of queries and keys.
    pub dk: usize,
    /// Width of values.
    pub dv: usize,
}

impl ChunkShape {
    /// Distance between rows of a score matrix.
    #[must_use]
    pub fn score_stride(&self) -> usize {
        self.chunk.next_multiple_of(PANEL)
    }

    /// Floats of one score matrix.
    #[must_use]
    pub fn score_len(&self) -> usize {
        self.chunk * self.score_stride()
    }

    /// Floats of a state in panels.
    #[must_use]
    pub fn state_len(&self) -> usize {
        right_len(self.dk, self.dv)
    }

    /// Bytes of a [`Workspace`].
    #[must_use]
    pub fn workspace_bytes<B: Backend>(&self) -> usize {
        let rows = bytes_of::<f32>(self.chunk * self.dk);
        let values = bytes_of::<f32>(self.chunk * self.dv);
        3 * rows
            + 2 * values
            + bytes_of::<f32>(self.chunk)
            + bytes_of::<Elem<B>>(right_len(self.dk, self.chunk))
            + bytes_of::<Elem<B>>(right_len(self.chunk, self.dv))
            + bytes_of::<Elem<B>>(<B::T as Tiles>::left_len(self.chunk, self.dk))
            + bytes_of::<Elem<B>>(<B::T as Tiles>::left_len(self.dk, self.chunk))
            + bytes_of::<Elem<B>>(<B::T as Tiles>::left_len(self.chunk, self.chunk))
            + bytes_of::<Elem<B>>(<B::T as Tiles>::view_len(self.dk, PANEL))
    }
}

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;

/// Buffers for one chunk of one head at a time.
pub struct Workspace<'a, B: Backend> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    out: &'a mut [f32],
    weighted: &'a mut [f32],
    query_scale: &'a mut [f32],
    keys: &'a mut [Elem<B>],
    values: &'a mut [Elem<B>],
    left_q: &'a mut [Elem<B>],
    left_k: &'a mut [Elem<B>],
    left_p: &'a mut [Elem<B>],
    view_s: &'a mut [Elem<B>],
}

impl<'a, B: Backend> Workspace<'a, B> {
    /// Cuts the buffers off `scratch`.
    pub fn new(shape: ChunkShape, scratch: &mut Cut<'a>) -> Self {
        let ChunkShape { chunk, dk, dv } = shape;
        Self {
            q: scratch.take(chunk * dk),
            k: scratch.take(chunk * dk),
            v: scratch.take(chunk * dv),
            out: scratch.take(chunk * dv),
            weighted: scratch.take(chunk * dk),
            query_scale: scratch.take(chunk),
            keys: scratch.take(right_len(dk, chunk)),
            values: scratch.take(right_len(chunk, dv)),
            left_q: scratch.take(<B::T as Tiles>::left_len(chunk, dk)),
            left_k: scratch.take(<B::T as Tiles>::left_len(dk, chunk)),
            left_p: scratch.take(<B::T as Tiles>::left_len(chunk, chunk)),
            view_s: scratch.take(<B::T as Tiles>::view_len(dk, PANEL)),
        }
    }
}

/// The sequence of one head, and how it decays.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a, E> {
    /// `[n, dk]`
    pub q: View<'a, E, 2>,
    /// `[n, dk]`
    pub k: View<'a, E, 2>,
    /// `[n, dv]`
    pub v: View<'a, E, 2>,
    /// Powers of the decay.
    pub decay: &'a DecayTable,
    /// Factor of the output.
    pub scale: f32,
}

/// Rows `at .. at + rows` as `f32`: in place, or converted into `buffer`. Returns the distance of rows too.
#[inline(always)]
fn stage<'a, B: Backend, E: Element>(
    b: B,
    src: View<'a, E, 2>,
    at: usize,
    rows: usize,
    buffer: &'a mut [f32],
) -> (&'a [f32], usize) {
    let (data, stride) = src.parts();
    let data = data.get(at * stride..).unwrap_or(&[]);
    if let Some(data) = E::as_f32(data) {
        return (data, stride);
    }
    let width = src.shape()[1];
    for r in 0..rows {
        E::widen(
            b.convert(),
            src.row([at + r, 0]),
            &mut buffer[r * width..][..width],
        );
    }
    (buffer, width)
}

/// `P = scale * (Q K^T) o M` of one chunk.
#[derive(Debug)]
pub struct Scores<'a, 'w, B: Backend, E> {
    /// The head.
    pub head: Head<'a, E>,
    /// First row.
    pub at: usize,
    /// Number of rows.
    pub rows: usize,
    /// Buffers.
    pub work: &'w mut Workspace<'a, B>,
    /// `rows x rows` with rows [`ChunkShape::score_stride`] apart.
    pub scores: &'w mut [f32],
    /// Distance between rows.
    pub stride: usize,
    /// What is needed next.
    pub ahead: &'w mut Ahead,
}

impl<B: Backend> core::fmt::Debug for Workspace<'_, B> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Workspace").finish_non_exhaustive()
    }
}

struct Masked<'a> {
    scores: &'a mut [f32],
    stride: usize,
    decay: &'a DecayTable,
    scale: f32,
}

impl<L: Lanes> Sink<L> for Masked<'_> {
    #[inline(always)]
    fn put<const V: usize>(&mut self, l: L, i: usize, j: usize, _: usize, acc: &[L::F; V]) {
        let out = &mut self.scores[i * self.stride + j..][..V * L::N];
        let mask = &self.decay.mask(i, j)[..V * L::N];
        for (v, acc) in acc.iter().enumerate() {
            let m = l.load(&mask[v * L::N..]);
            // Selected, not multiplied: what lies above the diagonal may be anything.
            let x = l.mul(l.mul(*acc, l.splat(self.scale)), m);
            l.store(
                &mut out[v * L::N..],
                l.select(l.lt(l.zero(), m), x, l.zero()),
            );
        }
    }
}

impl<B: Backend, E: Element> Kernel<B> for Scores<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Scores {
            head,
            at,
            rows: m,
            work,
            scores,
            stride,
            ahead,
        } = self;
        let (l, t, dk) = (b.lanes(), b.tiles(), head.q.shape()[1]);
        let (q, qs) = stage(b, head.q, at, m, work.q);
        let (k, ks) = stage(b, head.k, at, m, work.k);
        t.pack_right(l, Source::Columns(k, ks), dk, m, work.keys);
        let left = t.pack_left(
            l,
            Left {
                data: q,
                order: Order::Rows(qs),
            },
            m,
            dk,
            work.left_q,
        );
        let product = Product {
            m,
            n: m,
            first: None,
            second: Some(Term {
                left,
                right: Right::packed(work.keys, dk),
                k: dk,
            }),
            causal: false,
            lower: true,
        };
        t.product(
            b,
            &product,
            &mut Meanwhile {
                sink: Masked {
                    scores,
                    stride,
                    decay: head.decay,
                    scale: head.scale,
                },
                ahead,
            },
        );
    }
}

/// The outputs and the new state of one chunk.
#[derive(Debug)]
pub struct Advance<'a, 'w, B: Backend, E> {
    /// The head.
    pub head: Head<'a, E>,
    /// First row.
    pub at: usize,
    /// Number of rows.
    pub rows: usize,
    /// Buffers.
    pub work: &'w mut Workspace<'a, B>,
    /// As [`Scores`] left them.
    pub scores: &'w [f32],
    /// Distance between their rows.
    pub stride: usize,
    /// `[n, dv]`, all rows. With `head.v` and `state` it may be a range of value columns only.
    pub out: ViewMut<'w, E, 2>,
    /// The state in panels.
    pub state: &'w mut [f32],
    /// What is needed next.
    pub ahead: &'w mut Ahead,
}

/// `S <- forget(S) + product` for one panel.
struct Update<'a> {
    state: &'a mut [f32],
    forget: Forget,
    /// Whether tiny elements become zero this time.
    flush: bool,
}

impl Update<'_> {
    #[inline(always)]
    fn tile<L: Lanes, const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        acc: &[[L::F; V]; M],
        form: impl Form,
    ) {
        let lane = if V * L::N == PANEL { 0 } else { j % PANEL };
        let rows = &mut self.state[i * PANEL..][..M * PANEL];
        each_row!(r < M => {
            let (row, _) = l.split_mut(&mut rows[r * PANEL + lane..][..V * L::N]);
            let row: &mut [L::F; V] = row.try_into().expect("V vectors");
            for v in 0..V {
                row[v] = form.next(l, row[v], acc[r][v]);
            }
        });
    }
}

impl<L: Lanes> Sink<L> for Update<'_> {
    #[inline(always)]
    fn put<const V: usize>(&mut self, l: L, i: usize, j: usize, width: usize, acc: &[L::F; V]) {
        self.put_tile(l, i, j, width, &[*acc]);
    }

    #[inline(always)]
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        _: usize,
        acc: &[[L::F; V]; M],
    ) {
        match (self.forget, self.flush) {
            (Forget::All, _) => self.tile(l, i, j, acc, Flushed(Fresh)),
            (Forget::Scale(f), false) => self.tile(l, i, j, acc, Scaled(f)),
            (Forget::Scale(f), true) => self.tile(l, i, j, acc, Flushed(Scaled(f))),
            (Forget::Share(f), false) => self.tile(l, i, j, acc, Shared(f)),
            (Forget::Share(f), true) => self.tile(l, i, j, acc, Flushed(Shared(f))),
        }
    }
}

impl<B: Backend, E: Element> Kernel<B> for Advance<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Advance {
            head,
            at,
            rows: m,
            work,
            scores,
            stride,
            mut out,
            state,
            ahead,
        } = self;
        let (l, t) = (b.lanes(), b.tiles());
        let (dk, dv) = (head.q.shape()[1], head.v.shape()[1]);
        let (v, vs) = stage(b, head.v, at, m, work.v);
        t.pack_right(l, Source::Rows(v, vs), m, dv, work.values);
        let forget = head.decay.forget(m);
        // The last chunk of a call always: the next call counts its chunks from 0 again.
        let flush = at + m == head.q.shape()[0] || head.decay.flush_due(at, m);
        if forget == Forget::All {
            state.fill(0.0);
        }
        let (q, qs) = stage(b, head.q, at, m, work.q);
        let (k, ks) = stage(b, head.k, at, m, work.k);
        for (r, w) in head.decay.key(m).iter().enumerate() {
            weigh(
                l,
                &k[r * ks..][..dk],
                *w,
                &mut work.weighted[r * dk..][..dk],
            );
        }
        let query_scale: &[f32] = if head.scale == 1.0 {
            head.decay.query(m)
        } else {
            for (s, w) in work.query_scale.iter_mut().zip(head.decay.query(m)) {
                *s = head.scale * w;
            }
            work.query_scale
        };
        let left_q = t.pack_left(
            l,
            Left {
                data: q,
                order: Order::Rows(qs),
            },
            m,
            dk,
            work.left_q,
        );
        let keys = Left {
            data: &*work.weighted,
            order: Order::Columns(dk),
        };
        let left_k = t.pack_left(l, keys, dk, m, work.left_k);
        let left_p = t.pack_left(
            l,
            Left {
                data: scores,
                order: Order::Rows(stride),
            },
            m,
            m,
            work.left_p,
        );
        for j in (0..dv).step_by(PANEL) {
            let n = PANEL.min(dv - j);
            let state = &mut state[j * dk..][..PANEL * dk];
            if !all_finite(l, &v[j..], vs, m, n) {
                // A value that is not finite would reach earlier rows as 0 * inf; token by token it cannot.
                // Panel by panel, because threads that share a head divide it by panels.
                for r in 0..m {
                    let y = &mut work.out[..n];
                    Step {
                        state: &mut *state,
                        stride: PANEL,
                        forget: head.decay.forget(1),
                        q: &q[r * qs..][..dk],
                        k: &k[r * ks..][..dk],
                        v: &v[r * vs + j..][..n],
                        out: &mut *y,
                        scale: head.scale,
                    }
                    .run(b);
                    E::narrow(b.convert(), y, &mut out.row_mut([at + r, 0])[j..j + n]);
                }
                continue;
            }
            let values = Right::packed(&work.values[j * m..][..PANEL * m], m);
            let right_s = t.view_right(l, state, dk, n, work.view_s);
            let product = Product {
                m,
                n,
                first: Some((
                    Term {
                        left: left_q,
                        right: right_s,
                        k: dk,
                    },
                    query_scale,
                )),
                second: Some(Term {
                    left: left_p,
                    right: values,
                    k: m,
                }),
                causal: true,
                lower: false,
            };
            match E::as_f32_view(out.reborrow()) {
                Some(out) => {
                    let out = out.slice(0, at, at + m).slice(1, j, j + n);
                    t.product(
                        b,
                        &product,
                        &mut Meanwhile {
                            sink: Store::new(out),
                            ahead,
                        },
                    );
                }
                None => {
                    let rows = ViewMut::with_strides(&mut *work.out, [m, n], [dv, 1]);
                    let sink = Store::new(rows.expect("rows in the buffer"));
                    t.product(b, &product, &mut Meanwhile { sink, ahead });
                    for r in 0..m {
                        let row = &mut out.row_mut([at + r, 0])[j..j + n];
                        E::narrow(b.convert(), &work.out[r * dv..][..n], row);
                    }
                }
            }
            let product = Product {
                m: dk,
                n,
                first: None,
                second: Some(Term {
                    left: left_k,
                    right: values,
                    k: m,
                }),
                causal: false,
                lower: false,
            };
            let sink = Update {
                state,
                forget,
                flush,
            };
            t.product(b, &product, &mut Meanwhile { sink, ahead });
        }
    }
}

#[inline(always)]
fn all_finite<L: Lanes>(l: L, data: &[f32], stride: usize, rows: usize, width: usize) -> bool {
    // x * 0 is 0 for finite x and NaN for the rest; four sums, because one would wait for itself.
    let mut sums = [l.zero(); 4];
    for r in 0..rows {
        let (full, tail) = l.split(&data[r * stride..][..width]);
        let (blocks, rest) = full.as_chunks::<4>();
        for x in blocks {
            for i in 0..4 {
                sums[i] = l.mul_add(x[i], l.zero(), sums[i]);
            }
        }
        for x in rest {
            sums[0] = l.mul_add(*x, l.zero(), sums[0]);
        }
        sums[1] = l.mul_add(l.load_head(tail), l.zero(), sums[1]);
    }
    l.sum(l.add(l.add(sums[0], sums[1]), l.add(sums[2], sums[3]))) == 0.0
}

#[inline(always)]
fn weigh<L: Lanes>(l: L, src: &[f32], w: f32, dst: &mut [f32]) {
    let (s, s_tail) = l.split(src);
    let (d, d_tail) = l.split_mut(dst);
    for (d, s) in d.iter_mut().zip(s) {
        *d = l.mul(*s, l.splat(w));
    }
    l.store_head(d_tail, l.mul(l.load_head(s_tail), l.splat(w)));
}

/// Between a row-major state `[dk, dv]` and panels; the padding of the last panel is zero.
#[derive(Debug)]
pub struct ToPanels<'a> {
    /// `dk x dv`
    pub state: &'a [f32],
    /// Columns.
    pub dv: usize,
    /// [`ChunkShape::state_len`] floats.
    pub panels: &'a mut [f32],
}

impl<B: Backend> Kernel<B> for ToPanels<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: B) {
        if self.dv == 0 {
            return;
        }
        let dk = self.state.len() / self.dv;
        for (i, row) in self.state.chunks_exact(self.dv).enumerate() {
            for (p, part) in row.chunks(PANEL).enumerate() {
                let dst = &mut self.panels[(p * dk + i) * PANEL..][..PANEL];
                dst[..part.len()].copy_from_slice(part);
                dst[part.len()..].fill(0.0);
            }
        }
    }
}

/// The way back of [`ToPanels`], into a matrix that may have more columns.
#[derive(Debug)]
pub struct FromPanels<'a> {
    /// [`ChunkShape::state_len`] floats.
    pub panels: &'a [f32],
    /// `dk x dv`
    pub state: ViewMut<'a, f32, 2>,
}

impl<B: Backend> Kernel<B> for FromPanels<'_> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, _: B) {
        let [dk, _] = self.state.shape();
        for i in 0..dk {
            for (p, part) in self.state.row_mut([i, 0]).chunks_mut(PANEL).enumerate() {
                part.copy_from_slice(&self.panels[(p * dk + i) * PANEL..][..part.len()]);
            }
        }
    }
}

/// The memory of a chunk that is not needed yet, asked for a few cache lines at a time while another chunk is
/// computed: memory and arithmetic overlap, and never more lines are on their way than the core can track.
#[derive(Debug)]
pub struct Ahead {
    /// Address, distance of rows and width of rows in bytes, for k, q, v and the output.
    parts: [(usize, usize, usize); 4],
    rows: usize,
    part: usize,
    row: usize,
    /// Offset of the row, and inside of it.
    start: usize,
    column: usize,
}

impl Ahead {
    /// The rows `at .. at + rows` of a head and its output.
    pub fn new<E: Element>(
        head: &Head<'_, E>,
        out: &ViewMut<'_, E, 2>,
        at: usize,
        rows: usize,
    ) -> Self {
        let part = |address: usize, layout: Layout<2>| {
            let size = size_of::<E>();
            let stride = layout.strides()[0] * size;
            (address + at * stride, stride, layout.shape()[1] * size)
        };
        let [k, q, v] = [head.k, head.q, head.v].map(|x| part(x.address(), x.layout()));
        let parts = [k, q, v, part(out.address(), out.layout())];
        Self {
            parts,
            rows,
            part: if rows == 0 { 4 } else { 0 },
            row: 0,
            start: 0,
            column: 0,
        }
    }

    /// Nothing.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            parts: [(0, 0, 0); 4],
            rows: 0,
            part: 4,
            row: 0,
            start: 0,
            column: 0,
        }
    }

    /// Asks for one line.
    #[inline(always)]
    fn step<L: Lanes>(&mut self, l: L) {
        const LINE: usize = 64;
        let Some((address, stride, width)) = self.parts.get(self.part) else {
            return;
        };
        l.prefetch(address + self.start + self.column);
        self.column += LINE;
        if self.column >= *width {
            self.column = 0;
            self.row += 1;
            self.start += stride;
            if self.row == self.rows {
                (self.part, self.row, self.start) = (self.part + 1, 0, 0);
            }
        }
    }
}

/// A sink that also asks for two lines of what comes next per row that it takes.
struct Meanwhile<'b, S> {
    sink: S,
    ahead: &'b mut Ahead,
}

impl<L: Lanes, S: Sink<L>> Sink<L> for Meanwhile<'_, S> {
    #[inline(always)]
    fn put<const V: usize>(&mut self, l: L, i: usize, j: usize, width: usize, acc: &[L::F; V]) {
        self.put_tile(l, i, j, width, &[*acc]);
    }

    #[inline(always)]
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        width: usize,
        acc: &[[L::F; V]; M],
    ) {
        for _ in 0..2 * M {
            self.ahead.step(l);
        }
        self.sink.put_tile(l, i, j, width, acc);
    }
}
