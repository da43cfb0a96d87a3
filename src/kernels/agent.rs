//! The two steps of agent attention on blocks of one head.
//!
//! Agents `A` (`n x dk`), a block of keys `K` (`m x dk`) and values `V` (`m x dv`), a block of queries `Q`; running
//! maxima `x` and sums `l` (`n`), and weighted sums `U` (`n x dv`), all per agent:
//!
//! ```text
//! Gather:  S = K A^T + b1^T      x' = max(x, column max S)      P = exp(S - x')      c = exp(x - x')
//!          l = c l + column sums of P            U = diag(c) U + P^T V
//! Ask:     S = Q A^T + b2        P = softmax of rows            O = P VA       with VA = diag(1 / l) U
//! ```
//!
//! Keys are the rows of `S` in both steps: they are read where they lie, one packed `A^T` serves both, and the softmax
//! over keys needs nothing across a vector.

use super::ahead::{Ahead, Meanwhile};
use super::attend::{Block, Plain, stage};
use super::softmax::{Online, exp_rows, online_columns, scale_row};
use super::staging::rows_of;
use super::store::{Keep, Narrow, Store, Whole};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Kernel, Lanes, Left, Order, PANEL, Product, Source, Term, Tiles};
use crate::tensor::{Element, View, ViewMut};

/// Rows of a block of keys or queries.
pub const BLOCK: usize = 96;

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;
type ScoreElem<B> = <<B as Backend>::S as Tiles>::Elem;

/// Sizes of a head.
#[derive(Clone, Copy, Debug)]
pub struct AgentShape {
    /// Agents.
    pub n: usize,
    /// Width of agents, queries and keys.
    pub dk: usize,
    /// Width of values.
    pub dv: usize,
}

impl AgentShape {
    /// Agents in whole panels.
    fn padded(&self) -> usize {
        self.n.next_multiple_of(PANEL)
    }

    /// Distance between rows of scores: room for whole tiles, and no power of two.
    fn stride(&self) -> usize {
        self.padded() + PANEL / 2
    }

    /// Rows of tiles that a [`Gather`] of `m` keys computes.
    #[must_use]
    pub fn gather_rows(&self, m: usize) -> usize {
        m * self.n.div_ceil(PANEL) + self.n * self.dv.div_ceil(PANEL)
    }

    /// Rows of tiles that an [`Ask`] of `m` queries computes.
    #[must_use]
    pub fn ask_rows(&self, m: usize) -> usize {
        m * (self.n.div_ceil(PANEL) + self.dv.div_ceil(PANEL))
    }

    /// Elements of the packed agents of a head.
    #[must_use]
    pub fn agents_len<B: Backend>(&self) -> usize {
        B::S::right_len(self.dk, self.n)
    }

    /// Elements of the packed values of the agents of a head.
    #[must_use]
    pub fn values_len<B: Backend>(&self) -> usize {
        B::T::right_len(self.n, self.dv)
    }

    /// Floats of the running state of a head: weighted sums, maxima, sums.
    #[must_use]
    pub fn state_len(&self) -> usize {
        (self.n * self.dv).next_multiple_of(16) + 2 * self.padded()
    }

    /// Lengths of the buffers of [`AgentWork`], in order: floats, elements of scores, elements of values.
    fn lens<B: Backend>(&self) -> ([usize; 4], usize, [usize; 2]) {
        let Self { n, dk, dv } = *self;
        let left = B::T::left_len(n, BLOCK).max(B::T::left_len(BLOCK, n));
        (
            [BLOCK * self.stride(), (BLOCK.max(n) + 1) * dk.max(dv), BLOCK, self.padded()],
            B::S::left_len(BLOCK, dk),
            [left, B::T::right_len(BLOCK, dv)],
        )
    }

    /// Bytes of an [`AgentWork`].
    #[must_use]
    pub fn work_bytes<B: Backend>(&self) -> usize {
        let (floats, scores, packed) = self.lens::<B>();
        let floats: usize = floats.iter().map(|n| bytes_of::<f32>(*n)).sum();
        let packed: usize = packed.iter().map(|n| bytes_of::<Elem<B>>(*n)).sum();
        floats + bytes_of::<ScoreElem<B>>(scores) + packed + bytes_of::<usize>(BLOCK)
    }
}

