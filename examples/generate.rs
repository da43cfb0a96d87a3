//! Continues a text with a language model, byte by byte or with a tokenizer, and scores texts.
//!
//! ```text
//! cargo run --release --example generate -- --prompt "The Rust compiler " --tokens 200
//! cargo run --release --example generate -- --score examples/models/rustdoc/heldout.txt
//! cargo run --release --example generate -- --model DIR --tokenizer DIR/tokenizer.json --prompt - < text
//! cargo run --release --example generate -- --arch flash --model DIR --prompt "The "
//! ```

#[path = "support/arch.rs"]
mod arch;

use arch::{Arch, Visit};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use linattn::attention::StreamState;
use linattn::layers::WeightFormat;
use linattn::models::{
    Architecture, Decoder, DecoderState, Generate, Sampler, SamplerConfig, TransNormerConfig,
    TransNormerLlm,
};
use linattn::{Isa, Runtime};
use std::error::Error;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Tokens between two looks at the progress bar.
const STRIDE: usize = 512;

/// Width and blocks of a model without a checkpoint.
const RANDOM: [usize; 2] = [256, 4];
/// The text that they are made for, where that matters.
const LONGEST: usize = 4096;

/// Continues a text with a language model, or scores one.
#[derive(Debug, Parser)]
struct Args {
    /// Kind of model. All but the first have random weights unless `--model` names a checkpoint; with one, the kinds of
    /// transformer are told apart by its config.json.
    #[arg(long, value_enum, default_value = "transnormer")]
    arch: Arch,
    /// Directory or .safetensors file of the model [default: the one that is shipped]; `random-385m` and
    /// `random-1b` are random weights of that size.
    #[arg(long)]
    model: Option<PathBuf>,
    /// How the weights are kept in memory: f32, bf16, int8. Fewer bytes decode faster.
    #[arg(long, default_value_t)]
    weights: WeightFormat,
    /// What to continue; `-` reads standard input.
    #[arg(long)]
    prompt: Option<String>,
    /// How many tokens to generate.
    #[arg(long, default_value_t = 200)]
    tokens: usize,
    /// 0 takes the likeliest token every time.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Only this many of the likeliest tokens are candidates (0: all).
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Only the likeliest tokens that together have this probability are candidates.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of threads [default: all].
    #[arg(long)]
    threads: Option<usize>,
    /// Instruction set: portable, neon, avx2, avx512 [default: the best].
    #[arg(long)]
    isa: Option<String>,
    /// Prompt and output are token ids, separated by white space.
    #[arg(long)]
    ids: bool,
    /// A tokenizer.json for prompt and output (needs the feature `tokenizers`); without one, tokens are bytes.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Prints the bits per byte of a file under a byte-level model instead of generating.
    #[arg(long)]
    score: Option<PathBuf>,
    /// Writes the state behind the last token.
    #[arg(long)]
    save_state: Option<PathBuf>,
    /// Continues from a saved state instead of an empty one.
    #[arg(long)]
    load_state: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let mut builder = Runtime::builder();
    if let Some(n) = args.threads {
        builder = builder.threads(n);
    }
    if let Some(name) = &args.isa {
        builder = builder.isa(Isa::parse(name)?);
    }
    let rt = builder.build()?;
    let start = Instant::now();
    if args.arch == Arch::Transnormer {
        let model = load(args.model.as_deref(), args.weights)?;
        return run_model(args, &rt, &model, start);
    }
    let [dim, depth] = RANDOM;
    args.arch.visit(dim, depth, LONGEST, Other { args, rt: &rt, start })
}

/// A model of another kind than the shipped one.
struct Other<'a> {
    args: &'a Args,
    rt: &'a Runtime,
    start: Instant,
}

impl Visit for Other<'_> {
    type Output = Result<()>;
    fn visit<C: Architecture>(self, config: C) -> Result<()> {
        let Self { args, rt, start } = self;
        let model = match &args.model {
            Some(path) => Decoder::<C>::load_with(path, args.weights)?,
            None => {
                eprintln!("no --model: weights are random, and what they write means nothing");
                Decoder::random_with(config, 0, args.weights)?
            }
        };
        run_model(args, rt, &model, start)
    }
}

/// Generates or scores, whatever kind of model it is.
fn run_model<C: Architecture>(
    args: &Args,
    rt: &Runtime,
    model: &Decoder<C>,
    start: Instant,
) -> Result<()> {
    let mib = model.weight_bytes() as f64 / f64::from(1 << 20);
    let (format, seconds) = (model.weight_format(), start.elapsed().as_secs_f64());
    eprintln!("loaded in {seconds:.2} s: {mib:.0} MiB of {format} weights");
    match &args.score {
        Some(file) => score(rt, model, file),
        None => generate(args, rt, model),
    }
}

