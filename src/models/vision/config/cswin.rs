//! CSwin: crossed stripes, and stages joined by strided convolutions.

#[cfg(feature = "io")]
use super::super::plan::refuse;
use super::super::plan::{Blocks, Embed, Plan, Stage, numbers, shrink, sizes};
use super::{ALL, agent, focused};
use crate::error::Result;
use crate::layers::Conv2dConfig;
use crate::layers::vision::{Mechanism, Scope};
use alloc::vec::Vec;

/// Sizes and choices of a CSwin transformer (arXiv 2107.00652), of Agent-CSwin (2312.08874) and FLatten-CSwin
/// (2308.00442).
#[derive(Clone, Debug, PartialEq)]
pub struct CswinConfig {
    /// Height and width of images.
    pub image: usize,
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
    /// The stages. In the last one, tokens of the whole map mix.
    pub stages: Vec<CswinStage>,
}

/// One stage of a [`CswinConfig`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CswinStage {
    /// Number of blocks.
    pub depth: usize,
    /// Heads of every block.
    pub heads: usize,
    /// Width of the stripes; that of the map for the whole map.
    pub split: usize,
    /// What mixes tokens.
    pub mechanism: Mechanism,
}

/// What mixes tokens in which stripes.
type Choice = [(Mechanism, usize); 4];

const SOFTMAX: Choice = [
    (Mechanism::Softmax, 1),
    (Mechanism::Softmax, 2),
    (Mechanism::Softmax, 7),
    (Mechanism::Softmax, 7),
];

fn agents() -> Choice {
    [(agent(9), 56), (agent(16), 28), SOFTMAX[2], SOFTMAX[3]]
}

fn flatten() -> Choice {
    [(focused(), 56), (focused(), 28), SOFTMAX[2], SOFTMAX[3]]
}

impl CswinConfig {
    fn sized(dim: usize, depths: [usize; 4], choice: Choice) -> Self {
        let heads = if dim == 96 { 4 } else { 2 };
        let stage = |s: usize| CswinStage {
            depth: depths[s],
            heads: heads << s,
            split: choice[s].1,
            mechanism: choice[s].0,
        };
        Self {
            image: 224,
            channels: 3,
            classes: 1000,
            dim,
            mlp_ratio: 4.0,
            qkv_bias: true,
            norm_eps: 1e-5,
            stages: (0..4).map(stage).collect(),
        }
    }

    /// CSwin-T.
    #[must_use]
    pub fn tiny() -> Self {
        Self::sized(64, [1, 2, 21, 1], SOFTMAX)
    }

    /// CSwin-S.
    #[must_use]
    pub fn small() -> Self {
        Self::sized(64, [2, 4, 32, 2], SOFTMAX)
    }

    /// CSwin-B.
    #[must_use]
    pub fn base() -> Self {
        Self::sized(96, [2, 4, 32, 2], SOFTMAX)
    }

    /// Agent-CSwin-T: agents over the whole map in the first two stages.
    #[must_use]
    pub fn agent_tiny() -> Self {
        Self::sized(64, [2, 4, 18, 1], agents())
    }

    /// Agent-CSwin-S.
    #[must_use]
    pub fn agent_small() -> Self {
        Self::sized(64, [3, 6, 29, 2], agents())
    }

    /// Agent-CSwin-B. Published for images of 384 x 384 too.
    #[must_use]
    pub fn agent_base() -> Self {
        Self::sized(96, [3, 6, 29, 2], agents())
    }

    /// FLatten-CSwin-T: focused attention over the whole map in the first two stages.
    #[must_use]
    pub fn flatten_tiny() -> Self {
        Self::sized(64, [2, 4, 18, 1], flatten())
    }

    /// FLatten-CSwin-S.
    #[must_use]
    pub fn flatten_small() -> Self {
        Self::sized(64, [2, 4, 32, 2], flatten())
    }

    /// FLatten-CSwin-B.
    #[must_use]
    pub fn flatten_base() -> Self {
        Self::sized(96, [3, 6, 29, 2], flatten())
    }

    /// The same model for images of another size; stripes as wide as the map stay so.
    #[must_use]
    pub fn with_image(mut self, image: usize) -> Self {
        for (s, stage) in self.stages.iter_mut().enumerate().take(16) {
            let whole = stage.split == self.image / (4 << s);
            stage.split = if whole { image / (4 << s) } else { stage.split };
        }
        Self { image, ..self }
    }

