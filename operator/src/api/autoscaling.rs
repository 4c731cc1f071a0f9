//! `spec.autoscaling` of an `ErnieModel`, with the rules that the API server checks.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Replicas from measured work: the operator keeps as many workers as the objective needs.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.minReplicas <= self.maxReplicas").message(
        "autoscaling.minReplicas is above autoscaling.maxReplicas: lower the one or raise the other"),
    validation = Rule::new("!has(self.schedules) || self.schedules.all(s, s.minReplicas <= self.maxReplicas)").message(
        "a schedule's minReplicas is above autoscaling.maxReplicas: lower the one or raise the other"),
)]
pub struct Autoscaling {
    /// Fewest workers.
    #[serde(default = "one")]
    #[schemars(range(max = 1000))]
    #[x_kube(validation = Rule::new("self >= 1").message(
        "autoscaling.minReplicas must be at least 1: without a gateway nothing holds requests while no worker runs; to run \
         none set spec.suspend"))]
    pub min_replicas: i32,
    /// Most workers.
    #[schemars(range(min = 1, max = 1000))]
    pub max_replicas: i32,
    /// What users are promised.
    #[serde(default)]
    pub slo: Slo,
    /// How fast the number of workers may change, in the form of HorizontalPodAutoscaler v2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behavior: Option<ScalingBehavior>,
    /// Times at which there are to be more workers than the load needs. Where several hold, the highest counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub schedules: Vec<Schedule>,
    /// Changes of the need that are too small to act on.
    #[serde(default)]
    pub tolerance: Tolerance,
    /// True decides and explains in status, and changes nothing.
    #[serde(default)]
    pub advisory: bool,
}

fn one() -> i32 {
    1
}

/// Service level objective.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Slo {
    /// Longest time to the first token, such as `3s`.
    #[serde(default = "default_ttft")]
    #[schemars(length(min = 2, max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]{1,9}([.][0-9]{1,9})?(ns|us|ms|s|m|h))+$') && self.matches('[1-9]')")
        .message("autoscaling.slo.ttft must be a duration above zero, such as 3s or 500ms"))]
    pub ttft: String,
    /// Longest mean time between two tokens of an answer, such as `100ms`.
    #[serde(default = "default_itl")]
    #[schemars(length(min = 2, max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]{1,9}([.][0-9]{1,9})?(ns|us|ms|s|m|h))+$') && self.matches('[1-9]')")
        .message("autoscaling.slo.itl must be a duration above zero, such as 100ms"))]
    pub itl: String,
    /// Share of the requests that keep both, such as `99%`.
    #[serde(default = "default_attainment")]
    #[schemars(length(min = 2, max = 8))]
    #[x_kube(validation = Rule::new("self.matches('^[5-9][0-9]([.][0-9]{1,3})?%$')").message(
        "autoscaling.slo.attainment must be a percentage from 50% to below 100%, such as 99% or 99.9%"))]
    pub attainment: String,
}

fn default_ttft() -> String {
    "3s".to_owned()
}

fn default_itl() -> String {
    "100ms".to_owned()
}

fn default_attainment() -> String {
    "99%".to_owned()
}

impl Default for Slo {
    fn default() -> Self {
        Self { ttft: default_ttft(), itl: default_itl(), attainment: default_attainment() }
    }
}

/// Changes of the need that are too small to act on.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Tolerance {
    /// Upwards.
    #[serde(default = "default_up")]
    #[schemars(length(min = 2, max = 8))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9]{1,2}([.][0-9]{1,3})?%$')").message(
        "autoscaling.tolerance.up must be a percentage below 100%, such as 3%"))]
    pub up: String,
    /// Downwards.
    #[serde(default = "default_down")]
    #[schemars(length(min = 2, max = 8))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9]{1,2}([.][0-9]{1,3})?%$')").message(
        "autoscaling.tolerance.down must be a percentage below 100%, such as 10%"))]
    pub down: String,
}

fn default_up() -> String {
    "3%".to_owned()
}

fn default_down() -> String {
    "10%".to_owned()
}

impl Default for Tolerance {
    fn default() -> Self {
        Self { up: default_up(), down: default_down() }
    }
}

/// How fast the number of workers may change, as in HorizontalPodAutoscaler v2.
#[derive(Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new(
    "!(has(self.scaleUp) && self.scaleUp.selectPolicy == 'Disabled' && has(self.scaleDown) \
     && self.scaleDown.selectPolicy == 'Disabled')").message(
    "autoscaling.behavior forbids scaling both up and down: remove one selectPolicy: Disabled, or remove autoscaling and set \
     replicas"))]
pub struct ScalingBehavior {
    /// Upwards. By default tenfold or by 10 workers in 15 s, without a window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_up: Option<ScalingRules>,
    /// Downwards. By default by half or by one worker in 60 s, after a window that is learnt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_down: Option<ScalingRules>,
}

/// Rules of one direction.
#[derive(Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ScalingRules {
    /// Seconds over which the most cautious recommendation counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3600))]
    pub stabilization_window_seconds: Option<i32>,
    /// Which of several policies counts: the one that allows most change, the one that allows least, or `Disabled` for no
    /// change in this direction.
    #[serde(default)]
    pub select_policy: SelectPolicy,
    /// Bounds of the change within a period; by default those of the direction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "atomic"))]
    pub policies: Vec<ScalingPolicy>,
}

/// Which of several policies counts.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum SelectPolicy {
    /// The one that allows most change.
    #[default]
    Max,
    /// The one that allows least.
    Min,
    /// No change in this direction.
    Disabled,
}

/// A bound of the change within a period.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ScalingPolicy {
    /// Unit of the value.
    #[serde(rename = "type")]
    pub kind: ScalingPolicyType,
    /// How many workers or percent.
    #[schemars(range(min = 1, max = 100_000))]
    pub value: i32,
    /// Length of the period.
    #[schemars(range(min = 1, max = 1800))]
    pub period_seconds: i32,
}

/// Unit of a bound.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum ScalingPolicyType {
    /// Workers.
    Pods,
    /// Percent of the workers at the beginning of the period.
    Percent,
}

/// A floor that holds from each time that a cron expression names.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Schedule {
    /// Cron expression of five fields: minute, hour, day of month, month, day of week.
    #[schemars(length(min = 9, max = 128))]
    pub schedule: String,
    /// Name of the IANA time zone database.
    #[serde(default = "utc")]
    #[schemars(length(min = 1, max = 64))]
    pub time_zone: String,
    /// How long the floor holds, at most 7 days.
    #[schemars(length(min = 2, max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]{1,9}([.][0-9]{1,9})?(ns|us|ms|s|m|h))+$') && self.matches('[1-9]')")
        .message("a schedule's duration must be above zero, such as 10h or 90m"))]
    pub duration: String,
    /// Fewest workers meanwhile.
    #[schemars(range(min = 1, max = 1000))]
    pub min_replicas: i32,
}

fn utc() -> String {
    "UTC".to_owned()
}
