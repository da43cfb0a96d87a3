//! Rows pooled to one, column by column.

use crate::simd::{Backend, Kernel, Lanes};
use crate::tensor::{Element, View};

/// How rows become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pool {
    /// The largest element of every column.
    #[default]
    Max,
    /// The mean of every column.
    Mean,
    /// The largest element of every column, or 0.
    ReluMax,
}

impl Pool {
    /// What a pool of no rows holds.
    #[must_use]
    pub fn start(self) -> f32 {
        match self {
            Pool::Max => f32::NEG_INFINITY,
            Pool::Mean | Pool::ReluMax => 0.0,
        }
    }

    /// The factor that makes a pool of `n` rows of what was gathered.
    #[must_use]
    pub fn factor(self, n: usize) -> f32 {
        match self {
            Pool::Mean => (1.0 / n.max(1) as f64) as f32,
            Pool::Max | Pool::ReluMax => 1.0,
        }
    }
}

/// `pool <- pool (+) scale * row` for some rows, where `(+)` is a sum or a maximum.
#[derive(Debug)]
pub struct Gather<'a, E> {
    /// `[n, width]`
    pub src: View<'a, E, 2>,
    /// First row and number of rows.
    pub rows: [usize; 2],
    /// Factor of the rows.
    pub scale: f32,
    /// Sum or maximum.
    pub pool: Pool,
    /// `[width]`
    pub into: &'a mut [f32],
    /// `[width]`
    pub buffer: &'a mut [f32],
}

impl<B: Backend, E: Element> Kernel<B> for Gather<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let l = b.lanes();
        let [at, n] = self.rows;
        for r in at..at + n {
            let row = self.src.row([r, 0]);
            let row = match E::as_f32(row) {
                Some(row) => row,
                None => {
                    E::widen(b.convert(), row, &mut self.buffer[..row.len()]);
                    &*self.buffer
                }
            };
            match self.pool {
                Pool::Mean => each(l, row, self.scale, self.into, Sum),
                Pool::Max | Pool::ReluMax => each(l, row, self.scale, self.into, Max),
            }
        }
    }
}

trait Fold: Copy {
    fn fold<L: Lanes>(self, l: L, old: L::F, new: L::F) -> L::F;
}

#[derive(Clone, Copy)]
struct Sum;
impl Fold for Sum {
    #[inline(always)]
    fn fold<L: Lanes>(self, l: L, old: L::F, new: L::F) -> L::F {
        l.add(old, new)
    }
}

#[derive(Clone, Copy)]
struct Max;
impl Fold for Max {
    #[inline(always)]
    fn fold<L: Lanes>(self, l: L, old: L::F, new: L::F) -> L::F {
        // NaN of either side stays.
        l.select(l.le(new, old), old, l.select(l.le(old, old), new, old))
    }
}

#[inline(always)]
fn each<L: Lanes>(l: L, row: &[f32], scale: f32, into: &mut [f32], f: impl Fold) {
    let scale = l.splat(scale);
    for (to, x) in into.chunks_mut(L::N).zip(row.chunks(L::N)) {
        let new = f.fold(l, l.load_head(to), l.mul(l.load_head(x), scale));
        l.store_head(to, new);
    }
}

/// Pools of all rows before each: `out[i]` pools rows `0 .. i` by maxima, row 0 is minus infinity.
#[derive(Debug)]
pub struct Prefix<'a> {
    /// Row `i` at `src[i * stride ..]`.
    pub src: &'a [f32],
    /// Distance between rows of the source.
    pub stride: usize,
    /// Number of rows.
    pub rows: usize,
    /// Width of a row.
    pub width: usize,
    /// `rows * width`
    pub out: &'a mut [f32],
}

impl<B: Backend> Kernel<B> for Prefix<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let (l, width) = (b.lanes(), self.width);
        if self.rows == 0 {
            return;
        }
        self.out[..width].fill(f32::NEG_INFINITY);
        for i in 1..self.rows {
            let (before, now) = self.out.split_at_mut(i * width);
            now[..width].copy_from_slice(&before[(i - 1) * width..]);
            each(l, &self.src[(i - 1) * self.stride..][..width], 1.0, &mut now[..width], Max);
        }
    }
}
