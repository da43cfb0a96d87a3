//! Agent attention: a few agents gather from all keys, and all queries ask the agents.

mod backward;
pub mod naive;
mod task;

pub use backward::AgentBiasGrads;

use super::Scale;
use crate::error::{Error, Result, expect_shape};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};

const OP: &str = "agent attention";

/// Agent attention.
///
/// ```text
/// VA = softmax(s1 A K^T + b1) V                 agents gather: softmax over the keys
/// O  = softmax(s2 Q A^T + b2) VA (+ ks V)       queries ask: softmax over the agents
/// ```
///
/// `A` are the agents, usually far fewer than keys. Scales are `dk^-1/2` unless set, `ks` is 0.
///
/// Cost per head: `2 n (dk + dv) (lq + lk)` flops and `n (lq + lk)` exponentials. Keys and values are read once,
/// with a running maximum, so that memory depends neither on `lq` nor on `lk`. Results do not depend on the
/// number of threads.
///
/// Source: Agent Attention (arXiv 2312.08874), section 3.2; the second scale and the shortcut are those of its
/// Stable Diffusion variant.
///
/// ```
/// use linattn::attention::agent::AgentAttention;
/// use linattn::{Runtime, tensor::Tensor};
/// let rt = Runtime::new()?;
/// let (batch, len, heads, dim, agents) = (1, 100, 2, 16, 9);
/// let shape = [batch, len, heads, dim];
/// let (q, k) = (Tensor::<4>::zeros(shape)?, Tensor::<4>::zeros(shape)?);
/// let v = Tensor::<4>::from_slice(&vec![1.0; len * heads * dim], shape)?;
/// let a = Tensor::<4>::zeros([batch, agents, heads, dim])?;
/// let mut out = Tensor::<4>::zeros(shape)?;
/// AgentAttention::new().forward(&rt, q.view(), k.view(), v.view(), a.view(), out.view_mut())?;
/// assert!(out.as_slice().iter().all(|x| (x - 1.0).abs() < 1e-6));
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AgentAttention {
    scales: [Scale; 2],
    k_shortcut: f32,
}

/// What may be added to scores, hidden, or handed out besides the output.
#[derive(Debug, Default)]
pub struct AgentExtra<'a> {
    /// `b1`, `[heads, n, lk]`: added to the scores of agents against keys.
    pub agent_bias: Option<View<'a, f32, 3>>,
    /// `b2`, `[heads, lq, n]`: added to the scores of queries against agents.
    pub query_bias: Option<View<'a, f32, 3>>,
    /// `[batch, lk]`: whether agents look at a key. In a batch row without any such key all keys weigh the same.
    pub key_mask: Option<View<'a, bool, 2>>,
    /// `[batch, n, heads, dv]`: receives `VA`.
    pub agent_values: Option<ViewMut<'a, f32, 4>>,
}

impl Default for AgentAttention {
    fn default() -> Self {
        Self::new()
    }
}

impl AgentAttention {
    /// Both scales are `dk^-1/2`, and there is no shortcut.
    #[must_use]
    pub const fn new() -> Self {
        Self { scales: [Scale::InvSqrtDim; 2], k_shortcut: 0.0 }
    }

    /// Other factors: of the scores of agents against keys, and of those of queries against agents.
    ///
    /// # Errors
    /// [`Error::Value`] if one is not finite.
    pub fn with_scales(self, agents: Scale, queries: Scale) -> Result<Self> {
        Ok(Self { scales: [agents.check(OP)?, queries.check(OP)?], ..self })
    }

    /// How much of its own value a token adds to its output; needs as many queries as keys unless it is 0.
    ///
    /// # Errors
    /// [`Error::Value`] if it is not finite.
    pub fn with_shortcut(self, k_shortcut: f32) -> Result<Self> {
        if !k_shortcut.is_finite() {
            return Err(Error::value(OP, "k_shortcut", "finite", k_shortcut));
        }
        Ok(Self { k_shortcut, ..self })
    }

    /// Attends.
    ///
    /// `q`: `[batch, lq, heads, dk]`; `k`: `[batch, lk, heads, dk]`; `v`: `[batch, lk, heads, dv]`; `agents`:
    /// `[batch, n, heads, dk]`; `out`: `[batch, lq, heads, dv]`. Allocates nothing once the runtime has seen the
    /// shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not belong together, [`Error::Alloc`] if scratch memory cannot be had;
    /// `out` is untouched then.
    pub fn forward<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        agents: View<'_, E, 4>,
        out: ViewMut<'_, E, 4>,
    ) -> Result<()> {
        self.forward_with(rt, q, k, v, agents, out, AgentExtra::default())
    }

    /// As [`forward`](Self::forward) with biases and hidden keys; hands out `VA` if asked.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), the shapes of `extra` included.
    #[expect(clippy::too_many_arguments, reason = "four inputs, and what is optional in a struct")]
    pub fn forward_with<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        agents: View<'_, E, 4>,
        out: ViewMut<'_, E, 4>,
        extra: AgentExtra<'_>,
    ) -> Result<()> {
        self.check([q, k, v, agents], &extra)?;
        let ([batch, lq, heads, dk], [.., dv]) = (q.shape(), v.shape());
        expect_shape(OP, "out", "[batch, lq, heads, dv]", [batch, lq, heads, dv], out.shape())?;
        let scales = self.scales.map(|s| s.of(dk));
        task::run(rt, [q, k, v, agents], out, extra, scales, self.k_shortcut)
    }

    /// Refuses inputs that do not belong together.
    fn check<E: Element>(
        &self,
        [q, k, v, agents]: [View<'_, E, 4>; 4],
        extra: &AgentExtra<'_>,
    ) -> Result<()> {
        let [batch, lq, heads, dk] = q.shape();
        let ([_, lk, ..], [_, n, ..], [.., dv]) = (k.shape(), agents.shape(), v.shape());
        let lk = if self.k_shortcut == 0.0 { lk } else { lq };
        expect_shape(OP, "k", "[batch, lk, heads, dk]", [batch, lk, heads, dk], k.shape())?;
        expect_shape(OP, "v", "[batch, lk, heads, dv]", [batch, lk, heads, dv], v.shape())?;
        let expected = [batch, n, heads, dk];
        expect_shape(OP, "agents", "[batch, n, heads, dk]", expected, agents.shape())?;
        if let Some(b) = extra.agent_bias {
            expect_shape(OP, "agent_bias", "[heads, n, lk]", [heads, n, lk], b.shape())?;
        }
        if let Some(b) = extra.query_bias {
            expect_shape(OP, "query_bias", "[heads, lq, n]", [heads, lq, n], b.shape())?;
        }
        if let Some(m) = extra.key_mask {
            expect_shape(OP, "key_mask", "[batch, lk]", [batch, lk], m.shape())?;
        }
        if let Some(a) = &extra.agent_values {
            let expected = [batch, n, heads, dv];
            expect_shape(OP, "agent_values", "[batch, n, heads, dv]", expected, a.shape())?;
        }
        Ok(())
    }

    /// Scratch bytes that [`forward`](Self::forward) takes from the runtime, at most: they depend neither on the
    /// number of queries nor on that of keys.
    #[must_use]
    pub fn scratch_bytes(
        &self,
        rt: &Runtime,
        [batch, heads, agents]: [usize; 3],
        dk: usize,
        dv: usize,
    ) -> usize {
        task::scratch_bytes(rt, batch.saturating_mul(heads), agents, dk, dv)
    }
}
