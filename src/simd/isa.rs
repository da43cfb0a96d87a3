//! Which instruction sets exist and which of them this machine has.
//!
//! Detection is our own, by CPUID and XCR0, with and without `std`: an instruction set counts only when the
//! operating system saves its registers.

use crate::error::{Error, Result};
use alloc::string::{String, ToString};
use core::fmt;

/// A level of vector instructions. Ordered within one architecture: a later one includes the earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// What every CPU of the target has (SSE2 on x86-64).
    Portable,
    /// AArch64 Advanced SIMD, 128 bits.
    Neon,
    /// AVX2 + FMA + F16C, 256 bits.
    Avx2,
    /// AVX-512 F, BW, CD, DQ, VL; with the feature `avx512`.
    Avx512,
    /// AVX-512 with BF16, and AMX tiles with BF16 products. Only products whose precision permits it use the tiles;
    /// everything else is as with [`Avx512`](Isa::Avx512). With the feature `amx`.
    Amx,
}

impl Isa {
    /// All instruction sets the crate knows, weakest first.
    pub const ALL: [Isa; 5] = [Isa::Portable, Isa::Neon, Isa::Avx2, Isa::Avx512, Isa::Amx];

    /// The fixed lower-case name, as `LINATTN_ISA` spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }

    /// Whether this machine, with this operating system, can run it, and this build has it.
    #[must_use]
    pub fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => cfg!(target_feature = "neon"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => probe::levels() >= 1,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => cfg!(feature = "avx512") && probe::levels() >= 2,
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => cfg!(feature = "amx") && probe::levels() >= 3,
            #[allow(unreachable_patterns)] // each architecture leaves the others' arms to this one
            _ => false,
        }
    }

    /// The instruction sets this machine has, weakest first.
    pub fn detected() -> impl Iterator<Item = Isa> {
        Self::ALL.into_iter().filter(|i| i.available())
    }

    /// The strongest one this machine has.
    #[must_use]
    pub fn best() -> Isa {
        Self::detected().last().unwrap_or(Isa::Portable)
    }

    /// Reads a name; [`Error::Isa`] for an unknown one or one that this machine lacks.
    pub fn parse(name: &str) -> Result<Isa> {
        Self::ALL
            .into_iter()
            .find(|i| i.name() == name && i.available())
            .ok_or_else(|| Self::refuse(name))
    }

    pub(crate) fn refuse(requested: &str) -> Error {
        let mut available = String::new();
        for i in Self::detected() {
            if !available.is_empty() {
                available.push_str(", ");
            }
            available.push_str(i.name());
        }
        Error::Isa { requested: requested.to_string(), available }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(target_arch = "x86_64")]
mod probe {
    use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    use core::sync::atomic::{AtomicU8, Ordering};

    const UNKNOWN: u8 = u8::MAX;
    static LEVEL: AtomicU8 = AtomicU8::new(UNKNOWN);

    /// 0: baseline only, 1: AVX2 class, 2: AVX-512 class, 3: AMX as well. Probed once.
    pub fn levels() -> u8 {
        let known = LEVEL.load(Ordering::Relaxed);
        if known != UNKNOWN {
            return known;
        }
        let level = detect();
        LEVEL.store(level, Ordering::Relaxed);
        level
    }

    fn has(word: u32, bits: &[u32]) -> bool {
        bits.iter().all(|b| word >> b & 1 == 1)
    }

    #[target_feature(enable = "xsave")]
    fn xcr0() -> u64 {
        // SAFETY: called only after CPUID reported OSXSAVE; register 0 always exists then.
        unsafe { _xgetbv(0) }
    }

    fn detect() -> u8 {
        if __cpuid(0).eax < 7 {
            return 0;
        }
        let (one, seven) = (__cpuid(1), __cpuid_count(7, 0));
        let ext = if __cpuid(0x8000_0000).eax > 0x8000_0000 { __cpuid(0x8000_0001).ecx } else { 0 };
        // FMA, SSE4.1, SSE4.2, POPCNT, XSAVE, OSXSAVE, AVX, F16C; SSE3 and SSSE3.
        if !has(one.ecx, &[12, 19, 20, 23, 26, 27, 28, 29, 0, 9]) {
            return 0;
        }
        // SAFETY: XSAVE and OSXSAVE (bits 26 and 27) were just checked.
        let saved = unsafe { xcr0() };
        let (ymm, zmm) = (saved & 0x6 == 0x6, saved & 0xe6 == 0xe6);
        // AVX2, BMI1, BMI2 and LZCNT.
        if !ymm || !has(seven.ebx, &[5, 3, 8]) || !has(ext, &[5]) {
            return 0;
        }
        // AVX-512 F, DQ, CD, BW, VL.
        if !zmm || !has(seven.ebx, &[16, 17, 28, 30, 31]) {
            return 1;
        }
        // AMX-BF16 and AMX-TILE; AVX512-BF16; the state of tiles and of their configuration.
        let more = if seven.eax >= 1 { __cpuid_count(7, 1).eax } else { 0 };
        let tiles = has(seven.edx, &[22, 24]) && has(more, &[5]);
        if tiles && saved >> 17 & 3 == 3 { 3 } else { 2 }
    }
}