    pub(in super::super) fn plan(&self) -> Result<Plan> {
        let Self { image, channels, classes, mlp_ratio, qkv_bias, norm_eps, .. } = *self;
        let last = self.stages.len();
        sizes(&[("img_size", image), ("in_chans", channels), ("num_classes", classes)])?;
        sizes(&[("embed_dim", self.dim), ("depth", last)])?;
        numbers(&[("mlp_ratio", mlp_ratio), ("norm_eps", norm_eps)])?;
        let (mut inputs, mut dim, mut map) = (channels, self.dim, [image; 2]);
        let mut stages = Vec::new();
        for (s, stage) in self.stages.iter().enumerate() {
            let CswinStage { depth, heads, split, mechanism } = *stage;
            sizes(&[("embed_dim", dim), ("depth", depth), ("num_heads", heads)])?;
            sizes(&[("split_size", split)])?;
            let (config, name, norm) = match s {
                0 => {
                    let conv = Conv2dConfig::square(inputs, dim, 7, 4, 2).of_image();
                    (conv, "stage1_conv_embed.0".into(), "stage1_conv_embed.2".into())
                }
                _ => {
                    let conv = Conv2dConfig::square(inputs, dim, 3, 2, 1);
                    let part = |part: &str| alloc::format!("merge{s}.{part}");
                    (conv, part("conv"), part("norm"))
                }
            };
            map = shrink(&config, map)?;
            let common = Blocks { dim, heads, map, mlp_ratio, qkv_bias, norm_eps };
            let split = if s + 1 == last { map[0] } else { split };
            let block = common.block(Scope::Cross { split }, mechanism);
            let name_of = |i: usize| alloc::format!("stage{}.{i}", s + 1);
            stages.push(Stage {
                embed: Embed::Conv { config, name, norm: Some((norm, norm_eps)) },
                class_token: false,
                positions: None,
                blocks: (0..depth).map(|i| (name_of(i), block)).collect(),
                norm: None,
                map,
                dim,
            });
            (inputs, dim) = (dim, 2 * dim);
        }
        Ok(Plan { image: [channels, image, image], stages, norm: Some(norm_eps), classes })
    }

    /// From the keys of the original code; see [`VisionConfig::from_json`](super::VisionConfig::from_json).
    #[cfg(feature = "io")]
    pub(super) fn from_keys(keys: &crate::models::config::Json, arch: super::Arch) -> Result<Self> {
        let depths = keys.sizes("depth")?;
        let n = depths.len();
        let heads = keys.sizes_of("num_heads", n)?;
        let letters = super::attn_type(keys, arch, n)?;
        if letters.chars().count() != n {
            return Err(refuse("attn_type", alloc::format!("{n} letters"), letters));
        }
        let stage = |(s, letter): (usize, char)| {
            let new = arch.is_new(letter)?;
            let key = if new { "la_split_size" } else { "split_size" };
            Ok(CswinStage {
                depth: depths[s],
                heads: heads[s],
                split: keys.sizes_of(key, n)?[s],
                mechanism: if new { arch.mechanism(keys, s)? } else { Mechanism::Softmax },
            })
        };
        Ok(Self {
            image: keys.size("img_size")?,
            channels: keys.size_or("in_chans", 3)?,
            classes: keys.size("num_classes")?,
            dim: keys.size("embed_dim")?,
            mlp_ratio: keys.number_or("mlp_ratio", 4.0)? as f32,
            qkv_bias: keys.flag("qkv_bias", true)?,
            norm_eps: keys.number_or("norm_eps", 1e-5)? as f32,
            stages: letters.chars().enumerate().map(stage).collect::<Result<_>>()?,
        })
    }
}

/// All published CSwin.
pub(super) const NAMED: ALL<CswinConfig> = &[
    ("cswin_t", CswinConfig::tiny),
    ("cswin_s", CswinConfig::small),
    ("cswin_b", CswinConfig::base),
    ("agent_cswin_t", CswinConfig::agent_tiny),
    ("agent_cswin_s", CswinConfig::agent_small),
    ("agent_cswin_b", CswinConfig::agent_base),
    ("flatten_cswin_t", CswinConfig::flatten_tiny),
    ("flatten_cswin_s", CswinConfig::flatten_small),
    ("flatten_cswin_b", CswinConfig::flatten_base),
];
