//! Sizes and choices.

use crate::attention::focused::Normaliser;
use crate::error::{Error, Result};

/// Wider layers are refused: sums of sizes stay far from overflow.
const MOST: usize = 1 << 24;

/// How tokens are mixed.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Mechanism {
    /// [Softmax attention](crate::attention::softmax).
    Softmax,
    /// [Agent attention](crate::attention::agent). Agents are means of queries over a grid of bins, scores have a
    /// bias per agent and place, and a depth-wise 3 x 3 convolution of the values is added.
    Agent {
        /// How many agents; a square number.
        agents: usize,
    },
    /// [Focused linear attention](crate::attention::focused). Keys have a positional encoding, and a depth-wise
    /// convolution of the values is added whose kernels all heads share.
    Focused(FocusedChoices),
}

impl Mechanism {
    /// Focused linear attention with the published choices: factor 3, kernels of 5, [`Normaliser::Mean`].
    #[must_use]
    pub fn focused() -> Self {
        Self::Focused(FocusedChoices {
            focusing_factor: 3.0,
            kernel: 5,
            normaliser: Normaliser::Mean,
        })
    }
}

/// Choices of [`Mechanism::Focused`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FocusedChoices {
    /// The power that features are raised to.
    pub focusing_factor: f32,
    /// Height and width of the convolution of the values, odd.
    pub kernel: usize,
    /// What outputs are divided by.
    pub normaliser: Normaliser,
}

/// Which tokens mix, and where queries, keys and values come from.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Scope {
    /// All tokens of the map, as in DeiT.
    Whole {
        /// Whether a class token comes before those of the map.
        class_token: bool,
    },
    /// Keys and values of a map that is reduced by a convolution whose kernel and stride are `ratio`, as in PVT.
    Reduced {
        /// Places of the map per key, in each direction; 1 leaves the map alone.
        ratio: usize,
        /// Of the norm behind the convolution.
        norm_eps: f32,
    },
    /// Windows of a map, as in Swin. With softmax attention, scores have a bias per relative position, and tokens
    /// that only the cyclic shift brought together are kept apart.
    Windows {
        /// Height and width; they divide those of the map.
        window: [usize; 2],
        /// By how much the map is rolled upwards and to the left, less than a window.
        shift: [usize; 2],
    },
    /// One half of the channels in vertical stripes, the other in horizontal ones, as in CSwin; all channels in
    /// the whole map if stripes are as wide as that. Values pass a convolution beside the attention.
    Cross {
        /// Width of the stripes; it divides height and width of the map.
        split: usize,
    },
}

/// Sizes and choices of a [`VisionAttention`](super::VisionAttention).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VisionAttentionConfig {
    /// Width of tokens.
    pub dim: usize,
    /// Number of heads; divides `dim`.
    pub heads: usize,
    /// Height and width of the map.
    pub map: [usize; 2],
    /// Which tokens mix.
    pub scope: Scope,
    /// How they mix.
    pub mechanism: Mechanism,
    /// Whether the projections of queries, keys and values have biases.
    pub qkv_bias: bool,
}

/// Sizes and choices of a [`MapAttention`](super::MapAttention).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MapAttentionConfig {
    /// Width of queries, keys and values, over all heads.
    pub dim: usize,
    /// Number of heads; divides `dim`.
    pub heads: usize,
    /// Height and width of the map.
    pub map: [usize; 2],
    /// Height and width of the parts whose tokens mix; they divide those of the map.
    pub window: [usize; 2],
    /// By how much the map is rolled upwards and to the left before it is cut into windows.
    pub shift: [usize; 2],
    /// How tokens mix.
    pub mechanism: Mechanism,
    /// Whether a class token comes before those of the map, which is one window then.
    pub class_token: bool,
    /// Places of the map per key, in each direction; 1 unless the map is one window.
    pub reduction: usize,
    /// Whether softmax attention has a bias per relative position.
    pub relative_position: bool,
    /// Whether a 3 x 3 convolution of the values, `get_v`, is added: locally enhanced positions.
    pub lepe: bool,
}

impl MapAttentionConfig {
    /// All tokens of a map mix.
    #[must_use]
    pub fn whole(dim: usize, heads: usize, map: [usize; 2], mechanism: Mechanism) -> Self {
        Self {
            dim,
            heads,
            map,
            window: map,
            shift: [0; 2],
            mechanism,
            class_token: false,
            reduction: 1,
            relative_position: false,
            lepe: false,
        }
    }

    /// Tokens of a window, the class token included.
    pub(super) fn queries(&self) -> usize {
        self.window[0] * self.window[1] + usize::from(self.class_token)
    }

