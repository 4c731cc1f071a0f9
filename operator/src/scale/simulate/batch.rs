//! One replica: continuous batching with chunked prefill, first come, first served.
//!
//! Steps that only decode follow each other in runs: while nobody joins or leaves, the times of steps form an arithmetic
//! sequence, so that a run of any length costs a handful of operations.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::engine::Engine;
use crate::scale::observation::Sample;

/// Index of a request.
pub type RequestId = u32;

/// What the batch must know of a request.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// Which request.
    pub id: RequestId,
    /// Prompt tokens.
    pub prompt: u32,
    /// Those of them that are in the prefix cache.
    pub cached: u32,
    /// Tokens to generate, at least 1.
    pub output: u32,
}

impl Job {
    fn reserve(&self) -> u64 {
        u64::from(self.prompt) + u64::from(self.output)
    }
}

/// What a step brought about.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Progress {
    /// A request got its first token.
    FirstToken(RequestId),
    /// A request got its last token.
    Finished(RequestId),
}

/// Steps that follow each other without change.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Seconds, on the simulation's clock.
    start: f64,
    /// Time of the first step, and how much longer each following one takes.
    first: f64,
    slope: f64,
    /// Number of steps.
    steps: u64,
    /// Prompt tokens in it: then it is one step.
    prompt: u64,
    /// Sequences that decode, and tokens that were resident at the beginning.
    sequences: u64,
    resident: u64,
}

impl Run {
    fn seconds(&self, steps: u64) -> f64 {
        let n = steps as f64;
        n * self.first + self.slope * n * (n - 1.0) / 2.0
    }

    /// Whole steps done at a time.
    fn done_at(&self, now: f64) -> u64 {
        let elapsed = now - self.start;
        if elapsed <= 0.0 {
            return 0;
        }
        // The root of slope/2·n² + (first − slope/2)·n = elapsed, and a correction for rounding.
        let (a, b) = (self.slope / 2.0, self.first - self.slope / 2.0);
        let root = if a > 1e-15 { ((b * b + 4.0 * a * elapsed).sqrt() - b) / (2.0 * a) } else { elapsed / b };
        let mut steps = (root as u64).min(self.steps);
        while steps < self.steps && self.seconds(steps + 1) <= elapsed {
            steps += 1;
        }
        while steps > 0 && self.seconds(steps) > elapsed {
            steps -= 1;
        }
        steps
    }
}

/// Totals since the start.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    accepted: u64,
    rejected: u64,
    finished: u64,
    prompt_tokens: u64,
    output_tokens: u64,
    steps: u64,
    step_seconds: f64,
    prefill_tokens: u64,
    decode_tokens: u64,
    kv_token_steps: u64,
    judged: u64,
    good: u64,
}

/// A replica's batch and queue.
#[derive(Debug, Default)]
pub struct Batch {
    waiting: VecDeque<Job>,
    /// Admitted, with the prompt tokens that are done.
    prefilling: VecDeque<(Job, u32)>,
    /// By the step of `clock` at which they end.
    decoding: BinaryHeap<Reverse<(u64, RequestId, u64, u32, u32)>>,
    /// Decode steps so far.
    clock: u64,
    resident: u64,
    reserved: u64,
    waiting_tokens: u64,
    prefilling_tokens: u64,
    run: Option<Run>,
    totals: Totals,
}

impl Batch {
    /// Requests that run or wait.
    pub fn len(&self) -> usize {
        self.waiting.len() + self.running()
    }

    /// Whether nothing runs or waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Requests that run.
    pub fn running(&self) -> usize {
        self.prefilling.len() + self.decoding.len()
    }

    /// Prompt tokens that are yet to be computed, a measure of the time to the next first token.
    pub fn prompt_ahead(&self) -> u64 {
        self.waiting_tokens + self.prefilling_tokens
    }

    /// Tokens of the cache that are promised to running requests.
    pub fn reserved(&self) -> u64 {
        self.reserved
    }

