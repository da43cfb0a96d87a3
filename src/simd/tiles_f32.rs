//! The FMA engine: `MR x (V * N)` register tiles over plain `f32` operands.

use super::backend::{Backend, Kernel};
use super::lanes::Lanes;
use super::storage::Storage;
use super::tiles::{Left, Order, PANEL, Product, Right, Sink, Source, Term, Tiles, right_len};
use core::marker::PhantomData;

/// Register tiles of `MR` rows and `V` vectors.
#[derive(Clone, Copy, Debug)]
pub struct Fma<L, const MR: usize, const V: usize>(pub(super) PhantomData<L>);

/// Floats between copied rows, so that they do not meet in the same cache sets again.
const GAP: usize = 16;

/// The part of a [`Term`] that one tile needs, bounds already proven.
#[derive(Clone, Copy)]
struct Strip {
    a: *const f32,
    /// Distance between rows, and between steps of the shared dimension.
    rows: usize,
    steps: usize,
    b: *const f32,
    stride: usize,
    k: usize,
}

impl Strip {
    /// Nothing to add.
    const EMPTY: Strip =
        Strip { a: core::ptr::null(), rows: 0, steps: 1, b: core::ptr::null(), stride: 0, k: 0 };
}

/// The tile loop and its sink, a kernel of its own: nothing else competes for its registers.
struct Tile<'a, S, const M: usize, const W: usize> {
    first: Strip,
    scale: Option<&'a [f32]>,
    second: Strip,
    sink: &'a mut S,
    i: usize,
    j: usize,
    width: usize,
}

impl<B: Backend, S: Sink<B::L>, const M: usize, const W: usize> Kernel<B> for Tile<'_, S, M, W> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let l = b.lanes();
        let mut acc = [[l.zero(); W]; M];
        if let Some(scale) = self.scale {
            // SAFETY: `Fma::check` proved every element of both terms.
            acc = unsafe { add::<B::L, M, W>(l, self.first, acc) };
            let scale: &[f32; M] = scale.first_chunk().expect("M factors");
            for i in 0..M {
                let s = l.splat(scale[i]);
                for j in 0..W {
                    acc[i][j] = l.mul(acc[i][j], s);
                }
            }
        }
        // SAFETY: as above.
        acc = unsafe { add::<B::L, M, W>(l, self.second, acc) };
        self.sink.put_tile(l, self.i, self.j, self.width, &acc);
    }
}

/// Adds `s.k` steps to the accumulators.
///
/// # Safety
/// For `i < M`, `p < k`: `a[i * rows + p * steps]` and `b[p * stride ..][..W * N]` must be readable.
#[inline(always)]
unsafe fn add<L: Lanes, const M: usize, const W: usize>(
    l: L,
    s: Strip,
    acc: [[L::F; W]; M],
) -> [[L::F; W]; M] {
    // A unit distance known to the compiler saves half of the address arithmetic, whichever of the two it is.
    if s.steps == 1 {
        // SAFETY: as for this function.
        unsafe { steps::<L, M, W, 1>(l, Strip { steps: 1, ..s }, acc) }
    } else {
        // SAFETY: as for this function; an operand without unit steps has unit rows.
        unsafe { steps::<L, M, W, 4>(l, Strip { rows: 1, ..s }, acc) }
    }
}

/// # Safety
/// As [`add`].
#[inline(always)]
unsafe fn steps<L: Lanes, const M: usize, const W: usize, const UNROLL: usize>(
    l: L,
    s: Strip,
    mut acc: [[L::F; W]; M],
) -> [[L::F; W]; M] {
    let mut p = 0;
    while p + UNROLL <= s.k {
        for u in 0..UNROLL {
            // SAFETY: p + u < k.
            unsafe { step::<L, M, W>(l, s, p + u, &mut acc) };
        }
        p += UNROLL;
    }
    while p < s.k {
        // SAFETY: p < k.
        unsafe { step::<L, M, W>(l, s, p, &mut acc) };
        p += 1;
    }
    acc
}

