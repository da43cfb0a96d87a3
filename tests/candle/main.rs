//! The bridge to candle: gradients of operations with strided tensors and all element types, and the layers against
//! the case files.

mod angles;
#[path = "../conformance/case.rs"]
#[allow(dead_code)] // the other program that reads cases needs more of them
mod case;
mod layers;
mod operations;
#[path = "../support/mod.rs"]
mod support;
