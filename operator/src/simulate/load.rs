//! What is simulated: scenarios and traces, and files that say otherwise.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;

use super::Simulate;
use crate::scale::policy::{Headroom, Policy, Slo, Tolerance};
use crate::scale::simulate::Request;
use crate::scale::simulate::engine::Engine;
use crate::scale::simulate::routing::Routing;
use crate::scale::simulate::scenario::{ALL, Case, Scenario};

/// What is simulated: a scenario, or a trace with a name.
#[derive(Debug)]
pub(super) struct Load {
    /// Name of the scenario or the file.
    pub name: String,
    /// The scenario, unless it is a trace.
    pub scenario: Option<Scenario>,
    /// Requests of the trace, where there is one.
    pub requests: Vec<Request>,
}

/// All loads that the flags name, and for each scenario that `all` would have and whose trace is not here, a sentence.
///
/// # Errors
///
/// A name that does not exist, a trace that cannot be read, or one that is not here for a scenario that was asked for by name.
pub(super) fn loads(flags: &Simulate) -> anyhow::Result<(Vec<Load>, Vec<String>)> {
    if let Some(path) = &flags.trace {
        let name = path.file_stem().map_or_else(|| "trace".to_owned(), |stem| stem.to_string_lossy().into_owned());
        return Ok((vec![Load { name, scenario: None, requests: read_trace(path)? }], Vec::new()));
    }
    let (mut loads, mut missing) = (Vec::new(), Vec::new());
    for name in &flags.scenario {
        if name != "all" {
            loads.push(load(Scenario::from_name(name).map_err(anyhow::Error::msg)?)?);
            continue;
        }
        for scenario in ALL {
            match scenario.trace().map(shared) {
                Some(Err(absent)) => missing.push(format!("{scenario:?} ({}) is LEFT OUT: {absent}", scenario.title())),
                _ => loads.push(load(scenario)?),
            }
        }
    }
    Ok((loads, missing))
}

fn load(scenario: Scenario) -> anyhow::Result<Load> {
    let requests = match scenario.trace() {
        None => Vec::new(),
        Some(file) => read_trace(&shared(file)?)?,
    };
    Ok(Load { name: format!("{scenario:?}"), scenario: Some(scenario), requests })
}

/// The folder of published traces: `$ERNIE_SHARED/traces`, or `../shared/traces` beside the checkout.
pub(super) fn shared(file: &str) -> anyhow::Result<PathBuf> {
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

/// The load on its cluster, with what the files of the flags say.
///
/// # Errors
///
/// A file that cannot be read, or that makes no sense.
pub(super) fn case(flags: &Simulate, load: &Load, routing: Routing, seed: u64) -> anyhow::Result<Case> {
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
