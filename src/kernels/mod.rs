//! Building blocks of the operations: blocked products, reductions, norms, recurrences.
//!
//! Kernels are safe code over [`Lanes`](crate::simd::Lanes) and [`Tiles`](crate::simd::Tiles), know neither
//! instruction sets nor threads, and trust their callers to have checked every argument: a wrong one panics.

pub mod activation;
pub mod agent;
pub mod ahead;
pub mod attend;
pub mod chunk;
pub mod decay;
pub mod depthwise;
pub mod depthwise_backward;
pub mod elementwise;
pub mod entropy;
pub mod favor;
pub mod favor_backward;
pub mod feature_map;
pub mod focus;
pub mod focus_backward;
pub mod gemm;
pub mod linear;
pub mod maps;
pub mod mixed_chunk;
pub mod norm;
pub mod norm_backward;
pub mod packed;
pub mod pairs;
pub mod pool;
pub mod quadratic;
pub mod recurrence;
pub mod resample;
pub mod rotary;
pub mod rows;
pub mod slope;
pub mod softmax;
pub mod staging;
pub mod store;
