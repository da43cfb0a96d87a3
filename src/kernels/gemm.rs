//! Matrix products: `out = epilogue(left (m x k) * right (k x n))`.
//!
//! The right operand comes packed in panels (weights, packed once) or is packed into scratch on the way.
//! The shared dimension is cut into blocks of `KC` and the rows into blocks of `MC`, which fit the second
//! cache level together with a panel. Deep blocks beat ones that fit the first level: the tile loop reads a panel
//! in order, and every block costs one more pass over the output.

use super::store::{Keep, Store};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{
    Backend, Kernel, Lanes, Left, Order, PANEL, Product, Right, Sink, Source, Term, Tiles,
    right_len,
};
use crate::tensor::ViewMut;

/// Depth of a block: a panel block of `KC x PANEL` floats takes 128 KiB.
const KC: usize = 1024;
/// Rows of a block of full depth: `MC x KC` floats take 480 KiB.
const MC: usize = 120;
/// Up to this many rows the left operand fits the first cache level at any depth, and a right operand is read
/// front to back exactly once: no blocking in depth.
const SKINNY: usize = 16;
/// A right operand of at most this many floats, without gaps between its rows, is read where it lies.
const IN_PLACE: usize = 6 * 1024;

/// A product whose right operand is packed already.
#[derive(Debug)]
pub struct Gemm<'a, E> {
    /// Rows.
    pub m: usize,
    /// Shared dimension.
    pub k: usize,
    /// Columns.
    pub n: usize,
    /// `m x k`
    pub left: Left<'a, f32>,
    /// `k x n`, in panels.
    pub right: Right<'a, E>,
    /// Where the result goes, and what is done to it.
    pub store: Store<'a>,
}

/// Scratch bytes of [`gemm`].
#[must_use]
pub fn gemm_bytes<B: Backend>(m: usize, k: usize) -> usize {
    let (mc, kc) = block(m, k);
    bytes_of::<<B::T as Tiles>::Elem>(<B::T as Tiles>::left_len(mc, kc))
}

/// Scratch bytes of [`matmul`].
#[must_use]
pub fn matmul_bytes<B: Backend>(m: usize, k: usize, n: usize) -> usize {
    gemm_bytes::<B>(m, k) + bytes_of::<<B::T as Tiles>::Elem>(right_len(k, n))
}

/// Rows and depth of a block.
fn block(m: usize, k: usize) -> (usize, usize) {
    if m <= SKINNY {
        return (m, k);
    }
    let depth = KC.min(k).max(1);
    (m.min(MC * KC / depth / MC * MC), depth)
}

/// One block of the product, entered as one kernel.
struct Block<'a, 'b, E> {
    m: usize,
    k: usize,
    n: usize,
    left: Left<'a, f32>,
    right: Right<'a, E>,
    store: &'b mut Store<'a>,
    buffer: &'b mut [E],
    /// First row of the block in the output.
    row: usize,
}

/// Shifts rows and columns on the way to a [`Store`].
struct Shifted<'a, 'b> {
    store: &'b mut Store<'a>,
    row: usize,
    column: usize,
}

impl<L: Lanes> Sink<L> for Shifted<'_, '_> {
    #[inline(always)]
    fn put<const V: usize>(&mut self, l: L, i: usize, j: usize, width: usize, acc: &[L::F; V]) {
        self.store.put(l, self.row + i, self.column + j, width, acc);
    }

    #[inline(always)]
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        width: usize,
        acc: &[[L::F; V]; M],
    ) {
        self.store.put_tile(l, self.row + i, self.column + j, width, acc);
    }
}

impl<B: Backend> Kernel<B> for Block<'_, '_, <B::T as Tiles>::Elem> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let left = b.tiles().pack_left(b.lanes(), self.left, self.m, self.k, self.buffer);
        let second = Some(Term { left, right: self.right, k: self.k });
        let product =
            Product { m: self.m, n: self.n, first: None, second, causal: false, lower: false };
        let mut sink = Shifted { store: self.store, row: self.row, column: 0 };
        b.tiles().product(b, &product, &mut sink);
    }
}

/// `store <- left * right`. Reads `right` once if `m` is at most 16. `2 m k n` flops.
pub fn gemm<B: Backend>(b: B, g: Gemm<'_, <B::T as Tiles>::Elem>, scratch: &mut Cut<'_>) {
    let Gemm { m, k, n, left, right, mut store } = g;
    let (height, depth) = block(m, k);
    let buffer = scratch.take::<<B::T as Tiles>::Elem>(<B::T as Tiles>::left_len(height, depth));
    if m == 0 || n == 0 {
        return;
    }
    let (bias, scale, first) = (store.bias, store.scale, store.keep);
    let mut p = 0;
    loop {
        let kc = depth.min(k - p);
        let last = p + kc == k;
        store.keep = if p == 0 { first } else { Keep::All };
        store.bias = if last { bias } else { None };
        store.scale = scale;
        for row in (0..m).step_by(height) {
            let mc = height.min(m - row);
            b.call(Block {
                m: mc,
                k: kc,
                n,
                left: block_of(left, row, p),
                right: Right { data: right.data.get(p * right.stride..).unwrap_or(&[]), ..right },
                store: &mut store,
                buffer: &mut *buffer,
                row,
            });
        }
        p += kc;
        if last {
            break;
        }
    }
}

