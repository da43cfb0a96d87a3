//! Performer attention.

use crate::run::Run;
use crate::support::{heads_first, heads_first_mut};
use linattn::Result;
use linattn::attention::performer::{FavorKernel, PerformerAttention, PerformerConfig, Stabiliser};
use linattn::tensor::View;

pub fn attention(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|n| case.tensor(n));
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
    let projection = View::new(&projection.data, projection.shape::<2>())?;
    let op = PerformerAttention::new(config, projection)?;
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
