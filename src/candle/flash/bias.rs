//! Biases of scores by distance, as tables that are differentiable functions of parameters.

use crate::candle::{Result, linear};
use crate::layers::flash::PaperBias;
use crate::layers::flash::bias::{buckets, turn};
use crate::runtime::Runtime;
use candle_core::{Device, Tensor};
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

/// Parameters of a bias; as [`layers::RelativeBias`](crate::layers::RelativeBias).
#[derive(Clone, Debug)]
pub(super) enum DistanceBias {
    /// The table itself.
    Table(Tensor),
    /// One number per bucket of distances, `[32, 1]`, times a factor.
    T5 { embedding: Tensor, scale: f64, causal: bool },
    /// The product of two turned vectors, `[1, s]` each.
    Rotary([Tensor; 2]),
}

impl DistanceBias {
    /// Of the paper, for `n` positions and keys of width `s`.
    pub fn paper(kind: PaperBias, [n, s]: [usize; 2], vb: &VarBuilder<'_>) -> Result<Self> {
        match kind {
            PaperBias::Toeplitz => {
                let zero = Init::Const(0.0);
                Ok(Self::Table(vb.get_with_hints((2 * n).saturating_sub(1), "w", zero)?))
            }
            PaperBias::Rotary => {
                let init = Init::Randn { mean: 0.0, stdev: 0.02 };
                let part = |name| vb.get_with_hints((1, s), name, init);
                Ok(Self::Rotary([part("a")?, part("b")?]))
            }
        }
    }

    /// Of the package.
    pub fn t5(scale: f64, causal: bool, vb: &VarBuilder<'_>) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: 0.02 };
        let name = "rel_pos_bias.relative_attention_bias.weight";
        Ok(Self::T5 { embedding: vb.get_with_hints((32, 1), name, init)?, scale, causal })
    }

    /// The entries for `n` positions, at least `2 n - 1` of them.
    pub fn table(&self, rt: &Arc<Runtime>, n: usize) -> Result<Tensor> {
        let len = (2 * n).saturating_sub(1);
        match self {
            Self::Table(table) => Ok(table.clone()),
            Self::T5 { embedding, scale, causal } => {
                let ids = buckets(n, *causal).map(|i| i as u32).collect();
                let ids = Tensor::from_vec(ids, len, &Device::Cpu)?;
                embedding.index_select(&ids, 0)?.flatten_all()? * *scale
            }
            Self::Rotary([a, b]) => {
                // sum_p (a1 b1 + a2 b2) cos + (a2 b1 - a1 b2) sin
                let half = a.dim(1)? / 2;
                let part = |x: &Tensor, i| x.narrow(1, i * half, half);
                let (a1, a2, b1, b2) = (part(a, 0)?, part(a, 1)?, part(b, 0)?, part(b, 1)?);
                let even = ((&a1 * &b1)? + (&a2 * &b2)?)?;
                let odd = ((&a2 * &b1)? - (&a1 * &b2)?)?;
                let mut turns = Vec::with_capacity(len * 2 * half);
                for t in 0..len {
                    turns.extend((0..half).map(|p| turn([p, half], t, n).1 as f32));
                    turns.extend((0..half).map(|p| turn([p, half], t, n).0 as f32));
                }
                let turns = Tensor::from_vec(turns, (len, 2 * half), &Device::Cpu)?;
                linear(rt, &turns, &Tensor::cat(&[even, odd], 1)?, None)?.flatten_all()
            }
        }
    }
}
