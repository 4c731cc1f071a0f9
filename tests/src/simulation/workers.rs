//! Workers that serve a load and show its metrics, as far as the autoscaler reads them.
//!
//! A step costs exactly what the autoscaler's law says. Requests come at a steady rate and are spread evenly; what a worker
//! cannot take in waits.

use std::collections::HashMap;
use std::fmt::Write;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ernie_operator::autoscale::{Absence, Fetch};
use futures::FutureExt;

/// Tokens of a prompt and of an answer.
const PROMPT: f64 = 100.0;
const ANSWER: f64 = 20.0;
/// Seconds of a step: of any, for each prompt token, and for each sequence.
const BASE: f64 = 0.02;
const PREFILL: f64 = 1e-4;
const SEQUENCE: f64 = 1e-3;
/// Work of a request, in seconds.
const WORK: f64 = PREFILL * PROMPT + SEQUENCE * ANSWER;
/// Requests that run at once at most, and the share of its time that a worker computes then.
const RUNNING: f64 = 64.0;
const BUSIEST: f64 = RUNNING * WORK / (ANSWER * BASE + RUNNING * WORK);
/// Requests that wait at most; more are refused.
const QUEUE: f64 = 256.0;

/// What is wrong with the pages of workers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PageFault {
    /// The port is closed.
    Refused,
    /// Nothing is ever answered.
    Hang,
    /// The page is no page.
    Garbage,
    /// The page is endless.
    Huge,
    /// Numbers are none.
    NotANumber,
    /// Counters begin again every 20 s, and nothing says so.
    Reset,
    /// Another model's worker answers at the address.
    Foreign,
}

impl PageFault {
    /// Every fault.
    pub const ALL: [PageFault; 7] = [
        PageFault::Refused,
        PageFault::Hang,
        PageFault::Garbage,
        PageFault::Huge,
        PageFault::NotANumber,
        PageFault::Reset,
        PageFault::Foreign,
    ];
}

/// The workers of a cluster, by the address of their pod.
#[derive(Clone, Debug, Default)]
pub struct Workers {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    workers: HashMap<IpAddr, Worker>,
    begun: u32,
    fault: Option<PageFault>,
    faulty: Option<IpAddr>,
    turns: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Worker {
    process: u32,
    waiting: f64,
    running: f64,
    rejected: f64,
    finished: f64,
    late: f64,
    steps: f64,
    step_seconds: f64,
    resident_steps: f64,
}

impl Workers {
    /// The most requests per second that one worker takes in.
    pub fn most() -> f64 {
        BUSIEST / WORK
    }

    /// Lets workers at these addresses serve so many requests per second together; others end.
    pub fn serve(&self, addresses: &[IpAddr], rate: f64, seconds: f64) {
        let mut shared = self.lock();
        shared.workers.retain(|address, _| addresses.contains(address));
        for address in addresses {
            let begun = shared.begun + 1;
            let worker = shared.workers.entry(*address).or_insert(Worker { process: begun, ..Worker::default() });
            worker.serve(rate / addresses.len() as f64, seconds);
            shared.begun = begun;
        }
        shared.turns += 1;
        let (faulty, resets) =
            (shared.faulty, shared.fault == Some(PageFault::Reset) && shared.turns.is_multiple_of(4));
        let broken = shared.workers.iter_mut().filter(|(address, _)| faulty.is_none_or(|faulty| faulty == **address));
        for (_, worker) in broken.filter(|_| resets) {
            let Worker { process, waiting, running, .. } = *worker;
            *worker = Worker { process, waiting, running, ..Worker::default() };
        }
    }

    /// From now on, pages of all workers are wrong in this way, or right.
    pub fn break_pages(&self, fault: Option<PageFault>) {
        let mut shared = self.lock();
        (shared.fault, shared.faulty) = (fault, None);
    }

    /// From now on, pages of one worker are wrong in this way.
    pub fn break_page(&self, address: IpAddr, fault: PageFault) {
        let mut shared = self.lock();
        (shared.fault, shared.faulty) = (Some(fault), Some(address));
    }

    /// Another process takes the place of the one at an address, with counters as high as after a long life.
    pub fn replace(&self, address: IpAddr) {
        let mut shared = self.lock();
        shared.begun += 1;
        let process = shared.begun;
        if let Some(worker) = shared.workers.get_mut(&address) {
            let rate = Self::most() / 2.0;
            let mut older = Worker { process, ..Worker::default() };
            older.serve(rate, 100_000.0);
            *worker = older;
        }
    }

