//! The AMX engine: 16 x 16 tiles of `f32` sums over `bf16` operands.
//!
//! With one part, operands are rounded to `bf16`. With two, `x = hi + lo` and a product is the sum of
//! `lo * hi`, `hi * lo` and `hi * hi`: of the sixteen bits that two parts hold, none is lost but in `lo * lo`.
//!
//! Left operands lie in rows, padded to whole tiles; right operands in panels whose row pairs are interleaved, as
//! the instruction wants them: element `(p, j)` of a panel at `(p / 2) * 2 * PANEL + 2 * j + p % 2`.

use super::amx::{self, Session};
use super::backend::{Backend, Kernel};
use super::lanes::Lanes;
use super::lanes_pulp::Pulp;
use super::storage::Storage;
use super::tiles::{Left, Order, PANEL, Product, Right, Sink, Source, Term, Tiles};
use super::tiles_amx_pack::{self as pack, Planes, Rows};
use half::bf16;

type L = Pulp<pulp::x86::V4>;
type F = <L as Lanes>::F;

/// `bf16` tiles; `PARTS` is 1 for rounded operands, 2 for split ones. A value proves that the machine has AMX and
/// that the process may use it.
#[derive(Clone, Copy, Debug)]
pub struct Amx<const PARTS: usize>(pub(super) ());

/// Rows and columns of a tile.
const TILE: usize = 16;
/// Steps of the shared dimension that one instruction takes.
const STEP: usize = 32;

/// Two tiles by two tiles of sums, as `tilestored` leaves them.
#[repr(C, align(64))]
struct Square([[f32; PANEL]; 2 * TILE]);

/// The part of a term that one square needs, bounds already proven.
#[derive(Clone, Copy)]
struct Strip {
    a: *const bf16,
    /// Bytes between rows.
    a_stride: usize,
    a_plane: usize,
    b: *const bf16,
    b_plane: usize,
    steps: usize,
}

/// One square of the result and its sink, a kernel of its own.
struct Piece<'a, S, const PARTS: usize, const R: usize, const C: usize> {
    first: Option<(Strip, &'a [f32])>,
    second: Option<Strip>,
    sink: &'a mut S,
    i: usize,
    j: usize,
    rows: usize,
    width: usize,
    _session: &'a Session,
}

impl<B, S, const PARTS: usize, const R: usize, const C: usize> Kernel<B>
    for Piece<'_, S, PARTS, R, C>
where
    B: Backend<L = L>,
    S: Sink<L>,
{
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let l = b.lanes();
        let (mut x, mut y) = (
            core::mem::MaybeUninit::<Square>::uninit(),
            core::mem::MaybeUninit::<Square>::uninit(),
        );
        let (px, py) = (x.as_mut_ptr().cast::<f32>(), y.as_mut_ptr().cast::<f32>());
        // SAFETY: `Amx::check` proved the operands; a session is held; a square takes R x C tiles.
        unsafe {
            if let Some((strip, _)) = self.first {
                sum::<PARTS, R, C>(strip, px);
            }
            match self.second {
                Some(strip) => {
                    sum::<PARTS, R, C>(strip, if self.first.is_some() { py } else { px })
                }
                None if self.first.is_none() => {
                    amx::zero();
                    amx::store::<R, C>(px);
                }
                None => {
                    amx::zero();
                    amx::store::<R, C>(py);
                }
            }
        }
        let scale = self.first.map(|(_, scale)| scale);
        let mut r = 0;
        while r + 4 <= self.rows {
            // SAFETY: rows r..r + 4 of R * 16, C vectors each, were written above.
            unsafe { self.put::<4>(l, r, [px, py], scale) };
            r += 4;
        }
        while r < self.rows {
            // SAFETY: as above.
            unsafe { self.put::<1>(l, r, [px, py], scale) };
            r += 1;
        }
    }
}

/// The sum of one strip, written to `to`.
///
/// # Safety
/// A session is held; the strip lies inside its operands; `to` has room for a [`Square`].
#[inline(always)]
unsafe fn sum<const PARTS: usize, const R: usize, const C: usize>(s: Strip, to: *mut f32) {
    // SAFETY: as for this function.
    unsafe {
        amx::zero();
        if s.steps > 0 {
            if PARTS == 2 {
                amx::accumulate::<R, C>(s.a.add(s.a_plane), s.a_stride, s.b, s.steps);
                amx::accumulate::<R, C>(s.a, s.a_stride, s.b.add(s.b_plane), s.steps);
            }
            amx::accumulate::<R, C>(s.a, s.a_stride, s.b, s.steps);
        }
        amx::store::<R, C>(to);
    }
}

