//! A plot of several series over the number of events, both axes logarithmic, as SVG.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

/// One line of the plot.
pub(crate) struct Series {
    /// What the legend says.
    pub(crate) name: String,
    /// Events, and the figure.
    pub(crate) points: Vec<(u64, u64)>,
}

/// A grey axis, and colours that are told apart without red and green.
const GREY: RGBColor = RGBColor(90, 90, 90);
const COLOURS: [RGBColor; 4] = [
    RGBColor(0, 90, 181),
    RGBColor(220, 90, 20),
    RGBColor(120, 80, 170),
    RGBColor(30, 30, 30),
];

/// Draws `series` into `file`.
pub(crate) fn write(file: &Path, title: &str, series: &[Series]) -> Result<()> {
    draw(file, title, series).with_context(|| format!("cannot draw {}", file.display()))
}

fn draw(file: &Path, title: &str, series: &[Series]) -> Result<()> {
    let all = || series.iter().flat_map(|series| &series.points);
    let most_events = all().map(|point| point.0).max().unwrap_or(1);
    let largest = all().map(|point| point.1).max().unwrap_or(1);

    let area = SVGBackend::new(file, (960, 600)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 22))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(80)
        .build_cartesian_2d(
            (1..most_events * 2).log_scale(),
            (100..largest * 2).log_scale(),
        )?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GREY.mix(0.15))
        .axis_style(GREY)
        .label_style(("sans-serif", 14))
        .x_desc("events mapped")
        .y_desc("instructions")
        .x_label_formatter(&grouped)
        .y_label_formatter(&grouped)
        .draw()?;
    for (series, colour) in series.iter().zip(COLOURS.iter().cycle()) {
        let dots = series
            .points
            .iter()
            .map(|&at| Circle::new(at, 4, colour.filled()));
        chart
            .draw_series(dots)?
            .label(&series.name)
            .legend(|(x, y)| Circle::new((x + 10, y), 4, colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(("sans-serif", 14))
        .background_style(WHITE.mix(0.9))
        .border_style(GREY.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}

/// A number with a comma before each group of three digits.
fn grouped(number: &u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped_by_three() {
        let text = [1, 12, 123, 1234, 29_400_000].map(|number| grouped(&number));
        assert_eq!(text, ["1", "12", "123", "1,234", "29,400,000"]);
    }
}
