//! Layers against the case files: outputs and all gradients.

use crate::case::Case;
use crate::operations::{random, values};
use crate::support::{engines, rel_err};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use linattn::Runtime;
use linattn::attention::focused::Normaliser;
use linattn::attention::mixed_chunk::LinReduce;
use linattn::attention::quadratic::ScoreActivation;
use linattn::candle::{
    Flash, FlashLm, GatedLinearAttention, Gau, MiniMaxLightning, Sglu, TransNormerBlock,
    TransformerBlock, VisionAttention,
};
use linattn::layers::flash::{FlashConfig, FlashForm, GateNorm, GauConfig, GauForm, PaperBias};
use linattn::layers::vision::{FocusedChoices, Mechanism, Scope, VisionAttentionConfig};
use linattn::layers::{Activation, GlaConfig, MiniMaxConfig, SgluConfig};
use linattn::models::{FlashLmConfig, TransformerConfig};
use linattn::tensor::Rng;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a layer computes from its input `x`.
type Layer<'a> = Box<dyn Fn(&Tensor) -> Result<Tensor> + 'a>;

/// Builds the layer of a case from its parameters.
type Load = for<'a> fn(&Arc<Runtime>, &'a Case, VarBuilder<'_>) -> Result<Layer<'a>>;

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

fn module<'a>(layer: impl Module + 'a) -> Result<Layer<'a>> {
    Ok(Box::new(move |x| layer.forward(x)))
}

fn gate_norm(case: &Case) -> GateNorm {
    match case.text("norm") {
        "layernorm" => GateNorm::Layer,
        "scalenorm" => GateNorm::Scale,
        other => panic!("unknown norm `{other}`"),
    }
}

fn paper_bias(case: &Case) -> PaperBias {
    match case.text("bias") {
        "toeplitz" => PaperBias::Toeplitz,
        "rope" => PaperBias::Rotary,
        other => panic!("unknown bias `{other}`"),
    }
}

fn score(case: &Case) -> ScoreActivation {
    match case.config.get("act").and_then(|act| act.as_str()) {
        None | Some("relu2") => ScoreActivation::Relu2,
        Some("laplace") => ScoreActivation::Laplace,
        Some(other) => panic!("unknown activation `{other}`"),
    }
}

fn gau<'a>(rt: &Arc<Runtime>, case: &'a Case, vb: VarBuilder<'_>) -> Result<Layer<'a>> {
    let config = GauConfig {
        form: match case.text("form") {
            "paper" => GauForm::Paper { max_len: case.size("max_len"), bias: paper_bias(case) },
            _ => GauForm::Package,
        },
        dim: case.size("dim"),
        query_key_dim: case.size("query_key_dim"),
        hidden: case.size("hidden"),
        causal: case.flag("causal"),
        act: score(case),
        norm: gate_norm(case),
        eps: case.number("eps") as f32,
        residual: case.flag("residual"),
    };
    let layer = Gau::load(rt, config, vb)?;
    let [mask, bias] = ["in.mask", "in.rel_pos_bias"].map(|name| optional(case, name));
    Ok(Box::new(move |x| layer.forward_with(x, mask.as_ref(), bias.as_ref())))
}

fn flash<'a>(rt: &Arc<Runtime>, case: &'a Case, vb: VarBuilder<'_>) -> Result<Layer<'a>> {
    let causal = case.flag("causal");
    let config = FlashConfig {
        form: match case.text("form") {
            "paper" => FlashForm::Paper {
                bias: paper_bias(case),
                reduce: match case.text("lin_reduce") {
                    "sum" => LinReduce::Sum,
                    "mean_chunks" => LinReduce::MeanChunks,
                    other => panic!("unknown reduction `{other}`"),
                },
            },
            _ => FlashForm::Package {
                shift_tokens: case.flag("shift_tokens"),
                rotary_dim: case.size("rotary_dim"),
                own_chunk: !causal && !case.flag("reduce_group_non_causal_attn"),
            },
        },
        dim: case.size("dim"),
        query_key_dim: case.size("query_key_dim"),
        hidden: case.size("hidden"),
        group_size: case.size("group_size"),
        causal,
        act: score(case),
        norm: gate_norm(case),
        eps: case.number("eps") as f32,
    };
    let layer = Flash::load(rt, config, vb)?;
    let mask = optional(case, "in.mask");
    Ok(Box::new(move |x| layer.forward_masked(x, mask.as_ref())))
}