/// # Safety
/// As [`add`], and `p < k`.
#[inline(always)]
unsafe fn step<L: Lanes, const M: usize, const W: usize>(
    l: L,
    s: Strip,
    p: usize,
    acc: &mut [[L::F; W]; M],
) {
    let mut b = [l.zero(); W];
    for j in 0..W {
        // SAFETY: inside row p of the panel.
        b[j] = unsafe { l.load_ptr(s.b.add(p * s.stride + j * L::N)) };
    }
    for i in 0..M {
        // SAFETY: i < M and p < k.
        let a = l.splat(unsafe { *s.a.add(i * s.rows + p * s.steps) });
        for j in 0..W {
            acc[i][j] = l.mul_add(a, b[j], acc[i][j]);
        }
    }
}

impl<L: Lanes, const MR: usize, const V: usize> Fma<L, MR, V> {
    /// One tile of `M` rows and `W` vectors at `(i, j)`.
    #[inline(always)]
    fn tile<const M: usize, const W: usize, B: Backend<L = L>, S: Sink<L>>(
        b: B,
        p: &Product<'_, f32>,
        i: usize,
        j: usize,
        sink: &mut S,
    ) {
        b.call(Tile::<S, M, W> {
            first: p.first.as_ref().map_or(Strip::EMPTY, |(t, _)| Self::strip(t, i, j, t.k)),
            scale: p.first.as_ref().map(|(_, scale)| &scale[i..]),
            second: p.second.as_ref().map_or(Strip::EMPTY, |t| {
                Self::strip(t, i, j, if p.causal { t.k.min(i + M) } else { t.k })
            }),
            sink,
            i,
            j,
            width: (p.n - j).min(W * L::N),
        });
    }

    #[inline(always)]
    fn strip(term: &Term<'_, f32>, i: usize, j: usize, k: usize) -> Strip {
        let (rows, steps) = match term.left.order {
            Order::Rows(s) => (s, 1),
            Order::Columns(s) => (1, s),
        };
        Strip {
            a: term.left.data.as_ptr().wrapping_add(i * rows),
            rows,
            steps,
            b: term.right.data.as_ptr().wrapping_add(j / PANEL * term.right.step + j % PANEL),
            stride: term.right.stride,
            k,
        }
    }

    /// All rows against one panel of `W` vectors, tails in smaller tiles instead of padding.
    #[inline(always)]
    fn panel<const W: usize, B: Backend<L = L>, S: Sink<L>>(
        b: B,
        p: &Product<'_, f32>,
        j: usize,
        sink: &mut S,
    ) {
        // In the lower triangle, rows above the panel's first column are not wanted.
        let mut i = if p.lower { j.min(p.m) / MR * MR } else { 0 };
        while i + MR <= p.m {
            if p.lower && W > 1 && i + MR <= j + L::N {
                Self::tile::<MR, 1, B, S>(b, p, i, j, sink);
            } else {
                Self::tile::<MR, W, B, S>(b, p, i, j, sink);
            }
            i += MR;
        }
        if MR > 8 && i + 8 <= p.m {
            Self::tile::<8, W, B, S>(b, p, i, j, sink);
            i += 8;
        }
        if i + 4 <= p.m {
            Self::tile::<4, W, B, S>(b, p, i, j, sink);
            i += 4;
        }
        if i + 2 <= p.m {
            Self::tile::<2, W, B, S>(b, p, i, j, sink);
            i += 2;
        }
        if i < p.m {
            Self::tile::<1, W, B, S>(b, p, i, j, sink);
        }
    }

    /// How many columns of a panel tiles read for `columns` of the result.
    fn read(columns: usize) -> usize {
        let vectors = match (columns % Self::NR).div_ceil(L::N) {
            n @ (0 | 1) => n,
            2 if V > 2 => 2,
            _ => V,
        };
        columns / Self::NR * Self::NR + vectors * L::N
    }

