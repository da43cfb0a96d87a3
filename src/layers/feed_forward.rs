//! The channel mixers of transformers: two maps with an activation between, or three with a gate.

use super::gla::{expect_linear, matrix, table};
use super::rows::rows;
use super::{Activation, Linear};
use crate::error::{Result, expect_shape};
use crate::kernels::activation::{Activate, Gate};
use crate::kernels::store::Keep;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{View, ViewMut};

const OP: &str = "feed-forward";
/// Rows that pass through all maps together: enough for products at full speed, and inner values that stay in cache.
const ROWS: usize = 256;

/// Sizes of a [`FeedForward`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeedForwardConfig {
    /// Width of input and output.
    pub dim: usize,
    /// Width inside.
    pub hidden: usize,
    /// Applied to the gate, or to the inner values if there is none.
    pub act: Activation,
}

/// A feed-forward layer, with or without a gate.
///
/// ```text
/// y = down(act(up(x)))                     MLP: act is GELU, ReLU, squared ReLU ..
/// y = down(act(gate(x)) * up(x))           GLU: SwiGLU with silu, GEGLU with GELU
/// ```
///
/// `4 * dim * hidden` flops per token, with a gate `6 * dim * hidden`; scratch for at most 256 rows. Sources:
/// Attention is all you need (arXiv 1706.03762), section 3.3; GLU variants improve transformer (2002.05202); squared
/// ReLU: Primer (2109.08668).
///
/// ```
/// use linattn::layers::{Activation, FeedForward, FeedForwardConfig, Linear};
/// use linattn::{Runtime, tensor::{View, ViewMut}};
/// let unit = |w: f32| Linear::new(View::new(&[w], [1, 1])?, None);
/// let config = FeedForwardConfig { dim: 1, hidden: 1, act: Activation::SquaredRelu };
/// let mlp = FeedForward::new(config, None, unit(2.0)?, unit(3.0)?)?;
/// let mut y = [0.0];
/// mlp.forward(&Runtime::new()?, View::new(&[5.0], [1, 1])?, ViewMut::new(&mut y, [1, 1])?)?;
/// assert_eq!(y, [300.0]);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct FeedForward {
    config: FeedForwardConfig,
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
}

impl FeedForward {
    /// `gate`, `up`: `[hidden, dim]`, `down`: `[dim, hidden]`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if a weight does not fit.
    pub fn new(
        config: FeedForwardConfig,
        gate: Option<Linear>,
        up: Linear,
        down: Linear,
    ) -> Result<Self> {
        let FeedForwardConfig { dim, hidden, .. } = config;
        if let Some(gate) = &gate {
            expect_linear(OP, "gate", gate, [hidden, dim])?;
        }
        expect_linear(OP, "up", &up, [hidden, dim])?;
        expect_linear(OP, "down", &down, [dim, hidden])?;
        Ok(Self { config, gate, up, down })
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &FeedForwardConfig {
        &self.config
    }

    /// Memory of the packed weights, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.gate.as_ref().map_or(0, Linear::bytes) + self.up.bytes() + self.down.bytes()
    }

    /// `x`, `out`: `[rows, dim]`. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for arguments that do not fit,
    /// [`Error::Alloc`](crate::Error::Alloc) if scratch memory cannot be had; `out` is untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        let expected = [x.shape()[0], self.config.dim];
        expect_shape(OP, "x", "[rows, dim]", expected, x.shape())?;
        expect_shape(OP, "out", "[rows, dim]", expected, out.shape())?;
        rt.with_scratch(self.scratch_bytes(rt, expected[0]), |cut| {
            self.run(rt, x, out, Keep::Nothing, cut);
        })
    }

    /// Scratch bytes that a call with `rows` rows takes from the runtime.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        let (rows, inner) = (rows.min(ROWS), 1 + usize::from(self.gate.is_some()));
        inner * bytes_of::<f32>(rows * self.config.hidden) + self.linear_bytes(rt, rows)
    }

    fn linear_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        let maps = self.gate.iter().chain([&self.up, &self.down]);
        maps.map(|l| l.scratch_bytes(rt, rows)).max().unwrap_or(0)
    }

    /// A checked call with [`scratch_bytes`](Self::scratch_bytes) of memory; nothing can fail.
    pub(super) fn run(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        mut out: ViewMut<'_, f32, 2>,
        keep: Keep<'static>,
        mut cut: Cut<'_>,
    ) {
        let (n, hidden, act) = (x.shape()[0], self.config.hidden, self.config.act);
        let most = n.min(ROWS);
        let inner = cut.take::<f32>(most * hidden);
        let gates = cut.take::<f32>(if self.gate.is_some() { most * hidden } else { 0 });
        let work = cut.take::<u8>(self.linear_bytes(rt, most));
        for at in (0..n).step_by(ROWS) {
            let m = ROWS.min(n - at);
            let (x, inner) = (x.slice(0, at, at + m), &mut inner[..m * hidden]);
            self.up.run(rt, x, matrix(inner, m), Keep::Nothing, Cut::new(work));
            match &self.gate {
                Some(gate) => {
                    let gates = &mut gates[..m * hidden];
                    gate.run(rt, x, matrix(gates, m), Keep::Nothing, Cut::new(work));
                    rows(rt, Gate(act), [table(gates, m)], matrix(inner, m));
                }
                None => rows(rt, Activate(act), [], matrix(inner, m)),
            }
            let out = out.reborrow().slice(0, at, at + m);
            self.down.run(rt, table(inner, m), out, keep, Cut::new(work));
        }
    }
}
