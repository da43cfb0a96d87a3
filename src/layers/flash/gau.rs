//! The gated attention unit: a gated layer around quadratic attention.

use super::gated::{Buffers, Gated, Names, Projected, check, places};
use super::{GateNorm, PaperBias, RelativeBias};
use crate::attention::StreamState;
use crate::attention::quadratic::{Bias, Extra, Factor, QuadraticAttention, ScoreActivation};
use crate::error::{Error, Result, expect_shape};
use crate::io::TensorSource;
use crate::layers::{Parameters, Rope, RopeStyle};
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{Tensor, View, ViewMut};

const OP: &str = "gau";

/// Whose conventions and parameter names a [`Gau`] has.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum GauForm {
    /// The pseudo-code of the paper: queries and keys turned, `relu2(q . k / max_len + b)`. A causal one streams.
    Paper {
        /// The longest sequence, and what products are divided by.
        max_len: usize,
        /// The bias of scores.
        bias: PaperBias,
    },
    /// The PyTorch package `FLASH-pytorch`: `act((q . k + b) / len)`, T5 buckets. The result of a token depends on
    /// the length of the sequence.
    Package,
}

/// Sizes and choices of a [`Gau`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GauConfig {
    /// Whose conventions.
    pub form: GauForm,
    /// Width of input and output, `d`.
    pub dim: usize,
    /// Width of queries and keys, `s`.
    pub query_key_dim: usize,
    /// Width of values and gates, `e`.
    pub hidden: usize,
    /// A token sees no later one.
    pub causal: bool,
    /// What becomes of a score.
    pub act: ScoreActivation,
    /// The norm of the input.
    pub norm: GateNorm,
    /// Of the norm.
    pub eps: f32,
    /// The input is added to the output.
    pub residual: bool,
}

/// Gated attention unit, called FLASH-Quad when it attends to the whole sequence.
///
/// ```text
/// [u | v | z] = silu(Norm(x) Wuvz + b)             widths e, e, s
/// q, k = z * gamma_h + beta_h                      h = 0, 1; turned by position in the paper's form
/// y = x + (u * A v) Wo + bo,    A = act(scale q k^T + bias), zero for later keys if causal
/// ```
///
/// Cost per token: `2 d (2 e + s) + 2 e d` flops for the projections and `2 len (s + e)` for attention.
///
/// Parameters of the paper's form: `norm`, `uv` (`[2 e + s, d]`: u, v, z), `gamma` and `beta` (`[2, s]`), `w`
/// (`[2 max_len - 1]`) or `a` and `b` (`[1, s]`), `o`. Of the package: `norm`, `to_hidden.0` (v, u), `to_qk.0`,
/// `offsetscale.{gamma,beta}`, `rel_pos_bias.relative_attention_bias.weight` (`[32, 1]`), `to_out.0`.
///
/// Source: Transformer Quality in Linear Time (arXiv 2202.10447), section 2 and its code listing.
///
/// ```
/// use linattn::attention::quadratic::ScoreActivation;
/// use linattn::io::TensorMap;
/// use linattn::layers::flash::{Gau, GauConfig, GauForm, GateNorm, PaperBias};
/// use linattn::layers::Parameters;
/// use linattn::{Runtime, tensor::Tensor};
/// let config = GauConfig {
///     form: GauForm::Paper { max_len: 16, bias: PaperBias::Toeplitz },
///     dim: 4, query_key_dim: 2, hidden: 8, causal: true,
///     act: ScoreActivation::Relu2, norm: GateNorm::Scale, eps: 1e-5, residual: true,
/// };
/// let mut tensors = TensorMap::default();
/// for (name, shape) in [("norm.scala", &[1][..]), ("uv.weight", &[18, 4]), ("uv.bias", &[18]), ("gamma", &[2, 2]),
///     ("beta", &[2, 2]), ("w", &[31]), ("o.weight", &[4, 8]), ("o.bias", &[4])] {
///     tensors.insert(name, shape, vec![0.5; shape.iter().product()])?;
/// }
/// let layer = Gau::from_parameters(config, &Parameters::new(&tensors))?;
/// let (rt, x, mut y) = (Runtime::new()?, Tensor::<3>::zeros([1, 7, 4])?, Tensor::<3>::zeros([1, 7, 4])?);
/// layer.forward(&rt, x.view(), y.view_mut())?;
/// let mut state = layer.new_state(1)?; // a cache of keys and values
/// layer.stream(&rt, x.view(), y.view_mut(), &mut state)?;
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Gau {
    config: GauConfig,
    gated: Gated,
    attention: QuadraticAttention,
    bias: RelativeBias,
}

