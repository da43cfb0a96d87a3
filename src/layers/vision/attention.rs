//! The token mixer of vision transformers.

use super::config::{Mechanism, Scope, VisionAttentionConfig};
use super::map_attention::MapAttention;
use crate::error::{Result, expect_shape};
use crate::io::TensorSource;
use crate::kernels::store::Keep;
use crate::layers::gla::{matrix, table};
use crate::layers::{Conv2d, Conv2dConfig, Linear, Norm, Parameters};
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{View, ViewMut};
use alloc::boxed::Box;
use alloc::vec::Vec;

const OP: &str = "vision attention";

/// Multi-head attention over the tokens of a map.
///
/// ```text
/// [q | k | v] = x Wqkv^T + b            or, with a reduced map t:  q = x Wq^T + b,  [k | v] = t Wkv^T + b
/// out = mix(q, k, v) Wproj^T + b        t = LayerNorm(conv(x)), kernel = stride = ratio
/// ```
///
/// `mix` is a [`MapAttention`], or one for each half of the channels with [`Scope::Cross`]. `8 dim^2` flops per
/// token for the projections besides those of the attention.
///
/// ```
/// use linattn::layers::Parameters;
/// use linattn::layers::vision::{Mechanism, Scope, VisionAttention, VisionAttentionConfig};
/// use linattn::{Runtime, tensor::Tensor};
/// # struct Zeros;
/// # impl linattn::io::TensorSource for Zeros {
/// #     fn contains(&self, _: &str) -> bool {
/// #         true
/// #     }
/// #     fn tensor<const N: usize>(&self, _: &str, shape: [usize; N]) -> linattn::Result<Tensor<N>> {
/// #         Tensor::zeros(shape)
/// #     }
/// # }
/// // The attention of Agent-DeiT-T; Zeros is a source of tensors, a checkpoint is another.
/// let config = VisionAttentionConfig {
///     dim: 192,
///     heads: 3,
///     map: [14, 14],
///     scope: Scope::Whole { class_token: true },
///     mechanism: Mechanism::Agent { agents: 49 },
///     qkv_bias: true,
/// };
/// let attention = VisionAttention::load(config, &Parameters::new(&Zeros).at("blocks.0.attn"))?;
/// let x = Tensor::<3>::zeros([1, 197, 192])?;
/// let mut y = x.clone();
/// attention.forward(&Runtime::new()?, x.view(), y.view_mut())?;
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct VisionAttention {
    config: VisionAttentionConfig,
    pub(super) projection: Projection,
    pub(super) mixers: Vec<MapAttention>,
    proj: Linear,
}

/// Where queries, keys and values come from.
#[derive(Clone, Debug)]
pub(super) enum Projection {
    One { qkv: Linear },
    Two { q: Linear, kv: Linear, reduce: Option<Box<(Conv2d, Norm)>> },
}

impl Projection {
    /// The projection of all three from the same tokens.
    pub fn one(&self) -> Option<&Linear> {
        match self {
            Projection::One { qkv } => Some(qkv),
            Projection::Two { .. } => None,
        }
    }
}

impl VisionAttention {
    /// From named tensors: `qkv` and `proj`; `q`, `kv`, `sr` and `norm` with [`Scope::Reduced`]; and those of
    /// [`MapAttention::load`], with [`Scope::Cross`] below `attns.0` and `attns.1`.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for sizes that do not fit each other,
    /// [`Error::Checkpoint`](crate::Error::Checkpoint) for a tensor that is missing or does not fit,
    /// [`Error::Alloc`](crate::Error::Alloc) if memory cannot be had.
    pub fn load(
        config: VisionAttentionConfig,
        parameters: &Parameters<'_, impl TensorSource>,
    ) -> Result<Self> {
        config.check(OP)?;
        let (dim, bias) = (config.dim, config.qkv_bias);
        // A power multiplies the errors of queries and keys.
        let linear = |name, outputs| -> Result<Linear> {
            let linear = parameters.linear(name, [outputs, dim], bias)?;
            Ok(match config.mechanism {
                Mechanism::Focused(_) => linear.careful(),
                _ => linear,
            })
        };
        let projection = match config.scope {
            Scope::Reduced { ratio, norm_eps } => {
                let square = Conv2dConfig::square(dim, dim, ratio, ratio, 0);
                let reduce = |()| -> Result<_> {
                    let conv = Conv2d::load(square, parameters, "sr", true)?;
                    Ok(Box::new((conv, parameters.layer_norm("norm", dim, norm_eps)?)))
                };
                Projection::Two {
                    q: linear("q", dim)?,
                    kv: linear("kv", 2 * dim)?,
                    reduce: (ratio > 1).then_some(()).map(reduce).transpose()?,
                }
            }
            _ => Projection::One { qkv: linear("qkv", 3 * dim)? },
        };
        let mixers =
            config.mixers().into_iter().flatten().enumerate().map(|(i, mixer)| {
                match config.scope {
                    Scope::Cross { .. } => MapAttention::load(mixer, &parameters.at("attns").at(i)),
                    _ => MapAttention::load(mixer, parameters),
                }
            });
        let mixers = mixers.collect::<Result<Vec<_>>>()?;
        Ok(Self { config, projection, mixers, proj: parameters.linear("proj", [dim, dim], true)? })
    }

    /// The sizes and choices.
    #[must_use]
    pub fn config(&self) -> &VisionAttentionConfig {
        &self.config
    }

