//! The gradients.
//!
//! With features `F = scale phi(Q)` and `G = phi(K)`, the normaliser is one more column: with `V' = [V | 1]` the
//! numerators and denominators of the output are `[num | den] = F S'`, and their gradient is `[d | -d . o]` with
//! `d = do / (den + eps)`. What remains is a sum without a normaliser, whose three gradients are such sums again:
//!
//! ```text
//! dF = dO' S'^T     dG = V' dS'^T     dV' = G dS'          S' = sum G^T V'     dS' = sum F^T dO'
//! ```

use super::{LinearAttention, LinearState, OP, features};
use crate::attention::lightning::LightningAttention;
use crate::attention::lightning::backward::{gradients, gradients_bytes, transpose};
use crate::attention::lightning::task::{Run, run as run_plain};
use crate::attention::{Gradients, Inputs};
use crate::error::{Result, expect_shape};
use crate::kernels::linear::backward::{Chain, Divide, Narrow, Stage, Widen};
use crate::kernels::staging::each_head;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{Element, View, ViewMut};

impl LinearAttention {
    /// The gradients of [`forward`](Self::forward).
    ///
    /// ```text
    /// d_i = do_i / den_i       dphi(q_i) = scale (S d_i - (d_i . o_i) z)       dphi(k_j) = dS v_j + dz
    /// dv_j = phi(k_j) dS       dS = sum_i scale phi(q_i)^T d_i                 dz = -sum_i scale phi(q_i) (d_i . o_i)
    /// ```
    ///
    /// The sums run over what the forward ones do, those of `dS` and `dz` the other way round. Nothing but the inputs
    /// need be kept. Memory beside the arguments: some copies of them in `f32`. Cost: about four times that of
    /// `forward`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes do not belong together, and nothing is written then;
    /// [`Error::Alloc`](crate::Error::Alloc) if scratch memory cannot be had.
    ///
    /// ```
    /// use linattn::attention::linear::{FeatureMap, LinearAttention};
    /// use linattn::attention::{Gradients, Inputs};
    /// use linattn::{Runtime, tensor::Tensor};
    /// let rt = Runtime::new()?;
    /// let x = Tensor::<4>::from_slice(&[0.5; 64], [1, 4, 2, 8])?;
    /// let [mut dq, mut dk, mut dv] = [x.clone(), x.clone(), x.clone()];
    /// let (q, k, v, dout) = (x.view(), x.view(), x.view(), x.view());
    /// let grads = Gradients { q: dq.view_mut(), k: dk.view_mut(), v: dv.view_mut(), state: None };
    /// let attention = LinearAttention::new(FeatureMap::Elu1);
    /// attention.backward(&rt, Inputs { q, k, v, state: None, dout }, grads)?;
    /// assert!((dv.as_slice()[0] - 0.5).abs() < 1e-6); // every value has a share of 1/4 in 4 outputs
    /// # Ok::<(), linattn::Error>(())
    /// ```
    pub fn backward<E: Element>(
        &self,
        rt: &Runtime,
        inputs: Inputs<'_, E, LinearState>,
        grads: Gradients<'_, E, LinearState>,
    ) -> Result<()> {
        let Inputs { q, k, v, state, dout } = inputs;
        let Gradients { q: mut dq, k: mut dk, v: dv, state: dstate } = grads;
        let ([batch, lq, heads, width], [.., values]) = (q.shape(), v.shape());
        self.check([q, k, v], dout.shape(), "dout")?;
        let letters = "[batch, len, heads, dim]";
        expect_shape(OP, "gradient of q", letters, q.shape(), dq.shape())?;
        expect_shape(OP, "gradient of k", letters, k.shape(), dk.shape())?;
        expect_shape(OP, "gradient of v", letters, v.shape(), dv.shape())?;
        for state in [state, dstate.as_deref()].into_iter().flatten() {
            state.expect(OP, [batch, heads, width, values])?;
        }
        let lk = k.shape()[1];
        let [lens_q, lens_k] = [lq, lk].map(|n| batch * n * heads * width);
        let bytes = 2 * (bytes_of::<f32>(lens_q) + bytes_of::<f32>(lens_k));
        rt.with_scratch(bytes, |mut cut| {
            let (fq, fk) = (cut.take::<f32>(lens_q), cut.take::<f32>(lens_k));
            let (dfq, dfk) = (cut.take::<f32>(lens_q), cut.take::<f32>(lens_k));
            let (map, scale) = (self.map, self.scale.of(width));
            rt.run(Stage { map, scale, src: q, dst: &mut *fq });
            rt.run(Stage { map, scale: 1.0, src: k, dst: &mut *fk });
            let core = Core { causal: self.causal, eps: self.eps };
            let features = [View::new(&*fq, q.shape())?, View::new(&*fk, k.shape())?];
            let dfeatures =
                [ViewMut::new(&mut *dfq, q.shape())?, ViewMut::new(&mut *dfk, k.shape())?];
            core.gradients(rt, features, [v, dout], state, dfeatures, dv, dstate)?;
            rt.run(Chain { map, scale, src: q, dphi: &mut *dfq, dst: &mut dq });
            rt.run(Chain { map, scale: 1.0, src: k, dphi: &mut *dfk, dst: &mut dk });
            Ok(())
        })?
    }
}