/// Buffers of one thread.
pub struct AgentWork<'a, B: Backend> {
    shape: AgentShape,
    scores: &'a mut [f32],
    rows: &'a mut [f32],
    weight: &'a mut [f32],
    factor: &'a mut [f32],
    left: &'a mut [ScoreElem<B>],
    left_p: &'a mut [Elem<B>],
    values: &'a mut [Elem<B>],
    // Dropped in this order: the later session goes first.
    session: <B::T as Tiles>::Session,
    score_session: <B::S as Tiles>::Session,
    /// What is needed next, asked for during the products of the next kernel.
    pub ahead: Ahead,
}

impl<'a, B: Backend> AgentWork<'a, B> {
    /// Cuts the buffers off `scratch`; the second part is room for the numbers of [`BLOCK`] keys.
    pub fn new(b: B, shape: AgentShape, scratch: &mut Cut<'a>) -> (Self, &'a mut [usize]) {
        let (floats, scores_len, packed) = shape.lens::<B>();
        let [scores, rows, weight, factor] = floats.map(|n| scratch.take::<f32>(n));
        let left = scratch.take(scores_len);
        let [left_p, values] = packed.map(|n| scratch.take(n));
        let score_session = b.scores().session();
        let session = b.tiles().session();
        let list = scratch.take(BLOCK);
        let work = Self {
            shape,
            scores,
            rows,
            weight,
            factor,
            left,
            left_p,
            values,
            session,
            score_session,
            ahead: Ahead::none(),
        };
        (work, list)
    }
}

impl<B: Backend> core::fmt::Debug for AgentWork<'_, B> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("AgentWork").finish_non_exhaustive()
    }
}

/// Packs the agents of a head, scaled.
#[derive(Debug)]
pub struct PackAgents<'a, 'w, B: Backend, E> {
    /// `[n, dk]`
    pub agents: View<'w, E, 2>,
    /// Their factor.
    pub scale: f32,
    /// Buffers.
    pub work: &'w mut AgentWork<'a, B>,
    /// [`AgentShape::agents_len`] elements.
    pub packed: &'w mut [ScoreElem<B>],
}

impl<B: Backend, E: Element> Kernel<B> for PackAgents<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let PackAgents { agents, scale, work, packed } = self;
        let [n, dk] = agents.shape();
        if dk == 0 {
            return;
        }
        for i in 0..n {
            let row = &mut work.rows[i * dk..][..dk];
            E::widen(b.convert(), agents.row([i, 0]), row);
            scale_row(b.lanes(), row, scale);
        }
        b.scores().pack_right(b, Source::Columns(&*work.rows, dk), dk, n, packed);
    }
}

/// The running state of the agents of a head.
struct Running<'a> {
    sums: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
}

impl<'a> Running<'a> {
    #[inline(always)]
    fn of(shape: AgentShape, state: &'a mut [f32]) -> Self {
        let (sums, rest) = state.split_at_mut((shape.n * shape.dv).next_multiple_of(16));
        let (max, sum) = rest.split_at_mut(shape.padded());
        Self { sums: &mut sums[..shape.n * shape.dv], max, sum }
    }
}

/// Makes the state of a head that of agents that have seen nothing.
pub fn reset(shape: AgentShape, state: &mut [f32]) {
    let Running { sums, max, sum } = Running::of(shape, state);
    sums.fill(0.0);
    max.fill(f32::NEG_INFINITY);
    sum.fill(0.0);
}

/// One block of keys and values for all agents of a head.
#[derive(Debug)]
pub struct Gather<'a, 'w, B: Backend, E> {
    /// `[lk, dk]`; without keys, all weigh the same.
    pub k: Option<View<'w, E, 2>>,
    /// `[lk, dv]`
    pub v: View<'w, E, 2>,
    /// Which of them, at most [`BLOCK`].
    pub block: Block<'w>,
    /// `[n, lk]`: added to the scores.
    pub bias: Option<View<'w, f32, 2>>,
    /// The packed agents.
    pub agents: &'w [ScoreElem<B>],
    /// Buffers.
    pub work: &'w mut AgentWork<'a, B>,
    /// The state of the head.
    pub state: &'w mut [f32],
}

