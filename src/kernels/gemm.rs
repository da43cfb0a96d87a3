//! Matrix products: `out = epilogue(left (m x k) * right (k x n))`.
//!
//! The right operand comes packed in panels (weights, packed once) or is packed into scratch on the way.
//! The shared dimension is cut into blocks of the engine's depth and the rows into blocks of its height, which fit
//! the second cache level together with a panel. Deep blocks beat ones that fit the first level: the tile loop reads a panel
//! in order, and every block costs one more pass over the output.

use super::store::{Keep, Store};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{
    Backend, Kernel, Lanes, Left, Order, PANEL, Product, Right, Sink, Source, Storage, Term, Tiles,
};
use crate::tensor::{View, ViewMut};

/// Up to this many rows the left operand fits the first cache level at any depth, and a right operand is read
/// front to back exactly once: no blocking in depth.
const SKINNY: usize = 16;
/// A right operand of at most this many floats, without gaps between its rows, is read where it lies.
const IN_PLACE: usize = 6 * 1024;

/// A product whose right operand is packed already.
#[derive(Debug)]
pub struct Gemm<'a, S, E> {
    /// Rows.
    pub m: usize,
    /// Shared dimension.
    pub k: usize,
    /// Columns.
    pub n: usize,
    /// `m x k`
    pub left: Left<'a, S>,
    /// `k x n`, in panels.
    pub right: Right<'a, E>,
    /// Where the result goes, and what is done to it.
    pub store: Store<'a>,
}

/// Scratch bytes of [`gemm`]. Never less for more rows.
#[must_use]
pub fn gemm_bytes<T: Tiles>(m: usize, k: usize) -> usize {
    let (mc, kc) = block::<T>(m, k);
    bytes_of::<T::Elem>(T::left_len(mc, kc).max(T::left_len(m.min(SKINNY), k)))
}

/// Scratch bytes of [`matmul`].
#[must_use]
pub fn matmul_bytes<T: Tiles>(m: usize, k: usize, n: usize) -> usize {
    gemm_bytes::<T>(m, k) + bytes_of::<T::Elem>(T::right_len(k, n))
}

/// Rows and depth of a block.
fn block<T: Tiles>(m: usize, k: usize) -> (usize, usize) {
    if m <= SKINNY {
        return (m, k);
    }
    let depth = T::DEPTH.min(k).max(1);
    // Shallow blocks may be higher.
    (m.min(T::HEIGHT * (T::DEPTH / depth)), depth)
}

/// One block of the product, entered as one kernel.
struct Block<'a, 'b, S, T: Tiles> {
    tiles: T,
    m: usize,
    k: usize,
    n: usize,
    left: Left<'a, S>,
    right: Right<'a, T::Elem>,
    store: &'b mut Store<'a>,
    buffer: &'b mut [T::Elem],
    session: &'b T::Session,
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

impl<B: Backend, S: Storage, T: Tiles<L = B::L>> Kernel<B> for Block<'_, '_, S, T> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let left = self.tiles.pack_left(b, self.left, None, self.m, self.k, self.buffer);
        let second = Some(Term { left, right: self.right, k: self.k });
        let product =
            Product { m: self.m, n: self.n, first: None, second, causal: false, lower: false };
        let mut sink = Shifted { store: self.store, row: self.row, column: 0 };
        self.tiles.product(b, self.session, &product, &mut sink);
    }
}

/// `store <- left * right`. Reads `right` once if `m` is at most 16. `2 m k n` flops.
pub fn gemm<B: Backend, S: Storage, T: Tiles<L = B::L>>(
    b: B,
    tiles: T,
    g: Gemm<'_, S, T::Elem>,
    scratch: &mut Cut<'_>,
) {
    let Gemm { m, k, n, left, right, mut store } = g;
    let (height, depth) = block::<T>(m, k);
    let buffer = scratch.take::<T::Elem>(T::left_len(height, depth));
    if m == 0 || n == 0 {
        return;
    }
    let session = &tiles.session();
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
                tiles,
                m: mc,
                k: kc,
                n,
                left: block_of(left, row, p),
                right: right.rows(p),
                store: &mut store,
                buffer: &mut *buffer,
                session,
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
fn block_of<S>(left: Left<'_, S>, i: usize, p: usize) -> Left<'_, S> {
    let at = match left.order {
        Order::Rows(s) => i * s + p,
        Order::Columns(s) => p * s + i,
    };
    Left { data: left.data.get(at..).unwrap_or(&[]), ..left }
}

/// Packs a right operand, entered as one kernel.
#[derive(Debug)]
pub struct Pack<'a, S, T: Tiles> {
    /// The engine that will read it.
    pub tiles: T,
    /// Where it comes from.
    pub src: Source<'a, S>,
    /// Rows.
    pub k: usize,
    /// Columns.
    pub n: usize,
    /// At least [`Tiles::right_len`] elements.
    pub dst: &'a mut [T::Elem],
}

impl<B: Backend, S: Storage, T: Tiles<L = B::L>> Kernel<B> for Pack<'_, S, T> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        self.tiles.pack_right(b, self.src, self.k, self.n, self.dst);
    }
}