fn load(path: Option<&Path>, format: WeightFormat) -> Result<TransNormerLlm> {
    let shipped = || Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/rustdoc");
    let random = |config| Ok(TransNormerLlm::random_with(config, 0, format)?);
    match path.and_then(Path::to_str) {
        Some("random-385m") => random(TransNormerConfig::m385()),
        Some("random-1b") => random(TransNormerConfig::b1()),
        _ => {
            let path = path.map_or_else(shipped, Path::to_path_buf);
            Ok(TransNormerLlm::load_with(path, format)?)
        }
    }
}

fn generate<C: Architecture>(args: &Args, rt: &Runtime, model: &Decoder<C>) -> Result<()> {
    let codec = Codec::new(args, model.vocab_size())?;
    let prompt = codec.encode(&text(args)?)?;
    let sampler = Sampler::new(SamplerConfig {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
    })?;
    let mut state = model.new_state(1)?;
    if let Some(path) = &args.load_state {
        let file = File::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
        state.restore(BufReader::new(file))?;
    }
    let (Some((last, before)), vocab) = (prompt.split_last(), model.vocab_size()) else {
        return Err("nothing to continue: give a --prompt".into());
    };

    let start = Instant::now();
    let bar = progress(before.len());
    let mut unused = vec![0.0; vocab];
    for part in before.chunks(STRIDE) {
        model.prefill(rt, part, &mut state, &mut unused)?;
        bar.inc(part.len() as u64);
    }
    bar.finish_and_clear();
    let mut tokens = Generate::new(model, rt, &mut state, sampler, &[*last])?;
    let prefill = prompt.len() as f64 / start.elapsed().as_secs_f64();

    let start = Instant::now();
    let mut out = codec.output();
    for token in tokens.by_ref().take(args.tokens) {
        out.put(token?)?;
    }
    tokens.finish()?;
    let decode = args.tokens as f64 / start.elapsed().as_secs_f64();
    out.finish()?;

    if let Some(path) = &args.save_state {
        save(&state, path)?;
    }
    let kib = state.bytes() as f64 / 1024.0;
    eprintln!(
        "prefill {prefill:.0} tokens/s, decode {decode:.1} tokens/s, state {kib:.0} KiB after {} tokens, {} x {} threads",
        state.len(),
        rt.kernel(),
        rt.threads()
    );
    Ok(())
}

fn save(state: &DecoderState<impl StreamState>, path: &Path) -> Result<()> {
    let file = File::create(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut file = BufWriter::new(file);
    state.save(&mut file)?;
    file.flush()?;
    Ok(())
}

/// Bits per byte of a text that the model reads as one stream from an empty state. The first byte is context
/// only; the mean over the others of `-log2 p(byte | all before it)`, summed in `f64`.
fn score<C: Architecture>(rt: &Runtime, model: &Decoder<C>, path: &Path) -> Result<()> {
    let vocab = model.vocab_size();
    if vocab != 256 {
        return Err(format!("scores are for models of 256 bytes, not {vocab} tokens").into());
    }
    let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    if bytes.len() < 2 {
        return Err("nothing to score: the first byte is context only".into());
    }
    let tokens: Vec<u32> = bytes.iter().map(|b| u32::from(*b)).collect();
    let (inputs, targets) = (&tokens[..tokens.len() - 1], &tokens[1..]);
    let mut state = model.new_state(1)?;
    let mut logits = vec![0.0; STRIDE * vocab];
    let (mut bits, start) = (0.0, Instant::now());
    let bar = progress(inputs.len());
    for (inputs, targets) in inputs.chunks(STRIDE).zip(targets.chunks(STRIDE)) {
        let logits = &mut logits[..inputs.len() * vocab];
        model.forward(rt, inputs, &mut state, logits)?;
        for (row, target) in logits.chunks_exact(vocab).zip(targets) {
            bits -= log_probability(row, *target as usize) * std::f64::consts::LOG2_E;
        }
        bar.inc(inputs.len() as u64);
    }
    bar.finish_and_clear();
    let rate = inputs.len() as f64 / start.elapsed().as_secs_f64();
    println!("{:.6} bits per byte", bits / inputs.len() as f64);
    let (kernel, threads) = (rt.kernel(), rt.threads());
    eprintln!("{rate:.0} tokens/s, {kernel} x {threads} threads");
    Ok(())
}

/// Natural logarithm of a softmax probability.
fn log_probability(logits: &[f32], at: usize) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - top).exp()).sum();
    f64::from(logits[at]) - top - sum.ln()
}

