//! Combiner attention.

use crate::run::Run;
use crate::support::{heads_first, heads_first_mut};
use linattn::Result;
use linattn::attention::Scale;
use linattn::attention::combiner::{CombinerAttention, CombinerConfig, KeySummary, Pool, Variant};

fn config(run: &Run<'_>) -> CombinerConfig {
    let case = run.case;
    let summary = match case.text("key_summary") {
        "none" => KeySummary::None,
        "wsum" => KeySummary::WeightedSum,
        other => panic!("unknown summary of keys `{other}`"),
    };
    CombinerConfig {
        variant: match case.text("variant") {
            "fixed" => Variant::Fixed,
            "axial_rowmajor" => Variant::AxialRowMajor(summary),
            "axial_mixture" => Variant::AxialMixture,
            other => panic!("unknown variant `{other}`"),
        },
        segment: case.size("segment"),
        causal: case.flag("causal"),
        pool: match case.text("pool") {
            "max" => Pool::Max,
            "mean" => Pool::Mean,
            "relu_max" => Pool::ReluMax,
            other => panic!("unknown pool `{other}`"),
        },
        scale: Scale::Value(case.number("scale") as f32),
    }
}

pub fn attention_gradients(run: &Run<'_>) -> Result<()> {
    let inputs = ["in.q", "in.k", "in.v", "in.dout"].map(|n| run.case.tensor(n));
    let [q, k, v, dout] = inputs.map(|x| heads_first(&x.data, x.shape()));
    let mut grads = [0, 1, 2].map(|i| vec![f32::NAN; inputs[i].data.len()]);
    let mut shapes = inputs.iter().map(|x| x.shape());
    let views = grads.each_mut().map(|g| heads_first_mut(g, shapes.next().expect("a shape")));
    CombinerAttention::new(config(run))?.backward(run.rt, q, k, v, dout, views)?;
    for (name, grad) in ["q", "k", "v"].into_iter().zip(&grads) {
        run.check(name, grad);
    }
    Ok(())
}

pub fn attention(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|n| case.tensor(n));
    let config = config(run);
    let op = CombinerAttention::new(config)?;
    let (shape @ [b, h, len, dk], [.., dv]) = (q.shape(), v.shape::<4>());
    let mut out = vec![f32::NAN; b * h * len * dv];
    let [qv, kv, vv] = [q, k, v].map(|x| heads_first(&x.data, x.shape()));
    op.forward(run.rt, qv, kv, vv, heads_first_mut(&mut out, [b, h, len, dv]), None)?;
    run.check("out", &out);
    assert_eq!(shape, k.shape::<4>());
    if config.causal && config.variant == Variant::Fixed {
        // In parts, and token by token: the same.
        for step in [len / 2 + 1, 1] {
            let mut state = op.new_state(b, h, dk, dv)?;
            let mut out = vec![f32::NAN; b * h * len * dv];
            for at in (0..len).step_by(step) {
                let to = len.min(at + step);
                let [q, k, v] = [qv, kv, vv].map(|x| x.slice(1, at, to));
                let part = heads_first_mut(&mut out, [b, h, len, dv]).slice(1, at, to);
                op.forward(run.rt, q, k, v, part, Some(&mut state))?;
            }
            run.check("out", &out);
        }
    }
    Ok(())
}
