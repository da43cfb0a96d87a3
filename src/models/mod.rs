//! Whole models: layers stacked, weights by their published names, states, and the choice of tokens.

mod config;
pub mod decoder;
pub mod flash;
mod random;
pub mod sampling;
pub mod transformer;
pub mod transnormer_llm;
pub mod vision;

pub use decoder::{Architecture, Decoder, DecoderState};
pub use flash::{FlashLm, FlashLmConfig};
pub use sampling::{Generate, Sampler, SamplerConfig};
pub use transformer::{Transformer, TransformerConfig, TransformerState};
pub use transnormer_llm::{TransNormerConfig, TransNormerLlm, TransNormerState};
pub use vision::{
    CswinConfig, CswinStage, DeitConfig, PvtConfig, PvtStage, SwinConfig, SwinStage, VisionConfig,
    VisionTransformer,
};
