//! The tile loop of the FMA engine: a register tile of sums, from the first step of the shared dimension to its sink.

use super::backend::{Backend, Kernel};
use super::lanes::Lanes;
use super::tiles::Sink;

/// The part of a [`Term`](super::tiles::Term) that one tile needs, bounds already proven.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    pub a: *const f32,
    /// Distance between rows, and between steps of the shared dimension.
    pub rows: usize,
    pub steps: usize,
    pub b: *const f32,
    pub stride: usize,
    /// How many of the steps ask for a row of the panel that comes later.
    pub asking: usize,
    pub k: usize,
}

impl Strip {
    /// Nothing to add.
    pub const EMPTY: Strip = Strip {
        a: core::ptr::null(),
        rows: 0,
        steps: 1,
        b: core::ptr::null(),
        stride: 0,
        asking: 0,
        k: 0,
    };

    /// How many of `k` steps ask ahead in an operand that ends `left` elements behind the first of them. Not behind its
    /// end: there may be no page there, and the processor would look for one each time.
    pub fn asking(k: usize, stride: usize, left: usize) -> usize {
        // Panels of so many rows fit half of the first cache level.
        const NEAR: usize = 128;
        match k.saturating_add(AHEAD).saturating_mul(stride) <= left {
            true => k,
            false if k > NEAR => k - AHEAD,
            false => 0,
        }
    }
}

/// The tile loop and its sink, a kernel of its own: nothing else competes for its registers.
pub(super) struct Tile<'a, S, const M: usize, const W: usize> {
    pub first: Strip,
    pub scale: Option<&'a [f32]>,
    pub second: Strip,
    pub sink: &'a mut S,
    pub i: usize,
    pub j: usize,
    pub width: usize,
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
        // A single row may have any distance.
        let rows = [0, s.rows, s.rows.wrapping_mul(2), s.rows.wrapping_mul(3)];
        // SAFETY: as for this function.
        unsafe { steps::<L, M, W, 4>(l, Strip { steps: 1, ..s }, rows, acc) }
    } else {
        let rows = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
        // SAFETY: as for this function; an operand without unit steps has unit rows.
        unsafe { steps::<L, M, W, 12>(l, Strip { rows: 1, ..s }, rows, acc) }
    }
}

/// `at`, of which the compiler forgets how it came to be. It would compute every address of a loop from one counter, with
/// more instructions and more registers than pointers that move, and the multiplications would wait for them.
#[inline(always)]
#[allow(clippy::pointers_in_nomem_asm_block)] // nothing is read
fn moved(at: *const f32) -> *const f32 {
    #[cfg(target_arch = "x86_64")]
    {
        let mut at = at;
        // SAFETY: a comment is all that the assembler gets.
        unsafe {
            core::arch::asm!("/* {0} */", inout(reg) at, options(pure, nomem, nostack, preserves_flags));
        }
        at
    }
    #[cfg(not(target_arch = "x86_64"))]
    at
}

/// Pointers to the present step of a strip: to every `G`-th row of the left operand, and to the panel.
struct Walk<const G: usize> {
    rows: [*const f32; MOST_ROWS],
    panel: *const f32,
    /// From a row of the panel to the one that is asked for.
    ahead: usize,
    /// From a row with a pointer to those behind it.
    offsets: [usize; G],
}

/// Rows of the largest tile.
const MOST_ROWS: usize = 12;
/// Steps from a row of a panel to the one that is asked for meanwhile.
const AHEAD: usize = 12;

/// # Safety
/// As [`add`]; `offsets` are those of the first `G` rows.
#[inline(always)]
unsafe fn steps<L: Lanes, const M: usize, const W: usize, const G: usize>(
    l: L,
    s: Strip,
    offsets: [usize; G],
    mut acc: [[L::F; W]; M],
) -> [[L::F; W]; M] {
    // Steps that share their addresses but for a constant. Not in tiles that fill the registers: the compiler moves loads
    // of several steps to the front, and sums to the stack to make room for them.
    const UNROLL: usize = 4;
    const MOST_SUMS: usize = 12;
    const { assert!(M <= MOST_ROWS) };
    let ahead = s.stride.wrapping_mul(AHEAD);
    let mut w = Walk { rows: [s.a; MOST_ROWS], panel: s.b, ahead, offsets };
    for g in 1..M.div_ceil(G) {
        w.rows[g] = s.a.wrapping_add(g * G * s.rows);
    }
    let (mut left, mut n) = (s.k, s.asking);
    while left > 0 {
        left -= n;
        while M * W <= MOST_SUMS && n >= UNROLL {
            for u in 0..UNROLL {
                // SAFETY: there are as many steps left.
                unsafe { step::<L, M, W, G>(l, s, &w, u, &mut acc) };
            }
            w.advance::<M>(s, UNROLL);
            n -= UNROLL;
        }
        while n > 0 {
            // SAFETY: a step is left.
            unsafe { step::<L, M, W, G>(l, s, &w, 0, &mut acc) };
            w.advance::<M>(s, 1);
            n -= 1;
        }
        (n, w.ahead) = (left, 0);
    }
    acc
}

impl<const G: usize> Walk<G> {
    #[inline(always)]
    fn advance<const M: usize>(&mut self, s: Strip, steps: usize) {
        for g in 0..M.div_ceil(G) {
            self.rows[g] = moved(self.rows[g].wrapping_add(steps * s.steps));
        }
        self.panel = moved(self.panel.wrapping_add(steps * s.stride));
    }
}

/// The step `u` behind the present one.
///
/// # Safety
/// As [`steps`], and there is such a step.
#[inline(always)]
unsafe fn step<L: Lanes, const M: usize, const W: usize, const G: usize>(
    l: L,
    s: Strip,
    w: &Walk<G>,
    u: usize,
    acc: &mut [[L::F; W]; M],
) {
    const LINE: usize = 64 / size_of::<f32>();
    const FEW_SUMS: usize = 8;
    let panel = w.panel.wrapping_add(u * s.stride);
    if M * W > FEW_SUMS {
        for at in (0..W * L::N).step_by(LINE) {
            l.prefetch::<1>(panel.wrapping_add(w.ahead.wrapping_add(at)) as usize);
        }
    }
    let mut b = [l.zero(); W];
    for j in 0..W {
        // SAFETY: inside a row of the panel.
        b[j] = unsafe { l.load_ptr(panel.add(j * L::N)) };
    }
    for i in 0..M {
        let row = w.rows[i / G].wrapping_add(w.offsets[i % G] + u * s.steps);
        // SAFETY: a row of the tile, and one of its steps.
        let a = l.splat(unsafe { *row });
        for j in 0..W {
            acc[i][j] = l.mul_add(a, b[j], acc[i][j]);
        }
    }
}
