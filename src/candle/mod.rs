//! Training with [candle]: the operations of this crate as differentiable functions of candle's tensors, and layers of
//! them.
//!
//! Functions take an [`Arc<Runtime>`](crate::Runtime) and CPU tensors of `f32`, `bf16` or `f16`, with any strides and start
//! offset; the shapes are those of the operation underneath. Gradients are computed by the backward pass of the same
//! operation, which saves nothing and recomputes what it needs. What the operation refuses comes back as an error of candle
//! that says the same. Layers read their parameters from a `VarBuilder` under the names of published checkpoints; most are
//! one operation each, which keeps what lies between for its backward pass.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use linattn::Runtime;
//! use std::sync::Arc;
//! let (rt, cpu) = (Arc::new(Runtime::new()?), Device::Cpu);
//! let x = Tensor::randn(0f32, 1.0, (2, 5, 8), &cpu)?;
//! let weight = Var::randn(0f32, 1.0, (3, 8), &cpu)?;
//! let loss = linattn::candle::linear(&rt, &x, &weight, None)?.sqr()?.sum_all()?;
//! let gradient = loss.backward()?.get(&weight).cloned().expect("a gradient");
//! assert_eq!(gradient.dims(), [3, 8]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [candle]: https://github.com/huggingface/candle

mod activation;
mod attention;
mod call;
mod depthwise;
mod feed_forward;
mod flash;
mod gla;
mod layer;
mod linear;
mod loss;
mod minimax;
mod norm;
mod packed;
mod positions;
mod self_attention;
mod transformer;
mod transnormer;
mod vision;

pub use activation::{activate, gate};
pub use attention::{Attention, attend};
pub use depthwise::depthwise;
pub use flash::{Flash, FlashLm, Gau, mixed_chunk, quadratic};
pub use linear::{Linear, linear};
pub use loss::cross_entropy;
pub use minimax::MiniMaxLightning;
pub use norm::{layer_norm, rms_norm, scale_norm, srms_norm};
pub use packed::{AgentBiases, agent, attend_biased, focused};
pub use positions::{lrpe, rope};
pub use transformer::{Transformer, TransformerBlock};
pub use transnormer::{GatedLinearAttention, Sglu, TransNormerBlock, TransNormerLlm};
pub use vision::VisionAttention;

/// What candle's functions return.
pub type Result<T> = candle_core::Result<T>;

/// An error of this crate as one of candle.
fn wrap(e: crate::Error) -> candle_core::Error {
    candle_core::Error::wrap(e)
}
