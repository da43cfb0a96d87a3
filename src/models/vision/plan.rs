//! What every family comes down to: stages of blocks with their names, and a head.

use crate::error::Result;
use crate::layers::Conv2dConfig;
use crate::layers::vision::{Mechanism, Scope, VisionAttentionConfig, VisionBlockConfig};
pub(super) use crate::models::config::refuse;
use alloc::string::String;
use alloc::vec::Vec;

/// More than any published model has, few enough that a hostile file cannot ask for much.
const MOST: usize = 1 << 14;

/// A whole model.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Channels, height and width of the image.
    pub image: [usize; 3],
    pub stages: Vec<Stage>,
    /// Epsilon of `norm` before the head, if there is one.
    pub norm: Option<f32>,
    pub classes: usize,
}

/// Blocks of one resolution.
#[derive(Clone, Debug)]
pub(super) struct Stage {
    pub embed: Embed,
    /// Whether `cls_token` comes before the tokens of the map; the head reads it then, else the mean of all tokens.
    pub class_token: bool,
    /// What is added to the tokens.
    pub positions: Option<Positions>,
    /// Prefixes and sizes.
    pub blocks: Vec<(String, VisionBlockConfig)>,
    /// Name and epsilon of a norm behind the blocks.
    pub norm: Option<(String, f32)>,
    /// Height and width of the map.
    pub map: [usize; 2],
    pub dim: usize,
}

/// A table `[1, tokens, dim]`.
#[derive(Clone, Debug)]
pub(super) struct Positions {
    pub name: String,
    /// Whether the table of a square map of another size is resized.
    pub resized: bool,
}

/// How tokens are made of the image, or of the tokens of the stage before.
#[derive(Clone, Debug)]
pub(super) enum Embed {
    /// A convolution and perhaps a norm, with their names.
    Conv { config: Conv2dConfig, name: String, norm: Option<(String, f32)> },
    /// The patch merging of Swin.
    Merge { prefix: String, norm_eps: f32 },
}

impl Stage {
    /// Tokens of a batch row.
    pub fn tokens(&self) -> usize {
        self.map[0] * self.map[1] + usize::from(self.class_token)
    }
}

/// What the blocks of one stage have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocks {
    pub dim: usize,
    pub heads: usize,
    pub map: [usize; 2],
    pub mlp_ratio: f32,
    pub qkv_bias: bool,
    pub norm_eps: f32,
}

impl Blocks {
    pub fn block(&self, scope: Scope, mechanism: Mechanism) -> VisionBlockConfig {
        let Blocks { dim, heads, map, qkv_bias, norm_eps, .. } = *self;
        VisionBlockConfig {
            attention: VisionAttentionConfig { dim, heads, map, scope, mechanism, qkv_bias },
            mlp_hidden: (dim as f64 * f64::from(self.mlp_ratio)) as usize,
            mlp_conv: false,
            norm_eps,
        }
    }
}

/// Refuses sizes of nothing or beyond reason.
pub(super) fn sizes(all: &[(&str, usize)]) -> Result<()> {
    match all.iter().find(|(_, n)| *n == 0 || *n > MOST) {
        None => Ok(()),
        Some((key, n)) => Err(refuse(key, alloc::format!("a size from 1 to {MOST}"), n)),
    }
}

/// Refuses factors and epsilons that are negative or not finite.
pub(super) fn numbers(all: &[(&str, f32)]) -> Result<()> {
    match all.iter().find(|(_, x)| !x.is_finite() || *x < 0.0 || *x > MOST as f32) {
        None => Ok(()),
        Some((key, x)) => Err(refuse(key, alloc::format!("a number from 0 to {MOST}"), x)),
    }
}

/// Height and width of the map that a convolution makes.
pub(super) fn shrink(conv: &Conv2dConfig, map: [usize; 2]) -> Result<[usize; 2]> {
    conv.output(map).map_err(|_| {
        let expected = alloc::format!("an image that leaves {:?} places everywhere", conv.kernel);
        refuse("img_size", expected, alloc::format!("a map of {map:?}"))
    })
}
