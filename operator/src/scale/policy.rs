//! What the user wants, checked.

use super::behavior::Behavior;
use super::schedule::Schedule;
use super::step_cost::StepCost;

/// The autoscaling policy of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Fewest replicas, at least 1.
    pub min_replicas: u32,
    /// Most replicas.
    pub max_replicas: u32,
    /// What users are promised.
    pub slo: Slo,
    /// Share of a replica's time that may be planned for, 0 to 1.
    pub target_utilization: f64,
    /// Relative change of the need that is ignored, up and down.
    pub tolerance: Tolerance,
    /// Spare capacity for what comes while a replica starts.
    pub headroom: Headroom,
    /// How fast replicas may change, as in HPA v2.
    pub behavior: Behavior,
    /// Times at which a floor holds.
    pub schedules: Vec<Schedule>,
    /// What to do without any data.
    pub fallback: Fallback,
    /// Seconds between two decisions; samples older than three of them are stale.
    pub polling_interval: f64,
    /// Seconds after which a backlog that waits for new replicas is to be gone, counted from their arrival; `None` for a
    /// quarter of a cold start.
    pub drain_horizon: Option<f64>,
    /// Seconds from a pod's creation to readiness, until some have been seen.
    pub cold_start: f64,
    /// Seconds after readiness in which a replica's steps teach nothing about its speed.
    pub warm_up: f64,
    /// What a step costs, until it has been measured.
    pub prior: StepCost,
    /// Prompt and output tokens of a request, until some have ended.
    pub first_guess: (f64, f64),
    /// Decide and explain, but change nothing.
    pub advisory: bool,
}

/// Service level objective.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slo {
    /// Seconds to the first token.
    pub ttft: f64,
    /// Seconds between two tokens.
    pub itl: f64,
    /// Share of requests that meet both, below 1.
    pub attainment: f64,
}

/// Relative changes of the need that are ignored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Upwards.
    pub up: f64,
    /// Downwards.
    pub down: f64,
}

/// How much demand to be ready for beyond what arrives now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Headroom {
    /// Share of cold starts during which demand must not outgrow what was ordered.
    pub quantile: f64,
    /// Largest factor.
    pub max: f64,
}

/// What to do without any data, as KEDA's `currentReplicasIfHigher`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fallback {
    /// Seconds without data before it applies.
    pub after: f64,
    /// Replicas to have at least; `None` to stay.
    pub replicas: Option<u32>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            min_replicas: 1,
            max_replicas: 1,
            slo: Slo { ttft: 3.0, itl: 0.1, attainment: 0.99 },
            target_utilization: 0.85,
            tolerance: Tolerance { up: 0.03, down: 0.1 },
            headroom: Headroom { quantile: 0.97, max: 2.0 },
            behavior: Behavior::default(),
            schedules: Vec::new(),
            fallback: Fallback { after: 15.0, replicas: None },
            polling_interval: 5.0,
            drain_horizon: None,
            cold_start: 120.0,
            warm_up: 10.0,
            prior: StepCost::default(),
            first_guess: (1000.0, 200.0),
            advisory: false,
        }
    }
}

/// Why a policy cannot be followed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PolicyError {
    /// Zero replicas need something that holds requests meanwhile.
    #[error("minReplicas is 0: scale to zero needs the gateway; set minReplicas to 1 or more")]
    Zero,
    /// The bounds are crossed.
    #[error("minReplicas {min} is above maxReplicas {max}: lower the one or raise the other")]
    Bounds {
        /// The lower one.
        min: u32,
        /// The upper one.
        max: u32,
    },
    /// A number is outside of its range.
    #[error("{field} is {value}: it must be {range}")]
    Range {
        /// Which number.
        field: &'static str,
        /// What it is.
        value: f64,
        /// What it may be.
        range: &'static str,
    },
    /// Neither direction is allowed.
    #[error(
        "behavior forbids scaling both up and down: remove one selectPolicy: Disabled, or remove autoscaling and set \
         replicas"
    )]
    Frozen,
}

impl Policy {
    /// Checks what the types do not. `decide` is total without it, but follows nonsense to the letter.
    ///
    /// # Errors
    ///
    /// The first field that makes no sense, with its value and what to write instead.
    pub fn check(&self) -> Result<(), PolicyError> {
        if self.min_replicas == 0 {
            return Err(PolicyError::Zero);
        }
        if self.min_replicas > self.max_replicas {
            return Err(PolicyError::Bounds { min: self.min_replicas, max: self.max_replicas });
        }
        if self.behavior.is_frozen() {
            return Err(PolicyError::Frozen);
        }
        let positive = "a finite number above 0";
        let share = "above 0 and below 1";
        let tolerance = "0 or more and below 1";
        let is_positive = |value: f64| value.is_finite() && value > 0.0;
        let is_share = |value: f64| value > 0.0 && value < 1.0;
        let is_tolerance = |value: f64| (0.0..1.0).contains(&value);
        let checks = [
            ("slo.ttft", self.slo.ttft, positive, is_positive(self.slo.ttft)),
            ("slo.itl", self.slo.itl, positive, is_positive(self.slo.itl)),
            ("slo.attainment", self.slo.attainment, share, is_share(self.slo.attainment)),
            ("targetUtilization", self.target_utilization, share, is_share(self.target_utilization)),
            ("tolerance.up", self.tolerance.up, tolerance, is_tolerance(self.tolerance.up)),
            ("tolerance.down", self.tolerance.down, tolerance, is_tolerance(self.tolerance.down)),
            ("headroom.quantile", self.headroom.quantile, share, is_share(self.headroom.quantile)),
            ("headroom.max", self.headroom.max, "1 or more", self.headroom.max >= 1.0 && self.headroom.max.is_finite()),
            ("pollingInterval", self.polling_interval, positive, is_positive(self.polling_interval)),
            ("coldStart", self.cold_start, positive, is_positive(self.cold_start)),
        ];
        match checks.into_iter().find(|(.., holds)| !holds) {
            Some((field, value, range, _)) => Err(PolicyError::Range { field, value, range }),
            None => Ok(()),
        }
    }
}
