//! Times one operation and prints one JSON line, in the manner of the usual framework micro-benchmarks:
//! warm-up, repetitions of at least `--min-time`, median and minimum, and a short calibration beside them.
//!
//! ```text
//! cargo run --release --example measure -- --what lightning --n 8192 --heads 8 --dim 128
//! ```

mod attention;
mod backward;
mod baselines;
mod decode;
mod flash;
mod gemm;
mod models;
mod pairs;
mod timing;
#[cfg(feature = "candle")]
mod train;
mod vision;

use clap::{Parser, ValueEnum};
use linattn::layers::WeightFormat;
use linattn::{Isa, Precision, Runtime};
use serde_json::{Map, Value, json};

/// What can be measured.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
enum What {
    /// Causal linear attention with decay, prefill.
    Lightning,
    /// The same, one token per call.
    LightningBackward,
    LightningDecode,
    LinearBackward,
    /// Zero tokens after live ones: `silent_prefill` and `silent_decode` are times relative to live tokens.
    Silence,
    /// Linear attention over all keys, elu + 1, normalised.
    LinearNoncausal,
    /// Softmax attention (`--causal` for the causal one).
    Softmax,
    /// Agent attention (`--agents`, `--bias`, `--pool`).
    Agent,
    /// Focused linear attention.
    Focused,
    /// Mixed chunk attention (`--chunk`, `--s`, `--e`, `--causal`).
    MixedChunk,
    /// Quadratic attention without softmax (`--s`, `--e`, `--causal`).
    Gau,
    /// Gradients of softmax, agent, mixed chunk and quadratic attention.
    SoftmaxBackward,
    AgentBackward,
    MixedChunkBackward,
    QuadraticBackward,
    /// A whole FLASH layer (also `--d`).
    FlashLayer,
    /// Performer attention (`--features`, `--kernel softmax|relu`, `--causal`).
    Performer,
    /// Combiner attention (`--variant fixed|rowmajor|mixture`, `--chunk`, `--causal`).
    Combiner,
    /// A block of Transformer++ with random weights (`--ffn`, `--causal`).
    TransformerPp,
    /// A training step with candle (`--variant transnormer|transformer_pp|flash`, `--d`, `--ffn`).
    #[cfg(feature = "candle")]
    TrainStep,
    /// Tokens per second of a whole model (`--config`).
    GenerateDecode,
    /// One matrix product.
    Gemm,
    /// A whole vision model (`--res`, `--batch`); so are all others by their names.
    DeitT,
    DeitS,
    PvtT,
    SwinT,
    CswinT,
    AgentDeitT,
    AgentDeitS,
    AgentPvtT,
    AgentSwinT,
    AgentCswinT,
    FlattenDeitT,
    FlattenPvtT,
    FlattenSwinT,
    FlattenCswinT,
}

/// Element types of the inputs.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
    F16,
}

/// Memory order of q, k, v and the output.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Layout {
    /// `[batch, len, heads, dim]`
    Bthd,
    /// `[batch, heads, len, dim]`
    Bhtd,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Engine {
    F32,
    Bf16x3,
    Bf16,
}

/// Times one operation and prints one JSON line.
#[derive(Clone, Debug, Parser)]
struct Args {
    #[arg(long)]
    what: What,
    /// Sequence length.
    #[arg(long, default_value_t = 2048)]
    n: usize,
    #[arg(long, default_value_t = 1)]
    batch: usize,
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Width of queries and keys.
    #[arg(long, default_value_t = 64)]
    dim: usize,
    /// Width of values (that of queries if not given).
    #[arg(long)]
    dv: Option<usize>,
    /// Rows of a chunk (the library's choice if not given).
    #[arg(long)]
    chunk: Option<usize>,
    /// Width of the queries and keys of a gated layer.
    #[arg(long, default_value_t = 128)]
    s: usize,
    /// Width of the values of a gated layer.
    #[arg(long, default_value_t = 1536)]
    e: usize,
    /// Width of a gated layer.
    #[arg(long, default_value_t = 768)]
    d: usize,
    /// Height and width of the images of vision models.
    #[arg(long, default_value_t = 224)]
    res: usize,
    /// Rows of a product.
    #[arg(long, default_value_t = 128)]
    m: usize,
    /// Shared dimension of a product.
    #[arg(long, default_value_t = 128)]
    k: usize,
    /// Agents of agent attention.
    #[arg(long, default_value_t = 49)]
    agents: usize,
    /// Add position biases to the scores of agent attention.
    #[arg(long)]
    bias: bool,
    /// Take agents from the queries, as means over a square map, in every call.
    #[arg(long)]
    pool: bool,
    /// Random features of Performer (`dim ln dim` if not given).
    #[arg(long)]
    features: Option<usize>,
    /// Kernel of Performer: softmax, relu.
    #[arg(long, default_value = "softmax")]
    kernel: String,
    /// Variant of Combiner: fixed, rowmajor, mixture.
    #[arg(long, default_value = "fixed")]
    variant: String,
    /// Inner width of the feed-forward layer of a block.
    #[arg(long)]
    ffn: Option<usize>,
    /// Hide later keys.
    #[arg(long)]
    causal: bool,
    /// Model of generate_decode: 385m, 1b, or a checkpoint.
    #[arg(long, default_value = "385m")]
    config: String,
    /// How generate_decode keeps the weights: f32, bf16, int8.
    #[arg(long, default_value_t)]
    weights: WeightFormat,
    /// The right side of a product was packed beforehand.
    #[arg(long)]
    packed: bool,
    #[arg(long, default_value = "f32")]
    dtype: Dtype,
    #[arg(long, default_value = "f32")]
    precision: Engine,
    #[arg(long, default_value = "bthd")]
    layout: Layout,
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Core to pin to when one thread is used (-1: none).
    #[arg(long, default_value_t = 1, allow_hyphen_values = true)]
    core: i32,
    #[arg(long, default_value_t = 7)]
    reps: usize,
    /// Seconds that one repetition lasts at least.
    #[arg(long, default_value_t = 0.02)]
    min_time: f64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Instruction set (the best if not given).
    #[arg(long)]
    isa: Option<String>,
    /// Compare with the definition in f64; exit code 1 above the tolerance.
    #[arg(long)]
    check: bool,
    #[arg(skip)]
    calibration: timing::Calibration,
}

