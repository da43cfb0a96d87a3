//! Gated linear attention, its norm and its residual stream as one operation: what lies between is kept from the forward
//! to the backward pass here instead of becoming tensors, each of which would cost a sum of gradients.

use super::Result;
use super::call::{Arg, Op, apply1, apply2, apply3, floats};
use super::stream::{Kept, Stream};
use crate::attention::lightning::LightningAttention;
use crate::attention::{Gradients, Inputs, State};
use crate::error::{Error, Result as Outcome, expect_shape};
use crate::layers::{Activation, GlaConfig, Lrpe, Norm, NormGradients, affine, pointwise};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};
use candle_core::Tensor;
use std::sync::Arc;

/// What a layer knows besides its weights.
#[derive(Clone, Debug)]
pub(super) struct Gla {
    pub config: GlaConfig,
    /// Whether queries and keys are turned by learned angles.
    pub lrpe: bool,
    pub attention: LightningAttention,
}

/// `[x +] mix(norm(x) Wqkvu^T) Wout^T` with `mix = SRMSNorm(lightning(lrpe(act(q)), lrpe(act(k)), v)) * u`. The angles,
/// `hidden` of them, travel as a last row of `Wout`: candle's interface takes three tensors.
pub(super) fn attend(
    rt: &Arc<Runtime>,
    gla: &Gla,
    stream: Stream,
    [x, qkvu, out]: [&Tensor; 3],
    theta: Option<&Tensor>,
) -> Result<Tensor> {
    let layer = Layer { gla: gla.clone(), stream, kept: Kept::new() };
    match theta {
        Some(theta) => {
            let last = theta.reshape((1, gla.config.hidden_dim))?;
            apply3(rt, layer, [x, qkvu, &Tensor::cat(&[out, &last], 0)?])
        }
        None => apply3(rt, layer, [x, qkvu, out]),
    }
}

/// The mix alone, of `[batch, len, 4 hidden]`: between maps with biases.
pub(super) fn mix(
    rt: &Arc<Runtime>,
    gla: &Gla,
    qkvu: &Tensor,
    theta: Option<&Tensor>,
) -> Result<Tensor> {
    let mix = Mix { gla: gla.clone(), kept: Kept::new() };
    match theta {
        Some(theta) => apply2(rt, mix, [qkvu, &theta.flatten_all()?]),
        None => apply1(rt, mix, qkvu),
    }
}

struct Mix {
    gla: Gla,
    kept: Kept<Passed>,
}

struct Layer {
    gla: Gla,
    stream: Stream,
    kept: Kept<Passed>,
}

/// What the backward pass needs of the forward one.
struct Passed {
    /// `[batch, len, 4 hidden]`
    qkvu: Vec<f32>,
    lrpe: Option<Lrpe>,
    /// Queries and keys as attention takes them, `[batch, len, heads, width]`.
    q: Vec<f32>,
    k: Vec<f32>,
    wide: [usize; 4],
    /// The result of attention, `[batch, len, hidden]`, before and after the norm.
    o: Vec<f32>,
    normed: Vec<f32>,
}

const OP: &str = "gated linear attention";

