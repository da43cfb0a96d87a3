//! What linear attention is compared with: Performer, Combiner, and a block of Transformer++.

use crate::attention::Case;
use crate::{Args, Dtype, Outcome, timing};
use half::{bf16, f16};
use linattn::attention::combiner::{self, CombinerAttention, CombinerConfig};
use linattn::attention::performer::{self, PerformerAttention, PerformerConfig, RowNorm};
use linattn::layers::WeightFormat;
use linattn::models::TransformerConfig;
use linattn::models::decoder::{Maps, Random};
use linattn::tensor::{Element, Rng, Tensor};
use linattn::{Result, Runtime};

/// FAVOR+ with `--features` features (`dim ln dim` if not given) and `--kernel softmax` or `relu`.
pub fn performer(args: &Args, rt: &Runtime) -> Result<Outcome> {
    match args.dtype {
        Dtype::F32 => performer_as::<f32>(args, rt),
        Dtype::Bf16 => performer_as::<bf16>(args, rt),
        Dtype::F16 => performer_as::<f16>(args, rt),
    }
}

fn performer_as<E: Element>(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, heads, dim, causal, .. } = *args;
    let dv = args.dv.unwrap_or(dim);
    let m = args.features.unwrap_or_else(|| performer::default_features(dim));
    let config = match args.kernel.as_str() {
        "relu" => PerformerConfig::relu(),
        _ => PerformerConfig::softmax(),
    };
    let config = PerformerConfig { causal, ..config };
    let w = performer::orthogonal_projection(m, dim, RowNorm::Gaussian, args.seed)?;
    let op = PerformerAttention::new(config, w.view())?;
    let mut case = Case::<E>::scaled(args, 1.0)?;
    let times = timing::measure(args, rt, || {
        let ([q, k, v], out) = case.views();
        op.forward(rt, q, k, v, out, None).expect("valid arguments");
    });
    let error = args.check.then(|| {
        let w: Vec<f64> = w.as_slice().iter().map(|x| f64::from(*x)).collect();
        case.error(args, |_, q, k, v| performer::naive::head(q, k, v, &w, [n, n, dim, dv], &config))
    });
    let flops = (4 * batch * n * heads * m * (dim + dv)) as f64;
    Ok(Outcome { times, flops, tokens: Some((batch * n) as f64), error, ..Outcome::default() })
}

/// Combiner with `--variant fixed`, `rowmajor` or `mixture` and segments of `--chunk` tokens (the root of the length if
/// not given).
pub fn combiner(args: &Args, rt: &Runtime) -> Result<Outcome> {
    match args.dtype {
        Dtype::F32 => combiner_as::<f32>(args, rt),
        Dtype::Bf16 => combiner_as::<bf16>(args, rt),
        Dtype::F16 => combiner_as::<f16>(args, rt),
    }
}

fn combiner_as<E: Element>(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, heads, dim, causal, .. } = *args;
    let dv = args.dv.unwrap_or(dim);
    let w = args.chunk.unwrap_or_else(|| (n as f64).sqrt().round() as usize);
    let (config, summaries) = match args.variant.as_str() {
        "rowmajor" => (CombinerConfig::axial_row_major(w), w),
        "mixture" => (CombinerConfig::axial_mixture(w), 3 * w),
        _ => (CombinerConfig::fixed(w), 2),
    };
    let config = CombinerConfig { causal: causal || args.variant == "mixture", ..config };
    let op = CombinerAttention::new(config)?;
    let mut case = Case::<E>::scaled(args, 1.0)?;
    let times = timing::measure(args, rt, || {
        let ([q, k, v], out) = case.views();
        op.forward(rt, q, k, v, out, None).expect("valid arguments");
    });
    let error = args.check.then(|| {
        let scale = f64::from(config.scale.of(dim));
        case.error(args, |_, q, k, v| combiner::naive::head(q, k, v, [n, dim, dv], scale, &config))
    });
    // Those of all keys and summaries, seen or not.
    let flops = (2 * batch * n * heads * (dim + dv) * (w + n / w + summaries)) as f64;
    Ok(Outcome { times, flops, tokens: Some((batch * n) as f64), error, ..Outcome::default() })
}

/// One block with random weights: RMSNorm, rotary positions, SwiGLU of width `--ffn` (four times the block's if not
/// given), `--heads` heads of width `--dim`.
pub fn transformer_pp(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, heads, dim, causal, .. } = *args;
    let width = heads * dim;
    let ffn = args.ffn.unwrap_or(4 * width);
    let config =
        TransformerConfig { causal, ..TransformerConfig::plus_plus(1, width, 1, heads, ffn) };
    let weights = Random { seed: args.seed, config: config.clone() };
    let block = config.block(&Maps { tensors: &weights, format: WeightFormat::F32 }, "")?;
    let mut start = Tensor::<3>::zeros([batch, n, width])?;
    Rng::new(args.seed).fill_normal(start.as_mut_slice(), 1.0);
    let mut x = start.clone();
    let times = timing::measure(args, rt, || {
        // The stream would grow from call to call.
        x.as_mut_slice().copy_from_slice(start.as_slice());
        block.forward(rt, x.view_mut(), None).expect("valid arguments");
    });
    let per_token = 8 * width * width + 6 * width * ffn + if causal { 2 } else { 4 } * n * width;
    let flops = (batch * n * per_token) as f64;
    Ok(Outcome { times, flops, tokens: Some((batch * n) as f64), ..Outcome::default() })
}
