//! Linear attention without decay: keys and values summed into a state, queries read from it.
//!
//! With `F = phi(Q)`, `G = phi(K)` of a block of rows, state `S` (`dk x dv`) and `z` (`dk`):
//!
//! ```text
//! Absorb:  S = S + G^T V              z = z + column sums of G
//! Read:    O = diag(w) F S            w_r = scale / (scale * F_r . z + eps), or scale
//! Chunk:   P = tril(F G^T)            O = diag(w) (F S + P V), row sums of P added to F_r . z; then Absorb
//! ```
//!
//! States lie in panels of [`PANEL`] value columns, as right operands of the matrix engine do.

use super::decay::Forget;
use super::feature_map::{FeatureMap, map_rows};
use super::recurrence::Step;
use super::staging::{add_columns, all_finite, partial_dot, prefetch, stage};
use super::store::Store;
use crate::scratch::{Cut, bytes_of};
use crate::simd::{
    Backend, Kernel, Lanes, Left, Order, PANEL, Product, Right, Sink, Source, Term, Tiles,
    right_len,
};
use crate::tensor::{Element, View, ViewMut};

/// Most rows of a [`Chunk`]: its quadratic part stays cheap, and a pass over the state pays.
pub const CHUNK: usize = 48;
/// Most rows of an [`Absorb`] or a [`Read`]: mapped rows and a panel of the state fit the first cache level.
pub const BLOCK: usize = 96;

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;

/// What every step of a call shares.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// `phi`
    pub map: FeatureMap,
    /// Factor of `phi(q)`.
    pub scale: f32,
    /// What is added to the normaliser, if there is one.
    pub eps: Option<f32>,
}

impl Form {
    /// The factor of an output row with `phi(q) . z = dot`.
    #[inline(always)]
    #[must_use]
    pub fn weight(&self, dot: f32) -> f32 {
        match self.eps {
            Some(eps) => self.scale / (self.scale * dot + eps),
            None => self.scale,
        }
    }
}

/// Widths of a head.
#[derive(Clone, Copy, Debug)]
pub struct LinearShape {
    /// Of queries and keys.
    pub dk: usize,
    /// Of values.
    pub dv: usize,
}

impl LinearShape {
    /// Floats of a state in panels.
    #[must_use]
    pub fn state_len(&self) -> usize {
        right_len(self.dk, self.dv)
    }

    /// Distance between mapped queries: not a power of two, so that rows do not meet in the same cache sets.
    fn q_stride(&self) -> usize {
        self.dk.next_multiple_of(16) + 16
    }

    /// Lengths of the buffers of [`LinearWork`], in order: floats, then packed elements.
    fn lens<B: Backend>(&self) -> ([usize; 7], [usize; 6]) {
        let Self { dk, dv } = *self;
        let rows = BLOCK.max(CHUNK);
        (
            [
                rows * self.q_stride(),
                rows * dk,
                rows * dv,
                rows * dv,
                rows,
                rows,
                CHUNK * SCORES,
            ],
            [
                right_len(dk, CHUNK),
                right_len(rows, dv),
                <B::T as Tiles>::left_len(rows, dk),
                <B::T as Tiles>::left_len(dk, rows),
                <B::T as Tiles>::left_len(CHUNK, CHUNK),
                <B::T as Tiles>::view_len(dk, PANEL),
            ],
        )
    }

    /// Bytes of a [`LinearWork`].
    #[must_use]
    pub fn bytes<B: Backend>(&self) -> usize {
        let (floats, packed) = self.lens::<B>();
        let floats: usize = floats.iter().map(|n| bytes_of::<f32>(*n)).sum();
        floats
            + packed
                .iter()
                .map(|n| bytes_of::<Elem<B>>(*n))
                .sum::<usize>()
    }
}

/// Distance between rows of scores.
const SCORES: usize = CHUNK.next_multiple_of(PANEL) + PANEL / 2;

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

/// Buffers for one block of rows of one head at a time.
pub struct LinearWork<'a, B: Backend> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    out: &'a mut [f32],
    weight: &'a mut [f32],
    ones: &'a mut [f32],
    scores: &'a mut [f32],
    keys: &'a mut [Elem<B>],
    values: &'a mut [Elem<B>],
    left_q: &'a mut [Elem<B>],
    left_k: &'a mut [Elem<B>],
    left_p: &'a mut [Elem<B>],
    view_s: &'a mut [Elem<B>],
    q_stride: usize,
}

