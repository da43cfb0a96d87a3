//! Agent attention on a map: agents are means of queries, and scores have biases.

use super::MapAttentionConfig;
use crate::attention::agent::{AgentAttention, AgentExtra};
use crate::error::{Error, Result};
use crate::io::TensorSource;
use crate::layers::{AgentBias, AgentBiasTables, Parameters, Resample};
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{View, ViewMut};

const OP: &str = "agent attention";
/// Height and width of the tables that biases are resized from.
const TABLE: usize = 7;

/// Agent attention with pooled agents.
#[derive(Clone, Debug)]
pub(super) struct Agent {
    attention: AgentAttention,
    bias: AgentBias,
    pool: Resample,
    /// Whether a class token comes first.
    class: usize,
    agents: usize,
}

impl Agent {
    pub fn load(
        config: &MapAttentionConfig,
        agents: usize,
        parameters: &Parameters<'_, impl TensorSource>,
    ) -> Result<Self> {
        let (heads, n) = (config.heads, agents);
        super::config::size(OP, "agents", n)?;
        let side = (1..=n).find(|p| p * p >= n);
        let Some(side) = side.filter(|p| p * p == n) else {
            return Err(Error::value(OP, "agents", "a square number", n));
        };
        let ([h, w], [hk, wk]) = (config.window, config.key_window());
        let an = parameters.tensor("an_bias", [heads, n, TABLE, TABLE])?;
        let na = parameters.tensor("na_bias", [heads, n, TABLE, TABLE])?;
        let ah = parameters.tensor("ah_bias", [1, heads, n, hk, 1])?;
        let aw = parameters.tensor("aw_bias", [1, heads, n, 1, wk])?;
        let ha = parameters.tensor("ha_bias", [1, heads, h, 1, n])?;
        let wa = parameters.tensor("wa_bias", [1, heads, 1, w, n])?;
        let class = match config.class_token {
            false => None,
            true => {
                let ac = parameters.tensor("ac_bias", [1, heads, n, 1])?;
                Some([ac, parameters.tensor("ca_bias", [1, heads, 1, n])?])
            }
        };
        let class = match &class {
            None => None,
            Some([ac, ca]) => {
                Some([View::new(ac.as_slice(), [heads, n])?, View::new(ca.as_slice(), [heads, n])?])
            }
        };
        let tables = AgentBiasTables {
            an: an.view(),
            na: na.view(),
            ah: View::new(ah.as_slice(), [heads, n, hk])?,
            aw: View::new(aw.as_slice(), [heads, n, wk])?,
            ha: View::new(ha.as_slice(), [heads, h, n])?,
            wa: View::new(wa.as_slice(), [heads, w, n])?,
            class,
        };
        Ok(Self {
            attention: AgentAttention::new(),
            bias: AgentBias::new(&parameters.runtime()?, tables)?,
            pool: Resample::average(config.window, [side; 2])?,
            class: usize::from(config.class_token),
            agents,
        })
    }

    /// Scratch bytes of [`run`](Self::run) for some windows.
    pub fn bytes(&self, windows: usize, dim: usize) -> usize {
        bytes_of::<f32>(windows * self.agents * dim)
    }

    /// `q`, `out`: `[windows, tokens, dim]`; `k`, `v`: `[windows, keys, dim]`.
    pub fn run(
        &self,
        rt: &Runtime,
        heads: usize,
        [q, k, v]: [View<'_, f32, 3>; 3],
        out: ViewMut<'_, f32, 3>,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let [windows, tokens, dim] = q.shape();
        let map = q.slice(1, self.class, tokens).split_rows(self.pool.input_size())?;
        let [rows, cols] = self.pool.output_size();
        let agents = cut.take::<f32>(windows * self.agents * dim);
        self.pool.forward(rt, map, ViewMut::new(&mut *agents, [windows, rows, cols, dim])?)?;
        let agents = View::new(&*agents, [windows, self.agents, dim])?.split_heads(heads)?;
        let [q, k, v] = [q.split_heads(heads)?, k.split_heads(heads)?, v.split_heads(heads)?];
        let extra = AgentExtra {
            agent_bias: Some(self.bias.agent_bias()),
            query_bias: Some(self.bias.query_bias()),
            ..AgentExtra::default()
        };
        self.attention.forward_with(rt, q, k, v, agents, out.split_heads(heads)?, extra)
    }
}
