//! Operations of more than three tensors, some of which are copied into one on the way: candle's interface takes no more.

use super::Result;
use super::attention::{Attention, like, shape, views};
use super::call::{Arg, Op, apply_packed, floats};
use crate::attention::agent::{AgentAttention, AgentBiasGrads, AgentExtra};
use crate::attention::focused::{FocusedConfig, FocusedLinearAttention};
use crate::attention::softmax::{Extra, SoftmaxAttention};
use crate::error::Result as Outcome;
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};
use candle_core::Tensor;
use std::sync::Arc;

/// Softmax attention with a bias of the scaled scores (`[heads, queries, keys]`), otherwise as
/// [`attend`](super::attend); differentiable in all four.
///
/// # Errors
/// As [`attend`](super::attend).
pub fn attend_biased(
    rt: &Arc<Runtime>,
    op: &SoftmaxAttention,
    [q, k, v]: [&Tensor; 3],
    bias: &Tensor,
) -> Result<Tensor> {
    apply_packed(rt, Biased(*op), [q, k, v, bias])
}

struct Biased(SoftmaxAttention);

impl Op<4> for Biased {
    const NAME: &'static str = <SoftmaxAttention as Attention>::NAME;

    fn shape(&self, [q, _, v, _]: [&[usize]; 4]) -> Outcome<Vec<usize>> {
        shape(Self::NAME, q, v)
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [q, k, v, bias]: [Arg<'_, E>; 4],
        out: &mut [E],
    ) -> Outcome<()> {
        let (qkv, bias) = ([q, k, v], bias.float());
        let [q, k, v] = views(Self::NAME, &qkv)?;
        let ([batch, len, heads, _], [.., dv]) = (q.shape(), v.shape());
        let extra = Extra { bias: Some(bias.view(Self::NAME, "bias")?), ..Extra::default() };
        let out = ViewMut::new(out, [batch, len, heads, dv])?;
        self.0.forward_with(rt, q, k, v, out, extra)
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [q, k, v, bias]: [Arg<'_, E>; 4],
        dout: Arg<'_, E>,
        [dq, dk, dv, dbias]: [&mut [E]; 4],
    ) -> Outcome<()> {
        let (qkv, bias) = ([q, k, v], bias.float());
        let [q, k, v] = views(Self::NAME, &qkv)?;
        let bias = bias.view(Self::NAME, "bias")?;
        let grads = like([q, k, v], [dq, dk, dv])?;
        let dout = dout.view(Self::NAME, "dout")?;
        let extra = Extra { bias: Some(bias), ..Extra::default() };
        floats([dbias], |[dbias]| {
            let dbias = Some(ViewMut::new(dbias, bias.shape())?);
            self.0.backward_with(rt, q, k, v, dout, grads, extra, dbias)
        })
    }
}

/// Focused linear attention, as [`FocusedLinearAttention`], with one `scale` per channel of all heads; differentiable in all
/// four.
///
/// # Errors
/// What the operation refuses, and element types that differ.
pub fn focused(
    rt: &Arc<Runtime>,
    config: FocusedConfig,
    [q, k, v]: [&Tensor; 3],
    scale: &Tensor,
) -> Result<Tensor> {
    apply_packed(rt, Focused(config), [q, k, v, scale])
}

struct Focused(FocusedConfig);

impl Focused {
    fn op<E: Element>(&self, scale: &Arg<'_, E>) -> Outcome<FocusedLinearAttention> {
        let scale = scale.float();
        FocusedLinearAttention::new(self.0, scale.view::<1>(Self::NAME, "scale")?.row([0]))
    }
}

impl Op<4> for Focused {
    const NAME: &'static str = "focused linear attention";

    fn shape(&self, [q, _, v, _]: [&[usize]; 4]) -> Outcome<Vec<usize>> {
        shape(Self::NAME, q, v)
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [q, k, v, scale]: [Arg<'_, E>; 4],
        out: &mut [E],
    ) -> Outcome<()> {
        let (op, qkv) = (self.op(&scale)?, [q, k, v]);
        let [q, k, v] = views(Self::NAME, &qkv)?;
        let ([batch, len, heads, _], [.., dv]) = (q.shape(), v.shape());
        op.forward(rt, q, k, v, ViewMut::new(out, [batch, len, heads, dv])?)
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [q, k, v, scale]: [Arg<'_, E>; 4],
        dout: Arg<'_, E>,
        [dq, dk, dv, dscale]: [&mut [E]; 4],
    ) -> Outcome<()> {
        let (op, qkv) = (self.op(&scale)?, [q, k, v]);
        let [q, k, v] = views(Self::NAME, &qkv)?;
        let grads = like([q, k, v], [dq, dk, dv])?;
        let dout = dout.view(Self::NAME, "dout")?;
        floats([dscale], |[dscale]| op.backward(rt, q, k, v, dout, grads, Some(dscale)))
    }
}

/// What is added to the scores of [`agent`] attention.
#[derive(Clone, Debug)]
pub struct AgentBiases {
    /// Of agents against keys, `[heads, n, keys]`.
    pub agent: Tensor,
    /// Of queries against agents, `[heads, queries, n]`.
    pub query: Tensor,
}

/// Agent attention, as [`AgentAttention`]; `agents`: `[batch, n, heads, dk]`; differentiable in all, biases included.
///
/// # Errors
/// What the operation refuses, and element types that differ.
pub fn agent(
    rt: &Arc<Runtime>,
    op: &AgentAttention,
    [q, k, v]: [&Tensor; 3],
    agents: &Tensor,
    biases: Option<&AgentBiases>,
) -> Result<Tensor> {
    match biases {
        Some(b) => apply_packed(rt, Agents(*op), [q, k, v, agents, &b.agent, &b.query]),
        None => apply_packed(rt, Agents(*op), [q, k, v, agents]),
    }
}

struct Agents(AgentAttention);

/// The biases among the last arguments, if there are any.
fn extra<'a>(op: &'static str, biases: &'a [Arg<'_, f32>]) -> Outcome<AgentExtra<'a>> {
    let [agent, query] = biases else { return Ok(AgentExtra::default()) };
    Ok(AgentExtra {
        agent_bias: Some(agent.view(op, "agent_bias")?),
        query_bias: Some(query.view(op, "query_bias")?),
        ..AgentExtra::default()
    })
}

/// Queries, keys, values, agents, and two biases or none.
impl<const K: usize> Op<K> for Agents {
    const NAME: &'static str = "agent attention";

