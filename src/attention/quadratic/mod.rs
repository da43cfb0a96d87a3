//! Quadratic attention without softmax (GAU, FLASH-Quad).

mod backward;
pub mod naive;
mod score;
mod task;

pub use crate::kernels::pairs::BiasGrads;
pub use crate::kernels::quadratic::{Bias, ScoreActivation};
pub(crate) use backward::check_bias_grads;
pub use score::Factor;
pub(crate) use score::check_bias;

use crate::error::{Error, Result, expect_shape};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};

const OP: &str = "quadratic attention";

/// Quadratic attention with an activation in place of softmax: one head, narrow queries and keys, wide values.
///
/// ```text
/// o_i = sum_j act(scale q_i . k_j + bias_scale b_ij) v_j        over the keys j that query i sees
/// ```
///
/// When causal, both sequences end together: query `i` stands at position `lk - lq + i`, as in decoding with a cache
/// of keys and values, and sees keys up to it. Otherwise query `i` stands at position `i` and sees all keys. Nothing
/// is normalised; the matrix of scores is never held. Results do not depend on the number of threads.
///
/// Cost per query: `2 lk (s + e)` flops, about half of it when causal. Scratch per thread: sums of at most 2112
/// queries, and 512 keys and values.
///
/// Views have three dimensions, because the mechanism has one head by construction: `e` is several times the model
/// width, and queries and keys are shared by all of it.
///
/// Source: Transformer Quality in Linear Time (arXiv 2202.10447), section 2; the Laplace activation is that of Mega
/// (2209.10655).
///
/// ```
/// use linattn::attention::quadratic::{Factor, QuadraticAttention, ScoreActivation};
/// use linattn::{Runtime, tensor::Tensor};
/// let attention = QuadraticAttention::new(ScoreActivation::Relu2, Factor::InvLen)?.causal();
/// let (q, k) = (Tensor::<3>::zeros([1, 50, 8])?, Tensor::<3>::zeros([1, 50, 8])?);
/// let (v, mut out) = (Tensor::<3>::zeros([1, 50, 24])?, Tensor::<3>::zeros([1, 50, 24])?);
/// attention.forward(&Runtime::new()?, q.view(), k.view(), v.view(), out.view_mut())?;
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuadraticAttention {
    act: ScoreActivation,
    scale: Factor,
    bias_scale: Factor,
    causal: bool,
}

/// What may be hidden or added.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extra<'a> {
    /// `[batch, lk]`: whether a key counts. Hidden keys and values are never looked at.
    pub key_mask: Option<View<'a, bool, 2>>,
    /// Added to the scaled scores, by positions: a table of at least `2 n - 1` numbers, where `n` is the larger number
    /// of positions, a matrix, or both. The matrix has one row per position from 0 to that of the last query.
    pub bias: Bias<'a>,
}

impl QuadraticAttention {
    /// Every query sees every key; a bias is added as it is.
    ///
    /// # Errors
    /// [`Error::Value`] if the factor is not finite.
    pub fn new(act: ScoreActivation, scale: Factor) -> Result<Self> {
        let scale = scale.check(OP, "scale")?;
        Ok(Self { act, scale, bias_scale: Factor::Value(1.0), causal: false })
    }

    /// A query sees keys up to its own position.
    #[must_use]
    pub fn causal(self) -> Self {
        Self { causal: true, ..self }
    }

    /// Another factor of the bias.
    ///
    /// # Errors
    /// [`Error::Value`] if it is not finite.
    pub fn with_bias_scale(self, bias_scale: Factor) -> Result<Self> {
        Ok(Self { bias_scale: bias_scale.check(OP, "bias_scale")?, ..self })
    }

    /// Attends.
    ///
    /// `q`: `[batch, lq, s]`; `k`: `[batch, lk, s]`; `v`: `[batch, lk, e]`; `out`: `[batch, lq, e]`. Allocates nothing
    /// once the runtime has seen the shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not belong together, a width is 0, or there are more queries than keys when
    /// causal; [`Error::Alloc`] if scratch memory cannot be had; `out` is untouched then.
    pub fn forward<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 3>,
        k: View<'_, E, 3>,
        v: View<'_, E, 3>,
        out: ViewMut<'_, E, 3>,
    ) -> Result<()> {
        self.forward_with(rt, q, k, v, out, Extra::default())
    }

    /// As [`forward`](Self::forward) with hidden keys and a bias.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), the shapes of `extra` included.
    pub fn forward_with<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 3>,
        k: View<'_, E, 3>,
        v: View<'_, E, 3>,
        out: ViewMut<'_, E, 3>,
        extra: Extra<'_>,
    ) -> Result<()> {
        self.check([q, k, v], &extra)?;
        let ([batch, lq, _], [.., e]) = (q.shape(), v.shape());
        expect_shape(OP, "out", "[batch, lq, e]", [batch, lq, e], out.shape())?;
        if batch == 0 || lq == 0 {
            return Ok(());
        }
        task::run(rt, *self, [q, k, v], out, extra)
    }

    /// Refuses inputs that do not belong together.
    fn check<E: Element>(&self, [q, k, v]: [View<'_, E, 3>; 3], extra: &Extra<'_>) -> Result<()> {
        let ([batch, lq, s], [_, lk, _], [.., e]) = (q.shape(), k.shape(), v.shape());
        expect_shape(OP, "k", "[batch, lk, s]", [batch, lk, s], k.shape())?;
        expect_shape(OP, "v", "[batch, lk, e]", [batch, lk, e], v.shape())?;
        if s == 0 {
            return Err(Error::shape(OP, "q", "s of at least 1", q.shape()));
        }
        if e == 0 {
            return Err(Error::shape(OP, "v", "e of at least 1", v.shape()));
        }
        if self.causal && lq > lk {
            let expected = alloc::format!("at least {lq} keys, one per query");
            return Err(Error::shape(OP, "k", expected, k.shape()));
        }
        if let Some(mask) = extra.key_mask {
            expect_shape(OP, "key_mask", "[batch, lk]", [batch, lk], mask.shape())?;
        }
        check_bias(OP, &extra.bias, [if self.causal { lk } else { lq }, lk])
    }

    /// Scratch bytes that [`forward`](Self::forward) takes from the runtime for one thread, at most.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, [lq, lk, s, e]: [usize; 4]) -> usize {
        task::scratch_bytes(rt, [lq, lk, s, e])
    }
}
