//! Gated linear attention.

use super::layer::{Grads, Input, Layer, Map, Params};
use crate::attention::lightning::LightningAttention;
use crate::attention::{Gradients, Inputs, State};
use crate::error::Result as Outcome;
use crate::layers::{Activation, GlaConfig, Lrpe, Norm, NormGradients, pointwise};
use crate::runtime::Runtime;
use crate::scratch::Floats;
use crate::tensor::{View, ViewMut};

/// `mix(x Wqkvu^T) Wout^T` with `mix = SRMSNorm(lightning(lrpe(act(q)), lrpe(act(k)), v)) * u`. Parameters: `Wqkvu`, its
/// bias, angles of all heads one after the other, `Wout`, its bias, each if there is one.
#[derive(Clone, Debug)]
pub(super) struct Gla {
    pub config: GlaConfig,
    /// Whether the maps have biases.
    pub bias: bool,
    /// Whether queries and keys are turned by learned angles.
    pub lrpe: bool,
    pub attention: LightningAttention,
}

/// What the backward pass needs of the forward one.
pub(super) struct Passed {
    /// `[rows, 4 hidden]`
    qkvu: Floats,
    /// Queries and keys as attention takes them, `[batch, len, heads, width]`.
    q: Floats,
    k: Floats,
    wide: [usize; 4],
    /// The result of attention, `[rows, hidden]`, before and after the norm.
    o: Floats,
    normed: Floats,
}

/// The parameters.
struct Weights<'a> {
    qkvu: Map<'a>,
    lrpe: Option<Lrpe>,
    out: Map<'a>,
}

impl Gla {
    fn weights<'a>(&self, params: &mut Params<'a>) -> Outcome<Weights<'a>> {
        let qkvu = params.map(self.bias)?;
        let theta = if self.lrpe { Some(params.next()?.0) } else { None };
        let GlaConfig { heads, hidden_dim: h, .. } = self.config;
        let shape = [heads, h.checked_div(heads).unwrap_or(0)];
        let lrpe = theta.map(|x| Lrpe::new(View::new(x, shape)?)).transpose()?;
        Ok(Weights { qkvu, lrpe, out: params.map(self.bias)? })
    }

    /// `normed * u`
    fn gated(&self, rt: &Runtime, kept: &Passed) -> Outcome<Floats> {
        let h = self.config.hidden_dim;
        let rows = [kept.o.len() / h.max(1), h];
        let mut mixed = rt.floats(kept.o.len())?;
        let u = View::new(&kept.qkvu, [rows[0], 4 * h])?.slice(1, 3 * h, 4 * h);
        let (normed, out) = (View::new(&kept.normed, rows)?, ViewMut::new(&mut mixed, rows)?);
        pointwise::gate(rt, Activation::Identity, u, normed, out)?;
        Ok(mixed)
    }

    /// The gradient of `qkvu` from that of [`gated`](Self::gated), whose memory serves others behind it, and that of the
    /// angles, which is overwritten.
    fn back(
        &self,
        rt: &Runtime,
        kept: &Passed,
        lrpe: Option<&Lrpe>,
        mut dmixed: Floats,
        dtheta: &mut [f32],
    ) -> Outcome<Floats> {
        let GlaConfig { heads, hidden_dim: h, act, norm_eps, .. } = self.config;
        let Passed { qkvu, q, k, wide, o, normed } = kept;
        let (wide @ [batch, len, ..], rows) = (*wide, [o.len() / h.max(1), h]);
        let narrow = [batch, len, heads, h / heads];
        let all = View::new(qkvu, [batch, len, 4 * h])?;
        let parts = [0, 1, 2, 3].map(|i| all.slice(2, i * h, (i + 1) * h));
        let mut grad = rt.floats(qkvu.len())?;
        let (dq, rest) = ViewMut::new(&mut grad, all.shape())?.split_at(2, h);
        let (dk, rest) = rest.split_at(2, h);
        let (dv, du) = rest.split_at(2, h);
        let mut dnormed = rt.floats(o.len())?;
        let (u, dout) = (parts[3].merge_rows()?, View::new(&dmixed, rows)?);
        let grads = [du.merge_rows()?, ViewMut::new(&mut dnormed, rows)?];
        let normed = View::new(normed, rows)?;
        pointwise::gate_backward(rt, Activation::Identity, u, normed, dout, grads)?;
        let gradients =
            NormGradients { x: ViewMut::new(&mut dmixed, rows)?, weight: None, bias: None };
        let (o, dnormed) = (View::new(o, rows)?, View::new(&dnormed, rows)?);
        Norm::simple_rms(norm_eps)?.backward(rt, o, dnormed, gradients)?;
        let [mut wide_q, mut wide_k] = [rt.floats(q.len())?, rt.floats(k.len())?];
        let (q, k) = (View::new(q, wide)?, View::new(k, wide)?);
        let (v, dout) = (parts[2].split_heads(heads)?, View::new(&dmixed, narrow)?);
        let grads = Gradients {
            q: ViewMut::new(&mut wide_q, wide)?,
            k: ViewMut::new(&mut wide_k, wide)?,
            v: dv.split_heads(heads)?,
            state: None,
        };
        self.attention.backward(rt, Inputs { q, k, v, state: None, dout }, grads)?;
        dtheta.fill(0.0);
        for (turned, x, to) in [(&wide_q, parts[0], dq), (&wide_k, parts[1], dk)] {
            let (x, to) = (x.merge_rows()?, to.merge_rows()?);
            let mut flat = turned;
            if let Some(lrpe) = lrpe {
                let (dturned, mut part) = (View::new(turned, wide)?, vec![0.0; dtheta.len()]);
                pointwise::activate(rt, act, x, ViewMut::new(&mut dmixed, rows)?)?;
                let (own, angles) = (View::new(&dmixed, narrow)?, [heads, narrow[3]]);
                lrpe.backward_angles(rt, own, 0, dturned, ViewMut::new(&mut part, angles)?)?;
                dtheta.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                lrpe.backward(rt, 0, dturned, ViewMut::new(&mut dmixed, narrow)?)?;
                flat = &dmixed;
            }
            pointwise::activate_backward(rt, act, x, View::new(flat, rows)?, to)?;
        }
        Ok(grad)
    }
}

