//! Figures of several runs as a Markdown table, for documents.

use std::fmt::Write as _;

use super::report::Run;
use super::routing::Routing;

/// Header of the table.
const HEADER: &str = "\
| scenario | policy | routing | attainment | worst | replicas | x oracle | peak | reversals | lost | beats ernie |
|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|
";

/// What the table must know of a scenario: name, share of requests that is to be good.
pub type Goal = (String, f64);

/// Means over the seeds of one scenario, rule and routing, and worst seeds.
#[derive(Debug)]
struct Row<'a> {
    first: &'a Run,
    attainment: f64,
    worst: f64,
    replicas: f64,
    ratio: Option<f64>,
    peak: u32,
    reversals: f64,
    lost: u64,
}

/// A table of runs: one line for the seeds of one scenario, rule and routing. The attainment is that of the requests that
/// could have been good on an idle replica; attainment, replicas, cost and reversals are means, peak and lost the worst seeds.
pub fn markdown(runs: &[Run], goals: &[Goal]) -> String {
    let mut text = String::from(HEADER);
    let key = |run: &Run| (run.scenario.clone(), run.policy.clone(), run.routing);
    let rows: Vec<Row<'_>> = runs.chunk_by(|a, b| key(a) == key(b)).filter_map(row).collect();
    let place = |row: &Row<'_>| (row.first.scenario.clone(), row.first.routing);
    for group in rows.chunk_by(|a, b| place(a) == place(b)) {
        let goal = group.first().and_then(|row| goals.iter().find(|(name, _)| *name == row.first.scenario));
        let goal = goal.map_or(1.0, |(_, goal)| *goal);
        let ours = group
            .iter()
            .find(|row| row.first.policy.split(' ').eq(["ernie"]) || row.first.policy.starts_with("ernie ("));
        for row in group {
            line(&mut text, row, ours.map_or("", |ours| verdict(row, ours, goal)));
        }
    }
    text
}

fn row(runs: &[Run]) -> Option<Row<'_>> {
    let outcomes = || runs.iter().map(|run| &run.outcome);
    let mean = |of: &mut dyn Iterator<Item = f64>| of.sum::<f64>() / runs.len() as f64;
    let ratios: Option<Vec<f64>> = outcomes().map(|outcome| outcome.cost_ratio).collect();
    Some(Row {
        first: runs.first()?,
        attainment: mean(&mut outcomes().map(|outcome| outcome.feasible_attainment)),
        worst: outcomes().map(|outcome| outcome.feasible_attainment).fold(1.0, f64::min),
        replicas: mean(&mut outcomes().map(|outcome| outcome.mean_replicas)),
        ratio: ratios.map(|ratios| mean(&mut ratios.into_iter())),
        peak: outcomes().map(|outcome| outcome.peak_replicas).max().unwrap_or(0),
        reversals: mean(&mut outcomes().map(|outcome| f64::from(outcome.reversals))),
        lost: outcomes().map(|outcome| outcome.lost).max().unwrap_or(0),
    })
}

/// In what a rule of somebody else is better than the product's with its defaults. The oracle is no rule.
fn verdict(row: &Row<'_>, ours: &Row<'_>, goal: f64) -> &'static str {
    if row.first.policy.starts_with("ernie") || row.first.policy == "oracle" {
        return "";
    }
    let is_cheaper = row.replicas < ours.replicas;
    match (row.attainment >= goal, ours.attainment >= goal, row.attainment > ours.attainment) {
        (true, true, _) if is_cheaper => "**cheaper**",
        (true, false, _) if is_cheaper => "**reaches the goal, cheaper**",
        (true, false, _) => "**reaches the goal**",
        (false, false, true) if is_cheaper => "**more, cheaper**",
        (false, false, true) => "**more**",
        _ => "",
    }
}

fn line(text: &mut String, row: &Row<'_>, verdict: &str) {
    let routing = match row.first.routing {
        Routing::Connection => "connection",
        Routing::LateBinding => "late-binding",
    };
    let ratio = row.ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "| {} | {} | {routing} | {:.2} % | {:.2} % | {:.2} | {ratio} | {} | {:.1} | {} | {verdict} |",
        row.first.scenario,
        row.first.policy,
        // Rounded down: what misses a goal is not to look as if it did not.
        (row.attainment * 1e4).floor() / 100.0,
        (row.worst * 1e4).floor() / 100.0,
        row.replicas,
        row.peak,
        row.reversals,
        row.lost,
    );
}
