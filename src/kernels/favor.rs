//! Random features of Performer: rows of queries and keys times a projection, then an exponential or a ReLU.
//!
//! With `u = x W^T` for a projection `W` (`m x dk`) that the scale of the data is multiplied into:
//!
//! ```text
//! softmax:  phi_r = m^-1/2 (exp(u_r - h |x|^2 - c) + eps)      c: largest u of the row (queries), or given (keys)
//! relu:     phi_r = max(u_r, 0) + eps
//! ```

use super::feature_map::{Features, MOST, Side};
use super::gemm::rows;
use super::softmax::row_max;
use super::staging::{partial_dot, stage};
use super::store::{Keep, Store};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Kernel, Lanes, Product, Source, Term, Tiles, math};
use crate::tensor::{Element, View, ViewMut};

/// Up to this many rows, the projection is read as it was packed once, by the engine for plain operands.
const FEW: usize = 8;

/// Products are summed over so many inputs at a time, which nearly halves the error of the exponents: an exponential
/// turns absolute errors into relative ones.
const PART: usize = 32;

/// What follows the projection.
#[derive(Clone, Copy, Debug)]
pub enum Favor {
    /// Positive features of the exponential.
    Softmax {
        /// Added to the exponential.
        eps: f32,
        /// `h`, half of the squared scale of the data.
        half: f32,
        /// `m^-1/2`
        norm: f32,
    },
    /// Features of a generalised kernel.
    Relu {
        /// Added to the ReLU.
        eps: f32,
    },
}

/// What exponents of keys are lowered by.
#[derive(Clone, Copy, Debug)]
pub enum Stabiliser<'a> {
    /// This number.
    Fixed(f32),
    /// One per batch row and head, `[batch, heads]`.
    Heads(View<'a, f32, 2>),
}

/// Random features.
#[derive(Clone, Copy, Debug)]
pub struct RandomFeatures<'a> {
    /// `W`, row-major `[m, dk]`.
    pub projection: &'a [f32],
    /// `W^T` in panels of `f32`.
    pub panels: &'a [f32],
    /// `m`
    pub features: usize,
    /// What follows the projection.
    pub favor: Favor,
    /// `c` of keys.
    pub stabiliser: Stabiliser<'a>,
}

type ScoreElem<B> = <<B as Backend>::S as Tiles>::Elem;

/// Buffers of one thread.
pub struct FavorWork<'w, B: Backend> {
    /// The projection as the engine wants it, if it was asked for.
    right: &'w mut [ScoreElem<B>],
    ready: bool,
    left: &'w mut [ScoreElem<B>],
    staged: &'w mut [f32],
    session: <B::S as Tiles>::Session,
}

impl<B: Backend> core::fmt::Debug for FavorWork<'_, B> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("FavorWork").finish_non_exhaustive()
    }
}

impl RandomFeatures<'_> {
    /// `u` of some rows, and their elements as `f32` with the distance between them.
    #[inline(always)]
    fn project<'s, B: Backend, E: Element>(
        &self,
        b: B,
        work: &'s mut FavorWork<'_, B>,
        src: View<'s, E, 2>,
        [at, m]: [usize; 2],
        dst: &mut [f32],
        stride: usize,
    ) -> (&'s [f32], usize) {
        let (dk, n) = (src.shape()[1], self.features);
        let (data, distance) = stage(b, src, [at, m], work.staged);
        let x = View::with_strides(data, [m, dk], [distance, 1]).expect("staged rows");
        let out = ViewMut::with_strides(dst, [m, n], [stride, 1]).expect("room for features");
        let (t, mut store) = (b.scores(), Store::new(out));
        if m > FEW && !work.ready {
            t.pack_right(b, Source::Columns(self.projection, dk), dk, n, work.right);
            work.ready = true;
        }
        for from in (0..dk).step_by(PART) {
            let k = PART.min(dk - from);
            let left = rows(x.slice(1, from, from + k));
            if m <= FEW {
                let right = B::F::right(self.panels, dk).rows(from);
                let session = b.plain().session();
                let product = product([m, n], Term { left, right, k });
                b.plain().product(b, &session, &product, &mut store);
            } else {
                let left = t.pack_left(b, left, None, m, k, work.left);
                let right = B::S::right(work.right, dk).rows(from);
                t.product(b, &work.session, &product([m, n], Term { left, right, k }), &mut store);
            }
            store.keep = Keep::All;
        }
        (data, distance)
    }
}

