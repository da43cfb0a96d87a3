//! Memory that is needed next, asked for while something else is computed.

use crate::simd::{Lanes, Sink};
use crate::tensor::{Layout, View, ViewMut};

/// Some rows of a matrix, as addresses.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    address: usize,
    /// Bytes from one row to the next, and of a row.
    stride: usize,
    width: usize,
    rows: usize,
}

impl Part {
    /// Nothing.
    pub const NONE: Part = Part { address: 0, stride: 0, width: 0, rows: 0 };

    /// Rows `at .. at + rows`, as many of them as there are.
    #[inline(always)]
    #[must_use]
    pub fn of<T>(src: View<'_, T, 2>, rows: [usize; 2]) -> Self {
        Self::new::<T>(src.address(), src.layout(), rows)
    }

    /// As [`of`](Self::of), for an output.
    #[inline(always)]
    #[must_use]
    pub fn of_mut<T>(dst: &ViewMut<'_, T, 2>, rows: [usize; 2]) -> Self {
        Self::new::<T>(dst.address(), dst.layout(), rows)
    }

    #[inline(always)]
    fn new<T>(address: usize, layout: Layout<2>, [at, rows]: [usize; 2]) -> Self {
        let ([n, width], [stride, _]) = (layout.shape(), layout.strides());
        let stride = stride.wrapping_mul(size_of::<T>());
        Self {
            address: address.wrapping_add(at.wrapping_mul(stride)),
            stride,
            width: width * size_of::<T>(),
            rows: if width == 0 { 0 } else { rows.min(n.saturating_sub(at)) },
        }
    }

    fn lines(&self) -> usize {
        self.rows * self.width.div_ceil(LINE)
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// Cache lines of some matrices, asked for a few at a time: memory and arithmetic overlap, and never more lines
/// are on their way than the core can track.
#[derive(Debug)]
pub struct Ahead {
    parts: [Part; 4],
    part: usize,
    column: usize,
    /// Lines per row that a sink takes.
    pace: usize,
}

impl Ahead {
    /// Up to four matrices one after the other, all of them by the time that sinks have taken `rows` rows of
    /// tiles.
    #[inline(always)]
    #[must_use]
    pub fn new<const N: usize>(some: [Part; N], rows: usize) -> Self {
        let lines: usize = some.iter().map(Part::lines).sum();
        let mut parts = [Part::NONE; 4];
        parts[..N].copy_from_slice(&some);
        Self { parts, part: 0, column: 0, pace: lines.div_ceil(rows.max(1)) }
    }

    /// Nothing.
    #[must_use]
    pub fn none() -> Self {
        Self::new([], 0)
    }

    /// Asks for the share of `rows` rows of tiles.
    #[inline(always)]
    fn ask<L: Lanes>(&mut self, l: L, rows: usize) {
        let mut due = self.pace * rows;
        while due > 0 {
            let Some(part) = self.parts.get_mut(self.part) else {
                return;
            };
            if part.rows == 0 {
                self.part += 1;
                continue;
            }
            // All that is touched per line lives in registers: through memory a line would cost five cycles more.
            let begin = part.address.wrapping_add(self.column);
            let lines = (part.width - self.column).div_ceil(LINE).min(due);
            for line in 0..lines {
                l.prefetch::<2>(begin.wrapping_add(line * LINE));
            }
            due -= lines;
            self.column += lines * LINE;
            if self.column >= part.width {
                self.column = 0;
                part.address = part.address.wrapping_add(part.stride);
                part.rows -= 1;
            }
        }
    }
}

/// A sink that also asks for some lines of what comes next per row that it takes.
#[derive(Debug)]
pub struct Meanwhile<'b, S> {
    /// Where the product goes.
    pub sink: S,
    /// What comes next.
    pub ahead: &'b mut Ahead,
}

impl<L: Lanes, S: Sink<L>> Sink<L> for Meanwhile<'_, S> {
    #[inline(always)]
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        width: usize,
        acc: &[[L::F; V]; M],
    ) {
        self.ahead.ask(l, M);
        self.sink.put_tile(l, i, j, width, acc);
    }
}