/// What may be hidden or added.
#[derive(Clone, Copy, Debug, Default)]
pub struct GauExtra<'a> {
    /// `[batch, len]`: whether a token counts. Others do not see a hidden one; in the paper's form it sees nothing
    /// either.
    pub mask: Option<View<'a, bool, 2>>,
    /// `[len, len]`: added to the products beside the layer's own bias.
    pub bias: Option<View<'a, f32, 2>>,
}

/// The memory of a causal [`Gau`] in the paper's form: keys and values of all tokens, up to the longest sequence.
#[derive(Clone, Debug)]
pub struct GauState {
    /// `[batch, max_len, s]`
    k: Tensor<3>,
    /// `[batch, max_len, e]`
    v: Tensor<3>,
    len: usize,
}

impl GauState {
    /// Tokens seen: the position of the next one.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token was seen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.len = 0;
    }

    /// Memory of the contents, in bytes, room for further tokens included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        size_of_val(self.k.as_slice()) + size_of_val(self.v.as_slice())
    }
}

impl StreamState for GauState {
    fn len(&self) -> usize {
        self.len
    }
    fn bytes(&self) -> usize {
        self.bytes()
    }
    fn bytes_at(&self, len: usize) -> usize {
        let most = self.k.shape()[1].max(1);
        self.bytes() / most * len.min(most)
    }
    fn reset(&mut self) {
        self.reset();
    }
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        let most = self.k.shape()[1];
        match self.len.checked_add(tokens).filter(|n| *n <= most) {
            Some(_) => Ok(()),
            None => {
                let expected = alloc::format!("room for {tokens} more of at most {most} tokens");
                Err(Error::value(OP, "state", expected, self.len))
            }
        }
    }
    fn blank(&self, len: usize) -> Result<Self> {
        let (k, v) = (Tensor::zeros(self.k.shape())?, Tensor::zeros(self.v.shape())?);
        let mut new = Self { k, v, len: 0 };
        new.reserve(len)?;
        new.len = len;
        Ok(new)
    }
    fn contents(&self, see: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        let (k, v) = (self.k.view().slice(1, 0, self.len), self.v.view().slice(1, 0, self.len));
        let rows = |x: View<'_, f32, 3>, see: &mut dyn FnMut(&[f32]) -> Result<()>| {
            let [batch, len, _] = x.shape();
            (0..batch * len).try_for_each(|i| see(x.row([i / len, i % len, 0])))
        };
        rows(k, see)?;
        rows(v, see)
    }
    fn contents_mut(&mut self, fill: &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
        let len = self.len;
        for x in [&mut self.k, &mut self.v] {
            let batch = x.shape()[0];
            let mut x = x.view_mut();
            (0..batch * len).try_for_each(|i| fill(x.row_mut([i / len, i % len, 0])))?;
        }
        Ok(())
    }
}

impl GauConfig {
    /// The attention of a layer.
    pub(crate) fn attention(&self) -> Result<QuadraticAttention> {
        let max_len = match self.form {
            GauForm::Paper { max_len, .. } => max_len,
            GauForm::Package => 1,
        };
        let (dim, s) = (self.dim, self.query_key_dim);
        let sizes =
            [("dim", dim), ("query_key_dim", s), ("hidden", self.hidden), ("max_len", max_len)];
        for (arg, n) in sizes {
            if n == 0 || n > 1 << 24 {
                return Err(Error::value(OP, arg, "a size from 1 to 2^24", n));
            }
        }
        let attention = match self.form {
            GauForm::Paper { .. } => {
                QuadraticAttention::new(self.act, Factor::Value((1.0 / max_len as f64) as f32))?
            }
            GauForm::Package => QuadraticAttention::new(self.act, Factor::InvLen)?
                .with_bias_scale(Factor::InvLen)?,
        };
        Ok(if self.causal { attention.causal() } else { attention })
    }
}