fn product<E>([m, n]: [usize; 2], term: Term<'_, E>) -> Product<'_, E> {
    Product { m, n, first: None, second: Some(term), causal: false, lower: false }
}

impl Features for RandomFeatures<'_> {
    type Work<'w, B: Backend> = FavorWork<'w, B>;

    fn width(&self, _: usize) -> usize {
        self.features
    }

    fn bytes<B: Backend>(&self, inputs: usize) -> usize {
        bytes_of::<ScoreElem<B>>(B::S::right_len(inputs, self.features))
            + bytes_of::<ScoreElem<B>>(B::S::left_len(MOST, PART))
            + bytes_of::<f32>(MOST * inputs)
    }

    fn work<'w, B: Backend>(&self, b: B, inputs: usize, cut: &mut Cut<'w>) -> FavorWork<'w, B> {
        FavorWork {
            right: cut.take(B::S::right_len(inputs, self.features)),
            ready: false,
            left: cut.take(B::S::left_len(MOST, PART)),
            staged: cut.take(MOST * inputs),
            session: b.scores().session(),
        }
    }

    fn head(&self, batch: usize, head: usize) -> Self {
        match self.stabiliser {
            Stabiliser::Fixed(_) => *self,
            Stabiliser::Heads(all) => {
                Self { stabiliser: Stabiliser::Fixed(all.row([batch, 0])[head]), ..*self }
            }
        }
    }

    fn part(&self, axis: usize, from: usize, to: usize) -> Self {
        match self.stabiliser {
            Stabiliser::Fixed(_) => *self,
            Stabiliser::Heads(all) => {
                Self { stabiliser: Stabiliser::Heads(all.slice(axis.min(1), from, to)), ..*self }
            }
        }
    }

    #[inline(always)]
    fn rows<B: Backend, E: Element>(
        &self,
        b: B,
        work: &mut FavorWork<'_, B>,
        side: Side,
        src: View<'_, E, 2>,
        [at, m]: [usize; 2],
        dst: &mut [f32],
        stride: usize,
    ) {
        let (l, dk) = (b.lanes(), src.shape()[1]);
        let (x, distance) = self.project(b, work, src, [at, m], dst, stride);
        for r in 0..m {
            let row = &mut dst[r * stride..][..self.features];
            match self.favor {
                Favor::Softmax { eps, half, norm } => {
                    let x = &x[r * distance..][..dk];
                    let top = match (side, self.stabiliser) {
                        (Side::Key, Stabiliser::Fixed(c)) => c,
                        _ => row_max(l, row),
                    };
                    let shift = half * l.sum(partial_dot(l, x, x)) + top;
                    each(l, row, Exponential { shift, norm, floor: norm * eps });
                }
                Favor::Relu { eps } => each(l, row, Rectified(eps)),
            }
        }
    }
}

trait Map: Copy {
    fn at<L: Lanes>(self, l: L, u: L::F) -> L::F;
}

#[derive(Clone, Copy)]
struct Exponential {
    shift: f32,
    norm: f32,
    floor: f32,
}

impl Map for Exponential {
    #[inline(always)]
    fn at<L: Lanes>(self, l: L, u: L::F) -> L::F {
        let e = math::exp(l, l.sub(u, l.splat(self.shift)));
        l.mul_add(e, l.splat(self.norm), l.splat(self.floor))
    }
}

#[derive(Clone, Copy)]
struct Rectified(f32);

impl Map for Rectified {
    #[inline(always)]
    fn at<L: Lanes>(self, l: L, u: L::F) -> L::F {
        l.add(l.select(l.lt(u, l.zero()), l.zero(), u), l.splat(self.0))
    }
}

#[inline(always)]
fn each<L: Lanes>(l: L, row: &mut [f32], f: impl Map) {
    let (full, tail) = l.split_mut(row);
    // Two at a time, so that one exponential does not wait for the other.
    let (pairs, rest) = full.as_chunks_mut::<2>();
    for [a, b] in pairs {
        (*a, *b) = (f.at(l, *a), f.at(l, *b));
    }
    for x in rest {
        *x = f.at(l, *x);
    }
    let x = f.at(l, l.load_head(tail));
    l.store_head(tail, x);
}

/// The largest `u` of some rows of keys.
#[derive(Debug)]
pub struct Largest<'a, 'w, B: Backend, E> {
    /// The features.
    pub map: RandomFeatures<'a>,
    /// Buffers.
    pub work: &'a mut FavorWork<'w, B>,
    /// `[n, dk]`
    pub k: View<'a, E, 2>,
    /// First row and number of rows, at most [`MOST`].
    pub rows: [usize; 2],
    /// [`MOST`] times `m`.
    pub room: &'a mut [f32],
}

impl<B: Backend, E: Element> Kernel<B> for Largest<'_, '_, B, E> {
    type Output = f32;
    #[inline(always)]
    fn run(self, b: B) -> f32 {
        let (l, n) = (b.lanes(), self.map.features);
        self.map.project(b, self.work, self.k, self.rows, self.room, n);
        row_max(l, &self.room[..self.rows[1] * n])
    }
}
