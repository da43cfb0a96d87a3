//! Layers of vision transformers.

use crate::case::Case;
use crate::run::Run;
use linattn::Result;
use linattn::io::TensorMap;
use linattn::layers::Parameters;
use linattn::layers::vision::{
    Mechanism, Scope, VisionAttention, VisionAttentionConfig, VisionBlock, VisionBlockConfig,
};
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
    match case.config.get("attn_type").and_then(|t| t.as_str()) {
        Some("B" | "S") => Mechanism::Softmax,
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
    let config = VisionBlockConfig { attention, mlp_hidden: hidden, norm_eps };
    let tensors = tensors(case)?;
    let block = VisionBlock::load(config, &Parameters::new(&tensors))?;
    let x = case.tensor("in.x");
    let mut y = x.data.clone();
    block.forward(run.rt, ViewMut::new(&mut y, x.shape())?)?;
    run.check("out", &y);
    Ok(())
}