impl Gla {
    /// From angles, if there are any, of all heads one after the other.
    fn run(
        &self,
        rt: &Runtime,
        [batch, len]: [usize; 2],
        qkvu: Vec<f32>,
        theta: Option<&[f32]>,
    ) -> Outcome<Passed> {
        let GlaConfig { heads, hidden_dim: h, act, norm_eps, .. } = self.config;
        let all = View::new(&qkvu, [batch, len, 4 * h])?;
        let [q, k, v] = [0, 1, 2].map(|i| all.slice(2, i * h, (i + 1) * h));
        let v = v.split_heads(heads)?;
        let narrow = v.shape();
        let mut wide = narrow;
        let lrpe = theta.map(|x| Lrpe::new(View::new(x, [heads, narrow[3]])?)).transpose()?;
        if lrpe.is_some() {
            wide[3] *= 2;
        }
        let turn = |x: View<'_, f32, 3>| -> Outcome<Vec<f32>> {
            let x = x.merge_rows()?;
            let mut own = vec![0.0; batch * len * h];
            pointwise::activate(rt, act, x, ViewMut::new(&mut own, x.shape())?)?;
            let Some(lrpe) = &lrpe else { return Ok(own) };
            let mut turned = vec![0.0; 2 * own.len()];
            lrpe.forward(rt, View::new(&own, narrow)?, 0, ViewMut::new(&mut turned, wide)?)?;
            Ok(turned)
        };
        let (q, k) = (turn(q)?, turn(k)?);
        let [mut o, mut normed] = [(); 2].map(|()| vec![0.0; batch * len * h]);
        let mut state = State::new(batch, heads, wide[3], narrow[3])?;
        let [a, b] = [View::new(&q, wide)?, View::new(&k, wide)?];
        self.attention.forward(rt, a, b, v, ViewMut::new(&mut o, narrow)?, &mut state)?;
        let rows = [batch * len, h];
        let norm = Norm::simple_rms(norm_eps)?;
        norm.forward(rt, View::new(&o, rows)?, ViewMut::new(&mut normed, rows)?)?;
        Ok(Passed { qkvu, lrpe, q, k, wide, o, normed })
    }

    /// `normed * u`
    fn gated(&self, rt: &Runtime, kept: &Passed) -> Outcome<Vec<f32>> {
        let h = self.config.hidden_dim;
        let rows = [kept.o.len() / h.max(1), h];
        let mut mixed = vec![0.0; kept.o.len()];
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
        mut dmixed: Vec<f32>,
        dtheta: &mut [f32],
    ) -> Outcome<Vec<f32>> {
        let GlaConfig { heads, hidden_dim: h, act, norm_eps, .. } = self.config;
        let Passed { qkvu, lrpe, q, k, wide, o, normed } = kept;
        let (wide @ [batch, len, ..], rows) = (*wide, [o.len() / h.max(1), h]);
        let narrow = [batch, len, heads, h / heads];
        let all = View::new(qkvu, [batch, len, 4 * h])?;
        let parts = [0, 1, 2, 3].map(|i| all.slice(2, i * h, (i + 1) * h));
        let mut grad = vec![0.0; qkvu.len()];
        let (dq, rest) = ViewMut::new(&mut grad, all.shape())?.split_at(2, h);
        let (dk, rest) = rest.split_at(2, h);
        let (dv, du) = rest.split_at(2, h);
        let mut dnormed = vec![0.0; o.len()];
        let (u, dout) = (parts[3].merge_rows()?, View::new(&dmixed, rows)?);
        let grads = [du.merge_rows()?, ViewMut::new(&mut dnormed, rows)?];
        pointwise::gate_backward(
            rt,
            Activation::Identity,
            u,
            View::new(normed, rows)?,
            dout,
            grads,
        )?;
        let gradients =
            NormGradients { x: ViewMut::new(&mut dmixed, rows)?, weight: None, bias: None };
        let (o, dnormed) = (View::new(o, rows)?, View::new(&dnormed, rows)?);
        Norm::simple_rms(norm_eps)?.backward(rt, o, dnormed, gradients)?;
        let [mut wide_q, mut wide_k] = [(); 2].map(|()| vec![0.0; q.len()]);
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

impl Layer {
    /// The weights of the last map, and the angles.
    fn parts<'a>(&self, out: View<'a, f32, 2>) -> (View<'a, f32, 2>, Option<&'a [f32]>) {
        let rows = out.shape()[0] - usize::from(self.gla.lrpe);
        (out.slice(0, 0, rows), self.gla.lrpe.then(|| out.row([rows, 0])))
    }
}

impl Op<3> for Layer {
    const NAME: &'static str = OP;