    /// Memory of the packed weights of projections, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let inputs = match &self.projection {
            Projection::One { qkv } => qkv.bytes(),
            Projection::Two { q, kv, reduce } => {
                q.bytes() + kv.bytes() + reduce.as_ref().map_or(0, |r| r.0.weight_bytes())
            }
        };
        inputs + self.proj.bytes()
    }

    /// `x`, `out`: `[batch, tokens, dim]`, the class token first if there is one. Rows of all batches must lie the
    /// same distance apart. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and [`Error::Layout`](crate::Error::Layout) for arguments that do not
    /// fit, [`Error::Alloc`](crate::Error::Alloc) if scratch memory cannot be had; `out` is untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 3>,
    ) -> Result<()> {
        let (letters, batch) = ("[batch, tokens, dim]", x.shape()[0]);
        let expected = [batch, self.config.tokens(), self.config.dim];
        expect_shape(OP, "x", letters, expected, x.shape())?;
        expect_shape(OP, "out", letters, expected, out.shape())?;
        x.merge_rows()?;
        let out = out.merge_rows()?;
        rt.with_scratch(self.scratch_bytes(rt, batch), |cut| {
            self.run(rt, x, out, Keep::Nothing, cut)
        })?
    }

    /// Scratch bytes that a call takes from the runtime, besides those of the attention itself.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, batch: usize) -> usize {
        let (n, dim) = (batch * self.config.tokens(), self.config.dim);
        let m = self.keys(batch);
        let own = match &self.projection {
            Projection::One { .. } => bytes_of::<f32>(3 * n * dim),
            Projection::Two { .. } => bytes_of::<f32>(n * dim) + bytes_of::<f32>(2 * m * dim),
        };
        own + bytes_of::<f32>(n * dim) + self.work_bytes(rt, batch)
    }

    /// Keys of all batches.
    fn keys(&self, batch: usize) -> usize {
        let mixer = self.mixers[0].config();
        batch * mixer.windows() * mixer.keys()
    }

    fn work_bytes(&self, rt: &Runtime, batch: usize) -> usize {
        let (n, m) = (batch * self.config.tokens(), self.keys(batch));
        let inputs = match &self.projection {
            Projection::One { qkv } => qkv.scratch_bytes(rt, n),
            Projection::Two { q, kv, reduce } => {
                let reduced = reduce.as_ref().map_or(0, |r| {
                    let conv = &r.0;
                    let normed = 2 * bytes_of::<f32>(m * self.config.dim);
                    normed + conv.scratch_bytes(rt, m).max(kv.scratch_bytes(rt, m))
                });
                q.scratch_bytes(rt, n).max(kv.scratch_bytes(rt, m)).max(reduced)
            }
        };
        let mixers = self.mixers.iter().map(|mixer| mixer.scratch_bytes(batch));
        inputs.max(self.proj.scratch_bytes(rt, n)).max(mixers.max().unwrap_or(0))
    }

    /// A checked call with [`scratch_bytes`](Self::scratch_bytes) of memory. Only the attention itself can fail,
    /// before `out` is changed.
    pub(super) fn run(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 2>,
        keep: Keep<'static>,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let ([batch, tokens, dim], m) = (x.shape(), self.keys(x.shape()[0]));
        let n = batch * tokens;
        if n == 0 {
            return Ok(());
        }
        let (first, second) = match self.projection {
            Projection::One { .. } => (3 * n * dim, 0),
            Projection::Two { .. } => (n * dim, 2 * m * dim),
        };
        let (queries, pairs) = (cut.take::<f32>(first), cut.take::<f32>(second));
        let mixed = cut.take::<f32>(n * dim);
        let work = cut.take::<u8>(self.work_bytes(rt, batch));
        let rows = x.merge_rows()?;
        let qkv = match &self.projection {
            Projection::One { qkv } => {
                qkv.run(rt, rows, matrix(queries, n), Keep::Nothing, Cut::new(work));
                let all = View::new(&*queries, [batch, tokens, 3 * dim])?;
                [0, 1, 2].map(|i| all.slice(2, i * dim, (i + 1) * dim))
            }
            Projection::Two { q, kv, reduce } => {
                q.run(rt, rows, matrix(queries, n), Keep::Nothing, Cut::new(work));
                match reduce {
                    None => kv.run(rt, rows, matrix(pairs, m), Keep::Nothing, Cut::new(work)),
                    Some(reduce) => {
                        let (conv, norm) = &**reduce;
                        let mut cut = Cut::new(&mut *work);
                        let [t, normed] = [(); 2].map(|()| cut.take::<f32>(m * dim));
                        let rest = conv.scratch_bytes(rt, m).max(kv.scratch_bytes(rt, m));
                        let work = cut.take::<u8>(rest);
                        let map = x.split_rows(self.config.map)?;
                        conv.run(rt, map, matrix(t, m), Keep::Nothing, Cut::new(work));
                        norm.run(rt, table(t, m), matrix(normed, m));
                        let (t, out) = (table(normed, m), matrix(pairs, m));
                        kv.run(rt, t, out, Keep::Nothing, Cut::new(work));
                    }
                }
                let pairs = View::new(&*pairs, [batch, m / batch, 2 * dim])?;
                let [k, v] = [0, 1].map(|i| pairs.slice(2, i * dim, (i + 1) * dim));
                [View::new(&*queries, [batch, tokens, dim])?, k, v]
            }
        };
        let part = dim / self.mixers.len();
        for (i, mixer) in self.mixers.iter().enumerate() {
            let (from, to) = (i * part, (i + 1) * part);
            let out = ViewMut::new(&mut *mixed, [batch, tokens, dim])?.slice(2, from, to);
            mixer.run(rt, qkv.map(|x| x.slice(2, from, to)), out, Cut::new(work))?;
        }
        self.proj.run(rt, table(mixed, n), out, keep, Cut::new(work));
        Ok(())
    }
}
