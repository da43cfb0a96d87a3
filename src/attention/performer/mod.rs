//! Performer (FAVOR+): random features whose products estimate a kernel of queries and keys.

mod backward;
pub mod naive;
mod peak;
mod projection;
mod state;

pub use projection::{RowNorm, default_features, orthogonal_projection};
pub use state::PerformerState;

use super::linear::task;
use crate::error::{Error, Result, expect_shape};
use crate::kernels::favor::{Favor, RandomFeatures, Stabiliser as Lowered};
use crate::kernels::linear::Form;
use crate::runtime::Runtime;
use crate::simd::{PANEL, right_len};
use crate::tensor::{Element, Tensor, View, ViewMut};

const OP: &str = "performer attention";

/// Which kernel the features estimate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FavorKernel {
    /// The exponential of softmax attention: `m^-1/2 (exp(w_r . x - |x|^2 / 2 - c) + eps)`.
    Softmax {
        /// Added after the exponential.
        eps: f32,
    },
    /// A generalised kernel: `max(w_r . x, 0) + eps`.
    Relu {
        /// Added after the ReLU.
        eps: f32,
    },
}

/// What exponents of keys are lowered by in the softmax kernel. It cancels, but for `eps`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Stabiliser {
    /// The largest `w_r . k_j` of the whole sequence, as in the public implementation. It looks at later keys, so that
    /// a causal sequence cannot be fed in parts, and its first rows depend on its last ones.
    #[default]
    Sequence,
    /// This number: a sequence may be fed in parts. 0 suits queries and keys of about unit variance; exponents beyond
    /// 88 overflow.
    Fixed(f32),
}

/// Settings of a [`PerformerAttention`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PerformerConfig {
    /// What is estimated.
    pub kernel: FavorKernel,
    /// Query `i` reads keys `j <= i`.
    pub causal: bool,
    /// Queries and keys are multiplied by `dk^-1/4` first.
    pub normalize: bool,
    /// Added to every element of `z` when causal.
    pub denom_eps: f32,
    /// For the softmax kernel.
    pub stabiliser: Stabiliser,
}

impl PerformerConfig {
    /// The softmax kernel with the constants of the public implementation.
    #[must_use]
    pub const fn softmax() -> Self {
        Self {
            kernel: FavorKernel::Softmax { eps: 1e-4 },
            causal: false,
            normalize: true,
            denom_eps: 1e-6,
            stabiliser: Stabiliser::Sequence,
        }
    }

    /// The ReLU kernel with the constants of the public implementation.
    #[must_use]
    pub const fn relu() -> Self {
        Self { kernel: FavorKernel::Relu { eps: 1e-3 }, ..Self::softmax() }
    }

    /// The same, causal.
    #[must_use]
    pub const fn causal(self) -> Self {
        Self { causal: true, ..self }
    }
}

/// Performer attention.
///
/// ```text
/// x' = dk^-1/4 x                                    optional, queries and keys
/// phi(x)_r = m^-1/2 (exp(w_r . x' - |x'|^2 / 2 - c) + eps)   or   max(w_r . x', 0) + eps      r = 1 .. m
/// S = sum_j phi(k_j) v_j^T      z = sum_j phi(k_j)      o_i = phi(q_i) S / (phi(q_i) . z)
/// ```
///
/// The sums run over all keys, or over keys `j <= i` when causal, and `z` begins with `denom_eps` then. `c` is the
/// largest `w_r . x'` of a query's row; for keys see [`Stabiliser`].
///
/// State, when causal: `S` and `z`. With the ReLU kernel, and with the softmax kernel and a fixed stabiliser, splitting a
/// sequence anywhere and feeding the parts gives the same result. With the stabiliser of the sequence it would not,
/// and a state is refused.
///
/// Cost per token and head: `4 m dk` flops for features (`6 m dk` with the stabiliser of the sequence, which takes a
/// pass of its own over the keys), `2 m` exponentials, `4 m dv` for the sums, and `48 (m + dv)` more when causal.
///
/// Source: Rethinking attention with Performers (arXiv 2009.14794), lemma 1 and algorithm 1; constants of the public
/// PyTorch implementation.
///
/// ```
/// use linattn::attention::performer::{PerformerAttention, PerformerConfig, RowNorm, orthogonal_projection};
/// use linattn::{Runtime, tensor::Tensor};
/// let rt = Runtime::new()?;
/// let projection = orthogonal_projection(44, 16, RowNorm::Gaussian, 1)?;
/// let attention = PerformerAttention::new(PerformerConfig::relu().causal(), projection.view())?;
/// let (batch, len, heads, dim) = (1, 100, 2, 16);
/// let q = Tensor::<4>::zeros([batch, len, heads, dim])?;
/// let v = Tensor::<4>::from_slice(&vec![1.0; len * heads * dim], q.shape())?;
/// let mut out = q.clone();
/// let mut state = attention.new_state(batch, heads, dim)?;
/// attention.forward(&rt, q.view(), q.view(), v.view(), out.view_mut(), Some(&mut state))?;
/// assert!(out.as_slice().iter().all(|x| (x - 1.0).abs() < 2e-3));
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PerformerAttention {
    config: PerformerConfig,
    /// `[m, dk]`, times the scale of the data.
    projection: Tensor<2>,
    /// Its transpose in panels.
    panels: Tensor<1>,
}

