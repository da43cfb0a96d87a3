//! The one error type of the crate.
//!
//! Every variant says which operation complained, about which argument, what it expected and what came,
//! so that the message alone is enough to act on.

use alloc::string::{String, ToString};
use core::fmt::{Debug, Display};

/// Shorthand for results of this crate.
pub type Result<T> = core::result::Result<T, Error>;

/// Why a call was refused. A refused call leaves its outputs and states as they were.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong shape.
    #[error("{op}: `{arg}` has shape {got}, expected {expected}")]
    Shape {
        /// The operation that refused.
        op: &'static str,
        /// The offending argument.
        arg: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// Strides, bounds or overlap of a view do not describe valid memory.
    #[error("{op}: `{arg}` has an invalid layout: expected {expected}, got {got}")]
    Layout {
        /// The operation that refused.
        op: &'static str,
        /// The offending argument.
        arg: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// An argument has a value outside of its domain (NaN slope, zero heads, top-p above 1 ...).
    #[error("{op}: `{arg}` must be {expected}, got {got}")]
    Value {
        /// The operation that refused.
        op: &'static str,
        /// The offending argument.
        arg: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// The requested instruction set or engine is not available on this machine.
    #[error("instruction set: `{requested}` was requested, this machine offers {available}")]
    Isa {
        /// The instruction set that was asked for.
        requested: String,
        /// What the machine offers.
        available: String,
    },
    /// A checkpoint lacks a tensor, or holds one of the wrong shape or element type.
    #[error("checkpoint: tensor `{tensor}`: expected {expected}, got {got}")]
    Checkpoint {
        /// Name of the tensor (or of the file part) in question.
        tensor: String,
        /// What would have been accepted.
        expected: String,
        /// What was found.
        got: String,
    },
    /// A configuration key is missing, malformed, or asks for something unknown.
    #[error("config: key `{key}`: expected {expected}, got {got}")]
    Config {
        /// The key in question.
        key: String,
        /// What would have been accepted.
        expected: String,
        /// What was found.
        got: String,
    },
    /// A saved state does not belong to this model or format.
    #[error("state: `{field}`: expected {expected}, got {got}")]
    State {
        /// The field in question.
        field: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was found.
        got: String,
    },
    /// Memory for an input-sized buffer could not be had.
    #[error("{op}: could not allocate {bytes} bytes")]
    Alloc {
        /// The operation that asked for memory.
        op: &'static str,
        /// How much it asked for.
        bytes: usize,
    },
    /// The operating system refused a read or a write.
    #[cfg(feature = "std")]
    #[error("{path}: {source}")]
    Io {
        /// The file in question.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// A [`Error::Shape`] from anything printable.
    pub(crate) fn shape(
        op: &'static str,
        arg: &'static str,
        expected: impl Display,
        got: impl Debug,
    ) -> Self {
        Self::Shape { op, arg, expected: expected.to_string(), got: alloc::format!("{got:?}") }
    }

    /// A [`Error::Value`] from anything printable.
    pub(crate) fn value(
        op: &'static str,
        arg: &'static str,
        expected: impl Display,
        got: impl Display,
    ) -> Self {
        Self::Value { op, arg, expected: expected.to_string(), got: got.to_string() }
    }

    /// A [`Error::Layout`] from anything printable.
    pub(crate) fn layout(
        op: &'static str,
        arg: &'static str,
        expected: impl Display,
        got: impl Display,
    ) -> Self {
        Self::Layout { op, arg, expected: expected.to_string(), got: got.to_string() }
    }
}

/// Refuses `got` unless it equals `expected`; `letters` names the dimensions in the message.
pub(crate) fn expect_shape<const N: usize>(
    op: &'static str,
    arg: &'static str,
    letters: &str,
    expected: [usize; N],
    got: [usize; N],
) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::shape(op, arg, alloc::format!("{letters} = {expected:?}"), got))
}
