//! Softmax of rows: at once, or block by block with a running maximum and sum.
//!
//! A row is visible up to a length of its own; what lies behind may be anything, NaN included. A row that sees
//! nothing, or only minus infinities, becomes zeros.

use crate::simd::{Backend, Kernel, Lanes, math};

/// Vectors handled side by side, to hide the latency of the exponential.
const WIDE: usize = 4;

/// How much of every row counts.
#[derive(Clone, Copy, Debug)]
pub enum Visible<'a> {
    /// This many columns of every row.
    All(usize),
    /// The first `rows[r]` of this many columns in row `r`.
    Rows(&'a [usize], usize),
}

impl Visible<'_> {
    /// Columns that row `r` sees.
    #[inline(always)]
    #[must_use]
    pub fn of(self, r: usize) -> usize {
        match self {
            Visible::All(width) => width,
            Visible::Rows(rows, width) => rows[r].min(width),
        }
    }

    /// Columns of the matrix.
    #[inline(always)]
    #[must_use]
    pub fn width(self) -> usize {
        match self {
            Visible::All(width) | Visible::Rows(_, width) => width,
        }
    }
}

/// `row <- softmax(row)` for every row, zeros where nothing is seen.
#[derive(Debug)]
pub struct SoftmaxRows<'a> {
    /// Row `r` at `data[r * stride ..]`.
    pub data: &'a mut [f32],
    /// Distance between rows.
    pub stride: usize,
    /// Number of rows.
    pub rows: usize,
    /// What they see.
    pub visible: Visible<'a>,
}

impl<B: Backend> Kernel<B> for SoftmaxRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let l = b.lanes();
        for r in 0..self.rows {
            let row = &mut self.data[r * self.stride..][..self.visible.width()];
            let (seen, hidden) = row.split_at_mut(self.visible.of(r));
            hidden.fill(0.0);
            softmax_row(l, seen);
        }
    }
}

/// `row <- softmax(row)`; zeros if every score is minus infinity.
#[inline(always)]
pub fn softmax_row<L: Lanes>(l: L, row: &mut [f32]) {
    let max = finite(row_max(l, row));
    let sum = exp_row(l, row, max);
    // Not `0 < sum`: a NaN has to stay one.
    let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
    scale_row(l, row, inverse);
}

/// The running state of some rows.
#[derive(Debug)]
pub struct Online<'a> {
    /// Largest score so far, minus infinity at first.
    pub max: &'a mut [f32],
    /// Sum of exponentials of the distances to it, 0 at first.
    pub sum: &'a mut [f32],
    /// Set to the factors by which earlier weighted sums shrink.
    pub factor: &'a mut [f32],
}

/// One block of scores: `max' = max(max, scores)`, `scores <- exp(scores - max')`, hidden ones 0,
/// `factor = exp(max - max')`, `sum <- factor * sum + row sum`. As many rows as `online` has.
#[inline(always)]
pub fn online_rows<L: Lanes>(
    l: L,
    scores: &mut [f32],
    stride: usize,
    visible: Visible<'_>,
    online: Online<'_>,
) {
    let Online { max, sum, factor } = online;
    let rows = max.len();
    for (r, f) in factor[..rows].iter_mut().enumerate() {
        *f = row_max(l, &scores[r * stride..][..visible.of(r)]);
    }
    for (m, f) in max.chunks_mut(L::N).zip(factor[..rows].chunks_mut(L::N)) {
        let old = l.load_head(m);
        let new = l.max(old, l.load_head(f));
        let nothing = l.le(new, l.splat(f32::NEG_INFINITY));
        let base = l.select(nothing, l.zero(), new);
        l.store_head(f, math::exp_nonpositive(l, l.sub(old, base)));
        l.store_head(m, new);
    }
    for r in 0..rows {
        let row = &mut scores[r * stride..][..visible.width()];
        let (seen, hidden) = row.split_at_mut(visible.of(r));
        hidden.fill(0.0);
        sum[r] = sum[r] * factor[r] + exp_row(l, seen, finite(max[r]));
    }
}

/// `row <- exp(row - max row)` for every row, and `inverse[r] = 1 / sum`, 0 where nothing is seen: softmax without its last
/// multiplication.
#[inline(always)]
pub fn exp_rows<L: Lanes>(
    l: L,
    scores: &mut [f32],
    stride: usize,
    width: usize,
    inverse: &mut [f32],
) {
    for (r, inverse) in inverse.iter_mut().enumerate() {
        let row = &mut scores[r * stride..][..width];
        let max = finite(row_max(l, row));
        let sum = exp_row(l, row, max);
        *inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
    }
}

