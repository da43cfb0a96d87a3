//! Gradients of depth-wise convolution. With windows side by side, that of the input is a convolution with the kernels
//! turned around; [`DepthwiseInput`] is for all others.

use super::depthwise::Kernels;
use super::maps::{Map, MapKernel};
use crate::simd::{Backend, Kernel, Lanes, PANEL};
use crate::tensor::View;

/// `dx[n, y, x, c] = sum w[p, q, c] dout[n, i, j, c]` over all `i s + p - pad = y`, `j s + q - pad = x`; the gradient of
/// the output is the map's input.
#[derive(Clone, Copy, Debug)]
pub struct DepthwiseInput<'a> {
    /// Weights.
    pub kernels: Kernels<'a>,
    /// Zeros around the map.
    pub padding: [usize; 2],
    /// Distance between windows.
    pub stride: [usize; 2],
}

impl DepthwiseInput<'_> {
    /// The window whose tap `p` lies on place `y`, if it is one of the first `n`.
    #[inline(always)]
    fn window(&self, axis: usize, y: usize, p: usize, n: usize) -> Option<usize> {
        let (at, stride) = ((y + self.padding[axis]).checked_sub(p)?, self.stride[axis]);
        (at % stride == 0 && at / stride < n).then_some(at / stride)
    }
}

impl MapKernel for DepthwiseInput<'_> {
    fn cost(&self) -> usize {
        let ([height, width], [down, right]) = (self.kernels.size, self.stride);
        (height.saturating_mul(width).saturating_mul(2) / down / right).max(1)
    }

    #[inline(always)]
    fn run<B: Backend>(mut map: Map<'_, Self>, b: B) {
        let ([batch, h, w, _], [_, rows, columns, _]) = (map.out.shape(), map.x.shape());
        let (l, op) = (b.lanes(), map.op);
        let Kernels { size: [height, width], period, weights, .. } = op.kernels;
        for (n, i, j) in (0..batch * h * w).map(|at| (at / w / h, at / w % h, at % w)) {
            let out = map.out.row_mut([n, i, j, 0]);
            out.fill(0.0);
            for (p, q) in (0..height).flat_map(|p| (0..width).map(move |q| (p, q))) {
                let row = op.window(0, map.first + i, p, rows);
                let (Some(row), Some(column)) = (row, op.window(1, j, q, columns)) else {
                    continue;
                };
                let taps = &weights[(p * width + q) * period..][..period];
                let dout = map.x.row([n, row, column, 0]);
                for (out, dout) in out.chunks_mut(period).zip(dout.chunks(period)) {
                    let parts = out.chunks_mut(B::L::N).zip(dout.chunks(B::L::N));
                    for ((out, d), t) in parts.zip(taps.chunks(B::L::N)) {
                        let sum = l.mul_add(l.load_head(d), l.load(t), l.load_head(out));
                        l.store_head(out, sum);
                    }
                }
            }
        }
    }
}

/// Gradients of weights and bias, channel by channel, for some units: a unit is one row of the kernels of [`PANEL`]
/// channels, or their bias, which comes behind the last row.
#[derive(Debug)]
pub struct DepthwiseWeights<'a> {
    /// `[batch, h, w, channels]`
    pub x: View<'a, f32, 4>,
    /// `[batch, rows, columns, channels]`
    pub dout: View<'a, f32, 4>,
    /// Rows and columns of a kernel.
    pub size: [usize; 2],
    /// Zeros around the map.
    pub padding: [usize; 2],
    /// Distance between windows.
    pub stride: [usize; 2],
    /// Number of the first unit, counted over panels and then rows.
    pub first: usize,
    /// `[units, columns of a kernel, PANEL]`; the bias has one column.
    pub sums: &'a mut [f32],
}

/// Most columns of a kernel whose sums stay in registers together.
const TAPS: usize = 7;
/// Output columns whose products are summed in registers.
const WIDE: usize = 8;
/// What lies outside of a map.
static ZEROS: [f32; PANEL] = [0.0; PANEL];

