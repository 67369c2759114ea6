//! Lines on axes, as SVG.

use candle_core::{Error, Result};
use plotters::prelude::*;
use std::path::Path;

/// A named line.
pub struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

type DrawResult = std::result::Result<(), Box<dyn std::error::Error>>;

/// With `log` both axes are logarithmic. Without points it draws nothing.
pub fn plot(path: &Path, title: &str, x: &str, y: &str, log: bool, lines: &[Line]) -> Result<()> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let span = |value: fn(&(f64, f64)) -> f64| {
        let low = points().map(value).fold(f64::INFINITY, f64::min);
        low..points().map(value).fold(f64::NEG_INFINITY, f64::max)
    };
    let (xs, ys) = (span(|point| point.0), span(|point| point.1));
    if !xs.start.is_finite() {
        return Ok(());
    }
    let drawn = if log {
        let (xs, ys) = (xs.start * 0.9..xs.end * 1.1, ys.start * 0.7..ys.end * 1.4);
        let axes = (xs.log_scale(), ys.log_scale());
        draw(path, [title, x, y], axes, SeriesLabelPosition::UpperLeft, lines)
    } else {
        let (xs, ys) = (xs.start.min(0.0)..xs.end * 1.05, 0.0..ys.end * 1.1);
        draw(path, [title, x, y], (xs, ys), SeriesLabelPosition::LowerLeft, lines)
    };
    drawn.map_err(|error| Error::Msg(format!("{}: {error}", path.display())))?;
    println!("{}", path.display());
    Ok(())
}

fn draw<X, Y>(
    path: &Path,
    [title, x, y]: [&str; 3],
    (xs, ys): (X, Y),
    legend: SeriesLabelPosition,
    lines: &[Line],
) -> DrawResult
where
    X: plotters::coord::ranged1d::AsRangedCoord<Value = f64>,
    Y: plotters::coord::ranged1d::AsRangedCoord<Value = f64>,
    X::CoordDescType: plotters::coord::ranged1d::ValueFormatter<f64>,
    Y::CoordDescType: plotters::coord::ranged1d::ValueFormatter<f64>,
{
    let root = SVGBackend::new(path, (900, 520)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 20))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(xs, ys)?;
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc(y)
        .light_line_style(WHITE)
        .draw()?;
    for (index, line) in lines.iter().enumerate() {
        let lightness = if index.is_multiple_of(2) { 0.35 } else { 0.55 };
        let color = HSLColor(index as f64 / lines.len() as f64, 0.8, lightness);
        let points = || line.points.iter().copied();
        chart
            .draw_series(LineSeries::new(points(), color.stroke_width(2)))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(3)));
        chart.draw_series(points().map(|point| Circle::new(point, 4, color.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(legend)
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(root.present()?)
}