    /// How the operator reads them.
    pub fn fetch(&self) -> Fetch {
        let workers = self.clone();
        Fetch::new(move |address| {
            let shared = workers.lock();
            let fault = shared.fault.filter(|_| shared.faulty.is_none_or(|faulty| faulty == address));
            let worker = shared.workers.get(&address).copied();
            drop(shared);
            async move {
                let Some(worker) = worker else { return Err(refused()) };
                match fault {
                    None | Some(PageFault::Reset) => Ok(worker.page("m").into_bytes()),
                    Some(PageFault::Refused) => Err(refused()),
                    Some(PageFault::Hang) => std::future::pending().await,
                    Some(PageFault::Garbage) => Ok(b"\xff\xfe<html>".to_vec()),
                    Some(PageFault::Huge) => Err(Absence::TooLarge),
                    Some(PageFault::NotANumber) => Ok(worker
                        .page("m")
                        .replace("num_requests_waiting{model_name=\"m\"} ", "num_requests_waiting NaN ")
                        .into_bytes()),
                    Some(PageFault::Foreign) => Ok(worker.page("other").into_bytes()),
                }
            }
            .boxed()
        })
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refused() -> Absence {
    Absence::Unreachable("Connection refused (os error 111)".to_owned())
}

impl Worker {
    fn serve(&mut self, rate: f64, seconds: f64) {
        let most = BUSIEST / WORK * seconds;
        let arrived = rate * seconds;
        let served = (arrived + self.waiting).min(most);
        let left = arrived + self.waiting - served;
        self.waiting = left.min(QUEUE).round();
        self.rejected += (left - QUEUE).max(0.0).round();
        // Steps fill the time as long as there is anything to do; none is shorter than the base.
        let busy = served * WORK / seconds;
        let steps = if served > 0.0 { seconds * (1.0 - busy) / BASE } else { 0.0 };
        self.running = (served * ANSWER / steps.max(1.0)).ceil().min(RUNNING);
        self.finished += served;
        self.late += if self.waiting > 0.0 { served } else { 0.0 };
        self.steps += steps;
        self.step_seconds += steps * BASE + served * WORK;
        self.resident_steps += served * ANSWER * (PROMPT + ANSWER / 2.0);
    }

    fn page(&self, model: &str) -> String {
        let mut page = String::new();
        let label = format!("model_name=\"{model}\"");
        let mut line = |name: &str, labels: &str, value: f64| {
            let _ = writeln!(page, "{name}{{{label}{labels}}} {value}");
        };
        line("vllm:num_requests_running", "", self.running);
        line("vllm:num_requests_waiting", "", self.waiting);
        line("vllm:kv_cache_usage_perc", "", (self.running * PROMPT / 160_000.0).min(1.0));
        line("vllm:cache_config_info", ",block_size=\"16\",num_gpu_blocks=\"10000\"", 1.0);
        line("vllm:admission_rejections_total", ",reason=\"max_num_queued_reqs\"", self.rejected);
        line("vllm:request_success_total", ",finished_reason=\"stop\"", self.finished);
        line("vllm:request_prefill_kv_computed_tokens_sum", "", self.finished * PROMPT);
        line("vllm:request_generation_tokens_sum", "", self.finished * ANSWER);
        line("ernie:steps_total", "", self.steps);
        line("ernie:step_seconds_total", ",part=\"forward\"", self.step_seconds);
        line("ernie:step_tokens_total", ",kind=\"prefill\"", self.finished * PROMPT);
        line("ernie:step_tokens_total", ",kind=\"decode\"", self.finished * ANSWER);
        line("ernie:kv_token_steps_total", "", self.resident_steps);
        for name in ["vllm:time_to_first_token_seconds", "vllm:request_time_per_output_token_seconds"] {
            let late = if name.starts_with("vllm:time") { self.late } else { 0.0 };
            line(&format!("{name}_bucket"), ",le=\"0.05\"", self.finished - late);
            line(&format!("{name}_bucket"), ",le=\"+Inf\"", self.finished);
            line(&format!("{name}_count"), "", self.finished);
        }
        let _ = writeln!(page, "process_start_time_seconds {}", self.process);
        page
    }
}
