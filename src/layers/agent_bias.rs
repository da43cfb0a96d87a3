//! The position biases of agent attention, put together from their tables.

use super::Resample;
use crate::error::{Error, Result, expect_shape};
use crate::runtime::Runtime;
use crate::tensor::{Tensor, View};

const OP: &str = "agent bias";

/// What the biases are learned as; `n` agents, the grid of keys `hk x wk`, that of queries `h x w`.
#[derive(Clone, Copy, Debug)]
pub struct AgentBiasTables<'a> {
    /// `an_bias`: `[heads, n, th, tw]`, a small map per agent that is resized to the grid of keys.
    pub an: View<'a, f32, 4>,
    /// `na_bias`: `[heads, n, th, tw]`, resized to the grid of queries.
    pub na: View<'a, f32, 4>,
    /// `ah_bias`: `[heads, n, hk]`, one number per row of keys.
    pub ah: View<'a, f32, 3>,
    /// `aw_bias`: `[heads, n, wk]`, one number per column of keys.
    pub aw: View<'a, f32, 3>,
    /// `ha_bias`: `[heads, h, n]`, one number per row of queries.
    pub ha: View<'a, f32, 3>,
    /// `wa_bias`: `[heads, w, n]`, one number per column of queries.
    pub wa: View<'a, f32, 3>,
    /// `ac_bias` and `ca_bias`, `[heads, n]` each: a class token comes first among keys and queries.
    pub class: Option<[View<'a, f32, 2>; 2]>,
}

/// The two biases of [`AgentAttention`](crate::attention::agent::AgentAttention) for one resolution.
///
/// ```text
/// b1[h, a, (i, j)] = resize(an)[h, a, i, j] + ah[h, a, i] + aw[h, a, j]
/// b2[h, (i, j), a] = resize(na)[h, a, i, j] + ha[h, i, a] + wa[h, j, a]
/// ```
///
/// with [bilinear](Resample::bilinear) resizing. With a class token `b1` has a column `ac` before all others, and
/// `b2` a row `ca`. `4 heads n (lq + lk)` bytes.
///
/// Source: Agent Attention (arXiv 2312.08874), section 4.2, and its code.
///
/// ```
/// use linattn::layers::{AgentBias, AgentBiasTables};
/// use linattn::{Runtime, tensor::Tensor};
/// let (heads, n, h, w) = (2, 4, 5, 6);
/// let map = Tensor::<4>::from_slice(&[1.0; 2 * 4 * 49], [heads, n, 7, 7])?;
/// let (ah, aw) = (Tensor::<3>::zeros([heads, n, h])?, Tensor::<3>::zeros([heads, n, w])?);
/// let (ha, wa) = (Tensor::<3>::zeros([heads, h, n])?, Tensor::<3>::zeros([heads, w, n])?);
/// let tables = AgentBiasTables {
///     an: map.view(), na: map.view(), ah: ah.view(), aw: aw.view(), ha: ha.view(), wa: wa.view(), class: None,
/// };
/// let bias = AgentBias::new(&Runtime::new()?, tables)?;
/// assert_eq!(bias.agent_bias().shape(), [heads, n, h * w]);
/// assert!(bias.query_bias().as_slice().is_some_and(|b| b.iter().all(|x| (x - 1.0).abs() < 1e-6)));
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AgentBias {
    agent: Tensor<3>,
    query: Tensor<3>,
}