    /// Requests in the batch, running ones first.
    pub fn ids(&self) -> impl Iterator<Item = RequestId> + '_ {
        let running = self.decoding.iter().map(|Reverse((_, id, ..))| *id);
        running.chain(self.prefilling.iter().map(|(job, _)| job.id)).chain(self.waiting.iter().map(|job| job.id))
    }

    /// Takes a request into the queue; false when the queue is full.
    pub fn accept(&mut self, job: Job, engine: &Engine) -> bool {
        if self.waiting.len() >= engine.max_num_queued as usize {
            self.totals.rejected += 1;
            return false;
        }
        self.totals.accepted += 1;
        self.waiting_tokens += u64::from(job.prompt - job.cached);
        self.waiting.push_back(job);
        true
    }

    /// Whether the first in the queue may join now.
    fn may_admit(&self, engine: &Engine) -> bool {
        self.waiting.front().is_some_and(|job| {
            let fits = self.reserved + job.reserve() <= u64::from(engine.kv_tokens) || self.running() == 0;
            fits && self.running() < engine.max_num_seqs as usize
        })
    }

    /// Tells the batch that its queue changed at `now`. Returns when its next event is due, if that changed.
    pub fn poke(&mut self, now: f64, engine: &Engine, pace: f64) -> Option<f64> {
        let may_admit = self.may_admit(engine);
        match &mut self.run {
            None => self.begin(now, engine, pace),
            // A newcomer joins at the end of the step under way.
            Some(run) if may_admit && run.steps > 1 => {
                let steps = (run.done_at(now) + 1).min(run.steps);
                if steps == run.steps {
                    return None;
                }
                run.steps = steps;
                Some(run.start + run.seconds(steps))
            }
            Some(_) => None,
        }
    }

    /// Ends the run under way, which is due; reports into `progress`, and returns when the next is due.
    pub fn advance(&mut self, engine: &Engine, pace: f64, longest: f64, progress: &mut Vec<Progress>) -> Option<f64> {
        let run = self.run.take()?;
        let end = run.start + run.seconds(run.steps);
        self.count(&run, run.steps);
        self.resident += run.prompt + run.sequences * run.steps;
        self.clock += run.steps;
        self.prefill(run.prompt as u32, progress);
        while let Some(Reverse((clock, id, reserve, output, computed))) = self.decoding.peek().copied() {
            if clock > self.clock {
                break;
            }
            self.decoding.pop();
            self.leave(id, reserve, output, computed, progress);
        }
        let due = self.begin(end, engine, pace)?;
        // A long run is cut, so that an engine that drifts is looked at again.
        if due - end > longest
            && let Some(run) = &mut self.run
        {
            run.steps = run.done_at(end + longest).clamp(1, run.steps);
            return Some(end + run.seconds(run.steps));
        }
        Some(due)
    }

    /// Spends a step's prompt tokens, first come, first served.
    fn prefill(&mut self, mut tokens: u32, progress: &mut Vec<Progress>) {
        self.prefilling_tokens -= u64::from(tokens);
        while let Some((job, done)) = self.prefilling.front_mut() {
            let part = tokens.min(job.prompt - *done);
            *done += part;
            tokens -= part;
            if *done < job.prompt {
                break;
            }
            let job = *job;
            self.prefilling.pop_front();
            progress.push(Progress::FirstToken(job.id));
            let computed = job.prompt - job.cached;
            if job.output <= 1 {
                self.leave(job.id, job.reserve(), job.output, computed, progress);
            } else {
                let ends = self.clock + u64::from(job.output) - 1;
                self.decoding.push(Reverse((ends, job.id, job.reserve(), job.output, computed)));
            }
            if tokens == 0 {
                break;
            }
        }
    }

    fn leave(&mut self, id: RequestId, reserve: u64, output: u32, computed: u32, progress: &mut Vec<Progress>) {
        self.reserved -= reserve;
        // The last token is never fed back: it is not resident.
        self.resident -= reserve - 1;
        self.totals.finished += 1;
        self.totals.prompt_tokens += u64::from(computed);
        self.totals.output_tokens += u64::from(output);
        progress.push(Progress::Finished(id));
    }

    /// Admits who fits and plans the next run; returns when it ends.
    fn begin(&mut self, now: f64, engine: &Engine, pace: f64) -> Option<f64> {
        while self.may_admit(engine) {
            let Some(job) = self.waiting.pop_front() else { break };
            let uncached = u64::from(job.prompt - job.cached);
            self.waiting_tokens -= uncached;
            self.prefilling_tokens += uncached;
            self.reserved += job.reserve();
            self.resident += u64::from(job.cached);
            self.prefilling.push_back((job, job.cached));
        }
        let sequences = self.decoding.len() as u64;
        let run = if let Some((_, done)) = self.prefilling.front() {
            let prompt = self.prefilling_tokens.min(u64::from(engine.chunk));
            let first = engine.step(prompt as f64, f64::from(*done), sequences as f64, self.resident as f64) * pace;
            Run { start: now, first, slope: 0.0, steps: 1, prompt, sequences, resident: self.resident }
        } else {
            let Reverse((ends, ..)) = self.decoding.peek()?;
            let first = engine.step(0.0, 0.0, sequences as f64, self.resident as f64) * pace;
            let slope = engine.cost.resident_token * sequences as f64 * pace;
            let steps = ends - self.clock;
            Run { start: now, first, slope, steps, prompt: 0, sequences, resident: self.resident }
        };
        self.run = Some(run);
        Some(now + run.seconds(run.steps))
    }

    fn count(&mut self, run: &Run, steps: u64) {
        let totals = &mut self.totals;
        totals.steps += steps;
        totals.step_seconds += run.seconds(steps);
        totals.prefill_tokens += run.prompt;
        totals.decode_tokens += run.sequences * steps;
        totals.kv_token_steps += run.resident * steps + run.sequences * steps * steps.saturating_sub(1) / 2;
    }

    /// Counts a request that ended as judged.
    pub fn judge(&mut self, good: bool) {
        self.totals.judged += 1;
        self.totals.good += u64::from(good);
    }

    /// The metrics page at a time.
    pub fn sample(&self, now: f64, engine: &Engine) -> Sample {
        let mut sums = Totals { ..self.totals };
        let mut resident = self.resident;
        if let Some(run) = &self.run {
            let steps = run.done_at(now);
            let mut partly = Self { totals: sums, ..Self::default() };
            let prompt = if steps == run.steps { run.prompt } else { 0 };
            partly.count(&Run { prompt, ..*run }, steps);
            sums = partly.totals;
            resident += run.sequences * steps;
        }
        Sample {
            accepted: sums.accepted as f64,
            rejected: sums.rejected as f64,
            finished: sums.finished as f64,
            prompt_tokens: sums.prompt_tokens as f64,
            output_tokens: sums.output_tokens as f64,
            steps: sums.steps as f64,
            step_seconds: sums.step_seconds,
            prefill_tokens: sums.prefill_tokens as f64,
            decode_tokens: sums.decode_tokens as f64,
            kv_token_steps: sums.kv_token_steps as f64,
            judged: sums.judged as f64,
            good: sums.good as f64,
            running: self.running() as f64,
            waiting: self.waiting.len() as f64,
            kv_used: resident as f64,
            kv_capacity: f64::from(engine.kv_tokens),
            max_num_seqs: f64::from(engine.max_num_seqs),
            ..Sample::default()
        }
    }
}
