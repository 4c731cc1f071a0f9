//! The worker as its clients see it: a real model behind real ports, in this process or in one of its own.

#[path = "serving/adapters.rs"]
mod adapters;
#[path = "serving/bad_input.rs"]
mod bad_input;
#[path = "serving/bench.rs"]
mod bench;
#[path = "serving/cancel.rs"]
mod cancel;
#[path = "serving/constraints.rs"]
mod constraints;
#[path = "serving/drain.rs"]
mod drain;
#[path = "serving/embed.rs"]
mod embed;
#[path = "serving/limits.rs"]
mod limits;
#[path = "serving/numbers.rs"]
mod numbers;
#[path = "serving/observe.rs"]
mod observe;
#[path = "serving/order.rs"]
mod order;
#[path = "serving/process.rs"]
mod process;
#[path = "serving/resume.rs"]
mod resume;
#[path = "serving/running.rs"]
mod running;
#[path = "serving/sampling.rs"]
mod sampling;
#[path = "serving/schemas.rs"]
mod schemas;
#[path = "serving/score.rs"]
mod score;
#[path = "serving/soak.rs"]
mod soak;
#[path = "serving/start_up.rs"]
mod start_up;
#[path = "serving/streaming.rs"]
mod streaming;
#[path = "serving/thinking.rs"]
mod thinking;
#[path = "serving/validator.rs"]
mod validator;
