//! Small pieces that work on rows of `f32`, to be inlined into kernels.

use crate::simd::{Backend, Kernel, Lanes, Source, Task};
use crate::tensor::{Element, View};
use half::bf16;

/// Indices of all heads of a `[batch, len, heads, width]` view.
pub fn each_head([batch, _, heads, _]: [usize; 4]) -> impl Iterator<Item = (usize, usize)> {
    (0..batch).flat_map(move |n| (0..heads).map(move |h| (n, h)))
}

/// Indices of all rows of a `[batch, len, heads, width]` view, in order.
pub fn each_row([batch, len, heads, _]: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    (0..batch).flat_map(move |n| (0..len).flat_map(move |t| (0..heads).map(move |h| [n, t, h, 0])))
}

/// Rows of a block as `f32`: in place, or converted into `buffer`. Returns the distance of rows too.
#[inline(always)]
pub fn stage<'a, B: Backend, E: Element>(
    b: B,
    src: View<'a, E, 2>,
    [at, rows]: [usize; 2],
    buffer: &'a mut [f32],
) -> (&'a [f32], usize) {
    let width = src.shape()[1];
    if width == 0 {
        return (&[], 0);
    }
    let (data, stride) = src.parts();
    if let Some(data) = E::as_f32(data) {
        return (&data[at * stride..], stride);
    }
    for r in 0..rows {
        E::widen(b.convert(), src.row([at + r, 0]), &mut buffer[r * width..][..width]);
    }
    (buffer, width)
}

/// Rows from `at` on as a right operand.
#[inline(always)]
pub fn rows_of<E: Element>(src: View<'_, E, 2>, at: usize) -> Source<'_, E> {
    let (data, stride) = src.parts();
    Source::Rows(data.get(at * stride..).unwrap_or(&[]), stride)
}

/// Whether all elements of rows `at .. at + rows` are finite.
#[inline(always)]
pub fn finite_rows<B: Backend, E: Element>(
    b: B,
    src: View<'_, E, 2>,
    [at, rows]: [usize; 2],
) -> bool {
    let (l, width) = (b.lanes(), src.shape()[1]);
    let (data, stride) = src.parts();
    if width == 0 {
        return true;
    }
    if let Some(data) = E::as_f32(data) {
        return all_finite(l, &data[at * stride..], stride, rows, width);
    }
    let mut fine = true;
    for r in at..at + rows {
        let row = src.row([r, 0]);
        if let Some(row) = E::as_bf16(row) {
            // An exponent of all ones carries into the sign.
            let carry = |x: &bf16| (x.to_bits() & 0x7f80).wrapping_add(0x80);
            let (blocks, rest) = row.as_chunks::<32>();
            for x in blocks {
                fine &= x.iter().fold(0, |any, x| any | carry(x)) & 0x8000 == 0;
            }
            fine &= rest.iter().fold(0, |any, x| any | carry(x)) & 0x8000 == 0;
            continue;
        }
        for part in row.chunks(64) {
            let mut x = [0.0; 64];
            E::widen(b.convert(), part, &mut x[..part.len()]);
            fine &= all_finite(l, &x, 64, 1, 64);
        }
    }
    fine
}

/// Whether all elements of some rows are finite.
#[inline(always)]
pub fn all_finite<L: Lanes>(l: L, data: &[f32], stride: usize, rows: usize, width: usize) -> bool {
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
        let (pairs, rest) = rest.as_chunks::<2>();
        for x in pairs {
            sums[0] = l.mul_add(x[0], l.zero(), sums[0]);
            sums[1] = l.mul_add(x[1], l.zero(), sums[1]);
        }
        for x in rest {
            sums[0] = l.mul_add(*x, l.zero(), sums[0]);
        }
        if !tail.is_empty() {
            sums[1] = l.mul_add(l.load_head(tail), l.zero(), sums[1]);
        }
        // The next row begins with the other two: narrow rows do not wait for each other either.
        sums = [sums[2], sums[3], sums[0], sums[1]];
    }
    l.sum(l.add(l.add(sums[0], sums[1]), l.add(sums[2], sums[3]))) == 0.0
}

/// `a . b`, lane by lane: the sum of the result is the product.
#[inline(always)]
pub fn partial_dot<L: Lanes>(l: L, a: &[f32], b: &[f32]) -> L::F {
    let ((a, a_tail), (b, b_tail)) = (l.split(a), l.split(b));
    let mut sum = l.mul(l.load_head(a_tail), l.load_head(b_tail));
    for (a, b) in a.iter().zip(b) {
        sum = l.mul_add(*a, *b, sum);
    }
    sum
}

/// `z[i] += sum_r rows[r][i]`
#[inline(always)]
pub fn add_columns<L: Lanes>(l: L, rows: &[f32], [m, width]: [usize; 2], z: &mut [f32]) {
    const WIDE: usize = 4;
    let mut i = 0;
    while i + WIDE * L::N <= width {
        let mut acc = [l.zero(); WIDE];
        for r in 0..m {
            let row = &rows[r * width + i..][..WIDE * L::N];
            for w in 0..WIDE {
                acc[w] = l.add(acc[w], l.load(&row[w * L::N..]));
            }
        }
        for w in 0..WIDE {
            let z = &mut z[i + w * L::N..];
            l.store(z, l.add(l.load(z), acc[w]));
        }
        i += WIDE * L::N;
    }
    while i < width {
        let end = width.min(i + L::N);
        let mut acc = l.zero();
        for r in 0..m {
            acc = l.add(acc, l.load_head(&rows[r * width + i..][..end - i]));
        }
        let z = &mut z[i..end];
        l.store_head(z, l.add(l.load_head(z), acc));
        i = end;
    }
}

/// `total = total + part`, for states in any layout; of several parts, one after the other.
#[derive(Debug)]
pub struct Combine<'a> {
    /// The sum so far.
    pub total: &'a mut [f32],
    /// What is added, once or several times as long.
    pub part: &'a [f32],
}

impl<B: Backend> Kernel<B> for Combine<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let width = self.total.len();
        add_columns(b.lanes(), self.part, [self.part.len() / width.max(1), width], self.total);
    }
}

impl Task for Combine<'_> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        b.call(self);
    }
}
