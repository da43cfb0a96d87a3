//! Softmax attention, exact, in memory that does not grow with the product of the lengths.

mod backward;
mod job;
pub mod naive;
mod tiled;
pub(in crate::attention) mod work;

use super::{Mask, Scale};
use crate::error::{Error, Result, expect_shape};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};

const OP: &str = "softmax attention";

/// Softmax attention, optionally causal, with shared key and value heads.
///
/// ```text
/// o_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the keys j that query i sees
/// ```
///
/// A query that sees no key gives zeros. Hidden keys and values are never looked at: whatever they hold, NaN
/// included, does not reach the result. Query head `h` of `heads` uses key and value head
/// `h / (heads / kv_heads)`.
///
/// Cost per query and head: `2 lk (dk + dv)` flops and `lk` exponentials, about half of it when causal. Keys and
/// values are read once per about a thousand queries. Results do not depend on the number of threads.
///
/// Source: Attention is all you need (arXiv 1706.03762), section 3.2.1; the running maximum and sum are those
/// of online softmax (1805.02867), the blocking that of FlashAttention (2205.14135).
///
/// ```
/// use linattn::attention::{Mask, softmax::SoftmaxAttention};
/// use linattn::{Runtime, tensor::Tensor};
/// let rt = Runtime::new()?;
/// let (batch, len, heads, kv_heads, dim) = (1, 100, 4, 2, 16);
/// let q = Tensor::<4>::zeros([batch, len, heads, dim])?;
/// let k = Tensor::<4>::zeros([batch, len, kv_heads, dim])?;
/// let v = Tensor::<4>::from_slice(&vec![1.0; len * kv_heads * dim], [batch, len, kv_heads, dim])?;
/// let mut out = Tensor::<4>::zeros([batch, len, heads, dim])?;
/// let attention = SoftmaxAttention::new().with_mask(Mask::Causal);
/// attention.forward(&rt, q.view(), k.view(), v.view(), out.view_mut())?;
/// assert!(out.as_slice().iter().all(|x| (x - 1.0).abs() < 1e-6));
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SoftmaxAttention {
    scale: Scale,
    mask: Mask,
}

/// What may be hidden or added besides the [`Mask`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Extra<'a> {
    /// `[batch, lk]`: whether a key counts.
    pub key_mask: Option<View<'a, bool, 2>>,
    /// `[heads, lq, lk]`: added to the scaled scores. Minus infinity hides a key.
    pub bias: Option<View<'a, f32, 3>>,
}

impl Default for SoftmaxAttention {
    fn default() -> Self {
        Self::new()
    }
}

impl SoftmaxAttention {
    /// Every query sees every key; scores are scaled by `dk^-1/2`.
    #[must_use]
    pub const fn new() -> Self {
        Self { scale: Scale::InvSqrtDim, mask: Mask::Full }
    }

    /// Another factor of the scores.
    ///
    /// # Errors
    /// [`Error::Value`] if it is not finite.
    pub fn with_scale(self, scale: Scale) -> Result<Self> {
        Ok(Self { scale: scale.check(OP)?, ..self })
    }

    /// Which keys a query sees.
    #[must_use]
    pub fn with_mask(self, mask: Mask) -> Self {
        Self { mask, ..self }
    }

    /// Attends.
    ///
    /// `q`: `[batch, lq, heads, dk]`; `k`: `[batch, lk, kv_heads, dk]`; `v`: `[batch, lk, kv_heads, dv]`; `out`:
    /// `[batch, lq, heads, dv]`. Allocates nothing once the runtime has seen the shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not belong together or `heads` is no multiple of `kv_heads`,
    /// [`Error::Alloc`] if scratch memory cannot be had; `out` is untouched then.
    pub fn forward<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        out: ViewMut<'_, E, 4>,
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
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        out: ViewMut<'_, E, 4>,
        extra: Extra<'_>,
    ) -> Result<()> {
        check([q, k, v], &extra)?;
        let ([batch, lq, heads, dk], [_, lk, _, dv]) = (q.shape(), v.shape());
        let letters = "[batch, lq, heads, dv]";
        expect_shape(OP, "out", letters, [batch, lq, heads, dv], out.shape())?;
        if batch == 0 || lq == 0 || heads == 0 || dv == 0 {
            return Ok(());
        }
        tiled::run(rt, [q, k, v], out, extra, self.scale.of(dk), self.mask.offset(lq, lk))
    }

    /// Scratch bytes that [`forward`](Self::forward) takes from the runtime for one thread, at most.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, dk: usize, dv: usize) -> usize {
        tiled::scratch_bytes(rt, dk, dv)
    }
}

/// Refuses inputs that do not belong together.
fn check<E: Element>([q, k, v]: [View<'_, E, 4>; 3], extra: &Extra<'_>) -> Result<()> {
    let ([batch, lq, heads, dk], [_, lk, kv_heads, _]) = (q.shape(), k.shape());
    let [.., dv] = v.shape();
    let letters = "[batch, lk, kv_heads, dk]";
    expect_shape(OP, "k", letters, [batch, lk, kv_heads, dk], k.shape())?;
    let fits = if kv_heads == 0 { heads == 0 } else { heads % kv_heads == 0 };
    if !fits {
        let expected = alloc::format!("a number of kv_heads that divides {heads} heads");
        return Err(Error::shape(OP, "k", expected, k.shape()));
    }
    let letters = "[batch, lk, kv_heads, dv]";
    expect_shape(OP, "v", letters, [batch, lk, kv_heads, dv], v.shape())?;
    if let Some(mask) = extra.key_mask {
        expect_shape(OP, "key_mask", "[batch, lk]", [batch, lk], mask.shape())?;
    }
    if let Some(bias) = extra.bias {
        expect_shape(OP, "bias", "[heads, lq, lk]", [heads, lq, lk], bias.shape())?;
    }
    Ok(())
}
