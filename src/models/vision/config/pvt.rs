//! PVT: four stages whose keys and values may come from a reduced map.

#[cfg(feature = "io")]
use super::super::plan::refuse;
use super::super::plan::{Blocks, Embed, Plan, Positions, Stage, numbers, shrink, sizes};
use super::{ALL, agent, focused};
use crate::error::Result;
use crate::layers::Conv2dConfig;
use crate::layers::vision::{Mechanism, Scope};
use alloc::vec::Vec;

/// Epsilon of the norms of patch embeddings and of reduced maps.
const INNER_EPS: f32 = 1e-5;

/// Sizes and choices of a PVT (arXiv 2102.12122) or PVTv2 (2106.13797), of Agent-PVT (2312.08874), FLatten-PVT and
/// FLatten-PVTv2 (2308.00442).
#[derive(Clone, Debug, PartialEq)]
pub struct PvtConfig {
    /// Height and width of images.
    pub image: usize,
    /// Height and width of the patches of the first stage; 4 in PVTv2.
    pub patch: usize,
    /// Channels of images.
    pub channels: usize,
    /// Number of classes.
    pub classes: usize,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Of the norms of blocks, and of those behind the stages of PVTv2.
    pub norm_eps: f32,
    /// Of the norms of patch embeddings and of reduced maps.
    pub inner_norm_eps: f32,
    /// PVTv2: overlapping patches instead of positions, a convolution inside of channel mixers, a norm behind each
    /// stage.
    pub overlapping: bool,
    /// The stages; each halves the resolution of the one before.
    pub stages: Vec<PvtStage>,
}

/// One stage of a [`PvtConfig`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PvtStage {
    /// Width of tokens.
    pub dim: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Heads of every block.
    pub heads: usize,
    /// Width inside of channel mixers, relative to `dim`.
    pub mlp_ratio: f32,
    /// Places of the map per key, in each direction.
    pub reduction: usize,
    /// What mixes tokens.
    pub mechanism: Mechanism,
}

/// The four mechanisms and reductions of a family.
type Choice = ([Mechanism; 4], [usize; 4]);

fn softmax() -> Choice {
    ([Mechanism::Softmax; 4], [8, 4, 2, 1])
}

fn agents() -> Choice {
    ([9, 16, 49, 49].map(agent), [1; 4])
}

fn flatten() -> Choice {
    ([focused(); 4], [1; 4])
}

const TINY: [usize; 4] = [2, 2, 2, 2];
const SMALL: [usize; 4] = [3, 4, 6, 3];
const MEDIUM: [usize; 4] = [3, 4, 18, 3];
const LARGE: [usize; 4] = [3, 8, 27, 3];
/// Widths of PVTv2-b0, and of all others.
const NARROW: [usize; 4] = [32, 64, 160, 256];
const WIDE: [usize; 4] = [64, 128, 320, 512];

impl PvtConfig {
    fn sized(dims: [usize; 4], depths: [usize; 4], choice: Choice, overlapping: bool) -> Self {
        let stage = |s: usize| PvtStage {
            dim: dims[s],
            depth: depths[s],
            heads: [1, 2, 5, 8][s],
            mlp_ratio: [8.0, 8.0, 4.0, 4.0][s],
            reduction: choice.1[s],
            mechanism: choice.0[s],
        };
        Self {
            image: 224,
            patch: 4,
            channels: 3,
            classes: 1000,
            qkv_bias: true,
            norm_eps: 1e-6,
            inner_norm_eps: INNER_EPS,
            overlapping,
            stages: (0..4).map(stage).collect(),
        }
    }

    /// PVT-T.
    #[must_use]
    pub fn tiny() -> Self {
        Self::sized(WIDE, TINY, softmax(), false)
    }

    /// PVT-S.
    #[must_use]
    pub fn small() -> Self {
        Self::sized(WIDE, SMALL, softmax(), false)
    }

    /// PVT-M.
    #[must_use]
    pub fn medium() -> Self {
        Self::sized(WIDE, MEDIUM, softmax(), false)
    }

