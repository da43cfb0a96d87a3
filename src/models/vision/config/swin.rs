//! Swin: windows that shift from block to block, and stages joined by patch merging.

use super::super::plan::{Blocks, Embed, Plan, Positions, Stage, numbers, refuse, shrink, sizes};
use super::{ALL, agent, focused};
use crate::error::Result;
use crate::layers::Conv2dConfig;
use crate::layers::vision::{Mechanism, Scope};
use alloc::vec::Vec;

/// Sizes and choices of a Swin transformer (arXiv 2103.14030), of Agent-Swin (2312.08874) and FLatten-Swin
/// (2308.00442).
#[derive(Clone, Debug, PartialEq)]
pub struct SwinConfig {
    /// Height and width of images.
    pub image: usize,
    /// Height and width of a patch.
    pub patch: usize,
    /// Channels of images.
    pub channels: usize,
    /// Number of classes.
    pub classes: usize,
    /// Width of tokens in the first stage; it doubles from stage to stage.
    pub dim: usize,
    /// Width inside of channel mixers, relative to that of tokens.
    pub mlp_ratio: f32,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Of all norms.
    pub norm_eps: f32,
    /// Whether a norm follows the patch embedding.
    pub patch_norm: bool,
    /// Whether absolute positions are added to the patches.
    pub positions: bool,
    /// Height and width of the windows of blocks with a linear mechanism.
    pub window: usize,
    /// Height and width of the windows of blocks with softmax attention.
    pub softmax_window: usize,
    /// The stages.
    pub stages: Vec<SwinStage>,
}

/// One stage of a [`SwinConfig`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SwinStage {
    /// Number of blocks.
    pub depth: usize,
    /// Heads of every block.
    pub heads: usize,
    /// What mixes tokens in the first blocks.
    pub mechanism: Mechanism,
    /// How many blocks these are; softmax attention mixes the tokens of the others.
    pub first: usize,
}

/// What mixes tokens in how many blocks of each stage.
type Choice = [(Mechanism, usize); 4];

const SOFTMAX: Choice = [(Mechanism::Softmax, 0); 4];
const TINY: [usize; 4] = [2, 2, 6, 2];
const LARGE: [usize; 4] = [2, 2, 18, 2];

/// Agents in the first blocks of each stage.
fn agents(first: [usize; 4]) -> Choice {
    core::array::from_fn(|s| (agent([9, 16, 49, 49][s]), first[s]))
}

/// Focused attention in the first two stages.
fn flatten() -> Choice {
    core::array::from_fn(|s| (focused(), [2, 2, 0, 0][s]))
}

impl SwinConfig {
    fn sized(dim: usize, depths: [usize; 4], choice: Choice) -> Self {
        let stage = |s: usize| SwinStage {
            depth: depths[s],
            heads: (dim / 32) << s,
            mechanism: choice[s].0,
            first: choice[s].1,
        };
        Self {
            image: 224,
            patch: 4,
            channels: 3,
            classes: 1000,
            dim,
            mlp_ratio: 4.0,
            qkv_bias: true,
            norm_eps: 1e-5,
            patch_norm: true,
            positions: false,
            window: 56,
            softmax_window: 7,
            stages: (0..4).map(stage).collect(),
        }
    }

    /// Swin-T.
    #[must_use]
    pub fn tiny() -> Self {
        Self::sized(96, TINY, SOFTMAX)
    }

    /// Swin-S.
    #[must_use]
    pub fn small() -> Self {
        Self::sized(96, LARGE, SOFTMAX)
    }

    /// Swin-B.
    #[must_use]
    pub fn base() -> Self {
        Self::sized(128, LARGE, SOFTMAX)
    }

    /// Agent-Swin-T: agents over the whole map in the first three stages.
    #[must_use]
    pub fn agent_tiny() -> Self {
        Self::sized(96, TINY, agents([2, 2, 6, 0]))
    }

    /// Agent-Swin-S: agents in the first two stages. Published for images of 288 x 288 too.
    #[must_use]
    pub fn agent_small() -> Self {
        Self::sized(96, LARGE, agents([2, 2, 0, 0]))
    }

    /// Agent-Swin-B: agents in the first two stages and two blocks of the third. Published for images of
    /// 384 x 384 too.
    #[must_use]
    pub fn agent_base() -> Self {
        Self::sized(128, LARGE, agents([2, 2, 2, 0]))
    }

    /// FLatten-Swin-T: focused attention in the first two stages.
    #[must_use]
    pub fn flatten_tiny() -> Self {
        Self::sized(96, TINY, flatten())
    }

    /// FLatten-Swin-S.
    #[must_use]
    pub fn flatten_small() -> Self {
        Self::sized(96, LARGE, flatten())
    }

    /// FLatten-Swin-B. Published for images of 384 x 384 too.
    #[must_use]
    pub fn flatten_base() -> Self {
        Self::sized(128, LARGE, flatten())
    }

    /// The same model for images of another size; windows as large as the map stay so. Those of softmax attention
    /// stay as they are: Agent-Swin has windows of an eighth of [`window`](Self::window) beyond 56, FLatten-Swin of
    /// 12.
    #[must_use]
    pub fn with_image(self, image: usize) -> Self {
        let whole = self.window * self.patch == self.image;
        let window = if whole { image / self.patch.max(1) } else { self.window };
        Self { image, window, ..self }
    }

