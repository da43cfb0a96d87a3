//! The factor of queries.

use crate::error::{Error, Result};

/// By what queries are multiplied.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Scale {
    /// Nothing.
    One,
    /// `dk^-1/2`, where `dk` is the width of queries and keys.
    InvSqrtDim,
    /// This number.
    Value(f32),
}

impl Scale {
    pub(crate) fn check(self, op: &'static str) -> Result<Self> {
        match self {
            Scale::Value(x) if !x.is_finite() => Err(Error::value(op, "scale", "finite", x)),
            _ => Ok(self),
        }
    }

    /// The factor for a width.
    #[must_use]
    pub fn of(self, dk: usize) -> f32 {
        match self {
            Scale::One => 1.0,
            Scale::InvSqrtDim => libm::pow(dk.max(1) as f64, -0.5) as f32,
            Scale::Value(x) => x,
        }
    }
}
