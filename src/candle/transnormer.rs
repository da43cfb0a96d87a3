//! TransNormerLLM.

use super::feed_forward::FeedForward;
use super::gla::Gla;
use super::layer::{Stream, apply, stacked};
use super::linear::{embed, embedding_and_head};
use super::norm::{Kind, Rows};
use super::{Linear, Result, srms_norm, wrap};
use crate::attention::lightning::LightningAttention;
use crate::layers::{GlaConfig, SgluConfig};
use crate::models::TransNormerConfig;
use crate::runtime::Runtime;
use candle_core::{Module, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

/// The token mixer, as [`layers::GatedLinearAttention`](crate::layers::GatedLinearAttention); parameters `qkvu_proj`,
/// `out_proj` and, with LRPE, `lrpe.theta`.
#[derive(Clone, Debug)]
pub struct GatedLinearAttention {
    rt: Arc<Runtime>,
    qkvu_proj: Linear,
    gla: Gla,
    theta: Option<Tensor>,
    out_proj: Linear,
}

impl GatedLinearAttention {
    /// Reads or creates the parameters; one slope per head.
    ///
    /// # Errors
    /// For parameters that are missing or of another shape, and slopes that are NaN or negative.
    pub fn load(
        rt: &Arc<Runtime>,
        config: GlaConfig,
        [bias, lrpe]: [bool; 2],
        slopes: &[f64],
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let GlaConfig { embed_dim, hidden_dim, heads, .. } = config;
        let theta = lrpe.then(|| {
            let one = Init::Const(1.0);
            vb.get_with_hints((heads, 1, hidden_dim / heads.max(1)), "lrpe.theta", one)
        });
        Ok(Self {
            rt: rt.clone(),
            qkvu_proj: Linear::load(rt, [embed_dim, 4 * hidden_dim], bias, vb.pp("qkvu_proj"))?,
            gla: Gla {
                config,
                bias,
                lrpe,
                attention: LightningAttention::new(slopes).map_err(wrap)?,
            },
            theta: theta.transpose()?,
            out_proj: Linear::load(rt, [hidden_dim, embed_dim], bias, vb.pp("out_proj"))?,
        })
    }
}

impl GatedLinearAttention {
    fn run(&self, x: &Tensor, stream: &Stream) -> Result<Tensor> {
        let mut params = stacked(&[&self.qkvu_proj])?;
        params.extend(self.theta.clone());
        params.extend(stacked(&[&self.out_proj])?);
        apply(&self.rt, self.gla.clone(), stream, x, &params)
    }
}

impl Module for GatedLinearAttention {
    /// `[batch, len, embed]`, each sequence from an empty state.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, &Stream::default())
    }
}

/// The channel mixer, as [`layers::Sglu`](crate::layers::Sglu); parameters `l1`, `l2`, `l3`.
#[derive(Clone, Debug)]
pub struct Sglu {
    rt: Arc<Runtime>,
    config: SgluConfig,
    l1: Linear,
    l2: Linear,
    l3: Linear,
}

impl Sglu {
    /// Reads or creates the parameters.
    ///
    /// # Errors
    /// For parameters that are missing or of another shape.
    pub fn load(
        rt: &Arc<Runtime>,
        config: SgluConfig,
        bias: bool,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let SgluConfig { embed_dim, glu_dim, .. } = config;
        Ok(Self {
            rt: rt.clone(),
            config,
            l1: Linear::load(rt, [embed_dim, glu_dim], bias, vb.pp("l1"))?,
            l2: Linear::load(rt, [embed_dim, glu_dim], bias, vb.pp("l2"))?,
            l3: Linear::load(rt, [glu_dim, embed_dim], bias, vb.pp("l3"))?,
        })
    }
}

impl Sglu {
    fn run(&self, x: &Tensor, stream: &Stream) -> Result<Tensor> {
        let Self { rt, config: SgluConfig { act, .. }, l1, l2, l3 } = self;
        let layer = FeedForward { act: *act, gated: true, bias: l3.bias().is_some() };
        let params = [stacked(&[l1, l2])?, stacked(&[l3])?].concat();
        apply(rt, layer, stream, x, &params)
    }
}

