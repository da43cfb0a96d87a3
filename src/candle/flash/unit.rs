//! The gated unit around attention without softmax.

use super::attention::{Hidden, Scored, bias, bias_gradient, kinds};
use crate::attention::quadratic;
use crate::candle::layer::{Grads, Input, Layer, Map, Params};
use crate::error::Result as Outcome;
use crate::layers::{Activation, Positions, Rope, pointwise};
use crate::runtime::Runtime;
use crate::scratch::Floats;
use crate::tensor::{View, ViewMut};

/// `(u * attention(heads(z), v)) Wo^T + bo` with `[u | v | z] = silu(x Wi^T + bi)` and `heads(z) = rope(z * gamma + beta)`,
/// `H` of them. Parameters: `Wi`, `bi`, `gamma`, `beta`, `Wo`, `bo`, and a bias of scores.
#[derive(Clone)]
pub(super) struct Unit<A, const H: usize> {
    pub attention: A,
    /// Width of queries and keys, and of values.
    pub widths: [usize; 2],
    /// Whether the values come before the gate.
    pub values_first: bool,
    pub rope: Option<Rope>,
    /// How many columns come from the token before.
    pub shifted: usize,
    pub hidden: Option<Hidden>,
    /// Whether hidden tokens get no result of attention either.
    pub silent: bool,
}

/// What the backward pass needs of the forward one.
pub(super) struct Passed {
    /// What the first map gave, `[rows, 2 e + s]`, before and after the activation.
    plain: Floats,
    active: Floats,
    /// `[rows, heads, s]`
    heads: Floats,
    /// The result of attention, `[rows, e]`.
    mixed: Floats,
}

/// The parameters.
struct Weights<'a> {
    first: Map<'a>,
    gamma: &'a [f32],
    beta: &'a [f32],
    last: Map<'a>,
    bias: quadratic::Bias<'a>,
}

/// Gate, values and shared projection among the columns of the first map.
struct Columns<T> {
    u: T,
    v: T,
    z: T,
}

