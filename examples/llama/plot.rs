//! Cache bytes against tokens, as an SVG. Text stays text, so no font is needed here.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::write_file;
use crate::stats::mib;

/// One line of the picture.
pub struct Curve {
    pub label: String,
    /// Tokens and bytes, from the left.
    pub points: Vec<(usize, usize)>,
}

const SIZE: (u32, u32) = (720, 400);
/// From Okabe and Ito's palette, which is safe for colour-blind readers.
const COLORS: [RGBColor; 2] = [RGBColor(213, 94, 0), RGBColor(0, 114, 178)];
const GRID: RGBColor = RGBColor(225, 225, 225);
const INK: RGBColor = RGBColor(60, 60, 60);

/// Draws up to two curves, the first labelled above its end and the others below theirs, clear of the one above.
pub fn draw(file: &Path, title: &str, curves: &[Curve]) -> Result<()> {
    let mut svg = String::new();
    picture(SVGBackend::with_string(&mut svg, SIZE), title, curves)?;
    write_file(file, &svg).with_context(|| format!("svg {}", file.display()))
}

fn picture(svg: SVGBackend, title: &str, curves: &[Curve]) -> Result<()> {
    let ends = curves.iter().filter_map(|curve| curve.points.last());
    let most = ends.fold((1, 1), |most, end| (most.0.max(end.0), most.1.max(end.1)));
    let root = svg.into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18).into_font().color(&INK))
        .margin(12)
        .margin_right(24)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d(0..most.0, 0.0..mib(most.1 as u64) * 1.12)?;
    let text = ("sans-serif", 14).into_font().color(&INK);
    chart
        .configure_mesh()
        .x_desc("tokens")
        .y_desc("KV cache, MiB")
        .axis_desc_style(text.clone())
        .label_style(text)
        .y_label_formatter(&|mib| format!("{mib:.0}"))
        .axis_style(INK)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (index, (curve, color)) in curves.iter().zip(&COLORS).enumerate() {
        let points: Vec<_> = curve.points.iter().map(|&(x, bytes)| (x, mib(bytes as u64))).collect();
        let Some(&end) = points.last() else { continue };
        chart.draw_series(LineSeries::new(points, color.stroke_width(3)))?;
        let (side, offset) = if index == 0 {
            (VPos::Bottom, (-12, -8))
        } else {
            (VPos::Top, (-12, 24))
        };
        let anchor = Pos::new(HPos::Right, side);
        let style = ("sans-serif", 15).into_font().color(color).pos(anchor);
        chart.draw_series([EmptyElement::at(end) + Text::new(curve.label.clone(), offset, style)])?;
    }
    root.present()?;
    Ok(())
}
