//! Linear attention with feature maps.

use crate::run::Run;
use crate::support::{heads_first, heads_first_mut};
use linattn::Result;
use linattn::attention::Scale;
use linattn::attention::linear::{FeatureMap, LinearAttention, LinearState};

pub fn attention(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|n| case.tensor(n));
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
    let ([b, h, _, d], [.., e]) = (k.shape(), v.shape::<4>());
    let zeros = |len: usize| vec![0.0; len];
    let kv = case.get("in.state_kv");
    let kv = kv.map_or_else(|| zeros(b * h * d * e), |t| t.data.clone());
    let z = case.get("in.state_z");
    let z = z.map_or_else(|| zeros(b * h * d), |t| t.data.clone());
    let mut state = LinearState::from_slices(&kv, &z, [b, h, d, e], 0)?;
    let [_, _, n, _] = q.shape();
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
