//! Work on the rows of matrices, one vector after the other.

use crate::simd::{Backend, Kernel, Lanes};
use crate::tensor::{View, ViewMut};

/// What is done to one row of `out`, given the same row of `IN` other matrices.
pub trait RowKernel<const IN: usize>: Copy + Send + Sync {
    /// Operations per element, roughly: decides whether a second thread pays.
    const COST: usize;
    /// One row. Implementations are `#[inline(always)]`.
    fn row<L: Lanes>(&self, l: L, ins: [&[f32]; IN], out: &mut [f32]);
    /// All rows. Worth overriding where rows can share work; what becomes of one must not depend on the others.
    #[inline(always)]
    fn rows<L: Lanes>(&self, l: L, ins: [View<'_, f32, 2>; IN], mut out: ViewMut<'_, f32, 2>) {
        for i in 0..out.shape()[0] {
            let mut rows: [&[f32]; IN] = [&[]; IN];
            for (row, view) in rows.iter_mut().zip(&ins) {
                *row = view.row([i, 0]);
            }
            self.row(l, rows, out.row_mut([i, 0]));
        }
    }
}

/// All rows of a matrix, entered as one kernel.
#[derive(Debug)]
pub struct Rows<'a, K, const IN: usize> {
    /// What is done.
    pub op: K,
    /// Matrices with as many rows as `out`.
    pub ins: [View<'a, f32, 2>; IN],
    /// The matrix that is written (and read, by operations in place).
    pub out: ViewMut<'a, f32, 2>,
}

impl<B: Backend, K: RowKernel<IN>, const IN: usize> Kernel<B> for Rows<'_, K, IN> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        self.op.rows(b.lanes(), self.ins, self.out);
    }
}

/// Lanes of the widest vector.
pub(crate) const WIDEST: usize = 16;

/// The sums of the lanes of each of some vectors, the first in the first lane. As many as there are lanes are looked at.
#[inline(always)]
pub(crate) fn sums<L: Lanes>(l: L, parts: &[L::F; WIDEST]) -> L::F {
    let mut sum = l.zero();
    l.transpose(|r| parts[r], |_, x| sum = l.add(sum, x));
    sum
}

/// As [`sums`], the largest lanes, none of which is below 0.
#[inline(always)]
pub(crate) fn maxima<L: Lanes>(l: L, parts: &[L::F; WIDEST]) -> L::F {
    let mut most = l.zero();
    l.transpose(|r| parts[r], |_, x| most = l.max(most, x));
    most
}

/// A function of vectors, a type so that helpers inline it.
pub(crate) trait Map<L: Lanes, const IN: usize>: Copy {
    /// The new value from the old one and those of the inputs.
    fn apply(self, l: L, old: L::F, ins: [L::F; IN]) -> L::F;
}

/// `out[j] = map(out[j], ins[..][j])`. The inputs are at least as long as `out`.
#[inline(always)]
pub(crate) fn map<L: Lanes, const IN: usize>(
    l: L,
    f: impl Map<L, IN>,
    ins: [&[f32]; IN],
    out: &mut [f32],
) {
    let n = out.len();
    let ins = ins.map(|s| l.split(&s[..n]));
    let (full, tail) = l.split_mut(out);
    let mut x = [l.zero(); IN];
    for (j, y) in full.iter_mut().enumerate() {
        for (x, s) in x.iter_mut().zip(&ins) {
            *x = s.0[j];
        }
        *y = f.apply(l, *y, x);
    }
    if !tail.is_empty() {
        for (x, s) in x.iter_mut().zip(&ins) {
            *x = l.load_head(s.1);
        }
        let y = f.apply(l, l.load_head(tail), x);
        l.store_head(tail, y);
    }
}
