//! Focused linear attention on a map: keys have positional encodings.

use super::MapAttentionConfig;
use super::config::FocusedChoices;
use crate::attention::focused::{FocusedConfig, FocusedLinearAttention};
use crate::error::Result;
use crate::io::TensorSource;
use crate::kernels::elementwise::Sum;
use crate::layers::Parameters;
use crate::layers::gla::matrix;
use crate::layers::rows::rows;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{Tensor, View, ViewMut};

/// Focused linear attention with encoded keys.
#[derive(Clone, Debug)]
pub(super) struct Focused {
    attention: FocusedLinearAttention,
    /// `[1, keys, dim]`
    encoding: Tensor<3>,
}

impl Focused {
    pub fn load(
        config: &MapAttentionConfig,
        choices: FocusedChoices,
        parameters: &Parameters<'_, impl TensorSource>,
    ) -> Result<Self> {
        let scale = parameters.tensor("scale", [1, 1, config.dim])?;
        let own = FocusedConfig {
            heads: config.heads,
            focusing_factor: choices.focusing_factor,
            normaliser: choices.normaliser,
            ..FocusedConfig::default()
        };
        Ok(Self {
            attention: FocusedLinearAttention::new(own, scale.as_slice())?,
            encoding: parameters.tensor("positional_encoding", [1, config.keys(), config.dim])?,
        })
    }

    /// Scratch bytes of [`run`](Self::run) for some windows.
    pub fn bytes(&self, windows: usize) -> usize {
        bytes_of::<f32>(windows * self.encoding.as_slice().len())
    }

    /// `q`, `out`: `[windows, tokens, dim]`; `k`, `v`: `[windows, keys, dim]`.
    pub fn run(
        &self,
        rt: &Runtime,
        heads: usize,
        [q, k, v]: [View<'_, f32, 3>; 3],
        out: ViewMut<'_, f32, 3>,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let [windows, keys, dim] = k.shape();
        let encoded = cut.take::<f32>(windows * keys * dim);
        let encoding = self.encoding.view().merge_rows()?;
        for (w, part) in encoded.chunks_exact_mut(keys * dim).enumerate() {
            let k = k.slice(0, w, w + 1).merge_rows()?;
            rows(rt, Sum, [k, encoding], matrix(part, keys));
        }
        let k = View::new(&*encoded, [windows, keys, dim])?.split_heads(heads)?;
        let [q, v] = [q.split_heads(heads)?, v.split_heads(heads)?];
        self.attention.forward(rt, q, k, v, out.split_heads(heads)?)
    }
}
