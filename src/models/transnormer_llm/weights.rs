//! From named tensors to layers.

use super::TransNormerConfig;
use crate::error::{Error, Result};
use crate::io::TensorSource;
use crate::layers::{
    GatedLinearAttention, GlaConfig, Linear, Lrpe, Sglu, SgluConfig, TransNormerBlock, WeightFormat,
};
use crate::tensor::{Rng, Tensor};
use alloc::string::String;

/// Makes linear maps of named tensors.
pub(super) struct Maps<'a, T> {
    pub tensors: &'a T,
    /// Projections have biases.
    pub bias: bool,
    pub format: WeightFormat,
}

impl<T: TensorSource> Maps<'_, T> {
    /// A weight `[outputs, inputs]` without bias.
    pub fn plain(&self, name: &str, shape: [usize; 2]) -> Result<Linear> {
        self.linear(name, shape, None)
    }

    /// A projection `[outputs, inputs]` with its bias, if the configuration has any.
    pub fn projection(&self, name: &str, shape: [usize; 2]) -> Result<Linear> {
        let bias = match self.bias {
            true => Some(self.tensors.tensor(&alloc::format!("{name}.bias"), [shape[0]])?),
            false => None,
        };
        self.linear(name, shape, bias)
    }

    fn linear(&self, name: &str, shape: [usize; 2], bias: Option<Tensor<1>>) -> Result<Linear> {
        let name = alloc::format!("{name}.weight");
        let weight = self.tensors.tensor(&name, shape)?;
        let bias = bias.as_ref().map(Tensor::as_slice);
        Linear::with_format(weight.view(), bias, self.format).map_err(|e| match e {
            Error::Value { expected, got, .. } => Error::Checkpoint { tensor: name, expected, got },
            e => e,
        })
    }
}

/// Block `layer` under its published names.
pub(super) fn block(
    c: &TransNormerConfig,
    maps: &Maps<'_, impl TensorSource>,
    layer: usize,
) -> Result<TransNormerBlock> {
    let (embed, hidden, glu) = (c.embed_dim, c.hidden_dim, c.glu_dim);
    let name = |part: &str| -> String { alloc::format!("model.layers.{layer}.{part}") };
    let projection = |part: &str, shape: [usize; 2]| maps.projection(&name(part), shape);
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

/// Weights of unit gain for measurements, the same for the same seed.
pub(super) struct Random {
    pub seed: u64,
    /// `heads * head dim` of the angles.
    pub hidden: usize,
}

impl TensorSource for Random {
    fn contains(&self, _: &str) -> bool {
        true
    }

    fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> Result<Tensor<N>> {
        let mut out = Tensor::zeros(shape)?;
        if name.ends_with("theta") {
            // The values that training starts from.
            for (j, x) in out.as_mut_slice().iter_mut().enumerate() {
                *x = libm::pow(10000.0, -2.0 * j as f64 / self.hidden as f64) as f32;
            }
            return Ok(out);
        }
        let mut hash = super::state::Fnv::default();
        hash.add(name.as_bytes());
        let mut rng = Rng::new(self.seed ^ hash.0);
        let inputs = shape[N - 1] as f64;
        let scale = (2.0 * libm::sqrt(3.0 / inputs)) as f32;
        for x in out.as_mut_slice() {
            *x = (rng.uniform() as f32 - 0.5) * scale;
        }
        Ok(out)
    }
}
