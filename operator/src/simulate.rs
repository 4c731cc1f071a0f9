//! `ernie-operator simulate`: what the autoscaler, or a rule of somebody else, makes of a scenario or a trace.

mod contest;
mod load;

use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::{fs, thread};

use anyhow::Context;
use clap::{Args, ValueEnum};

use self::contest::{Contest, Rule};
use self::load::Load;
use crate::scale::simulate::chart;
use crate::scale::simulate::markdown::{Goal, markdown};
use crate::scale::simulate::report::table;
use crate::scale::simulate::routing::Routing;
use crate::scale::simulate::scenario::{Case, Scenario};

/// Flags of `simulate`.
#[derive(Args, Debug)]
pub struct Simulate {
    /// Scenarios, with commas: S1 to S14, or all.
    #[arg(long, value_name = "NAME", value_delimiter = ',', required_unless_present = "trace")]
    pub scenario: Vec<String>,
    /// Requests to replay: CSV of the Azure LLM inference traces, or JSON lines of Mooncake's.
    #[arg(long, value_name = "FILE", conflicts_with = "scenario")]
    pub trace: Option<PathBuf>,
    /// Autoscaling policy, YAML or JSON: minReplicas, maxReplicas, slo{ttft,itl,attainment}, targetUtilization,
    /// tolerance{up,down}, headroom{quantile,max}. Times in seconds.
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Step costs and limits of the simulated replicas, JSON: cost{base,prefillToken,sequence,residentToken}, law, chunk,
    /// kvTokens, maxNumSeqs.
    #[arg(long, value_name = "FILE")]
    pub model_profile: Option<PathBuf>,
    /// Rules of others to run beside: static, hpa-kv, hpa-concurrency, keda-queue, kpa, kubeai, llm-d, or all of these;
    /// fixed:N, oracle; with commas. Given, the product's own rule runs only with `ernie` among them.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub baseline: Vec<String>,
    /// Run each rule with every value of its knob as well, and show the best: the cheapest that reaches the goal, or else
    /// the one that comes closest.
    #[arg(long)]
    pub tuned: bool,
    /// How requests find replicas: `connection` is what ships, `late-binding` is with a gateway.
    #[arg(long, value_enum, default_value_t = RoutingFlag::Connection)]
    pub routing: RoutingFlag,
    /// First seed.
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Number of seeds from there on.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub seeds: u64,
    /// Leave the oracle out: no cost_ratio, and much faster.
    #[arg(long)]
    pub no_oracle: bool,
    /// Print JSON: an object for one run, an array for several.
    #[arg(long)]
    pub json: bool,
    /// Print a Markdown table, with what was run, and where another rule is better than the product's.
    #[arg(long, conflicts_with = "json")]
    pub markdown: bool,
    /// Simulations at the same time; by default as many as there are processors. It changes no figure.
    #[arg(long, value_name = "N")]
    pub jobs: Option<NonZeroUsize>,
    /// Draw load, replicas and attainment of the first run into an SVG file.
    #[arg(long, value_name = "FILE")]
    pub chart: Option<PathBuf>,
}

/// Values of `--routing`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum RoutingFlag {
    /// Clients keep connections to random replicas.
    Connection,
    /// A gateway holds requests until a replica has room.
    LateBinding,
    /// One after the other.
    Both,
}

impl RoutingFlag {
    fn all(self) -> &'static [Routing] {
        match self {
            Self::Connection => &[Routing::Connection],
            Self::LateBinding => &[Routing::LateBinding],
            Self::Both => &[Routing::Connection, Routing::LateBinding],
        }
    }
}