fn progress(len: usize) -> ProgressBar {
    // A prompt of a few segments is read before anyone looks.
    if len < 8 * STRIDE {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("reading {bar:40} {pos}/{len} tokens, {per_sec}, {eta}");
    ProgressBar::new(len as u64).with_style(style.expect("a valid template"))
}

fn text(args: &Args) -> Result<Vec<u8>> {
    match args.prompt.as_deref() {
        Some("-") => {
            let mut text = Vec::new();
            std::io::stdin().read_to_end(&mut text)?;
            Ok(text)
        }
        Some(text) => Ok(text.as_bytes().to_vec()),
        None => Ok(Vec::new()),
    }
}

/// How text becomes tokens and back.
enum Codec {
    Bytes,
    Ids,
    #[cfg(feature = "tokenizers")]
    Tokenizer(Box<tokenizers::Tokenizer>),
}

impl Codec {
    fn new(args: &Args, vocab: usize) -> Result<Self> {
        if args.ids {
            return Ok(Self::Ids);
        }
        match &args.tokenizer {
            #[cfg(feature = "tokenizers")]
            Some(file) => {
                let tokenizer = tokenizers::Tokenizer::from_file(file);
                Ok(Self::Tokenizer(Box::new(
                    tokenizer.map_err(|e| format!("{}: {e}", file.display()))?,
                )))
            }
            #[cfg(not(feature = "tokenizers"))]
            Some(_) => Err("--tokenizer needs `--features tokenizers`".into()),
            None if vocab == 256 => Ok(Self::Bytes),
            None => Err("this model has no bytes for tokens: give --tokenizer or --ids".into()),
        }
    }

    fn encode(&self, text: &[u8]) -> Result<Vec<u32>> {
        match self {
            Self::Bytes => Ok(text.iter().map(|b| u32::from(*b)).collect()),
            Self::Ids => {
                let words = std::str::from_utf8(text)?.split_whitespace();
                let id = |w: &str| w.parse().map_err(|_| format!("not a token id: {w:?}").into());
                words.map(id).collect()
            }
            #[cfg(feature = "tokenizers")]
            Self::Tokenizer(t) => {
                let text = std::str::from_utf8(text)?;
                let encoding = t.encode(text, true).map_err(|e| e.to_string())?;
                Ok(encoding.get_ids().to_vec())
            }
        }
    }

    fn output(&self) -> Output<'_> {
        Output {
            codec: self,
            out: std::io::stdout().lock(),
            #[cfg(feature = "tokenizers")]
            seen: Seen::default(),
        }
    }
}

/// Tokens whose text is not yet certain.
#[cfg(feature = "tokenizers")]
#[derive(Default)]
struct Seen {
    tokens: Vec<u32>,
    /// Characters of `tokens` that were printed.
    printed: usize,
}

/// Prints tokens as they come.
struct Output<'a> {
    codec: &'a Codec,
    out: std::io::StdoutLock<'static>,
    #[cfg(feature = "tokenizers")]
    seen: Seen,
}

impl Output<'_> {
    fn put(&mut self, token: u32) -> Result<()> {
        match self.codec {
            // Bytes pass as they are: characters of several bytes come out whole, and nothing is replaced.
            Codec::Bytes => self.out.write_all(&[u8::try_from(token)?])?,
            Codec::Ids => write!(self.out, "{token} ")?,
            #[cfg(feature = "tokenizers")]
            Codec::Tokenizer(t) => {
                // A token may complete a character or join the next one, so all tokens of the line are decoded
                // again and only what is new is printed, up to an incomplete character.
                self.seen.tokens.push(token);
                let text = t.decode(&self.seen.tokens, true).map_err(|e| e.to_string())?;
                let whole = text.trim_end_matches('\u{fffd}').len();
                if let Some(new) = text.get(self.seen.printed..whole) {
                    self.out.write_all(new.as_bytes())?;
                    self.seen.printed = whole.max(self.seen.printed);
                }
                if text.ends_with('\n') {
                    self.seen = Seen::default();
                }
            }
        }
        self.out.flush()?;
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        // The line ends on the terminal's side, so that standard output holds the tokens and nothing else.
        self.out.flush()?;
        eprintln!();
        Ok(())
    }
}
