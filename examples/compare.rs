//! What a token costs under each mechanism as the text grows: time to read it, time to write one more, bytes of state.
//!
//! ```text
//! cargo run --release --example compare -- --csv compare.csv --plot compare.svg
//! ```
//!
//! All models have random weights and the same width; two FLASH layers stand for a block of the others, as they have
//! about as many parameters. What they would write means nothing, what it costs does.

#[path = "support/arch.rs"]
mod arch;

use arch::{Arch, Visit};
use clap::{Parser, ValueEnum};
use linattn::models::{Architecture, Decoder};
use linattn::{Isa, Runtime};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Tokens that are written one by one behind a text.
const STEPS: usize = 32;

/// Compares language models of one width on texts of growing length.
#[derive(Debug, Parser)]
struct Args {
    /// Shortest text; lengths double from there.
    #[arg(long, default_value_t = 512)]
    min_n: usize,
    /// Longest text.
    #[arg(long, default_value_t = 8192)]
    max_n: usize,
    /// Width of the models.
    #[arg(long, default_value_t = 256)]
    dim: usize,
    /// Blocks of the models.
    #[arg(long, default_value_t = 2)]
    depth: usize,
    /// Only these kinds.
    #[arg(long, value_enum, num_args = 1.., value_delimiter = ',')]
    arch: Vec<Arch>,
    /// What is read, over and over [default: a text that is shipped].
    #[arg(long)]
    text: Option<PathBuf>,
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Instruction set: portable, neon, avx2, avx512 [default: the best].
    #[arg(long)]
    isa: Option<String>,
    /// Writes the table as comma-separated values.
    #[arg(long)]
    csv: Option<PathBuf>,
    /// Draws the table as SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
}

/// One length under one mechanism.
#[derive(Clone, Copy, Debug)]
struct Point {
    n: usize,
    /// Microseconds per token that is read, and per token that is written.
    prefill: f64,
    decode: f64,
    /// Bytes of state behind the text.
    state: usize,
}

struct Curve {
    name: String,
    points: Vec<Point>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.min_n == 0 || args.dim < 2 || args.depth == 0 {
        return Err("lengths and sizes begin at 1, the width at 2".into());
    }
    let mut builder = Runtime::builder().threads(args.threads);
    if let Some(name) = &args.isa {
        builder = builder.isa(Isa::parse(name)?);
    }
    let rt = builder.build()?;
    let shipped =
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/rustdoc/heldout.txt");
    let path = args.text.clone().unwrap_or_else(shipped);
    let text = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    if text.is_empty() {
        return Err(format!("{}: nothing to read", path.display()).into());
    }
    let lengths: Vec<usize> =
        std::iter::successors(Some(args.min_n), |n| n.checked_mul(2).filter(|n| *n <= args.max_n))
            .collect();
    let tokens: Vec<u32> =
        text.iter().cycle().take(lengths[lengths.len() - 1]).map(|b| u32::from(*b)).collect();

    println!(
        "{} x {} threads, width {}, {} blocks",
        rt.kernel(),
        rt.threads(),
        args.dim,
        args.depth
    );
    println!(
        "{:<16}{:>8}{:>16}{:>16}{:>14}",
        "", "N", "read, us/token", "write, us/token", "state, KiB"
    );
    let all = if args.arch.is_empty() { Arch::value_variants() } else { &args.arch };
    let mut curves = Vec::new();
    for arch in all {
        let name = arch.to_possible_value().expect("no hidden values").get_name().to_owned();
        let time = |n: &usize| {
            let what = Time { rt: &rt, tokens: &tokens[..*n], name: &name };
            arch.visit(args.dim, args.depth, n + STEPS, what)
        };
        let points = lengths.iter().map(time).collect::<Result<_>>()?;
        curves.push(Curve { name, points });
    }
    if let Some(path) = &args.csv {
        std::fs::write(path, csv(&curves)).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    if let Some(path) = &args.plot {
        plot(path, &curves)?;
    }
    Ok(())
}

struct Time<'a> {
    rt: &'a Runtime,
    tokens: &'a [u32],
    name: &'a str,
}

impl Visit for Time<'_> {
    type Output = Result<Point>;
    fn visit<C: Architecture>(self, config: C) -> Self::Output {
        let Self { rt, tokens, name } = self;
        let model = Decoder::random(config, 1)?;
        let (mut logits, mut state) = (vec![0.0; model.vocab_size()], model.new_state(1)?);
        // Once for memory and once for the clock.
        model.prefill(rt, &tokens[..tokens.len().min(64)], &mut state, &mut logits)?;
        state.reset();
        let start = Instant::now();
        model.prefill(rt, tokens, &mut state, &mut logits)?;
        let n = tokens.len();
        let prefill = start.elapsed().as_secs_f64() * 1e6 / n as f64;
        let start = Instant::now();
        for token in tokens.iter().cycle().take(STEPS) {
            model.decode_step(rt, &[*token], &mut state, &mut logits)?;
        }
        let decode = start.elapsed().as_secs_f64() * 1e6 / STEPS as f64;
        let state = state.bytes();
        let kib = state as f64 / 1024.0;
        println!("{name:<16}{n:>8}{prefill:>16.1}{decode:>16.1}{kib:>14.0}");
        Ok(Point { n, prefill, decode, state })
    }
}

fn csv(curves: &[Curve]) -> String {
    let mut out = String::from("arch,n,prefill_us_per_token,decode_us_per_token,state_bytes\n");
    for curve in curves {
        for p in &curve.points {
            let Point { n, prefill, decode, state } = p;
            // Writing to a string cannot fail.
            let _ = writeln!(out, "{},{n},{prefill:.3},{decode:.3},{state}", curve.name);
        }
    }
    out
}

fn plot(path: &Path, curves: &[Curve]) -> Result<()> {
    let root = SVGBackend::new(path, (1260, 420)).into_drawing_area();
    root.fill(&WHITE)?;
    let panels = root.split_evenly((1, 3));
    panel(&panels[0], "reading, us per token", curves, |p| p.prefill)?;
    panel(&panels[1], "writing, us per token", curves, |p| p.decode)?;
    panel(&panels[2], "state, KiB", curves, |p| p.state as f64 / 1024.0)?;
    root.present()?;
    Ok(())
}

const COLOURS: [RGBColor; 7] = [
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(60, 60, 60),
    RGBColor(150, 150, 150),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
];

/// Both axes are logarithmic.
fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    curves: &[Curve],
    of: impl Fn(&Point) -> f64,
) -> Result<()> {
    let points = || curves.iter().flat_map(|c| &c.points);
    let least = points().map(&of).fold(f64::INFINITY, f64::min).max(f64::MIN_POSITIVE);
    let most = points().map(&of).fold(least, f64::max);
    // The legend stands above the curves.
    let room = most * 1.3 * (most / least).max(2.0);
    let (from, to) = (points().map(|p| p.n).min(), points().map(|p| p.n).max());
    let x = from.unwrap_or(1) as f64..to.unwrap_or(1) as f64 * 1.01;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(x.log_scale(), (least / 1.3..room).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("tokens read")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()?;
    for (curve, colour) in curves.iter().zip(COLOURS.into_iter().cycle()) {
        let line: Vec<(f64, f64)> = curve.points.iter().map(|p| (p.n as f64, of(p))).collect();
        chart
            .draw_series(LineSeries::new(line.clone(), colour.stroke_width(2)))?
            .label(curve.name.as_str())
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