/// Simulates; what came out, as a table or as JSON.
///
/// # Errors
///
/// A flag or a file that makes no sense, with what to write instead.
pub fn run(flags: &Simulate) -> anyhow::Result<String> {
    let rules = contest::rules(&flags.baseline)?;
    let jobs = flags.jobs.or_else(|| thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get);
    let (oracle, explains) = (!flags.no_oracle, flags.json);
    let contest = Contest { rules: &rules, tuned: flags.tuned, oracle, explains, jobs };
    let (loads, missing) = load::loads(flags)?;
    for sentence in &missing {
        eprintln!("ernie-operator: {sentence}");
    }
    let (mut runs, mut goals) = (Vec::new(), Vec::new());
    for load in &loads {
        for routing in flags.routing.all() {
            let seeds = flags.seed..flags.seed.saturating_add(flags.seeds);
            let cases = seeds.clone().map(|seed| load::case(flags, load, *routing, seed));
            let cases: Vec<Case> = cases.collect::<anyhow::Result<_>>()?;
            goals.extend(cases.first().map(|case| (load.name.clone(), case.goal)));
            runs.extend(contest.hold(load, *routing, seeds, &cases));
        }
    }
    if let (Some(path), Some(run)) = (&flags.chart, runs.first()) {
        let title = format!("{} {} {:?} seed {}", run.scenario, run.policy, run.routing, run.seed);
        fs::write(path, chart::svg(&title, &run.outcome))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(match (flags.json, runs.as_slice()) {
        (true, [run]) => serde_json::to_string_pretty(run)? + "\n",
        (true, runs) => serde_json::to_string_pretty(runs)? + "\n",
        (false, runs) if flags.markdown => document(flags, &rules, &loads, &goals, &missing) + &markdown(runs, &goals),
        (false, runs) => warned(&missing) + &table(runs),
    })
}

/// What is missing, where nobody overlooks it.
fn warned(missing: &[String]) -> String {
    missing.iter().map(|sentence| format!("**{sentence}**\n\n")).collect()
}

/// What a reader of the Markdown table must know: seeds, scenarios with their goals, and the values that were tried.
fn document(flags: &Simulate, rules: &[Rule], loads: &[Load], goals: &[Goal], missing: &[String]) -> String {
    let mut text = warned(missing);
    // Writing to a String cannot fail.
    let _ = writeln!(text, "Seeds {} to {}.\n", flags.seed, flags.seed.saturating_add(flags.seeds) - 1);
    for load in loads {
        let title = load.scenario.map_or("a trace", Scenario::title);
        let goal = goals.iter().find(|(name, _)| *name == load.name).map_or(1.0, |(_, goal)| *goal);
        let _ = writeln!(text, "- {}: {title}; goal {} %", load.name, (goal * 1e5).round() / 1e3);
    }
    text.push('\n');
    for (rule, knob) in rules.iter().filter(|_| flags.tuned).filter_map(|rule| Some((rule, rule.knob()?))) {
        let values =
            rule.grid().into_iter().map(|value| value.map_or("the goal".to_owned(), |value| value.to_string()));
        let _ = writeln!(text, "- {}: {knob} of {}", rule.name(), values.collect::<Vec<_>>().join(", "));
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use std::env;

    use super::contest::rules;
    use super::load::{case, loads, shared};
    use super::*;
    use crate::scale::simulate::baselines::PUBLISHED;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        simulate: Simulate,
    }

    fn flags(arguments: &[&str]) -> Simulate {
        Flags::try_parse_from(["simulate"].iter().chain(arguments)).expect("parses").simulate
    }

    #[test]
    fn names_that_do_not_exist_are_refused_with_those_that_do() {
        let error = rules(&["hpa".to_owned()]).expect_err("refused").to_string();
        assert!(error.contains("hpa-kv") && error.contains("oracle"), "{error}");
        assert!(rules(&["fixed:0".to_owned()]).expect_err("refused").to_string().contains("fixed:8"));
        let error = loads(&flags(&["--scenario=S99"])).expect_err("refused").to_string();
        assert!(error.contains("S1 to S14"), "{error}");
        assert!(Flags::try_parse_from(["simulate"]).is_err(), "a scenario or a trace is needed");
    }

    #[test]
    fn the_published_rules_are_one_word_and_ours_runs_by_default() {
        assert_eq!(rules(&[]).expect("valid"), [Rule::Ours]);
        assert_eq!(rules(&["ernie".to_owned(), "all".to_owned()]).expect("valid").len(), 1 + PUBLISHED.len());
    }

    #[test]
    fn a_policy_file_is_applied_and_nonsense_in_it_is_named() {
        let folder = env::temp_dir().join(format!("ernie-simulate-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join("policy.yaml");
        let load = || Load { name: "S1".to_owned(), scenario: Some(Scenario::S1), requests: Vec::new() };
        let with = |text: &str| {
            fs::write(&path, text).expect("written");
            let flag = format!("--policy={}", path.display());
            case(&flags(&["--scenario=S1", &flag]), &load(), Routing::Connection, 0).map(|case| case.policy)
        };
        let policy = with("{minReplicas: 2, maxReplicas: 5, tolerance: {up: 0, down: 0.2}}").expect("valid");
        assert_eq!((policy.min_replicas, policy.max_replicas, policy.tolerance.down), (2, 5, 0.2));
        let error = format!("{:#}", with("{minReplicas: 9, maxReplicas: 5}").expect_err("refused"));
        assert!(error.contains("minReplicas 9") && error.contains("policy.yaml"), "{error}");
        assert!(format!("{:#}", with("{minReplica: 9}").expect_err("refused")).contains("minReplica"));
        fs::remove_dir_all(&folder).expect("removed");
    }

    #[test]
    fn a_trace_that_is_not_here_is_asked_for_by_name() {
        let error = shared("no-such-trace.csv").expect_err("missing").to_string();
        assert!(error.contains("no-such-trace.csv") && error.contains("ERNIE_SHARED"), "{error}");
    }

    #[test]
    fn the_table_has_each_rule_with_its_defaults_and_its_best_and_is_the_same_on_any_number_of_threads() {
        let with = |jobs: &str| {
            let fixed = ["--scenario=S9", "--baseline=ernie,static,kpa,oracle", "--tuned", "--routing=both"];
            let more = ["--seeds=1", "--markdown", jobs];
            run(&flags(&[fixed.as_slice(), more.as_slice()].concat())).expect("runs")
        };
        let text = with("--jobs=2");
        assert_eq!(text, with("--jobs=1"));
        assert!(text.contains("Seeds 0 to 0.") && text.contains("- kpa: concurrency per replica of 100, "), "{text}");
        let rows: Vec<Vec<&str>> = text
            .lines()
            .filter(|line| line.starts_with("| S"))
            .map(|line| line.split('|').map(str::trim).collect())
            .collect();
        assert!(rows.iter().all(|row| row.len() == 13), "{text}");
        for routing in ["connection", "late-binding"] {
            let policies: Vec<&str> = rows.iter().filter(|row| row[3] == routing).map(|row| row[2]).collect();
            for rule in ["ernie", "static", "kpa"] {
                let own = policies.iter().filter(|policy| policy.split(' ').next() == Some(rule)).count();
                let is_best = policies.contains(&format!("{rule} (tuned: the same)").as_str());
                assert_eq!(own, if is_best { 1 } else { 2 }, "{routing} {rule}: {policies:?}");
            }
            assert!(policies.contains(&"oracle"), "{policies:?}");
        }
        assert!(rows.iter().filter(|row| row[2] == "oracle").all(|row| row[7] == "1.00"), "{text}");
    }

    #[test]
    fn a_scenario_that_all_would_have_is_left_out_loudly_without_its_trace() {
        let (loads, missing) = loads(&flags(&["--scenario=all"])).expect("no error");
        assert_eq!(loads.len() + missing.len(), crate::scale::simulate::scenario::ALL.len());
        assert!(missing.iter().all(|sentence| sentence.contains("LEFT OUT") && sentence.contains("ERNIE_SHARED")));
        assert!(warned(&["S4 is LEFT OUT".to_owned()]).contains("**S4 is LEFT OUT**"));
    }
}