impl Gau {
    /// From named parameters, see above.
    ///
    /// # Errors
    /// [`Error::Value`] for sizes of 0, [`Error::Checkpoint`] for a parameter that is missing or does not fit,
    /// [`Error::Alloc`] if memory cannot be had.
    pub fn from_parameters<T: TensorSource>(
        config: GauConfig,
        p: &Parameters<'_, T>,
    ) -> Result<Self> {
        let attention = config.attention()?;
        let GauConfig { dim: d, query_key_dim: s, hidden: e, causal, .. } = config;
        let order = &[0, 1];
        let (names, rope, bias) = match config.form {
            GauForm::Paper { bias, max_len } => {
                let names = Names { paper: true, heads: "", out: "", order };
                let rope = Rope::new(RopeStyle::Half, s, 10000.0)?;
                (names, Some(rope), bias.load(p, max_len, s)?)
            }
            GauForm::Package => {
                let name = "rel_pos_bias.relative_attention_bias.weight";
                let buckets: Tensor<2> = p.tensor(name, [32, 1])?;
                let scale = libm::sqrt(d as f64) as f32;
                let bias = RelativeBias::t5(buckets.as_slice(), scale, causal)?;
                let names = Names { paper: false, heads: "offsetscale", out: "to_out.0", order };
                (names, None, bias)
            }
        };
        Ok(Self {
            gated: Gated::new(OP, [d, s, e], (config.norm, config.eps), names, rope, p)?,
            attention,
            bias,
            config,
        })
    }

    /// The sizes and choices.
    #[must_use]
    pub fn config(&self) -> &GauConfig {
        &self.config
    }

