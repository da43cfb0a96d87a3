//! Depth-wise convolution of maps whose channels lie side by side.
//!
//! A block of output columns shares its input: a vector of channels is read once and goes to every output that it
//! belongs to, with the weights of one kernel row in registers. Places outside of the map are rows of zeros, so
//! that borders need no code of their own.

use super::maps::{Map, MapKernel};
use crate::simd::{Backend, Lanes, PANEL};

/// Most output columns of a block, enough chains of sums to hide the latency of a multiply-add.
const WIDE: usize = 8;
/// Rows of the largest kernel that runs in blocks.
const TALL: usize = 7;

/// Weights of a kernel, repeated so that whole vectors of neighbouring channels can be read.
#[derive(Clone, Copy, Debug)]
pub struct Kernels<'a> {
    /// Rows and columns of a kernel.
    pub size: [usize; 2],
    /// Channels until weights repeat, a multiple of [`PANEL`].
    pub period: usize,
    /// `[rows, columns, period]`
    pub weights: &'a [f32],
    /// `[period]`
    pub bias: &'a [f32],
}

/// `out[n, i, j, c] = bias[c] + sum_pq w[p, q, c] x[n, i s + p - pad, j s + q - pad, c]`, or added to what `out` holds.
#[derive(Clone, Copy, Debug)]
pub struct Depthwise<'a> {
    /// Weights.
    pub kernels: Kernels<'a>,
    /// Zeros around the map: above and below, left and right.
    pub padding: [usize; 2],
    /// Distance between windows.
    pub stride: [usize; 2],
    /// Whether the result is added.
    pub add: bool,
    /// As many zeros as channels.
    pub zeros: &'a [f32],
}

impl MapKernel for Depthwise<'_> {
    fn cost(&self) -> usize {
        let [height, width] = self.kernels.size;
        height.saturating_mul(width).saturating_mul(2)
    }

    #[inline(always)]
    fn run<B: Backend>(mut map: Map<'_, Self>, b: B) {
        const { assert!(PANEL.is_multiple_of(B::L::N)) };
        let (l, [batch, rows, ..]) = (b.lanes(), map.out.shape());
        for n in 0..batch {
            for i in 0..rows {
                match (map.op.kernels.size, map.op.stride[1]) {
                    ([..=TALL, 3], 1) => map.row::<B::L, 3>(l, [n, i]),
                    ([..=TALL, 5], 1) => map.row::<B::L, 5>(l, [n, i]),
                    ([..=TALL, 7], 1) => map.row::<B::L, 7>(l, [n, i]),
                    _ => map.any_row(l, [n, i]),
                }
            }
        }
    }
}

impl Map<'_, Depthwise<'_>> {
    /// The input row under row `p` of the window of output row `i`.
    #[inline(always)]
    fn under(&self, i: usize, p: usize) -> Option<usize> {
        let y = ((self.first + i) * self.op.stride[0] + p).checked_sub(self.op.padding[0])?;
        (y < self.x.shape()[1]).then_some(y)
    }

    /// One output row, kernels of `K` columns, windows side by side.
    #[inline(always)]
    fn row<L: Lanes, const K: usize>(&mut self, l: L, at: [usize; 2]) {
        let columns = self.out.shape()[2];
        let mut j = 0;
        while j < columns {
            // Twice half a block where a whole one would be half empty.
            if columns - j > WIDE / 2 {
                self.block::<L, K, WIDE>(l, at, j);
                j += WIDE;
            } else {
                self.block::<L, K, { WIDE / 2 }>(l, at, j);
                j += WIDE / 2;
            }
        }
    }

