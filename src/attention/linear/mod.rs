//! Linear attention: a feature map in place of the exponential, so that keys and values sum up to a state.

pub(in crate::attention) mod backward;
mod group;
pub mod naive;
mod shared;
mod state;
pub(in crate::attention) mod task;

pub use crate::kernels::feature_map::FeatureMap;
pub use state::LinearState;

use super::Scale;
use crate::error::{Error, Result, expect_shape};
use crate::kernels::linear::Form;
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};

const OP: &str = "linear attention";

/// Linear attention with a feature map, with or without normaliser.
///
/// ```text
/// S = sum_j phi(k_j) v_j^T      z = sum_j phi(k_j)      o_i = scale phi(q_i) S / (scale phi(q_i) . z + eps)
/// ```
///
/// The sums run over all keys, or over keys `j <= i` when causal, and begin at a given state. Causal sequences
/// longer than a few tokens run in chunks, single tokens in the recurrent form; splitting a sequence anywhere
/// and feeding the parts gives the same result. Results do not depend on the number of threads.
///
/// Cost per token and head: `4 dk dv` flops, and `48 (dk + dv)` more when causal; a step of decoding reads and
/// writes the state once.
///
/// Source: Transformers are RNNs (arXiv 2006.16236), section 3.2 to 3.4.
///
/// ```
/// use linattn::attention::linear::{FeatureMap, LinearAttention, LinearState};
/// use linattn::{Runtime, tensor::Tensor};
/// let rt = Runtime::new()?;
/// let (batch, len, heads, dim) = (1, 100, 2, 16);
/// let shape = [batch, len, heads, dim];
/// let (q, k) = (Tensor::<4>::zeros(shape)?, Tensor::<4>::zeros(shape)?);
/// let v = Tensor::<4>::from_slice(&vec![1.0; len * heads * dim], shape)?;
/// let mut out = Tensor::<4>::zeros(shape)?;
/// let attention = LinearAttention::new(FeatureMap::Elu1).causal();
/// let mut state = LinearState::new(batch, heads, dim, dim)?;
/// attention.forward(&rt, q.view(), k.view(), v.view(), out.view_mut(), Some(&mut state))?;
/// assert!(out.as_slice().iter().all(|x| (x - 1.0).abs() < 1e-5));
/// assert_eq!(state.len(), 100);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct LinearAttention {
    map: FeatureMap,
    scale: Scale,
    eps: Option<f32>,
    causal: bool,
}

impl LinearAttention {
    /// Every query reads all keys; outputs are normalised with `eps = 1e-6`, and `scale` is 1.
    #[must_use]
    pub const fn new(map: FeatureMap) -> Self {
        Self { map, scale: Scale::One, eps: Some(1e-6), causal: false }
    }

    /// Query `i` reads keys `j <= i`.
    #[must_use]
    pub fn causal(self) -> Self {
        Self { causal: true, ..self }
    }

    /// What is added to the normaliser; without one the output is `scale phi(q) S`.
    ///
    /// # Errors
    /// [`Error::Value`] if `eps` is negative, not finite or subnormal.
    pub fn with_eps(self, eps: Option<f32>) -> Result<Self> {
        match eps {
            Some(e) if e != 0.0 && !(e.is_normal() && e > 0.0) => {
                Err(Error::value(OP, "eps", "0 or a positive normal number", e))
            }
            // Not the negative zero.
            _ => Ok(Self { eps: eps.map(f32::abs), ..self }),
        }
    }

    /// Another factor of `phi(q)`.
    ///
    /// # Errors
    /// [`Error::Value`] if it is not finite.
    pub fn with_scale(self, scale: Scale) -> Result<Self> {
        Ok(Self { scale: scale.check(OP)?, ..self })
    }

    /// Attends over more tokens of every batch row.
    ///
    /// `q`: `[batch, lq, heads, dk]`; `k`: `[batch, lk, heads, dk]`; `v`: `[batch, lk, heads, dv]`; `out`:
    /// `[batch, lq, heads, dv]`; `lq = lk` when causal. `state`, if given, is where the sums begin and what they
    /// become; without it they begin at zero. Allocates nothing once the runtime has seen the shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not belong together, [`Error::Alloc`] if scratch memory cannot be had;
    /// `out` and `state` are untouched then.
    pub fn forward<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        out: ViewMut<'_, E, 4>,
        state: Option<&mut LinearState>,
    ) -> Result<()> {
        self.check([q, k, v], out.shape(), "out")?;
        let ([batch, _, heads, dk], [_, lk, _, dv]) = (q.shape(), v.shape());
        let form = Form { map: self.map, scale: self.scale.of(dk), eps: self.eps, start: 0.0 };
        let Some(state) = state else {
            return task::run(rt, form, self.causal, [q, k, v], out, None);
        };
        state.expect(OP, [batch, heads, dk, dv])?;
        state.room(OP, lk)?;
        task::run(rt, form, self.causal, [q, k, v], out, Some(state.views_mut()))?;
        state.advance(lk);
        Ok(())
    }

    /// `out` is the shape of the output, or of something of that shape named `name`.
    fn check<E: Element>(
        &self,
        [q, k, v]: [View<'_, E, 4>; 3],
        out: [usize; 4],
        name: &'static str,
    ) -> Result<()> {
        let [batch, lq, heads, dk] = q.shape();
        let ([_, lk, ..], [.., dv]) = (k.shape(), v.shape());
        let keys = if self.causal { lq } else { lk };
        expect_shape(OP, "k", "[batch, lk, heads, dk]", [batch, keys, heads, dk], k.shape())?;
        expect_shape(OP, "v", "[batch, lk, heads, dv]", [batch, keys, heads, dv], v.shape())?;
        expect_shape(OP, name, "[batch, lq, heads, dv]", [batch, lq, heads, dv], out)
    }

    /// Scratch bytes that [`forward`](Self::forward) takes from the runtime for one thread, at most.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, heads: usize, dk: usize, dv: usize) -> usize {
        task::scratch_bytes(rt, self.map, heads, dk, dv)
    }
}

/// Adds keys that are features already to `sums` (`[batch, heads, dk, dv]` and `[batch, heads, 1, dk]`), then lets
/// queries that are read them, divided by their normaliser plus `eps` if there is one. Arguments were checked.
pub(super) fn features(
    rt: &Runtime,
    eps: Option<f32>,
    [q, k, v]: [View<'_, f32, 4>; 3],
    out: ViewMut<'_, f32, 4>,
    sums: (ViewMut<'_, f32, 4>, ViewMut<'_, f32, 4>),
) -> Result<()> {
    let form = Form { map: FeatureMap::Identity, scale: 1.0, eps, start: 0.0 };
    task::run(rt, form, false, [q, k, v], out, Some(sums))
}