impl PerformerAttention {
    /// From a projection `[m, dk]`, such as that of [`orthogonal_projection`].
    ///
    /// # Errors
    /// [`Error::Value`] for an empty projection or constants that are negative or not finite, [`Error::Alloc`] if
    /// memory cannot be had.
    pub fn new(config: PerformerConfig, projection: View<'_, f32, 2>) -> Result<Self> {
        let [m, dk] = projection.shape();
        if m == 0 || dk == 0 {
            return Err(Error::value(OP, "projection", "not empty", alloc::format!("{m} x {dk}")));
        }
        let (FavorKernel::Softmax { eps } | FavorKernel::Relu { eps }) = config.kernel;
        for (arg, x) in [("eps", eps), ("denom_eps", config.denom_eps)] {
            if !x.is_finite() || x < 0.0 {
                return Err(Error::value(OP, arg, "finite and not negative", x));
            }
        }
        if let Stabiliser::Fixed(c) = config.stabiliser
            && !c.is_finite()
        {
            return Err(Error::value(OP, "stabiliser", "finite", c));
        }
        let scale = if config.normalize { libm::pow(dk as f64, -0.25) } else { 1.0 };
        let mut own = Tensor::zeros([m, dk])?;
        let mut panels = Tensor::zeros([right_len(dk, m)])?;
        for (r, row) in own.as_mut_slice().chunks_exact_mut(dk).enumerate() {
            for (p, (to, x)) in row.iter_mut().zip(projection.row([r, 0])).enumerate() {
                *to = (f64::from(*x) * scale) as f32;
                panels.as_mut_slice()[(r / PANEL * dk + p) * PANEL + r % PANEL] = *to;
            }
        }
        Ok(Self { config, projection: own, panels })
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &PerformerConfig {
        &self.config
    }

    /// Number of features.
    #[must_use]
    pub fn features(&self) -> usize {
        self.projection.shape()[0]
    }

    /// Width of queries and keys.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.projection.shape()[1]
    }

    /// What `z` begins with.
    fn start(&self) -> f32 {
        if self.config.causal { self.config.denom_eps } else { 0.0 }
    }

    /// What is added to the sums that divide: nothing, as features are positive, or anything where they sum over nothing.
    fn sum_eps(&self, lk: usize, state: Option<&PerformerState>) -> f32 {
        let seen = lk > 0 || state.is_some_and(|s| !s.sums.is_empty());
        if self.config.causal || seen { 0.0 } else { 1.0 }
    }

    /// A state that has seen nothing, for values of width `dv`.
    ///
    /// # Errors
    /// [`Error::Value`] where features depend on the whole sequence, [`Error::Alloc`] if memory cannot be had.
    pub fn new_state(&self, batch: usize, heads: usize, dv: usize) -> Result<PerformerState> {
        self.streams()?;
        PerformerState::new([batch, heads, self.features(), dv], self.start())
    }

    /// Whether the features of a key depend on all keys.
    fn is_whole(&self) -> bool {
        let softmax = matches!(self.config.kernel, FavorKernel::Softmax { .. });
        softmax && self.config.stabiliser == Stabiliser::Sequence
    }

    /// Refuses what cannot be fed in parts.
    fn streams(&self) -> Result<()> {
        if self.is_whole() {
            let expected = "none, or a fixed stabiliser: that of the sequence needs all keys";
            return Err(Error::value(OP, "state", expected, "one"));
        }
        Ok(())
    }

