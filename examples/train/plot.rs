//! Curves against steps, as SVG.

use std::path::Path;

use anyhow::{anyhow, Result};
use plotters::prelude::*;

use crate::checkpoint::write_file;
use crate::record::Row;

/// A named curve.
pub struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// Draws OUT/loss.svg, OUT/perplexity.svg and OUT/hidden_ratio.svg for named runs.
pub fn plot_runs(out: &Path, runs: &[(String, Vec<Row>)]) -> Result<()> {
    type Value = fn(&Row) -> Option<f64>;
    let plots: [(&str, &str, bool, Value); 3] = [
        (
            "loss",
            "training cross entropy (nats, mean of 20 steps)",
            false,
            |row| row.losses.map(|x| x.cross_entropy),
        ),
        ("perplexity", "held-out perplexity", true, |row| {
            row.held_out.map(|x| x.perplexity)
        }),
        ("hidden_ratio", "held-out hidden ratio", false, |row| {
            row.held_out.map(|x| x.hidden_ratio)
        }),
    ];
    for (file, title, log, value) in plots {
        let curve = |(name, rows): &(String, Vec<Row>)| {
            let points = rows.iter().filter_map(|row| Some((row.step as f64, value(row)?)));
            let points: Vec<_> = points.filter(|point| point.1.is_finite()).collect();
            Curve {
                name: name.clone(),
                points: if file == "loss" { smooth(&points) } else { points },
            }
        };
        let curves: Vec<Curve> = runs.iter().map(curve).collect();
        draw(&out.join(format!("{file}.svg")), title, log, &curves)?;
    }
    Ok(())
}

/// The mean of each point and the 19 before it.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mean = |i: usize| {
        let window = &points[(i + 1).saturating_sub(20)..=i];
        window.iter().map(|point| point.1).sum::<f64>() / window.len() as f64
    };
    (0..points.len()).map(|i| (points[i].0, mean(i))).collect()
}

/// With `log`, values above 0 on a logarithmic axis. The axis fits the values after the first eighth of the steps:
/// earlier values fall so far that they would flatten the rest.
pub fn draw(path: &Path, title: &str, log: bool, curves: &[Curve]) -> Result<()> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let last = points().map(|point| point.0).fold(1.0, f64::max);
    let shown = || points().filter(|point| point.0 >= last / 8.0).map(|point| point.1);
    let (low, high) = (
        shown().fold(f64::INFINITY, f64::min),
        shown().fold(f64::NEG_INFINITY, f64::max),
    );
    if !low.is_finite() {
        return Ok(());
    }
    let margin = ((high - low) * 0.05).max(1e-3);
    let mut svg = String::new();
    let drawn = if log {
        let range = (low * 0.97..high * 1.03).log_scale();
        draw_on(&mut svg, title, last, range, curves)
    } else {
        let range = (low - margin).max(if low >= 0.0 { 0.0 } else { f64::NEG_INFINITY })..high + margin;
        draw_on(&mut svg, title, last, range, curves)
    };
    drawn.map_err(|error| anyhow!("{}: {error}", path.display()))?;
    write_file(path, &svg)
}

type DrawResult = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw_on<Y>(svg: &mut String, title: &str, last: f64, range: Y, curves: &[Curve]) -> DrawResult
where
    Y: plotters::coord::ranged1d::AsRangedCoord<Value = f64>,
    Y::CoordDescType: plotters::coord::ranged1d::ValueFormatter<f64>,
{
    let legend = if curves.len() > 1 { 260 } else { 0 };
    let root = SVGBackend::with_string(svg, (900 + legend, 540)).into_drawing_area();
    root.fill(&WHITE)?;
    let (plot, names) = root.split_horizontally(900);
    let mut chart = ChartBuilder::on(&plot)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..last, range)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .light_line_style(WHITE)
        .draw()?;
    let end = |index: usize| curves[index].points.last().map_or(f64::NEG_INFINITY, |point| point.1);
    let mut order: Vec<usize> = (0..curves.len()).collect();
    order.sort_by(|&a, &b| end(b).total_cmp(&end(a)));
    for (place, index) in order.into_iter().enumerate() {
        let (curve, color) = (&curves[index], color(index, curves.len()));
        let points = curve.points.iter().copied().filter(|point| point.0 >= last / 8.0);
        chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?;
        if legend > 0 {
            let y = 48 + 22 * place as i32;
            names.draw(&PathElement::new([(4, y), (26, y)], color.stroke_width(3)))?;
            names.draw(&Text::new(curve.name.clone(), (32, y - 7), ("sans-serif", 14)))?;
        }
    }
    Ok(root.present()?)
}

/// Dark and light in turn, so that neighbours differ in more than hue.
fn color(index: usize, count: usize) -> HSLColor {
    let hue = index as f64 / count.max(1) as f64;
    HSLColor(hue, 0.8, if index.is_multiple_of(2) { 0.35 } else { 0.6 })
}

/// OUT/tradeoff.svg: each run's held-out perplexity against its hidden ratio, from (name, hidden ratio, perplexity).
pub fn plot_tradeoff(out: &Path, runs: &[(String, f64, f64)]) -> Result<()> {
    let path = out.join("tradeoff.svg");
    let runs: Vec<_> = runs.iter().filter(|run| run.2.is_finite()).collect();
    if runs.is_empty() {
        return Ok(());
    }
    let mut svg = String::new();
    draw_tradeoff(&mut svg, &runs).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    write_file(&path, &svg)
}

fn draw_tradeoff(svg: &mut String, runs: &[&(String, f64, f64)]) -> DrawResult {
    let root = SVGBackend::with_string(svg, (1160, 540)).into_drawing_area();
    root.fill(&WHITE)?;
    let (plot, names) = root.split_horizontally(900);
    let low = runs.iter().map(|run| run.2).fold(f64::INFINITY, f64::min);
    let high = runs.iter().map(|run| run.2).fold(0.0, f64::max);
    let margin = ((high - low) * 0.08).max(1e-3);
    let widest = runs.iter().map(|run| run.1).fold(0.1, f64::max);
    let mut chart = ChartBuilder::on(&plot)
        .caption("perplexity against what is hidden, held-out text", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(-0.02..widest + 0.04, low - margin..high + margin)?;
    chart
        .configure_mesh()
        .x_desc("hidden ratio")
        .y_desc("perplexity")
        .light_line_style(WHITE)
        .draw()?;
    for (index, (name, hidden, perplexity)) in runs.iter().enumerate() {
        let color = color(index, runs.len());
        chart.draw_series([Circle::new((*hidden, *perplexity), 7, color.filled())])?;
        let y = 48 + 22 * index as i32;
        names.draw(&Circle::new((14, y), 6, color.filled()))?;
        names.draw(&Text::new(name.clone(), (32, y - 7), ("sans-serif", 14)))?;
    }
    Ok(root.present()?)
}
