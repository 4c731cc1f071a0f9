//! Ports, paths, labels and annotations shared by the operator, the worker and the tests.

/// Port of the inference services (gRPC over cleartext HTTP/2).
pub const GRPC_PORT: u16 = 8033;
/// Name of the inference port on pods and Services.
pub const GRPC_PORT_NAME: &str = "grpc";
/// Port of the HTTP side: probes, metrics, version, plan.
pub const HTTP_PORT: u16 = 8080;
/// Name of the HTTP port on pods and Services.
pub const HTTP_PORT_NAME: &str = "http";
/// Port reserved for administration; never on a Service.
pub const ADMIN_PORT: u16 = 8034;

/// Liveness: the process turns its event loop, and no forward pass hangs.
pub const LIVEZ: &str = "/livez";
/// Readiness: the model is loaded, has run a forward pass, and the worker is not draining.
pub const READYZ: &str = "/readyz";
/// Prometheus metrics.
pub const METRICS: &str = "/metrics";
/// Build version as JSON.
pub const VERSION: &str = "/version";
/// The memory plan of the loaded model as JSON.
pub const PLAN: &str = "/plan";

/// API group of the custom resources.
pub const GROUP: &str = "serving.ernie.io";
/// Name of the `ErnieModel` that a child belongs to.
pub const MODEL_LABEL: &str = "serving.ernie.io/model";
/// Rollout track of a pod: [`TRACK_STABLE`], later also a canary.
pub const TRACK_LABEL: &str = "serving.ernie.io/track";
/// Value of [`TRACK_LABEL`] on the pods of the main Deployment.
pub const TRACK_STABLE: &str = "stable";
/// Rank of a pod in its group; only rank [`RANK_LEADER`] is addressed by Services.
pub const RANK_LABEL: &str = "serving.ernie.io/rank";
/// Value of [`RANK_LABEL`] on pods that clients talk to.
pub const RANK_LEADER: &str = "0";

/// Where the worker container finds the model folder.
pub const MODEL_DIR: &str = "/models/model";
/// Where the kubelet reads a container's last words.
pub const TERMINATION_LOG: &str = "/dev/termination-log";
/// Longest termination message in bytes: the kubelet keeps the last 4 KiB of the file.
pub const TERMINATION_MESSAGE_LIMIT: usize = 3 * 1024;

/// Seconds during which a worker told to stop keeps accepting, because endpoint removal races with the signal.
pub const LAME_DUCK_SECONDS: u64 = 5;
/// Default of `spec.drain.timeoutSeconds`: how long running streams may finish.
pub const DEFAULT_DRAIN_SECONDS: u64 = 120;
/// Mean age in seconds after which a connection is asked to go away, so that clients find new replicas.
pub const CONNECTION_AGE_SECONDS: u64 = 60;
/// Requests that a worker runs at once when it is not told otherwise.
pub const DEFAULT_MAX_NUM_SEQS: usize = 64;
