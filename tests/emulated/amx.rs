//! Stands in for `src/simd/amx.rs` where the machine has no tiles: the same functions, computed as the manual of the
//! instructions states them. Tiles belong to a thread; whoever uses them without a session is found out.

extern crate std;
use super::tiles_amx::Amx;
use core::cell::{Cell, RefCell};
use core::marker::PhantomData;
use half::bf16;

type Tile = [[f32; 16]; 16];

std::thread_local! {
    static SESSIONS: Cell<usize> = const { Cell::new(0) };
    static SUMS: RefCell<[Tile; 4]> = const { RefCell::new([[[f32::NAN; 16]; 16]; 4]) };
}

pub fn permitted() -> bool {
    true
}

/// Sessions nest: each configures anew, and the last one's end leaves the tiles lost.
#[derive(Debug)]
pub struct Session(PhantomData<*const ()>);

impl Session {
    pub(super) fn new<const PARTS: usize>(_: Amx<PARTS>) -> Self {
        SESSIONS.set(SESSIONS.get() + 1);
        SUMS.set([[[f32::NAN; 16]; 16]; 4]);
        Self(PhantomData)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        SESSIONS.set(SESSIONS.get() - 1);
        SUMS.set([[[f32::NAN; 16]; 16]; 4]);
    }
}

fn with_sums(f: impl FnOnce(&mut [Tile; 4])) {
    assert!(SESSIONS.get() > 0, "tiles without a session");
    SUMS.with_borrow_mut(f);
}

pub unsafe fn zero() {
    with_sums(|t| *t = [[[0.0; 16]; 16]; 4]);
}

/// Subnormal numbers are zero to the tiles.
fn flushed(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0 * x } else { x }
}

fn read(x: bf16) -> f32 {
    flushed(x.to_f32())
}

/// One `tdpbf16ps`: the even and the odd products have sums of their own, which are added at the end.
fn multiply(sums: &mut Tile, a: &[[f32; 32]; 16], b: &[[[f32; 16]; 2]; 16]) {
    for (row, a) in sums.iter_mut().zip(a) {
        let mut sum = [[0.0f32; 16]; 2];
        for (pair, a) in b.iter().zip(a.as_chunks::<2>().0) {
            for half in 0..2 {
                for (s, b) in sum[half].iter_mut().zip(&pair[half]) {
                    *s = flushed(*s + flushed(a[half] * b));
                }
            }
        }
        for ((x, even), odd) in row.iter_mut().zip(sum[0]).zip(sum[1]) {
            *x = flushed(*x + flushed(even + odd));
        }
    }
}

pub unsafe fn accumulate<const R: usize, const C: usize>(
    a: *const bf16,
    stride: usize,
    b: *const bf16,
    steps: usize,
) {
    assert!(steps > 0, "a loop that counts down to zero");
    with_sums(|t| {
        for step in 0..steps {
            for r in 0..R {
                let mut left = [[0.0; 32]; 16];
                for (q, row) in left.iter_mut().enumerate() {
                    for (p, x) in row.iter_mut().enumerate() {
                        // SAFETY: the caller's promise.
                        *x = read(unsafe { *a.byte_add((16 * r + q) * stride).add(32 * step + p) });
                    }
                }
                for c in 0..C {
                    let mut right = [[[0.0; 16]; 2]; 16];
                    for (q, pair) in right.iter_mut().enumerate() {
                        for j in 0..16 {
                            for half in 0..2 {
                                let at = 1024 * step + 64 * q + 32 * c + 2 * j + half;
                                // SAFETY: the caller's promise.
                                pair[half][j] = read(unsafe { *b.add(at) });
                            }
                        }
                    }
                    multiply(&mut t[2 * r + c], &left, &right);
                }
            }
        }
    });
}

pub unsafe fn accumulate_split(
    [a, a_rest]: [*const bf16; 2],
    stride: usize,
    [b, b_rest]: [*const bf16; 2],
    steps: usize,
) {
    assert!(steps > 0, "a loop that counts down to zero");
    for step in 0..steps {
        for (a, b) in [(a_rest, b), (a, b), (a, b_rest)] {
            // SAFETY: the caller's promise.
            unsafe { accumulate::<2, 2>(a.add(32 * step), stride, b.add(1024 * step), 1) };
        }
    }
}

pub unsafe fn store<const R: usize, const C: usize>(to: *mut f32) {
    with_sums(|t| {
        for r in 0..R {
            for c in 0..C {
                for (q, row) in t[2 * r + c].iter().enumerate() {
                    // SAFETY: the caller's promise.
                    unsafe { to.add((16 * r + q) * 32 + 16 * c).cast::<[f32; 16]>().write(*row) };
                }
            }
        }
    });
}