impl<B: Backend, E: Element> Kernel<B> for Gather<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Gather { k, v, block, bias, agents, work, state } = self;
        let (l, t, shape, m) = (b.lanes(), b.tiles(), work.shape, block.len());
        let (AgentShape { n, dv, .. }, stride) = (shape, shape.stride());
        match (k, block) {
            (None, _) => work.scores[..m * stride].fill(0.0),
            (Some(k), Block::Run(first, _)) => {
                let (data, distance) = k.parts();
                let data = data.get(first * distance..).unwrap_or(&[]);
                scores(b, Left::new(data, Order::Rows(distance)), m, agents, work);
            }
            (Some(k), Block::List(_)) => {
                let rows = core::mem::take(&mut work.rows);
                let Plain { data, stride } = stage(b, k, block, &mut *rows);
                scores(b, Left::new(data, Order::Rows(stride)), m, agents, work);
                work.rows = rows;
            }
        }
        if let Some(bias) = bias {
            add_transposed(l, bias, block, work.scores, stride);
        }
        let Running { sums, max, sum } = Running::of(shape, state);
        let factor = &mut *work.factor;
        online_columns(l, work.scores, stride, [m, n], &mut Online { max, sum, factor });
        if dv == 0 {
            return;
        }
        match block {
            Block::Run(first, _) => t.pack_right(b, rows_of(v, first), m, dv, work.values),
            Block::List(_) => {
                let Plain { data, stride } = stage(b, v, block, &mut *work.rows);
                t.pack_right(b, Source::Rows(data, stride), m, dv, work.values);
            }
        }
        let left = Left::new(&*work.scores, Order::Columns(stride));
        let left = t.pack_left(b, left, None, n, m, work.left_p);
        let term = Term { left, right: B::T::right(work.values, m), k: m };
        let out = ViewMut::new(sums, [n, dv]).expect("n x dv sums");
        let sink = Store { keep: Keep::Rows(work.factor), ..Store::new(out) };
        let mut sink = Meanwhile { sink, ahead: &mut work.ahead };
        t.product(b, &work.session, &plain(n, dv, term), &mut sink);
    }
}

/// The weighted sums of a head become averages, the values of its agents; packed for the queries.
#[derive(Debug)]
pub struct Settle<'w, B: Backend> {
    /// The sizes.
    pub shape: AgentShape,
    /// The state of the head.
    pub state: &'w mut [f32],
    /// [`AgentShape::values_len`] elements.
    pub packed: &'w mut [Elem<B>],
}

impl<B: Backend> Kernel<B> for Settle<'_, B> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let AgentShape { n, dv, .. } = self.shape;
        let Running { sums, sum, .. } = Running::of(self.shape, self.state);
        if dv == 0 {
            return;
        }
        for (row, sum) in sums.chunks_exact_mut(dv).zip(&*sum) {
            scale_row(b.lanes(), row, if *sum == 0.0 { 0.0 } else { 1.0 / sum });
        }
        b.tiles().pack_right(b, Source::Rows(&*sums, dv), n, dv, self.packed);
    }
}

/// The values of the agents of a head after [`Settle`], `n x dv`.
#[must_use]
pub fn values(shape: AgentShape, state: &[f32]) -> &[f32] {
    &state[..shape.n * shape.dv]
}

