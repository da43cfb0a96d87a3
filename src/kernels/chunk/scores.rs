//! The scores of a chunk: everything that does not depend on values.

use super::{Head, Workspace};
use crate::kernels::ahead::{Ahead, Meanwhile};
use crate::kernels::decay::Decay;
use crate::kernels::store::fill_tile;
use crate::simd::{Backend, Kernel, Lanes, Left, Order, Product, Sink, Source, Term, Tiles};
use crate::tensor::Element;

/// `P = scale * (Q K^T) o M` of one chunk.
#[derive(Debug)]
pub struct Scores<'a, 'w, B: Backend, E> {
    /// The head.
    pub head: Head<'w, E>,
    /// First row.
    pub at: usize,
    /// Number of rows.
    pub rows: usize,
    /// Buffers.
    pub work: &'w mut Workspace<'a, B>,
    /// `rows x rows` with rows [`ChunkShape::score_stride`](super::ChunkShape::score_stride) apart.
    pub scores: &'w mut [f32],
    /// Distance between rows.
    pub stride: usize,
    /// What is needed next.
    pub ahead: &'w mut Ahead,
}

struct Masked<'a> {
    scores: &'a mut [f32],
    stride: usize,
    decay: Decay<'a>,
    scale: f32,
}

impl<L: Lanes> Sink<L> for Masked<'_> {
    #[inline(always)]
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        _: usize,
        acc: &[[L::F; V]; M],
    ) {
        let (decay, scale) = (self.decay, l.splat(self.scale));
        fill_tile::<L, M, V>(
            l,
            self.scores,
            [i * self.stride + j, self.stride],
            #[inline(always)]
            |r, v| {
                let m = l.load(&decay.mask(i + r, j)[v * L::N..]);
                // Selected, not multiplied: what lies above the diagonal may be anything.
                l.select(l.lt(l.zero(), m), l.mul(l.mul(acc[r][v], scale), m), l.zero())
            },
        );
    }
}

impl<B: Backend, E: Element> Kernel<B> for Scores<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Scores { head, at, rows: m, work, scores, stride, ahead } = self;
        let (t, dk) = (b.tiles(), head.q.shape()[1]);
        let ((q, qs), (k, ks)) =
            (head.q.slice(0, at, at + m).parts(), head.k.slice(0, at, at + m).parts());
        t.pack_right(b, Source::Columns(k, ks), dk, m, work.keys);
        let left = t.pack_left(b, Left::new(q, Order::Rows(qs)), None, m, dk, work.left_q);
        let product = Product {
            m,
            n: m,
            first: None,
            second: Some(Term { left, right: B::T::right(work.keys, dk), k: dk }),
            causal: false,
            lower: true,
        };
        t.product(
            b,
            &work.session,
            &product,
            &mut Meanwhile {
                sink: Masked { scores, stride, decay: head.decay, scale: head.scale },
                ahead,
            },
        );
    }
}