fn vision(
    rt: &Arc<Runtime>,
    case: &Case,
    vb: VarBuilder<'_>,
    mechanism: Mechanism,
) -> Result<VisionAttention> {
    let config = VisionAttentionConfig {
        dim: case.size("dim"),
        heads: case.size("num_heads"),
        map: [case.size("h"), case.size("w")],
        scope: Scope::Whole { class_token: case.flag("class_token") },
        mechanism,
        qkv_bias: case.flag("qkv_bias"),
    };
    VisionAttention::load(rt, config, vb)
}

fn choices(case: &Case) -> FocusedChoices {
    FocusedChoices {
        focusing_factor: case.number("focusing_factor") as f32,
        kernel: case.size("kernel_size"),
        normaliser: match case.text("normaliser") {
            "mean" => Normaliser::Mean,
            "sum" => Normaliser::Sum,
            other => panic!("unknown normaliser `{other}`"),
        },
    }
}

/// A system, and which inputs besides `x` its layer takes.
const LAYERS: &[(&str, &[&str], Load)] = &[
    ("agent.deit", &[], |rt, case, vb| {
        module(vision(rt, case, vb, Mechanism::Agent { agents: case.size("agent_num") })?)
    }),
    ("flash", &["in.mask"], flash),
    ("focused.deit", &[], |rt, case, vb| {
        module(vision(rt, case, vb, Mechanism::Focused(choices(case)))?)
    }),
    ("gau", &["in.mask", "in.rel_pos_bias"], gau),
    ("model.flash_lm", &["in.mask"], |rt, case, vb| {
        let config = FlashLmConfig::from_json(&case.config.to_string()).expect("a configuration");
        let (model, mask) = (FlashLm::load(rt, &config, vb)?, optional(case, "in.mask"));
        Ok(Box::new(move |x| model.forward_masked(&x.to_dtype(DType::U32)?, mask.as_ref())))
    }),
    ("minimax.lightning", &[], |rt, case, vb| {
        let config = MiniMaxConfig {
            hidden_size: case.size("hidden_size"),
            heads: case.size("heads"),
            head_dim: case.size("head_dim"),
            norm_eps: case.number("norm_eps") as f32,
        };
        let slopes = case.tensor("in.slope").wide();
        module(MiniMaxLightning::load(rt, config, &slopes, vb)?)
    }),
    ("transformer_pp.block", &[], |rt, case, vb| {
        let mut json = case.config.clone();
        // What a block alone has not.
        json["vocab_size"] = 1.into();
        json["layers"] = 1.into();
        let config = TransformerConfig::from_json(&json.to_string()).expect("a configuration");
        module(TransformerBlock::load(rt, &config, vb)?)
    }),
    ("transnormer.gla", &[], |rt, case, vb| module(gla(rt, case, vb)?)),
    ("transnormer.glu", &[], |rt, case, vb| {
        module(sglu(rt, case, Activation::parse(case.text("act")), vb)?)
    }),
    ("transnormer.block", &[], |rt, case, vb| {
        // The `act` of a block is that of its token mixer.
        let sglu = sglu(rt, case, Activation::Identity, vb.pp("channel_mixer"))?;
        let gla = gla(rt, case, vb.pp("token_mixer"))?;
        module(TransNormerBlock::new(gla, sglu, case.number("norm_eps") as f32))
    }),
];

/// What many layers have no argument for.
const OTHER_INPUTS: &[&str] = &["in.state", "in.padding_mask", "in.mask", "in.agent_tokens"];

fn cases() -> Vec<Case> {
    let dir = std::env::var_os("LINATTN_CASES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases"), PathBuf::from);
    let entries = std::fs::read_dir(&dir).expect("the folder of the cases");
    let mut files: Vec<_> = entries.map(|e| e.expect("an entry").path()).collect();
    files.sort();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.iter().map(|path| Case::read(path).expect("a case")).collect()
}