    /// Output columns `j .. j + J`, as many of them as there are.
    #[inline(always)]
    fn block<L: Lanes, const K: usize, const J: usize>(
        &mut self,
        l: L,
        [n, i]: [usize; 2],
        j: usize,
    ) {
        const MOST: usize = WIDE + 6;
        let ([_, _, w, channels], [height, _]) = (self.x.shape(), self.op.kernels.size);
        let columns = self.out.shape()[2];
        // The input under every kernel row; rows outside of the map are skipped.
        let mut under: [(usize, [&[f32]; MOST]); TALL] = [(0, [&[]; MOST]); TALL];
        let mut rows = 0;
        for p in 0..height {
            let Some(y) = self.under(i, p) else { continue };
            under[rows].0 = p;
            for (t, place) in under[rows].1[..J + K - 1].iter_mut().enumerate() {
                *place = match (j + t).checked_sub(self.op.padding[1]) {
                    Some(x) if x < w => self.x.row([n, y, x, 0]),
                    _ => self.op.zeros,
                };
            }
            rows += 1;
        }
        let Kernels { period, weights, bias, .. } = self.op.kernels;
        let mut weight = 0;
        for c in (0..channels).step_by(L::N) {
            let width = L::N.min(channels - c);
            let mut acc = [l.load(&bias[weight..]); J];
            for (p, places) in &under[..rows] {
                let taps: [L::F; K] =
                    core::array::from_fn(|q| l.load(&weights[(p * K + q) * period + weight..]));
                if width == L::N {
                    window(l, &places[..J + K - 1], taps, &mut acc, |x| l.load(&x[c..]));
                } else {
                    window(l, &places[..J + K - 1], taps, &mut acc, |x| l.load_head(&x[c..]));
                }
            }
            for (t, acc) in acc.into_iter().enumerate().take(columns - j) {
                let out = &mut self.out.row_mut([n, i, j + t, 0])[c..c + width];
                let old = if self.op.add { l.load_head(out) } else { l.zero() };
                l.store_head(out, l.add(old, acc));
            }
            weight += L::N;
            weight = if weight == period { 0 } else { weight };
        }
    }

    /// One output row of any kernel.
    #[inline(always)]
    fn any_row<L: Lanes>(&mut self, l: L, [n, i]: [usize; 2]) {
        let ([_, _, w, _], [height, width]) = (self.x.shape(), self.op.kernels.size);
        let Kernels { period, weights, bias, .. } = self.op.kernels;
        for j in 0..self.out.shape()[2] {
            let out = self.out.row_mut([n, i, j, 0]);
            if !self.op.add {
                out.fill(0.0);
            }
            for part in out.chunks_mut(period) {
                for (x, b) in part.iter_mut().zip(bias) {
                    *x += b;
                }
            }
            for (p, q) in (0..height).flat_map(|p| (0..width).map(move |q| (p, q))) {
                let Some(y) = self.under(i, p) else { continue };
                let x = match (j * self.op.stride[1] + q).checked_sub(self.op.padding[1]) {
                    Some(x) if x < w => self.x.row([n, y, x, 0]),
                    _ => continue,
                };
                let taps = &weights[(p * width + q) * period..][..period];
                let out = self.out.row_mut([n, i, j, 0]);
                for (out, x) in out.chunks_mut(period).zip(x.chunks(period)) {
                    let parts = out.chunks_mut(L::N).zip(x.chunks(L::N));
                    for ((out, x), t) in parts.zip(taps.chunks(L::N)) {
                        let y = l.mul_add(l.load_head(x), l.load(t), l.load_head(out));
                        l.store_head(out, y);
                    }
                }
            }
        }
    }
}

/// Every place goes to the outputs that it belongs to.
#[inline(always)]
fn window<L: Lanes, const K: usize, const J: usize>(
    l: L,
    places: &[&[f32]],
    taps: [L::F; K],
    acc: &mut [L::F; J],
    load: impl Fn(&[f32]) -> L::F,
) {
    for (t, place) in places.iter().enumerate() {
        let x = load(place);
        for q in 0..K {
            if t >= q && t - q < J {
                acc[t - q] = l.mul_add(x, taps[q], acc[t - q]);
            }
        }
    }
}
