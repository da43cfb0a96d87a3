//! Halving the resolution of a map.

use crate::error::{Error, Result, expect_shape};
use crate::io::TensorSource;
use crate::kernels::store::Keep;
use crate::layers::gla::{matrix, table};
use crate::layers::{Linear, Norm, Parameters};
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{View, ViewMut};

const OP: &str = "patch merging";

/// The patch merging of Swin: four neighbours become one token of twice the width.
///
/// ```text
/// y = LayerNorm([x(2i, 2j) | x(2i+1, 2j) | x(2i, 2j+1) | x(2i+1, 2j+1)]) W^T
/// ```
///
/// `16 dim^2` flops per token of the result. Source: Swin transformer (arXiv 2103.14030), section 3.1.
///
/// ```
/// use linattn::io::TensorMap;
/// use linattn::layers::{Parameters, vision::PatchMerging};
/// use linattn::{Runtime, tensor::{View, ViewMut}};
/// let mut tensors = TensorMap::default();
/// tensors.insert("norm.weight", &[4], vec![1.0; 4])?;
/// tensors.insert("norm.bias", &[4], vec![0.0; 4])?;
/// tensors.insert("reduction.weight", &[2, 4], vec![1.0; 8])?;
/// let merging = PatchMerging::load(1, [2, 2], 1e-5, &Parameters::new(&tensors))?;
/// let mut y = [1.0; 2];
/// let x = View::new(&[1.0, 2.0, 3.0, 4.0], [1, 4, 1])?;
/// merging.forward(&Runtime::new()?, x, ViewMut::new(&mut y, [1, 1, 2])?)?;
/// assert!(y.iter().all(|x| x.abs() < 1e-6));
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PatchMerging {
    dim: usize,
    map: [usize; 2],
    norm: Norm,
    reduction: Linear,
}

impl PatchMerging {
    /// From `norm` and `reduction.weight` (`[2 dim, 4 dim]`), for tokens of width `dim` on a map of even height and
    /// width.
    ///
    /// # Errors
    /// [`Error::Value`] for impossible sizes, [`Error::Checkpoint`] for a tensor that is missing or does not fit,
    /// [`Error::Alloc`] if memory cannot be had.
    pub fn load(
        dim: usize,
        map: [usize; 2],
        norm_eps: f32,
        parameters: &Parameters<'_, impl TensorSource>,
    ) -> Result<Self> {
        super::config::size(OP, "dim", dim)?;
        if map.iter().any(|n| *n == 0 || n % 2 == 1) || map[0].checked_mul(map[1]).is_none() {
            let got = alloc::format!("{map:?}");
            return Err(Error::value(OP, "map", "of even height and width", got));
        }
        let norm = parameters.layer_norm("norm", 4 * dim, norm_eps)?;
        let reduction = parameters.linear("reduction", [2 * dim, 4 * dim], false)?;
        Ok(Self { dim, map, norm, reduction })
    }

    /// Memory of the packed weights, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.reduction.bytes()
    }

    /// `x`: `[batch, h * w, dim]`, `out`: `[batch, h / 2 * w / 2, 2 dim]`, rows of all batches the same distance
    /// apart. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::Layout`] for arguments that do not fit, [`Error::Alloc`] if scratch memory
    /// cannot be had; `out` is untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 3>,
    ) -> Result<()> {
        let (batch, places) = (x.shape()[0], self.map[0] * self.map[1]);
        let expected = [batch, places, self.dim];
        expect_shape(OP, "x", "[batch, h * w, dim]", expected, x.shape())?;
        let expected = [batch, places / 4, 2 * self.dim];
        expect_shape(OP, "out", "[batch, h / 2 * w / 2, 2 dim]", expected, out.shape())?;
        let out = out.merge_rows()?;
        rt.with_scratch(self.scratch_bytes(rt, batch), |cut| self.run(rt, x, out, cut))?
    }

    /// Scratch bytes that a call takes from the runtime.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, batch: usize) -> usize {
        let n = batch * self.map[0] * self.map[1] / 4;
        2 * bytes_of::<f32>(n * 4 * self.dim) + self.reduction.scratch_bytes(rt, n)
    }

    fn run(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 2>,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let ([h, w], dim) = (self.map, self.dim);
        let (places, n) = (h * w / 4, x.shape()[0] * (h * w / 4));
        if n == 0 {
            return Ok(());
        }
        let [merged, normed] = [(); 2].map(|()| cut.take::<f32>(n * 4 * dim));
        let work = cut.take::<u8>(self.reduction.scratch_bytes(rt, n));
        let map = x.split_rows(self.map)?;
        for (t, row) in merged.chunks_exact_mut(4 * dim).enumerate() {
            let (b, i, j) = (t / places, t % places / (w / 2), t % (w / 2));
            for (c, dst) in row.chunks_exact_mut(dim).enumerate() {
                dst.copy_from_slice(map.row([b, 2 * i + c % 2, 2 * j + c / 2, 0]));
            }
        }
        self.norm.run(rt, table(merged, n), matrix(normed, n));
        self.reduction.run(rt, table(normed, n), out, Keep::Nothing, Cut::new(work));
        Ok(())
    }
}
