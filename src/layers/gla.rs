//! The token mixer of TransNormerLLM.

use super::rows::rows;
use super::{Activation, Linear, Lrpe, Norm};
use crate::attention::State;
use crate::attention::lightning::LightningAttention;
use crate::error::{Error, Result, expect_shape};
use crate::kernels::activation::Activate;
use crate::kernels::store::Keep;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{View, ViewMut};

const OP: &str = "gated linear attention";

/// Sizes of a [`GatedLinearAttention`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GlaConfig {
    /// Width of input and output.
    pub embed_dim: usize,
    /// Width of each of q, k, v and u, over all heads.
    pub hidden_dim: usize,
    /// Number of heads; divides `hidden_dim`.
    pub heads: usize,
    /// Applied to q and k.
    pub act: Activation,
    /// Under the root of the output norm.
    pub norm_eps: f32,
}

/// Gated linear attention as in TransNormerLLM.
///
/// ```text
/// [q | k | v | u] = x Wqkvu^T + b          each [batch, len, heads, hd], hd = hidden_dim / heads
/// q, k = lrpe(act(q)), lrpe(act(k))        lrpe optional: 2 hd wide
/// o = lightning(q, k, v; slopes)
/// out = (SRMSNorm(o) * u) Wout^T + b       the norm over all heads together
/// ```
///
/// State: `[batch, heads, hd or 2 hd, hd]`; positions of LRPE continue at `state.len()`.
/// `10 * hidden * embed` flops per token for the projections, `5 * hidden * embed` weights.
///
/// Source: TransNormerLLM (arXiv 2307.14995), sections 3.1 and 3.2, and the code of its released weights.
///
/// ```
/// use linattn::attention::lightning::SlopeSchedule;
/// use linattn::layers::{Activation, GatedLinearAttention, GlaConfig, Linear};
/// use linattn::{Runtime, tensor::Tensor};
/// let config = GlaConfig { embed_dim: 8, hidden_dim: 8, heads: 2, act: Activation::Silu, norm_eps: 1e-6 };
/// let qkvu = Linear::new(Tensor::<2>::zeros([32, 8])?.view(), None)?;
/// let out_proj = Linear::new(Tensor::<2>::zeros([8, 8])?.view(), None)?;
/// let slopes = SlopeSchedule::Hf.slopes(2, 0, 1)?;
/// let layer = GatedLinearAttention::new(config, qkvu, out_proj, None, &slopes)?;
/// let (x, mut y) = (Tensor::<3>::zeros([1, 5, 8])?, Tensor::<3>::zeros([1, 5, 8])?);
/// let mut state = layer.new_state(1)?;
/// layer.forward(&Runtime::new()?, x.view(), y.view_mut(), &mut state)?;
/// assert_eq!(state.len(), 5);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GatedLinearAttention {
    config: GlaConfig,
    qkvu_proj: Linear,
    out_proj: Linear,
    lrpe: Option<Lrpe>,
    attention: LightningAttention,
    norm: Norm,
}

/// One checked call: rows are batch-major.
pub(super) struct Call<'a> {
    pub x: View<'a, f32, 2>,
    pub batch: usize,
    pub mask: Option<View<'a, f32, 2>>,
    pub out: ViewMut<'a, f32, 2>,
    pub keep: Keep<'static>,
}

