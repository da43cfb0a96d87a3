//! Layers and language model of FLASH.

use super::mixed_chunk::{act, mask};
use super::model::Weights;
use crate::run::Run;
use linattn::Result;
use linattn::attention::mixed_chunk::LinReduce;
use linattn::layers::Parameters;
use linattn::layers::flash::{
    Flash, FlashConfig, FlashForm, GateNorm, Gau, GauConfig, GauExtra, GauForm, PaperBias,
};
use linattn::models::{FlashLm, FlashLmConfig};
use linattn::tensor::{View, ViewMut};

fn norm(run: &Run<'_>) -> GateNorm {
    match run.case.text("norm") {
        "layernorm" => GateNorm::Layer,
        "scalenorm" => GateNorm::Scale,
        other => panic!("unknown norm `{other}`"),
    }
}

fn paper_bias(run: &Run<'_>) -> PaperBias {
    match run.case.text("bias") {
        "toeplitz" => PaperBias::Toeplitz,
        "rope" => PaperBias::Rotary,
        other => panic!("unknown bias `{other}`"),
    }
}

pub fn gau(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let config = GauConfig {
        form: match case.text("form") {
            "paper" => GauForm::Paper { max_len: case.size("max_len"), bias: paper_bias(run) },
            _ => GauForm::Package,
        },
        dim: case.size("dim"),
        query_key_dim: case.size("query_key_dim"),
        hidden: case.size("hidden"),
        causal: case.flag("causal"),
        act: act(run),
        norm: norm(run),
        eps: case.number("eps") as f32,
        residual: case.flag("residual"),
    };
    let layer = Gau::from_parameters(config, &Parameters::new(&Weights(case)))?;
    let x = case.tensor("in.x");
    let [batch, len, _] = x.shape();
    let mask = mask(run);
    let bias = case.get("in.rel_pos_bias").map(|t| View::new(&t.data, t.shape())).transpose()?;
    let extra =
        GauExtra { mask: mask.as_ref().map(|m| View::new(m, [batch, len])).transpose()?, bias };
    let mut y = vec![f32::NAN; x.data.len()];
    let input = View::new(&x.data, x.shape())?;
    layer.forward_with(run.rt, input, ViewMut::new(&mut y, x.shape())?, extra)?;
    run.check("y", &y);
    // A stream of single tokens, where the layer has one.
    if let (Ok(mut state), None) = (layer.new_state(batch), &mask) {
        y.fill(f32::NAN);
        for t in 0..len {
            let out = ViewMut::new(&mut y, x.shape())?.slice(1, t, t + 1);
            layer.stream(run.rt, input.slice(1, t, t + 1), out, &mut state)?;
        }
        run.check("y", &y);
    }
    Ok(())
}

pub fn flash(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let config = FlashConfig {
        form: match case.text("form") {
            "paper" => FlashForm::Paper {
                bias: paper_bias(run),
                reduce: match case.text("lin_reduce") {
                    "sum" => LinReduce::Sum,
                    "mean_chunks" => LinReduce::MeanChunks,
                    other => panic!("unknown reduction `{other}`"),
                },
            },
            _ => FlashForm::Package {
                shift_tokens: case.flag("shift_tokens"),
                rotary_dim: case.size("rotary_dim"),
                own_chunk: !case.flag("causal") && !case.flag("reduce_group_non_causal_attn"),
            },
        },
        dim: case.size("dim"),
        query_key_dim: case.size("query_key_dim"),
        hidden: case.size("hidden"),
        group_size: case.size("group_size"),
        causal: case.flag("causal"),
        act: if case.config.get("act").is_some() { act(run) } else { Default::default() },
        norm: norm(run),
        eps: case.number("eps") as f32,
    };
    let layer = Flash::from_parameters(config, &Parameters::new(&Weights(case)))?;
    let x = case.tensor("in.x");
    let [batch, len, _] = x.shape();
    let mask = mask(run);
    let mask = mask.as_ref().map(|m| View::new(m, [batch, len])).transpose()?;
    let mut y = vec![f32::NAN; x.data.len()];
    let input = View::new(&x.data, x.shape())?;
    layer.forward_masked(run.rt, input, mask, ViewMut::new(&mut y, x.shape())?, None)?;
    run.check("y", &y);
    // As a stream: at once, in two parts, token by token.
    for step in [len, len / 2 + 1, 1] {
        let Ok(mut state) = layer.new_state(batch) else { break };
        y.fill(f32::NAN);
        for at in (0..len).step_by(step) {
            let to = len.min(at + step);
            let out = ViewMut::new(&mut y, x.shape())?.slice(1, at, to);
            let (x, mask) = (input.slice(1, at, to), mask.map(|m| m.slice(1, at, to)));
            layer.forward_masked(run.rt, x, mask, out, Some(&mut state))?;
        }
        run.check("y", &y);
    }
    Ok(())
}

pub fn model(run: &Run<'_>) -> Result<()> {
    let (case, rt) = (run.case, run.rt);
    let config = FlashLmConfig::from_json(&case.config.to_string())?;
    let model = FlashLm::from_tensors(config, &Weights(case))?;
    let tokens = case.tensor("in.tokens");
    let ([batch, len], vocab) = (tokens.shape(), model.vocab_size());
    let ids: Vec<u32> = tokens.data.iter().map(|x| *x as u32).collect();
    let mask = mask(run);
    let view = mask.as_ref().map(|m| View::new(m, [batch, len])).transpose()?;
    let mut logits = vec![f32::NAN; batch * len * vocab];
    model.encode(rt, &ids, batch, view, &mut logits)?;
    run.check("logits", &logits);
    if !model.config().causal || mask.is_some() {
        return Ok(());
    }
    // At once and token by token: step t gives row t.
    logits.fill(f32::NAN);
    model.forward(rt, &ids, &mut model.new_state(batch)?, &mut logits)?;
    run.check("logits", &logits);
    let mut state = model.new_state(batch)?;
    let mut row = vec![f32::NAN; batch * vocab];
    for t in 0..len {
        let column: Vec<u32> = (0..batch).map(|b| ids[b * len + t]).collect();
        model.decode_step(rt, &column, &mut state, &mut row)?;
        for (b, row) in row.chunks_exact(vocab).enumerate() {
            logits[(b * len + t) * vocab..][..vocab].copy_from_slice(row);
        }
    }
    run.check("logits", &logits);
    Ok(())
}
