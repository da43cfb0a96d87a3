//! Who meets whom: lists of tokens and of summaries. Token `j` is number `j`, summary `g` is number `len + g`.

use super::super::{CombinerConfig, Variant};

/// Sizes of one head, and what follows from them.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub len: usize,
    pub dk: usize,
    pub dv: usize,
    /// Tokens of a segment, at most all.
    pub w: usize,
    /// Segments.
    pub rows: usize,
    /// Summaries.
    pub groups: usize,
    /// Those with pooled queries: all or none.
    pub pooled: usize,
    /// Longest list.
    pub list: usize,
    /// Most queries with one list.
    pub queries: usize,
}

impl Sizes {
    pub fn new(c: &CombinerConfig, [len, dk, dv]: [usize; 3]) -> Self {
        let w = c.segment.min(len).max(1);
        let rows = len.div_ceil(w);
        // When causal, nobody meets a summary of the last row.
        let done = if c.causal { (rows.max(1) - 1) * w } else { len };
        let (groups, list, queries) = match c.variant {
            Variant::Fixed => (done.div_ceil(w), w + rows, w),
            Variant::AxialRowMajor(_) => (done, w + rows, w),
            Variant::AxialMixture => (rows * w + 2 * done, 2 * w + 3 * rows, 1),
        };
        let pooled = if matches!(c.variant, Variant::AxialRowMajor(_)) { 0 } else { groups };
        Self { len, dk, dv, w, rows, groups, pooled, list, queries }
    }

    /// Tokens of row `r`.
    fn row(&self, r: usize) -> core::ops::Range<usize> {
        r * self.w..self.len.min((r + 1) * self.w)
    }
}

/// A list that is being written.
struct List<'a> {
    to: &'a mut [usize],
    n: usize,
}

impl List<'_> {
    fn extend(&mut self, items: impl Iterator<Item = usize>) {
        for item in items {
            self.to[self.n] = item;
            self.n += 1;
        }
    }
}

/// Summaries that share their tokens: the first one, how many, and the tokens, in `list`; none behind the last.
pub(super) fn group(
    c: &CombinerConfig,
    s: &Sizes,
    first: usize,
    list: &mut [usize],
) -> Option<[usize; 2]> {
    if first >= s.groups {
        return None;
    }
    let mut to = List { to: list, n: 0 };
    let count = match c.variant {
        Variant::Fixed => {
            to.extend(s.row(first));
            1
        }
        Variant::AxialRowMajor(_) => {
            to.extend(s.row(first / s.w));
            to.n
        }
        Variant::AxialMixture => {
            let (above, done) = (s.rows * s.w, (s.rows - 1) * s.w);
            if first < above {
                to.extend((0..first / s.w).map(|r| r * s.w + first % s.w));
            } else {
                let at = (first - above) % done;
                let start = at / s.w * s.w;
                match first - above < done {
                    true => to.extend(start..at),
                    false => to.extend(at + 1..start + s.w),
                }
            }
            1
        }
    };
    Some([to.n, count])
}

/// Queries from `first` on that meet the same: how many items, in `list`, how many queries, and, if later queries see more
/// of the items than earlier ones, how many items the first one does not see alone.
pub(super) fn queries(
    c: &CombinerConfig,
    s: &Sizes,
    first: usize,
    list: &mut [usize],
) -> Option<([usize; 2], Option<isize>)> {
    if first >= s.len {
        return None;
    }
    let (r, col) = (first / s.w, first % s.w);
    let others = 0..if c.causal { r } else { s.rows };
    let mut to = List { to: list, n: 0 };
    let own = if c.causal { r * s.w..first + 1 } else { s.row(r) };
    match c.variant {
        Variant::Fixed => {
            to.extend(others.map(|g| s.len + g));
            let before = to.n;
            to.extend(s.row(r));
            let offset = c.causal.then_some(isize::try_from(before).unwrap_or(isize::MAX));
            return Some(([to.n, to.n - before], offset));
        }
        Variant::AxialRowMajor(_) => {
            to.extend(others.filter(|o| s.row(*o).len() > col).map(|o| s.len + o * s.w + col));
        }
        Variant::AxialMixture => {
            to.extend((0..r).map(|o| o * s.w + col));
            if r > 0 {
                to.extend((0..s.w).filter(|o| *o != col).map(|o| s.len + r * s.w + o));
            }
            let (left, done) = (s.len + s.rows * s.w, (s.rows - 1) * s.w);
            if col > 0 {
                to.extend((0..r).map(|o| left + o * s.w + col));
            }
            if col + 1 < s.w {
                to.extend((0..r).map(|o| left + done + o * s.w + col));
            }
        }
    }
    to.extend(own);
    Some(([to.n, 1], None))
}
