//! Figures as SVG: a panel for each chart, a row for each figure, the bar as a dashed line.
//!
//! Ratios are points with their intervals on an axis around one; everything else is bars from zero, or from a power of ten
//! where the largest is more than thirty times the smallest.

use std::fmt::Write as _;

use super::report::{Figure, OURS, number};

const WIDTH: f64 = 860.0;
/// Where the rows' names end and the axis begins, and where it ends.
const AXIS: (f64, f64) = (330.0, 770.0);
const ROW: f64 = 22.0;
const HEAD: f64 = 34.0;
const TOP: f64 = 58.0;

/// How values become places on a panel's axis.
struct Scale {
    low: f64,
    high: f64,
    logarithmic: bool,
}

impl Scale {
    fn of(figures: &[&Figure]) -> Self {
        let mut values: Vec<f64> = figures
            .iter()
            .flat_map(|figure| {
                let [low, high] = figure.interval.unwrap_or([figure.value, figure.value]);
                [Some(low), Some(high), figure.bar.map(super::report::Bar::value)]
            })
            .flatten()
            .collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (
            values.first().copied().unwrap_or(0.0),
            values.last().copied().unwrap_or(1.0),
        );
        let (low, high, logarithmic) = if is_ratio(figures) {
            (least.min(0.95) - 0.01, most.max(1.0) + 0.01, false)
        } else if least > 0.0 && most / least > 30.0 {
            (10_f64.powf(least.log10().floor()), most * 1.2, true)
        } else {
            (0.0, most * 1.05, false)
        };
        Self {
            low,
            high: if high > low { high } else { low + 1.0 },
            logarithmic,
        }
    }

    fn x(&self, value: f64) -> f64 {
        let (value, low, high) = if self.logarithmic {
            (value.max(self.low).log10(), self.low.log10(), self.high.log10())
        } else {
            (value, self.low, self.high)
        };
        AXIS.0 + (AXIS.1 - AXIS.0) * ((value - low) / (high - low)).clamp(0.0, 1.0)
    }
}

fn is_ratio(figures: &[&Figure]) -> bool {
    figures.iter().all(|figure| figure.unit == "ratio")
}

/// A picture of all figures.
pub fn svg(title: &str, caption: &str, figures: &[Figure]) -> String {
    let mut charts: Vec<(&str, Vec<&Figure>)> = Vec::new();
    for figure in figures {
        match charts.iter_mut().find(|(chart, _)| *chart == figure.chart) {
            Some((_, of_chart)) => of_chart.push(figure),
            None => charts.push((&figure.chart, vec![figure])),
        }
    }
    let mut body = String::new();
    let mut y = TOP;
    for (chart, of_chart) in &charts {
        y = panel(&mut body, chart, of_chart, y);
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" viewBox=\"0 0 {WIDTH} {y}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"18\">{}</text>\n<text x=\"16\" y=\"44\" fill=\"#666\">{}</text>\n{body}</svg>\n",
        escape(title),
        escape(caption)
    )
}

/// Draws one chart from `y` down; returns where the next begins.
fn panel(body: &mut String, chart: &str, figures: &[&Figure], y: f64) -> f64 {
    let scale = Scale::of(figures);
    let unit = figures.first().map_or("", |figure| figure.unit);
    let axis = if scale.logarithmic { ", logarithmic" } else { "" };
    let _ = writeln!(
        body,
        "<text x=\"16\" y=\"{}\" font-weight=\"bold\">{}, {unit}{axis}</text>",
        y + 20.0,
        escape(chart)
    );
    let rows = y + HEAD;
    let end = figures.iter().fold(rows, |row, figure| {
        draw(body, &scale, figure, row, is_ratio(figures));
        row + ROW
    });
    let _ = writeln!(
        body,
        "<path d=\"M{} {rows}V{end}H{}\" fill=\"none\" stroke=\"#999\"/>",
        AXIS.0, AXIS.1
    );
    end + 14.0
}

fn draw(body: &mut String, scale: &Scale, figure: &Figure, row: f64, point: bool) {
    let (x, middle) = (scale.x(figure.value), row + ROW / 2.0);
    let colour = if figure.of == OURS { "#1f6feb" } else { "#9aa4b2" };
    let _ = writeln!(
        body,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{} <tspan fill=\"{colour}\">{}</tspan></text>",
        AXIS.0 - 8.0,
        middle + 4.0,
        escape(&figure.name),
        escape(&figure.of)
    );
    if let Some([low, high]) = figure.interval {
        let _ = writeln!(
            body,
            "<path d=\"M{:.1} {middle}H{:.1}\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            scale.x(low),
            scale.x(high)
        );
    }
    if point {
        let _ = writeln!(
            body,
            "<circle cx=\"{x:.1}\" cy=\"{middle}\" r=\"4\" fill=\"{colour}\"/>"
        );
    } else {
        let _ = writeln!(
            body,
            "<rect x=\"{}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"{colour}\"/>",
            AXIS.0,
            row + 4.0,
            (x - AXIS.0).max(1.0),
            ROW - 8.0
        );
    }
    if let Some(bar) = figure.bar {
        let at = scale.x(bar.value());
        let _ = writeln!(
            body,
            "<path d=\"M{at:.1} {row}v{ROW}\" stroke=\"#d1242f\" stroke-dasharray=\"4 2\"/>"
        );
    }
    let shown = scale.x(figure.interval.map_or(figure.value, |[_, high]| high)).max(x);
    let _ = writeln!(
        body,
        "<text x=\"{:.1}\" y=\"{}\">{}</text>",
        shown + 8.0,
        middle + 4.0,
        number(figure.value)
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_has_a_row_in_its_chart() {
        let figures = [
            Figure::new("ADD <p50>", "one at a time", 3.0, "ms").below(20.0),
            Figure::new("ADD <p50>", "one at a time", 300.0, "ms").of("bridge & host-local"),
            Figure::new("memory", "10 services", 20.0, "MB"),
        ];
        let picture = svg("cni", "here", &figures);
        assert_eq!(picture.matches("<rect").count(), 1 + figures.len());
        assert_eq!(picture.matches("font-weight").count(), 2);
        assert_eq!(picture.matches("stroke-dasharray").count(), 1);
        assert!(picture.contains("ADD &lt;p50&gt;, ms, logarithmic"), "{picture}");
        assert!(picture.contains("bridge &amp; host-local"), "{picture}");
    }

    #[test]
    fn ratios_are_drawn_around_one() {
        let figure = Figure::new("crr", "10", 0.98, "ratio").at_least(0.97);
        let scale = Scale::of(&[&figure]);
        assert!(scale.low > 0.9 && scale.high > 1.0);
        assert!(scale.x(0.97) < scale.x(0.98));
    }
}
