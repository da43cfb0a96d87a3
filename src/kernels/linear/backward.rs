//! What surrounds the sums of a backward pass: features and their derivatives, the column of ones behind the values,
//! and the derivative of the division. Buffers are contiguous `[batch, len, heads, width]`.

use crate::kernels::feature_map::{FeatureMap, chain_rows, map_rows};
use crate::kernels::softmax::scale_row;
use crate::kernels::staging::{each_head, each_row, partial_dot};
use crate::simd::{Backend, Kernel, Lanes, Task};
use crate::tensor::{Element, View, ViewMut};

/// Features of all rows, contiguous, times `scale`.
#[derive(Debug)]
pub struct Stage<'a, E> {
    /// The map.
    pub map: FeatureMap,
    /// Factor of the features.
    pub scale: f32,
    /// Rows.
    pub src: View<'a, E, 4>,
    /// Where the result goes.
    pub dst: &'a mut [f32],
}

/// The part of a contiguous `[batch, len, heads, width]` buffer that begins at a head's first row, and the distance
/// of its rows.
fn part(shape: [usize; 4], (n, h): (usize, usize)) -> (usize, usize) {
    let [_, len, heads, width] = shape;
    ((n * len * heads + h) * width, heads * width)
}

impl<E: Element> Task for Stage<'_, E> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let Self { map, scale, src, dst } = self;
        if src.shape().contains(&0) {
            return;
        }
        for at in each_head(src.shape()) {
            let (from, stride) = part(src.shape(), at);
            let (src, dst) = (src.head(at.0, at.1), &mut dst[from..]);
            b.call(StageHead { map, src, dst, stride });
        }
        b.call(Times { factor: scale, x: dst });
    }
}

struct StageHead<'a, E> {
    map: FeatureMap,
    src: View<'a, E, 2>,
    dst: &'a mut [f32],
    stride: usize,
}

impl<B: Backend, E: Element> Kernel<B> for StageHead<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let rows = [0, self.src.shape()[0]];
        map_rows(b, self.map, self.src, rows, self.dst, self.stride);
    }
}

/// `x = factor * x`
struct Times<'a> {
    factor: f32,
    x: &'a mut [f32],
}

impl<B: Backend> Kernel<B> for Times<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        if self.factor != 1.0 {
            scale_row(b.lanes(), self.x, self.factor);
        }
    }
}

/// `dst = scale phi'(src) dphi` for all rows.
#[derive(Debug)]
pub struct Chain<'a, 'd, E> {
    /// The map.
    pub map: FeatureMap,
    /// Factor of the features.
    pub scale: f32,
    /// Rows.
    pub src: View<'a, E, 4>,
    /// Gradients of the features; overwritten.
    pub dphi: &'a mut [f32],
    /// Where the result goes.
    pub dst: &'a mut ViewMut<'d, E, 4>,
}

impl<E: Element> Task for Chain<'_, '_, E> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let Self { map, scale, src, dphi, dst } = self;
        if src.shape().contains(&0) {
            return;
        }
        b.call(Times { factor: scale, x: &mut *dphi });
        for at in each_head(src.shape()) {
            let (from, stride) = part(src.shape(), at);
            let (src, dphi) = (src.head(at.0, at.1), &dphi[from..]);
            b.call(ChainHead { map, src, dphi, stride, dst: dst.head_mut(at.0, at.1) });
        }
    }
}

struct ChainHead<'a, E> {
    map: FeatureMap,
    src: View<'a, E, 2>,
    dphi: &'a [f32],
    stride: usize,
    dst: ViewMut<'a, E, 2>,
}

impl<B: Backend, E: Element> Kernel<B> for ChainHead<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let rows = [0, self.src.shape()[0]];
        chain_rows(b, self.map, self.src, rows, self.dphi, self.stride, &mut self.dst);
    }
}

/// Rows as `f32`, each followed by `more` ones.
#[derive(Debug)]
pub struct Widen<'a, E> {
    /// Rows.
    pub src: View<'a, E, 4>,
    /// Number of ones.
    pub more: usize,
    /// Where the result goes.
    pub dst: &'a mut [f32],
}

impl<E: Element> Task for Widen<'_, E> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        b.call(self);
    }
}

impl<B: Backend, E: Element> Kernel<B> for Widen<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let width = self.src.shape()[3];
        let rows = self.dst.chunks_exact_mut((width + self.more).max(1));
        for (at, dst) in each_row(self.src.shape()).zip(rows) {
            if width > 0 {
                E::widen(b.convert(), self.src.row(at), &mut dst[..width]);
            }
            dst[width..].fill(1.0);
        }
    }
}

/// The gradients of numerators and denominator from that of the quotient.
#[derive(Debug)]
pub struct Divide<'a, E> {
    /// `[num | den]`; not looked at without a denominator.
    pub out: &'a [f32],
    /// Gradient of the quotient.
    pub dout: View<'a, E, 4>,
    /// What is added to the denominator, if there is one.
    pub eps: Option<f32>,
    /// Where the result goes.
    pub dst: &'a mut [f32],
}

impl<E: Element> Task for Divide<'_, E> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        b.call(self);
    }
}

impl<B: Backend, E: Element> Kernel<B> for Divide<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let (l, values) = (b.lanes(), self.dout.shape()[3]);
        let wide = (values + usize::from(self.eps.is_some())).max(1);
        let rows = self.dst.chunks_exact_mut(wide).zip(self.out.chunks_exact(wide));
        for (at, (dst, out)) in each_row(self.dout.shape()).zip(rows) {
            if values > 0 {
                E::widen(b.convert(), self.dout.row(at), &mut dst[..values]);
            }
            let Some(eps) = self.eps else { continue };
            let (num, den) = (&out[..values], out[values] + eps);
            let (d, last) = dst.split_at_mut(values);
            let inverse = 1.0 / den;
            scale_row(l, d, inverse);
            last[0] = -l.sum(partial_dot(l, d, num)) * inverse;
        }
    }
}

/// The first columns of rows of `wide` floats.
#[derive(Debug)]
pub struct Narrow<'a, E> {
    /// Rows.
    pub src: &'a [f32],
    /// Floats of a row of `src`.
    pub wide: usize,
    /// Where the result goes.
    pub dst: ViewMut<'a, E, 4>,
}

impl<E: Element> Task for Narrow<'_, E> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        b.call(self);
    }
}

impl<B: Backend, E: Element> Kernel<B> for Narrow<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let shape = self.dst.shape();
        if shape[3] == 0 {
            return;
        }
        for (at, src) in each_row(shape).zip(self.src.chunks_exact(self.wide.max(1))) {
            E::narrow(b.convert(), &src[..shape[3]], self.dst.row_mut(at));
        }
    }
}
