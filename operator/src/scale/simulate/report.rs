//! Figures of several runs, for people.

use std::fmt::Write as _;

use serde::Serialize;

use super::outcome::Outcome;
use super::routing::Routing;

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Run {
    /// Scenario or trace.
    pub scenario: String,
    /// Whose rule.
    pub policy: String,
    /// How requests found replicas.
    pub routing: Routing,
    /// Seed.
    pub seed: u64,
    /// Its figures.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Seconds from the burst to the first larger answer, where the scenario has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reaction_seconds: Option<f64>,
    /// Seconds from the burst until 90 % meet the objective for good, where the scenario has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_seconds: Option<f64>,
}

const HEADER: &str = "scenario  policy                         routing       attainment: feasible     worst  replicas  peak  x oracle  worst  \
                      reversals  worst    lost  TTFT p99  ITL p99  recovery";

/// A table of runs: one line for the seeds of one scenario, rule and routing, with mean and worst.
pub fn table(runs: &[Run]) -> String {
    let mut text = String::from(HEADER);
    text.push('\n');
    let key = |run: &Run| (run.scenario.clone(), run.policy.clone(), run.routing);
    for group in runs.chunk_by(|a, b| key(a) == key(b)) {
        line(&mut text, group);
    }
    text
}

fn line(text: &mut String, runs: &[Run]) {
    let Some(first) = runs.first() else { return };
    let count = runs.len() as f64;
    let mean = |of: &dyn Fn(&Outcome) -> f64| runs.iter().map(|run| of(&run.outcome)).sum::<f64>() / count;
    let most = |of: &dyn Fn(&Outcome) -> f64| runs.iter().map(|run| of(&run.outcome)).fold(0.0, f64::max);
    let feasible = |outcome: &Outcome| outcome.feasible_attainment;
    let least = runs.iter().map(|run| feasible(&run.outcome)).fold(1.0, f64::min);
    let ratio = |outcome: &Outcome| outcome.cost_ratio.unwrap_or(0.0);
    let has_ratio = runs.iter().all(|run| run.outcome.cost_ratio.is_some());
    let ratios = match has_ratio {
        true => format!("{:9.3} {:6.3}", mean(&ratio), most(&ratio)),
        false => format!("{:>9} {:>6}", "-", "-"),
    };
    let recovery = runs
        .iter()
        .filter_map(|run| run.recovery_seconds)
        .fold(None, |worst: Option<f64>, seconds| Some(worst.map_or(seconds, |worst| worst.max(seconds))));
    let recovery = recovery.map_or("-".to_owned(), |seconds| format!("{seconds:.0} s"));
    let routing = match first.routing {
        Routing::Connection => "connection",
        Routing::LateBinding => "late-binding",
    };
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "{:9} {:30} {:12} {:9.3} % {:10.3} % {:7.3} % {:9.3} {:5.0} {ratios} {:10.2} {:6.0} {:7.0} {:7.2} s {:6.1} ms {recovery:>9}",
        first.scenario,
        first.policy,
        routing,
        100.0 * mean(&|outcome| outcome.attainment),
        100.0 * mean(&feasible),
        100.0 * least,
        mean(&|outcome| outcome.mean_replicas),
        most(&|outcome| f64::from(outcome.peak_replicas)),
        mean(&|outcome| f64::from(outcome.reversals)),
        most(&|outcome| f64::from(outcome.reversals)),
        most(&|outcome| outcome.lost as f64),
        most(&|outcome| outcome.ttft_seconds.p99),
        1000.0 * most(&|outcome| outcome.itl_seconds.p99),
    );
}
