//! A drawing of one run: load, replicas and attainment over time.

use std::fmt::Write as _;

use super::outcome::{Outcome, STRETCH};

const WIDTH: f64 = 960.0;
const PANEL: f64 = 150.0;
const LEFT: f64 = 60.0;
const GAP: f64 = 40.0;
/// Points of a line at most.
const POINTS: usize = 800;

/// An SVG of a run.
pub fn svg(title: &str, outcome: &Outcome) -> String {
    let seconds = outcome.samples.last().map_or(1.0, |point| point.time).max(1.0);
    let height = 3.0 * (PANEL + GAP) + GAP;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{LEFT}\" y=\"20\" font-size=\"14\">{}</text>\n",
        WIDTH + LEFT + 20.0,
        escaped(title),
    );
    let stretches = |value: fn(&(u32, u32)) -> f64| -> Vec<(f64, f64)> {
        outcome.stretches.iter().enumerate().map(|(index, pair)| (index as f64 * STRETCH, value(pair))).collect()
    };
    let load = stretches(|(total, _)| f64::from(*total) / STRETCH);
    let good = stretches(|(total, good)| 100.0 * f64::from(*good) / f64::from((*total).max(1)));
    let desired: Vec<(f64, f64)> = outcome.samples.iter().map(|point| (point.time, f64::from(point.desired))).collect();
    let ready: Vec<(f64, f64)> = outcome.samples.iter().map(|point| (point.time, f64::from(point.ready))).collect();
    panel(&mut text, 0, "requests/s", seconds, &[("#4477aa", &load)]);
    panel(&mut text, 1, "replicas: asked for, ready", seconds, &[("#ee6677", &desired), ("#228833", &ready)]);
    panel(&mut text, 2, "% within the objective, by arrival", seconds, &[("#aa3377", &good)]);
    text.push_str("</svg>\n");
    text
}

fn panel(text: &mut String, index: usize, title: &str, seconds: f64, lines: &[(&str, &[(f64, f64)])]) {
    let top = GAP + index as f64 * (PANEL + GAP);
    let highest = lines.iter().flat_map(|(_, line)| line.iter()).map(|(_, value)| *value).fold(1.0, f64::max);
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{WIDTH}\" height=\"{PANEL}\" fill=\"none\" stroke=\"#bbbbbb\"/>\
         <text x=\"{LEFT}\" y=\"{:.0}\">{title}</text><text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{highest:.0}</text>\
         <text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{:.0} s</text>",
        top - 5.0,
        LEFT - 5.0,
        top + 12.0,
        LEFT + WIDTH,
        top + PANEL + 14.0,
        seconds,
    );
    for (colour, line) in lines {
        let every = line.len().div_ceil(POINTS).max(1);
        let mut points = String::new();
        let mut last = None;
        for (time, value) in line.iter().step_by(every) {
            let (x, y) = (LEFT + WIDTH * time / seconds, top + PANEL * (1.0 - value / highest));
            if let Some(before) = last {
                let _ = write!(points, "{x:.1},{before:.1} ");
            }
            let _ = write!(points, "{x:.1},{y:.1} ");
            last = Some(y);
        }
        let _ =
            writeln!(text, "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.3\" points=\"{points}\"/>");
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scale::simulate::routing::Routing;
    use crate::scale::simulate::scaler::Fixed;
    use crate::scale::simulate::scenario::Scenario;
    use crate::scale::simulate::simulate;

    #[test]
    fn a_chart_has_three_panels_and_every_line_is_drawn() {
        let case = Scenario::S1.case(1, Routing::LateBinding, &[]);
        let chart = svg("S1 <fixed:8>", &simulate(&case.setting, case.requests, &mut Fixed(8)));
        assert_eq!((chart.matches("<polyline").count(), chart.matches("stroke=\"#bbbbbb\"").count()), (4, 3));
        assert!(chart.contains("S1 &lt;fixed:8&gt;") && !chart.contains("NaN"));
        assert!(chart.len() < 200_000);
    }
}
