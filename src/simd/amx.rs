//! The instructions of AMX, which stable Rust knows as assembly only, and the state that they need.

use super::tiles_amx::Amx;
use core::arch::asm;
use core::marker::PhantomData;
use half::bf16;

/// Whether the operating system lets this process use tiles. Asks for it: the permission is the process's, for all its
/// threads, and asking again changes nothing.
#[must_use]
pub fn permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_PRCTL: usize = 158;
        const REQUEST: usize = 0x1023;
        const TILE_DATA: usize = 18;
        let answer: isize;
        // SAFETY: a system call without memory operands; it clobbers rcx and r11.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => answer,
                in("rdi") REQUEST,
                in("rsi") TILE_DATA,
                out("rcx") _,
                out("r11") _,
                options(nostack)
            );
        }
        answer == 0
    }
    // Elsewhere nobody is known to grant it.
    #[cfg(not(target_os = "linux"))]
    false
}

/// The operand of `ldtilecfg`: palette, start row, bytes per row and rows of every tile.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Config {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    const NONE: Config =
        Config { palette: 0, start: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };

    /// Eight tiles of 16 rows by 64 bytes.
    fn ours() -> Self {
        let mut c = Config { palette: 1, ..Self::NONE };
        c.bytes[..8].fill(64);
        c.rows[..8].fill(16);
        c
    }

    /// # Safety
    /// The process may use AMX, and `self` is a valid configuration.
    unsafe fn load(&self) {
        // SAFETY: as for this function.
        unsafe { asm!("ldtilecfg [{}]", in(reg) self, options(nostack, readonly)) }
    }
}

/// The tile configuration of this thread, from creation to drop. What was configured before, by whomever, is
/// configured again afterwards. Sessions inside of another one leave everything as it is, so that it does not matter
/// which of those that end together is dropped first.
#[derive(Debug)]
pub struct Session {
    /// What is to be configured again.
    before: Option<Config>,
    /// Tiles belong to a thread.
    here: PhantomData<*const ()>,
}

impl Session {
    pub(super) fn new<const PARTS: usize>(_: Amx<PARTS>) -> Self {
        let (mut before, ours) = (Config::NONE, Config::ours());
        // SAFETY: a value of `Amx` proves that the process may use tiles.
        unsafe {
            asm!("sttilecfg [{}]", in(reg) &raw mut before, options(nostack));
            if before != ours {
                ours.load();
            }
        }
        Self { before: (before != ours).then_some(before), here: PhantomData }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: a session proves that the process may use tiles; `before` was a configuration in use.
        unsafe {
            match self.before {
                None => {}
                Some(Config { palette: 0, .. }) => {
                    asm!("tilerelease", options(nostack, nomem));
                }
                Some(before) => before.load(),
            }
        }
    }
}

/// Tiles 0 to 3, the sums, become zero.
///
/// # Safety
/// A [`Session`] is held.
#[inline(always)]
pub unsafe fn zero() {
    // SAFETY: as for this function.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack));
    }
}

/// Adds `steps` times 32 steps of the shared dimension to `R` by `C` tiles of sums. Rows of `a` are `stride` bytes
/// apart, the second tile 16 rows below the first; row pairs of `b` are 128 bytes apart, the second tile beside the
/// first.
///
/// # Safety
/// A [`Session`] is held, `steps > 0`, and all of these elements are readable.
#[inline(always)]
pub unsafe fn accumulate<const R: usize, const C: usize>(
    a: *const bf16,
    stride: usize,
    b: *const bf16,
    steps: usize,
) {
    macro_rules! looped {
        ($($body:literal),*) => {
            asm!(
                "2:",
                $($body,)*
                "add {a}, 64",
                "add {below}, 64",
                "add {b}, 2048",
                "dec {n}",
                "jnz 2b",
                a = inout(reg) a => _,
                below = inout(reg) a.wrapping_byte_add(16 * stride) => _,
                s = in(reg) stride,
                b = inout(reg) b => _,
                t = in(reg) 128usize,
                n = inout(reg) steps => _,
                options(nostack, readonly)
            )
        };
    }
    // SAFETY: as for this function.
    unsafe {
        match (R, C) {
            (2, 2) => looped!(
                "tileloadd tmm6, [{b} + {t}]",
                "tileloadd tmm4, [{a} + {s}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {t} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{below} + {s}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7"
            ),
            (2, _) => looped!(
                "tileloadd tmm6, [{b} + {t}]",
                "tileloadd tmm4, [{a} + {s}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{below} + {s}]",
                "tdpbf16ps tmm2, tmm5, tmm6"
            ),
            (_, 2) => looped!(
                "tileloadd tmm6, [{b} + {t}]",
                "tileloadd tmm4, [{a} + {s}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {t} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7"
            ),
            _ => looped!(
                "tileloadd tmm6, [{b} + {t}]",
                "tileloadd tmm4, [{a} + {s}]",
                "tdpbf16ps tmm0, tmm4, tmm6"
            ),
        }
    }
}

/// [`accumulate`] with two by two tiles of operands in two parts: their products but for that of the second ones, every
/// tile loaded once.
///
/// # Safety
/// As for [`accumulate`], for both parts of both operands.
#[inline(always)]
pub unsafe fn accumulate_split(
    [a, a_rest]: [*const bf16; 2],
    stride: usize,
    [b, b_rest]: [*const bf16; 2],
    steps: usize,
) {
    // SAFETY: as for this function.
    unsafe {
        asm!(
            "2:",
            "tileloadd tmm6, [{b} + {t}]",
            "tileloadd tmm4, [{ar} + {s}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {t} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{ar_below} + {s}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm4, [{a} + {s}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a_below} + {s}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm6, [{br} + {t}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{br} + {t} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 64",
            "add {a_below}, 64",
            "add {ar}, 64",
            "add {ar_below}, 64",
            "add {b}, 2048",
            "add {br}, 2048",
            "dec {n}",
            "jnz 2b",
            a = inout(reg) a => _,
            a_below = inout(reg) a.wrapping_byte_add(16 * stride) => _,
            ar = inout(reg) a_rest => _,
            ar_below = inout(reg) a_rest.wrapping_byte_add(16 * stride) => _,
            s = in(reg) stride,
            b = inout(reg) b => _,
            br = inout(reg) b_rest => _,
            t = in(reg) 128usize,
            n = inout(reg) steps => _,
            options(nostack, readonly)
        );
    }
}

/// Writes `R` by `C` tiles of sums as rows 128 bytes apart.
///
/// # Safety
/// A [`Session`] is held, and `16 * R` such rows may be written at `to`.
#[inline(always)]
pub unsafe fn store<const R: usize, const C: usize>(to: *mut f32) {
    // SAFETY: as for this function.
    unsafe {
        asm!("tilestored [{c} + {t}], tmm0", c = in(reg) to, t = in(reg) 128usize, options(nostack));
        if C == 2 {
            asm!("tilestored [{c} + {t} + 64], tmm1", c = in(reg) to, t = in(reg) 128usize, options(nostack));
        }
        if R == 2 {
            asm!("tilestored [{c} + {t} + 2048], tmm2", c = in(reg) to, t = in(reg) 128usize, options(nostack));
        }
        if R == 2 && C == 2 {
            asm!("tilestored [{c} + {t} + 2112], tmm3", c = in(reg) to, t = in(reg) 128usize, options(nostack));
        }
    }
}
