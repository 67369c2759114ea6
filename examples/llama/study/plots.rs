//! A report's pictures, as SVG: each method's cost against the entries it keeps, and where the policies hide tokens.

use std::ops::Range;
use std::path::Path;

use anyhow::Result;
use candle_sfattention::calibrate::LayerPolicy;
use candle_sfattention::Policy;
use plotters::prelude::*;

use super::policies::Named;
use super::summary::{Row, Summary};
use crate::report::write_file;

const SIZE: (u32, u32) = (720, 400);
const INK: RGBColor = RGBColor(60, 60, 60);
const GRID: RGBColor = RGBColor(225, 225, 225);
/// From Okabe and Ito's palette, which is safe for colour-blind readers.
const FAMILIES: [(&str, RGBColor); 13] = [
    ("dense", RGBColor(0, 0, 0)),
    ("calibrated", RGBColor(0, 114, 178)),
    ("observed", RGBColor(0, 114, 178)),
    ("probe", RGBColor(86, 180, 233)),
    ("query-key", RGBColor(240, 228, 66)),
    ("key-key", RGBColor(120, 120, 120)),
    ("random", RGBColor(230, 159, 0)),
    ("streaming", RGBColor(213, 94, 0)),
    ("pretrained", RGBColor(0, 158, 115)),
    ("paper", RGBColor(204, 121, 167)),
    ("snapkv", RGBColor(160, 90, 44)),
    ("knorm", RGBColor(150, 150, 60)),
    ("expected", RGBColor(120, 60, 160)),
];

pub fn draw(folder: &Path, summary: &Summary, policies: &[Named]) -> Result<()> {
    let kept = |row: &Row| row.kv_bytes_of_dense;
    let times = |title, limit, value: fn(&Row) -> Option<f64>| {
        let dense = of_dense(summary, value).unwrap_or(1.0);
        Curves {
            title,
            x: "KV cache at the window's end, of dense",
            range: dense * (1.0 - 0.08 * (limit - 1.0))..dense * limit,
        }
    };
    times("Perplexity", 1.25, |row| row.perplexity).draw(&folder.join("perplexity.svg"), summary, |row| {
        Some((kept(row)?, row.perplexity?))
    })?;
    times("Perplexity of a repeated passage", 3.0, |row| row.copy)
        .draw(&folder.join("copy.svg"), summary, |row| Some((kept(row)?, row.copy?)))?;
    for (index, asked) in summary
        .rows
        .first()
        .into_iter()
        .flat_map(|row| row.tasks.iter().enumerate())
    {
        let nats = |row: &Row| row.tasks.get(index).map(|asked| asked.compared.nats.mean);
        let all = summary.rows.iter().filter_map(nats);
        let (low, high) = all.fold((f64::MAX, 0f64), |(low, high), nats| (low.min(nats), high.max(nats)));
        let curves = Curves {
            title: &format!("Nats of an answer: {} at {} tokens", asked.task, asked.length),
            x: "KV cache at the text's end, of dense",
            range: low - 0.05 * (high - low).max(0.1)..high.max(low + 0.1),
        };
        let file = format!("nats-{}-{}.svg", asked.task, asked.length);
        curves.draw(&folder.join(file), summary, |row| {
            Some((row.tasks.get(index)?.kv_bytes_of_dense, nats(row)?))
        })?;
    }
    for named in policies {
        let file = match named.family {
            "calibrated" => format!("heads-{}.svg", named.ratio),
            _ => format!("heads-{}.svg", named.name()),
        };
        heat_map(&folder.join(file), named.ratio, &named.policy)?;
    }
    Ok(())
}

fn of_dense(summary: &Summary, value: impl Fn(&Row) -> Option<f64>) -> Option<f64> {
    summary.rows.iter().find(|row| row.family == "dense").and_then(value)
}

/// One line per family. A value above the range is drawn at the top, with its number.
struct Curves<'a> {
    title: &'a str,
    x: &'a str,
    range: Range<f64>,
}