fn optional(case: &Case, name: &str) -> Option<Tensor> {
    case.get(name).map(|_| tensor(case, name))
}

fn tensor(case: &Case, name: &str) -> Tensor {
    let array = case.tensor(name);
    Tensor::from_slice(&array.data, array.shape.as_slice(), &Device::Cpu).expect("a tensor")
}

/// The name of the output of a case.
fn output(case: &Case) -> &'static str {
    let names = ["out.y", "out.out", "out.logits"];
    names.into_iter().find(|name| case.get(name).is_some()).expect("an output")
}

/// The result of the layer of a case and its gradients; of its input times `factor`.
fn results(
    rt: &Arc<Runtime>,
    load: Load,
    case: &Case,
    factor: f64,
) -> Result<Vec<(String, Vec<f32>)>> {
    let mut vars = BTreeMap::new();
    for name in case.names("w.") {
        vars.insert(name.replacen("w.", "", 1), Var::from_tensor(&tensor(case, name))?);
    }
    let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone()));
    let vb = VarBuilder::from_tensors(tensors.collect(), DType::F32, &Device::Cpu);
    let x = match optional(case, "in.x") {
        Some(x) => (x * factor)?,
        None => tensor(case, "in.tokens"),
    };
    let x = Var::from_tensor(&x)?;
    let y = load(rt, case, vb)?(&x)?;
    let mut got = vec![(output(case).to_string(), values(&y))];
    if case.get("in.dout").is_some() {
        let grads = (y * tensor(case, "in.dout"))?.sum_all()?.backward()?;
        vars.insert("x".into(), x);
        for (name, var) in &vars {
            if let Some(grad) = grads.get(var) {
                got.push((format!("grad.{name}"), values(grad)));
            }
        }
    }
    Ok(got)
}

/// Faults of one case on one engine.
fn compare(rt: &Arc<Runtime>, load: Load, case: &Case, tolerance: f64) -> Result<Vec<String>> {
    let got = results(rt, load, case, 1.0)?;
    let mut faults = Vec::new();
    for name in std::iter::once(output(case)).chain(case.names("grad.")) {
        let found = got.iter().find(|g| g.0 == name);
        let err = found.map(|g| rel_err(&g.1, &case.tensor(name).wide()));
        if err.is_none_or(|e| e > tolerance) {
            faults.push(format!("{}: {name}: {err:?}, tolerance {tolerance:.0e}", case.stem));
        }
    }
    Ok(faults)
}

/// The cases of layers, each with the index of its system in [`LAYERS`].
fn cases_of_layers() -> impl Iterator<Item = (usize, Case)> {
    cases().into_iter().filter_map(|case| {
        let at = LAYERS.iter().position(|l| l.0 == case.system)?;
        let continues = case.config.get("offset").is_some() && case.size("offset") != 0;
        let others = OTHER_INPUTS.iter().filter(|name| !LAYERS[at].1.contains(name));
        let others = others.into_iter().any(|name| case.get(name).is_some());
        (!continues && !others).then_some((at, case))
    })
}

