//! The loss as a picture.

use super::Result;
use plotters::prelude::*;
use std::path::Path;

/// Draws the loss of every step, and its running mean.
pub fn draw(path: &Path, losses: &[f32]) -> Result<()> {
    let least = losses.iter().copied().fold(f32::INFINITY, f32::min);
    let most = losses.iter().copied().fold(least, f32::max);
    let root = SVGBackend::new(path, (720, 420)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("cross-entropy, nats per byte", ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(0..losses.len().max(1), least * 0.95..most * 1.02)?;
    chart.configure_mesh().light_line_style(TRANSPARENT).x_desc("steps").draw()?;
    let each = losses.iter().copied().enumerate();
    chart.draw_series(LineSeries::new(each, &RGBColor(190, 210, 230)))?;
    let mut mean = losses.first().copied().unwrap_or_default();
    let smooth = losses.iter().enumerate().map(|(i, x)| {
        mean += 0.05 * (x - mean);
        (i, mean)
    });
    let line = ShapeStyle::from(&RGBColor(0, 114, 178)).stroke_width(2);
    chart.draw_series(LineSeries::new(smooth, line))?;
    root.present()?;
    Ok(())
}