    /// Panics unless every element that the product will touch lies inside its operand.
    fn check(p: &Product<'_, f32>) {
        if p.m == 0 || p.n == 0 {
            return;
        }
        for t in p.first.iter().map(|f| &f.0).chain(&p.second).filter(|t| t.k > 0) {
            let reach = |n: usize, stride: usize, more: usize| {
                (n - 1).checked_mul(stride).and_then(|x| x.checked_add(more))
            };
            let left = match t.left.order {
                Order::Rows(s) => reach(p.m, s, t.k),
                Order::Columns(s) => reach(t.k, s, p.m),
            };
            let held = left.is_some_and(|end| end <= t.left.data.len());
            assert!(held, "left operand too short");
            // The last panel, and the last whole one: panels may be any distance apart.
            let (last, columns) = ((p.n - 1) / PANEL, (p.n - 1) % PANEL + 1);
            let depth = reach(t.k, t.right.stride, 0);
            let panel = |at: usize, width: usize| {
                let begin = depth.and_then(|d| at.checked_mul(t.right.step)?.checked_add(d));
                begin.and_then(|b| b.checked_add(width))
            };
            let held = |end: Option<usize>| end.is_some_and(|end| end <= t.right.data.len());
            let whole = last == 0 || held(panel(last - 1, PANEL));
            assert!(whole && held(panel(last, Self::read(columns))), "right operand too short");
        }
        assert!(p.first.is_none_or(|(_, scale)| scale.len() >= p.m), "scale too short");
    }
}

impl<L: Lanes, const MR: usize, const V: usize> Tiles for Fma<L, MR, V> {
    type L = L;
    type Elem = f32;
    type Session = ();
    const MR: usize = MR;
    const NR: usize = V * L::N;
    const DEPTH: usize = 1024;
    const HEIGHT: usize = 10 * MR;
    const CHUNK: usize = 32;
    const NAME: &'static str = "f32";

    fn session(self) {}

    fn right_len(k: usize, n: usize) -> usize {
        right_len(k, n)
    }

    fn right(data: &[f32], k: usize) -> Right<'_, f32> {
        Right { data, step: k * PANEL, stride: PANEL, plane: 0 }
    }

    #[inline(always)]
    fn pack_right<B: Backend<L = L>, E: Storage>(
        self,
        b: B,
        src: Source<'_, E>,
        k: usize,
        n: usize,
        dst: &mut [f32],
    ) {
        match src {
            Source::Rows(data, stride) => match E::as_f32(data) {
                Some(data) => pack_rows(b.lanes(), data, stride, k, n, dst),
                None => widen_rows(b, data, stride, k, n, dst),
            },
            Source::Columns(data, stride) => pack_columns(b, data, stride, k, n, dst),
        }
    }

    fn left_len(m: usize, k: usize) -> usize {
        m * (k + GAP)
    }

    fn view_len(_: usize, _: usize) -> usize {
        0
    }

    #[inline(always)]
    fn pack_left<'a, B: Backend<L = L>, E: Storage>(
        self,
        b: B,
        src: Left<'a, E>,
        weights: Option<&[f32]>,
        m: usize,
        k: usize,
        dst: &'a mut [f32],
    ) -> Left<'a, f32> {
        // Rows a multiple of 1 KiB apart meet in few sets of the first cache level: read over and over, they
        // are worth a copy.
        const MEET: usize = 256;
        let l = b.lanes();
        let meet = matches!(src.order, Order::Rows(s) if s % MEET == 0 && m > MR);
        if let (Some(data), None, false) = (E::as_f32(src.data), weights, meet) {
            return Left::new(data, src.order);
        }
        match src.order {
            Order::Columns(s) => {
                for p in 0..k {
                    let row = &mut dst[p * m..][..m];
                    copy(b, &src.data[p * s..][..m], row);
                    if let Some(w) = weights {
                        times(l, w[p], row);
                    }
                }
                Left::new(dst, Order::Columns(m))
            }
            Order::Rows(s) => {
                for i in 0..m {
                    let row = &mut dst[i * (k + GAP)..][..k];
                    copy(b, &src.data[i * s..][..k], row);
                    for (x, w) in row.iter_mut().zip(weights.unwrap_or(&[])) {
                        *x *= w;
                    }
                }
                Left::new(dst, Order::Rows(k + GAP))
            }
        }
    }

    #[inline(always)]
    fn view_right<'a, B: Backend<L = L>>(
        self,
        _: B,
        src: &'a [f32],
        k: usize,
        _: usize,
        _: &'a mut [f32],
    ) -> Right<'a, f32> {
        Self::right(src, k)
    }

    #[inline(always)]
    fn product<B: Backend<L = L>, S: Sink<L>>(
        self,
        b: B,
        (): &(),
        p: &Product<'_, f32>,
        sink: &mut S,
    ) {
        Self::check(p);
        let mut j = 0;
        while j < p.n {
            // The last panel computes only the vectors that it fills.
            match (p.n - j).div_ceil(L::N) {
                1 => Self::panel::<1, B, S>(b, p, j, sink),
                2 if V > 2 => Self::panel::<2, B, S>(b, p, j, sink),
                _ => Self::panel::<V, B, S>(b, p, j, sink),
            }
            j += Self::NR;
        }
    }
}