    /// The features, keys not yet lowered.
    fn map(&self) -> RandomFeatures<'_> {
        let (m, dk) = (self.features() as f64, self.dim() as f64);
        let favor = match self.config.kernel {
            FavorKernel::Softmax { eps } => {
                let squared = if self.config.normalize { libm::pow(dk, -0.5) } else { 1.0 };
                let (half, norm) = ((0.5 * squared) as f32, libm::pow(m, -0.5) as f32);
                Favor::Softmax { eps, half, norm }
            }
            FavorKernel::Relu { eps } => Favor::Relu { eps },
        };
        let stabiliser = match self.config.stabiliser {
            Stabiliser::Fixed(c) => Lowered::Fixed(c),
            Stabiliser::Sequence => Lowered::Fixed(0.0),
        };
        RandomFeatures {
            projection: self.projection.as_slice(),
            panels: self.panels.as_slice(),
            features: self.features(),
            favor,
            stabiliser,
        }
    }

    /// Attends over more tokens of every batch row.
    ///
    /// `q`: `[batch, lq, heads, dk]`; `k`: `[batch, lk, heads, dk]`; `v`: `[batch, lk, heads, dv]`; `out`:
    /// `[batch, lq, heads, dv]`; `lq = lk` when causal. `state`, if given, is where the sums begin and what they
    /// become. Allocates nothing once the runtime has seen the shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not belong together, [`Error::Value`] for a state where features depend on the
    /// whole sequence, [`Error::Alloc`] if scratch memory cannot be had; `out` and `state` are untouched then.
    pub fn forward<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        out: ViewMut<'_, E, 4>,
        state: Option<&mut PerformerState>,
    ) -> Result<()> {
        self.check([q, k, v], "out", out.shape())?;
        let ([batch, _, heads, _], [_, lk, _, dv]) = (q.shape(), v.shape());
        let (map, causal) = (self.map(), self.config.causal);
        let eps = self.sum_eps(lk, state.as_deref());
        let start = self.start();
        let Some(state) = state else {
            if !self.is_whole() {
                return task::run(rt, form(map, [eps, start]), causal, [q, k, v], out, None);
            }
            return rt.with_scratch(peak::bytes(batch, heads), |mut cut| {
                let peaks = peak::of(rt, map, k, &mut cut)?;
                let map = RandomFeatures { stabiliser: Lowered::Heads(peaks), ..map };
                task::run(rt, form(map, [eps, start]), causal, [q, k, v], out, None)
            })?;
        };
        self.streams()?;
        state.sums.expect(OP, [batch, heads, self.features(), dv])?;
        state.sums.room(OP, lk)?;
        task::run(
            rt,
            form(map, [eps, start]),
            causal,
            [q, k, v],
            out,
            Some(state.sums.views_mut()),
        )?;
        state.sums.advance(lk);
        Ok(())
    }

    /// Whether shapes belong together; `out` is an argument of the output's shape, called `arg`.
    fn check<E: Element>(
        &self,
        [q, k, v]: [View<'_, E, 4>; 3],
        arg: &'static str,
        out: [usize; 4],
    ) -> Result<()> {
        let ([batch, lq, heads, _], dk) = (q.shape(), self.dim());
        let ([_, lk, ..], [.., dv]) = (k.shape(), v.shape());
        let keys = if self.config.causal { lq } else { lk };
        expect_shape(OP, "q", "[batch, lq, heads, dk]", [batch, lq, heads, dk], q.shape())?;
        expect_shape(OP, "k", "[batch, lk, heads, dk]", [batch, keys, heads, dk], k.shape())?;
        expect_shape(OP, "v", "[batch, lk, heads, dv]", [batch, keys, heads, dv], v.shape())?;
        expect_shape(OP, arg, "[batch, lq, heads, dv]", [batch, lq, heads, dv], out)
    }

    /// Scratch bytes that [`forward`](Self::forward) takes from the runtime for one thread, at most, and for the whole
    /// call beside.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, batch: usize, heads: usize, dv: usize) -> usize {
        peak::bytes(batch, heads) + task::scratch_bytes(rt, self.map(), heads, self.dim(), dv)
    }
}

/// Sums of features, normalised by themselves and `eps`; `z` begins with `start`.
fn form(map: RandomFeatures<'_>, [eps, start]: [f32; 2]) -> Form<RandomFeatures<'_>> {
    Form { map, scale: 1.0, eps: Some(eps), start }
}