impl<'a, B: Backend> LinearWork<'a, B> {
    /// Cuts the buffers off `scratch`.
    pub fn new(shape: LinearShape, scratch: &mut Cut<'a>) -> Self {
        let (floats, packed) = shape.lens::<B>();
        let [q, k, v, out, weight, ones, scores] = floats.map(|n| scratch.take::<f32>(n));
        let [keys, values, left_q, left_k, left_p, view_s] =
            packed.map(|n| scratch.take::<Elem<B>>(n));
        ones.fill(1.0);
        let q_stride = shape.q_stride();
        Self {
            q,
            k,
            v,
            out,
            weight,
            ones,
            scores,
            keys,
            values,
            left_q,
            left_k,
            left_p,
            view_s,
            q_stride,
        }
    }
}

impl<B: Backend> core::fmt::Debug for LinearWork<'_, B> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("LinearWork").finish_non_exhaustive()
    }
}

/// Adds a block of keys and values to a state.
#[derive(Debug)]
pub struct Absorb<'a, 'w, B: Backend, E> {
    /// What is computed.
    pub form: Form,
    /// `[n, dk]`
    pub k: View<'w, E, 2>,
    /// `[n, dv]`
    pub v: View<'w, E, 2>,
    /// First row and number of rows, at most [`BLOCK`].
    pub rows: [usize; 2],
    /// Buffers.
    pub work: &'w mut LinearWork<'a, B>,
    /// `S` in panels.
    pub state: &'w mut [f32],
    /// `z`
    pub z: &'w mut [f32],
}

impl<B: Backend, E: Element> Kernel<B> for Absorb<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Absorb {
            form,
            k,
            v,
            rows,
            work,
            state,
            z,
        } = self;
        let ([_, dk], [_, dv]) = (k.shape(), v.shape());
        map_rows(b, form.map, k, rows, work.k, dk);
        prefetch(b.lanes(), v, [rows[0] + rows[1], BLOCK]);
        let (v, v_stride) = stage(b, v, rows, work.v);
        b.tiles().pack_right(
            b.lanes(),
            Source::Rows(v, v_stride),
            rows[1],
            dv,
            work.values,
        );
        absorb(b, [rows[1], dk, dv], work, state, z);
    }
}

/// Reads a block of queries from a state.
#[derive(Debug)]
pub struct Read<'a, 'w, B: Backend, E> {
    /// What is computed.
    pub form: Form,
    /// `[n, dk]`
    pub q: View<'w, E, 2>,
    /// First row and number of rows, at most [`BLOCK`].
    pub rows: [usize; 2],
    /// Buffers.
    pub work: &'w mut LinearWork<'a, B>,
    /// `S` in panels.
    pub state: &'w [f32],
    /// `z`
    pub z: &'w [f32],
    /// `[n, dv]`, all rows.
    pub out: ViewMut<'w, E, 2>,
}

impl<B: Backend, E: Element> Kernel<B> for Read<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Read {
            form,
            q,
            rows,
            work,
            state,
            z,
            out,
        } = self;
        let dk = q.shape()[1];
        map_rows(b, form.map, q, rows, work.q, work.q_stride);
        weights(b.lanes(), form, dk, rows[1], work, z, false);
        read(
            b,
            [rows[1], dk, out.shape()[1]],
            rows[0],
            work,
            state,
            out,
            false,
        );
    }
}

/// A block of a causal sequence: every row reads the state up to and including itself.
#[derive(Debug)]
pub struct Chunk<'a, 'w, B: Backend, E> {
    /// What is computed.
    pub form: Form,
    /// `[n, dk]`
    pub q: View<'w, E, 2>,
    /// `[n, dk]`
    pub k: View<'w, E, 2>,
    /// `[n, dv]`
    pub v: View<'w, E, 2>,
    /// First row and number of rows, at most [`CHUNK`].
    pub rows: [usize; 2],
    /// Buffers.
    pub work: &'w mut LinearWork<'a, B>,
    /// `S` in panels.
    pub state: &'w mut [f32],
    /// `z`
    pub z: &'w mut [f32],
    /// `[n, dv]`, all rows.
    pub out: ViewMut<'w, E, 2>,
}

