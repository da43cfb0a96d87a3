//! Layers: configuration, weights packed once, forward, state.

pub mod affine;
pub mod agent1d;
mod agent_bias;
mod agent_sd;
mod block;
mod conv2d;
pub mod cross_entropy;
mod depthwise;
mod feed_forward;
pub mod flash;
mod gla;
mod linear;
mod maps;
mod minimax_lightning;
mod mlp;
mod norm;
mod parameters;
pub mod pointwise;
mod resample;
mod rotary;
mod rows;
mod self_attention;
mod sglu;
mod transformer_block;
mod transnormer_block;
pub mod vision;
mod weights;

pub use crate::kernels::activation::Activation;
pub use agent_bias::{AgentBias, AgentBiasTables};
pub use agent_sd::{AgentSdAttention, AgentSdConfig};
pub use block::Block;
pub use conv2d::{Channels, Conv2d, Conv2dConfig};
pub use depthwise::{DepthwiseConfig, DepthwiseConv2d, DepthwiseGradients};
pub use feed_forward::{FeedForward, FeedForwardConfig};
pub use flash::{
    Flash, FlashConfig, FlashState, Gau, GauConfig, GauState, RelativeBias, ScaledSinusoid,
};
pub use gla::{GatedLinearAttention, GlaConfig};
pub use linear::Linear;
pub use minimax_lightning::{MiniMaxConfig, MiniMaxLightning};
pub use mlp::{Mlp, MlpConfig};
pub use norm::{Norm, NormGradients};
pub use parameters::Parameters;
pub use resample::Resample;
pub use rotary::{Lrpe, Positions, Rope, RopeStyle};
pub use self_attention::{Mechanism, SelfAttention, SelfAttentionConfig, SelfAttentionState};
pub use sglu::{Sglu, SgluConfig};
pub use transformer_block::TransformerBlock;
pub use transnormer_block::TransNormerBlock;
pub use weights::WeightFormat;