    /// Height and width of the keys of a window.
    pub(super) fn key_window(&self) -> [usize; 2] {
        self.window.map(|n| n / self.reduction)
    }

    /// Keys of a window, the class token included.
    pub(super) fn keys(&self) -> usize {
        let [h, w] = self.key_window();
        h * w + usize::from(self.class_token)
    }

    /// Windows of a map.
    pub(super) fn windows(&self) -> usize {
        (self.map[0] / self.window[0]) * (self.map[1] / self.window[1])
    }

    pub(super) fn check(&self, op: &'static str) -> Result<()> {
        size(op, "dim", self.dim)?;
        size(op, "heads", self.heads)?;
        if !self.dim.is_multiple_of(self.heads) {
            let expected = alloc::format!("a divisor of dim = {}", self.dim);
            return Err(Error::value(op, "heads", expected, self.heads));
        }
        let places = self.map[0].checked_mul(self.map[1]).filter(|n| *n <= MOST);
        if self.map.contains(&0) || places.is_none() {
            let expected = alloc::format!("1 to {MOST} places");
            return Err(Error::value(op, "map", expected, alloc::format!("{:?}", self.map)));
        }
        for d in 0..2 {
            let (map, window, shift) = (self.map[d], self.window[d], self.shift[d]);
            if window == 0 || !map.is_multiple_of(window) {
                let expected = alloc::format!("a divisor of a map of {:?}", self.map);
                return Err(Error::value(op, "window", expected, window));
            }
            if shift >= window {
                let expected = alloc::format!("less than a window of {window}");
                return Err(Error::value(op, "shift", expected, shift));
            }
            if self.reduction == 0 || !map.is_multiple_of(self.reduction) {
                let expected = alloc::format!("a divisor of a map of {:?}", self.map);
                return Err(Error::value(op, "ratio", expected, self.reduction));
            }
        }
        let one = self.window == self.map && self.shift == [0; 2];
        if !one && (self.class_token || self.reduction > 1) {
            let got = alloc::format!("{:?} shifted by {:?}", self.window, self.shift);
            return Err(Error::value(op, "window", "the whole map", got));
        }
        Ok(())
    }
}

impl VisionAttentionConfig {
    /// Tokens of a batch row.
    #[must_use]
    pub fn tokens(&self) -> usize {
        let class = matches!(self.scope, Scope::Whole { class_token: true });
        self.map[0] * self.map[1] + usize::from(class)
    }

    /// Whether channels are shared between vertical and horizontal stripes.
    pub(super) fn crossed(&self) -> bool {
        matches!(self.scope, Scope::Cross { split } if [split; 2] != self.map)
    }

    /// What mixes tokens: everything at once, or first the vertical, then the horizontal stripes.
    pub(super) fn mixers(&self) -> [Option<MapAttentionConfig>; 2] {
        let all = MapAttentionConfig::whole(self.dim, self.heads, self.map, self.mechanism);
        match self.scope {
            Scope::Whole { class_token } => [Some(MapAttentionConfig { class_token, ..all }), None],
            Scope::Reduced { ratio, .. } => {
                [Some(MapAttentionConfig { reduction: ratio, ..all }), None]
            }
            Scope::Windows { window, shift } => {
                let relative_position = self.mechanism == Mechanism::Softmax;
                [Some(MapAttentionConfig { window, shift, relative_position, ..all }), None]
            }
            Scope::Cross { .. } if !self.crossed() => {
                [Some(MapAttentionConfig { lepe: true, ..all }), None]
            }
            Scope::Cross { split } => {
                let (dim, heads) = (self.dim / 2, self.heads / 2);
                let half = MapAttentionConfig { dim, heads, lepe: true, ..all };
                let [h, w] = self.map;
                [[h, split], [split, w]].map(|window| Some(MapAttentionConfig { window, ..half }))
            }
        }
    }

    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        size(op, "dim", self.dim)?;
        if self.crossed() && !(self.heads.is_multiple_of(2) && self.dim.is_multiple_of(2)) {
            let got = alloc::format!("{} heads, dim = {}", self.heads, self.dim);
            return Err(Error::value(op, "heads", "an even number, as dim", got));
        }
        self.mixers().iter().flatten().try_for_each(|m| m.check(op))
    }
}

/// Refuses sizes of nothing or beyond reason.
pub(in crate::layers) fn size(op: &'static str, arg: &'static str, n: usize) -> Result<()> {
    if n == 0 || n > MOST {
        return Err(Error::value(op, arg, alloc::format!("a size from 1 to {MOST}"), n));
    }
    Ok(())
}