/// One block of queries of a head.
#[derive(Debug)]
pub struct Ask<'a, 'w, B: Backend, E> {
    /// `[lq, dk]`
    pub q: View<'w, E, 2>,
    /// First query and number of queries, at most [`BLOCK`].
    pub rows: [usize; 2],
    /// `[lq, n]`: added to the scores.
    pub bias: Option<View<'w, f32, 2>>,
    /// `[lq, dv]` and their factor: added to the output.
    pub shortcut: Option<(View<'w, E, 2>, f32)>,
    /// The packed agents.
    pub agents: &'w [ScoreElem<B>],
    /// Their packed values.
    pub values: &'w [Elem<B>],
    /// Buffers.
    pub work: &'w mut AgentWork<'a, B>,
    /// `[lq, dv]`, all rows.
    pub out: ViewMut<'w, E, 2>,
}

impl<B: Backend, E: Element> Kernel<B> for Ask<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Ask { q, rows: [at, m], bias, shortcut, agents, values, work, mut out } = self;
        let (l, t, c, shape) = (b.lanes(), b.tiles(), b.convert(), work.shape);
        let (AgentShape { n, dk, dv }, stride) = (shape, shape.stride());
        if dk == 0 {
            work.scores[..m * stride].fill(0.0);
        } else {
            let (data, distance) = q.parts();
            let data = &data[at * distance..];
            scores(b, Left::new(data, Order::Rows(distance)), m, agents, work);
        }
        if let Some(bias) = bias.filter(|_| n > 0) {
            for r in 0..m {
                add_row(l, bias.row([at + r, 0]), &mut work.scores[r * stride..][..n]);
            }
        }
        exp_rows(l, work.scores, stride, n, &mut work.weight[..m]);
        let left = Left::new(&*work.scores, Order::Rows(stride));
        let left = t.pack_left(b, left, None, m, n, work.left_p);
        let product = plain(m, dv, Term { left, right: B::T::right(values, n), k: n });
        let scale = Some(&*work.weight);
        let Some((v, factor)) = shortcut else {
            let out = out.slice(0, at, at + m);
            let sink = Narrow { out, convert: c, scale };
            let mut sink = Meanwhile { sink, ahead: &mut work.ahead };
            return t.product(b, &work.session, &product, &mut sink);
        };
        let (rows, value) = work.rows.split_at_mut(BLOCK * dv);
        let (rows, value) = (&mut rows[..m * dv], &mut value[..dv]);
        let dst = ViewMut::new(&mut *rows, [m, dv]).expect("m x dv outputs");
        t.product(b, &work.session, &product, &mut Narrow { out: dst, convert: c, scale });
        for (r, row) in rows.chunks_exact_mut(dv).enumerate() {
            E::widen(c, v.row([at + r, 0]), value);
            scale_row(l, value, factor);
            add_row(l, value, row);
            E::narrow(c, row, out.row_mut([at + r, 0]));
        }
    }
}

/// A product of one term.
#[inline(always)]
fn plain<E>(m: usize, n: usize, term: Term<'_, E>) -> Product<'_, E> {
    Product { m, n, first: None, second: Some(term), causal: false, lower: false }
}

/// `m` rows times the packed agents, to the scores.
#[inline(always)]
fn scores<B: Backend, E: Element>(
    b: B,
    rows: Left<'_, E>,
    m: usize,
    agents: &[ScoreElem<B>],
    work: &mut AgentWork<'_, B>,
) {
    let (s, AgentShape { n, dk, .. }, stride) = (b.scores(), work.shape, work.shape.stride());
    let left = s.pack_left(b, rows, None, m, dk, work.left);
    let product = plain(m, n, Term { left, right: B::S::right(agents, dk), k: dk });
    let sink = Whole { data: &mut *work.scores, stride };
    let mut sink = Meanwhile { sink, ahead: &mut work.ahead };
    s.product(b, &work.score_session, &product, &mut sink);
}

/// `row += other`
#[inline(always)]
fn add_row<L: Lanes>(l: L, other: &[f32], row: &mut [f32]) {
    for (x, y) in row.chunks_mut(L::N).zip(other.chunks(L::N)) {
        l.store_head(x, l.add(l.load_head(x), l.load_head(y)));
    }
}

/// `scores[j][i] += bias[i][block[j]]`
#[inline(always)]
fn add_transposed<L: Lanes>(
    l: L,
    bias: View<'_, f32, 2>,
    block: Block<'_>,
    scores: &mut [f32],
    stride: usize,
) {
    let (n, m) = (bias.shape()[0], block.len());
    let Block::Run(first, _) = block else {
        for (j, row) in scores.chunks_mut(stride).take(m).enumerate() {
            for (i, x) in row[..n].iter_mut().enumerate() {
                *x += bias.row([i, 0])[block.at(j)];
            }
        }
        return;
    };
    for i in (0..n).step_by(L::N) {
        for j in (0..m).step_by(L::N) {
            let end = m.min(j + L::N);
            l.transpose(
                #[inline(always)]
                |r| match i + r < n {
                    true => l.load_head(&bias.row([i + r, 0])[first + j..first + end]),
                    false => l.zero(),
                },
                #[inline(always)]
                |c, x| {
                    if j + c < end {
                        let row = &mut scores[(j + c) * stride + i..];
                        l.store(row, l.add(l.load(row), x));
                    }
                },
            );
        }
    }
}
