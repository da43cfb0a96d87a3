//! Element types of tensors.

use crate::simd::Storage;
use crate::simd::convert::Generic;
use half::{bf16, f16};

/// Names an element type at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// The upper half of an `f32`.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl DType {
    /// The lower-case name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
        }
    }
}

mod sealed {
    /// Keeps the list of element types closed.
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// A type that tensors can hold: `f32`, [`bf16`] or [`f16`](struct@f16). All arithmetic is in `f32`.
pub trait Element: sealed::Sealed + Storage {
    /// Its name.
    const DTYPE: DType;

    /// One value, exact.
    #[must_use]
    fn to_f32(self) -> f32 {
        let mut out = [0.0];
        Self::widen(Generic, &[self], &mut out);
        out[0]
    }
    /// One value, rounded.
    #[must_use]
    fn from_f32(x: f32) -> Self {
        let mut out = [Self::default()];
        Self::narrow(Generic, &[x], &mut out);
        out[0]
    }
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
}
