//! `ernie-operator simulate`: what the autoscaler, or a rule of somebody else, makes of a scenario or a trace.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use serde::Deserialize;

use crate::scale::policy::{Headroom, Policy, Slo, Tolerance};
use crate::scale::simulate::baselines::{Baseline, PUBLISHED};
use crate::scale::simulate::engine::Engine;
use crate::scale::simulate::oracle::oracle;
use crate::scale::simulate::report::{Run, table};
use crate::scale::simulate::routing::Routing;
use crate::scale::simulate::scaler::{Mortal, Ours};
use crate::scale::simulate::scenario::{ALL, Case, Scenario};
use crate::scale::simulate::{Outcome, Request, chart, simulate};

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
    /// Rules of others to run beside: hpa-kv, hpa-concurrency, keda-queue, kpa, kubeai, llm-d, fixed:N, oracle, or all of
    /// the published ones; with commas. Given, the product's own rule runs only with `ernie` among them.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub baseline: Vec<String>,
    /// Run each published rule with every value of its knob as well, and show the best.
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

/// The product's own rule, or one of somebody else.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    Ours,
    Theirs(Baseline),
}

/// What is simulated: a scenario, or a trace with a name.
struct Load {
    name: String,
    scenario: Option<Scenario>,
    requests: Vec<Request>,
}

/// Simulates; what came out, as a table or as JSON.
///
/// # Errors
///
/// A flag or a file that makes no sense, with what to write instead.
pub fn run(flags: &Simulate) -> anyhow::Result<String> {
    let rules = rules(&flags.baseline)?;
    let mut runs = Vec::new();
    for load in loads(flags)? {
        for routing in flags.routing.all() {
            let seeds = flags.seed..flags.seed.saturating_add(flags.seeds);
            let cases: Vec<(u64, Case)> =
                seeds.map(|seed| Ok((seed, case(flags, &load, *routing, seed)?))).collect::<anyhow::Result<_>>()?;
            let best: Vec<Option<Outcome>> =
                cases.iter().map(|(_, case)| (!flags.no_oracle).then(|| oracle(case))).collect();
            for rule in &rules {
                runs.extend(seeds_of(flags, &load, *routing, *rule, &cases, &best));
            }
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
        (false, runs) => table(runs),
    })
}

fn rules(names: &[String]) -> anyhow::Result<Vec<Rule>> {
    let mut rules = Vec::new();
    for name in names {
        match name.as_str() {
            "ernie" => rules.push(Rule::Ours),
            "all" => rules.extend(PUBLISHED.map(Rule::Theirs)),
            name => rules.push(Rule::Theirs(Baseline::from_name(name).map_err(anyhow::Error::msg)?)),
        }
    }
    Ok(if rules.is_empty() { vec![Rule::Ours] } else { rules })
}

/// Runs one rule over all seeds, and over its grid when asked; the default knob first.
fn seeds_of(
    flags: &Simulate,
    load: &Load,
    routing: Routing,
    rule: Rule,
    cases: &[(u64, Case)],
    best: &[Option<Outcome>],
) -> Vec<Run> {
    let with = |knob: Option<f64>, label: String| -> Vec<Run> {
        let each = cases.iter().zip(best).map(|((seed, case), best)| {
            let mut outcome = outcome(flags, rule, knob, case, best.as_ref());
            outcome.cost_ratio = best.as_ref().map(|best| outcome.mean_replicas / best.mean_replicas);
            let burst = load.scenario.and_then(Scenario::burst);
            Run {
                scenario: load.name.clone(),
                policy: label.clone(),
                routing,
                seed: *seed,
                reaction_seconds: burst.and_then(|burst| outcome.reaction(burst)),
                recovery_seconds: burst.map(|burst| outcome.recovery(burst)),
                outcome,
            }
        });
        each.collect()
    };
    let Rule::Theirs(baseline) = rule else { return with(None, "ernie".to_owned()) };
    let grid = baseline.grid();
    let mut runs = with(grid.first().copied(), baseline.name());
    if flags.tuned && grid.len() > 1 {
        let goal = cases.first().map_or(1.0, |(_, case)| case.goal);
        let tries = grid.iter().map(|knob| with(Some(*knob), format!("{} tuned {knob}", baseline.name())));
        runs.extend(tries.max_by(|a, b| standing(a, goal).total_cmp(&standing(b, goal))).unwrap_or_default());
    }
    runs
}

/// How good runs are: those that reach the goal by their cost, then the others by their attainment.
fn standing(runs: &[Run], goal: f64) -> f64 {
    let count = runs.len().max(1) as f64;
    let attainment = runs.iter().map(|run| run.outcome.feasible_attainment).sum::<f64>() / count;
    let cost = runs.iter().map(|run| run.outcome.mean_replicas).sum::<f64>() / count;
    if attainment >= goal { 2.0 + 1.0 / (1.0 + cost) } else { attainment }
}

