//! Feature maps of linear attention, applied to rows.

use crate::scratch::Cut;
use crate::simd::{Backend, Lanes, math};
use crate::tensor::{Element, View, ViewMut};

/// Which side of the product features are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Queries.
    Query,
    /// Keys.
    Key,
}

/// Makes features of rows of queries and keys: element by element, or by mixing a whole row.
pub trait Features: Copy + Send + Sync {
    /// What a thread needs for it.
    type Work<'w, B: Backend>;

    /// Features of a row of `inputs` elements.
    fn width(&self, inputs: usize) -> usize {
        inputs
    }

    /// Bytes of a [`Work`](Self::Work).
    fn bytes<B: Backend>(&self, inputs: usize) -> usize;

    /// Cuts a [`Work`](Self::Work) off scratch.
    fn work<'w, B: Backend>(&self, b: B, inputs: usize, cut: &mut Cut<'w>) -> Self::Work<'w, B>;

    /// The same for one head of a call.
    #[must_use]
    fn head(&self, _batch: usize, _head: usize) -> Self {
        *self
    }

    /// The same for batch rows (`axis` 0) or heads (`axis` 2) `from .. to` of a call.
    #[must_use]
    fn part(&self, _axis: usize, _from: usize, _to: usize) -> Self {
        *self
    }

    /// Features of rows `at .. at + rows` of `src`, at most [`MOST`]; those of row `r` go to `dst[r * stride ..]`.
    #[allow(clippy::too_many_arguments)] // rows from here to there
    fn rows<B: Backend, E: Element>(
        &self,
        b: B,
        work: &mut Self::Work<'_, B>,
        side: Side,
        src: View<'_, E, 2>,
        rows: [usize; 2],
        dst: &mut [f32],
        stride: usize,
    );
}

/// Rows that features are made of at a time.
pub const MOST: usize = 96;

impl Features for FeatureMap {
    type Work<'w, B: Backend> = ();

    fn bytes<B: Backend>(&self, _: usize) -> usize {
        0
    }

    fn work<'w, B: Backend>(&self, _: B, _: usize, _: &mut Cut<'w>) {}

    #[inline(always)]
    fn rows<B: Backend, E: Element>(
        &self,
        b: B,
        (): &mut (),
        _: Side,
        src: View<'_, E, 2>,
        rows: [usize; 2],
        dst: &mut [f32],
        stride: usize,
    ) {
        map_rows(b, *self, src, rows, dst, stride);
    }
}

/// What is applied to every element of queries and keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum FeatureMap {
    /// `x`
    #[default]
    Identity,
    /// `elu(x) + 1`: `x + 1` for positive `x`, `e^x` otherwise.
    Elu1,
    /// `max(x, 0)`
    Relu,
    /// `x / (1 + e^-x)`
    Silu,
}

impl FeatureMap {
    /// One value, in `f64`.
    #[must_use]
    pub fn at(self, x: f64) -> f64 {
        match self {
            FeatureMap::Identity => x,
            FeatureMap::Elu1 if x > 0.0 => x + 1.0,
            FeatureMap::Elu1 => libm::exp(x),
            FeatureMap::Relu if x < 0.0 => 0.0,
            FeatureMap::Relu => x,
            FeatureMap::Silu => x / (1.0 + libm::exp(-x)),
        }
    }

    /// The derivative at `x`, in `f64`; that of the ReLU is 0 at 0.
    #[must_use]
    pub fn slope(self, x: f64) -> f64 {
        match self {
            FeatureMap::Identity => 1.0,
            FeatureMap::Elu1 => libm::exp(x.min(0.0)),
            FeatureMap::Relu => f64::from(u8::from(x > 0.0)),
            FeatureMap::Silu => {
                let s = 1.0 / (1.0 + libm::exp(-x));
                s + x * s * (1.0 - s)
            }
        }
    }
}

/// A map as a type, so that loops over rows have no branch.
trait Map: Copy {
    fn at<L: Lanes>(self, l: L, x: L::F) -> L::F;
    /// `d` times the derivative at `x`.
    fn chain<L: Lanes>(self, l: L, x: L::F, d: L::F) -> L::F;
}

#[derive(Clone, Copy)]
struct Identity;
impl Map for Identity {
    #[inline(always)]
    fn at<L: Lanes>(self, _: L, x: L::F) -> L::F {
        x
    }
    #[inline(always)]
    fn chain<L: Lanes>(self, _: L, _: L::F, d: L::F) -> L::F {
        d
    }
}

#[derive(Clone, Copy)]
struct Elu1;
impl Map for Elu1 {
    #[inline(always)]
    fn at<L: Lanes>(self, l: L, x: L::F) -> L::F {
        let above = l.add(x, l.splat(1.0));
        l.select(l.lt(l.zero(), x), above, math::exp(l, x))
    }
    #[inline(always)]
    fn chain<L: Lanes>(self, l: L, x: L::F, d: L::F) -> L::F {
        l.select(l.lt(l.zero(), x), d, l.mul(d, math::exp(l, x)))
    }
}

