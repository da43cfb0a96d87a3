//! DeiT: one stage and a class token.

use super::super::plan::{Blocks, Embed, Plan, Positions, Stage, numbers, refuse, sizes};
use super::{ALL, agent, focused};
use crate::error::Result;
use crate::layers::Conv2dConfig;
use crate::layers::vision::{Mechanism, Scope};
use alloc::vec;
use alloc::vec::Vec;

/// Sizes and choices of a DeiT (arXiv 2012.12877), of Agent-DeiT (2312.08874) and FLatten-DeiT (2308.00442).
#[derive(Clone, Debug, PartialEq)]
pub struct DeitConfig {
    /// Height and width of images.
    pub image: usize,
    /// Height and width of a patch.
    pub patch: usize,
    /// Channels of images.
    pub channels: usize,
    /// Number of classes.
    pub classes: usize,
    /// Width of tokens.
    pub dim: usize,
    /// Heads of every block.
    pub heads: usize,
    /// Width inside of channel mixers, relative to `dim`.
    pub mlp_ratio: f32,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Of all norms.
    pub norm_eps: f32,
    /// What mixes the tokens of each block.
    pub blocks: Vec<Mechanism>,
}

impl DeitConfig {
    /// Twelve blocks over an image of 224 x 224 in patches of 16 x 16, all of one mechanism.
    #[must_use]
    pub fn sized(dim: usize, heads: usize, mechanism: Mechanism) -> Self {
        Self {
            image: 224,
            patch: 16,
            channels: 3,
            classes: 1000,
            dim,
            heads,
            mlp_ratio: 4.0,
            qkv_bias: true,
            norm_eps: 1e-6,
            blocks: vec![mechanism; 12],
        }
    }

    /// DeiT-T.
    #[must_use]
    pub fn tiny() -> Self {
        Self::sized(192, 3, Mechanism::Softmax)
    }

    /// DeiT-S.
    #[must_use]
    pub fn small() -> Self {
        Self::sized(384, 6, Mechanism::Softmax)
    }

    /// DeiT-B.
    #[must_use]
    pub fn base() -> Self {
        Self::sized(768, 12, Mechanism::Softmax)
    }

    /// Agent-DeiT-T: 49 agents in all blocks.
    #[must_use]
    pub fn agent_tiny() -> Self {
        Self::sized(192, 3, agent(49))
    }

    /// Agent-DeiT-S: 49 agents in all blocks.
    #[must_use]
    pub fn agent_small() -> Self {
        Self::sized(384, 6, agent(49))
    }

    /// Agent-DeiT-B: 81 agents in the first four blocks, softmax attention in the others.
    #[must_use]
    pub fn agent_base() -> Self {
        let mut config = Self::base();
        config.blocks[..4].fill(agent(81));
        config
    }

    /// FLatten-DeiT-T: focusing factor 3 and a 5 x 5 convolution in all blocks.
    #[must_use]
    pub fn flatten_tiny() -> Self {
        Self::sized(192, 3, focused())
    }

    /// The same model for images of another size, a multiple of the patch.
    #[must_use]
    pub fn with_image(self, image: usize) -> Self {
        Self { image, ..self }
    }

    pub(in super::super) fn plan(&self) -> Result<Plan> {
        let Self { image, patch, channels, classes, dim, heads, mlp_ratio, qkv_bias, .. } = *self;
        let (norm_eps, depth) = (self.norm_eps, self.blocks.len());
        sizes(&[("img_size", image), ("patch_size", patch), ("in_chans", channels)])?;
        sizes(&[("embed_dim", dim), ("num_heads", heads), ("depth", depth)])?;
        sizes(&[("num_classes", classes)])?;
        numbers(&[("mlp_ratio", mlp_ratio), ("norm_eps", norm_eps)])?;
        if !image.is_multiple_of(patch) {
            return Err(refuse("img_size", alloc::format!("a multiple of {patch}"), image));
        }
        let map = [image / patch; 2];
        let common = Blocks { dim, heads, map, mlp_ratio, qkv_bias, norm_eps };
        let scope = Scope::Whole { class_token: true };
        let blocks = self.blocks.iter().enumerate();
        let blocks = blocks.map(|(i, m)| (alloc::format!("blocks.{i}"), common.block(scope, *m)));
        let stage = Stage {
            embed: Embed::Conv {
                config: Conv2dConfig::square(channels, dim, patch, patch, 0).of_image(),
                name: "patch_embed.proj".into(),
                norm: None,
            },
            class_token: true,
            positions: Some(Positions { name: "pos_embed".into(), resized: false }),
            blocks: blocks.collect(),
            norm: None,
            map,
            dim,
        };
        let image = [channels, image, image];
        Ok(Plan { image, stages: vec![stage], norm: Some(norm_eps), classes })
    }

    /// From the keys of the original code; see [`VisionConfig::from_json`](super::VisionConfig::from_json).
    #[cfg(feature = "io")]
    pub(super) fn from_keys(keys: &crate::models::config::Json, arch: super::Arch) -> Result<Self> {
        let depth = keys.size("depth")?;
        sizes(&[("depth", depth)])?;
        let new = keys.number_or("agent_layer", -1.0)?;
        let new = if new <= 0.0 { depth } else { (new as usize).min(depth) };
        // The original code knows twelve blocks in four groups.
        let group = |block: usize| [0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3][block.min(10)];
        let blocks = (0..depth).map(|b| match b < new {
            true => arch.mechanism(keys, group(b)),
            false => Ok(Mechanism::Softmax),
        });
        Ok(Self {
            image: keys.size("img_size")?,
            patch: keys.size("patch_size")?,
            channels: keys.size_or("in_chans", 3)?,
            classes: keys.size("num_classes")?,
            dim: keys.size("embed_dim")?,
            heads: keys.size("num_heads")?,
            mlp_ratio: keys.number_or("mlp_ratio", 4.0)? as f32,
            qkv_bias: keys.flag("qkv_bias", true)?,
            norm_eps: keys.number_or("norm_eps", 1e-6)? as f32,
            blocks: blocks.collect::<Result<_>>()?,
        })
    }
}

/// All published DeiT.
pub(super) const NAMED: ALL<DeitConfig> = &[
    ("deit_t", DeitConfig::tiny),
    ("deit_s", DeitConfig::small),
    ("deit_b", DeitConfig::base),
    ("agent_deit_t", DeitConfig::agent_tiny),
    ("agent_deit_s", DeitConfig::agent_small),
    ("agent_deit_b", DeitConfig::agent_base),
    ("flatten_deit_t", DeitConfig::flatten_tiny),
];