fn outcome(flags: &Simulate, rule: Rule, knob: Option<f64>, case: &Case, best: Option<&Outcome>) -> Outcome {
    match rule {
        Rule::Ours => {
            let explains = flags.json;
            let mut ours = Mortal::new(Ours::new(case.policy.clone(), explains).with_takeover(case.takeover));
            simulate(&case.setting, case.requests.clone(), &mut ours)
        }
        Rule::Theirs(baseline) => match baseline.scaler(knob.unwrap_or_default(), &case.policy) {
            None => best.cloned().unwrap_or_else(|| oracle(case)),
            Some(mut scaler) => {
                let mut setting = case.setting.clone();
                if let Baseline::Fixed(count) = baseline {
                    setting.initial = count;
                }
                simulate(&setting, case.requests.clone(), scaler.as_mut())
            }
        },
    }
}

fn loads(flags: &Simulate) -> anyhow::Result<Vec<Load>> {
    if let Some(path) = &flags.trace {
        let name = path.file_stem().map_or_else(|| "trace".to_owned(), |stem| stem.to_string_lossy().into_owned());
        return Ok(vec![Load { name, scenario: None, requests: read_trace(path)? }]);
    }
    let mut scenarios = Vec::new();
    for name in &flags.scenario {
        match name.as_str() {
            "all" => scenarios.extend(ALL),
            name => scenarios.push(Scenario::from_name(name).map_err(anyhow::Error::msg)?),
        }
    }
    let loads = scenarios.into_iter().map(|scenario| {
        let requests = match scenario.trace() {
            None => Vec::new(),
            Some(file) => read_trace(&shared(file)?)?,
        };
        Ok(Load { name: format!("{scenario:?}"), scenario: Some(scenario), requests })
    });
    loads.collect()
}

/// The folder of published traces: `$ERNIE_SHARED/traces`, or `../shared/traces` beside the checkout.
fn shared(file: &str) -> anyhow::Result<PathBuf> {
    let named = env::var_os("ERNIE_SHARED").map(PathBuf::from);
    let beside = [PathBuf::from("../shared"), Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared")];
    let candidates: Vec<PathBuf> =
        named.into_iter().chain(beside).map(|folder| folder.join("traces").join(file)).collect();
    match candidates.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => bail!(
            "the published trace {file} is not here: set ERNIE_SHARED to the folder that has traces/{file} (looked at {})",
            candidates.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
        ),
    }
}

fn read_trace(path: &Path) -> anyhow::Result<Vec<Request>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    ernie_workload::trace::parse(&text, false).with_context(|| path.display().to_string())
}

fn case(flags: &Simulate, load: &Load, routing: Routing, seed: u64) -> anyhow::Result<Case> {
    // A trace runs in the cluster of S5, on the engine of S1.
    let mut case = match load.scenario {
        Some(scenario) => scenario.case(seed, routing, &load.requests),
        None => {
            let mut case = Scenario::S5.case(seed, routing, &load.requests);
            case.setting.engine = Engine::default();
            case.policy.prior = case.setting.engine.cost;
            case
        }
    };
    if let Some(path) = &flags.model_profile {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        case.setting.engine = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        case.policy.prior = case.setting.engine.cost;
        check_engine(&case.setting.engine).with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &flags.policy {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let file: PolicyFile = serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?;
        file.apply(&mut case);
        case.policy.check().with_context(|| path.display().to_string())?;
    }
    Ok(case)
}

fn check_engine(engine: &Engine) -> anyhow::Result<()> {
    let costs = engine.cost.coefficients();
    ensure!(
        costs.iter().all(|cost| cost.is_finite() && *cost >= 0.0) && costs[0] > 0.0,
        "costs must be finite, 0 or more, and cost.base above 0: they are {costs:?}"
    );
    ensure!(
        engine.chunk > 0 && engine.kv_tokens > 0 && engine.max_num_seqs > 0 && engine.max_num_queued > 0,
        "chunk, kvTokens, maxNumSeqs and maxNumQueued must be above 0"
    );
    ensure!((0.0..1.0).contains(&engine.noise), "noise must be 0 or more and below 1: it is {}", engine.noise);
    Ok(())
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct PolicyFile {
    min_replicas: Option<u32>,
    max_replicas: Option<u32>,
    slo: Option<SloFile>,
    target_utilization: Option<f64>,
    tolerance: Option<Pair>,
    headroom: Option<HeadroomFile>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SloFile {
    ttft: f64,
    itl: f64,
    attainment: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    up: f64,
    down: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeadroomFile {
    quantile: f64,
    max: f64,
}

impl PolicyFile {
    fn apply(self, case: &mut Case) {
        let policy: &mut Policy = &mut case.policy;
        policy.min_replicas = self.min_replicas.unwrap_or(policy.min_replicas);
        policy.max_replicas = self.max_replicas.unwrap_or(policy.max_replicas);
        policy.target_utilization = self.target_utilization.unwrap_or(policy.target_utilization);
        if let Some(Pair { up, down }) = self.tolerance {
            policy.tolerance = Tolerance { up, down };
        }
        if let Some(HeadroomFile { quantile, max }) = self.headroom {
            policy.headroom = Headroom { quantile, max };
        }
        if let Some(SloFile { ttft, itl, attainment }) = self.slo {
            policy.slo = Slo { ttft, itl, attainment };
            case.setting.slo = policy.slo;
        }
        case.setting.initial =
            case.setting.initial.clamp(policy.min_replicas, policy.max_replicas.max(policy.min_replicas));
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

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
        let error = loads(&flags(&["--scenario=S99"])).err().expect("refused").to_string();
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
}
