//! A backend bundles vectors and a matrix engine, and is the only door to code compiled for them.
//!
//! [`Backend::call`] and [`Backend::call_tiles`] enter a [`Kernel`] through a function that carries the
//! `target_feature`s. Everything below that door must inline; everything above it is ordinary code compiled for the
//! baseline. Entering costs about half a nanosecond, so kernels are entered per tile loop or per row. One that works on
//! vectors is compiled once per instruction set, one that chooses tiles once per engine.

use super::convert::{Convert, Generic};
#[cfg(target_arch = "aarch64")]
use super::convert_arm::NeonSteps;
#[cfg(target_arch = "x86_64")]
use super::convert_x86::{Avx512Bf16Steps, Avx512Steps, F16c};
use super::isa::Isa;
use super::lanes::Lanes;
use super::lanes_portable::Portable as PortableLanes;
use super::tiles::Tiles;
#[cfg(target_arch = "x86_64")]
use super::tiles_amx::Amx;
use super::tiles_f32::Fma;
use core::marker::PhantomData;

/// Work that is compiled for a backend. Implementations of `run` are `#[inline(always)]`.
pub trait Kernel<B: Backend> {
    /// What it returns.
    type Output;
    /// Does the work.
    fn run(self, b: B) -> Self::Output;
}

/// The function through which a kernel is entered on a backend. A method of kernels and not of backends, because the
/// compiler divides its work by the types that methods belong to: as methods of a backend, all kernels would be one part.
trait Enter<B: Backend>: Kernel<B> {
    /// Runs the kernel.
    ///
    /// # Safety
    /// The machine has the instructions of the backend.
    unsafe fn enter(self, b: B) -> Self::Output;
}

/// Work that spans many kernels and is generic over the backend: what the runtime dispatches.
pub trait Task {
    /// What it returns.
    type Output;
    /// Does the work; compiled for the baseline, enters kernels through [`Backend::call`].
    fn run<B: Backend>(self, b: B) -> Self::Output;
}

/// One instruction set with one matrix engine. A value of it proves that the machine has both.
pub trait Backend: Copy + Send + Sync + 'static {
    /// Its vectors.
    type L: Lanes;
    /// Its matrix engine.
    type T: Tiles<L = Self::L>;
    /// Its engine for products that feed an exponential, which turns absolute errors into relative ones.
    type S: Tiles<L = Self::L>;
    /// Its engine for operands in plain `f32`.
    type F: Tiles<L = Self::L, Elem = f32>;
    /// Its conversions between element types.
    type C: Convert;
    /// The backend of the same vectors that all engines of the instruction set share.
    type V: Backend<L = Self::L, V = Self::V>;
    /// The instruction set.
    const ISA: Isa;
    /// The printable name, `arch-type-variant`.
    const NAME: &'static str;

    /// The vector token.
    fn lanes(self) -> Self::L;
    /// The matrix token.
    fn tiles(self) -> Self::T;
    /// The matrix token for products that feed an exponential.
    fn scores(self) -> Self::S;
    /// The matrix token for operands in plain `f32`.
    fn plain(self) -> Self::F;
    /// The conversion token.
    fn convert(self) -> Self::C;
    /// This backend with its vectors only.
    fn vectors(self) -> Self::V;
    /// Runs `k`, which works on vectors, or with tiles that it was given, in code that all engines share.
    #[inline(always)]
    fn call<K: Kernel<Self::V>>(self, k: K) -> K::Output {
        self.vectors().call_tiles(k)
    }
    /// Runs `k`, which asks its backend for tiles, in code compiled for this backend.
    fn call_tiles<K: Kernel<Self>>(self, k: K) -> K::Output;
}

/// The baseline of the target; always available.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

impl Backend for Portable {
    type L = PortableLanes;
    type T = Fma<PortableLanes, 6, 2>;
    type S = Self::T;
    type F = Self::T;
    type C = Generic;
    type V = Self;
    const ISA: Isa = Isa::Portable;
    const NAME: &'static str = "portable-f32-wide-6x8";

    #[inline(always)]
    fn lanes(self) -> PortableLanes {
        PortableLanes
    }
    #[inline(always)]
    fn tiles(self) -> Self::T {
        Fma(PhantomData)
    }
    #[inline(always)]
    fn scores(self) -> Self::S {
        Fma(PhantomData)
    }
    #[inline(always)]
    fn plain(self) -> Self::F {
        Fma(PhantomData)
    }
    #[inline(always)]
    fn convert(self) -> Self::C {
        Generic
    }
    #[inline(always)]
    fn vectors(self) -> Self {
        self
    }
    #[inline(always)]
    fn call_tiles<K: Kernel<Self>>(self, k: K) -> K::Output {
        // SAFETY: every machine has its own baseline.
        unsafe { k.enter(self) }
    }
}

impl<K: Kernel<Portable>> Enter<Portable> for K {
    #[inline(never)]
    unsafe fn enter(self, b: Portable) -> K::Output {
        self.run(b)
    }
}