    /// PVT-L.
    #[must_use]
    pub fn large() -> Self {
        Self::sized(WIDE, LARGE, softmax(), false)
    }

    /// Agent-PVT-T.
    #[must_use]
    pub fn agent_tiny() -> Self {
        Self::sized(WIDE, TINY, agents(), false)
    }

    /// Agent-PVT-S.
    #[must_use]
    pub fn agent_small() -> Self {
        Self::sized(WIDE, SMALL, agents(), false)
    }

    /// Agent-PVT-M.
    #[must_use]
    pub fn agent_medium() -> Self {
        Self::sized(WIDE, MEDIUM, agents(), false)
    }

    /// Agent-PVT-L.
    #[must_use]
    pub fn agent_large() -> Self {
        Self::sized(WIDE, LARGE, agents(), false)
    }

    /// FLatten-PVT-T.
    #[must_use]
    pub fn flatten_tiny() -> Self {
        Self::sized(WIDE, TINY, flatten(), false)
    }

    /// FLatten-PVT-S.
    #[must_use]
    pub fn flatten_small() -> Self {
        Self::sized(WIDE, SMALL, flatten(), false)
    }

    /// FLatten-PVT-M.
    #[must_use]
    pub fn flatten_medium() -> Self {
        Self::sized(WIDE, MEDIUM, flatten(), false)
    }

    /// FLatten-PVT-L.
    #[must_use]
    pub fn flatten_large() -> Self {
        Self::sized(WIDE, LARGE, flatten(), false)
    }

    /// FLatten-PVTv2-b0.
    #[must_use]
    pub fn flatten_v2_b0() -> Self {
        Self::sized(NARROW, TINY, flatten(), true)
    }

    /// FLatten-PVTv2-b1.
    #[must_use]
    pub fn flatten_v2_b1() -> Self {
        Self::sized(WIDE, TINY, flatten(), true)
    }

    /// FLatten-PVTv2-b2.
    #[must_use]
    pub fn flatten_v2_b2() -> Self {
        Self::sized(WIDE, SMALL, flatten(), true)
    }

    /// FLatten-PVTv2-b3.
    #[must_use]
    pub fn flatten_v2_b3() -> Self {
        Self::sized(WIDE, MEDIUM, flatten(), true)
    }

    /// FLatten-PVTv2-b4.
    #[must_use]
    pub fn flatten_v2_b4() -> Self {
        Self::sized(WIDE, LARGE, flatten(), true)
    }

    /// The same model for images of another size: positions of a checkpoint are resized, bilinearly.
    #[must_use]
    pub fn with_image(self, image: usize) -> Self {
        Self { image, ..self }
    }

    pub(in super::super) fn plan(&self) -> Result<Plan> {
        let Self { image, patch, channels, classes, qkv_bias, norm_eps, .. } = *self;
        let (inner, overlapping) = (self.inner_norm_eps, self.overlapping);
        sizes(&[("img_size", image), ("patch_size", patch), ("in_chans", channels)])?;
        sizes(&[("num_classes", classes), ("depths", self.stages.len())])?;
        numbers(&[("norm_eps", norm_eps), ("inner_norm_eps", inner)])?;
        let (mut inputs, mut map) = (channels, [image; 2]);
        let mut stages = Vec::new();
        for (s, stage) in self.stages.iter().enumerate() {
            let PvtStage { dim, depth, heads, mlp_ratio, reduction: ratio, mechanism } = *stage;
            sizes(&[("embed_dims", dim), ("num_heads", heads), ("sr_ratios", ratio)])?;
            sizes(&[("depths", depth)])?;
            numbers(&[("mlp_ratios", mlp_ratio)])?;
            let (kernel, stride, padding) = match (s, overlapping) {
                (0, false) => (patch, patch, 0),
                (_, false) => (2, 2, 0),
                (0, true) => (7, 4, 3),
                (_, true) => (3, 2, 1),
            };
            let mut conv = Conv2dConfig::square(inputs, dim, kernel, stride, padding);
            if s == 0 {
                conv = conv.of_image();
            }
            map = shrink(&conv, map)?;
            let common = Blocks { dim, heads, map, mlp_ratio, qkv_bias, norm_eps };
            let scope = Scope::Reduced { ratio, norm_eps: inner };
            let mut block = common.block(scope, mechanism);
            block.mlp_conv = overlapping;
            let n = s + 1;
            stages.push(Stage {
                embed: Embed::Conv {
                    config: conv,
                    name: alloc::format!("patch_embed{n}.proj"),
                    norm: Some((alloc::format!("patch_embed{n}.norm"), inner)),
                },
                class_token: false,
                positions: (!overlapping)
                    .then(|| Positions { name: alloc::format!("pos_embed{n}"), resized: true }),
                blocks: (0..depth).map(|i| (alloc::format!("block{n}.{i}"), block)).collect(),
                norm: overlapping.then(|| (alloc::format!("norm{n}"), norm_eps)),
                map,
                dim,
            });
            inputs = dim;
        }
        Ok(Plan { image: [channels, image, image], stages, norm: None, classes })
    }

