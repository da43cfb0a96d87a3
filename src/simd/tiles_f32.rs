//! The FMA engine: `MR x (V * N)` register tiles over plain `f32` operands.

use super::lanes::Lanes;
use super::tiles::{Left, Order, PANEL, Product, Right, Sink, Source, Term, Tiles};
use core::marker::PhantomData;

/// Register tiles of `MR` rows and `V` vectors.
#[derive(Clone, Copy, Debug)]
pub struct Fma<L, const MR: usize, const V: usize>(pub(super) PhantomData<L>);

/// The part of a [`Term`] that one row of tiles and one panel need, bounds already proven.
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

impl<L: Lanes, const MR: usize, const V: usize> Fma<L, MR, V> {
    /// Adds `k` steps of a strip to the accumulators.
    ///
    /// # Safety
    /// For `i < M`, `p < k`: `a[i * rows + p * steps]` and `b[p * stride ..][..W * N]` must be readable.
    #[inline(always)]
    unsafe fn accumulate<const M: usize, const W: usize>(l: L, s: Strip, acc: &mut [[L::F; W]; M]) {
        if s.steps == 1 {
            // SAFETY: as for this function, with the unit step spelled out for the address arithmetic.
            unsafe { Self::steps::<M, W>(l, Strip { steps: 1, ..s }, acc) }
        } else {
            // SAFETY: as for this function; rows are adjacent in this order.
            unsafe { Self::steps::<M, W>(l, Strip { rows: 1, ..s }, acc) }
        }
    }

    /// # Safety
    /// As [`accumulate`](Self::accumulate).
    #[inline(always)]
    unsafe fn steps<const M: usize, const W: usize>(l: L, s: Strip, acc: &mut [[L::F; W]; M]) {
        const UNROLL: usize = 4;
        let mut p = 0;
        while p + UNROLL <= s.k {
            let mut u = 0;
            while u < UNROLL {
                // SAFETY: p + u < k.
                unsafe { Self::step::<M, W>(l, s, p + u, acc) };
                u += 1;
            }
            p += UNROLL;
        }
        while p < s.k {
            // SAFETY: p < k.
            unsafe { Self::step::<M, W>(l, s, p, acc) };
            p += 1;
        }
    }

    /// # Safety
    /// As [`accumulate`](Self::accumulate), and `p < k`.
    #[inline(always)]
    unsafe fn step<const M: usize, const W: usize>(
        l: L,
        s: Strip,
        p: usize,
        acc: &mut [[L::F; W]; M],
    ) {
        let mut b = [l.zero(); W];
        for (j, b) in b.iter_mut().enumerate() {
            // SAFETY: inside row p of the panel.
            *b = unsafe { l.load_ptr(s.b.add(p * s.stride + j * L::N)) };
        }
        for (i, row) in acc.iter_mut().enumerate() {
            // SAFETY: i < M and p < k.
            let a = l.splat(unsafe { *s.a.add(i * s.rows + p * s.steps) });
            for (c, b) in row.iter_mut().zip(b) {
                *c = l.mul_add(a, b, *c);
            }
        }
    }