impl<B: Backend> Kernel<B> for DepthwiseWeights<'_> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        const { assert!(PANEL.is_multiple_of(B::L::N)) };
        let (l, [height, width]) = (b.lanes(), self.size);
        self.sums.fill(0.0);
        for i in 0..self.sums.len() / (width * PANEL) {
            let unit = self.first + i;
            let at = [i, unit / (height + 1) * PANEL, unit % (height + 1)];
            if at[2] == height {
                self.bias(l, at);
            } else if self.stride[1] == 1 && width == 3 {
                self.row::<B::L, 3>(l, at, 0);
            } else if self.stride[1] == 1 && width == 5 {
                self.row::<B::L, 5>(l, at, 0);
            } else if self.stride[1] == 1 && width == 7 {
                self.row::<B::L, 7>(l, at, 0);
            } else {
                (0..width).for_each(|q| self.row::<B::L, 1>(l, at, q));
            }
        }
    }
}

impl DepthwiseWeights<'_> {
    /// Taps `first .. first + K` of a row of kernels; one of them where windows do not lie side by side.
    #[inline(always)]
    fn row<L: Lanes, const K: usize>(&mut self, l: L, [unit, panel, p]: [usize; 3], first: usize) {
        const { assert!(K <= TAPS) };
        let ([batch, h, w, channels], [_, rows, columns, _]) = (self.x.shape(), self.dout.shape());
        let ([down, right], [above, left]) = (self.stride, self.padding);
        let width = PANEL.min(channels - panel);
        let sums = &mut self.sums[(unit * self.size[1] + first) * PANEL..][..K * PANEL];
        for (n, i) in (0..batch).flat_map(|n| (0..rows).map(move |i| (n, i))) {
            let Some(y) = (i * down + p).checked_sub(above).filter(|y| *y < h) else { continue };
            for j in (0..columns).step_by(WIDE) {
                // Rows of zeros stand for places outside of the maps.
                let mut outs = [&ZEROS[..width]; WIDE];
                for (t, out) in outs.iter_mut().enumerate().take(columns - j) {
                    *out = &self.dout.row([n, i, j + t, 0])[panel..][..width];
                }
                let mut places = [&ZEROS[..width]; WIDE + TAPS - 1];
                for (t, place) in places[..WIDE + K - 1].iter_mut().enumerate() {
                    let x = ((j + t) * right + first).checked_sub(left);
                    if let Some(x) = x.filter(|x| *x < w) {
                        *place = &self.x.row([n, y, x, 0])[panel..][..width];
                    }
                }
                for c in (0..width).step_by(L::N) {
                    let mut acc: [L::F; K] =
                        core::array::from_fn(|q| l.load(&sums[q * PANEL + c..]));
                    if c + L::N <= width {
                        products(l, &outs, &places, &mut acc, |x| l.load(&x[c..]));
                    } else {
                        products(l, &outs, &places, &mut acc, |x| l.load_head(&x[c..]));
                    }
                    for (q, acc) in acc.into_iter().enumerate() {
                        l.store(&mut sums[q * PANEL + c..], acc);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn bias<L: Lanes>(&mut self, l: L, [unit, panel, _]: [usize; 3]) {
        let [batch, rows, columns, channels] = self.dout.shape();
        for (n, i) in (0..batch).flat_map(|n| (0..rows).map(move |i| (n, i))) {
            for c in (0..PANEL.min(channels - panel)).step_by(L::N) {
                let from = panel + c;
                let to = channels.min(from + L::N);
                let mut acc = l.zero();
                for j in 0..columns {
                    acc = l.add(acc, l.load_head(&self.dout.row([n, i, j, 0])[from..to]));
                }
                let sum = &mut self.sums[unit * self.size[1] * PANEL + c..];
                l.store(sum, l.add(l.load(sum), acc));
            }
        }
    }
}

/// `acc[q] += sum_t outs[t] places[t + q]`
#[inline(always)]
fn products<L: Lanes, const K: usize>(
    l: L,
    outs: &[&[f32]; WIDE],
    places: &[&[f32]; WIDE + TAPS - 1],
    acc: &mut [L::F; K],
    load: impl Fn(&[f32]) -> L::F,
) {
    for t in 0..WIDE {
        let out = load(outs[t]);
        for q in 0..K {
            acc[q] = l.mul_add(out, load(places[t + q]), acc[q]);
        }
    }
}
