//! One block of queries against one block of keys, with an online softmax between the two products.
//!
//! Per row, with running maximum `m`, sum `l` and weighted sum `A` (`rows x dv`):
//!
//! ```text
//! S = Q K^T (+ bias)      m' = max(m, max S)      P = exp(S - m')      c = exp(m - m')
//! l = c l + sum P         A = diag(c) A + P V
//! ```
//!
//! The operands are packed for the matrix engine, or read as plain rows where there are too few queries to pay
//! for packing and where a value is not finite: plain rows skip hidden keys, a product would meet `0 * NaN`.

use super::softmax::{Online, Visible, online_rows};
use super::staging::{all_finite, partial_dot};
use super::store::{Keep, Store, Whole};
use crate::simd::{Backend, Kernel, Lanes, Left, Order, PANEL, Product, Source, Term, Tiles};
use crate::tensor::{Element, View, ViewMut};

/// Queries of a block: with its keys' scores it stays in the first cache level.
pub const ROWS: usize = 48;
/// Keys of a block.
pub const KEYS: usize = 128;
/// Distance between rows of scores: not a power of two, so that rows do not meet in the same cache sets.
pub const STRIDE: usize = KEYS + PANEL / 2;

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;
type ScoreElem<B> = <<B as Backend>::S as Tiles>::Elem;

/// Which keys form a block.
#[derive(Clone, Copy, Debug)]
pub enum Block<'a> {
    /// Consecutive ones: the first and how many.
    Run(usize, usize),
    /// These, in rising order.
    List(&'a [usize]),
}

impl<'a> Block<'a> {
    /// The next at most `most` keys among `from .. end` that count, and where to go on.
    #[must_use]
    pub fn next(
        mask: Option<&[bool]>,
        [from, end]: [usize; 2],
        most: usize,
        list: &'a mut [usize],
    ) -> (Self, usize) {
        let Some(mask) = mask else {
            let n = most.min(end - from);
            return (Block::Run(from, n), from + n);
        };
        let (mut n, mut at) = (0, from);
        while at < end && n < most {
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

    /// How many.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Block::Run(_, n) => *n,
            Block::List(at) => at.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many of them come before key `limit`.
    #[inline(always)]
    #[must_use]
    pub fn before(&self, limit: usize) -> usize {
        match self {
            Block::Run(first, n) => limit.saturating_sub(*first).min(*n),
            Block::List(at) => at.partition_point(|j| *j < limit),
        }
    }

    /// The number of the key at place `j`.
    #[inline(always)]
    pub(super) fn at(&self, j: usize) -> usize {
        match self {
            Block::Run(first, _) => first + j,
            Block::List(at) => at[j],
        }
    }
}

/// Rows of keys or values as `f32`, a fixed distance apart.
#[derive(Clone, Copy, Debug)]
pub struct Plain<'a> {
    /// Row `j` at `data[j * stride ..]`.
    pub data: &'a [f32],
    /// Distance between rows.
    pub stride: usize,
}

/// The rows of a block: where they lie, or gathered and converted into `buffer` (`len x width`).
#[inline(always)]
pub(super) fn stage<'a, B: Backend, E: Element>(
    b: B,
    src: View<'a, E, 2>,
    block: Block<'_>,
    buffer: &'a mut [f32],
) -> Plain<'a> {
    let width = src.shape()[1];
    if width == 0 {
        return Plain { data: &[], stride: 0 };
    }
    let (data, stride) = src.parts();
    if let (Block::Run(first, _), Some(data)) = (block, E::as_f32(data)) {
        return Plain { data: &data[first * stride..], stride };
    }
    for j in 0..block.len() {
        E::widen(b.convert(), src.row([block.at(j), 0]), &mut buffer[j * width..][..width]);
    }
    Plain { data: buffer, stride: width }
}

