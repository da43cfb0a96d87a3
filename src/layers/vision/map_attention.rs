//! Tokens of a map, or of its windows, that mix.

use super::agent::Agent;
use super::config::{MapAttentionConfig, Mechanism};
use super::focused::Focused;
use super::local::Local;
use super::relative::Softmax;
use super::windows::Windows;
use crate::error::{Result, expect_shape};
use crate::io::TensorSource;
use crate::layers::Parameters;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{View, ViewMut};
use alloc::boxed::Box;

const OP: &str = "map attention";

/// Attention between the tokens of a map, or of each of its windows, with what belongs to it besides: biases,
/// pooled agents, positional encodings, and convolutions of the values.
///
/// Queries, keys and values come projected; [`VisionAttention`](super::VisionAttention) is the whole layer. With
/// the [`Scope::Cross`](super::Scope::Cross) of CSwin, where the projections belong to the block, this is what its
/// code calls attention.
///
/// ```
/// use linattn::layers::Parameters;
/// use linattn::layers::vision::{MapAttention, MapAttentionConfig, Mechanism};
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
/// // Zeros is a source of tensors; a checkpoint is another.
/// let config = MapAttentionConfig::whole(32, 2, [8, 8], Mechanism::Agent { agents: 9 });
/// let attention = MapAttention::load(config, &Parameters::new(&Zeros))?;
/// let x = Tensor::<3>::zeros([1, 64, 32])?;
/// let mut y = x.clone();
/// attention.forward(&Runtime::new()?, x.view(), x.view(), x.view(), y.view_mut())?;
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MapAttention {
    config: MapAttentionConfig,
    core: Core,
    local: Option<Local>,
}

/// What differs between mechanisms.
#[derive(Clone, Debug)]
enum Core {
    Softmax(Softmax),
    Agent(Box<Agent>),
    Focused(Focused),
}

impl MapAttention {
    /// From named tensors:
    ///
    /// | mechanism | tensors |
    /// |---|---|
    /// | softmax | `relative_position_bias_table` with relative positions |
    /// | agent | `an_bias`, `na_bias`, `ah_bias`, `aw_bias`, `ha_bias`, `wa_bias`; with a class token `ac_bias`, `ca_bias`; `dwc`, or `get_v` with locally enhanced positions |
    /// | focused | `scale`, `positional_encoding`, `dwc` |
    /// | softmax and focused with locally enhanced positions | `get_v` besides |
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for sizes that do not fit each other,
    /// [`Error::Checkpoint`](crate::Error::Checkpoint) for a tensor that is missing or does not fit,
    /// [`Error::Alloc`](crate::Error::Alloc) if memory cannot be had.
    pub fn load(
        config: MapAttentionConfig,
        parameters: &Parameters<'_, impl TensorSource>,
    ) -> Result<Self> {
        config.check(OP)?;
        let core = match config.mechanism {
            Mechanism::Softmax => Core::Softmax(Softmax::load(&config, parameters)?),
            Mechanism::Agent { agents } => {
                Core::Agent(Box::new(Agent::load(&config, agents, parameters)?))
            }
            Mechanism::Focused(choices) => {
                Core::Focused(Focused::load(&config, choices, parameters)?)
            }
        };
        Ok(Self { config, core, local: Local::load(&config, parameters)? })
    }

    /// The sizes and choices.
    #[must_use]
    pub fn config(&self) -> &MapAttentionConfig {
        &self.config
    }

    /// `q`, `out`: `[batch, tokens, dim]`; `k`, `v`: `[batch, keys, dim]`, both with the class token if there is
    /// one. Rows of all batches must lie the same distance apart. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and [`Error::Layout`](crate::Error::Layout) for arguments that do not
    /// fit, [`Error::Alloc`](crate::Error::Alloc) if scratch memory cannot be had.
    pub fn forward(
        &self,
        rt: &Runtime,
        q: View<'_, f32, 3>,
        k: View<'_, f32, 3>,
        v: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 3>,
    ) -> Result<()> {
        let (batch, dim) = (q.shape()[0], self.config.dim);
        let windows = self.config.windows();
        let queries = [batch, windows * self.config.queries(), dim];
        let keys = [batch, windows * self.config.keys(), dim];
        expect_shape(OP, "q", "[batch, tokens, dim]", queries, q.shape())?;
        expect_shape(OP, "k", "[batch, keys, dim]", keys, k.shape())?;
        expect_shape(OP, "v", "[batch, keys, dim]", keys, v.shape())?;
        expect_shape(OP, "out", "[batch, tokens, dim]", queries, out.shape())?;
        for x in [q, k, v] {
            x.merge_rows()?;
        }
        if batch == 0 {
            return Ok(());
        }
        rt.with_scratch(self.scratch_bytes(batch), |cut| self.run(rt, [q, k, v], out, cut))?
    }