impl Module for Sglu {
    /// `[.., embed]`
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, &Stream::default())
    }
}

/// One block, as [`layers::TransNormerBlock`](crate::layers::TransNormerBlock); parameters of a
/// [`GatedLinearAttention`] as `token_mixer` and of an [`Sglu`] as `channel_mixer`.
#[derive(Clone, Debug)]
pub struct TransNormerBlock {
    token_mixer: GatedLinearAttention,
    channel_mixer: Sglu,
    norm_eps: f32,
}

impl TransNormerBlock {
    /// From its parts.
    #[must_use]
    pub fn new(token_mixer: GatedLinearAttention, channel_mixer: Sglu, norm_eps: f32) -> Self {
        Self { token_mixer, channel_mixer, norm_eps }
    }

    /// Block `layer` of a model.
    ///
    /// # Errors
    /// As [`GatedLinearAttention::load`].
    pub fn load(
        rt: &Arc<Runtime>,
        config: &TransNormerConfig,
        layer: usize,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let c = config;
        let gla = GlaConfig {
            embed_dim: c.embed_dim,
            hidden_dim: c.hidden_dim,
            heads: c.heads,
            act: c.act,
            norm_eps: c.norm_eps,
        };
        let Some(lrpe) = c.lrpe.get(layer) else { bail!("the model has no block {layer}") };
        let slopes = c.slopes.slopes(c.heads, layer, c.layers).map_err(wrap)?;
        let mixer = vb.pp("token_mixer");
        let gla = GatedLinearAttention::load(rt, gla, [c.bias, *lrpe], &slopes, mixer)?;
        let sglu = SgluConfig { embed_dim: c.embed_dim, glu_dim: c.glu_dim, act: c.glu_act };
        let sglu = Sglu::load(rt, sglu, c.bias, vb.pp("channel_mixer"))?;
        Ok(Self::new(gla, sglu, c.norm_eps))
    }
}

impl Module for TransNormerBlock {
    /// `[batch, len, embed]`, each sequence from an empty state.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let norm = Rows { kind: Kind::SimpleRms, eps: self.norm_eps };
        let stream = Stream { norm: Some((norm, vec![])), residual: true };
        self.channel_mixer.run(&self.token_mixer.run(x, &stream)?, &stream)
    }
}

/// The language model, as [`models::TransNormerLlm`](crate::models::TransNormerLlm), with its parameter names.
#[derive(Clone, Debug)]
pub struct TransNormerLlm {
    rt: Arc<Runtime>,
    embed: Tensor,
    embed_scale: f64,
    blocks: Vec<TransNormerBlock>,
    norm_eps: f32,
    head: Linear,
}

impl TransNormerLlm {
    /// Reads or creates the parameters.
    ///
    /// # Errors
    /// For an impossible configuration and parameters that are missing or of another shape.
    pub fn load(rt: &Arc<Runtime>, config: &TransNormerConfig, vb: VarBuilder<'_>) -> Result<Self> {
        crate::models::Architecture::check(config).map_err(wrap)?;
        let (vocab, width) = (config.vocab_size, config.embed_dim);
        let (embed, head) = embedding_and_head(
            rt,
            [vocab, width],
            config.tie_word_embeddings,
            [vb.pp("model.embed_tokens"), vb.pp("lm_head")],
        )?;
        let block = |l| TransNormerBlock::load(rt, config, l, vb.pp(format!("model.layers.{l}")));
        Ok(Self {
            rt: rt.clone(),
            embed,
            embed_scale: if config.no_scale_embedding { 1.0 } else { (width as f64).sqrt() },
            blocks: (0..config.layers).map(block).collect::<Result<_>>()?,
            norm_eps: config.norm_eps,
            head,
        })
    }
}

impl Module for TransNormerLlm {
    /// Token ids (`[batch, len]` of `u32`) to logits (`[batch, len, vocab]`).
    fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let mut x = (embed(&self.embed, tokens)? * self.embed_scale)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        self.head.forward(&srms_norm(&self.rt, &x, self.norm_eps)?)
    }
}
