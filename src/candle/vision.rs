//! The token mixer of vision transformers.

use super::depthwise::depthwise;
use super::packed::AgentBiases;
use super::{Linear, Result, agent, attend, focused, linear, wrap};
use crate::attention::agent::AgentAttention;
use crate::attention::focused::FocusedConfig;
use crate::attention::softmax::SoftmaxAttention;
use crate::layers::vision::{Mechanism, Scope, VisionAttentionConfig};
use crate::layers::{DepthwiseConfig, Resample};
use crate::runtime::Runtime;
use crate::tensor::{View, ViewMut};
use candle_core::{Device, Module, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

/// Height and width of the tables that biases of agents are resized from.
const TABLE: [usize; 2] = [7; 2];

/// Multi-head attention over all tokens of a map, as
/// [`layers::vision::VisionAttention`](crate::layers::vision::VisionAttention) with [`Scope::Whole`], with its parameter
/// names: softmax, agent or focused linear attention.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use linattn::layers::vision::{Mechanism, Scope, VisionAttentionConfig};
/// use linattn::{Runtime, candle::VisionAttention};
/// use std::sync::Arc;
/// let (rt, parameters) = (Arc::new(Runtime::new()?), VarMap::new());
/// let vb = VarBuilder::from_varmap(&parameters, DType::F32, &Device::Cpu);
/// let config = VisionAttentionConfig {
///     dim: 32,
///     heads: 2,
///     map: [8, 8],
///     scope: Scope::Whole { class_token: true },
///     mechanism: Mechanism::focused(),
///     qkv_bias: true,
/// };
/// let layer = VisionAttention::load(&rt, config, vb)?;
/// let y = layer.forward(&Tensor::ones((1, 65, 32), DType::F32, &Device::Cpu)?)?;
/// assert!(y.sum_all()?.backward()?.get(&parameters.all_vars()[0]).is_some());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct VisionAttention {
    rt: Arc<Runtime>,
    config: VisionAttentionConfig,
    qkv: Linear,
    proj: Linear,
    mix: Mix,
    local: Option<Local>,
}

/// What differs between mechanisms.
#[derive(Clone, Debug)]
enum Mix {
    Softmax,
    Agent(Box<Agents>),
    /// The scale, `[dim]`, and the encoding of keys, `[1, tokens, dim]`.
    Focused(FocusedConfig, [Tensor; 2]),
}

impl VisionAttention {
    /// Reads or creates the parameters.
    ///
    /// # Errors
    /// For sizes that do not fit each other, another scope than [`Scope::Whole`], and parameters that are missing or of
    /// another shape.
    pub fn load(
        rt: &Arc<Runtime>,
        config: VisionAttentionConfig,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        const OP: &str = "vision attention";
        config.check(OP).map_err(wrap)?;
        let Scope::Whole { class_token } = config.scope else {
            bail!("{OP}: scope must be Whole, got {:?}", config.scope);
        };
        let VisionAttentionConfig { dim, heads, .. } = config;
        let local = |kernels, size| Local::load(kernels, size, vb.pp("dwc"));
        let (mix, local) = match config.mechanism {
            Mechanism::Softmax => (Mix::Softmax, None),
            Mechanism::Agent { agents } => {
                let own = Agents::load(rt, &config, agents, class_token, &vb)?;
                (Mix::Agent(Box::new(own)), Some(local(dim, 3)?))
            }
            Mechanism::Focused(choices) => {
                let normal = Init::Randn { mean: 0.0, stdev: 0.02 };
                let scale = vb.get_with_hints((1, 1, dim), "scale", Init::Const(0.0))?;
                let shape = (1, config.tokens(), dim);
                let encoding = vb.get_with_hints(shape, "positional_encoding", normal)?;
                let own = FocusedConfig {
                    heads,
                    focusing_factor: choices.focusing_factor,
                    normaliser: choices.normaliser,
                    ..FocusedConfig::default()
                };
                let mix = Mix::Focused(own, [scale.flatten_all()?, encoding]);
                (mix, Some(local(dim / heads, choices.kernel)?))
            }
        };
        Ok(Self {
            rt: rt.clone(),
            config,
            qkv: Linear::load(rt, [dim, 3 * dim], config.qkv_bias, vb.pp("qkv"))?,
            proj: Linear::load(rt, [dim, dim], true, vb.pp("proj"))?,
            mix,
            local,
        })
    }
}

