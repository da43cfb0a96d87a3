//! Softmax attention.

use crate::run::Run;
use crate::support::{heads_first, heads_first_mut};
use linattn::Result;
use linattn::attention::softmax::{Extra, SoftmaxAttention};
use linattn::attention::{Mask, Scale};
use linattn::tensor::View;

pub fn attention(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|n| case.tensor(n));
    let ([b, h, lq, _], [_, _, lk, _], [.., e]) = (q.shape::<4>(), k.shape::<4>(), v.shape::<4>());
    let offset = case.number("causal_offset") as isize;
    let mut op = SoftmaxAttention::new().with_scale(Scale::Value(case.number("scale") as f32))?;
    if case.flag("causal") {
        op = op.with_mask(Mask::CausalOffset(offset));
    }
    let mask = case.get("in.key_mask");
    let mask: Option<Vec<bool>> = mask.map(|m| m.data.iter().map(|x| *x != 0.0).collect());
    let bias = case.get("in.bias");
    let extra = Extra {
        key_mask: mask.as_ref().map(|m| View::new(m, [b, lk])).transpose()?,
        bias: bias.map(|t| View::new(&t.data, [h, lq, lk])).transpose()?,
    };
    let mut out = vec![f32::NAN; b * h * lq * e];
    op.forward_with(
        run.rt,
        heads_first(&q.data, q.shape()),
        heads_first(&k.data, k.shape()),
        heads_first(&v.data, v.shape()),
        heads_first_mut(&mut out, [b, h, lq, e]),
        extra,
    )?;
    run.check("out", &out);
    Ok(())
}