impl Curves<'_> {
    fn draw(&self, file: &Path, summary: &Summary, point: impl Fn(&Row) -> Option<(f64, f64)>) -> Result<()> {
        let mut svg = String::new();
        self.draw_on(SVGBackend::with_string(&mut svg, SIZE), summary, point)?;
        write_file(file, &svg)
    }

    fn draw_on(&self, svg: SVGBackend, summary: &Summary, point: impl Fn(&Row) -> Option<(f64, f64)>) -> Result<()> {
        let Range {
            start: bottom,
            end: top,
        } = self.range;
        let root = svg.into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(self.title, ("sans-serif", 18).into_font().color(&INK))
            .margin(12)
            .margin_right(24)
            .x_label_area_size(46)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..1.12, bottom..top + (top - bottom) * 0.06)?;
        let text = ("sans-serif", 14).into_font().color(&INK);
        chart
            .configure_mesh()
            .x_desc(self.x)
            .axis_desc_style(text.clone())
            .label_style(text)
            .axis_style(INK)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (family, color) in FAMILIES {
            let rows = summary.rows.iter().filter(|row| row.family == family);
            let mut points: Vec<(f64, f64)> = rows.filter_map(&point).map(|(x, y)| (x.min(1.1), y)).collect();
            if points.is_empty() {
                continue;
            }
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let shown: Vec<_> = points.iter().map(|(x, y)| (*x, y.min(top))).collect();
            let style = ShapeStyle::from(color).filled().stroke_width(2);
            chart
                .draw_series(LineSeries::new(shown.clone(), style))?
                .label(family)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
            chart.draw_series(shown.iter().map(|point| Circle::new(*point, 4, style)))?;
            for (point, (_, y)) in shown.iter().zip(&points).filter(|(_, (_, y))| *y > top) {
                let label = ("sans-serif", 13).into_font().color(&color);
                chart.draw_series([EmptyElement::at(*point) + Text::new(format!("{y:.1}"), (6, -14), label)])?;
            }
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .label_font(("sans-serif", 13).into_font().color(&INK))
            .background_style(WHITE.mix(0.8))
            .draw()?;
        root.present()?;
        Ok(())
    }
}

/// Layers from left to right, heads that decide together from top to bottom; the darker, the more is hidden.
fn heat_map(file: &Path, ratio: f64, policy: &Policy) -> Result<()> {
    let layers = &policy.parts().layers;
    let units = layers.first().map_or(1, |layer| layer.hidden_ratios.len());
    let mut svg = String::new();
    let size = (SIZE.0, 120 + 28 * units as u32);
    heat_map_on(SVGBackend::with_string(&mut svg, size), ratio, layers, units)?;
    write_file(file, &svg)
}

fn heat_map_on(svg: SVGBackend, ratio: f64, layers: &[LayerPolicy], units: usize) -> Result<()> {
    let root = svg.into_drawing_area();
    root.fill(&WHITE)?;
    let title = format!("Hidden per layer and KV head, {ratio} in all");
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18).into_font().color(&INK))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..layers.len() as f64, units as f64..0.0)?;
    let text = ("sans-serif", 14).into_font().color(&INK);
    chart
        .configure_mesh()
        .disable_mesh()
        .x_desc("layer")
        .y_desc("KV head")
        .y_labels(units)
        .axis_desc_style(text.clone())
        .label_style(text)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .axis_style(INK)
        .draw()?;
    for (x, layer) in layers.iter().enumerate() {
        for (y, hidden) in layer.hidden_ratios.iter().enumerate() {
            let shade = |dark: f64| (255.0 - hidden.clamp(0.0, 1.0) * (255.0 - dark)) as u8;
            let color = RGBColor(shade(0.0), shade(70.0), shade(120.0));
            let corners = [(x as f64, y as f64), (x as f64 + 1.0, y as f64 + 1.0)];
            chart.draw_series([Rectangle::new(corners, color.filled())])?;
            let ink = if *hidden > 0.5 { WHITE } else { INK };
            let label = ("sans-serif", 10).into_font().color(&ink);
            let at = (x as f64 + 0.12, y as f64 + 0.35);
            chart.draw_series([Text::new(format!("{:.0}", 100.0 * hidden), at, label)])?;
        }
    }
    root.present()?;
    Ok(())
}