#[derive(Clone, Copy)]
struct Relu;
impl Map for Relu {
    #[inline(always)]
    fn at<L: Lanes>(self, l: L, x: L::F) -> L::F {
        l.select(l.lt(x, l.zero()), l.zero(), x)
    }
    #[inline(always)]
    fn chain<L: Lanes>(self, l: L, x: L::F, d: L::F) -> L::F {
        l.select(l.le(x, l.zero()), l.zero(), d)
    }
}

#[derive(Clone, Copy)]
struct Silu;
impl Map for Silu {
    #[inline(always)]
    fn at<L: Lanes>(self, l: L, x: L::F) -> L::F {
        math::silu(l, x)
    }
    #[inline(always)]
    fn chain<L: Lanes>(self, l: L, x: L::F, d: L::F) -> L::F {
        // Bounds beyond which the derivative is 0 or 1 in `f32`; they keep infinities out of products with 0.
        let x = l.select(l.lt(x, l.splat(-128.0)), l.splat(-128.0), x);
        let x = l.select(l.lt(l.splat(128.0), x), l.splat(128.0), x);
        let (one, s) = (l.splat(1.0), math::sigmoid(l, x));
        l.mul(d, l.mul(s, l.mul_add(x, l.sub(one, s), one)))
    }
}

/// Rows `at .. at + rows` of `src` as `f32` with `map` applied; row `r` goes to `dst[r * stride ..]`.
#[inline(always)]
pub fn map_rows<B: Backend, E: Element>(
    b: B,
    map: FeatureMap,
    src: View<'_, E, 2>,
    [at, rows]: [usize; 2],
    dst: &mut [f32],
    stride: usize,
) {
    match map {
        FeatureMap::Identity => rows_as(b, Identity, src, [at, rows], dst, stride),
        FeatureMap::Elu1 => rows_as(b, Elu1, src, [at, rows], dst, stride),
        FeatureMap::Relu => rows_as(b, Relu, src, [at, rows], dst, stride),
        FeatureMap::Silu => rows_as(b, Silu, src, [at, rows], dst, stride),
    }
}

#[inline(always)]
fn rows_as<B: Backend, E: Element>(
    b: B,
    map: impl Map,
    src: View<'_, E, 2>,
    [at, rows]: [usize; 2],
    dst: &mut [f32],
    stride: usize,
) {
    let (l, width) = (b.lanes(), src.shape()[1]);
    if width == 0 {
        return;
    }
    for r in 0..rows {
        let from = src.row([at + r, 0]);
        let to = &mut dst[r * stride..][..width];
        match E::as_f32(from) {
            Some(from) => {
                let ((s, s_tail), (d, d_tail)) = (l.split(from), l.split_mut(to));
                for (d, s) in d.iter_mut().zip(s) {
                    *d = map.at(l, *s);
                }
                l.store_head(d_tail, map.at(l, l.load_head(s_tail)));
            }
            None => {
                E::widen(b.convert(), from, to);
                let (d, d_tail) = l.split_mut(to);
                for d in d {
                    *d = map.at(l, *d);
                }
                let x = map.at(l, l.load_head(d_tail));
                l.store_head(d_tail, x);
            }
        }
    }
}

/// Elements that pass through a buffer on the stack at a time.
const PIECE: usize = 64;

/// Backward pass of [`map_rows`]: `dst = map'(src) * dphi`, element by element, for rows `at .. at + rows` of `src` and
/// of `dst`; the gradient of the features of row `r` is `dphi[r * stride ..]`.
#[inline(always)]
pub fn chain_rows<B: Backend, E: Element>(
    b: B,
    map: FeatureMap,
    src: View<'_, E, 2>,
    [at, rows]: [usize; 2],
    dphi: &[f32],
    stride: usize,
    dst: &mut ViewMut<'_, E, 2>,
) {
    match map {
        FeatureMap::Identity => chain_as(b, Identity, src, [at, rows], dphi, stride, dst),
        FeatureMap::Elu1 => chain_as(b, Elu1, src, [at, rows], dphi, stride, dst),
        FeatureMap::Relu => chain_as(b, Relu, src, [at, rows], dphi, stride, dst),
        FeatureMap::Silu => chain_as(b, Silu, src, [at, rows], dphi, stride, dst),
    }
}

#[inline(always)]
fn chain_as<B: Backend, E: Element>(
    b: B,
    map: impl Map,
    src: View<'_, E, 2>,
    [at, rows]: [usize; 2],
    dphi: &[f32],
    stride: usize,
    dst: &mut ViewMut<'_, E, 2>,
) {
    const { assert!(PIECE.is_multiple_of(B::L::N)) };
    let (l, width) = (b.lanes(), src.shape()[1]);
    for r in 0..if width == 0 { 0 } else { rows } {
        let (x, d) = (src.row([at + r, 0]), &dphi[r * stride..][..width]);
        let pieces = x.chunks(PIECE).zip(d.chunks(PIECE));
        for ((x, d), to) in pieces.zip(dst.row_mut([at + r, 0]).chunks_mut(PIECE)) {
            let mut wide = [0.0; PIECE];
            E::widen(b.convert(), x, &mut wide[..x.len()]);
            for (d, y) in d.chunks(B::L::N).zip(wide.chunks_exact_mut(B::L::N)) {
                l.store(y, map.chain(l, l.load(y), l.load_head(d)));
            }
            E::narrow(b.convert(), &wide[..to.len()], to);
        }
    }
}
