//! Positions as angles: LRPE and RoPE. Angles are formed and reduced in `f64`.

use crate::simd::{Backend, Kernel, Lanes, math};
use crate::tensor::{View, ViewMut};

/// Angles that are formed at a time, shared by all batch rows.
const BLOCK: usize = 64;

/// Sines and cosines of a few angles, on the stack.
struct Block {
    sin: [f32; BLOCK],
    cos: [f32; BLOCK],
}

impl Block {
    /// Of `p * freq[..]`, at most [`BLOCK`] of them.
    #[inline(always)]
    fn new<L: Lanes>(l: L, p: f64, freq: &[f64]) -> Self {
        let (mut sin, mut cos) = ([0.0; BLOCK], [0.0; BLOCK]);
        for (angle, f) in cos.iter_mut().zip(freq) {
            *angle = math::reduce_angle(p * f);
        }
        let mut j = 0;
        while j < freq.len() {
            let (s, c) = math::sin_cos(l, l.load(&cos[j..]));
            l.store(&mut sin[j..], s);
            l.store(&mut cos[j..], c);
            j += L::N;
        }
        Self { sin, cos }
    }
}

/// `out = [x cos(theta p) | x sin(theta p)]` per head; or back, `out = x_1 cos(theta p) + x_2 sin(theta p)` for
/// `x = [x_1 | x_2]`.
#[derive(Debug)]
pub struct LrpeRows<'a> {
    /// `[batch, len, heads, dim]`, or twice as wide on the way back.
    pub x: View<'a, f32, 4>,
    /// `[batch, len, heads, 2 dim]`, or half as wide on the way back.
    pub out: ViewMut<'a, f32, 4>,
    /// `[heads, dim]`
    pub theta: &'a [f64],
    /// Position of the first token.
    pub offset: usize,
    /// Whether this is the way back.
    pub back: bool,
}

impl<B: Backend> Kernel<B> for LrpeRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let (l, [batch, len, heads, width]) = (b.lanes(), self.x.shape());
        let dim = if self.back { width / 2 } else { width };
        for t in 0..len {
            let p = (self.offset + t) as f64;
            for h in 0..heads {
                for j in (0..dim).step_by(BLOCK) {
                    let n = BLOCK.min(dim - j);
                    let block = Block::new(l, p, &self.theta[h * dim + j..][..n]);
                    let (cos, sin) = (&block.cos[..n], &block.sin[..n]);
                    for i in 0..batch {
                        let (x, out) = (self.x.row([i, t, h, 0]), self.out.row_mut([i, t, h, 0]));
                        if self.back {
                            let (a, b) = (&x[j..j + n], &x[dim + j..][..n]);
                            turned(l, a, b, cos, sin, &mut out[j..j + n]);
                        } else {
                            let (near, far) = out.split_at_mut(dim);
                            times(l, &x[j..j + n], cos, &mut near[j..j + n]);
                            times(l, &x[j..j + n], sin, &mut far[j..j + n]);
                        }
                    }
                }
            }
        }
    }
}

/// The gradient of some heads' angles, `sum p (x cos(theta p) dout_2 - x sin(theta p) dout_1)` over batch rows and tokens,
/// added up in `f64`.
#[derive(Debug)]
pub struct LrpeAngles<'a> {
    /// `[batch, len, heads, dim]`
    pub x: View<'a, f32, 4>,
    /// `[batch, len, heads, 2 dim]`
    pub dout: View<'a, f32, 4>,
    /// `[heads, dim]`
    pub theta: &'a [f64],
    /// Position of the first token.
    pub offset: usize,
    /// `[heads, dim]`, written.
    pub out: ViewMut<'a, f32, 2>,
}

impl<B: Backend> Kernel<B> for LrpeAngles<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        self.sum(b.lanes());
    }
}

impl LrpeAngles<'_> {
    #[inline(always)]
    fn sum<L: Lanes>(mut self, l: L) {
        let [batch, len, heads, dim] = self.x.shape();
        for (h, j) in (0..heads).flat_map(|h| (0..dim).step_by(BLOCK).map(move |j| (h, j))) {
            let n = BLOCK.min(dim - j);
            let (mut sums, mut row) = ([0.0f64; BLOCK], [0.0; BLOCK]);
            for t in 0..len {
                let p = (self.offset + t) as f64;
                let block = Block::new(l, p, &self.theta[h * dim + j..][..n]);
                for i in 0..batch {
                    let x = &self.x.row([i, t, h, 0])[j..j + n];
                    let (near, far) = self.dout.row([i, t, h, 0]).split_at(dim);
                    let (near, far) = (&near[j..j + n], &far[j..j + n]);
                    for at in (0..n).step_by(L::N) {
                        let [x, a, b] = [x, near, far].map(
                            #[inline(always)]
                            |row| l.load_head(&row[at..]),
                        );
                        let (c, s) = (l.load(&block.cos[at..]), l.load(&block.sin[at..]));
                        l.store(&mut row[at..], l.mul(x, l.neg_mul_add(a, s, l.mul(b, c))));
                    }
                    for (sum, x) in sums.iter_mut().zip(&row[..n]) {
                        *sum += p * f64::from(*x);
                    }
                }
            }
            for (out, sum) in self.out.row_mut([h, 0])[j..j + n].iter_mut().zip(sums) {
                *out = sum as f32;
            }
        }
    }
}

