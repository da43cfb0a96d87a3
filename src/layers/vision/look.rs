//! Where tokens look: the weights of attention, for pictures.

use super::attention::VisionAttention;
use super::map_attention::MapAttention;
use crate::error::{Error, Result};
use crate::kernels::store::Keep;
use crate::layers::gla::matrix;
use crate::runtime::Runtime;
use crate::tensor::{Tensor, View};

const OP: &str = "attention weights";

impl VisionAttention {
    /// How much every token (rows) takes of the value of every other (columns), the mean over the heads, for
    /// normalised tokens `x`: `[1, tokens, dim]`. What convolutions add is left out.
    ///
    /// # Errors
    /// [`Error::Value`] if not all tokens mix, as with smaller windows, stripes and reduced maps;
    /// [`Error::Alloc`] if memory cannot be had.
    pub(super) fn weights(&self, rt: &Runtime, x: View<'_, f32, 3>) -> Result<Tensor<2>> {
        let (Some(qkv), [mixer]) = (self.projection.one(), self.mixers.as_slice()) else {
            return Err(Error::value(OP, "scope", "one in which all tokens mix", "another"));
        };
        let [batch, tokens, dim] = x.shape();
        let n = batch * tokens;
        let mut all = Tensor::<1>::zeros([n * 3 * dim])?;
        let bytes = qkv.scratch_bytes(rt, n);
        let out = matrix(all.as_mut_slice(), n);
        let rows = x.merge_rows()?;
        rt.with_scratch(bytes, |cut| qkv.run(rt, rows, out, Keep::Nothing, cut))?;
        let all = View::new(all.as_slice(), [batch, tokens, 3 * dim])?;
        mixer.weights(rt, [0, 1].map(|i| all.slice(2, i * dim, (i + 1) * dim)))
    }
}

impl MapAttention {
    /// Attention is linear in the values: unit vectors for values make its weights the output.
    fn weights(&self, rt: &Runtime, [q, k]: [View<'_, f32, 3>; 2]) -> Result<Tensor<2>> {
        let ([batch, tokens, dim], heads) = (q.shape(), self.config().heads);
        if batch * self.config().windows() != 1 {
            let got = alloc::format!("{} windows of {batch} images", self.config().windows());
            return Err(Error::value(OP, "window", "the whole map of one image", got));
        }
        let (keys, inner) = (k.shape()[1], dim / heads);
        let mut weights = Tensor::zeros([tokens, keys])?;
        let [mut v, mut out] = [Tensor::zeros([1, keys, dim])?, Tensor::zeros([1, tokens, dim])?];
        for first in (0..keys).step_by(inner) {
            let here = inner.min(keys - first);
            v.as_mut_slice().fill(0.0);
            for j in 0..here {
                let row = &mut v.as_mut_slice()[(first + j) * dim..][..dim];
                row.iter_mut().skip(j).step_by(inner).for_each(|x| *x = 1.0);
            }
            let qkv = [q, k, v.view()];
            rt.with_scratch(self.mix_bytes(1), |cut| {
                self.mechanism(rt, qkv, out.view_mut(), cut)
            })??;
            let rows = weights.as_mut_slice().chunks_exact_mut(keys);
            for (row, out) in rows.zip(out.as_slice().chunks_exact(dim)) {
                for (j, weight) in row[first..first + here].iter_mut().enumerate() {
                    let sum: f32 = out.iter().skip(j).step_by(inner).sum();
                    *weight = sum / heads as f32;
                }
            }
        }
        Ok(weights)
    }
}
