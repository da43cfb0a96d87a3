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
use super::tiles_amx_pack::{Form, Packing, Planes, Rows};
use super::tiles_amx_parts::STEP;
use core::mem::MaybeUninit;
use half::bf16;

type L = Pulp<pulp::x86::V4>;
type F = <L as Lanes>::F;

/// `bf16` tiles; `PARTS` is 1 for rounded operands, 2 for split ones. A value proves that the machine has AMX and
/// that the process may use it.
#[derive(Clone, Copy, Debug)]
pub struct Amx<const PARTS: usize>(pub(super) ());

/// Rows and columns of a tile.
const TILE: usize = 16;

/// Two tiles by two tiles of sums, as `tilestored` leaves them.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
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

/// All squares of a product, a kernel of its own: while the sink takes one square, the tiles sum the next.
struct Walk<'a, 'p, S, const PARTS: usize> {
    p: &'a Product<'p, bf16>,
    sink: &'a mut S,
    _session: &'a Session,
}

/// Which part of the result a square holds.
#[derive(Clone, Copy)]
struct Place {
    i: usize,
    j: usize,
    rows: usize,
    width: usize,
}

/// Room for squares, taken in turn. Three are enough: the two of a square that waits for the sink, and the first of
/// the next.
struct Ring {
    squares: [MaybeUninit<Square>; 3],
    next: usize,
}

/// A square whose sums are complete: scaled and plain ones, or plain ones twice where nothing is scaled.
#[derive(Clone, Copy)]
struct Done {
    place: Place,
    sums: [usize; 2],
}

impl<B: Backend<L = L>, S: Sink<L>, const PARTS: usize> Kernel<B> for Walk<'_, '_, S, PARTS> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let (l, p) = (b.lanes(), self.p);
        let mut ring = Ring { squares: [MaybeUninit::uninit(); 3], next: 0 };
        let mut done = None::<Done>;
        for j in (0..p.n).step_by(PANEL) {
            // In the lower triangle, rows above the panel's first column are not wanted.
            let mut i = if p.lower { j } else { 0 };
            while i < p.m {
                let (rows, width) = ((p.m - i).min(2 * TILE), (p.n - j).min(PANEL));
                let place = Place { i, j, rows, width };
                let plain = p.second.as_ref().map_or(Strip::EMPTY, |t| {
                    Strip::of(t, place, if p.causal { t.k.min(i + rows) } else { t.k })
                });
                let scaled = p.first.as_ref().map(|(t, _)| Strip::of(t, place, t.k));
                // SAFETY: `Amx::check` proved the operands, and a session is held.
                let first = unsafe { ring.sum::<PARTS>(scaled.unwrap_or(plain), place) };
                if let Some(done) = done {
                    self.emit(l, done, &ring);
                }
                let second = match scaled {
                    // SAFETY: as above. What waited is with the sink: its room may be written.
                    Some(_) => unsafe { ring.sum::<PARTS>(plain, place) },
                    None => first,
                };
                done = Some(Done { place, sums: [first, second] });
                i += 2 * TILE;
            }
        }
        if let Some(done) = done {
            self.emit(l, done, &ring);
        }
    }
}

impl Ring {
    /// Sums a strip of the square at `place` in the next room and says which that is.
    ///
    /// # Safety
    /// A session is held, and [`Amx::check`] has seen the product.
    #[inline(always)]
    unsafe fn sum<const PARTS: usize>(&mut self, s: Strip, place: Place) -> usize {
        let at = self.next;
        self.next = (at + 1) % self.squares.len();
        let to = self.squares[at].as_mut_ptr().cast();
        // SAFETY: as for this function; the rooms hold whole squares.
        unsafe {
            match (place.rows > TILE, place.width > TILE) {
                (true, true) => sum::<PARTS, 2, 2>(s, to),
                (true, false) => sum::<PARTS, 2, 1>(s, to),
                (false, true) => sum::<PARTS, 1, 2>(s, to),
                (false, false) => sum::<PARTS, 1, 1>(s, to),
            }
        }
        at
    }
}

impl<S: Sink<L>, const PARTS: usize> Walk<'_, '_, S, PARTS> {
    /// Hands a square on to the sink.
    #[inline(always)]
    fn emit(&mut self, l: L, Done { place: at, sums }: Done, ring: &Ring) {
        let scale = self.p.first.as_ref().map(|(_, scale)| &scale[at.i..]);
        let sums = sums.map(
            #[inline(always)]
            |s| ring.squares[s].as_ptr().cast::<f32>(),
        );
        let mut r = 0;
        // SAFETY: `Ring::sum` wrote these rows, as wide as the tiles that hold `width`.
        unsafe {
            while r + 4 <= at.rows {
                match at.width > TILE {
                    true => put::<S, 4, 2>(l, self.sink, at, r, sums, scale),
                    false => put::<S, 4, 1>(l, self.sink, at, r, sums, scale),
                }
                r += 4;
            }
            while r < at.rows {
                match at.width > TILE {
                    true => put::<S, 1, 2>(l, self.sink, at, r, sums, scale),
                    false => put::<S, 1, 1>(l, self.sink, at, r, sums, scale),
                }
                r += 1;
            }
        }
    }
}

