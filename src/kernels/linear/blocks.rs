//! Blocks of keys that are added to a state, blocks of queries that read it.

use super::{Elem, Form, LinearWork, SCORES};
use crate::kernels::ahead::Meanwhile;
use crate::kernels::feature_map::{Features, Side};
use crate::kernels::staging::{add_columns, partial_dot, rows_of};
use crate::kernels::store::{AddPanel, Narrow};
use crate::simd::{Backend, Kernel, Lanes, Left, Order, PANEL, Product, Term, Tiles};
use crate::tensor::{Element, View, ViewMut};

/// Adds a block of keys and values to a state.
#[derive(Debug)]
pub struct Absorb<'a, 'w, B: Backend, E, M: Features> {
    /// What is computed.
    pub form: Form<M>,
    /// `[n, dk]`
    pub k: View<'w, E, 2>,
    /// `[n, dv]`
    pub v: View<'w, E, 2>,
    /// First row and number of rows, at most [`BLOCK`](super::BLOCK).
    pub rows: [usize; 2],
    /// Buffers.
    pub work: &'w mut LinearWork<'a, B, M>,
    /// `S` in panels.
    pub state: &'w mut [f32],
    /// `z`
    pub z: &'w mut [f32],
}

impl<B: Backend, E: Element, M: Features> Kernel<B> for Absorb<'_, '_, B, E, M> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let (rows, work) = (self.rows, self.work);
        let (dk, dv) = (work.shape.dk, work.shape.dv);
        self.form.map.rows(b, &mut work.map, Side::Key, self.k, rows, work.k, dk);
        b.tiles().pack_right(b, rows_of(self.v, rows[0]), rows[1], dv, work.values);
        absorb(b, [rows[1], dk, dv], work, self.state, self.z);
    }
}

/// Reads a block of queries from a state.
#[derive(Debug)]
pub struct Read<'a, 'w, B: Backend, E, M: Features> {
    /// What is computed.
    pub form: Form<M>,
    /// `[n, dk]`
    pub q: View<'w, E, 2>,
    /// First row and number of rows, at most [`BLOCK`](super::BLOCK).
    pub rows: [usize; 2],
    /// Buffers.
    pub work: &'w mut LinearWork<'a, B, M>,
    /// `S` in panels.
    pub state: &'w [f32],
    /// `z`
    pub z: &'w [f32],
    /// `[n, dv]`, all rows.
    pub out: ViewMut<'w, E, 2>,
}

impl<B: Backend, E: Element, M: Features> Kernel<B> for Read<'_, '_, B, E, M> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let ([at, m], work) = (self.rows, self.work);
        let (dk, dv, stride) = (work.shape.dk, work.shape.dv, work.q_stride);
        self.form.map.rows(b, &mut work.map, Side::Query, self.q, [at, m], work.q, stride);
        weights(b.lanes(), self.form, [m, dk], work, self.z, false);
        read(b, [m, dk, dv], work, self.state, self.out, at, false);
    }
}

/// The factors of the output rows, from mapped queries and, if `causal`, the scores of the block.
#[inline(always)]
pub(super) fn weights<B: Backend, M: Features>(
    l: B::L,
    form: Form<M>,
    [m, dk]: [usize; 2],
    work: &mut LinearWork<'_, B, M>,
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

/// `m x n` from one term, or from one with factors 1 and a lower triangular one.
fn product<'a, E: Copy>(
    m: usize,
    n: usize,
    term: Term<'a, E>,
    lower: Option<(Term<'a, E>, &'a [f32])>,
) -> Product<'a, E> {
    let (first, second) = match lower {
        Some((lower, ones)) => (Some((term, ones)), lower),
        None => (None, term),
    };
    Product { m, n, first, second: Some(second), causal: first.is_some(), lower: false }
}

/// `out = diag(weight) (F S + P V)` from row `at` on, the second term only if `causal`; `F`, `P` and packed `V`
/// are in `work`.
#[inline(always)]
pub(super) fn read<B: Backend, E: Element, M: Features>(
    b: B,
    [m, dk, dv]: [usize; 3],
    work: &mut LinearWork<'_, B, M>,
    state: &[f32],
    mut out: ViewMut<'_, E, 2>,
    at: usize,
    causal: bool,
) {
    let t = b.tiles();
    let left_q = Left::new(&*work.q, Order::Rows(work.q_stride));
    let left_q = t.pack_left(b, left_q, None, m, dk, work.left_q);
    let left_p = causal.then(|| {
        let left = Left::new(&*work.scores, Order::Rows(SCORES));
        t.pack_left(b, left, None, m, m, work.left_p)
    });
    for j in (0..dv).step_by(PANEL) {
        let n = PANEL.min(dv - j);
        let right = t.view_right(b, &state[j * dk..][..PANEL * dk], dk, n, work.view_s);
        let inter = Term { left: left_q, right, k: dk };
        let intra = left_p.map(|left| (values::<B>(left, work.values, m, j), &*work.ones));
        let product = product(m, n, inter, intra);
        let rows = out.reborrow().slice(0, at, at + m).slice(1, j, j + n);
        let sink = Narrow { out: rows, convert: b.convert(), scale: Some(&*work.weight) };
        t.product(b, &work.session, &product, &mut Meanwhile { sink, ahead: &mut work.ahead });
    }
}

/// `S = S + G^T V`, `z = z + column sums of G`; `G` and packed `V` are in `work`.
#[inline(always)]
pub(super) fn absorb<B: Backend, M: Features>(
    b: B,
    [m, dk, dv]: [usize; 3],
    work: &mut LinearWork<'_, B, M>,
    state: &mut [f32],
    z: &mut [f32],
) {
    let (l, t) = (b.lanes(), b.tiles());
    add_columns(l, work.k, [m, dk], z);
    let left = Left::new(&*work.k, Order::Columns(dk));
    let left = t.pack_left(b, left, None, dk, m, work.left_k);
    for j in (0..dv).step_by(PANEL) {
        let product = product(dk, PANEL.min(dv - j), values::<B>(left, work.values, m, j), None);
        let (sink, ahead) = (AddPanel(&mut state[j * dk..][..PANEL * dk]), &mut work.ahead);
        t.product(b, &work.session, &product, &mut Meanwhile { sink, ahead });
    }
}

/// `left` times the value columns of the panel at `j`.
#[inline(always)]
fn values<'a, B: Backend>(
    left: Left<'a, Elem<B>>,
    values: &'a [Elem<B>],
    m: usize,
    j: usize,
) -> Term<'a, Elem<B>> {
    Term { left, right: B::T::right(values, m).columns(j), k: m }
}
