//! Attention operations on views: validation, division into tasks, and the choice of a form.
//!
//! Every mechanism has a folder with its `f64` definition (`naive`) beside the fast forms. Shapes are
//! `[batch, len, heads, dim]` throughout; outer strides are free.

pub mod agent;
mod backward;
mod cache;
pub mod combiner;
pub mod focused;
pub mod lightning;
pub mod linear;
mod mask;
pub mod merge;
pub mod mixed_chunk;
mod pairs;
pub mod performer;
pub mod quadratic;
mod scale;
pub mod softmax;
mod state;

pub use backward::{Gradients, Inputs};
pub use cache::KvCache;
pub use mask::Mask;
pub use scale::Scale;
pub use state::{State, StreamState};
