//! What resolution costs: one block of softmax, agent and focused linear attention on images of growing size.
//!
//! ```text
//! cargo run --release --example resolution -- --plot resolution.svg
//! ```
//!
//! The block is that of DeiT-S (patches of 16 x 16, width 384, 6 heads, 49 agents), attention and channel mixer, on
//! the patches of a synthetic image. Memory is what the call holds at its peak besides weights and tokens.

use clap::Parser;
use linattn::layers::Parameters;
use linattn::layers::vision::{
    Mechanism, Scope, VisionAttentionConfig, VisionBlock, VisionBlockConfig,
};
use linattn::models::vision::RandomWeights;
use linattn::tensor::{Rng, Tensor};
use linattn::{Isa, Runtime};
use peak_alloc::PeakAlloc;
use plotters::prelude::*;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Height and width of a patch.
const PATCH: usize = 16;

/// What resolution costs under softmax, agent and focused linear attention.
#[derive(Debug, Parser)]
struct Args {
    /// Heights and widths of the image, multiples of 16.
    #[arg(long, value_delimiter = ',', default_value = "224,320,448,576,768,1024")]
    res: Vec<usize>,
    /// Width of tokens.
    #[arg(long, default_value_t = 384)]
    dim: usize,
    #[arg(long, default_value_t = 6)]
    heads: usize,
    #[arg(long, default_value_t = 49)]
    agents: usize,
    /// Calls per measurement; the fastest counts.
    #[arg(long, default_value_t = 5)]
    reps: usize,
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Instruction set: portable, neon, avx2, avx512 [default: the best].
    #[arg(long)]
    isa: Option<String>,
    /// Writes the plot, an SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
}

/// Milliseconds and MiB of one mechanism, one pair per resolution.
struct Curve {
    name: &'static str,
    points: Vec<(f64, f64)>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut builder = Runtime::builder().threads(args.threads);
    if let Some(name) = &args.isa {
        builder = builder.isa(Isa::parse(name)?);
    }
    if let Some(res) = args.res.iter().find(|r| **r == 0 || **r % PATCH != 0) {
        return Err(format!("--res {res}: not a multiple of {PATCH}").into());
    }
    let agent = Mechanism::Agent { agents: args.agents };
    let focused = Mechanism::focused();
    let mechanisms = [("softmax", Mechanism::Softmax), ("agent", agent), ("focused", focused)];
    println!("{:>5} {:>7} {:>30} {:>30}", "", "", "ms per block", "MiB at the peak");
    print!("{:>5} {:>7}", "px", "tokens");
    mechanisms.iter().chain(&mechanisms).for_each(|(name, _)| print!(" {name:>9}"));
    println!();
    let mut curves = mechanisms.map(|(name, _)| Curve { name, points: Vec::new() });
    for res in &args.res {
        for (curve, (_, mechanism)) in curves.iter_mut().zip(mechanisms) {
            // A runtime of its own, so that working memory is counted from nothing.
            let rt = builder.clone().build()?;
            curve.points.push(measure(&rt, &args, *res, mechanism)?);
        }
        let side = res / PATCH;
        print!("{res:>5} {:>7}", side * side);
        let last = curves.iter().filter_map(|c| c.points.last());
        last.clone().for_each(|p| print!(" {:>9.2}", p.0));
        last.for_each(|p| print!(" {:>9.2}", p.1));
        println!();
    }
    if let Some(path) = &args.plot {
        plot(path, &args, &curves)?;
        eprintln!("{}", path.display());
    }
    Ok(())
}

fn measure(rt: &Runtime, args: &Args, res: usize, mechanism: Mechanism) -> Result<(f64, f64)> {
    let map = [res / PATCH; 2];
    let attention = VisionAttentionConfig {
        dim: args.dim,
        heads: args.heads,
        map,
        scope: Scope::Whole { class_token: false },
        mechanism,
        qkv_bias: true,
    };
    let config =
        VisionBlockConfig { attention, mlp_hidden: 4 * args.dim, norm_eps: 1e-6, mlp_conv: false };
    let block = VisionBlock::load(config, &Parameters::new(&RandomWeights { seed: 1 }))?;
    let mut x = Tensor::zeros([1, map[0] * map[1], args.dim])?;
    Rng::new(2).fill_normal(x.as_mut_slice(), 1.0);
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let mut best = f64::INFINITY;
    for _ in 0..=args.reps.max(1) {
        let mut stream = x.clone();
        let start = Instant::now();
        block.forward(rt, stream.view_mut())?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    let tokens = size_of_val(x.as_slice());
    let peak = MEMORY.peak_usage().saturating_sub(before + tokens);
    Ok((best * 1e3, peak as f64 / f64::from(1 << 20)))
}

fn plot(path: &Path, args: &Args, curves: &[Curve]) -> Result<()> {
    let root = SVGBackend::new(path, (960, 420)).into_drawing_area();
    root.fill(&WHITE)?;
    let (left, right) = root.split_horizontally(480);
    let time = |p: &(f64, f64)| p.0;
    let memory = |p: &(f64, f64)| p.1;
    panel(&left, "ms per block", args, curves, time)?;
    panel(&right, "MiB at the peak", args, curves, memory)?;
    root.present()?;
    Ok(())
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    args: &Args,
    curves: &[Curve],
    of: impl Fn(&(f64, f64)) -> f64,
) -> Result<()> {
    let values = curves.iter().flat_map(|c| c.points.iter().map(&of));
    let most = values.fold(f64::MIN_POSITIVE, f64::max) * 1.05;
    let (from, to) = (args.res.iter().min(), args.res.iter().max());
    let x = *from.unwrap_or(&0) as f64..*to.unwrap_or(&1) as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(x, 0.0..most)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("height and width of the image, px")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .draw()?;
    let colours = [RGBColor(90, 90, 90), RGBColor(213, 94, 0), RGBColor(0, 114, 178)];
    for (curve, colour) in curves.iter().zip(colours) {
        let line: Vec<(f64, f64)> =
            args.res.iter().map(|r| *r as f64).zip(curve.points.iter().map(&of)).collect();
        chart
            .draw_series(LineSeries::new(line.clone(), colour.stroke_width(2)))?
            .label(curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart.draw_series(line.into_iter().map(|p| Circle::new(p, 3, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    Ok(())
}
