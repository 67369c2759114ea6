//! Curves against steps, as SVG.

use std::path::Path;

use anyhow::{anyhow, Result};
use plotters::prelude::*;

use crate::record::Row;

/// A named curve.
pub struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// Of runs by name, OUT/loss.svg, OUT/perplexity.svg and OUT/hidden_ratio.svg.
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

/// Each point's mean with the 19 before it.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mean = |i: usize| {
        let window = &points[(i + 1).saturating_sub(20)..=i];
        window.iter().map(|point| point.1).sum::<f64>() / window.len() as f64
    };
    (0..points.len()).map(|i| (points[i].0, mean(i))).collect()
}

/// With `log`, values above 0 on a logarithmic axis.
fn draw(path: &Path, title: &str, log: bool, curves: &[Curve]) -> Result<()> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let last = points().map(|point| point.0).fold(1.0, f64::max);
    let low = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let high = points().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
    if !low.is_finite() {
        return Ok(());
    }
    let margin = ((high - low) * 0.05).max(1e-3);
    let drawn = if log {
        let range = (low * 0.9..high * 1.1).log_scale();
        draw_on(path, title, last, range, curves)
    } else {
        let range = (low - margin).max(if low >= 0.0 { 0.0 } else { f64::NEG_INFINITY })..high + margin;
        draw_on(path, title, last, range, curves)
    };
    drawn.map_err(|error| anyhow!("{}: {error}", path.display()))
}

type DrawResult = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw_on<Y>(path: &Path, title: &str, last: f64, range: Y, curves: &[Curve]) -> DrawResult
where
    Y: plotters::coord::ranged1d::AsRangedCoord<Value = f64>,
    Y::CoordDescType: plotters::coord::ranged1d::ValueFormatter<f64>,
{
    let root = SVGBackend::new(path, (900, 540)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
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
    for (index, curve) in curves.iter().enumerate() {
        let hue = index as f64 / curves.len().max(1) as f64;
        // Dark and light in turn, so that neighbours differ in more than hue.
        let color = HSLColor(hue, 0.8, if index % 2 == 0 { 0.35 } else { 0.55 });
        chart
            .draw_series(LineSeries::new(curve.points.iter().copied(), color.stroke_width(2)))?
            .label(&curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(root.present()?)
}
