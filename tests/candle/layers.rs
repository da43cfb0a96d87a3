//! Layers against the case files: outputs and all gradients.

use crate::case::Case;
use crate::operations::values;
use crate::support::{engines, rel_err};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::VarBuilder;
use linattn::Runtime;
use linattn::candle::{
    GatedLinearAttention, MiniMaxLightning, Sglu, TransNormerBlock, TransformerBlock,
};
use linattn::layers::{Activation, GlaConfig, MiniMaxConfig, SgluConfig};
use linattn::models::TransformerConfig;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

type Layer = Box<dyn Module>;

/// Builds the layer of a case from its parameters.
type Load = fn(&Arc<Runtime>, &Case, VarBuilder<'_>) -> Result<Layer>;

fn gla(rt: &Arc<Runtime>, case: &Case, vb: VarBuilder<'_>) -> Result<GatedLinearAttention> {
    let config = GlaConfig {
        embed_dim: case.size("embed_dim"),
        hidden_dim: case.size("hidden_dim"),
        heads: case.size("heads"),
        act: Activation::parse(case.text("act")),
        norm_eps: case.number("norm_eps") as f32,
    };
    let slopes = case.tensor("in.slope").wide();
    GatedLinearAttention::load(rt, config, [case.flag("bias"), case.flag("lrpe")], &slopes, vb)
}

fn sglu(rt: &Arc<Runtime>, case: &Case, act: Activation, vb: VarBuilder<'_>) -> Result<Sglu> {
    let (embed_dim, glu_dim) = (case.size("embed_dim"), case.size("glu_dim"));
    Sglu::load(rt, SgluConfig { embed_dim, glu_dim, act }, case.flag("bias"), vb)
}

const LAYERS: &[(&str, Load)] = &[
    ("minimax.lightning", |rt, case, vb| {
        let config = MiniMaxConfig {
            hidden_size: case.size("hidden_size"),
            heads: case.size("heads"),
            head_dim: case.size("head_dim"),
            norm_eps: case.number("norm_eps") as f32,
        };
        let slopes = case.tensor("in.slope").wide();
        Ok(Box::new(MiniMaxLightning::load(rt, config, &slopes, vb)?))
    }),
    ("transformer_pp.block", |rt, case, vb| {
        let mut json = case.config.clone();
        // What a block alone has not.
        json["vocab_size"] = 1.into();
        json["layers"] = 1.into();
        let config = TransformerConfig::from_json(&json.to_string()).expect("a configuration");
        Ok(Box::new(TransformerBlock::load(rt, &config, vb)?))
    }),
    ("transnormer.gla", |rt, case, vb| Ok(Box::new(gla(rt, case, vb)?))),
    ("transnormer.glu", |rt, case, vb| {
        Ok(Box::new(sglu(rt, case, Activation::parse(case.text("act")), vb)?))
    }),
    ("transnormer.block", |rt, case, vb| {
        // The `act` of a block is that of its token mixer.
        let sglu = sglu(rt, case, Activation::Identity, vb.pp("channel_mixer"))?;
        let gla = gla(rt, case, vb.pp("token_mixer"))?;
        Ok(Box::new(TransNormerBlock::new(gla, sglu, case.number("norm_eps") as f32)))
    }),
];

/// What a layer has no argument for: a state or a mask.
const OTHER_INPUTS: &[&str] = &["in.state", "in.padding_mask", "in.mask"];

fn cases() -> Vec<Case> {
    let dir = std::env::var_os("LINATTN_CASES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases"), PathBuf::from);
    let entries = std::fs::read_dir(&dir).expect("the folder of the cases");
    let mut files: Vec<_> = entries.map(|e| e.expect("an entry").path()).collect();
    files.sort();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.iter().map(|path| Case::read(path).expect("a case")).collect()
}

fn tensor(case: &Case, name: &str) -> Tensor {
    let array = case.tensor(name);
    Tensor::from_slice(&array.data, array.shape.as_slice(), &Device::Cpu).expect("a tensor")
}

/// Faults of one case on one engine.
fn compare(rt: Arc<Runtime>, load: Load, case: &Case, tolerance: f64) -> Result<Vec<String>> {
    let mut vars = BTreeMap::new();
    for name in case.names("w.") {
        vars.insert(name.replacen("w.", "", 1), Var::from_tensor(&tensor(case, name))?);
    }
    let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone()));
    let vb = VarBuilder::from_tensors(tensors.collect(), DType::F32, &Device::Cpu);
    let x = Var::from_tensor(&tensor(case, "in.x"))?;
    let y = load(&rt, case, vb)?.forward(&x)?;
    let mut got = vec![("out.y".to_string(), values(&y))];
    if case.get("in.dout").is_some() {
        let grads = (y * tensor(case, "in.dout"))?.sum_all()?.backward()?;
        vars.insert("x".into(), x);
        for (name, var) in &vars {
            if let Some(grad) = grads.get(var) {
                got.push((format!("grad.{name}"), values(grad)));
            }
        }
    }
    let mut faults = Vec::new();
    for name in std::iter::once("out.y").chain(case.names("grad.")) {
        let found = got.iter().find(|g| g.0 == name);
        let err = found.map(|g| rel_err(&g.1, &case.tensor(name).wide()));
        if err.is_none_or(|e| e > tolerance) {
            faults.push(format!("{}: {name}: {err:?}, tolerance {tolerance:.0e}", case.stem));
        }
    }
    Ok(faults)
}

#[test]
fn layers_agree_with_their_cases() -> Result<()> {
    let (mut faults, mut compared) = (Vec::new(), vec![0; LAYERS.len()]);
    for case in cases() {
        let Some(at) = LAYERS.iter().position(|l| l.0 == case.system) else { continue };
        let continues = case.config.get("offset").is_some() && case.size("offset") != 0;
        if continues || OTHER_INPUTS.iter().any(|name| case.get(name).is_some()) {
            continue;
        }
        for engine in engines() {
            let tolerance = engine.tolerance(case.tolerance, false);
            faults.extend(compare(Arc::new(engine.runtime()), LAYERS[at].1, &case, tolerance)?);
        }
        compared[at] += 1;
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
    let missing = compared.iter().zip(LAYERS).filter(|(n, _)| **n == 0);
    let missing: Vec<_> = missing.map(|(_, l)| l.0).collect();
    assert!(missing.is_empty(), "no cases of {missing:?}");
    Ok(())
}