impl GatedLinearAttention {
    /// `qkvu_proj`: `[4 hidden, embed]`, rows in the order q, k, v, u; `out_proj`: `[embed, hidden]`; `lrpe`:
    /// `[heads, hd]`; one slope per head.
    ///
    /// # Errors
    /// [`Error::Value`] if the heads do not divide `hidden_dim` or a slope is NaN or negative, [`Error::Shape`]
    /// if a weight does not fit.
    pub fn new(
        config: GlaConfig,
        qkvu_proj: Linear,
        out_proj: Linear,
        lrpe: Option<Lrpe>,
        slopes: &[f64],
    ) -> Result<Self> {
        let GlaConfig { embed_dim: embed, hidden_dim: hidden, heads, .. } = config;
        if heads == 0 || !hidden.is_multiple_of(heads) {
            let expected = alloc::format!("a divisor of hidden_dim = {hidden}");
            return Err(Error::value(OP, "heads", expected, heads));
        }
        let four = hidden.saturating_mul(4);
        expect_linear(OP, "qkvu_proj", &qkvu_proj, [four, embed])?;
        expect_linear(OP, "out_proj", &out_proj, [embed, hidden])?;
        if let Some(lrpe) = &lrpe {
            let expected = [heads, hidden / heads];
            expect_shape(OP, "lrpe", "[heads, dim]", expected, lrpe.shape())?;
        }
        expect_shape(OP, "slopes", "[heads]", [heads], [slopes.len()])?;
        Ok(Self {
            norm: Norm::simple_rms(config.norm_eps)?,
            attention: LightningAttention::new(slopes)?,
            config,
            qkvu_proj,
            out_proj,
            lrpe,
        })
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &GlaConfig {
        &self.config
    }

    /// Memory of the packed weights, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.qkvu_proj.bytes() + self.out_proj.bytes()
    }

    /// A state that has seen nothing: `[batch, heads, hd, hd]`, or `[batch, heads, 2 hd, hd]` with LRPE.
    ///
    /// # Errors
    /// [`Error::Alloc`] if memory cannot be had.
    pub fn new_state(&self, batch: usize) -> Result<State> {
        let hd = self.head_dim();
        State::new(batch, self.config.heads, self.key_dim(), hd)
    }