impl<A: Scored<H>, const H: usize> Unit<A, H> {
    fn weights<'a>(&self, params: &mut Params<'a>) -> Outcome<Weights<'a>> {
        let first = params.map(true)?;
        let [gamma, beta] = [params.next()?.0, params.next()?.0];
        let last = params.map(true)?;
        Ok(Weights { first, gamma, beta, last, bias: bias(A::NAME, params.next()?)? })
    }

    fn wide(&self) -> usize {
        let [s, e] = self.widths;
        2 * e + s
    }

    fn columns<'a>(
        &self,
        all: &'a [f32],
        [batch, len]: [usize; 2],
    ) -> Outcome<Columns<View<'a, f32, 3>>> {
        let (all, [_, e]) = (View::new(all, [batch, len, self.wide()])?, self.widths);
        let [a, b] = [all.slice(2, 0, e), all.slice(2, e, 2 * e)];
        let [u, v] = if self.values_first { [b, a] } else { [a, b] };
        Ok(Columns { u, v, z: all.slice(2, 2 * e, self.wide()) })
    }

    fn columns_mut<'a>(
        &self,
        all: &'a mut [f32],
        [batch, len]: [usize; 2],
    ) -> Outcome<Columns<ViewMut<'a, f32, 3>>> {
        let (all, [_, e]) = (ViewMut::new(all, [batch, len, self.wide()])?, self.widths);
        let (a, rest) = all.split_at(2, e);
        let (b, z) = rest.split_at(2, e);
        let [u, v] = if self.values_first { [b, a] } else { [a, b] };
        Ok(Columns { u, v, z })
    }

    /// What attention reads besides values.
    fn heads<'a>(
        &self,
        heads: &'a [f32],
        [batch, len]: [usize; 2],
    ) -> Outcome<[View<'a, f32, 3>; H]> {
        let all = View::new(heads, [batch, len, H, self.widths[0]])?;
        Ok(core::array::from_fn(|h| all.one_head(h)))
    }

    fn extra<'a>(&'a self, bias: quadratic::Bias<'a>) -> Outcome<quadratic::Extra<'a>> {
        let key_mask = self.hidden.as_ref().map(Hidden::view).transpose()?;
        Ok(quadratic::Extra { key_mask, bias })
    }

    /// The input with some columns from the token before.
    fn shift(&self, rt: &Runtime, Input { rows: x, len, .. }: Input<'_>) -> Outcome<Floats> {
        let ([n, d], h) = (x.shape(), self.shifted);
        let mut out = rt.floats(if h == 0 { 0 } else { n * d })?;
        for (i, row) in out.chunks_exact_mut(d.max(1)).enumerate() {
            row.copy_from_slice(x.row([i, 0]));
            match i % len {
                0 => row[..h].fill(0.0),
                _ => row[..h].copy_from_slice(&x.row([i - 1, 0])[..h]),
            }
        }
        Ok(out)
    }

    /// What the first map reads, given what [`shift`](Self::shift) made.
    fn read<'a>(&self, x: Input<'a>, shifted: &'a [f32]) -> Outcome<View<'a, f32, 2>> {
        if self.shifted == 0 { Ok(x.rows) } else { View::new(shifted, x.rows.shape()) }
    }

    /// The gradient of the input from that of what [`shift`](Self::shift) made of it, in place.
    fn shift_back(&self, mut dx: ViewMut<'_, f32, 2>, len: usize) {
        let ([n, _], h) = (dx.shape(), self.shifted);
        let mut next = vec![0.0; h];
        for i in (0..if h == 0 { 0 } else { n }).rev() {
            if (i + 1) % len == 0 {
                next.fill(0.0);
            }
            dx.row_mut([i, 0])[..h].swap_with_slice(&mut next);
        }
    }

    /// Removes the rows of hidden tokens.
    fn silence(&self, rows: &mut [f32]) {
        if let (true, Some(hidden)) = (self.silent, &self.hidden) {
            hidden.clear(rows, self.widths[1]);
        }
    }

    /// What the last map reads, `gate * mixed`.
    fn gated(&self, rt: &Runtime, kept: &Passed, size: [usize; 2]) -> Outcome<Floats> {
        let shape = [size[0] * size[1], self.widths[1]];
        let mut gated = rt.floats(kept.mixed.len())?;
        let (u, to) = (self.columns(&kept.active, size)?.u, ViewMut::new(&mut gated, shape)?);
        let mixed = View::new(&kept.mixed, shape)?;
        pointwise::gate(rt, Activation::Identity, u.merge_rows()?, mixed, to)?;
        Ok(gated)
    }
}

impl<A: Scored<H>, const H: usize> Layer for Unit<A, H> {
    const NAME: &'static str = A::NAME;
    type Kept = Passed;

    fn forward(
        &self,
        rt: &Runtime,
        x: Input<'_>,
        params: &mut Params<'_>,
        out: ViewMut<'_, f32, 2>,
    ) -> Outcome<Passed> {
        let (w, size @ [batch, len], [s, e]) =
            (self.weights(params)?, [x.batch, x.len], self.widths);
        let shape @ [n, wide] = [x.rows.shape()[0], self.wide()];
        let shifted = self.shift(rt, x)?;
        let rows = self.read(x, &shifted)?;
        let [mut plain, mut active] = [rt.floats(n * wide)?, rt.floats(n * wide)?];
        w.first.forward(rt, rows, ViewMut::new(&mut plain, shape)?)?;
        let (from, to) = (View::new(&plain, shape)?, ViewMut::new(&mut active, shape)?);
        pointwise::activate(rt, Activation::Silu, from, to)?;

        let Columns { v, z, .. } = self.columns(&active, size)?;
        let mut heads = rt.floats(n * H * s)?;
        let to = ViewMut::new(&mut heads, [n, H * s])?;
        pointwise::offset_scale(rt, z.merge_rows()?, [w.gamma, w.beta], to)?;
        if let Some(rope) = &self.rope {
            let (plain, shape) = (heads, [batch, len, H, s]);
            heads = rt.floats(plain.len())?;
            let to = ViewMut::new(&mut heads, shape)?;
            rope.forward(rt, View::new(&plain, shape)?, Positions::From(0), to)?;
        }
        let mut mixed = rt.floats(n * e)?;
        let (qk, to) = (self.heads(&heads, size)?, ViewMut::new(&mut mixed, [batch, len, e])?);
        self.attention.attend(rt, (qk, v), to, self.extra(w.bias)?)?;
        self.silence(&mut mixed);
        let kept = Passed { plain, active, heads, mixed };
        let gated = self.gated(rt, &kept, size)?;
        w.last.forward(rt, View::new(&gated, [n, e])?, out)?;
        Ok(kept)
    }