impl Module for VisionAttention {
    /// `[batch, tokens, dim]`, the class token first if there is one.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let VisionAttentionConfig { dim, heads, map: [h, w], .. } = self.config;
        if tokens != self.config.tokens() {
            bail!("vision attention: x must have {} tokens, got {tokens}", self.config.tokens());
        }
        let (rt, qkv) = (&self.rt, self.qkv.forward(x)?);
        let part = |i| qkv.narrow(2, i * dim, dim);
        let split = |x: &Tensor| x.reshape((batch, x.dim(1)?, heads, dim / heads));
        // A part of the columns of the projection stays where it is.
        let heads_of =
            |i| qkv.reshape((batch, tokens, 3, heads, dim / heads))?.narrow(2, i, 1)?.squeeze(2);
        let (q, v) = (heads_of(0)?, heads_of(2)?);
        let mixed = match &self.mix {
            Mix::Softmax => attend(rt, &SoftmaxAttention::new(), [&q, &heads_of(1)?, &v])?,
            Mix::Agent(own) => {
                let (agents, biases) = (split(&own.pool(&part(0)?)?)?, own.biases(rt, [h, w])?);
                let qkv = [&q, &heads_of(1)?, &v];
                agent(rt, &AgentAttention::new(), qkv, &agents, Some(&biases))?
            }
            Mix::Focused(own, [scale, encoding]) => {
                let k = split(&part(1)?.broadcast_add(encoding)?)?;
                focused(rt, *own, [&q, &k, &v], scale)?
            }
        };
        let mut mixed = mixed.flatten_from(2)?;
        if let Some(local) = &self.local {
            let class = tokens - h * w;
            let map = part(2)?.narrow(1, class, h * w)?.reshape((batch, h, w, dim))?;
            let map = local.forward(rt, &map)?;
            let map = map.reshape((batch, h * w, dim))?.pad_with_zeros(1, class, 0)?;
            mixed = (mixed + map)?;
        }
        self.proj.forward(&mixed)
    }
}

/// The convolution of values that is added to attention.
#[derive(Clone, Debug)]
struct Local {
    size: usize,
    /// `[kernels, 1, size, size]`
    weight: Tensor,
    bias: Tensor,
}

impl Local {
    fn load(kernels: usize, size: usize, vb: VarBuilder<'_>) -> Result<Self> {
        if size.is_multiple_of(2) || size > 63 {
            bail!("vision attention: kernel must be odd and at most 63, got {size}");
        }
        let init = Init::Randn { mean: 0.0, stdev: 1.0 / size as f64 };
        Ok(Self {
            size,
            weight: vb.get_with_hints((kernels, 1, size, size), "weight", init)?,
            bias: vb.get_with_hints(kernels, "bias", Init::Const(0.0))?,
        })
    }

    fn forward(&self, rt: &Arc<Runtime>, x: &Tensor) -> Result<Tensor> {
        depthwise(rt, DepthwiseConfig::same(self.size), x, &self.weight, &self.bias)
    }
}

/// Pooled agents, and the tables that the biases of their scores are made of.
#[derive(Clone, Debug)]
struct Agents {
    /// `[agents, places]`: what agents are means of.
    pool: Tensor,
    /// `[places, 49]`: the interpolation of a table.
    resize: Tensor,
    /// Tables of maps, of rows and of columns, each for agents and for queries.
    maps: [Tensor; 2],
    rows: [Tensor; 2],
    columns: [Tensor; 2],
    class: Option<[Tensor; 2]>,
}

