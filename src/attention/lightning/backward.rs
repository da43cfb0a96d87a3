//! The gradients, as runs of the recurrence with other roles.
//!
//! With `P = scale (Q K^T) o M`, `o_t = scale q_t S_t`, and `dS_t` the gradient of the state behind token `t`:
//!
//! ```text
//! dq_t = scale do_t S_t^T     S^T <- lambda S^T + v_t k_t^T                        first token to last
//! dk_t = v_t dS^T, dv_t = k_t dS     dS <- dS + (scale q_t)^T do_t, then lambda dS    last token to first
//! ```
//!
//! The first line is Lightning Attention of `(do, v, k)`. The second begins at the gradient of the final state and
//! ends at that of the initial one.

use super::task::{self, Run};
use super::{LightningAttention, OP, longest, reverse};
use crate::attention::{Gradients, Inputs, State};
use crate::error::{Result, expect_shape};
use crate::kernels::staging::each_row;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{Element, View, ViewMut};

impl LightningAttention {
    /// The gradients of [`forward`](Self::forward).
    ///
    /// ```text
    /// dq_t = scale do_t S_t^T     dS_t = lambda dS_(t+1) + scale q_t^T do_t     dk_t = v_t dS_t^T     dv_t = k_t dS_t
    /// ```
    ///
    /// Nothing but the inputs need be kept: states are formed again. Slopes have no gradient. Memory beside the
    /// arguments does not depend on `len`. Cost: about three times that of `forward`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes do not belong together,
    /// and nothing is written then; [`Error::Alloc`](crate::Error::Alloc) if scratch memory cannot be had.
    ///
    /// Source: Lightning Attention-2 (arXiv 2401.04658), algorithm 2.
    ///
    /// ```
    /// use linattn::attention::lightning::LightningAttention;
    /// use linattn::attention::{Gradients, Inputs};
    /// use linattn::{Runtime, tensor::Tensor};
    /// let rt = Runtime::new()?;
    /// let x = Tensor::<4>::from_slice(&[0.5; 64], [1, 4, 2, 8])?;
    /// let [mut dq, mut dk, mut dv] = [x.clone(), x.clone(), x.clone()];
    /// let (q, k, v, dout) = (x.view(), x.view(), x.view(), x.view());
    /// let grads = Gradients { q: dq.view_mut(), k: dk.view_mut(), v: dv.view_mut(), state: None };
    /// let attention = LightningAttention::new(&[0.5, 0.25])?;
    /// attention.backward(&rt, Inputs { q, k, v, state: None, dout }, grads)?;
    /// assert_eq!(dq.as_slice()[0], 0.5 * 8.0 * 0.25); // (do_0 . v_0) k_0
    /// # Ok::<(), linattn::Error>(())
    /// ```
    pub fn backward<E: Element>(
        &self,
        rt: &Runtime,
        inputs: Inputs<'_, E, State>,
        grads: Gradients<'_, E, State>,
    ) -> Result<()> {
        let batch = inputs.q.shape()[0];
        self.check_backward(&inputs, &grads, batch)?;
        let Inputs { q, k, v, state, dout } = inputs;
        let Gradients { q: dq, k: dk, v: dv, state: dstate } = grads;
        let (state, dstate) = (state.map(State::view), dstate.map(State::view_mut));
        let bytes = gradients_bytes(rt, self, q.shape(), v.shape()[3]);
        rt.with_scratch(bytes, |cut| {
            gradients(rt, self, [q, k, v, dout], state, [dq, dk, dv], dstate, cut)
        })?
    }

    /// The gradients of [`forward_packed`](Self::forward_packed): as [`backward`](Self::backward), with one row of
    /// the states per sequence.
    ///
    /// # Errors
    /// As [`backward`](Self::backward), and [`Error::Value`](crate::Error::Value) if `cu_seqlens` does not rise
    /// from 0 to `len`.
    pub fn backward_packed<E: Element>(
        &self,
        rt: &Runtime,
        inputs: Inputs<'_, E, State>,
        cu_seqlens: &[usize],
        mut grads: Gradients<'_, E, State>,
    ) -> Result<()> {
        Self::check_packed(inputs.q.shape(), cu_seqlens)?;
        self.check_backward(&inputs, &grads, cu_seqlens.len() - 1)?;
        let Inputs { q, k, v, state, dout } = inputs;
        let ([.., heads, dk], [.., dv]) = (q.shape(), v.shape());
        let bytes = gradients_bytes(rt, self, [1, longest(cu_seqlens), heads, dk], dv);
        rt.with_scratch(bytes, |mut cut| {
            for (s, w) in cu_seqlens.windows(2).enumerate() {
                let inputs = [q, k, v, dout].map(|x| x.slice(1, w[0], w[1]));
                let state = state.map(|x| x.view().slice(0, s, s + 1));
                let own = [&mut grads.q, &mut grads.k, &mut grads.v]
                    .map(|x| x.reborrow().slice(1, w[0], w[1]));
                let dstate = grads.state.as_mut().map(|x| x.view_mut().slice(0, s, s + 1));
                gradients(rt, self, inputs, state, own, dstate, cut.reborrow())?;
            }
            Ok(())
        })?
    }

