//! A training step of a language model of bytes: `train_step`.

#[path = "../train/adamw.rs"]
#[expect(dead_code, reason = "the example `train` also saves and restores it")]
mod adamw;

use crate::{Args, Outcome, timing};
use adamw::AdamW;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{VarBuilder, VarMap};
use linattn::Runtime;
use linattn::candle::{FlashLm, TransNormerLlm, Transformer, cross_entropy};
use linattn::models::{FlashLmConfig, TransNormerConfig, TransformerConfig};
use linattn::tensor::Rng;
use std::sync::Arc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Forward, backward and AdamW of the model that the example `train` makes of the same sizes: four blocks of width `--d`,
/// `--batch` sequences of `--n` bytes.
pub fn step(args: &Args, rt: &Runtime) -> Result<Outcome> {
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global()?;
    // On a thread of the pool, as `train` does it.
    Ok(rayon::scope(|_| inside(args, rt).map_err(|e| e.to_string()))?)
}

fn inside(args: &Args, rt: &Runtime) -> Result<Outcome> {
    const LAYERS: usize = 4;
    let Args { batch, n, heads, d, .. } = *args;
    let own = Arc::new(Runtime::builder().threads(args.threads).isa(rt.isa()).build()?);
    let (vars, ffn) = (VarMap::new(), args.ffn.unwrap_or((d * 8 / 3).next_multiple_of(32)));
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let model: Box<dyn Module> = match args.variant.as_str() {
        "flash" => {
            let config = FlashLmConfig { group_size: 64, ..FlashLmConfig::sized(256, d, LAYERS) };
            Box::new(FlashLm::load(&own, &config, vb)?)
        }
        "transformer_pp" => {
            let json = serde_json::json!({"model_type": "transformer_pp", "vocab_size": 256,
                "dim": d, "layers": LAYERS, "heads": heads, "ffn_dim": ffn});
            let config = TransformerConfig::from_json(&json.to_string())?;
            Box::new(Transformer::load(&own, &config, vb)?)
        }
        _ => {
            let config = TransNormerConfig::sized(256, d, LAYERS, heads, ffn);
            Box::new(TransNormerLlm::load(&own, &config, vb)?)
        }
    };
    let mut rng = Rng::new(args.seed);
    let mut bytes = || {
        let ids = (0..batch * n).map(|_| rng.below(256) as u32).collect();
        Tensor::from_vec(ids, (batch, n), &Device::Cpu)
    };
    let (inputs, targets) = (bytes()?, bytes()?);
    let mut optimiser = AdamW::new(&vars, 0.1)?;
    let mut once = || -> Result<()> {
        let loss = cross_entropy(&own, &model.forward(&inputs)?, &targets)?;
        optimiser.step(&loss.backward()?, 1e-3, 1.0)
    };
    once()?;
    let times = timing::measure(args, rt, || once().expect("as before"));
    let weights: usize = vars.all_vars().iter().map(|v| v.elem_count()).sum();
    let tokens = (batch * n) as f64;
    let extra = [("parameters".to_string(), weights.into())].into_iter().collect();
    // Products of weights, once forward and twice backward.
    let flops = 6.0 * weights as f64 * tokens;
    Ok(Outcome { times, flops, tokens: Some(tokens), extra, ..Outcome::default() })
}
