//! x
#![cfg_attr(not(feature = "std"), no_std)]
extern crate alloc;
pub mod attention;
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
