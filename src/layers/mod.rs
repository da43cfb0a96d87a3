//! Layers: configuration, weights packed once, forward, state.

mod block;
mod gla;
mod linear;
mod minimax_lightning;
mod norm;
mod rotary;
mod rows;
mod sglu;
mod transnormer_block;
mod weights;

pub use crate::kernels::activation::Activation;
pub use block::Block;
pub use gla::{GatedLinearAttention, GlaConfig};
pub use linear::Linear;
pub use minimax_lightning::{MiniMaxConfig, MiniMaxLightning};
pub use norm::Norm;
pub use rotary::{Lrpe, Positions, Rope, RopeStyle};
pub use sglu::{Sglu, SgluConfig};
pub use transnormer_block::TransNormerBlock;
pub use weights::WeightFormat;