    /// Memory of the packed weights, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.gated.weight_bytes()
    }

    /// An empty cache for [`stream`](Self::stream).
    ///
    /// # Errors
    /// [`Error::Value`] for a layer that is not causal or whose tokens depend on the length, [`Error::Alloc`] if
    /// memory cannot be had.
    pub fn new_state(&self, batch: usize) -> Result<GauState> {
        let GauConfig { query_key_dim: s, hidden: e, causal, .. } = self.config;
        match self.config.form {
            GauForm::Paper { max_len, .. } if causal => Ok(GauState {
                k: Tensor::zeros([batch, max_len, s])?,
                v: Tensor::zeros([batch, max_len, e])?,
                len: 0,
            }),
            _ => Err(Error::value(OP, "form", "causal and the paper's for a state", "another")),
        }
    }

    /// `x`, `out`: `[batch, len, dim]`. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`] for arguments that do not fit or a sequence that is too long, [`Error::Alloc`] if scratch
    /// memory cannot be had; `out` is untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 3>,
    ) -> Result<()> {
        self.forward_with(rt, x, out, GauExtra::default())
    }

    /// As [`forward`](Self::forward) with hidden tokens and another bias.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), the shapes of `extra` included.
    pub fn forward_with(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 3>,
        extra: GauExtra<'_>,
    ) -> Result<()> {
        let [batch, len] = check(OP, self.config.dim, x, &out)?;
        if let Some(most) = self.bias.max_len().filter(|n| *n < len) {
            return Err(Error::shape(OP, "x", alloc::format!("at most {most} tokens"), x.shape()));
        }
        if let Some(mask) = extra.mask {
            expect_shape(OP, "mask", "[batch, len]", [batch, len], mask.shape())?;
        }
        if let Some(bias) = extra.bias {
            expect_shape(OP, "bias", "[len, len]", [len, len], bias.shape())?;
        }
        if batch == 0 || len == 0 {
            return Ok(());
        }
        rt.with_scratch(self.scratch_bytes(rt, [batch, len]), |mut cut| {
            let (mut b, table) = self.plan(rt, [batch, len], len, &mut cut);
            let row = |at, to: &mut [f32]| to.copy_from_slice(x.row(at));
            self.gated.normalise(rt, [batch, len], row, &mut b);
            let Projected { heads, v, mut mixed } = self.gated.project(rt, [batch, len], 0, &mut b);
            let bias = Bias { table: Some(self.table(len, table)), matrix: extra.bias };
            let all = Extra { key_mask: extra.mask, bias };
            let [q, k] = [0, 1].map(|h| heads.one_head(h));
            self.attention.forward_with(rt, q, k, v, mixed.reborrow(), all)?;
            if let (GauForm::Paper { .. }, Some(mask)) = (self.config.form, extra.mask) {
                for at @ [i, t, _] in places(batch, len) {
                    if !mask.row([i, 0])[t] {
                        mixed.row_mut(at).fill(0.0);
                    }
                }
            }
            self.gated.finish(rt, out, self.config.residual, &mut b);
            Ok(())
        })?
    }

    /// More tokens of every sequence, single ones included, behind those that `state` has seen: causal, in the paper's
    /// form. Splitting a sequence anywhere gives the same result. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`] for arguments that do not fit, [`Error::Value`] if the sequence becomes too long,
    /// [`Error::Alloc`] if scratch memory cannot be had; `out` and `state` are untouched then.
    pub fn stream(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 3>,
        state: &mut GauState,
    ) -> Result<()> {
        let [batch, len] = check(OP, self.config.dim, x, &out)?;
        let most = self.bias.max_len().unwrap_or(0);
        let expected = [batch, most, self.config.query_key_dim];
        expect_shape(OP, "state", "[batch, max_len, s]", expected, state.k.shape())?;
        let expected = [batch, most, self.config.hidden];
        expect_shape(OP, "state", "[batch, max_len, e]", expected, state.v.shape())?;
        state.reserve(len)?;
        if batch == 0 || len == 0 {
            return Ok(());
        }
        let (from, to) = (state.len, state.len + len);
        rt.with_scratch(self.bytes(rt, [batch, len], to), |mut cut| {
            let (mut b, table) = self.plan(rt, [batch, len], to, &mut cut);
            let row = |at, to: &mut [f32]| to.copy_from_slice(x.row(at));
            self.gated.normalise(rt, [batch, len], row, &mut b);
            let Projected { heads, v, mixed } = self.gated.project(rt, [batch, len], from, &mut b);
            let [q, k] = [0, 1].map(|h| heads.one_head(h));
            for (src, cache) in [(k, &mut state.k), (v, &mut state.v)] {
                let mut cache = cache.view_mut().slice(1, from, to);
                for at in places(batch, len) {
                    cache.row_mut(at).copy_from_slice(src.row(at));
                }
            }
            let bias = Bias { table: Some(self.table(to, table)), matrix: None };
            let [k, v] = [&state.k, &state.v].map(|x| x.view().slice(1, 0, to));
            let extra = Extra { key_mask: None, bias };
            self.attention.forward_with(rt, q, k, v, mixed, extra)?;
            self.gated.finish(rt, out, self.config.residual, &mut b);
            state.len = to;
            Ok(())
        })?
    }

    /// Scratch bytes that [`forward`](Self::forward) with `[batch, len]` tokens takes from the runtime, besides those
    /// of the attention.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, [batch, len]: [usize; 2]) -> usize {
        self.bytes(rt, [batch, len], len)
    }

    /// With `keys` positions.
    fn bytes(&self, rt: &Runtime, [batch, len]: [usize; 2], keys: usize) -> usize {
        bytes_of::<f32>(self.table_len(keys))
            + self.gated.bytes(rt, batch.saturating_mul(len), batch)
    }

    fn table_len(&self, keys: usize) -> usize {
        if self.bias.as_table().is_some() { 0 } else { (2 * keys).saturating_sub(1) }
    }

    fn plan<'a>(
        &self,
        rt: &Runtime,
        [batch, len]: [usize; 2],
        keys: usize,
        cut: &mut Cut<'a>,
    ) -> (Buffers<'a>, &'a mut [f32]) {
        let table = cut.take(self.table_len(keys));
        (self.gated.buffers(rt, [batch, len], cut), table)
    }

    /// The biases of `n` positions: the layer's own table, or one made in `room`.
    fn table<'a>(&'a self, n: usize, room: &'a mut [f32]) -> &'a [f32] {
        match self.bias.as_table() {
            Some(table) => table,
            None => {
                self.bias.fill(n, room);
                room
            }
        }
    }
}
