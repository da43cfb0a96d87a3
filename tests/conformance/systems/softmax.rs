//! Softmax attention.

use crate::run::Run;
use crate::support::{heads_first, heads_first_mut};
use linattn::Result;
use linattn::attention::softmax::{Extra, SoftmaxAttention};
use linattn::attention::{Mask, Scale};
use linattn::tensor::{View, ViewMut};

/// The mechanism as a case asks for it, and which keys count.
fn operation(run: &Run<'_>) -> Result<(SoftmaxAttention, Option<Vec<bool>>)> {
    let case = run.case;
    let offset = case.number("causal_offset") as isize;
    let mut op = SoftmaxAttention::new().with_scale(Scale::Value(case.number("scale") as f32))?;
    if case.flag("causal") {
        op = op.with_mask(Mask::CausalOffset(offset));
    }
    let mask = case.get("in.key_mask");
    Ok((op, mask.map(|m| m.data.iter().map(|x| *x != 0.0).collect())))
}

fn extra<'a>(run: &'a Run<'_>, mask: Option<&'a Vec<bool>>) -> Result<Extra<'a>> {
    let shape = run.case.tensor("in.k").shape::<4>();
    let bias = run.case.get("in.bias");
    Ok(Extra {
        key_mask: mask.map(|m| View::new(m, [shape[0], shape[2]])).transpose()?,
        bias: bias.map(|t| View::new(&t.data, t.shape())).transpose()?,
    })
}

pub fn attention(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|n| case.tensor(n));
    let ([b, h, lq, _], [.., e]) = (q.shape::<4>(), v.shape::<4>());
    let (op, mask) = operation(run)?;
    let mut out = vec![f32::NAN; b * h * lq * e];
    op.forward_with(
        run.rt,
        heads_first(&q.data, q.shape()),
        heads_first(&k.data, k.shape()),
        heads_first(&v.data, v.shape()),
        heads_first_mut(&mut out, [b, h, lq, e]),
        extra(run, mask.as_ref())?,
    )?;
    run.check("out", &out);
    Ok(())
}

pub fn attention_gradients(run: &Run<'_>) -> Result<()> {
    let inputs = ["in.q", "in.k", "in.v"].map(|n| run.case.tensor(n));
    let dout = run.case.tensor("in.dout");
    let (op, mask) = operation(run)?;
    let extra = extra(run, mask.as_ref())?;
    let mut grads = inputs.map(|x| vec![f32::NAN; x.data.len()]);
    let shape = extra.bias.map_or([0; 3], |x| x.shape());
    let mut dbias = vec![f32::NAN; shape.iter().product()];
    let [q, k, v, dout] =
        [inputs[0], inputs[1], inputs[2], dout].map(|x| heads_first(&x.data, x.shape()));
    let [dq, dk, dv] = &mut grads;
    let views = [
        heads_first_mut(dq, inputs[0].shape()),
        heads_first_mut(dk, inputs[1].shape()),
        heads_first_mut(dv, inputs[2].shape()),
    ];
    let to = extra.bias.map(|_| ViewMut::new(&mut dbias, shape)).transpose()?;
    op.backward_with(run.rt, q, k, v, dout, views, extra, to)?;
    for (name, grad) in ["q", "k", "v"].into_iter().zip(&grads) {
        run.check(name, grad);
    }
    run.check("bias", &dbias);
    Ok(())
}
