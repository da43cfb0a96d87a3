//! Trains a language model of bytes on a text file, writes checkpoints that `generate` runs, and draws the loss.
//!
//! ```text
//! cargo run --release --features candle --example train -- --steps 300
//! cargo run --release --features candle --example train -- --text FILE --out DIR --resume
//! cargo run --release --example generate -- --model target/train --prompt "The "
//! ```

mod adamw;
mod checkpoint;
mod curve;
mod text;

use adamw::AdamW;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{VarBuilder, VarMap};
use checkpoint::Record;
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use linattn::candle::{FlashLm, TransNormerLlm, Transformer, cross_entropy};
use linattn::models::{Architecture, FlashLmConfig, TransNormerConfig, TransformerConfig};
use linattn::{Runtime, tensor::Rng};
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use text::Text;

/// Every step makes and drops the same tensors. An allocator that keeps their memory saves asking the system for it again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Trains a language model of bytes.
#[derive(Debug, Parser)]
pub struct Args {
    /// Kind of model.
    #[arg(long, value_enum, default_value = "transnormer")]
    arch: Arch,
    /// What to learn [default: the documentation of this project].
    #[arg(long)]
    text: Option<PathBuf>,
    /// Folder for checkpoints, losses and their curve.
    #[arg(long, default_value = "target/train")]
    out: PathBuf,
    /// Goes on where the last checkpoint in that folder stopped.
    #[arg(long)]
    resume: bool,
    /// Writes the initial weights and stops.
    #[arg(long)]
    init_only: bool,
    /// Width of the model.
    #[arg(long, default_value_t = 128)]
    dim: usize,
    /// Number of blocks.
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Number of heads.
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Width of the channel mixers [default: 8/3 of the model's, in steps of 32].
    #[arg(long)]
    ffn: Option<usize>,
    /// Sequences per step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Bytes per sequence.
    #[arg(long, default_value_t = 256)]
    len: usize,
    /// Steps in all.
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// Stops after this many of them; `--resume` goes on.
    #[arg(long)]
    stop: Option<usize>,
    /// Highest learning rate: it rises for `--warmup` steps and falls along a cosine to a tenth.
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// Steps of the rise.
    #[arg(long, default_value_t = 30)]
    warmup: usize,
    /// Of matrices; vectors do not decay.
    #[arg(long, default_value_t = 0.1)]
    weight_decay: f64,
    /// Longest gradient.
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
    /// Of initial weights and of the order of the data.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Steps between checkpoints.
    #[arg(long, default_value_t = 100)]
    save_every: usize,
    /// Number of threads [default: all].
    #[arg(long)]
    threads: Option<usize>,
}

/// A kind of model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Arch {
    /// Lightning Attention with SGLU.
    Transnormer,
    /// RMSNorm, rotary positions, SwiGLU, softmax attention.
    TransformerPp,
    /// Gated layers with mixed chunk attention.
    Flash,
}