impl Agents {
    fn load(
        rt: &Arc<Runtime>,
        config: &VisionAttentionConfig,
        n: usize,
        class_token: bool,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let (heads, [h, w], [th, tw]) = (config.heads, config.map, TABLE);
        let side = (1..=n.min(1 << 12)).find(|p| p * p >= n).filter(|p| p * p == n);
        let Some(side) = side else {
            bail!("agent attention: agents must be a square number, got {n}");
        };
        let init = Init::Randn { mean: 0.0, stdev: 0.02 };
        let table = |name: &str, shape: &[usize]| vb.get_with_hints(shape, name, init);
        let pool = Resample::average([h, w], [side; 2]).and_then(|plan| weights(rt, &plan));
        let resize = Resample::bilinear(TABLE, [h, w]).and_then(|plan| weights(rt, &plan));
        let tensor = |(data, shape): (Vec<f32>, [usize; 2])| {
            Tensor::from_vec(data, &shape, &Device::Cpu)?.t()?.contiguous()
        };
        let class = || -> Result<_> {
            Ok([table("ac_bias", &[1, heads, n, 1])?, table("ca_bias", &[1, heads, 1, n])?])
        };
        Ok(Self {
            pool: tensor(pool.map_err(wrap)?)?,
            resize: tensor(resize.map_err(wrap)?)?,
            maps: [table("an_bias", &[heads, n, th, tw])?, table("na_bias", &[heads, n, th, tw])?],
            rows: [
                table("ah_bias", &[1, heads, n, h, 1])?,
                table("ha_bias", &[1, heads, h, 1, n])?,
            ],
            columns: [
                table("aw_bias", &[1, heads, n, 1, w])?,
                table("wa_bias", &[1, heads, 1, w, n])?,
            ],
            class: class_token.then(class).transpose()?,
        })
    }

    /// Means of queries, `[batch, agents, dim]`, without those of the class token.
    fn pool(&self, q: &Tensor) -> Result<Tensor> {
        let places = self.pool.dim(1)?;
        let q = q.narrow(1, q.dim(1)? - places, places)?.contiguous()?;
        self.pool.broadcast_matmul(&q)
    }

    /// Those of agents against keys, `[heads, n, keys]`, and of queries against agents, `[heads, queries, n]`.
    fn biases(&self, rt: &Arc<Runtime>, [h, w]: [usize; 2]) -> Result<AgentBiases> {
        let (heads, n, ..) = self.maps[0].dims4()?;
        let resized = |table: &Tensor| {
            linear(rt, &table.flatten_from(2)?, &self.resize, None)?.reshape((heads, n, h, w))
        };
        let sum = |map: Tensor, i: usize| -> Result<Tensor> {
            let map = map.broadcast_add(&self.rows[i].squeeze(0)?)?;
            map.broadcast_add(&self.columns[i].squeeze(0)?)
        };
        let mut agent = sum(resized(&self.maps[0])?, 0)?.flatten_from(2)?;
        let turned = resized(&self.maps[1])?.permute((0, 2, 3, 1))?;
        let mut query = sum(turned, 1)?.reshape((heads, h * w, n))?;
        if let Some([ac, ca]) = &self.class {
            agent = Tensor::cat(&[&ac.squeeze(0)?, &agent], 2)?;
            query = Tensor::cat(&[&ca.squeeze(0)?, &query], 1)?;
        }
        Ok(AgentBiases { agent, query })
    }
}

/// What a plan does to a map, as a matrix `[inputs, outputs]`.
fn weights(rt: &Runtime, plan: &Resample) -> crate::Result<(Vec<f32>, [usize; 2])> {
    let ([h, w], [oh, ow]) = (plan.input_size(), plan.output_size());
    let (inputs, outputs) = (h * w, oh * ow);
    let mut one = vec![0.0; inputs];
    let mut all = vec![0.0; inputs * outputs];
    for (i, row) in all.chunks_exact_mut(outputs).enumerate() {
        one[i] = 1.0;
        let out = ViewMut::new(row, [1, oh, ow, 1])?;
        plan.forward(rt, View::new(&one, [1, h, w, 1])?, out)?;
        one[i] = 0.0;
    }
    Ok((all, [inputs, outputs]))
}