/// The left operand from row `i` and column `p` on.
fn block_of(left: Left<'_, f32>, i: usize, p: usize) -> Left<'_, f32> {
    let at = match left.order {
        Order::Rows(s) => i * s + p,
        Order::Columns(s) => p * s + i,
    };
    Left { data: left.data.get(at..).unwrap_or(&[]), ..left }
}

/// Packs a right operand, entered as one kernel.
#[derive(Debug)]
pub struct Pack<'a, E> {
    /// Where it comes from.
    pub src: Source<'a>,
    /// Rows.
    pub k: usize,
    /// Columns.
    pub n: usize,
    /// At least [`right_len`] elements.
    pub dst: &'a mut [E],
}

impl<B: Backend> Kernel<B> for Pack<'_, <B::T as Tiles>::Elem> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        b.tiles().pack_right(b.lanes(), self.src, self.k, self.n, self.dst);
    }
}

/// A product of one block whose right operand is packed panel by panel, each used while it is in the first cache
/// level.
struct Strips<'a, E> {
    m: usize,
    k: usize,
    n: usize,
    left: Left<'a, f32>,
    right: Source<'a>,
    store: Store<'a>,
    buffer: &'a mut [E],
    panel: &'a mut [E],
}

impl<B: Backend> Kernel<B> for Strips<'_, <B::T as Tiles>::Elem> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Strips { m, k, n, left, right, mut store, buffer, panel } = self;
        let (l, t) = (b.lanes(), b.tiles());
        let left = t.pack_left(l, left, m, k, buffer);
        for column in (0..n).step_by(PANEL) {
            let width = PANEL.min(n - column);
            t.pack_right(l, right.columns(column), k, width, panel);
            let second = Some(Term { left, right: Right::packed(panel, k), k });
            let product = Product { m, n: width, first: None, second, causal: false, lower: false };
            t.product(b, &product, &mut Shifted { store: &mut store, row: 0, column });
        }
    }
}

/// As [`gemm`] with a right operand that is packed on the way, or read in place where that is faster.
pub fn matmul<B: Backend>(
    b: B,
    [m, k, n]: [usize; 3],
    left: Left<'_, f32>,
    right: Source<'_>,
    store: Store<'_>,
    scratch: &mut Cut<'_>,
) {
    let packed = scratch.take::<<B::T as Tiles>::Elem>(right_len(k, n));
    let right = match in_place::<B>(right, k, n) {
        Some(right) => right,
        None if k > 0 && block(m, k) == (m, k) => {
            let buffer = scratch.take(<B::T as Tiles>::left_len(m, k));
            let panel = &mut packed[..right_len(k, n.min(PANEL))];
            return b.call(Strips { m, k, n, left, right, store, buffer, panel });
        }
        None => {
            b.call(Pack { src: right, k, n, dst: &mut *packed });
            Right::packed(packed, k)
        }
    };
    gemm(b, Gemm { m, k, n, left, right, store }, scratch);
}

/// The operand where it lies, if its engine reads `f32` and the whole of it fits the first cache level.
fn in_place<'a, B: Backend>(
    src: Source<'a>,
    k: usize,
    n: usize,
) -> Option<Right<'a, <B::T as Tiles>::Elem>> {
    match src {
        Source::Rows(data, stride)
            if stride == n && n.is_multiple_of(PANEL) && k * n <= IN_PLACE =>
        {
            let data = bytemuck::try_cast_slice(data).ok()?;
            let same = size_of::<<B::T as Tiles>::Elem>() == size_of::<f32>();
            same.then_some(Right { data, step: PANEL, stride })
        }
        _ => None,
    }
}

/// A matrix view as the left operand.
pub fn rows<'a>(view: crate::tensor::View<'a, f32, 2>) -> Left<'a, f32> {
    let (data, stride) = view.parts();
    Left { data, order: Order::Rows(stride) }
}

/// The whole of a contiguous buffer as an output matrix. Panics if it is not `m x n`.
pub fn output(data: &mut [f32], m: usize, n: usize) -> ViewMut<'_, f32, 2> {
    ViewMut::new(data, [m, n]).expect("an m x n buffer")
}