fn main() -> ExitCode {
    match start(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

impl Args {
    /// The configuration as `config.json` of the kind of model.
    fn config(&self) -> String {
        let ffn = self.ffn.unwrap_or_else(|| (self.dim * 8 / 3).next_multiple_of(32));
        let json = match self.arch {
            Arch::Transnormer => serde_json::json!({
                "model_type": "transnormer", "vocab_size": 256, "decoder_embed_dim": self.dim,
                "decoder_layers": self.layers, "decoder_attention_heads": self.heads,
                "hidden_dim": self.dim, "glu_dim": ffn, "act_fun": "swish", "glu_act": "none",
                "norm_type": "simplermsnorm", "use_lrpe": true, "bias": false,
                "no_scale_embedding": false, "tie_word_embeddings": true,
            }),
            Arch::TransformerPp => serde_json::json!({
                "model_type": "transformer_pp", "vocab_size": 256, "dim": self.dim,
                "layers": self.layers, "heads": self.heads, "ffn_dim": ffn,
            }),
            Arch::Flash => serde_json::json!({
                "model_type": "flash", "num_tokens": 256, "dim": self.dim, "depth": self.layers,
                "group_size": 64, "query_key_dim": (self.dim / self.heads.max(1)).max(32),
                "causal": true,
            }),
        };
        json.to_string()
    }

    fn rate(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        let left = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let done = (step - self.warmup) as f64 / left;
        self.lr * (0.55 + 0.45 * (std::f64::consts::PI * done.min(1.0)).cos())
    }
}

/// Runs on a thread of the pool: a step is hundreds of short operations, which would be handed over one by one.
fn start(args: &Args) -> Result<()> {
    if let Some(n) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(n).build_global()?;
    }
    Ok(rayon::scope(|_| run(args).map_err(|e| e.to_string()))?)
}

fn run(args: &Args) -> Result<()> {
    let rt = Arc::new(Runtime::new()?);
    let config = args.config();
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let model: Box<dyn Module> = match args.arch {
        Arch::Transnormer => {
            let config = TransNormerConfig::from_json(&config)?;
            let load = || Ok(TransNormerLlm::load(&rt, &config, vb.clone())?);
            Box::new(initialised(&vars, &config, args.seed, load)?)
        }
        Arch::TransformerPp => {
            let config = TransformerConfig::from_json(&config)?;
            let load = || Ok(Transformer::load(&rt, &config, vb.clone())?);
            Box::new(initialised(&vars, &config, args.seed, load)?)
        }
        Arch::Flash => {
            let config = FlashLmConfig::from_json(&config)?;
            let load = || Ok(FlashLm::load(&rt, &config, vb.clone())?);
            Box::new(initialised(&vars, &config, args.seed, load)?)
        }
    };
    std::fs::create_dir_all(&args.out)?;
    train(args, &rt, &*model, &vars, &config)
}

/// A model with initial weights.
fn initialised<M>(
    vars: &VarMap,
    config: &impl Architecture,
    seed: u64,
    load: impl Fn() -> Result<M>,
) -> Result<M> {
    load()?;
    initialise(vars, config, seed)?;
    // Again, because angles are read from the parameters when a layer is made.
    load()
}

/// Initial weights that depend on nothing but the seed and their names.
fn initialise(vars: &VarMap, config: &impl Architecture, seed: u64) -> Result<()> {
    for (name, var) in vars.data().lock().expect("no other user").iter() {
        let mut data = vec![0.0; var.elem_count()];
        if !config.initial(name, &mut data) {
            let bytes =
                name.bytes().fold(seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
            match var.dims() {
                [_, inputs] => Rng::new(bytes).fill_normal(&mut data, (*inputs as f32).powf(-0.5)),
                _ if name.ends_with("weight") => data.fill(1.0),
                _ => {}
            }
        }
        var.set(&Tensor::from_vec(data, var.shape(), &Device::Cpu)?)?;
    }
    Ok(())
}

fn train(
    args: &Args,
    rt: &Arc<Runtime>,
    model: &dyn Module,
    vars: &VarMap,
    config: &str,
) -> Result<()> {
    let text = Text::read(args.text.as_deref())?;
    let mut optimiser = AdamW::new(vars, args.weight_decay)?;
    let mut record = Record::default();
    if args.resume {
        record = checkpoint::resume(&args.out, vars, &mut optimiser, config)?;
    }
    if args.init_only {
        return checkpoint::write_model(&args.out, vars, config, 0);
    }
    let parameters: usize = vars.all_vars().iter().map(|v| v.elem_count()).sum();
    let (train, held) = text.sizes();
    eprintln!("{parameters} parameters, {train} bytes to learn, {held} held out, {rt:?}");

    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} steps, {msg}, {eta} left")?;
    let bar = ProgressBar::new(args.steps as u64).with_style(style);
    bar.set_position(record.losses.len() as u64);
    let (first, last) = (record.losses.len(), args.stop.unwrap_or(args.steps).min(args.steps));
    let start = Instant::now();
    for step in first..last {
        let loss = loss(rt, model, &text.batch(args.seed, step, [args.batch, args.len])?)?;
        let grads = loss.backward()?;
        optimiser.step(&grads, args.rate(step), args.clip)?;
        record.losses.push(loss.to_scalar::<f32>()?);
        let done = step + 1;
        let rate = ((done - first) * args.batch * args.len) as f64 / start.elapsed().as_secs_f64();
        bar.set_message(format!("loss {:.4}, {rate:.0} tokens/s", record.recent()));
        bar.inc(1);
        if done % args.save_every.max(1) == 0 || done == last {
            checkpoint::write(&args.out, vars, &optimiser, &record, config)?;
            curve::draw(&args.out.join("loss.svg"), &record.losses)?;
        }
    }
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    let tokens = (last.saturating_sub(first) * args.batch * args.len) as f64;
    println!("first losses {:.5?}", &record.losses[..record.losses.len().min(3)]);
    println!("training loss {:.4} (mean of the last steps)", record.recent());
    let held = held_out(rt, model, &text, args)?;
    println!("held-out loss {held:.4}, {:.4} bits per byte", held * std::f64::consts::LOG2_E);
    println!("{:.0} tokens/s, checkpoint in {}", tokens / seconds, args.out.display());
    Ok(())
}

/// Mean cross-entropy of every byte given those before it in its sequence; `batch`: `[sequences, len + 1]`.
fn loss(rt: &Arc<Runtime>, model: &dyn Module, batch: &Tensor) -> Result<Tensor> {
    let len = batch.dim(1)? - 1;
    let logits = model.forward(&batch.narrow(1, 0, len)?.contiguous()?)?;
    Ok(cross_entropy(rt, &logits, &batch.narrow(1, 1, len)?)?)
}

/// The loss on text that was kept out of training.
fn held_out(rt: &Arc<Runtime>, model: &dyn Module, text: &Text, args: &Args) -> Result<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for batch in text.held_out([args.batch, args.len])? {
        sum += f64::from(loss(rt, model, &batch)?.to_scalar::<f32>()?);
        count += 1;
    }
    Ok(sum / f64::from(count.max(1)))
}