    pub(in super::super) fn plan(&self) -> Result<Plan> {
        let Self { image, patch, channels, classes, mlp_ratio, qkv_bias, norm_eps, .. } = *self;
        sizes(&[("img_size", image), ("patch_size", patch), ("in_chans", channels)])?;
        sizes(&[("num_classes", classes), ("embed_dim", self.dim), ("depths", self.stages.len())])?;
        sizes(&[("window_size", self.window), ("window_size", self.softmax_window)])?;
        numbers(&[("mlp_ratio", mlp_ratio), ("norm_eps", norm_eps)])?;
        let conv = Conv2dConfig::square(channels, self.dim, patch, patch, 0).of_image();
        let mut map = shrink(&conv, [image; 2])?;
        let mut dim = self.dim;
        let mut stages = Vec::new();
        for (s, stage) in self.stages.iter().enumerate() {
            let SwinStage { depth, heads, mechanism, first } = *stage;
            if s > 0 {
                if map[0] % 2 != 0 {
                    return Err(refuse("img_size", "maps of even size before a merging", map[0]));
                }
                (map, dim) = (map.map(|n| n / 2), 2 * dim);
            }
            sizes(&[("depths", depth), ("num_heads", heads), ("embed_dim", dim)])?;
            let common = Blocks { dim, heads, map, mlp_ratio, qkv_bias, norm_eps };
            let block = |i: usize| {
                let (mechanism, window) = match i < first {
                    true => (mechanism, self.window),
                    false => (Mechanism::Softmax, self.softmax_window),
                };
                // A map within one window needs no shift.
                let (window, shift) = match map[0] <= window {
                    true => (map[0], 0),
                    false => (window, i % 2 * (window / 2)),
                };
                let scope = Scope::Windows { window: [window; 2], shift: [shift; 2] };
                (alloc::format!("layers.{s}.blocks.{i}"), common.block(scope, mechanism))
            };
            let embed = match s {
                0 => Embed::Conv {
                    config: conv,
                    name: "patch_embed.proj".into(),
                    norm: self.patch_norm.then(|| ("patch_embed.norm".into(), norm_eps)),
                },
                _ => {
                    Embed::Merge { prefix: alloc::format!("layers.{}.downsample", s - 1), norm_eps }
                }
            };
            stages.push(Stage {
                embed,
                class_token: false,
                positions: (s == 0 && self.positions)
                    .then(|| Positions { name: "absolute_pos_embed".into(), resized: false }),
                blocks: (0..depth).map(block).collect(),
                norm: None,
                map,
                dim,
            });
        }
        Ok(Plan { image: [channels, image, image], stages, norm: Some(norm_eps), classes })
    }

    /// From the keys of the original code; see [`VisionConfig::from_json`](super::VisionConfig::from_json).
    #[cfg(feature = "io")]
    pub(super) fn from_keys(keys: &crate::models::config::Json, arch: super::Arch) -> Result<Self> {
        let depths = keys.sizes("depths")?;
        let n = depths.len();
        let heads = keys.sizes_of("num_heads", n)?;
        let window = keys.size_or("window_size", 7)?;
        let text = super::attn_type(keys, arch, n)?;
        // Behind the letters: how many blocks of a mixed stage are of the new kind.
        let split = text.char_indices().nth(n).map_or(text.len(), |(at, _)| at);
        let (letters, mixed) = text.split_at(split);
        let bad = || refuse("attn_type", alloc::format!("{n} letters, then a number"), &text);
        let mixed = match mixed {
            "" => None,
            number => Some(number.parse::<usize>().map_err(|_| bad())?),
        };
        if letters.chars().count() != n {
            return Err(bad());
        }
        let stage = |(s, letter): (usize, char)| {
            let first = match letter {
                'M' => mixed.ok_or_else(bad)?.min(depths[s]),
                letter if arch.is_new(letter)? => depths[s],
                _ => 0,
            };
            let mechanism = if first > 0 { arch.mechanism(keys, s)? } else { Mechanism::Softmax };
            Ok(SwinStage { depth: depths[s], heads: heads[s], mechanism, first })
        };
        Ok(Self {
            image: keys.size("img_size")?,
            patch: keys.size_or("patch_size", 4)?,
            channels: keys.size_or("in_chans", 3)?,
            classes: keys.size("num_classes")?,
            dim: keys.size("embed_dim")?,
            mlp_ratio: keys.number_or("mlp_ratio", 4.0)? as f32,
            qkv_bias: keys.flag("qkv_bias", true)?,
            norm_eps: keys.number_or("norm_eps", 1e-5)? as f32,
            patch_norm: keys.flag("patch_norm", true)?,
            positions: keys.flag("ape", false)?,
            window,
            softmax_window: arch.softmax_window(window),
            stages: letters.chars().enumerate().map(stage).collect::<Result<_>>()?,
        })
    }
}

/// All published Swin.
pub(super) const NAMED: ALL<SwinConfig> = &[
    ("swin_t", SwinConfig::tiny),
    ("swin_s", SwinConfig::small),
    ("swin_b", SwinConfig::base),
    ("agent_swin_t", SwinConfig::agent_tiny),
    ("agent_swin_s", SwinConfig::agent_small),
    ("agent_swin_b", SwinConfig::agent_base),
    ("flatten_swin_t", SwinConfig::flatten_tiny),
    ("flatten_swin_s", SwinConfig::flatten_small),
    ("flatten_swin_b", SwinConfig::flatten_base),
];
