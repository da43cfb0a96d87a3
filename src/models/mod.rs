//! Whole models: layers stacked, weights by their published names, states, and the choice of tokens.

pub mod sampling;
pub mod transnormer_llm;

pub use sampling::{Generate, Sampler, SamplerConfig};
pub use transnormer_llm::{TransNormerConfig, TransNormerLlm, TransNormerState};