/// Linear attention of features.
#[derive(Clone, Copy, Debug)]
pub(in crate::attention) struct Core {
    /// Whether query `i` reads keys `j <= i` only.
    pub causal: bool,
    /// What is added to the normaliser, if there is one.
    pub eps: Option<f32>,
}

impl Core {
    /// Gradients of features and values. `[f, g]` are the features of queries (with any factor of theirs) and keys,
    /// `[batch, len, heads, dk]`; `state` and `dstate` are as in [`LinearAttention::backward`]. Arguments were checked.
    #[expect(clippy::too_many_arguments, reason = "inputs and outputs of a call")]
    pub fn gradients<E: Element>(
        self,
        rt: &Runtime,
        [f, g]: [View<'_, f32, 4>; 2],
        [v, dout]: [View<'_, E, 4>; 2],
        state: Option<&LinearState>,
        [df, dg]: [ViewMut<'_, f32, 4>; 2],
        dv: ViewMut<'_, E, 4>,
        dstate: Option<&mut LinearState>,
    ) -> Result<()> {
        let ([batch, lq, heads, width], [_, lk, _, values]) = (f.shape(), v.shape());
        let more = usize::from(self.eps.is_some());
        let wide = values + more;
        let (asked, given) = ([batch, lq, heads, wide], [batch, lk, heads, wide]);
        let (rows, columns) = ([batch, heads, width, wide], [batch, heads, wide, width]);
        let [len_q, len_k, len_s] = [asked, given, rows].map(|s| s.iter().product::<usize>());
        let row_len = wide.max(width);
        let bytes = 2 * bytes_of::<f32>(len_q)
            + 2 * bytes_of::<f32>(len_k)
            + 3 * bytes_of::<f32>(len_s)
            + bytes_of::<f32>(row_len)
            + bytes_of::<f32>(batch * heads * row_len);
        let plain = LightningAttention::plain(heads)?;
        let run = Run { len: lk, dk: width, dv: wide };
        let runs = match self.causal {
            true => gradients_bytes(rt, &plain, f.shape(), wide).max(run.scratch(rt, &plain)),
            false => 0,
        };
        rt.with_scratch(bytes + runs, |mut cut| {
            let (out, dwide) = (cut.take::<f32>(len_q), cut.take::<f32>(len_q));
            let (vwide, dvwide) = (cut.take::<f32>(len_k), cut.take::<f32>(len_k));
            let [sums, start, dsums] = [(); 3].map(|()| cut.take::<f32>(len_s));
            rt.run(Widen { src: v, more, dst: &mut *vwide });
            fill_state(state, rows, values, sums);
            start.copy_from_slice(sums);
            fill_state(dstate.as_deref(), rows, values, dsums);
            let vwide = View::new(&*vwide, given)?;
            if self.eps.is_some() {
                // Numerators and denominators.
                let out = ViewMut::new(&mut *out, asked)?;
                let sums = ViewMut::new(&mut *sums, rows)?;
                if self.causal {
                    run_plain(rt, &plain, [f, g, vwide], out, sums, cut.reborrow());
                } else {
                    self.sum(rt, [f, g, vwide], out, sums, &mut cut)?;
                }
            }
            rt.run(Divide { out: &*out, dout, eps: self.eps, dst: &mut *dwide });
            let dwide = View::new(&*dwide, asked)?;
            let dvalues = ViewMut::new(&mut *dvwide, given)?;
            if self.causal {
                let start = View::new(&*start, rows)?;
                let dsums = ViewMut::new(&mut *dsums, rows)?;
                let inputs = [f, g, vwide, dwide];
                gradients(rt, &plain, inputs, Some(start), [df, dg, dvalues], Some(dsums), cut)?;
            } else {
                let row = cut.take::<f32>(row_len);
                let turned = |from: &[f32], to: &mut [f32], row: &mut [f32]| -> Result<()> {
                    let from = View::new(from, rows)?;
                    transpose(rows, &mut row[..wide], to, |at, x| x.copy_from_slice(from.row(at)));
                    Ok(())
                };
                turned(start, sums, row)?;
                self.sum(rt, [dwide, vwide, g], df, ViewMut::new(&mut *sums, columns)?, &mut cut)?;
                turned(dsums, sums, row)?;
                self.sum(rt, [vwide, dwide, f], dg, ViewMut::new(&mut *sums, columns)?, &mut cut)?;
                let dsums = ViewMut::new(&mut *dsums, rows)?;
                self.sum(rt, [g, f, dwide], dvalues, dsums, &mut cut)?;
            }
            rt.run(Narrow { src: &*dvwide, wide, dst: dv });
            if let Some(dstate) = dstate.filter(|_| wide > 0) {
                let dsums = View::new(&*dsums, rows)?;
                let (mut kv, mut z) = dstate.views_mut();
                for (n, h) in each_head(f.shape()) {
                    for i in 0..width {
                        let row = dsums.row([n, h, i, 0]);
                        if values > 0 {
                            kv.row_mut([n, h, i, 0]).copy_from_slice(&row[..values]);
                        }
                        z.row_mut([n, h, 0, 0])[i] = row.get(values).copied().unwrap_or(0.0);
                    }
                }
            }
            Ok(())
        })?
    }

    /// `sums += K^T V`, then `out = Q sums`.
    fn sum(
        self,
        rt: &Runtime,
        [q, k, v]: [View<'_, f32, 4>; 3],
        out: ViewMut<'_, f32, 4>,
        sums: ViewMut<'_, f32, 4>,
        cut: &mut Cut<'_>,
    ) -> Result<()> {
        let [batch, _, heads, width] = q.shape();
        // Sums of keys alone, which nothing reads.
        let mut own = cut.reborrow();
        let z = own.take::<f32>(batch * heads * width);
        z.fill(0.0);
        features(rt, None, [q, k, v], out, (sums, ViewMut::new(z, [batch, heads, 1, width])?))
    }
}

/// `[S | z]`, or zeros.
fn fill_state(state: Option<&LinearState>, rows: [usize; 4], values: usize, to: &mut [f32]) {
    let [batch, heads, width, wide] = rows;
    let Some(state) = state else { return to.fill(0.0) };
    let matrices = (0..batch).flat_map(|n| (0..heads).map(move |h| (n, h)));
    for ((n, h), to) in matrices.zip(to.chunks_exact_mut((width * wide).max(1))) {
        for (i, to) in to.chunks_exact_mut(wide).enumerate() {
            if values > 0 {
                to[..values].copy_from_slice(state.kv().row([n, h, i, 0]));
            }
            if wide > values {
                to[values] = state.z()[(n * heads + h) * width + i];
            }
        }
    }
}