#[inline(always)]
fn times<L: Lanes>(l: L, a: &[f32], b: &[f32], out: &mut [f32]) {
    for ((a, b), out) in a.chunks(L::N).zip(b.chunks(L::N)).zip(out.chunks_mut(L::N)) {
        l.store_head(out, l.mul(l.load_head(a), l.load_head(b)));
    }
}

/// `out = a cos + b sin`
#[inline(always)]
fn turned<L: Lanes>(l: L, a: &[f32], b: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
    for j in (0..out.len()).step_by(L::N) {
        let (a, b) = (l.load_head(&a[j..]), l.load_head(&b[j..]));
        let (c, s) = (l.load_head(&cos[j..]), l.load_head(&sin[j..]));
        l.store_head(&mut out[j..], l.mul_add(b, s, l.mul(a, c)));
    }
}

/// Rotates pairs of elements; what lies behind them is copied.
#[derive(Debug)]
pub struct RopeRows<'a> {
    /// `[batch, len, heads, dim]`
    pub x: View<'a, f32, 4>,
    /// `[batch, len, heads, dim]`
    pub out: ViewMut<'a, f32, 4>,
    /// Angle of each pair at position 1.
    pub freq: &'a [f64],
    /// Pairs are neighbours, or half of the rotated part apart.
    pub interleaved: bool,
    /// Position of the first token, or of every token.
    pub positions: Result<&'a [usize], usize>,
    /// Whether pairs turn back.
    pub back: bool,
}

impl<B: Backend> Kernel<B> for RopeRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let (l, [batch, len, heads, _]) = (b.lanes(), self.x.shape());
        let pairs = self.freq.len();
        for t in 0..len {
            let p = match self.positions {
                Ok(at) => at[t],
                Err(start) => start + t,
            } as f64;
            let p = if self.back { -p } else { p };
            for j in (0..pairs).step_by(BLOCK) {
                let n = BLOCK.min(pairs - j);
                let block = Block::new(l, p, &self.freq[j..][..n]);
                let (cos, sin) = (&block.cos[..n], &block.sin[..n]);
                for (i, h) in (0..batch).flat_map(|i| (0..heads).map(move |h| (i, h))) {
                    let (x, y) = (self.x.row([i, t, h, 0]), self.out.row_mut([i, t, h, 0]));
                    if self.interleaved {
                        neighbours(&x[2 * j..][..2 * n], cos, sin, &mut y[2 * j..][..2 * n]);
                    } else {
                        let (a, b) = (&x[j..][..n], &x[pairs + j..][..n]);
                        let (ya, yb) = y.split_at_mut(pairs);
                        halves(l, a, b, cos, sin, &mut ya[j..][..n], &mut yb[j..][..n]);
                    }
                }
            }
            for (i, h) in (0..batch).flat_map(|i| (0..heads).map(move |h| (i, h))) {
                let x = &self.x.row([i, t, h, 0])[2 * pairs..];
                self.out.row_mut([i, t, h, 0])[2 * pairs..].copy_from_slice(x);
            }
        }
    }
}

#[inline(always)]
fn neighbours(x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
    let pairs = x.chunks_exact(2).zip(y.chunks_exact_mut(2));
    for ((x, y), (c, s)) in pairs.zip(cos.iter().zip(sin)) {
        y[0] = x[0] * c - x[1] * s;
        y[1] = x[1] * c + x[0] * s;
    }
}

#[inline(always)]
fn halves<L: Lanes>(
    l: L,
    a: &[f32],
    b: &[f32],
    cos: &[f32],
    sin: &[f32],
    ya: &mut [f32],
    yb: &mut [f32],
) {
    for j in (0..a.len()).step_by(L::N) {
        let (a, b) = (l.load_head(&a[j..]), l.load_head(&b[j..]));
        let (c, s) = (l.load_head(&cos[j..]), l.load_head(&sin[j..]));
        l.store_head(&mut ya[j..], l.neg_mul_add(b, s, l.mul(a, c)));
        l.store_head(&mut yb[j..], l.mul_add(a, s, l.mul(b, c)));
    }
}