/// Brings a block of keys and values into the form that the engine wants. The result says whether all values
/// are finite; if not, `staged` holds them as plain rows.
#[derive(Debug)]
pub struct PackKeys<'a, E, K, V> {
    /// `[keys, dk]`
    pub k: View<'a, E, 2>,
    /// `[keys, dv]`
    pub v: View<'a, E, 2>,
    /// Which of them.
    pub block: Block<'a>,
    /// [`KEYS`] rows as wide as the wider of keys and values.
    pub staged: &'a mut [f32],
    /// [`Tiles::right_len`]`(dk, KEYS)` of the engine for scores.
    pub keys: &'a mut [K],
    /// [`Tiles::right_len`]`(KEYS, dv)`
    pub values: &'a mut [V],
}

impl<B: Backend, E: Element> Kernel<B> for PackKeys<'_, E, ScoreElem<B>, Elem<B>> {
    type Output = bool;
    #[inline(always)]
    fn run(self, b: B) -> bool {
        let (l, t, n) = (b.lanes(), b.tiles(), self.block.len());
        let ([_, dk], [_, dv]) = (self.k.shape(), self.v.shape());
        let k = stage(b, self.k, self.block, &mut *self.staged);
        b.scores().pack_right(b, Source::Columns(k.data, k.stride), dk, n, self.keys);
        let v = stage(b, self.v, self.block, &mut *self.staged);
        t.pack_right(b, Source::Rows(v.data, v.stride), n, dv, self.values);
        let finite = all_finite(l, v.data, v.stride, n, dv);
        if !finite && dv > 0 {
            for j in 0..n {
                let row = &mut self.staged[j * dv..][..dv];
                E::widen(b.convert(), self.v.row([self.block.at(j), 0]), row);
            }
        }
        finite
    }
}

/// Plain rows of both operands of a block, for [`Attend`] without packing.
#[derive(Debug)]
pub struct StageKeys<'a, E> {
    /// `[keys, dk]`
    pub k: View<'a, E, 2>,
    /// `[keys, dv]`
    pub v: View<'a, E, 2>,
    /// Which of them.
    pub block: Block<'a>,
    /// [`KEYS`] rows of `dk`.
    pub keys: &'a mut [f32],
    /// [`KEYS`] rows of `dv`.
    pub values: &'a mut [f32],
}

impl<'a, B: Backend, E: Element> Kernel<B> for StageKeys<'a, E> {
    type Output = (Plain<'a>, Plain<'a>);
    #[inline(always)]
    fn run(self, b: B) -> Self::Output {
        (stage(b, self.k, self.block, self.keys), stage(b, self.v, self.block, self.values))
    }
}

/// Keys of a block.
#[derive(Clone, Copy, Debug)]
pub enum Keys<'a, T> {
    /// Columns of a right operand.
    Packed(&'a [T]),
    /// As they are.
    Plain(Plain<'a>),
}

/// Values of a block.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a, T> {
    /// A right operand.
    Packed(&'a [T]),
    /// As they are.
    Plain(Plain<'a>),
}

/// What is added to the scores. Minus infinity hides a key.
#[derive(Clone, Copy, Debug)]
pub struct Bias<'a> {
    /// `[heads, queries, keys]`
    pub all: View<'a, f32, 3>,
    /// The first head of those that share keys.
    pub head: usize,
    /// How many share them: row `r` is query `r / group` of head `head + r % group`.
    pub group: usize,
    /// The number of the block's first row.
    pub first: usize,
}

impl<'a> Bias<'a> {
    #[inline(always)]
    fn row(&self, r: usize) -> &'a [f32] {
        let r = self.first + r;
        self.all.row([self.head + r % self.group, r / self.group, 0])
    }
}

