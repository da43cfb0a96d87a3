//! What a configuration costs: parameters and operations.

use super::VisionConfig;
use super::plan::{Embed, Stage};
use crate::error::Result;
use crate::layers::vision::{Mechanism, Scope, VisionBlockConfig};

/// Parameters, and multiplications with additions per image.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    parameters: usize,
    /// Of a large image more than 32 bits count.
    macs: u64,
}

fn product<const N: usize>(factors: [usize; N]) -> u64 {
    factors.iter().map(|n| *n as u64).product()
}

impl Cost {
    fn add(&mut self, parameters: usize, macs: u64) {
        self.parameters += parameters;
        self.macs += macs;
    }

    /// A weight `[outputs, inputs]` with its bias on some tokens.
    fn linear(&mut self, tokens: usize, inputs: usize, outputs: usize, bias: bool) {
        let weight = inputs * outputs;
        self.add(weight + usize::from(bias) * outputs, product([tokens, inputs, outputs]));
    }

    /// A depth-wise convolution of `dim` channels with `kernels` kernels.
    fn depthwise(&mut self, tokens: usize, dim: usize, kernels: usize, kernel: usize) {
        let area = kernel * kernel;
        self.add(kernels * (area + 1), product([tokens, dim, area]));
    }
}

impl VisionConfig {
    /// Number of parameters, without buffers.
    ///
    /// ```
    /// use linattn::models::VisionConfig;
    /// assert_eq!(VisionConfig::named("deit_t")?.parameters()?, 5_717_416);
    /// # Ok::<(), linattn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for an impossible configuration.
    pub fn parameters(&self) -> Result<usize> {
        Ok(self.cost()?.parameters)
    }

    /// Multiplications with additions of one image, in projections, convolutions and attention.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for an impossible configuration.
    pub fn macs(&self) -> Result<u64> {
        Ok(self.cost()?.macs)
    }

    fn cost(&self) -> Result<Cost> {
        let plan = self.plan()?;
        let mut cost = Cost::default();
        let mut before: Option<&Stage> = None;
        for stage in &plan.stages {
            let (tokens, dim) = (stage.map[0] * stage.map[1], stage.dim);
            match (&stage.embed, before) {
                (Embed::Conv { config, norm, .. }, _) => {
                    let depth = config.inputs * config.kernel[0] * config.kernel[1];
                    cost.linear(tokens, depth, dim, true);
                    cost.add(if norm.is_some() { 2 * dim } else { 0 }, 0);
                }
                (Embed::Merge { .. }, before) => {
                    let wide = 4 * before.map_or(0, |s| s.dim);
                    cost.linear(tokens, wide, dim, false);
                    cost.add(2 * wide, 0);
                }
            }
            let positions = if stage.positions.is_some() { stage.tokens() * dim } else { 0 };
            let token = if stage.class_token { dim } else { 0 };
            let norm = if stage.norm.is_some() { 2 * dim } else { 0 };
            cost.add(positions + token + norm, 0);
            for (_, config) in &stage.blocks {
                block(&mut cost, config);
            }
            before = Some(stage);
        }
        let width = before.map_or(0, |s| s.dim);
        cost.add(if plan.norm.is_some() { 2 * width } else { 0 }, 0);
        cost.linear(1, width, plan.classes, true);
        Ok(cost)
    }
}

fn block(cost: &mut Cost, config: &VisionBlockConfig) {
    let attention = &config.attention;
    let (tokens, dim, bias) = (attention.tokens(), attention.dim, attention.qkv_bias);
    let [h, w] = attention.map;
    cost.add(4 * dim, 0);
    cost.linear(tokens, dim, config.mlp_hidden, true);
    cost.linear(tokens, config.mlp_hidden, dim, true);
    if config.mlp_conv {
        cost.depthwise(h * w, config.mlp_hidden, config.mlp_hidden, 3);
    }
    cost.linear(tokens, dim, dim, bias);
    cost.linear(tokens, dim, dim, true);
    let whole = Mixer { attention: config, dim, heads: attention.heads, window: [h, w], ratio: 1 };
    match attention.scope {
        Scope::Reduced { ratio, .. } => {
            let keys = (h / ratio) * (w / ratio);
            cost.linear(keys, dim, 2 * dim, bias);
            if ratio > 1 {
                cost.linear(keys, ratio * ratio * dim, dim, true);
                cost.add(2 * dim, 0);
            }
            Mixer { ratio, ..whole }.add_to(cost);
        }
        Scope::Cross { split } if [split; 2] != attention.map => {
            cost.linear(tokens, dim, 2 * dim, bias);
            let half = Mixer { dim: dim / 2, heads: attention.heads / 2, ..whole };
            Mixer { window: [h, split], ..half }.add_to(cost);
            Mixer { window: [split, w], ..half }.add_to(cost);
        }
        Scope::Windows { window, .. } => {
            cost.linear(tokens, dim, 2 * dim, bias);
            Mixer { window, ..whole }.add_to(cost);
        }
        _ => {
            cost.linear(tokens, dim, 2 * dim, bias);
            whole.add_to(cost);
        }
    }
}

/// What mixes the tokens of windows.
#[derive(Clone, Copy)]
struct Mixer<'a> {
    attention: &'a VisionBlockConfig,
    dim: usize,
    heads: usize,
    window: [usize; 2],
    ratio: usize,
}

impl Mixer<'_> {
    fn add_to(self, cost: &mut Cost) {
        let Mixer { attention, dim, heads, window: [h, w], ratio } = self;
        let attention = &attention.attention;
        let class = attention.tokens() - attention.map[0] * attention.map[1];
        let (queries, places) = (h * w + class, attention.map[0] * attention.map[1]);
        let keys = (h / ratio) * (w / ratio) + class;
        let windows = places / (h * w).max(1);
        let lepe = matches!(attention.scope, Scope::Cross { .. });
        match attention.mechanism {
            Mechanism::Softmax => {
                if matches!(attention.scope, Scope::Windows { .. }) {
                    cost.add((2 * h - 1) * (2 * w - 1) * heads, 0);
                }
                if lepe {
                    cost.depthwise(places, dim, dim, 3);
                }
                cost.add(0, product([2, windows, queries, keys, dim]));
            }
            Mechanism::Agent { agents } => {
                let sides = h / ratio + w / ratio + h + w + 2 * class;
                cost.add(heads * agents * (2 * 49 + sides), 0);
                cost.depthwise(places, dim, dim, 3);
                cost.add(0, product([2, windows, agents, queries + keys, dim]));
            }
            Mechanism::Focused(config) => {
                let inner = dim / heads.max(1);
                cost.depthwise(places, dim, inner, config.kernel);
                if lepe {
                    cost.depthwise(places, dim, dim, 3);
                }
                cost.add(dim + keys * dim, product([windows, queries + keys, dim, inner]));
            }
        }
    }
}
