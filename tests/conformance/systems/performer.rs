//! Performer attention.

use crate::run::Run;
use crate::support::{heads_first, heads_first_mut};
use linattn::Result;
use linattn::attention::performer::{FavorKernel, PerformerAttention, PerformerConfig, Stabiliser};
use linattn::attention::{Gradients, Inputs};
use linattn::tensor::View;

fn operation(run: &Run<'_>) -> Result<PerformerAttention> {
    let case = run.case;
    let eps = case.number("kernel_eps") as f32;
    let config = PerformerConfig {
        kernel: match case.text("kernel") {
            "softmax" => FavorKernel::Softmax { eps },
            "relu" => FavorKernel::Relu { eps },
            other => panic!("unknown kernel `{other}`"),
        },
        causal: case.flag("causal"),
        normalize: case.flag("normalize_data"),
        denom_eps: case.number("denom_eps") as f32,
        stabiliser: Stabiliser::Sequence,
    };
    let projection = case.tensor("w.projection");
    PerformerAttention::new(config, View::new(&projection.data, projection.shape::<2>())?)
}

pub fn attention_gradients(run: &Run<'_>) -> Result<()> {
    let op = operation(run)?;
    let [q, k, v, dout] = ["in.q", "in.k", "in.v", "in.dout"].map(|n| run.case.tensor(n));
    let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| vec![f32::NAN; x.data.len()]);
    let grads = Gradients {
        q: heads_first_mut(&mut dq, q.shape()),
        k: heads_first_mut(&mut dk, k.shape()),
        v: heads_first_mut(&mut dv, v.shape()),
        state: None,
    };
    let [q, k, v, dout] = [q, k, v, dout].map(|x| heads_first(&x.data, x.shape()));
    op.backward(run.rt, Inputs { q, k, v, state: None, dout }, grads)?;
    for (name, x) in [("q", dq), ("k", dk), ("v", dv)] {
        run.check(name, &x);
    }
    Ok(())
}

pub fn attention(run: &Run<'_>) -> Result<()> {
    let op = operation(run)?;
    let config = *op.config();
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|n| run.case.tensor(n));
    let ([b, h, lq, _], [.., dv]) = (q.shape(), v.shape::<4>());
    let mut out = vec![f32::NAN; b * h * lq * dv];
    let [qv, kv, vv] = [q, k, v].map(|x| heads_first(&x.data, x.shape()));
    op.forward(run.rt, qv, kv, vv, heads_first_mut(&mut out, [b, h, lq, dv]), None)?;
    run.check("out", &out);
    if config.causal && matches!(config.kernel, FavorKernel::Relu { .. }) {
        // In parts, and token by token: the same.
        for step in [lq / 2 + 1, 1] {
            let mut state = op.new_state(b, h, dv)?;
            let mut out = vec![f32::NAN; b * h * lq * dv];
            for at in (0..lq).step_by(step) {
                let to = lq.min(at + step);
                let [q, k, v] = [qv, kv, vv].map(|x| x.slice(1, at, to));
                let part = heads_first_mut(&mut out, [b, h, lq, dv]).slice(1, at, to);
                op.forward(run.rt, q, k, v, part, Some(&mut state))?;
            }
            run.check("out", &out);
        }
    }
    Ok(())
}
