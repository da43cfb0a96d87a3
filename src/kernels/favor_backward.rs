//! Backward pass of the random features of Performer.
//!
//! With `u = x W^T` as [`favor`](super::favor) has it and `D` the gradient of the features:
//!
//! ```text
//! softmax:  g_r = D_r m^-1/2 exp(u_r - h |x|^2 - c)      dx = g W - 2 h x sum_r g_r      c taken as constant
//! relu:     g_r = D_r [u_r > 0]                          dx = g W
//! ```

use super::favor::{Favor, FavorWork, RandomFeatures};
use super::feature_map::{Features, MOST, Side};
use super::gemm::rows;
use super::store::Store;
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Kernel, Lanes, Product, Source, Term, Tiles};
use crate::tensor::{Element, View, ViewMut};

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;

/// Buffers of one thread.
pub struct FavorBackWork<'w, B: Backend> {
    features: FavorWork<'w, B>,
    /// `W` as the engine wants it, if it was asked for.
    right: &'w mut [Elem<B>],
    ready: bool,
    left: &'w mut [Elem<B>],
    /// `[MOST, m]`
    phi: &'w mut [f32],
    /// `[MOST, dk]`
    out: &'w mut [f32],
    /// `[MOST]`
    totals: &'w mut [f32],
    /// `[dk]`
    row: &'w mut [f32],
    session: <B::T as Tiles>::Session,
}

impl<B: Backend> core::fmt::Debug for FavorBackWork<'_, B> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("FavorBackWork").finish_non_exhaustive()
    }
}

impl<'w, B: Backend> FavorBackWork<'w, B> {
    /// Bytes for inputs of a width.
    #[must_use]
    pub fn bytes(map: &RandomFeatures<'_>, inputs: usize) -> usize {
        let m = map.features;
        let floats = [MOST * m, MOST * inputs, MOST, inputs].map(bytes_of::<f32>);
        map.bytes::<B>(inputs)
            + bytes_of::<Elem<B>>(B::T::right_len(m, inputs))
            + bytes_of::<Elem<B>>(B::T::left_len(MOST, m))
            + floats.iter().sum::<usize>()
    }

    /// Cut off scratch.
    pub fn new(b: B, map: &RandomFeatures<'_>, inputs: usize, cut: &mut Cut<'w>) -> Self {
        let m = map.features;
        Self {
            features: map.work(b, inputs, cut),
            right: cut.take(B::T::right_len(m, inputs)),
            ready: false,
            left: cut.take(B::T::left_len(MOST, m)),
            phi: cut.take(MOST * m),
            out: cut.take(MOST * inputs),
            totals: cut.take(MOST),
            row: cut.take(inputs),
            session: b.tiles().session(),
        }
    }
}

/// Features of rows `at .. at + rows` of one head, at most [`MOST`].
#[derive(Debug)]
pub struct FavorRows<'a, 'w, B: Backend, E> {
    /// The features of the head.
    pub map: RandomFeatures<'a>,
    /// Buffers.
    pub work: &'a mut FavorWork<'w, B>,
    /// Which side of the product the rows stand on.
    pub side: Side,
    /// `[n, dk]`
    pub x: View<'a, E, 2>,
    /// First row and number of rows.
    pub rows: [usize; 2],
    /// `[rows, m]`, written.
    pub dst: &'a mut [f32],
}

impl<B: Backend, E: Element> Kernel<B> for FavorRows<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Self { map, work, side, x, rows, dst } = self;
        map.rows(b, work, side, x, rows, dst, map.features);
    }
}

/// Gradients of rows `at .. at + rows` of one head, at most [`MOST`].
#[derive(Debug)]
pub struct FavorBackward<'a, 'w, B: Backend, E> {
    /// The features of the head.
    pub map: RandomFeatures<'a>,
    /// Buffers.
    pub work: &'a mut FavorBackWork<'w, B>,
    /// Which side of the product the rows stand on.
    pub side: Side,
    /// `[n, dk]`
    pub x: View<'a, E, 2>,
    /// First row and number of rows.
    pub rows: [usize; 2],
    /// Gradients of the features of all rows, `[1, 1, n, m]`.
    pub dphi: View<'a, f32, 4>,
    /// `[n, dk]`, the rows written.
    pub dx: ViewMut<'a, E, 2>,
}

impl<B: Backend, E: Element> Kernel<B> for FavorBackward<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let (l, m, [at, count]) = (b.lanes(), self.map.features, self.rows);
        let (dk, work) = (self.x.shape()[1], self.work);
        // Without what is added to them, features are the derivatives that are wanted.
        let favor = match self.map.favor {
            Favor::Softmax { half, norm, .. } => Favor::Softmax { eps: 0.0, half, norm },
            Favor::Relu { .. } => Favor::Relu { eps: 0.0 },
        };
        let map = RandomFeatures { favor, ..self.map };
        map.rows(b, &mut work.features, self.side, self.x, self.rows, work.phi, m);
        let of_rows = work.phi.chunks_exact_mut(m).zip(&mut work.totals[..count]);
        for (r, (phi, total)) in of_rows.enumerate() {
            *total = gradients(l, favor, phi, self.dphi.row([0, 0, at + r, 0]));
        }
        let t = b.tiles();
        if !work.ready {
            t.pack_right(b, Source::Rows(map.projection, dk), m, dk, work.right);
            work.ready = true;
        }
        let left = rows(View::new(&work.phi[..count * m], [count, m]).expect("rows"));
        let left = t.pack_left(b, left, None, count, m, work.left);
        let second = Some(Term { left, right: B::T::right(work.right, m), k: m });
        let product = Product { m: count, n: dk, first: None, second, causal: false, lower: false };
        let to = ViewMut::new(&mut work.out[..count * dk], [count, dk]).expect("rows");
        t.product(b, &work.session, &product, &mut Store::new(to));
        for (r, out) in work.out[..count * dk].chunks_exact_mut(dk).enumerate() {
            if let Favor::Softmax { half, .. } = favor {
                E::widen(b.convert(), self.x.row([at + r, 0]), work.row);
                let pull = l.splat(2.0 * half * work.totals[r]);
                for (out, x) in out.chunks_mut(B::L::N).zip(work.row.chunks(B::L::N)) {
                    l.store_head(out, l.neg_mul_add(l.load_head(x), pull, l.load_head(out)));
                }
            }
            E::narrow(b.convert(), out, self.dx.row_mut([at + r, 0]));
        }
    }
}

/// `g` in place of the features, and its sum.
#[inline(always)]
fn gradients<L: Lanes>(l: L, favor: Favor, phi: &mut [f32], dphi: &[f32]) -> f32 {
    let mut total = l.zero();
    for (phi, dphi) in phi.chunks_mut(L::N).zip(dphi.chunks(L::N)) {
        let (x, d) = (l.load_head(phi), l.load_head(dphi));
        let g = match favor {
            Favor::Softmax { .. } => l.mul(x, d),
            Favor::Relu { .. } => l.select(l.le(x, l.zero()), l.zero(), d),
        };
        total = l.add(total, g);
        l.store_head(phi, g);
    }
    l.sum(total)
}