    /// From the keys of the original code; see [`VisionConfig::from_json`](super::VisionConfig::from_json).
    #[cfg(feature = "io")]
    pub(super) fn from_keys(
        keys: &crate::models::config::Json,
        arch: super::Arch,
        overlapping: bool,
    ) -> Result<Self> {
        let dims = keys.sizes("embed_dims")?;
        let n = dims.len();
        let [depths, heads] = ["depths", "num_heads"].map(|key| keys.sizes_of(key, n));
        let ([depths, heads], ratios) = ([depths?, heads?], keys.numbers_of("mlp_ratios", n)?);
        let letters = super::attn_type(keys, arch, n)?;
        if letters.chars().count() != n {
            return Err(refuse("attn_type", alloc::format!("{n} letters"), letters));
        }
        let stage = |(s, letter): (usize, char)| {
            let new = arch.is_new(letter)?;
            let key = if new { arch.reductions() } else { "sr_ratios" };
            Ok(PvtStage {
                dim: dims[s],
                depth: depths[s],
                heads: heads[s],
                mlp_ratio: ratios[s] as f32,
                reduction: keys.sizes_of(key, n)?[s],
                mechanism: if new { arch.mechanism(keys, s)? } else { Mechanism::Softmax },
            })
        };
        Ok(Self {
            image: keys.size("img_size")?,
            patch: keys.size_or("patch_size", 4)?,
            channels: keys.size_or("in_chans", 3)?,
            classes: keys.size("num_classes")?,
            qkv_bias: keys.flag("qkv_bias", true)?,
            norm_eps: keys.number_or("norm_eps", 1e-6)? as f32,
            inner_norm_eps: keys.number_or("inner_norm_eps", f64::from(INNER_EPS))? as f32,
            overlapping,
            stages: letters.chars().enumerate().map(stage).collect::<Result<_>>()?,
        })
    }
}

/// All published PVT.
pub(super) const NAMED: ALL<PvtConfig> = &[
    ("pvt_t", PvtConfig::tiny),
    ("pvt_s", PvtConfig::small),
    ("pvt_m", PvtConfig::medium),
    ("pvt_l", PvtConfig::large),
    ("agent_pvt_t", PvtConfig::agent_tiny),
    ("agent_pvt_s", PvtConfig::agent_small),
    ("agent_pvt_m", PvtConfig::agent_medium),
    ("agent_pvt_l", PvtConfig::agent_large),
    ("flatten_pvt_t", PvtConfig::flatten_tiny),
    ("flatten_pvt_s", PvtConfig::flatten_small),
    ("flatten_pvt_m", PvtConfig::flatten_medium),
    ("flatten_pvt_l", PvtConfig::flatten_large),
    ("flatten_pvt_v2_b0", PvtConfig::flatten_v2_b0),
    ("flatten_pvt_v2_b1", PvtConfig::flatten_v2_b1),
    ("flatten_pvt_v2_b2", PvtConfig::flatten_v2_b2),
    ("flatten_pvt_v2_b3", PvtConfig::flatten_v2_b3),
    ("flatten_pvt_v2_b4", PvtConfig::flatten_v2_b4),
];
