//! What attention without softmax does to scores, as arguments.

use crate::error::{Error, Result};
use crate::kernels::quadratic::Bias;

/// A factor that may depend on the length of the sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Factor {
    /// This number.
    Value(f32),
    /// One over the number of keys of the call.
    InvLen,
}

impl Factor {
    pub(crate) fn check(self, op: &'static str, arg: &'static str) -> Result<Self> {
        match self {
            Factor::Value(x) if !x.is_finite() => Err(Error::value(op, arg, "finite", x)),
            _ => Ok(self),
        }
    }

    /// The factor for a number of keys.
    #[must_use]
    pub fn of(self, len: usize) -> f32 {
        match self {
            Factor::Value(x) => x,
            Factor::InvLen => (1.0 / len.max(1) as f64) as f32,
        }
    }
}

/// Refuses a bias that does not reach queries at positions below `i` and keys below `j`.
pub(crate) fn check_bias(op: &'static str, bias: &Bias<'_>, [i, j]: [usize; 2]) -> Result<()> {
    if let Some(table) = bias.table {
        let most = i.max(j).max(1);
        // Half of the table: 2 n - 1 may be beyond usize.
        if table.len().is_multiple_of(2) || table.len() / 2 < most - 1 {
            let expected = alloc::format!("2 n - 1 numbers with n at least {most}");
            return Err(Error::shape(op, "bias.table", expected, [table.len()]));
        }
    }
    match bias.matrix.map(|m| m.shape()) {
        Some(got) if got != [i, j] => {
            let expected = alloc::format!("[queries, keys] = {:?}", [i, j]);
            Err(Error::shape(op, "bias.matrix", expected, got))
        }
        _ => Ok(()),
    }
}