    /// One tile of `M` rows and `W` vectors at `(i, j)`.
    #[inline(always)]
    fn tile<const M: usize, const W: usize, S: Sink<L>>(
        l: L,
        p: &Product<'_, f32>,
        i: usize,
        j: usize,
        sink: &mut S,
    ) {
        let mut acc = [[l.zero(); W]; M];
        if let Some((term, scale)) = &p.first {
            // SAFETY: `check` proved every term for all i < m and all panels.
            unsafe { Self::accumulate(l, Self::strip(term, i, j, term.k), &mut acc) };
            let scale: &[f32; M] = scale[i..i + M].try_into().expect("M factors");
            for (row, s) in acc.iter_mut().zip(scale) {
                let s = l.splat(*s);
                for c in row {
                    *c = l.mul(*c, s);
                }
            }
        }
        if let Some(term) = &p.second {
            let k = if p.causal { term.k.min(i + M) } else { term.k };
            // SAFETY: as above, and k <= term.k.
            unsafe { Self::accumulate(l, Self::strip(term, i, j, k), &mut acc) };
        }
        let width = (p.n - j).min(W * L::N);
        for (r, row) in acc.iter().enumerate() {
            sink.put(l, i + r, j, width, row);
        }
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
            b: term
                .right
                .data
                .as_ptr()
                .wrapping_add(j / PANEL * term.right.step + j % PANEL),
            stride: term.right.stride,
            k,
        }
    }

    /// All rows against one panel of `W` vectors, tails in smaller tiles instead of padding.
    #[inline(always)]
    fn panel<const W: usize, S: Sink<L>>(l: L, p: &Product<'_, f32>, j: usize, sink: &mut S) {
        // In the lower triangle, rows above the panel's first column are not wanted.
        let mut i = if p.lower { j.min(p.m) / MR * MR } else { 0 };
        while i + MR <= p.m {
            Self::tile::<MR, W, S>(l, p, i, j, sink);
            i += MR;
        }
        if MR > 8 && i + 8 <= p.m {
            Self::tile::<8, W, S>(l, p, i, j, sink);
            i += 8;
        }
        if i + 4 <= p.m {
            Self::tile::<4, W, S>(l, p, i, j, sink);
            i += 4;
        }
        if i + 2 <= p.m {
            Self::tile::<2, W, S>(l, p, i, j, sink);
            i += 2;
        }
        if i < p.m {
            Self::tile::<1, W, S>(l, p, i, j, sink);
        }
    }

    /// Panics unless every element that the product will touch lies inside its operand.
    fn check(p: &Product<'_, f32>) {
        if p.m == 0 || p.n == 0 {
            return;
        }
        for t in p
            .first
            .iter()
            .map(|f| &f.0)
            .chain(&p.second)
            .filter(|t| t.k > 0)
        {
            let last = match t.left.order {
                Order::Rows(s) => (p.m - 1) * s + t.k - 1,
                Order::Columns(s) => (t.k - 1) * s + p.m - 1,
            };
            assert!(last < t.left.data.len(), "left operand too short");
            // The last vector of the last row of the last panel; earlier ones lie before it.
            let j = (p.n - 1) / PANEL * PANEL;
            let width = (p.n - j).next_multiple_of(L::N);
            let end = j / PANEL * t.right.step + (t.k - 1) * t.right.stride + width;
            assert!(end <= t.right.data.len(), "right operand too short");
        }
        assert!(
            p.first.is_none_or(|(_, scale)| scale.len() >= p.m),
            "scale too short"
        );
    }
}

impl<L: Lanes, const MR: usize, const V: usize> Tiles for Fma<L, MR, V> {
    type L = L;
    type Elem = f32;
    const MR: usize = MR;
    const NR: usize = V * L::N;
    const NAME: &'static str = "f32";

    #[inline(always)]
    fn pack_right(self, l: L, src: Source<'_>, k: usize, n: usize, dst: &mut [f32]) {
        match src {
            Source::Rows(data, stride) => pack_rows(l, data, stride, k, n, dst),
            Source::Columns(data, stride) => pack_columns(l, data, stride, k, n, dst),
        }
    }

    #[inline(always)]
    fn pack_left<'a>(
        self,
        _: L,
        src: Left<'a, f32>,
        _: usize,
        _: usize,
        _: &'a mut [f32],
    ) -> Left<'a, f32> {
        src
    }

    #[inline(always)]
    fn view_right<'a>(
        self,
        _: L,
        src: &'a [f32],
        k: usize,
        _: usize,
        _: &'a mut [f32],
    ) -> Right<'a, f32> {
        Right::packed(src, k)
    }

    #[inline(always)]
    fn product<S: Sink<L>>(self, l: L, p: &Product<'_, f32>, sink: &mut S) {
        Self::check(p);
        let mut j = 0;
        while j < p.n {
            // The last panel computes only the vectors that it fills.
            match (p.n - j).div_ceil(L::N) {
                1 => Self::panel::<1, S>(l, p, j, sink),
                2 if V > 2 => Self::panel::<2, S>(l, p, j, sink),
                _ => Self::panel::<V, S>(l, p, j, sink),
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

/// Column-major to panels: square blocks of one vector's width, transposed in registers.
#[inline(always)]
fn pack_columns<L: Lanes>(l: L, src: &[f32], stride: usize, k: usize, n: usize, dst: &mut [f32]) {
    const MAX_LANES: usize = 16;
    let mut block = [l.zero(); MAX_LANES];
    let block = &mut block[..L::N];
    for j in (0..n.next_multiple_of(PANEL)).step_by(L::N) {
        let at = j / PANEL * PANEL * k + j % PANEL;
        for p in (0..k).step_by(L::N) {
            let depth = L::N.min(k - p);
            if depth == L::N && j + L::N <= n {
                for (c, b) in block.iter_mut().enumerate() {
                    *b = l.load(&src[(j + c) * stride + p..]);
                }
            } else {
                for (c, b) in block.iter_mut().enumerate() {
                    *b = if j + c < n {
                        l.load_head(&src[(j + c) * stride + p..][..depth])
                    } else {
                        l.zero()
                    };
                }
            }
            l.transpose(block);
            for (r, b) in block[..depth].iter().enumerate() {
                l.store(&mut dst[at + (p + r) * PANEL..], *b);
            }
        }
    }
}
