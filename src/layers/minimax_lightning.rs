//! The lightning attention layer of MiniMax-01.

use super::gla::{expect_linear, heads_of, matrix, table};
use super::rows::rows;
use super::{Activation, Linear, Norm};
use crate::attention::State;
use crate::attention::lightning::LightningAttention;
use crate::error::{Result, expect_shape};
use crate::kernels::activation::Activate;
use crate::kernels::store::Keep;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{View, ViewMut};

const OP: &str = "minimax lightning";

/// Sizes of a [`MiniMaxLightning`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MiniMaxConfig {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Number of heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Under the root of the output norm: 1e-6 in transformers, 1e-5 in vLLM.
    pub norm_eps: f32,
}

/// The lightning attention layer of MiniMax-01.
///
/// ```text
/// [q | k | v] = silu(x Wqkv^T)                    rows of Wqkv interleaved: q, k, v of head 0, of head 1 ..
/// o = lightning(q, k, v; slopes)
/// out = (RMSNorm(o; weight) * sigmoid(x Wg^T)) Wout^T      the norm over all heads together
/// ```
///
/// State: `[batch, heads, head_dim, head_dim]`. `10 * hidden_size * heads * head_dim` flops per token for the
/// projections. Source: MiniMax-01 (arXiv 2501.08313) and its code in the transformers library.
///
/// ```
/// use linattn::layers::{Linear, MiniMaxConfig, MiniMaxLightning};
/// use linattn::{Runtime, tensor::Tensor};
/// let config = MiniMaxConfig { hidden_size: 6, heads: 2, head_dim: 4, norm_eps: 1e-6 };
/// let linear = |outputs, inputs| Linear::new(Tensor::<2>::zeros([outputs, inputs])?.view(), None);
/// let (qkv, gate, out_proj) = (linear(24, 6)?, linear(8, 6)?, linear(6, 8)?);
/// let layer = MiniMaxLightning::new(config, qkv, gate, &[1.0; 8], out_proj, &[0.5, 0.25])?;
/// let (x, mut y) = (Tensor::<3>::zeros([1, 5, 6])?, Tensor::<3>::zeros([1, 5, 6])?);
/// let mut state = layer.new_state(1)?;
/// layer.forward(&Runtime::new()?, x.view(), y.view_mut(), &mut state)?;
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MiniMaxLightning {
    config: MiniMaxConfig,
    qkv_proj: Linear,
    output_gate: Linear,
    out_proj: Linear,
    attention: LightningAttention,
    norm: Norm,
}

impl MiniMaxLightning {
    /// `qkv_proj`: `[3 heads head_dim, hidden]`, `output_gate`: `[heads head_dim, hidden]`, `norm_weight`:
    /// `[heads head_dim]`, `out_proj`: `[hidden, heads head_dim]`; one slope per head.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if a weight does not fit, [`Error::Value`](crate::Error::Value)
    /// for a slope that is NaN or negative.
    pub fn new(
        config: MiniMaxConfig,
        qkv_proj: Linear,
        output_gate: Linear,
        norm_weight: &[f32],
        out_proj: Linear,
        slopes: &[f64],
    ) -> Result<Self> {
        let (hidden, heads) = (config.hidden_size, config.heads);
        let inner = heads.saturating_mul(config.head_dim);
        expect_linear(OP, "qkv_proj", &qkv_proj, [inner.saturating_mul(3), hidden])?;
        expect_linear(OP, "output_gate", &output_gate, [inner, hidden])?;
        expect_linear(OP, "out_proj", &out_proj, [hidden, inner])?;
        let letters = "[heads * head_dim]";
        expect_shape(OP, "norm_weight", letters, [inner], [norm_weight.len()])?;
        expect_shape(OP, "slopes", "[heads]", [heads], [slopes.len()])?;
        Ok(Self {
            config,
            qkv_proj,
            output_gate,
            out_proj,
            attention: LightningAttention::new(slopes)?,
            norm: Norm::rms(norm_weight, config.norm_eps)?,
        })
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &MiniMaxConfig {
        &self.config
    }

    /// A state that has seen nothing: `[batch, heads, head_dim, head_dim]`.
    ///
    /// # Errors
    /// [`Error::Alloc`](crate::Error::Alloc) if memory cannot be had.
    pub fn new_state(&self, batch: usize) -> Result<State> {
        let hd = self.config.head_dim;
        State::new(batch, self.config.heads, hd, hd)
    }

    /// `x`, `out`: `[batch, len, hidden_size]`, the input already normed. Rows of all batches must lie the same
    /// distance apart. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and [`Error::Layout`](crate::Error::Layout) for arguments that do
    /// not fit, [`Error::Alloc`](crate::Error::Alloc) if scratch memory cannot be had; `out` and `state` are
    /// untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 3>,
        state: &mut State,
    ) -> Result<()> {
        let [batch, len, _] = x.shape();
        let MiniMaxConfig { hidden_size, heads, head_dim, .. } = self.config;
        let letters = "[batch, len, hidden_size]";
        let expected = [batch, len, hidden_size];
        expect_shape(OP, "x", letters, expected, x.shape())?;
        expect_shape(OP, "out", letters, expected, out.shape())?;
        state.expect(OP, [batch, heads, head_dim, head_dim])?;
        let (x, out) = (x.merge_rows()?, out.merge_rows()?);
        if batch * len == 0 {
            return Ok(());
        }
        rt.with_scratch(self.scratch_bytes(rt, batch * len), |cut| {
            self.run(rt, x, out, state, cut)
        })?
    }

    /// Scratch bytes that a call with `rows = batch * len` tokens takes from the runtime, besides those of
    /// [`LightningAttention::scratch_bytes`].
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        let inner = self.config.heads * self.config.head_dim;
        bytes_of::<f32>(rows * 3 * inner)
            + 2 * bytes_of::<f32>(rows * inner)
            + self.linear_bytes(rt, rows)
    }

    fn linear_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        let all = [&self.qkv_proj, &self.output_gate, &self.out_proj];
        let bytes = all.map(|l| l.scratch_bytes(rt, rows));
        bytes.into_iter().fold(0, usize::max)
    }

    fn run(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
        state: &mut State,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let (n, hd, heads) = (x.shape()[0], self.config.head_dim, self.config.heads);
        let (inner, batch) = (heads * hd, state.shape()[0]);
        let qkv = cut.take::<f32>(n * 3 * inner);
        let (mixed, gate) = (cut.take::<f32>(n * inner), cut.take::<f32>(n * inner));
        let work = cut.take::<u8>(self.linear_bytes(rt, n));
        let new = Keep::Nothing;
        self.qkv_proj.run(rt, x, matrix(qkv, n), new, Cut::new(work));
        self.output_gate.run(rt, x, matrix(gate, n), new, Cut::new(work));
        rows(rt, Activate(Activation::Silu), [], matrix(qkv, n));
        let shape = [batch, n / batch, heads, hd];
        let part = |at| heads_of(&qkv[at..], shape, 3 * inner, 3 * hd);
        let mix = ViewMut::new(&mut *mixed, shape).expect("planned size");
        self.attention.forward(rt, part(0), part(hd), part(2 * hd), mix, state)?;
        self.norm.gate(rt, matrix(mixed, n), table(gate, n), true);
        self.out_proj.run(rt, table(mixed, n), out, new, Cut::new(work));
        Ok(())
    }
}