impl<S, const PARTS: usize, const R: usize, const C: usize> Piece<'_, S, PARTS, R, C> {
    /// Hands `M` rows from row `r` of the square on to the sink.
    ///
    /// # Safety
    /// Rows `r .. r + M` of the squares are written.
    #[inline(always)]
    unsafe fn put<const M: usize>(
        &mut self,
        l: L,
        r: usize,
        [x, y]: [*mut f32; 2],
        scale: Option<&[f32]>,
    ) where
        S: Sink<L>,
    {
        let mut acc = [[l.zero(); C]; M];
        for q in 0..M {
            for c in 0..C {
                let at = (r + q) * PANEL + c * TILE;
                // SAFETY: as for this function.
                acc[q][c] = unsafe { l.load_ptr(x.add(at)) };
            }
        }
        if let Some(scale) = scale {
            let scale: &[f32; M] = scale[self.i + r..].first_chunk().expect("a factor per row");
            for q in 0..M {
                for c in 0..C {
                    let at = (r + q) * PANEL + c * TILE;
                    // SAFETY: with a scaled term, both squares are written.
                    let rest: F = unsafe { l.load_ptr(y.add(at)) };
                    acc[q][c] = l.mul_add(acc[q][c], l.splat(scale[q]), rest);
                }
            }
        }
        self.sink.put_tile(l, self.i + r, self.j, self.width, &acc);
    }
}

impl<const PARTS: usize> Amx<PARTS> {
    fn strip(t: &Term<'_, bf16>, i: usize, j: usize, k: usize) -> Strip {
        let Order::Rows(stride) = t.left.order else { unreachable!("packed in rows") };
        Strip {
            a: t.left.data.as_ptr().wrapping_add(i * stride),
            a_stride: stride * size_of::<bf16>(),
            a_plane: t.left.plane,
            b: t.right.data.as_ptr().wrapping_add(j / PANEL * t.right.step),
            b_plane: t.right.plane,
            steps: k.div_ceil(STEP),
        }
    }

    #[inline(always)]
    fn piece<B: Backend<L = L>, S: Sink<L>, const R: usize, const C: usize>(
        b: B,
        session: &Session,
        p: &Product<'_, bf16>,
        [i, j]: [usize; 2],
        sink: &mut S,
    ) {
        let rows = (p.m - i).min(R * TILE);
        let deep = |t: &Term<'_, bf16>| if p.causal { t.k.min(i + rows) } else { t.k };
        b.call(Piece::<S, PARTS, R, C> {
            first: p.first.as_ref().map(|(t, scale)| (Self::strip(t, i, j, t.k), *scale)),
            second: p.second.as_ref().map(|t| Self::strip(t, i, j, deep(t))),
            sink,
            i,
            j,
            rows,
            width: (p.n - j).min(C * TILE),
            _session: session,
        });
    }

    /// Panics unless every element that the product will touch lies inside its operand.
    fn check(p: &Product<'_, bf16>) {
        if p.m == 0 || p.n == 0 {
            return;
        }
        for t in p.first.iter().map(|f| &f.0).chain(&p.second).filter(|t| t.k > 0) {
            let (rows, depth) = (p.m.next_multiple_of(TILE), t.k.next_multiple_of(STEP));
            let Order::Rows(stride) = t.left.order else { panic!("left operand not in rows") };
            let end = |plane: usize, outer: usize, step: usize, inner: usize| {
                let planes = plane.checked_mul(PARTS - 1)?;
                (outer - 1).checked_mul(step)?.checked_add(planes)?.checked_add(inner)
            };
            let left = end(t.left.plane, rows, stride, depth);
            assert!(left.is_some_and(|n| n <= t.left.data.len()), "left operand too short");
            let right = end(t.right.plane, p.n.div_ceil(PANEL), t.right.step, depth * PANEL);
            assert!(right.is_some_and(|n| n <= t.right.data.len()), "right operand too short");
            assert!(t.right.stride == PANEL, "right operand not packed");
        }
        assert!(p.first.is_none_or(|(_, scale)| scale.len() >= p.m), "scale too short");
    }
}

impl<const PARTS: usize> Tiles for Amx<PARTS> {
    type L = L;
    type Elem = bf16;
    type Session = Session;
    const MR: usize = 2 * TILE;
    const NR: usize = PANEL;
    const STEP: usize = STEP;
    const DEPTH: usize = 512;
    const CHUNK: usize = 64;
    const NAME: &'static str = if PARTS == 1 { "bf16" } else { "bf16x3" };

    fn session(self) -> Session {
        Session::new(self)
    }