/// One step of the recurrence at the top of this file.
pub struct Attend<'a, B: Backend> {
    /// The engine for scores, set up.
    pub score_session: &'a <B::S as Tiles>::Session,
    /// The engine for weighted sums, set up.
    pub session: &'a <B::T as Tiles>::Session,
    /// Scaled queries, rows `q_stride` apart.
    pub q: &'a [f32],
    /// Distance between queries.
    pub q_stride: usize,
    /// Width of queries and keys.
    pub dk: usize,
    /// Width of values.
    pub dv: usize,
    /// The keys.
    pub block: Block<'a>,
    /// Their rows.
    pub keys: Keys<'a, ScoreElem<B>>,
    /// Their values.
    pub values: Values<'a, Elem<B>>,
    /// What the queries see of the block.
    pub visible: Visible<'a>,
    /// Added to the scores.
    pub bias: Option<Bias<'a>>,
    /// Running maxima, sums and factors; as many rows as `max` has.
    pub online: Online<'a>,
    /// Running weighted sums, rows of `dv`.
    pub acc: &'a mut [f32],
    /// Distance between them.
    pub acc_stride: usize,
    /// [`ROWS`] times [`STRIDE`].
    pub scores: &'a mut [f32],
    /// Room for packed queries.
    pub left_q: &'a mut [ScoreElem<B>],
    /// Room for packed weights.
    pub left_p: &'a mut [Elem<B>],
}

impl<B: Backend> core::fmt::Debug for Attend<'_, B> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Attend").finish_non_exhaustive()
    }
}

impl<B: Backend> Kernel<B> for Attend<'_, B> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let (l, t, s) = (b.lanes(), b.tiles(), b.scores());
        let Attend { q, q_stride, dk, dv, block, visible, bias, online, acc, scores, .. } = self;
        let acc_stride = self.acc_stride;
        let (rows, n) = (online.max.len(), visible.width());
        match self.keys {
            Keys::Packed(keys) => {
                let left = Left::new(q, Order::Rows(q_stride));
                let left = s.pack_left(b, left, None, rows, dk, self.left_q);
                let term = Term { left, right: B::S::right(keys, dk), k: dk };
                let product = Product {
                    m: rows,
                    n,
                    first: None,
                    second: Some(term),
                    causal: false,
                    lower: false,
                };
                let mut sink = Whole { data: &mut *scores, stride: STRIDE };
                s.product(b, self.score_session, &product, &mut sink);
            }
            Keys::Plain(k) => {
                for r in 0..rows {
                    dots(
                        l,
                        &q[r * q_stride..][..dk],
                        k,
                        &mut scores[r * STRIDE..][..visible.of(r)],
                    );
                }
            }
        }
        if let Some(bias) = bias {
            for r in 0..rows {
                add_bias(l, bias.row(r), block, &mut scores[r * STRIDE..][..visible.of(r)]);
            }
        }
        let Online { max, sum, factor } = online;
        online_rows(l, scores, STRIDE, visible, Online { max, sum, factor: &mut *factor });
        match self.values {
            Values::Packed(values) => {
                let left = Left::new(&*scores, Order::Rows(STRIDE));
                let left = t.pack_left(b, left, None, rows, n, self.left_p);
                let term = Term { left, right: B::T::right(values, block.len()), k: n };
                let product = Product {
                    m: rows,
                    n: dv,
                    first: None,
                    second: Some(term),
                    causal: false,
                    lower: false,
                };
                let out = ViewMut::with_strides(acc, [rows, dv], [acc_stride, 1])
                    .expect("rows x dv sums");
                let mut store = Store { keep: Keep::Rows(factor), ..Store::new(out) };
                t.product(b, self.session, &product, &mut store);
            }
            Values::Plain(v) => {
                for r in 0..rows {
                    let p = &scores[r * STRIDE..][..visible.of(r)];
                    let hidden = bias.map(|bias| (bias.row(r), block));
                    gather(l, p, v, hidden, factor[r], &mut acc[r * acc_stride..][..dv]);
                }
            }
        }
    }
}