/// Declares a backend over a `pulp` token, entered with at least the features of that token.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! pulp_backend {
    (
        $(#[$doc:meta])* $name:ident, $token:ty, $isa:expr, $ready:expr, $label:literal,
        convert: $steps:ident x $n:literal,
        vectors: $vectors:ident, plain: $plain:ty, tiles: $tiles:ty = $tile:expr, scores: $scores:ty = $score:expr,
        features: $features:literal
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name(super::lanes_pulp::Pulp<$token>);

        impl $name {
            /// The backend, if this machine has its instructions.
            #[must_use]
            pub fn detect() -> Option<Self> {
                let ready = $isa.available() && $ready;
                // SAFETY: `available` checked CPUID and XCR0 for every feature of the token.
                ready.then(|| Self(super::lanes_pulp::Pulp(unsafe { <$token>::new_unchecked() })))
            }
        }

        impl<K: Kernel<$name>> Enter<$name> for K {
            #[target_feature(enable = $features)]
            #[inline(never)]
            unsafe fn enter(self, b: $name) -> K::Output {
                self.run(b)
            }
        }

        impl Backend for $name {
            type L = super::lanes_pulp::Pulp<$token>;
            type T = $tiles;
            type S = $scores;
            type F = $plain;
            type C = super::convert::Steps<$steps, $n>;
            type V = $vectors;
            const ISA: Isa = $isa;
            const NAME: &'static str = $label;

            #[inline(always)]
            fn lanes(self) -> Self::L {
                self.0
            }
            #[inline(always)]
            fn tiles(self) -> Self::T {
                $tile
            }
            #[inline(always)]
            fn scores(self) -> Self::S {
                $score
            }
            #[inline(always)]
            fn plain(self) -> Self::F {
                Fma(PhantomData)
            }
            #[inline(always)]
            fn convert(self) -> Self::C {
                // SAFETY: a value of this type exists only if the machine has the features of `enter`.
                super::convert::Steps(unsafe { $steps::new_unchecked(self.0.0) })
            }
            #[inline(always)]
            fn vectors(self) -> $vectors {
                $vectors(self.0)
            }
            #[inline(always)]
            fn call_tiles<K: Kernel<Self>>(self, k: K) -> K::Output {
                // SAFETY: a value of this type exists only if the machine has the features of `enter`.
                unsafe { k.enter(self) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
pulp_backend!(
    /// AVX2 and FMA: 6 x 16 register tiles.
    Avx2, pulp::x86::V3, Isa::Avx2, true, "x86_64-f32-avx2-6x16",
    convert: F16c x 8,
    vectors: Avx2, plain: Fma<Self::L, 6, 2>, tiles: Self::F = Fma(PhantomData), scores: Self::F = Fma(PhantomData),
    features: "sse3,ssse3,sse4.1,sse4.2,popcnt,avx,avx2,bmi1,bmi2,fma,lzcnt,f16c"
);

#[cfg(target_arch = "x86_64")]
pulp_backend!(
    /// AVX-512: 12 x 32 register tiles.
    Avx512, pulp::x86::V4, Isa::Avx512, true, "x86_64-f32-avx512-12x32",
    convert: Avx512Steps x 16,
    vectors: Avx512, plain: Fma<Self::L, 12, 2>, tiles: Self::F = Fma(PhantomData), scores: Self::F = Fma(PhantomData),
    features: "sse3,ssse3,sse4.1,sse4.2,popcnt,avx,avx2,bmi1,bmi2,fma,lzcnt,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"
);

#[cfg(target_arch = "x86_64")]
pulp_backend!(
    /// AMX with operands rounded to `bf16`: 32 x 32 sums in four tiles. Scores that feed an exponential are split.
    AmxBf16, pulp::x86::V4, Isa::Amx, super::amx::permitted(), "x86_64-bf16-amx-32x32",
    convert: Avx512Bf16Steps x 16,
    vectors: Avx512, plain: Fma<Self::L, 12, 2>, tiles: Amx<1> = Amx(()), scores: Amx<2> = Amx(()),
    features: "sse3,ssse3,sse4.1,sse4.2,popcnt,avx,avx2,bmi1,bmi2,fma,lzcnt,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16"
);

#[cfg(target_arch = "x86_64")]
pulp_backend!(
    /// AMX with operands split into two `bf16` each; scores that feed an exponential in `f32`.
    AmxBf16x3, pulp::x86::V4, Isa::Amx, super::amx::permitted(), "x86_64-bf16x3-amx-32x32",
    convert: Avx512Bf16Steps x 16,
    vectors: Avx512, plain: Fma<Self::L, 12, 2>, tiles: Amx<2> = Amx(()), scores: Self::F = Fma(PhantomData),
    features: "sse3,ssse3,sse4.1,sse4.2,popcnt,avx,avx2,bmi1,bmi2,fma,lzcnt,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16"
);

#[cfg(target_arch = "aarch64")]
pulp_backend!(
    /// NEON: 6 x 16 register tiles.
    Neon, pulp::aarch64::Neon, Isa::Neon, true, "aarch64-f32-neon-6x16",
    convert: NeonSteps x 4,
    vectors: Neon, plain: Fma<Self::L, 6, 4>, tiles: Self::F = Fma(PhantomData), scores: Self::F = Fma(PhantomData),
    features: "neon"
);
