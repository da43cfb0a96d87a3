//! Layers of vision transformers: blocks whose tokens are the places of a map.

mod agent;
mod attention;
mod block;
mod config;
mod focused;
mod local;
mod look;
mod map_attention;
mod merging;
mod relative;
mod windows;

pub use attention::VisionAttention;
pub use block::{VisionBlock, VisionBlockConfig};
pub(super) use config::size;
pub use config::{FocusedChoices, MapAttentionConfig, Mechanism, Scope, VisionAttentionConfig};
pub use map_attention::MapAttention;
pub use merging::PatchMerging;