/// `out[j] = q . k_j`, as many as `out` has: vectors of partial sums, transposed so that lanes add up.
#[inline(always)]
pub(crate) fn dots<L: Lanes>(l: L, q: &[f32], k: Plain<'_>, out: &mut [f32]) {
    const MAX_LANES: usize = 16;
    let mut sums = [l.zero(); MAX_LANES];
    for (j, out) in out.chunks_mut(L::N).enumerate() {
        for (c, sum) in sums[..L::N].iter_mut().enumerate() {
            *sum = l.zero();
            if c < out.len() {
                let row = (j * L::N + c) * k.stride;
                *sum = partial_dot(l, q, &k.data[row..][..q.len()]);
            }
        }
        let mut dot = l.zero();
        l.transpose(|c| sums[c], |_, x| dot = l.add(dot, x));
        l.store_head(out, dot);
    }
}

#[inline(always)]
fn add_bias<L: Lanes>(l: L, bias: &[f32], block: Block<'_>, scores: &mut [f32]) {
    match block {
        Block::Run(first, _) => {
            let bias = &bias[first..][..scores.len()];
            let ((scores, tail), (bias, bias_tail)) = (l.split_mut(scores), l.split(bias));
            for (s, x) in scores.iter_mut().zip(bias) {
                *s = hide(l, *x, l.add(*s, *x));
            }
            let x = l.load_head(bias_tail);
            let last = hide(l, x, l.add(l.load_head(tail), x));
            l.store_head(tail, last);
        }
        Block::List(at) => {
            for (s, j) in scores.iter_mut().zip(at) {
                *s = if bias[*j] == f32::NEG_INFINITY { bias[*j] } else { *s + bias[*j] };
            }
        }
    }
}

/// Minus infinity where the bias is: a hidden score may be anything.
#[inline(always)]
fn hide<L: Lanes>(l: L, bias: L::F, score: L::F) -> L::F {
    let low = l.splat(f32::NEG_INFINITY);
    l.select(l.le(bias, low), low, score)
}

/// `out <- factor * out + sum p_j v_j`, without the keys that a bias hides. The order of operations is that of
/// the tiled product.
#[inline(always)]
pub(crate) fn gather<L: Lanes>(
    l: L,
    p: &[f32],
    v: Plain<'_>,
    hidden: Option<(&[f32], Block<'_>)>,
    factor: f32,
    out: &mut [f32],
) {
    let factor = l.splat(factor);
    let mut at = 0;
    // As many sums side by side as hide the time that one of them takes.
    while at + 4 * L::N <= out.len() {
        columns::<L, 4>(l, p, v, hidden, factor, at, out);
        at += 4 * L::N;
    }
    while at + 2 * L::N <= out.len() {
        columns::<L, 2>(l, p, v, hidden, factor, at, out);
        at += 2 * L::N;
    }
    while at < out.len() {
        let end = out.len().min(at + L::N);
        let mut acc = l.zero();
        for (j, p) in p.iter().enumerate() {
            if seen(hidden, j) {
                acc = l.mul_add(
                    l.splat(*p),
                    l.load_head(&v.data[j * v.stride + at..][..end - at]),
                    acc,
                );
            }
        }
        let out = &mut out[at..end];
        l.store_head(out, l.mul_add(l.load_head(out), factor, acc));
        at = end;
    }
}

#[inline(always)]
fn seen(hidden: Option<(&[f32], Block<'_>)>, j: usize) -> bool {
    hidden.is_none_or(|(bias, block)| bias[block.at(j)] != f32::NEG_INFINITY)
}

/// `W` vectors of the columns from `at` on.
#[inline(always)]
fn columns<L: Lanes, const W: usize>(
    l: L,
    p: &[f32],
    v: Plain<'_>,
    hidden: Option<(&[f32], Block<'_>)>,
    factor: L::F,
    at: usize,
    out: &mut [f32],
) {
    let mut acc = [l.zero(); W];
    for (j, p) in p.iter().enumerate() {
        if seen(hidden, j) {
            let row = &v.data[j * v.stride + at..][..W * L::N];
            let p = l.splat(*p);
            for w in 0..W {
                acc[w] = l.mul_add(p, l.load(&row[w * L::N..]), acc[w]);
            }
        }
    }
    for w in 0..W {
        let out = &mut out[at + w * L::N..];
        l.store(out, l.mul_add(l.load(out), factor, acc[w]));
    }
}