    fn backward(
        &self,
        rt: &Runtime,
        x: Input<'_>,
        params: &mut Params<'_>,
        kept: &Passed,
        dout: View<'_, f32, 2>,
        (mut dx, grads): (ViewMut<'_, f32, 2>, &mut Grads<'_>),
    ) -> Outcome<()> {
        let (w, size @ [batch, len], [s, e]) =
            (self.weights(params)?, [x.batch, x.len], self.widths);
        let shape @ [n, wide] = [x.rows.shape()[0], self.wide()];
        let to_first = w.first.grads(grads)?;
        let [to_gamma, to_beta] = [grads.next(H * s), grads.next(H * s)];
        let to_last = w.last.grads(grads)?;
        let to_bias = bias_gradient(w.bias, |size| grads.next(size))?;

        let (gated, mut dgated) = (self.gated(rt, kept, size)?, rt.floats(n * e)?);
        let to = ViewMut::new(&mut dgated, [n, e])?;
        w.last.backward(rt, [View::new(&gated, [n, e])?, dout], to, to_last)?;
        let mut dmixed = gated;
        let mut dactive = rt.floats(n * wide)?;
        let (own, to) = (self.columns(&kept.active, size)?, self.columns_mut(&mut dactive, size)?);
        let (u, mixed) = (own.u.merge_rows()?, View::new(&kept.mixed, [n, e])?);
        let into = [to.u.merge_rows()?, ViewMut::new(&mut dmixed, [n, e])?];
        let dgated = View::new(&dgated, [n, e])?;
        pointwise::gate_backward(rt, Activation::Identity, u, mixed, dgated, into)?;
        self.silence(&mut dmixed);

        let all = [batch, len, H, s];
        let mut dheads = rt.floats(kept.heads.len())?;
        let mut rest = Some(ViewMut::new(&mut dheads, all)?);
        let each = core::iter::from_fn(|| {
            let (one, others) = rest.take()?.split_at(2, 1);
            rest = Some(others);
            Some(Ok(one.one_head(0)))
        });
        let each = kinds(A::NAME, each.take(H))?;
        let qk = self.heads(&kept.heads, size)?;
        let (dmixed, extra) = (View::new(&dmixed, [batch, len, e])?, self.extra(w.bias)?);
        self.attention.gradients(rt, (qk, own.v), dmixed, (each, to.v), extra, to_bias)?;
        if let Some(rope) = &self.rope {
            let turned = dheads;
            dheads = rt.floats(turned.len())?;
            let to = ViewMut::new(&mut dheads, all)?;
            rope.backward(rt, Positions::From(0), View::new(&turned, all)?, to)?;
        }
        let (z, dz, dheads) =
            (own.z.merge_rows()?, to.z.merge_rows()?, View::new(&dheads, [n, H * s])?);
        let sums = [ViewMut::new(to_gamma, [H * s])?, ViewMut::new(to_beta, [H * s])?];
        pointwise::offset_scale_backward(rt, z, w.gamma, dheads, dz, sums)?;

        let mut dplain = rt.floats(n * wide)?;
        let (plain, to) = (View::new(&kept.plain, shape)?, ViewMut::new(&mut dplain, shape)?);
        pointwise::activate_backward(rt, Activation::Silu, plain, View::new(&dactive, shape)?, to)?;
        let shifted = self.shift(rt, x)?;
        let rows = self.read(x, &shifted)?;
        w.first.backward(rt, [rows, View::new(&dplain, shape)?], dx.reborrow(), to_first)?;
        self.shift_back(dx, len);
        Ok(())
    }
}