/// As [`online_rows`] for the columns of `m` rows of scores, `width` of them: everything goes from row to row, nothing
/// across a vector. Columns up to a whole vector are written, and what `online` has for them.
#[inline(always)]
pub fn online_columns<L: Lanes>(
    l: L,
    scores: &mut [f32],
    stride: usize,
    [m, width]: [usize; 2],
    online: &mut Online<'_>,
) {
    let (mut c, vectors) = (0, width.div_ceil(L::N));
    while c + WIDE <= vectors {
        columns::<L, WIDE>(l, scores, stride, m, c * L::N, online);
        c += WIDE;
    }
    if c + 2 <= vectors {
        columns::<L, 2>(l, scores, stride, m, c * L::N, online);
        c += 2;
    }
    if c < vectors {
        columns::<L, 1>(l, scores, stride, m, c * L::N, online);
    }
}

/// `W` vectors of columns from column `c` on.
#[inline(always)]
fn columns<L: Lanes, const W: usize>(
    l: L,
    scores: &mut [f32],
    stride: usize,
    m: usize,
    c: usize,
    online: &mut Online<'_>,
) {
    let low = l.splat(f32::NEG_INFINITY);
    let mut top = [low; W];
    for r in 0..m {
        let row = &scores[r * stride + c..][..W * L::N];
        for w in 0..W {
            top[w] = l.max(top[w], l.load(&row[w * L::N..]));
        }
    }
    let mut base = [l.zero(); W];
    for w in 0..W {
        let at = c + w * L::N;
        let old = l.load(&online.max[at..]);
        let new = l.max(old, top[w]);
        base[w] = l.select(l.le(new, low), l.zero(), new);
        l.store(&mut online.factor[at..], math::exp_nonpositive(l, l.sub(old, base[w])));
        l.store(&mut online.max[at..], new);
    }
    let mut sum = [l.zero(); W];
    for r in 0..m {
        let row = &mut scores[r * stride + c..][..W * L::N];
        for w in 0..W {
            let x = math::exp_nonpositive(l, l.sub(l.load(&row[w * L::N..]), base[w]));
            l.store(&mut row[w * L::N..], x);
            sum[w] = l.add(sum[w], x);
        }
    }
    for w in 0..W {
        let at = c + w * L::N;
        let old = l.mul(l.load(&online.sum[at..]), l.load(&online.factor[at..]));
        l.store(&mut online.sum[at..], l.add(old, sum[w]));
    }
}

/// A maximum that can be subtracted from minus infinity.
#[inline(always)]
pub(super) fn finite(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// The largest element, minus infinity if there is none. A NaN may or may not be returned.
#[inline(always)]
pub fn row_max<L: Lanes>(l: L, row: &[f32]) -> f32 {
    const ONES: [f32; 16] = [1.0; 16];
    let low = l.splat(f32::NEG_INFINITY);
    let (full, tail) = l.split(row);
    let mut acc = [low; WIDE];
    let mut groups = full.chunks_exact(WIDE);
    for x in &mut groups {
        for w in 0..WIDE {
            acc[w] = l.max(acc[w], x[w]);
        }
    }
    for x in groups.remainder() {
        acc[0] = l.max(acc[0], *x);
    }
    if !tail.is_empty() {
        let inside = l.lt(l.zero(), l.load_head(&ONES[..tail.len()]));
        acc[1] = l.max(acc[1], l.select(inside, l.load_head(tail), low));
    }
    l.max_lane(l.max(l.max(acc[0], acc[1]), l.max(acc[2], acc[3])))
}

/// `row <- exp(row - max)`; the sum.
#[inline(always)]
fn exp_row<L: Lanes>(l: L, row: &mut [f32], max: f32) -> f32 {
    let max = l.splat(max);
    let (full, tail) = l.split_mut(row);
    let mut acc = [l.zero(); WIDE];
    let mut groups = full.chunks_exact_mut(WIDE);
    for x in &mut groups {
        for w in 0..WIDE {
            x[w] = math::exp_nonpositive(l, l.sub(x[w], max));
            acc[w] = l.add(acc[w], x[w]);
        }
    }
    for x in groups.into_remainder() {
        *x = math::exp_nonpositive(l, l.sub(*x, max));
        acc[0] = l.add(acc[0], *x);
    }
    if !tail.is_empty() {
        let x = math::exp_nonpositive(l, l.sub(l.load_head(tail), max));
        l.store_head(tail, x);
        // Read back: lanes behind the end are zero then.
        acc[1] = l.add(acc[1], l.load_head(tail));
    }
    l.sum(l.add(l.add(acc[0], acc[1]), l.add(acc[2], acc[3])))
}

/// `row <- factor * row`
#[inline(always)]
pub fn scale_row<L: Lanes>(l: L, row: &mut [f32], factor: f32) {
    let factor = l.splat(factor);
    let (full, tail) = l.split_mut(row);
    for x in full {
        *x = l.mul(*x, factor);
    }
    let x = l.mul(l.load_head(tail), factor);
    l.store_head(tail, x);
}
