#![doc = include_str!("../README.md")]
#![cfg_attr(not(feature = "std"), no_std)]
#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs)]

extern crate alloc;

pub mod attention;
#[cfg(feature = "candle")]
pub mod candle;
#[cfg(all(doctest, feature = "candle"))]
#[doc = include_str!("../docs/candle.md")]
mod training {}
pub mod error;
pub mod io;
pub mod kernels;
pub mod layers;
pub mod models;
pub mod runtime;
pub mod scratch;
pub mod simd;
pub mod tensor;

pub use error::{Error, Result};
pub use runtime::{Precision, Runtime};
pub use simd::Isa;
