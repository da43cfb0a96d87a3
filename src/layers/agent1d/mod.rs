//! Agent attention for sequences: agents that are learned, heads that talk, gates.

mod attention;
mod step;
mod transformer;

pub use attention::{AgentSelfAttention, AgentSelfAttentionConfig, SequenceExtra};
pub use transformer::{AgentTransformer, AgentTransformerConfig};

/// Refuses sizes of nothing or beyond reason.
fn size(op: &'static str, arg: &'static str, n: usize) -> crate::Result<()> {
    super::vision::size(op, arg, n)
}
