//! Layers of vision transformers.

use crate::case::Case;
use crate::run::Run;
use crate::support::{heads_first, heads_first_mut};
use linattn::Result;
use linattn::attention::focused::Normaliser;
use linattn::io::TensorMap;
use linattn::layers::agent1d::{
    AgentSelfAttention, AgentSelfAttentionConfig, AgentTransformer, AgentTransformerConfig,
    SequenceExtra,
};
use linattn::layers::vision::{
    FocusedChoices, MapAttention, MapAttentionConfig, Mechanism, Scope, VisionAttention,
    VisionAttentionConfig, VisionBlock, VisionBlockConfig,
};
use linattn::layers::{AgentSdAttention, AgentSdConfig, Parameters};
use linattn::tensor::{View, ViewMut};

/// The tensors `w.*` of a case under their own names.
pub fn tensors(case: &Case) -> Result<TensorMap> {
    let mut map = TensorMap::default();
    for name in case.names("w.") {
        let tensor = case.tensor(name);
        map.insert(&name["w.".len()..], &tensor.shape, tensor.data.clone())?;
    }
    Ok(map)
}

fn pair(case: &Case, names: [&str; 2]) -> [usize; 2] {
    names.map(|name| case.size(name))
}

/// What the letter of a block's attention, or the system's own name, stands for.
fn mechanism(case: &Case) -> Mechanism {
    let letter = case.config.get("attn_type").and_then(|t| t.as_str());
    match (letter, case.system.split('.').next()) {
        (Some("B" | "S"), _) => Mechanism::Softmax,
        (_, Some("agent")) => Mechanism::Agent { agents: case.size("agent_num") },
        (_, Some("focused")) => Mechanism::Focused(FocusedChoices {
            focusing_factor: case.number("focusing_factor") as f32,
            kernel: case.size("kernel_size"),
            normaliser: match case.config.get("normaliser").and_then(|n| n.as_str()) {
                Some("sum") => Normaliser::Sum,
                _ => Normaliser::Mean,
            },
        }),
        _ => panic!("nothing mixes like `{}`", case.system),
    }
}

fn attention(case: &Case, map: [usize; 2], scope: Scope) -> VisionAttentionConfig {
    VisionAttentionConfig {
        dim: case.size("dim"),
        heads: case.size("num_heads"),
        map,
        scope,
        mechanism: mechanism(case),
        qkv_bias: case.flag("qkv_bias"),
    }
}

fn check_layer(run: &Run<'_>, config: VisionAttentionConfig) -> Result<()> {
    let x = run.case.tensor("in.x");
    let tensors = tensors(run.case)?;
    let layer = VisionAttention::load(config, &Parameters::new(&tensors))?;
    let mut y = vec![f32::NAN; x.data.len()];
    let out = ViewMut::new(&mut y, x.shape())?;
    layer.forward(run.rt, View::new(&x.data, x.shape())?, out)?;
    run.check("out", &y);
    Ok(())
}

pub fn swin(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let window = [case.size("window"); 2];
    if !case.flag("block") {
        let scope = Scope::Windows { window, shift: [0; 2] };
        return check_layer(run, attention(case, window, scope));
    }
    let scope = Scope::Windows { window, shift: [case.size("shift"); 2] };
    let attention = attention(case, pair(case, ["h", "w"]), scope);
    let hidden = (attention.dim as f64 * case.number("mlp_ratio")) as usize;
    let norm_eps = case.number("norm_eps") as f32;
    let config = VisionBlockConfig { attention, mlp_hidden: hidden, mlp_conv: false, norm_eps };
    let tensors = tensors(case)?;
    let block = VisionBlock::load(config, &Parameters::new(&tensors))?;
    let x = case.tensor("in.x");
    let mut y = x.data.clone();
    block.forward(run.rt, ViewMut::new(&mut y, x.shape())?)?;
    run.check("out", &y);
    Ok(())
}

pub fn deit(run: &Run<'_>) -> Result<()> {
    let scope = Scope::Whole { class_token: run.case.flag("class_token") };
    check_layer(run, attention(run.case, pair(run.case, ["h", "w"]), scope))
}

pub fn pvt(run: &Run<'_>) -> Result<()> {
    let (case, ratio) = (run.case, run.case.size("sr_ratio"));
    let scope = Scope::Reduced { ratio, norm_eps: case.number("sr_norm_eps") as f32 };
    check_layer(run, attention(case, pair(case, ["h", "w"]), scope))
}