impl AgentBias {
    /// Puts the biases together; the grids are as large as the tables for rows and columns say.
    ///
    /// # Errors
    /// [`Error::Shape`] if the tables do not belong together, [`Error::Value`] if one is empty,
    /// [`Error::Alloc`] or [`Error::Layout`] if memory cannot be had.
    pub fn new(rt: &Runtime, tables: AgentBiasTables<'_>) -> Result<Self> {
        let AgentBiasTables { an, na, ah, aw, ha, wa, class } = tables;
        let [heads, n, th, tw] = an.shape();
        let ([.., hk], [.., wk], [_, h, _], [_, w, _]) =
            (ah.shape(), aw.shape(), ha.shape(), wa.shape());
        expect_shape(OP, "na", "[heads, n, th, tw]", [heads, n, th, tw], na.shape())?;
        expect_shape(OP, "ah", "[heads, n, hk]", [heads, n, hk], ah.shape())?;
        expect_shape(OP, "aw", "[heads, n, wk]", [heads, n, wk], aw.shape())?;
        expect_shape(OP, "ha", "[heads, h, n]", [heads, h, n], ha.shape())?;
        expect_shape(OP, "wa", "[heads, w, n]", [heads, w, n], wa.shape())?;
        if let Some([ac, ca]) = class {
            expect_shape(OP, "ac", "[heads, n]", [heads, n], ac.shape())?;
            expect_shape(OP, "ca", "[heads, n]", [heads, n], ca.shape())?;
        }
        let first = usize::from(class.is_some());
        let (keys, queries) = (places([hk, wk], first)?, places([h, w], first)?);
        let mut agent = Tensor::<3>::zeros([heads, n, keys])?;
        let mut query = Tensor::<3>::zeros([heads, queries, n])?;
        let (resized, rows) = (resize(rt, an, [hk, wk])?, keys.max(1));
        for (i, row) in agent.as_mut_slice().chunks_exact_mut(rows).enumerate() {
            let (head, a) = (i / n, i % n);
            let (ah, aw) = (ah.row([head, a, 0]), aw.row([head, a, 0]));
            if let Some([ac, _]) = class {
                row[0] = ac.row([head, 0])[a];
            }
            for (at, x) in row[first..].iter_mut().enumerate() {
                *x = resized.as_slice()[i * hk * wk + at] + ah[at / wk] + aw[at % wk];
            }
        }
        let resized = resize(rt, na, [h, w])?;
        for (i, row) in query.as_mut_slice().chunks_exact_mut(n.max(1)).enumerate() {
            let (head, at) = (i / queries, i % queries);
            let Some(at) = at.checked_sub(first) else {
                if let Some([_, ca]) = class {
                    row.copy_from_slice(ca.row([head, 0]));
                }
                continue;
            };
            let (ha, wa) = (ha.row([head, at / w, 0]), wa.row([head, at % w, 0]));
            for (a, x) in row.iter_mut().enumerate() {
                *x = resized.as_slice()[(head * n + a) * h * w + at] + ha[a] + wa[a];
            }
        }
        Ok(Self { agent, query })
    }

    /// `b1`, `[heads, n, lk]`.
    #[must_use]
    pub fn agent_bias(&self) -> View<'_, f32, 3> {
        self.agent.view()
    }

    /// `b2`, `[heads, lq, n]`.
    #[must_use]
    pub fn query_bias(&self) -> View<'_, f32, 3> {
        self.query.view()
    }

    /// Memory of both, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        size_of_val(self.agent.as_slice()) + size_of_val(self.query.as_slice())
    }
}

/// Places of a grid and `more` before them.
fn places([h, w]: [usize; 2], more: usize) -> Result<usize> {
    let n = h.checked_mul(w).and_then(|n| n.checked_add(more));
    n.ok_or_else(|| Error::value(OP, "grid", "of an addressable size", alloc::format!("{h} x {w}")))
}

/// `[heads, n, th, tw]` as `[heads, n, h, w]`.
fn resize(rt: &Runtime, table: View<'_, f32, 4>, [h, w]: [usize; 2]) -> Result<Tensor<4>> {
    let [heads, n, th, tw] = table.shape();
    let plan = Resample::bilinear([th, tw], [h, w])?;
    // One map per head and agent, of one channel.
    let maps = heads.saturating_mul(n);
    let mut own = Tensor::<4>::zeros([maps, th, tw, 1])?;
    for (i, row) in own.as_mut_slice().chunks_exact_mut(tw).enumerate() {
        let (map, y) = (i / th, i % th);
        row.copy_from_slice(table.row([map / n, map % n, y, 0]));
    }
    let mut out = Tensor::<4>::zeros([maps, h, w, 1])?;
    plan.forward(rt, own.view(), out.view_mut())?;
    Ok(out)
}