    fn shape(&self, args: [&[usize]; K]) -> Outcome<Vec<usize>> {
        shape(<Self as Op<K>>::NAME, args[0], args[2])
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        out: &mut [E],
    ) -> Outcome<()> {
        let name = <Self as Op<K>>::NAME;
        let [q, k, v, agents] = four(name, &args)?;
        let biases: Vec<_> = args[4..].iter().map(Arg::float).collect();
        let ([batch, len, heads, _], [.., dv]) = (q.shape(), v.shape());
        let out = ViewMut::new(out, [batch, len, heads, dv])?;
        self.0.forward_with(rt, q, k, v, agents, out, extra(name, &biases)?)
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        dout: Arg<'_, E>,
        grads: [&mut [E]; K],
    ) -> Outcome<()> {
        let name = <Self as Op<K>>::NAME;
        let all = four(name, &args)?;
        let biases: Vec<_> = args[4..].iter().map(Arg::float).collect();
        let (extra, dout) = (extra(name, &biases)?, dout.view(name, "dout")?);
        let shapes = [extra.agent_bias, extra.query_bias].map(|b| b.map(|b| b.shape()));
        let mut grads = grads.into_iter();
        let mut next = || grads.next().unwrap_or_default();
        let [q, k, v, agents] = all;
        let own = [
            ViewMut::new(next(), q.shape())?,
            ViewMut::new(next(), k.shape())?,
            ViewMut::new(next(), v.shape())?,
            ViewMut::new(next(), agents.shape())?,
        ];
        floats([next(), next()], |[agent, query]| {
            let like = |d, shape: Option<_>| shape.map(|s| ViewMut::new(d, s)).transpose();
            let biases = AgentBiasGrads {
                agent_bias: like(agent, shapes[0])?,
                query_bias: like(query, shapes[1])?,
            };
            self.0.backward_with(rt, q, k, v, agents, dout, own, extra, biases)
        })
    }
}

/// Queries, keys, values and agents.
fn four<'a, E: Element>(op: &'static str, args: &'a [Arg<'_, E>]) -> Outcome<[View<'a, E, 4>; 4]> {
    let view = |i: usize, name| args[i].view(op, name);
    Ok([view(0, "q")?, view(1, "k")?, view(2, "v")?, view(3, "agents")?])
}