#[test]
fn layers_agree_with_their_cases() -> Result<()> {
    let (mut faults, mut compared) = (Vec::new(), vec![0; LAYERS.len()]);
    for (at, case) in cases_of_layers() {
        let load = LAYERS[at].2;
        for engine in engines() {
            let tolerance = engine.tolerance(case.tolerance, false);
            faults.extend(compare(&Arc::new(engine.runtime()), load, &case, tolerance)?);
        }
        compared[at] += 1;
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
    let missing = compared.iter().zip(LAYERS).filter(|(n, _)| **n == 0);
    let missing: Vec<_> = missing.map(|(_, l)| l.0).collect();
    assert!(missing.is_empty(), "no cases of {missing:?}");
    Ok(())
}

/// Layers work on memory that others have left behind, and overwrite what they read of it.
#[test]
fn nothing_depends_on_what_memory_held_before() -> Result<()> {
    let bits = |all: Vec<(String, Vec<f32>)>| -> Vec<(String, Vec<u32>)> {
        all.into_iter().map(|(name, x)| (name, x.into_iter().map(f32::to_bits).collect())).collect()
    };
    for (at, case) in cases_of_layers() {
        let (load, fresh) = (LAYERS[at].2, Arc::new(Runtime::new().expect("a runtime")));
        let used = Arc::new(Runtime::new().expect("a runtime"));
        results(&used, load, &case, f64::NAN)?;
        let [want, got] = [&fresh, &used].map(|rt| results(rt, load, &case, 1.0).map(bits));
        assert!(want? == got?, "{}", case.stem);
    }
    Ok(())
}

/// Every layer refuses inputs of another width than its parameters are for.
#[test]
fn layers_refuse_other_widths() -> Result<()> {
    let rt = Arc::new(Runtime::new().expect("a runtime"));
    for (at, case) in cases_of_layers() {
        let Some(x) = optional(&case, "in.x") else { continue };
        let weights =
            case.names("w.").map(|name| (name.replacen("w.", "", 1), tensor(&case, name)));
        let vb = VarBuilder::from_tensors(weights.collect(), DType::F32, &Device::Cpu);
        let layer = LAYERS[at].2(&rt, &case, vb)?;
        let last = x.rank() - 1;
        for x in [x.narrow(last, 0, 1)?, x.narrow(last, 0, 0)?, Tensor::cat(&[&x, &x], last)?] {
            assert!(layer(&x).is_err(), "{}: {:?}", case.stem, x.dims());
        }
    }
    Ok(())
}

/// The gradient of every parameter, along a random direction, against the difference that a small step along it makes.
/// Cases have none of these layers; that of each operation is tested elsewhere.
#[test]
fn vision_layers_pass_gradients_to_all_parameters() -> Result<()> {
    let seed = 21;
    println!("seed {seed}");
    let (mut rng, rt) = (Rng::new(seed), Arc::new(Runtime::new().expect("a runtime")));
    let agents = Mechanism::Agent { agents: 4 };
    for (mechanism, class_token) in
        [agents, Mechanism::focused()].map(|m| [(m, true), (m, false)]).concat()
    {
        let config = VisionAttentionConfig {
            dim: 12,
            heads: 2,
            map: [5, 4],
            scope: Scope::Whole { class_token },
            mechanism,
            qkv_bias: true,
        };
        let map = VarMap::new();
        let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
        let layer = VisionAttention::load(&rt, config, vb.clone())?;
        // In an order that does not change from run to run.
        let vars = map.data().lock().expect("no other user").clone();
        let vars: BTreeMap<_, _> = vars.into_iter().collect();
        for var in vars.values() {
            var.set(&(random(&mut rng, var.dims()) * 0.5)?)?;
        }
        let shape = [2, 20 + usize::from(class_token), 12];
        let (x, weights) = (random(&mut rng, &shape), random(&mut rng, &shape));
        let loss = || (layer.forward(&x)? * &weights)?.to_dtype(DType::F64)?.sum_all();
        let grads = loss()?.backward()?;
        for (name, var) in &vars {
            let way = random(&mut rng, var.dims());
            let start = var.as_tensor().copy()?;
            let at = |step: f64| {
                var.set(&(&start + (&way * step)?)?)?;
                loss()?.to_scalar::<f64>()
            };
            let step = 2e-3;
            let want = (at(step)? - at(-step)?) / (2.0 * step);
            var.set(&start)?;
            let grad = grads.get(var).unwrap_or_else(|| panic!("no gradient of {name}"));
            let got = f64::from((grad * way)?.sum_all()?.to_scalar::<f32>()?);
            // Sums of some hundred products of the size of one, in `f32`, over twice the step, and what the step bends.
            assert!(
                (got - want).abs() <= 2e-2 * (1.0 + want.abs()),
                "{mechanism:?}, {class_token}: {name}: {got}, {want}"
            );
        }
    }
    Ok(())
}
