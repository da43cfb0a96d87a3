//! Causal sequences: a chunk of rows, or one token.

use super::blocks::{absorb, read, weights};
use super::{CHUNK, Form, LinearWork, SCORES};
use crate::kernels::ahead::Meanwhile;
use crate::kernels::decay::Forget;
use crate::kernels::feature_map::{Features, Side};
use crate::kernels::recurrence::Step;
use crate::kernels::staging::{add_columns, finite_rows, partial_dot, rows_of, stage};
use crate::kernels::store::fill_tile;
use crate::simd::{Backend, Kernel, Lanes, Left, Order, PANEL, Product, Sink, Source, Term, Tiles};
use crate::tensor::{Element, View, ViewMut};

/// Row `r` of a causal mask of `CHUNK` rows is a window of these.
const LOWER: [f32; 2 * CHUNK + 2 * PANEL] = {
    let mut x = [0.0; 2 * CHUNK + 2 * PANEL];
    let mut i = 0;
    while i < CHUNK {
        x[i] = 1.0;
        i += 1;
    }
    x
};

/// A chunk of a causal sequence: every row reads the state up to and including itself.
#[derive(Debug)]
pub struct Chunk<'a, 'w, B: Backend, E, M: Features> {
    /// What is computed.
    pub form: Form<M>,
    /// `[n, dk]`
    pub q: View<'w, E, 2>,
    /// `[n, dk]`
    pub k: View<'w, E, 2>,
    /// `[n, dv]`
    pub v: View<'w, E, 2>,
    /// First row and number of rows, at most [`CHUNK`].
    pub rows: [usize; 2],
    /// Buffers.
    pub work: &'w mut LinearWork<'a, B, M>,
    /// `S` in panels.
    pub state: &'w mut [f32],
    /// `z`
    pub z: &'w mut [f32],
    /// `[n, dv]`, all rows.
    pub out: ViewMut<'w, E, 2>,
}

impl<B: Backend, E: Element, M: Features> Kernel<B> for Chunk<'_, '_, B, E, M> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Chunk { form, rows, work, state, z, mut out, .. } = self;
        let (dk, dv, [at, m]) = (work.shape.dk, work.shape.dv, rows);
        let (l, t, stride) = (b.lanes(), b.tiles(), work.q_stride);
        form.map.rows(b, &mut work.map, Side::Query, self.q, rows, work.q, stride);
        form.map.rows(b, &mut work.map, Side::Key, self.k, rows, work.k, dk);
        if !finite_rows(b, self.v, rows) {
            let (v, vs) = stage(b, self.v, rows, work.v);
            // A value that is not finite would reach earlier rows as 0 * inf; token by token it cannot.
            for r in 0..m {
                let y = &mut work.out[..dv];
                let (q, k) = (&work.q[r * work.q_stride..][..dk], &work.k[r * dk..][..dk]);
                token(b, form, [q, k, &v[r * vs..][..dv]], y, state, z);
                E::narrow(b.convert(), y, out.row_mut([at + r, 0]));
            }
            return;
        }
        t.pack_right(b, rows_of(self.v, at), m, dv, work.values);
        t.pack_right(b, Source::Columns(work.k, dk), dk, m, work.keys);
        let left = Left::new(&*work.q, Order::Rows(work.q_stride));
        let left = t.pack_left(b, left, None, m, dk, work.left_q);
        let right = B::T::right(work.keys, dk);
        let scores = Some(Term { left, right, k: dk });
        let product = Product { m, n: m, first: None, second: scores, causal: false, lower: true };
        let (sink, ahead) = (Masked(&mut *work.scores), &mut work.ahead);
        t.product(b, &work.session, &product, &mut Meanwhile { sink, ahead });
        weights(l, form, [m, dk], work, z, true);
        read(b, [m, dk, dv], work, state, out, at, true);
        absorb(b, [m, dk, dv], work, state, z);
    }
}

struct Masked<'a>(&'a mut [f32]);

impl<L: Lanes> Sink<L> for Masked<'_> {
    #[inline(always)]
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        _: usize,
        acc: &[[L::F; V]; M],
    ) {
        fill_tile::<L, M, V>(
            l,
            self.0,
            [i * SCORES + j, SCORES],
            #[inline(always)]
            |r, v| {
                // Selected, not multiplied: what lies above the diagonal may be anything.
                let mask = &LOWER[CHUNK - 1 - (i + r) + j..];
                let inside = l.lt(l.zero(), l.load(&mask[v * L::N..]));
                l.select(inside, acc[r][v], l.zero())
            },
        );
    }
}

/// One mapped token against a state in panels.
#[inline(always)]
fn token<B: Backend, M: Features>(
    b: B,
    form: Form<M>,
    [q, k, v]: [&[f32]; 3],
    out: &mut [f32],
    state: &mut [f32],
    z: &mut [f32],
) {
    let scale = normaliser(b.lanes(), form, q, k, z);
    let (forget, stride) = (Forget::Scale(1.0), PANEL);
    let panels = state.chunks_exact_mut((PANEL * q.len()).max(1));
    for ((v, out), state) in v.chunks(PANEL).zip(out.chunks_mut(PANEL)).zip(panels) {
        Step { state, stride, forget, q, k, v, out, scale }.run(b);
    }
}

/// Adds a mapped key to `z`; the factor of the output of a mapped query.
#[inline(always)]
fn normaliser<L: Lanes, M: Features>(
    l: L,
    form: Form<M>,
    q: &[f32],
    k: &[f32],
    z: &mut [f32],
) -> f32 {
    add_columns(l, k, [1, k.len()], z);
    form.weight(l.sum(partial_dot(l, q, z)))
}

/// One token against a row-major state.
pub struct Token<'a, 'w, B: Backend, E, M: Features> {
    /// What is computed.
    pub form: Form<M>,
    /// What features need.
    pub map: &'a mut M::Work<'w, B>,
    /// `[n, dk]`
    pub q: View<'a, E, 2>,
    /// `[n, dk]`
    pub k: View<'a, E, 2>,
    /// `[n, dv]`
    pub v: View<'a, E, 2>,
    /// Which row.
    pub at: usize,
    /// Room for features of `q` and `k`, for `v` and the output as `f32`.
    pub rows: [&'a mut [f32]; 4],
    /// `S`, `dk x dv`
    pub state: &'a mut [f32],
    /// `z`
    pub z: &'a mut [f32],
    /// `[n, dv]`, all rows.
    pub out: ViewMut<'a, E, 2>,
}

impl<B: Backend, E, M: Features> core::fmt::Debug for Token<'_, '_, B, E, M> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Token").finish_non_exhaustive()
    }
}

impl<B: Backend, E: Element, M: Features> Kernel<B> for Token<'_, '_, B, E, M> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Token { form, at, state, z, mut out, .. } = self;
        let [q, k, v, y] = self.rows;
        let (dk, [_, dv]) = (z.len(), self.v.shape());
        form.map.rows(b, self.map, Side::Query, self.q, [at, 1], q, dk);
        form.map.rows(b, self.map, Side::Key, self.k, [at, 1], k, dk);
        let (v, _) = stage(b, self.v, [at, 1], v);
        let scale = normaliser(b.lanes(), form, q, k, z);
        if dv > 0 {
            let (v, forget, stride) = (&v[..dv], Forget::Scale(1.0), dv);
            Step { state, stride, forget, q, k, v, out: &mut *y, scale }.run(b);
            E::narrow(b.convert(), y, out.row_mut([at, 0]));
        }
    }
}