impl<B: Backend, E: Element> Kernel<B> for Chunk<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Chunk {
            form,
            q,
            k,
            v,
            rows,
            work,
            state,
            z,
            mut out,
        } = self;
        let ([_, dk], [_, dv], [at, m]) = (k.shape(), v.shape(), rows);
        let (l, t) = (b.lanes(), b.tiles());
        map_rows(b, form.map, q, rows, work.q, work.q_stride);
        map_rows(b, form.map, k, rows, work.k, dk);
        let (v, vs) = stage(b, v, rows, work.v);
        if !all_finite(l, v, vs, m, dv) {
            // A value that is not finite would reach earlier rows as 0 * inf; token by token it cannot.
            for r in 0..m {
                let y = &mut work.out[..dv];
                let (q, k) = (&work.q[r * work.q_stride..][..dk], &work.k[r * dk..][..dk]);
                token(b, form, [q, k, &v[r * vs..][..dv]], y, state, z);
                E::narrow(b.convert(), y, out.row_mut([at + r, 0]));
            }
            return;
        }
        t.pack_right(l, Source::Rows(v, vs), m, dv, work.values);
        t.pack_right(l, Source::Columns(work.k, dk), dk, m, work.keys);
        let left = Left {
            data: &*work.q,
            order: Order::Rows(work.q_stride),
        };
        let left = t.pack_left(l, left, m, dk, work.left_q);
        let term = Term {
            left,
            right: Right::packed(&*work.keys, dk),
            k: dk,
        };
        let product = Product {
            m,
            n: m,
            first: None,
            second: Some(term),
            causal: false,
            lower: true,
        };
        t.product(b, &product, &mut Masked(&mut *work.scores));
        weights(l, form, dk, m, work, z, true);
        read(b, [m, dk, dv], at, work, state, out, true);
        absorb(b, [m, dk, dv], work, state, z);
    }
}

struct Masked<'a>(&'a mut [f32]);

impl<L: Lanes> Sink<L> for Masked<'_> {
    #[inline(always)]
    fn put<const V: usize>(&mut self, l: L, i: usize, j: usize, _: usize, acc: &[L::F; V]) {
        let out = &mut self.0[i * SCORES + j..][..V * L::N];
        let mask = &LOWER[CHUNK - 1 - i + j..][..V * L::N];
        for v in 0..V {
            // Selected, not multiplied: what lies above the diagonal may be anything.
            let inside = l.lt(l.zero(), l.load(&mask[v * L::N..]));
            l.store(&mut out[v * L::N..], l.select(inside, acc[v], l.zero()));
        }
    }
}

struct Add<'a>(&'a mut [f32]);

impl<L: Lanes> Sink<L> for Add<'_> {
    #[inline(always)]
    fn put<const V: usize>(&mut self, l: L, i: usize, j: usize, _: usize, acc: &[L::F; V]) {
        let state = &mut self.0[i * PANEL + j..][..V * L::N];
        for v in 0..V {
            let s = &mut state[v * L::N..];
            l.store(s, l.add(l.load(s), acc[v]));
        }
    }
}

/// The factors of the output rows, from mapped queries and, if `causal`, the scores of the block.
#[inline(always)]
fn weights<B: Backend>(
    l: B::L,
    form: Form,
    dk: usize,
    m: usize,
    work: &mut LinearWork<'_, B>,
    z: &[f32],
    causal: bool,
) {
    if form.eps.is_none() {
        work.weight[..m].fill(form.scale);
        return;
    }
    for r in 0..m {
        let mut sum = partial_dot(l, &work.q[r * work.q_stride..][..dk], z);
        if causal {
            let (full, tail) = l.split(&work.scores[r * SCORES..][..=r]);
            for x in full {
                sum = l.add(sum, *x);
            }
            sum = l.add(sum, l.load_head(tail));
        }
        work.weight[r] = form.weight(l.sum(sum));
    }
}

/// `out = diag(weight) (F S + P V)`, the second term only if `causal`; `F`, `P` and packed `V` are in `work`.
#[inline(always)]
fn read<B: Backend, E: Element>(
    b: B,
    [m, dk, dv]: [usize; 3],
    at: usize,
    work: &mut LinearWork<'_, B>,
    state: &[f32],
    mut out: ViewMut<'_, E, 2>,
    causal: bool,
) {
    let (l, t) = (b.lanes(), b.tiles());
    let left_q = Left {
        data: &*work.q,
        order: Order::Rows(work.q_stride),
    };
    let left_q = t.pack_left(l, left_q, m, dk, work.left_q);
    let left_p = causal.then(|| {
        let left = Left {
            data: &*work.scores,
            order: Order::Rows(SCORES),
        };
        t.pack_left(l, left, m, m, work.left_p)
    });
    for j in (0..dv).step_by(PANEL) {
        let n = PANEL.min(dv - j);
        let right = t.view_right(l, &state[j * dk..][..PANEL * dk], dk, n, work.view_s);
        let inter = Term {
            left: left_q,
            right,
            k: dk,
        };
        let intra = left_p.map(|left| {
            let values = &work.values[j * m..][..PANEL * m];
            Term {
                left,
                right: Right::packed(values, m),
                k: m,
            }
        });
        let (first, second) = match intra {
            Some(intra) => (Some((inter, &*work.ones)), intra),
            None => (None, inter),
        };
        let product = Product {
            m,
            n,
            first,
            second: Some(second),
            causal,
            lower: false,
        };
        let scale = Some(&*work.weight);
        match E::as_f32_view(out.reborrow()) {
            Some(out) => {
                let out = out.slice(0, at, at + m).slice(1, j, j + n);
                t.product(
                    b,
                    &product,
                    &mut Store {
                        scale,
                        ..Store::new(out)
                    },
                );
            }
            None => {
                let rows = ViewMut::with_strides(&mut *work.out, [m, n], [dv, 1]);
                let rows = rows.expect("rows in the buffer");
                t.product(
                    b,
                    &product,
                    &mut Store {
                        scale,
                        ..Store::new(rows)
                    },
                );
                for r in 0..m {
                    let row = &mut out.row_mut([at + r, 0])[j..j + n];
                    E::narrow(b.convert(), &work.out[r * dv..][..n], row);
                }
            }
        }
    }
}