    /// `x`, `out`: `[batch, len, embed]`, the input already normed. Rows of all batches must lie the same
    /// distance apart. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::Layout`] for arguments that do not fit, [`Error::Alloc`] if scratch memory
    /// cannot be had; `out` and `state` are untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 3>,
        state: &mut State,
    ) -> Result<()> {
        self.call(rt, x, None, out, state)
    }

    /// As [`forward`](Self::forward); where `mask` (`[batch, len]`) is 0, the value of the token counts as 0.
    /// Decay and positions run on, which suits padding on the left.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_masked(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        mask: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 3>,
        state: &mut State,
    ) -> Result<()> {
        self.call(rt, x, Some(mask), out, state)
    }

    fn call<'a>(
        &self,
        rt: &Runtime,
        x: View<'a, f32, 3>,
        mask: Option<View<'a, f32, 2>>,
        out: ViewMut<'a, f32, 3>,
        state: &mut State,
    ) -> Result<()> {
        let [batch, len, _] = x.shape();
        let letters = "[batch, len, embed]";
        let expected = [batch, len, self.config.embed_dim];
        expect_shape(OP, "x", letters, expected, x.shape())?;
        expect_shape(OP, "out", letters, expected, out.shape())?;
        if let Some(mask) = mask {
            expect_shape(OP, "mask", "[batch, len]", [batch, len], mask.shape())?;
        }
        let call =
            Call { x: x.merge_rows()?, batch, mask, out: out.merge_rows()?, keep: Keep::Nothing };
        rt.with_scratch(self.scratch_bytes(rt, batch * len), |cut| self.run(rt, call, state, cut))?
    }

    /// Scratch bytes that a call with `rows = batch * len` tokens takes from the runtime, besides those of
    /// [`LightningAttention::scratch_bytes`].
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        let hidden = self.config.hidden_dim;
        let wide = if self.lrpe.is_some() { 2 * hidden } else { 0 };
        bytes_of::<f32>(rows * 4 * hidden)
            + bytes_of::<f32>(rows * hidden)
            + 2 * bytes_of::<f32>(rows * wide)
            + (self.qkvu_proj.scratch_bytes(rt, rows)).max(self.out_proj.scratch_bytes(rt, rows))
    }

    fn head_dim(&self) -> usize {
        self.config.hidden_dim / self.config.heads
    }

    fn key_dim(&self) -> usize {
        self.head_dim() * if self.lrpe.is_some() { 2 } else { 1 }
    }

    /// A call with [`scratch_bytes`](Self::scratch_bytes) of memory. Only the attention itself can fail, before
    /// anything is changed.
    pub(super) fn run(
        &self,
        rt: &Runtime,
        call: Call<'_>,
        state: &mut State,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let (n, batch, hidden) = (call.x.shape()[0], call.batch, self.config.hidden_dim);
        let (heads, hd) = (self.config.heads, self.head_dim());
        state.expect(OP, [batch, heads, self.key_dim(), hd])?;
        if n == 0 {
            return Ok(());
        }
        let len = n / batch;
        state.room(OP, len)?;
        let qkvu = cut.take::<f32>(n * 4 * hidden);
        let mixed = cut.take::<f32>(n * hidden);
        let wide = if self.lrpe.is_some() { 2 * hidden } else { 0 };
        let (q_wide, k_wide) = (cut.take::<f32>(n * wide), cut.take::<f32>(n * wide));
        let need = (self.qkvu_proj.scratch_bytes(rt, n)).max(self.out_proj.scratch_bytes(rt, n));
        let work = cut.take::<u8>(need);

        let all = matrix(qkvu, n);
        self.qkvu_proj.run(rt, call.x, all, Keep::Nothing, Cut::new(work));
        if self.config.act != Activation::Identity {
            match self.config.act {
                // Needs the rows of q and k apart.
                Activation::Exp => {
                    for j in [0, hidden] {
                        let part = matrix(qkvu, n).slice(1, j, j + hidden);
                        rows(rt, Activate(self.config.act), [], part);
                    }
                }
                act => rows(rt, Activate(act), [], matrix(qkvu, n).slice(1, 0, 2 * hidden)),
            }
        }
        if let Some(mask) = call.mask {
            let row = |t: usize| mask.row([t / len, 0])[t % len];
            let dead = (0..n).filter(|t| row(*t) == 0.0);
            dead.for_each(|t| qkvu[t * 4 * hidden + 2 * hidden..][..hidden].fill(0.0));
        }
        let part = |at| heads_of(&qkvu[at..], [batch, len, heads, hd], 4 * hidden, hd);
        let (mut q, mut k, v) = (part(0), part(hidden), part(2 * hidden));
        if let Some(lrpe) = &self.lrpe {
            let shape = [batch, len, heads, 2 * hd];
            for (x, wide) in [(&mut q, q_wide), (&mut k, k_wide)] {
                let out = ViewMut::new(&mut *wide, shape).expect("planned size");
                lrpe.run(rt, *x, state.len(), out);
                *x = View::new(&*wide, shape).expect("planned size");
            }
        }
        let out = ViewMut::new(&mut *mixed, [batch, len, heads, hd]).expect("planned size");
        self.attention.forward(rt, q, k, v, out, state)?;
        let u = table(qkvu, n).slice(1, 3 * hidden, 4 * hidden);
        self.norm.gate(rt, matrix(mixed, n), u, false);
        self.out_proj.run(rt, table(mixed, n), call.out, call.keep, Cut::new(work));
        Ok(())
    }
}

/// A buffer as a matrix of `rows` rows.
pub(super) fn matrix(data: &mut [f32], rows: usize) -> ViewMut<'_, f32, 2> {
    let width = data.len() / rows;
    ViewMut::new(data, [rows, width]).expect("planned size")
}

/// A buffer as a matrix of `rows` rows, to be read.
pub(super) fn table(data: &[f32], rows: usize) -> View<'_, f32, 2> {
    let width = data.len() / rows;
    View::new(data, [rows, width]).expect("planned size")
}

/// Heads of a row-major matrix: `row` floats per token, `head` floats from one head to the next.
pub(super) fn heads_of(
    data: &[f32],
    shape: [usize; 4],
    row: usize,
    head: usize,
) -> View<'_, f32, 4> {
    let strides = [shape[1] * row, row, head, 1];
    View::with_strides(data, shape, strides).expect("planned size")
}

/// Refuses a linear map that is not `[outputs, inputs]`.
pub(super) fn expect_linear(
    op: &'static str,
    arg: &'static str,
    linear: &Linear,
    expected: [usize; 2],
) -> Result<()> {
    let got = [linear.outputs(), linear.inputs()];
    expect_shape(op, arg, "[outputs, inputs]", expected, got)
}