pub fn cswin(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let (dim, heads) = (case.size("dim"), case.size("num_heads"));
    let whole = MapAttentionConfig::whole(dim, heads, pair(case, ["h", "w"]), mechanism(case));
    let window = pair(case, ["window_h", "window_w"]);
    let config = MapAttentionConfig { window, lepe: true, ..whole };
    let tensors = tensors(case)?;
    let layer = MapAttention::load(config, &Parameters::new(&tensors))?;
    let qkv = case.tensor("in.qkv");
    let [_, batch, tokens, _] = qkv.shape();
    let (shape, len) = ([batch, tokens, dim], batch * tokens * dim);
    let part = |i: usize| View::new(&qkv.data[i * len..][..len], shape);
    let mut y = vec![f32::NAN; len];
    let out = ViewMut::new(&mut y, shape)?;
    layer.forward(run.rt, part(0)?, part(1)?, part(2)?, out)?;
    run.check("out", &y);
    Ok(())
}

/// The mask of a case, 1 where a token counts.
fn mask(case: &Case) -> Option<Vec<bool>> {
    case.get("in.mask").map(|m| m.data.iter().map(|x| *x != 0.0).collect())
}

pub fn generic1d(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let config = AgentSelfAttentionConfig {
        dim: case.size("dim"),
        heads: case.size("heads"),
        dim_head: case.size("dim_head"),
        agents: case.size("num_agent_tokens"),
        talking_heads: case.flag("talking_heads"),
        gate: case.flag("gate"),
    };
    let tensors = tensors(case)?;
    let layer = AgentSelfAttention::load(config, &Parameters::new(&tensors))?;
    let x = case.tensor("in.x");
    let [batch, len, _] = x.shape();
    let given = case.get("in.agent_tokens");
    let shape = given.map_or([batch, config.heads, config.agents, config.dim_head], |a| a.shape());
    let mask = mask(case);
    let (mut y, mut agents) =
        (vec![f32::NAN; x.data.len()], vec![f32::NAN; shape.iter().product()]);
    let extra = SequenceExtra {
        mask: mask.as_ref().map(|m| View::new(m, [batch, len])).transpose()?,
        agents: given.map(|a| heads_first(&a.data, shape)),
        gathered: Some(heads_first_mut(&mut agents, shape)),
    };
    let out = ViewMut::new(&mut y, x.shape())?;
    layer.forward_with(run.rt, View::new(&x.data, x.shape())?, out, extra)?;
    run.check("out", &y);
    run.check("agents", &agents);
    Ok(())
}

pub fn transformer1d(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let config = AgentTransformerConfig {
        dim: case.size("dim"),
        depth: case.size("depth"),
        heads: case.size("heads"),
        dim_head: case.size("dim_head"),
        agents: case.size("num_agent_tokens"),
        ff_mult: case.size("ff_mult"),
        talking_heads: case.flag("talking_heads"),
        gate: case.flag("gate"),
        sub_layernorm: case.flag("sub_layernorm"),
        final_norm: case.flag("final_norm"),
    };
    let tensors = tensors(case)?;
    let model = AgentTransformer::load(config, &Parameters::new(&tensors))?;
    let x = case.tensor("in.x");
    let [batch, len, dim] = x.shape();
    let mask = mask(case);
    let mask = mask.as_ref().map(|m| View::new(m, [batch, len])).transpose()?;
    let shape = [batch, config.agents, dim];
    let (mut y, mut agents) =
        (vec![f32::NAN; x.data.len()], vec![f32::NAN; shape.iter().product()]);
    let (out, last) = (ViewMut::new(&mut y, x.shape())?, ViewMut::new(&mut agents, shape)?);
    model.forward(run.rt, View::new(&x.data, x.shape())?, mask, out, Some(last))?;
    run.check("out", &y);
    run.check("agents", &agents);
    Ok(())
}

pub fn stable_diffusion(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let config = AgentSdConfig {
        dim: case.size("dim"),
        heads: case.size("heads"),
        dim_head: case.size("dim_head"),
        map: pair(case, ["h", "w"]),
        cell: pair(case, ["sy", "sx"]),
        ratio: case.number("ratio"),
        agent_ratio: case.number("agent_ratio"),
        k_scale2: case.number("k_scale2") as f32,
        k_shortcut: case.number("k_shortcut") as f32,
        seed: None,
    };
    assert!(!case.flag("randomize"), "only the deterministic destinations can be compared");
    let tensors = tensors(case)?;
    let layer = AgentSdAttention::load(config, &Parameters::new(&tensors))?;
    let sizes = [layer.features(), layer.agents()];
    assert_eq!(sizes, pair(case, ["n_features", "n_agents"]), "numbers of tokens and agents");
    let x = case.tensor("in.x");
    let mut y = vec![f32::NAN; x.data.len()];
    let out = ViewMut::new(&mut y, x.shape())?;
    layer.forward(run.rt, View::new(&x.data, x.shape())?, out)?;
    run.check("out", &y);
    Ok(())
}