/// What a measurement hands back besides the times.
#[derive(Default)]
struct Outcome {
    times: Vec<f64>,
    flops: f64,
    tokens: Option<f64>,
    error: Option<(f64, f64)>,
    extra: Map<String, Value>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    timing::pin(args.threads, args.core);
    let precision = match args.precision {
        Engine::F32 => Precision::F32,
        Engine::Bf16x3 => Precision::Bf16x3,
        Engine::Bf16 => Precision::Bf16,
    };
    let mut builder = Runtime::builder().threads(args.threads).precision(precision);
    if let Some(name) = &args.isa {
        builder = builder.isa(Isa::parse(name)?);
    }
    let rt = builder.build()?;
    let outcome = match args.what {
        What::Lightning => attention::lightning(&args, &rt)?,
        What::LightningBackward => backward::lightning(&args, &rt)?,
        What::LinearBackward => backward::linear(&args, &rt)?,
        What::LightningDecode => decode::lightning_decode(&args, &rt)?,
        What::Silence => decode::silence(&args, &rt)?,
        What::LinearNoncausal => attention::linear_noncausal(&args, &rt)?,
        What::Softmax => attention::softmax(&args, &rt)?,
        What::Agent => vision::agent(&args, &rt)?,
        What::Focused => vision::focused(&args, &rt)?,
        What::MixedChunk => flash::mixed_chunk(&args, &rt)?,
        What::Gau => flash::gau(&args, &rt)?,
        What::SoftmaxBackward => pairs::softmax(&args, &rt)?,
        What::AgentBackward => pairs::agent(&args, &rt)?,
        What::MixedChunkBackward => pairs::mixed_chunk(&args, &rt)?,
        What::QuadraticBackward => pairs::quadratic(&args, &rt)?,
        What::FlashLayer => flash::flash_layer(&args, &rt)?,
        What::Performer => baselines::performer(&args, &rt)?,
        What::Combiner => baselines::combiner(&args, &rt)?,
        What::TransformerPp => baselines::transformer_pp(&args, &rt)?,
        #[cfg(feature = "candle")]
        What::TrainStep => train::step(&args, &rt)?,
        What::GenerateDecode => decode::generate_decode(&args, &rt)?,
        What::Gemm => gemm::gemm(&args, &rt),
        what => {
            let name = what.to_possible_value().expect("no hidden values");
            models::model(&args, &rt, name.get_name())?
        }
    };
    let mut times = outcome.times;
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let mut line = json!({
        "what": args.what.to_possible_value().map(|v| v.get_name().to_owned()),
        "batch": args.batch, "n": args.n, "heads": args.heads, "dim": args.dim, "threads": args.threads,
        "dtype": format!("{:?}", args.dtype).to_lowercase(),
        "layout": format!("{:?}", args.layout).to_lowercase(),
        "isa": rt.isa().name(), "engine": rt.engine(), "kernel": rt.kernel(),
        "median_s": median, "min_s": times[0], "reps": times.len(),
        "gflops": outcome.flops / median / 1e9,
        "gflops_best": outcome.flops / times[0] / 1e9,
        "fma_gflops": args.calibration.fma_gflops(),
    });
    let map = line.as_object_mut().expect("an object");
    if let Some(tokens) = outcome.tokens {
        map.insert("ns_per_token".into(), json!(median / tokens * 1e9));
        map.insert("tokens_per_s".into(), json!(tokens / median));
    }
    if let Some((error, tolerance)) = outcome.error {
        map.insert("rel_err".into(), json!(error));
        map.insert("tolerance".into(), json!(tolerance));
    }
    map.extend(outcome.extra);
    println!("{line}");
    if outcome.error.is_some_and(|(error, tolerance)| error.is_nan() || error > tolerance) {
        std::process::exit(1);
    }
    Ok(())
}