/// A product of one block whose right operand is packed panel by panel, each used while it is in the first cache
/// level.
struct Strips<'a, S, T: Tiles> {
    tiles: T,
    m: usize,
    k: usize,
    n: usize,
    left: Left<'a, S>,
    right: Source<'a, S>,
    store: Store<'a>,
    buffer: &'a mut [T::Elem],
    panel: &'a mut [T::Elem],
}

impl<B: Backend, S: Storage, T: Tiles<L = B::L>> Kernel<B> for Strips<'_, S, T> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Strips { tiles: t, m, k, n, left, right, mut store, buffer, panel } = self;
        let (session, left) = (&t.session(), t.pack_left(b, left, None, m, k, buffer));
        for column in (0..n).step_by(PANEL) {
            let width = PANEL.min(n - column);
            t.pack_right(b, right.columns(column), k, width, panel);
            let second = Some(Term { left, right: T::right(panel, k), k });
            let product = Product { m, n: width, first: None, second, causal: false, lower: false };
            t.product(b, session, &product, &mut Shifted { store: &mut store, row: 0, column });
        }
    }
}

/// As [`gemm`] with a right operand that is packed on the way, or read in place where that is faster.
pub fn matmul<B: Backend, S: Storage, T: Tiles<L = B::L>>(
    b: B,
    tiles: T,
    [m, k, n]: [usize; 3],
    left: Left<'_, S>,
    right: Source<'_, S>,
    store: Store<'_>,
    scratch: &mut Cut<'_>,
) {
    let packed = scratch.take::<T::Elem>(T::right_len(k, n));
    let right = match in_place::<S, T>(right, k, n) {
        Some(right) => right,
        None if k > 0 && block::<T>(m, k) == (m, k) => {
            let buffer = scratch.take(T::left_len(m, k));
            let panel = &mut packed[..T::right_len(k, n.min(PANEL))];
            return b.call(Strips { tiles, m, k, n, left, right, store, buffer, panel });
        }
        None => {
            b.call(Pack { tiles, src: right, k, n, dst: &mut *packed });
            T::right(packed, k)
        }
    };
    gemm(b, tiles, Gemm { m, k, n, left, right, store }, scratch);
}

/// The operand where it lies, if its engine reads `f32` and the whole of it fits the first cache level.
fn in_place<S: Storage, T: Tiles>(
    src: Source<'_, S>,
    k: usize,
    n: usize,
) -> Option<Right<'_, T::Elem>> {
    match src {
        Source::Rows(data, stride)
            if stride == n && n.is_multiple_of(PANEL) && k * n <= IN_PLACE =>
        {
            let same = size_of::<T::Elem>() == size_of::<f32>();
            let data = bytemuck::try_cast_slice(S::as_f32(data)?).ok()?;
            same.then_some(Right { data, step: PANEL, stride, plane: 0 })
        }
        _ => None,
    }
}

/// A matrix view as the left operand.
pub fn rows<'a, S: Storage>(view: View<'a, S, 2>) -> Left<'a, S> {
    let (data, stride) = view.parts();
    Left::new(data, Order::Rows(stride))
}

/// The whole of a contiguous buffer as an output matrix. Panics if it is not `m x n`.
pub fn output(data: &mut [f32], m: usize, n: usize) -> ViewMut<'_, f32, 2> {
    ViewMut::new(data, [m, n]).expect("an m x n buffer")
}