impl Layer for Gla {
    const NAME: &'static str = "gated linear attention";
    type Kept = Passed;

    fn forward(
        &self,
        rt: &Runtime,
        Input { rows: x, batch, len }: Input<'_>,
        params: &mut Params<'_>,
        out: ViewMut<'_, f32, 2>,
    ) -> Outcome<Passed> {
        let GlaConfig { heads, hidden_dim: h, act, norm_eps, .. } = self.config;
        let w = self.weights(params)?;
        let rows = [batch * len, h];
        let mut qkvu = rt.floats(rows[0] * 4 * h)?;
        w.qkvu.forward(rt, x, ViewMut::new(&mut qkvu, [rows[0], 4 * h])?)?;
        let all = View::new(&qkvu, [batch, len, 4 * h])?;
        let [q, k, v] = [0, 1, 2].map(|i| all.slice(2, i * h, (i + 1) * h));
        let v = v.split_heads(heads)?;
        let narrow = v.shape();
        let mut wide = narrow;
        wide[3] *= if self.lrpe { 2 } else { 1 };
        let turn = |x: View<'_, f32, 3>| -> Outcome<Floats> {
            let (x, mut own) = (x.merge_rows()?, rt.floats(rows[0] * h)?);
            pointwise::activate(rt, act, x, ViewMut::new(&mut own, x.shape())?)?;
            let Some(lrpe) = &w.lrpe else { return Ok(own) };
            let mut turned = rt.floats(2 * own.len())?;
            lrpe.forward(rt, View::new(&own, narrow)?, 0, ViewMut::new(&mut turned, wide)?)?;
            Ok(turned)
        };
        let (q, k) = (turn(q)?, turn(k)?);
        let [mut o, mut normed] = [rt.floats(rows[0] * h)?, rt.floats(rows[0] * h)?];
        let mut state = State::new(batch, heads, wide[3], narrow[3])?;
        let [a, b] = [View::new(&q, wide)?, View::new(&k, wide)?];
        self.attention.forward(rt, a, b, v, ViewMut::new(&mut o, narrow)?, &mut state)?;
        let norm = Norm::simple_rms(norm_eps)?;
        norm.forward(rt, View::new(&o, rows)?, ViewMut::new(&mut normed, rows)?)?;
        let kept = Passed { qkvu, q, k, wide, o, normed };
        w.out.forward(rt, View::new(&self.gated(rt, &kept)?, rows)?, out)?;
        Ok(kept)
    }

    fn backward(
        &self,
        rt: &Runtime,
        x: Input<'_>,
        params: &mut Params<'_>,
        kept: &Passed,
        dout: View<'_, f32, 2>,
        (dx, grads): (ViewMut<'_, f32, 2>, &mut Grads<'_>),
    ) -> Outcome<()> {
        let w = self.weights(params)?;
        let rows = [x.rows.shape()[0], self.config.hidden_dim];
        let to_qkvu = w.qkvu.grads(grads)?;
        let dtheta = grads.next(if self.lrpe { rows[1] } else { 0 });
        let to_out = w.out.grads(grads)?;
        let (mixed, mut dmixed) = (self.gated(rt, kept)?, rt.floats(rows[0] * rows[1])?);
        let dinner = ViewMut::new(&mut dmixed, rows)?;
        w.out.backward(rt, [View::new(&mixed, rows)?, dout], dinner, to_out)?;
        let all = self.back(rt, kept, w.lrpe.as_ref(), dmixed, dtheta)?;
        let all = View::new(&all, [rows[0], 4 * rows[1]])?;
        w.qkvu.backward(rt, [x.rows, all], dx, to_qkvu)
    }
}