    fn right_len(k: usize, n: usize) -> usize {
        PARTS * k.next_multiple_of(STEP) * n.next_multiple_of(PANEL)
    }

    fn right(data: &[bf16], k: usize) -> Right<'_, bf16> {
        let plane = k.next_multiple_of(STEP) * PANEL;
        Right { data, step: PARTS * plane, stride: PANEL, plane }
    }

    #[inline(always)]
    fn pack_right<B: Backend<L = L>, E: Storage>(
        self,
        _: B,
        src: Source<'_, E>,
        k: usize,
        n: usize,
        dst: &mut [bf16],
    ) {
        let Right { step, plane, .. } = Self::right(&[], k);
        for j in (0..n).step_by(PANEL) {
            let dst = Planes { data: &mut dst[j / PANEL * step..][..step], plane };
            let size = [k, PANEL.min(n - j)];
            // SAFETY: a value of `Amx` proves the instructions.
            match src.columns(j) {
                Source::Rows(data, stride) => unsafe {
                    pack::pairs::<E, PARTS>(Rows { data, stride }, size, dst);
                },
                Source::Columns(data, stride) => unsafe {
                    pack::columns::<E, PARTS>(Rows { data, stride }, size, dst);
                },
            }
        }
    }

    fn left_len(m: usize, k: usize) -> usize {
        PARTS * m.next_multiple_of(TILE) * k.next_multiple_of(STEP)
    }

    fn view_len(k: usize, n: usize) -> usize {
        Self::right_len(k, n)
    }

    #[inline(always)]
    fn pack_left<'a, B: Backend<L = L>, E: Storage>(
        self,
        _: B,
        src: Left<'a, E>,
        weights: Option<&[f32]>,
        m: usize,
        k: usize,
        dst: &'a mut [bf16],
    ) -> Left<'a, bf16> {
        let whole = PARTS == 1 && m.is_multiple_of(TILE) && k.is_multiple_of(STEP);
        match (E::as_bf16(src.data), src.order, weights) {
            // Rows a multiple of 4 KiB apart would meet in one set of the first cache level.
            (Some(data), Order::Rows(s), None) if whole && s % 2048 != 0 => {
                return Left::new(data, src.order);
            }
            _ => {}
        }
        let stride = k.next_multiple_of(STEP);
        let plane = m.next_multiple_of(TILE) * stride;
        let data = &mut dst[..PARTS * plane];
        let planes = Planes { data: &mut *data, plane };
        // SAFETY: a value of `Amx` proves the instructions.
        match src.order {
            Order::Rows(s) => unsafe {
                pack::rows::<E, PARTS>(Rows { data: src.data, stride: s }, weights, [m, k], planes);
            },
            Order::Columns(s) => unsafe {
                pack::transposed::<E, PARTS>(Rows { data: src.data, stride: s }, weights, [m, k], planes);
            },
        }
        Left { data, order: Order::Rows(stride), plane }
    }

    #[inline(always)]
    fn view_right<'a, B: Backend<L = L>>(
        self,
        _: B,
        src: &'a [f32],
        k: usize,
        n: usize,
        dst: &'a mut [bf16],
    ) -> Right<'a, bf16> {
        let Right { step, plane, .. } = Self::right(&[], k);
        for j in (0..n).step_by(PANEL) {
            let rows = Rows { data: &src[j * k..], stride: PANEL };
            let dst = Planes { data: &mut dst[j / PANEL * step..][..step], plane };
            // SAFETY: a value of `Amx` proves the instructions.
            unsafe { pack::pairs::<f32, PARTS>(rows, [k, PANEL], dst) };
        }
        Self::right(dst, k)
    }

    #[inline(always)]
    fn product<B: Backend<L = L>, S: Sink<L>>(
        self,
        b: B,
        session: &Session,
        p: &Product<'_, bf16>,
        sink: &mut S,
    ) {
        Self::check(p);
        for j in (0..p.n).step_by(PANEL) {
            let wide = p.n - j > TILE;
            // In the lower triangle, rows above the panel's first column are not wanted.
            let mut i = if p.lower { j.min(p.m.next_multiple_of(PANEL)) } else { 0 };
            while i < p.m {
                match (p.m - i > TILE, wide) {
                    (true, true) => Self::piece::<B, S, 2, 2>(b, session, p, [i, j], sink),
                    (true, false) => Self::piece::<B, S, 2, 1>(b, session, p, [i, j], sink),
                    (false, true) => Self::piece::<B, S, 1, 2>(b, session, p, [i, j], sink),
                    (false, false) => Self::piece::<B, S, 1, 1>(b, session, p, [i, j], sink),
                }
                i += 2 * TILE;
            }
        }
    }
}
