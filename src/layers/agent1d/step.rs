//! One of the two softmax attentions of agent attention, whose maps heads may mix.

use crate::attention::Scale;
use crate::attention::softmax::{Extra, SoftmaxAttention};
use crate::error::Result;
use crate::io::TensorSource;
use crate::kernels::elementwise::MixHeads;
use crate::layers::Parameters;
use crate::layers::rows::rows;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{Tensor, View, ViewMut};

/// Queries whose maps are mixed at a time.
const BLOCK: usize = 64;

/// `out[o] = sum_h W[o, h] softmax(s q_h k_h^T) v_o`, or `softmax(s q_o k_o^T) v_o` where heads do not talk.
#[derive(Clone, Debug)]
pub(super) struct Step {
    heads: usize,
    /// `W`, `[heads, heads]`.
    talk: Option<Tensor<2>>,
}

impl Step {
    /// `W` is the tensor `<name>.weight` (`[heads, heads, 1, 1]`).
    pub fn load(
        heads: usize,
        talk: bool,
        parameters: &Parameters<'_, impl TensorSource>,
        name: &str,
    ) -> Result<Self> {
        let load = || -> Result<Tensor<2>> {
            let name = alloc::format!("{name}.weight");
            let weight = parameters.tensor(&name, [heads, heads, 1, 1])?;
            Tensor::from_slice(weight.as_slice(), [heads, heads])
        };
        Ok(Self { heads, talk: talk.then(load).transpose()? })
    }

    /// Scratch bytes of [`run`](Self::run) for `queries` of `width` values over all heads.
    pub fn bytes(&self, queries: usize, width: usize) -> usize {
        let each = self.talk.as_ref().map_or(0, |_| self.heads * width);
        bytes_of::<f32>(queries.min(BLOCK) * each)
    }

    /// `q`: `[batch, lq, width]`, `k`: `[batch, lk, width]`, `v`: `[batch, lk, values]`, `out`: `[batch, lq, values]`;
    /// `mask`: `[batch, lk]`, whether a key counts. In a batch row without such a key all weigh the same.
    pub fn run(
        &self,
        rt: &Runtime,
        [q, k, v]: [View<'_, f32, 3>; 3],
        mask: Option<View<'_, bool, 2>>,
        mut out: ViewMut<'_, f32, 3>,
        cut: &mut [u8],
    ) -> Result<()> {
        let (batch, heads) = (q.shape()[0], self.heads);
        if mask.is_none() && self.talk.is_none() {
            let [q, k, v] = [q.split_heads(heads)?, k.split_heads(heads)?, v.split_heads(heads)?];
            return SoftmaxAttention::new().forward(rt, q, k, v, out.split_heads(heads)?);
        }
        for b in 0..batch {
            let [q, k, v] = [q, k, v].map(|x| x.slice(0, b, b + 1));
            let own = mask.map(|m| m.slice(0, b, b + 1));
            // Of an empty mask there is no row to look at.
            let any = own.is_none_or(|m| m.shape()[1] > 0 && m.row([0, 0]).contains(&true));
            let extra = Extra { key_mask: own.filter(|_| any), bias: None };
            let scale = if any { Scale::InvSqrtDim } else { Scale::Value(0.0) };
            let attention = SoftmaxAttention::new().with_scale(scale)?;
            let out = out.reborrow().slice(0, b, b + 1);
            let (q, k) = (q.split_heads(heads)?, k.split_heads(heads)?);
            match &self.talk {
                None => {
                    let (v, out) = (v.split_heads(heads)?, out.split_heads(heads)?);
                    attention.forward_with(rt, q, k, v, out, extra)?;
                }
                Some(talk) => {
                    let ([_, lq, width], all) = (out.shape(), v.repeat_heads(heads));
                    let mut out = out.merge_rows()?;
                    let mut cut = Cut::new(&mut *cut);
                    let maps = cut.take::<f32>(lq.min(BLOCK) * heads * width);
                    for from in (0..lq).step_by(BLOCK) {
                        let to = lq.min(from + BLOCK);
                        let n = to - from;
                        let maps = &mut maps[..n * heads * width];
                        let mixed = ViewMut::new(&mut *maps, [1, n, heads, width])?;
                        attention.forward_with(rt, q.slice(1, from, to), k, all, mixed, extra)?;
                        let maps = View::new(&*maps, [n, heads * width])?;
                        let mix = MixHeads { weights: talk.as_slice(), heads };
                        rows(rt, mix, [maps], out.reborrow().slice(0, from, to));
                    }
                }
            }
        }
        Ok(())
    }
}