    /// Scratch bytes that a call takes from the runtime, besides those of the attention itself.
    #[must_use]
    pub fn scratch_bytes(&self, batch: usize) -> usize {
        let tokens = batch * self.config.windows() * self.config.queries();
        let copies = if self.geometry().in_order() { 0 } else { 4 };
        copies * bytes_of::<f32>(tokens * self.config.dim) + self.mix_bytes(batch)
    }

    pub(super) fn mix_bytes(&self, batch: usize) -> usize {
        let (windows, dim) = (batch * self.config.windows(), self.config.dim);
        let core = match &self.core {
            Core::Softmax(_) => 0,
            Core::Agent(agent) => agent.bytes(windows, dim),
            Core::Focused(focused) => focused.bytes(windows),
        };
        core.max(self.local.as_ref().map_or(0, |local| local.bytes(windows, dim)))
    }

    fn geometry(&self) -> Windows {
        let MapAttentionConfig { map, window, shift, .. } = self.config;
        Windows { map, window, shift }
    }

    /// A checked call with [`scratch_bytes`](Self::scratch_bytes) of memory. Only the attention itself can fail.
    pub(super) fn run(
        &self,
        rt: &Runtime,
        qkv: [View<'_, f32, 3>; 3],
        out: ViewMut<'_, f32, 3>,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let (n, m, dim) = (self.config.queries(), self.config.keys(), self.config.dim);
        let geometry = self.geometry();
        if geometry.in_order() {
            let [q, k, v] = qkv;
            return self.mix(
                rt,
                [q.regroup(n)?, k.regroup(m)?, v.regroup(m)?],
                out.regroup(n)?,
                cut,
            );
        }
        let shape = [qkv[0].shape()[0] * self.config.windows(), n, dim];
        let [q, k, v, o] = [(); 4].map(|()| cut.take::<f32>(shape.iter().product()));
        for (src, dst) in qkv.into_iter().zip([&mut *q, &mut *k, &mut *v]) {
            geometry.gather(rt, src, ViewMut::new(dst, shape)?);
        }
        let qkv = [View::new(q, shape)?, View::new(k, shape)?, View::new(v, shape)?];
        self.mix(rt, qkv, ViewMut::new(&mut *o, shape)?, cut)?;
        geometry.scatter(View::new(o, shape)?, out);
        Ok(())
    }

    /// `q`, `out`: `[windows of all batches, tokens, dim]`; `k`, `v`: `[windows of all batches, keys, dim]`.
    fn mix(
        &self,
        rt: &Runtime,
        qkv: [View<'_, f32, 3>; 3],
        mut out: ViewMut<'_, f32, 3>,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let windows = qkv[0].shape()[0];
        let work = cut.take::<u8>(self.mix_bytes(windows / self.config.windows()));
        self.mechanism(rt, qkv, out.reborrow(), Cut::new(work))?;
        match &self.local {
            Some(local) => local.run(rt, qkv[2], out, Cut::new(work)),
            None => Ok(()),
        }
    }

    /// The attention alone, without convolutions.
    pub(super) fn mechanism(
        &self,
        rt: &Runtime,
        qkv: [View<'_, f32, 3>; 3],
        out: ViewMut<'_, f32, 3>,
        cut: Cut<'_>,
    ) -> Result<()> {
        let heads = self.config.heads;
        match &self.core {
            Core::Softmax(softmax) => {
                let [q, k, v] = qkv;
                let qkv = [q.split_heads(heads)?, k.split_heads(heads)?, v.split_heads(heads)?];
                softmax.run(rt, qkv, out.split_heads(heads)?)
            }
            Core::Agent(agent) => agent.run(rt, heads, qkv, out, cut),
            Core::Focused(focused) => focused.run(rt, heads, qkv, out, cut),
        }
    }
}