/// `M` rows of a square from row `r` on.
///
/// # Safety
/// They are written, `C` tiles wide, in the second square too if there is a scale.
#[inline(always)]
unsafe fn put<S: Sink<L>, const M: usize, const C: usize>(
    l: L,
    sink: &mut S,
    at: Place,
    r: usize,
    [x, y]: [*const f32; 2],
    scale: Option<&[f32]>,
) {
    let mut acc = [[l.zero(); C]; M];
    for q in 0..M {
        for c in 0..C {
            // SAFETY: as for this function.
            acc[q][c] = unsafe { l.load_ptr(x.add((r + q) * PANEL + c * TILE)) };
        }
    }
    if let Some(scale) = scale {
        let scale: &[f32; M] = scale[r..].first_chunk().expect("a factor per row");
        for q in 0..M {
            for c in 0..C {
                // SAFETY: as for this function.
                let rest: F = unsafe { l.load_ptr(y.add((r + q) * PANEL + c * TILE)) };
                acc[q][c] = l.mul_add(acc[q][c], l.splat(scale[q]), rest);
            }
        }
    }
    sink.put_tile(l, at.i + r, at.j, at.width, &acc);
}

impl Strip {
    /// Nothing to add.
    const EMPTY: Strip = Strip {
        a: core::ptr::null(),
        a_stride: 0,
        a_plane: 0,
        b: core::ptr::null(),
        b_plane: 0,
        steps: 0,
    };

    #[inline(always)]
    fn of(t: &Term<'_, bf16>, at: Place, k: usize) -> Self {
        let Order::Rows(stride) = t.left.order else { return Self::EMPTY };
        Strip {
            a: t.left.data.as_ptr().wrapping_add(at.i * stride),
            a_stride: stride * size_of::<bf16>(),
            a_plane: t.left.plane,
            b: t.right.data.as_ptr().wrapping_add(at.j / PANEL * t.right.step),
            b_plane: t.right.plane,
            steps: k.div_ceil(STEP),
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
        let [a_rest, b_rest] = [s.a.wrapping_add(s.a_plane), s.b.wrapping_add(s.b_plane)];
        match (PARTS, R, C) {
            _ if s.steps == 0 => {}
            (2, 2, 2) => {
                amx::accumulate_split([s.a, a_rest], s.a_stride, [s.b, b_rest], s.steps);
            }
            _ => {
                if PARTS == 2 {
                    amx::accumulate::<R, C>(a_rest, s.a_stride, s.b, s.steps);
                    amx::accumulate::<R, C>(s.a, s.a_stride, b_rest, s.steps);
                }
                amx::accumulate::<R, C>(s.a, s.a_stride, s.b, s.steps);
            }
        }
        amx::store::<R, C>(to);
    }
}

impl<const PARTS: usize> Amx<PARTS> {
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
    const DEPTH: usize = 512;
    const HEIGHT: usize = 128;
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
            let (form, src) = match src.columns(j) {
                Source::Rows(data, stride) => (Form::Pairs, Rows { data, stride }),
                Source::Columns(data, stride) => (Form::Columns, Rows { data, stride }),
            };
            let panel = Packing { src, weights: None, size, dst };
            // SAFETY: a value of `Amx` proves the instructions.
            unsafe { panel.write::<PARTS>(form) };
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
        let (form, distance) = match src.order {
            Order::Rows(s) => (Form::Rows, s),
            Order::Columns(s) => (Form::Transposed, s),
        };
        let src = Rows { data: src.data, stride: distance };
        let dst = Planes { data: &mut *data, plane };
        // SAFETY: a value of `Amx` proves the instructions.
        unsafe { Packing { src, weights, size: [m, k], dst }.write::<PARTS>(form) };
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
            let src = Rows { data: &src[j * k..], stride: PANEL };
            let dst = Planes { data: &mut dst[j / PANEL * step..][..step], plane };
            let panel = Packing { src, weights: None, size: [k, PANEL], dst };
            // SAFETY: a value of `Amx` proves the instructions.
            unsafe { panel.write::<PARTS>(Form::Pairs) };
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
        b.call(Walk::<S, PARTS> { p, sink, _session: session });
    }
}