/// Row-major to panels: a copy in pieces of a panel's width.
#[inline(always)]
fn pack_rows<L: Lanes>(l: L, src: &[f32], stride: usize, k: usize, n: usize, dst: &mut [f32]) {
    for j in (0..n).step_by(PANEL) {
        let width = PANEL.min(n - j);
        let dst = &mut dst[j * k..][..k * PANEL];
        for (p, d) in dst.chunks_exact_mut(PANEL).enumerate() {
            let s = &src[p * stride + j..][..width];
            if width == PANEL {
                for lane in (0..PANEL).step_by(L::N) {
                    l.store(&mut d[lane..], l.load(&s[lane..]));
                }
            } else {
                for lane in (0..PANEL).step_by(L::N) {
                    l.store(&mut d[lane..], l.load_head(&s[lane.min(width)..]));
                }
            }
        }
    }
}

/// As [`pack_rows`] for elements of another type.
#[inline(always)]
fn widen_rows<B: Backend, E: Storage>(
    b: B,
    src: &[E],
    stride: usize,
    k: usize,
    n: usize,
    dst: &mut [f32],
) {
    for j in (0..n).step_by(PANEL) {
        let width = PANEL.min(n - j);
        let dst = &mut dst[j * k..][..k * PANEL];
        for (p, d) in dst.chunks_exact_mut(PANEL).enumerate() {
            let (d, rest) = d.split_at_mut(width);
            E::widen(b.convert(), &src[p * stride + j..][..width], d);
            rest.fill(0.0);
        }
    }
}

/// Column-major to panels: square blocks of one vector's width, transposed in registers.
#[inline(always)]
fn pack_columns<B: Backend, E: Storage>(
    b: B,
    src: &[E],
    stride: usize,
    k: usize,
    n: usize,
    dst: &mut [f32],
) {
    let (l, lanes) = (b.lanes(), B::L::N);
    for j in (0..n.next_multiple_of(PANEL)).step_by(lanes) {
        let at = j / PANEL * PANEL * k + j % PANEL;
        for p in (0..k).step_by(lanes) {
            let depth = lanes.min(k - p);
            let dst = &mut dst[at + p * PANEL..][..(depth - 1) * PANEL + lanes];
            match E::as_f32(src) {
                Some(src) if depth == lanes && j + lanes <= n => {
                    let src = &src[j * stride + p..];
                    l.transpose(
                        |c| l.load(&src[c * stride..]),
                        |r, x| l.store(&mut dst[r * PANEL..], x),
                    );
                }
                _ => {
                    let column = |c: usize| {
                        let mut x = [0.0; MAX_LANES];
                        if j + c < n {
                            E::widen(
                                b.convert(),
                                &src[(j + c) * stride + p..][..depth],
                                &mut x[..depth],
                            );
                        }
                        l.load(&x)
                    };
                    l.transpose(column, |r, x| {
                        if r < depth {
                            l.store(&mut dst[r * PANEL..], x);
                        }
                    });
                }
            }
        }
    }
}

/// The widest vectors.
const MAX_LANES: usize = 16;

#[inline(always)]
fn copy<B: Backend, E: Storage>(b: B, src: &[E], dst: &mut [f32]) {
    let l = b.lanes();
    let Some(src) = E::as_f32(src) else {
        return E::widen(b.convert(), src, dst);
    };
    let ((s, s_tail), (d, d_tail)) = (l.split(src), l.split_mut(dst));
    for (s, d) in s.iter().zip(d) {
        *d = *s;
    }
    l.store_head(d_tail, l.load_head(s_tail));
}

#[inline(always)]
fn times<L: Lanes>(l: L, factor: f32, row: &mut [f32]) {
    let (full, tail) = l.split_mut(row);
    for x in full {
        *x = l.mul(*x, l.splat(factor));
    }
    l.store_head(tail, l.mul(l.load_head(tail), l.splat(factor)));
}
