//! The FMA engine: `MR x (V * N)` register tiles over plain `f32` operands.

use super::backend::Backend;
use super::lanes::Lanes;
use super::storage::Storage;
use super::tiles::{Left, Order, PANEL, Product, Right, Sink, Source, Term, Tiles, right_len};
use super::tiles_f32_loop::{Strip, Tile};
use super::tiles_f32_pack::{copy, copy_times, pack_columns, pack_rows, turn, widen_rows};
use core::marker::PhantomData;

/// Register tiles of `MR` rows and `V` vectors.
#[derive(Clone, Copy, Debug)]
pub struct Fma<L, const MR: usize, const V: usize>(pub(super) PhantomData<L>);

/// Floats between copied rows, so that they do not meet in the same cache sets again.
const GAP: usize = 16;

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
        let at = j / PANEL * term.right.step + j % PANEL;
        Strip {
            a: term.left.data.as_ptr().wrapping_add(i * rows),
            rows,
            steps,
            b: term.right.data.as_ptr().wrapping_add(at),
            stride: term.right.stride,
            asking: Strip::asking(k, term.right.stride, term.right.data.len().saturating_sub(at)),
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
        // Those of a triangle read what others of the same rows have computed: both keep to multiples of `MR`.
        let rest = p.m - i;
        let fives = match p.causal || p.lower {
            true => usize::from(rest % MR == 5),
            false => Self::fives(rest),
        };
        let end = p.m - 5 * fives;
        while i + MR <= end {
            if p.lower && W > 1 && i + MR <= j + L::N {
                Self::tile::<MR, 1, B, S>(b, p, i, j, sink);
            } else {
                Self::tile::<MR, W, B, S>(b, p, i, j, sink);
            }
            i += MR;
        }
        if MR > 8 && i + 8 <= end {
            Self::tile::<8, W, B, S>(b, p, i, j, sink);
            i += 8;
        }
        if i + 4 <= end {
            Self::tile::<4, W, B, S>(b, p, i, j, sink);
            i += 4;
        }
        if i + 2 <= end {
            Self::tile::<2, W, B, S>(b, p, i, j, sink);
            i += 2;
        }
        if i < end {
            Self::tile::<1, W, B, S>(b, p, i, j, sink);
            i += 1;
        }
        while i < p.m {
            Self::tile::<5, W, B, S>(b, p, i, j, sink);
            i += 5;
        }
    }

    /// How many tiles of five rows spare `m` rows one of two rows or of one, whose few sums would wait for each other.
    #[inline(always)]
    fn fives(m: usize) -> usize {
        let whole = |rows: usize| matches!(rows % MR, 0 | 4) || MR > 8 && rows % MR == 8;
        (0..=m / 5).take(MR).find(|n| whole(m - 5 * n)).unwrap_or(0)
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
        // So are the steps of a deep operand that lie a multiple of 512 bytes apart, turned into rows.
        const STEPS: usize = 128;
        if let (Order::Columns(s), None) = (src.order, weights)
            && s % STEPS == 0
            && k >= STEPS
            && m > MR
        {
            turn(b, src.data, s, [m, k], dst, k + GAP);
            return Left::new(dst, Order::Rows(k + GAP));
        }
        let meet = matches!(src.order, Order::Rows(s) if s % MEET == 0 && m > MR);
        if let (Some(data), None, false) = (E::as_f32(src.data), weights, meet) {
            return Left::new(data, src.order);
        }
        match src.order {
            Order::Columns(s) => {
                for p in 0..k {
                    let (from, row) = (&src.data[p * s..][..m], &mut dst[p * m..][..m]);
                    match weights {
                        Some(w) => copy_times(b, from, w[p], row),
                        None => copy(b, from, row),
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
