//! From named tensors to blocks.

use super::TransNormerConfig;
use crate::error::{Error, Result};
use crate::io::TensorSource;
use crate::layers::{GatedLinearAttention, GlaConfig, Lrpe, Sglu, SgluConfig, TransNormerBlock};
use crate::models::decoder::Maps;
use alloc::string::String;

/// Block `layer` under its published names.
pub(super) fn block(
    c: &TransNormerConfig,
    maps: &Maps<'_, impl TensorSource>,
    layer: usize,
) -> Result<TransNormerBlock> {
    let (embed, hidden, glu) = (c.embed_dim, c.hidden_dim, c.glu_dim);
    let name = |part: &str| -> String { alloc::format!("model.layers.{layer}.{part}") };
    let projection = |part: &str, shape: [usize; 2]| maps.linear(&name(part), shape, c.bias);
    let lrpe = match c.lrpe[layer] {
        true => {
            let (name, hd) = (name("token_mixer.lrpe.theta"), hidden / c.heads);
            let theta = maps.tensors.tensor(&name, [c.heads, 1, hd])?;
            let theta = Lrpe::new(theta.view().merge_rows()?).map_err(|e| Error::Checkpoint {
                tensor: name,
                expected: "finite angles".into(),
                got: alloc::format!("{e}"),
            })?;
            Some(theta)
        }
        false => None,
    };
    let gla = GlaConfig {
        embed_dim: embed,
        hidden_dim: hidden,
        heads: c.heads,
        act: c.act,
        norm_eps: c.norm_eps,
    };
    let token_mixer = GatedLinearAttention::new(
        gla,
        projection("token_mixer.qkvu_proj", [4 * hidden, embed])?,
        projection("token_mixer.out_proj", [embed, hidden])?,
        lrpe,
        &c.slopes.slopes(c.heads, layer, c.layers)?,
    )?;
    let sglu = SgluConfig { embed_dim: embed, glu_dim: glu, act: c.glu_act };
    let channel_mixer = Sglu::new(
        sglu,
        projection("channel_mixer.l1", [glu, embed])?,
        projection("channel_mixer.l2", [glu, embed])?,
        projection("channel_mixer.l3", [embed, glu])?,
    )?;
    TransNormerBlock::new(token_mixer, channel_mixer, c.norm_eps)
}
