//! Says what is on images, with DeiT, PVT, Swin or CSwin under softmax, agent or focused linear attention.
//!
//! ```text
//! cargo run --release --example classify                                   # the shipped digits
//! cargo run --release --example classify -- seven.png --attention map.png  # and where the model looked
//! cargo run --release --example classify -- cat.jpg --arch agent_swin_t --model agent_swin_t.safetensors
//! ```
//!
//! Checkpoints are `.safetensors` files with the names of the original code. A file that says in its metadata what it
//! is (`config`, and perhaps `mean`, `std` and `classes`) needs no `--arch`.

mod picture;

use clap::Parser;
use linattn::io::Checkpoint;
use linattn::models::{VisionConfig, VisionTransformer};
use linattn::tensor::{View, ViewMut};
use linattn::{Isa, Runtime};
use picture::Preparation;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Characters of the longest bar.
const BAR: f32 = 30.0;

/// Says what is on images.
#[derive(Debug, Parser)]
struct Args {
    /// Images, PNG or JPEG [default: the shipped digits].
    images: Vec<PathBuf>,
    /// A .safetensors file with the names of the original code [default: the shipped model of digits; random
    /// weights if an architecture is named].
    #[arg(long)]
    model: Option<PathBuf>,
    /// A published architecture, such as agent_deit_t or flatten_swin_s.
    #[arg(long)]
    arch: Option<String>,
    /// Height and width that images are brought to [default: that of the architecture].
    #[arg(long)]
    res: Option<usize>,
    /// Names of the classes, one per line.
    #[arg(long)]
    labels: Option<PathBuf>,
    /// How many classes to show.
    #[arg(long, default_value_t = 5)]
    top: usize,
    /// Writes a picture of where the class token of the last block looked on the first image.
    #[arg(long)]
    attention: Option<PathBuf>,
    /// Seed of random weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Number of threads [default: all].
    #[arg(long)]
    threads: Option<usize>,
    /// Instruction set: portable, neon, avx2, avx512 [default: the best].
    #[arg(long)]
    isa: Option<String>,
}

/// A model, and how images and classes relate to it.
struct Classifier {
    model: VisionTransformer,
    prepare: Preparation,
    classes: Vec<String>,
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
    let classifier = load(args)?;
    let images = match args.images.is_empty() {
        true => (0..10).map(|d| shipped(&format!("digit_{d}.png"))).collect(),
        false => args.images.clone(),
    };
    for path in &images {
        classify(&rt, &classifier, path, args.top)?;
    }
    if let Some(out) = &args.attention {
        look(&rt, &classifier, &images[0], out)?;
    }
    Ok(())
}

fn shipped(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/digits").join(file)
}

fn load(args: &Args) -> Result<Classifier> {
    let named = args.arch.as_deref().map(VisionConfig::named).transpose()?;
    let resize = |config: VisionConfig| match args.res {
        Some(res) => config.with_image(res),
        None => config,
    };
    if let (Some(config), None) = (&named, &args.model) {
        eprintln!("no --model: the weights are random, and so are the answers");
        let model = VisionTransformer::random(resize(config.clone()), args.seed)?;
        let prepare = Preparation::imagenet(model.image());
        let classes = labels(args, model.classes())?;
        return Ok(Classifier { model, prepare, classes });
    }
    let path = args.model.clone().unwrap_or_else(|| shipped("model.safetensors"));
    let start = Instant::now();
    let checkpoint = Checkpoint::open(&path)?;
    let config = match named {
        Some(config) => config,
        None => VisionConfig::from_json(None, checkpoint.config()?)
            .map_err(|e| format!("{}: {e}; name an --arch", path.display()))?,
    };
    let model = VisionTransformer::from_tensors(resize(config), &checkpoint)
        .map_err(|e| format!("{}: {e}", path.display()))?;
    let mib = model.weight_bytes() as f64 / f64::from(1 << 20);
    eprintln!("loaded in {:.2} s: {mib:.1} MiB of weights", start.elapsed().as_secs_f64());
    let prepare = Preparation::of(&checkpoint, model.image())?;
    let classes = match (checkpoint.metadata("classes"), &args.labels) {
        (Some(list), None) => serde_json::from_str(list)?,
        _ => labels(args, model.classes())?,
    };
    if classes.len() != model.classes() {
        return Err(format!("{} names for {} classes", classes.len(), model.classes()).into());
    }
    Ok(Classifier { model, prepare, classes })
}

/// Names from a file, else numbers.
fn labels(args: &Args, n: usize) -> Result<Vec<String>> {
    let Some(path) = &args.labels else {
        return Ok((0..n).map(|c| format!("class {c}")).collect());
    };
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let names: Vec<String> = text.lines().map(str::to_owned).collect();
    match names.len() == n {
        true => Ok(names),
        false => Err(format!("{}: {} names for {n} classes", path.display(), names.len()).into()),
    }
}

fn classify(rt: &Runtime, c: &Classifier, path: &Path, top: usize) -> Result<()> {
    let image = c.prepare.read(path)?;
    let [channels, h, w] = c.model.image();
    let mut logits = vec![0.0; c.model.classes()];
    let out = ViewMut::new(&mut logits, [1, c.model.classes()])?;
    let start = Instant::now();
    c.model.forward(rt, View::new(&image, [1, channels, h, w])?, out)?;
    println!("{} ({:.1} ms)", path.display(), start.elapsed().as_secs_f64() * 1e3);
    let mut order: Vec<(f32, &str)> =
        softmax(&logits).into_iter().zip(c.classes.iter().map(String::as_str)).collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (p, class) in order.iter().take(top) {
        let bar = "█".repeat((p * BAR).round() as usize);
        println!("  {:5.1} %  {class:<12} {bar}", p * 100.0);
    }
    Ok(())
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let e: Vec<f32> = logits.iter().map(|x| (x - most).exp()).collect();
    let sum: f32 = e.iter().sum();
    e.iter().map(|x| x / sum).collect()
}

/// Where the class token looked.
fn look(rt: &Runtime, c: &Classifier, path: &Path, out: &Path) -> Result<()> {
    let image = c.prepare.read(path)?;
    let [channels, h, w] = c.model.image();
    let map = c.model.attention(rt, View::new(&image, [1, channels, h, w])?)?;
    let [rows, cols] = map.shape();
    picture::overlay(path, &c.prepare, map.as_slice(), [rows, cols], out)?;
    eprintln!("attention of the class token, mean over the heads: {}", out.display());
    Ok(())
}
