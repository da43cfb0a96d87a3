//! The language models of the examples, by name.

use clap::ValueEnum;
use linattn::attention::combiner::Variant;
use linattn::attention::performer::default_features;
use linattn::models::transformer::{
    AttentionKind, FeedForwardKind, NormKind, PerformerKernel, TransformerConfig,
};
use linattn::models::{Architecture, FlashLmConfig, TransNormerConfig};

/// Tokens are bytes.
const BYTES: usize = 256;
/// Width of a head.
const HEAD: usize = 64;

/// A kind of language model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Arch {
    /// Lightning Attention with SGLU.
    Transnormer,
    /// Mixed chunk attention in gated layers, two for a block of the others.
    Flash,
    /// The same with the whole text in one chunk.
    FlashQuad,
    /// RMSNorm, rotary positions, SwiGLU, softmax attention.
    TransformerPp,
    /// LayerNorm, an MLP with GELU, softmax attention, no positions.
    Transformer,
    /// Transformer++ with random features (ReLU kernel) in place of softmax.
    Performer,
    /// Transformer++ with summaries of segments in place of distant keys.
    Combiner,
}

/// What is done with a model, whatever its kind.
pub trait Visit {
    /// What comes of it.
    type Output;
    /// Does it.
    fn visit<C: Architecture>(self, config: C) -> Self::Output;
}

impl Arch {
    /// A model of bytes with `depth` blocks of width `dim`, at least that of one head, for texts of up to `longest`.
    pub fn visit<V: Visit>(self, dim: usize, depth: usize, longest: usize, what: V) -> V::Output {
        let heads = (dim / HEAD).max(1);
        let plus = TransformerConfig::plus_plus(BYTES, dim, depth, heads, 4 * dim);
        match self {
            Self::Transnormer => {
                what.visit(TransNormerConfig::sized(BYTES, dim, depth, heads, 11 * dim / 4))
            }
            Self::Flash => what.visit(FlashLmConfig::sized(BYTES, dim, 2 * depth)),
            Self::FlashQuad => what.visit(FlashLmConfig {
                group_size: longest,
                ..FlashLmConfig::sized(BYTES, dim, 2 * depth)
            }),
            Self::TransformerPp => what.visit(plus),
            Self::Transformer => what.visit(TransformerConfig {
                ffn: FeedForwardKind::Gelu,
                norm: NormKind::Layer,
                eps: 1e-5,
                rope: None,
                bias: true,
                ..plus
            }),
            Self::Performer => {
                let features = default_features(dim / heads);
                let attention =
                    AttentionKind::Performer { features, kernel: PerformerKernel::Relu };
                what.visit(TransformerConfig { attention, ..plus })
            }
            Self::Combiner => {
                let attention = AttentionKind::Combiner { variant: Variant::Fixed, segment: 64 };
                what.visit(TransformerConfig { attention, ..plus })
            }
        }
    }
}