    fn shape(&self, [x, qkvu, out]: [&[usize]; 3]) -> Outcome<Vec<usize>> {
        let [_, _, width] = *x else {
            return Err(Error::shape(OP, "x", "[batch, len, embed]", x));
        };
        let hidden = self.gla.config.hidden_dim;
        let wide = [hidden.saturating_mul(4), width];
        let fits = |arg, letters, expected: [usize; 2], got: &[usize]| match got == expected {
            true => Ok(()),
            false => Err(Error::shape(OP, arg, alloc::format!("{letters} = {expected:?}"), got)),
        };
        fits("qkvu", "[4 hidden, embed]", wide, qkvu)?;
        fits("out", "[embed, hidden]", [width + usize::from(self.gla.lrpe), hidden], out)?;
        Ok(x.to_vec())
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [x, qkvu, out]: [Arg<'_, E>; 3],
        to: &mut [E],
    ) -> Outcome<()> {
        let [batch, len] = [x.shape()[0], x.shape()[1]];
        let (x, w, wout) = (x.float(), qkvu.float(), out.float());
        let (x, w) = (x.rows()?, w.view::<2>(OP, "qkvu")?);
        let (wout, theta) = self.parts(wout.view(OP, "out")?);
        let [n, h4] = [x.shape()[0], w.shape()[0]];
        let mut all = vec![0.0; n * h4];
        self.stream
            .normed(rt, x, |x| affine::forward(rt, x, w, None, ViewMut::new(&mut all, [n, h4])?))?;
        let kept = self.gla.run(rt, [batch, len], all, theta)?;
        let mixed = self.gla.gated(rt, &kept)?;
        floats([to], |[to]| {
            let mixed = View::new(&mixed, [n, wout.shape()[1]])?;
            affine::forward(rt, mixed, wout, None, ViewMut::new(to, x.shape())?)?;
            self.stream.add(rt, x, to)
        })?;
        self.kept.keep(kept);
        Ok(())
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [x, qkvu, out]: [Arg<'_, E>; 3],
        dout: Arg<'_, E>,
        grads: [&mut [E]; 3],
    ) -> Outcome<()> {
        let kept = self.kept.get(OP)?;
        let (x, w, wout, dout) = (x.float(), qkvu.float(), out.float(), dout.float());
        let (x, w) = (x.rows()?, w.view::<2>(OP, "qkvu")?);
        let (wout, _) = self.parts(wout.view(OP, "out")?);
        let dout = dout.rows()?;
        let [n, h] = [x.shape()[0], wout.shape()[1]];
        expect_shape(OP, "dout", "[rows, embed]", x.shape(), dout.shape())?;
        floats(grads, |[dx, dw, dwout]| {
            let mut dmixed = vec![0.0; n * h];
            let mixed = self.gla.gated(rt, kept)?;
            let (dwout, dtheta) = dwout.split_at_mut(wout.shape()[0] * h);
            let to = [ViewMut::new(&mut dmixed, [n, h])?, ViewMut::new(dwout, wout.shape())?];
            affine::backward(rt, View::new(&mixed, [n, h])?, wout, dout, to, None)?;
            let all = self.gla.back(rt, kept, dmixed, dtheta)?;
            let all = View::new(&all, [n, w.shape()[0]])?;
            self.stream.back(rt, [x, dout], dx, |x, dx| {
                affine::backward(rt, x, w, all, [dx, ViewMut::new(dw, w.shape())?], None)
            })
        })
    }
}

/// Of all projections, and of the angles if there are any.
impl<const K: usize> Op<K> for Mix {
    const NAME: &'static str = OP;

    fn shape(&self, args: [&[usize]; K]) -> Outcome<Vec<usize>> {
        let hidden = self.gla.config.hidden_dim;
        match *args[0] {
            [batch, len, width] if hidden.checked_mul(4) == Some(width) => {
                Ok(vec![batch, len, hidden])
            }
            _ => Err(Error::shape(OP, "qkvu", "[batch, len, 4 hidden]", args[0])),
        }
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        to: &mut [E],
    ) -> Outcome<()> {
        let size = [args[0].shape()[0], args[0].shape()[1]];
        let theta = args.get(1).map(Arg::to_vec);
        let kept = self.gla.run(rt, size, args[0].to_vec(), theta.as_deref())?;
        let mixed = self.gla.gated(rt, &kept)?;
        to.iter_mut().zip(mixed).for_each(|(to, x)| *to = E::from_f32(x));
        self.kept.keep(kept);
        Ok(())
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        _: [Arg<'_, E>; K],
        dout: Arg<'_, E>,
        grads: [&mut [E]; K],
    ) -> Outcome<()> {
        let kept = self.kept.get(OP)?;
        let mut dtheta = vec![0.0; grads.get(1).map_or(0, |grad| grad.len())];
        let all = self.gla.back(rt, kept, dout.to_vec(), &mut dtheta)?;
        for (grad, own) in grads.into_iter().zip([all, dtheta]) {
            grad.iter_mut().zip(own).for_each(|(to, x)| *to = E::from_f32(x));
        }
        Ok(())
    }
}