    fn check_backward<E: Element>(
        &self,
        inputs: &Inputs<'_, E, State>,
        grads: &Gradients<'_, E, State>,
        states: usize,
    ) -> Result<()> {
        let Inputs { q, k, v, state, dout } = *inputs;
        self.check([q, k, v], v.shape())?;
        let ([_, _, heads, dk], [.., dv]) = (q.shape(), v.shape());
        let letters = "[batch, len, heads, dim]";
        expect_shape(OP, "dout", letters, v.shape(), dout.shape())?;
        expect_shape(OP, "gradient of q", letters, q.shape(), grads.q.shape())?;
        expect_shape(OP, "gradient of k", letters, k.shape(), grads.k.shape())?;
        expect_shape(OP, "gradient of v", letters, v.shape(), grads.v.shape())?;
        let shape = [states, heads, dk, dv];
        if let Some(state) = state {
            state.expect(OP, shape)?;
        }
        if let Some(state) = &grads.state {
            let letters = "[batch, heads, dk, dv]";
            expect_shape(OP, "gradient of state", letters, shape, state.shape())?;
        }
        Ok(())
    }
}

/// Scratch of [`gradients`], from the shape of `q` and the width of `v`.
pub(in crate::attention) fn gradients_bytes(
    rt: &Runtime,
    op: &LightningAttention,
    [batch, len, heads, dk]: [usize; 4],
    dv: usize,
) -> usize {
    let forth = Run { len, dk: dv, dv: dk }.scratch(rt, op);
    let most = forth.max(reverse::scratch(rt, op, len, [dk, dv]));
    bytes_of::<f32>(batch * heads * dk * dv) + bytes_of::<f32>(dv) + most
}

/// The runs over checked arguments: `[q, k, v, dout]` and the initial state; the gradients of `q`, `k` and `v`,
/// and that of the final state, which becomes that of the initial one.
pub(in crate::attention) fn gradients<E: Element>(
    rt: &Runtime,
    op: &LightningAttention,
    [q, k, v, dout]: [View<'_, E, 4>; 4],
    state: Option<View<'_, f32, 4>>,
    [dq, dk, dv]: [ViewMut<'_, E, 4>; 3],
    mut dstate: Option<ViewMut<'_, f32, 4>>,
    mut cut: Cut<'_>,
) -> Result<()> {
    let ([batch, _, heads, width], [.., values]) = (q.shape(), v.shape());
    let (rows, columns) = ([batch, heads, width, values], [batch, heads, values, width]);
    let (sums, row) = (cut.take::<f32>(rows.iter().product()), cut.take::<f32>(values));
    match state {
        Some(state) => transpose(rows, row, sums, |at, x| x.copy_from_slice(state.row(at))),
        None => sums.fill(0.0),
    }
    let start = ViewMut::new(&mut *sums, columns)?;
    task::run(rt, op, [dout, v, k], dq, start, cut.reborrow());
    let copy = match &mut dstate {
        Some(state) => {
            for (at, to) in each_row(rows).zip(sums.chunks_exact_mut(values.max(1))) {
                to.copy_from_slice(state.row_mut(at));
            }
            Some(ViewMut::new(&mut *sums, rows)?)
        }
        None => None,
    };
    reverse::run(rt, op, [q, k, v, dout], [dk, dv], [dstate, copy], cut);
    Ok(())
}

/// Matrices `[rows, columns]`, read a row at a time into `row`, as `[columns, rows]`.
pub(in crate::attention) fn transpose(
    [batch, heads, rows, columns]: [usize; 4],
    row: &mut [f32],
    to: &mut [f32],
    mut read: impl FnMut([usize; 4], &mut [f32]),
) {
    let matrices = (0..batch).flat_map(|n| (0..heads).map(move |h| (n, h)));
    for ((n, h), to) in matrices.zip(to.chunks_exact_mut((rows * columns).max(1))) {
        for i in 0..rows {
            read([n, h, i, 0], row);
            for (j, x) in row.iter().enumerate() {
                to[j * rows + i] = *x;
            }
        }
    }
}
