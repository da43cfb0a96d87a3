//! Linear attention with feature maps.

use crate::case::Case;
use crate::run::Run;
use crate::support::{heads_first, heads_first_mut};
use linattn::Result;
use linattn::attention::linear::{FeatureMap, LinearAttention, LinearState};
use linattn::attention::{Gradients, Inputs, Scale};

/// The operation and the state before the first token; zero if the file has none.
fn op(case: &Case) -> Result<(LinearAttention, LinearState)> {
    let map = match case.text("feature_map") {
        "identity" => FeatureMap::Identity,
        "elu1" => FeatureMap::Elu1,
        "relu" => FeatureMap::Relu,
        "silu" => FeatureMap::Silu,
        other => panic!("unknown feature map `{other}`"),
    };
    let eps = case.flag("normalize").then(|| case.number("eps") as f32);
    let mut op = LinearAttention::new(map)
        .with_eps(eps)?
        .with_scale(Scale::Value(case.number("scale") as f32))?;
    if case.flag("causal") {
        op = op.causal();
    }
    Ok((op, state(case, ["in.state_kv", "in.state_z"])?))
}

fn state(case: &Case, [kv, z]: [&str; 2]) -> Result<LinearState> {
    let ([b, h, _, d], [.., e]) = (case.tensor("in.k").shape(), case.tensor("in.v").shape::<4>());
    let of = |name: &str, len| case.get(name).map_or(vec![0.0; len], |t| t.data.clone());
    LinearState::from_slices(&of(kv, b * h * d * e), &of(z, b * h * d), [b, h, d, e], 0)
}

pub fn attention(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|n| case.tensor(n));
    let (op, mut state) = op(case)?;
    let ([b, h, n, _], [.., e]) = (q.shape(), v.shape::<4>());
    let mut out = vec![f32::NAN; b * h * n * e];
    op.forward(
        run.rt,
        heads_first(&q.data, q.shape()),
        heads_first(&k.data, k.shape()),
        heads_first(&v.data, v.shape()),
        heads_first_mut(&mut out, [b, h, n, e]),
        Some(&mut state),
    )?;
    run.check("o", &out);
    run.check("state_kv", state.kv().as_slice().expect("a whole state"));
    run.check("state_z", state.z());
    Ok(())
}

pub fn gradients(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let [q, k, v, dout] = ["in.q", "in.k", "in.v", "in.dout"].map(|n| case.tensor(n));
    let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| vec![f32::NAN; x.data.len()]);
    let (op, start) = op(case)?;
    let mut dstate = state(case, ["in.dstate_kv", "in.dstate_z"])?;
    let inputs = Inputs {
        q: heads_first(&q.data, q.shape()),
        k: heads_first(&k.data, k.shape()),
        v: heads_first(&v.data, v.shape()),
        state: Some(&start),
        dout: heads_first(&dout.data, dout.shape()),
    };
    let grads = Gradients {
        q: heads_first_mut(&mut dq, q.shape()),
        k: heads_first_mut(&mut dk, k.shape()),
        v: heads_first_mut(&mut dv, v.shape()),
        state: Some(&mut dstate),
    };
    op.backward(run.rt, inputs, grads)?;
    run.check("q", &dq);
    run.check("k", &dk);
    run.check("v", &dv);
    run.check("state_kv", dstate.kv().as_slice().expect("a whole state"));
    run.check("state_z", dstate.z());
    Ok(())
}