/// `S = S + G^T V`, `z = z + column sums of G`; `G` and packed `V` are in `work`.
#[inline(always)]
fn absorb<B: Backend>(
    b: B,
    [m, dk, dv]: [usize; 3],
    work: &mut LinearWork<'_, B>,
    state: &mut [f32],
    z: &mut [f32],
) {
    let (l, t) = (b.lanes(), b.tiles());
    add_columns(l, work.k, [m, dk], z);
    let left = Left {
        data: &*work.k,
        order: Order::Columns(dk),
    };
    let left = t.pack_left(l, left, dk, m, work.left_k);
    for j in (0..dv).step_by(PANEL) {
        let n = PANEL.min(dv - j);
        let values = Right::packed(&work.values[j * m..][..PANEL * m], m);
        let term = Term {
            left,
            right: values,
            k: m,
        };
        let product = Product {
            m: dk,
            n,
            first: None,
            second: Some(term),
            causal: false,
            lower: false,
        };
        t.product(b, &product, &mut Add(&mut state[j * dk..][..PANEL * dk]));
    }
}

/// One mapped token against a state in panels.
#[inline(always)]
fn token<B: Backend>(
    b: B,
    form: Form,
    [q, k, v]: [&[f32]; 3],
    out: &mut [f32],
    state: &mut [f32],
    z: &mut [f32],
) {
    let scale = normaliser(b.lanes(), form, q, k, z);
    let panels = state.chunks_exact_mut((PANEL * q.len()).max(1));
    for ((v, out), state) in v.chunks(PANEL).zip(out.chunks_mut(PANEL)).zip(panels) {
        Step {
            state,
            stride: PANEL,
            forget: Forget::Scale(1.0),
            q,
            k,
            v,
            out,
            scale,
        }
        .run(b);
    }
}

/// Adds a mapped key to `z`; the factor of the output of a mapped query.
#[inline(always)]
fn normaliser<L: Lanes>(l: L, form: Form, q: &[f32], k: &[f32], z: &mut [f32]) -> f32 {
    add_columns(l, k, [1, k.len()], z);
    form.weight(l.sum(partial_dot(l, q, z)))
}

/// One token against a row-major state.
#[derive(Debug)]
pub struct Token<'a, E> {
    /// What is computed.
    pub form: Form,
    /// `[n, dk]`
    pub q: View<'a, E, 2>,
    /// `[n, dk]`
    pub k: View<'a, E, 2>,
    /// `[n, dv]`
    pub v: View<'a, E, 2>,
    /// Which row.
    pub at: usize,
    /// Room for `q`, `k`, `v` and the output as `f32`.
    pub rows: [&'a mut [f32]; 4],
    /// `S`, `dk x dv`
    pub state: &'a mut [f32],
    /// `z`
    pub z: &'a mut [f32],
    /// `[n, dv]`, all rows.
    pub out: ViewMut<'a, E, 2>,
}

impl<B: Backend, E: Element> Kernel<B> for Token<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Token {
            form,
            q,
            k,
            v,
            at,
            rows: [qf, kf, vf, y],
            state,
            z,
            mut out,
        } = self;
        let (dk, dv) = (q.shape()[1], v.shape()[1]);
        map_rows(b, form.map, q, [at, 1], qf, dk);
        map_rows(b, form.map, k, [at, 1], kf, dk);
        let (v, _) = stage(b, v, [at, 1], vf);
        let scale = normaliser(b.lanes(), form, qf, kf, z);
        if dv > 0 {
            let v = &v[..dv];
            let forget = Forget::Scale(1.0);
            Step {
                state,
                stride: dv,
                forget,
                q: qf,
                k: kf,
                v,
                out: &mut *y,
                scale,
            }
            .run(b);
            E::narrow(b.convert(), y, out.row_mut([at, 0]));
        }
    }
}
