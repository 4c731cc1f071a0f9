//! The loop of the serving path without its clock: the engine's scheduler plans steps over its block pool, the executor
//! computes them, and the engine's sampler picks greedily.

use crate::engine::blocks::Blocks;
use crate::engine::scheduler::{Bounds, NewSequence, Pace, Scheduler, SequenceId, Step};
use crate::executor::{ExecuteError, Executor, LogitRows, SequenceStep};
use crate::model::ModelExecutor;
use crate::model::trace::Trace;
use crate::sampling::{Narrowing, Sampler, SamplingParams, Scratch};

use super::evaluate::{Figures, Sequence};

/// What is computed of each sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// Tokens to continue by.
    pub(super) generate: usize,
    /// Rows that go through the output head: every one, or those that a token is picked from.
    pub(super) rows: LogitRows,
    /// Whether to keep intermediate results.
    pub(super) trace: bool,
    /// Whether the first adapter applies.
    pub(super) adapter: bool,
}

/// What a step computed for one sequence.
pub(super) struct Computed<'a> {
    /// The sequence's place in the input.
    pub(super) index: usize,
    /// What ran.
    pub(super) step: &'a SequenceStep,
    /// The rows asked for, `[rows, vocab]`.
    pub(super) logits: &'a [f32],
    /// Intermediate results of the rows that ran, when wanted.
    pub(super) trace: Option<Trace>,
    /// Whether this was the sequence's last step; its blocks, in `step`, still hold all of it.
    pub(super) last: bool,
}

/// The continuation of a sequence, and how it came about.
#[derive(Debug)]
pub(super) struct Continuation {
    pub(super) tokens: Vec<u32>,
    /// The row that each token was picked from, `[tokens, vocab]`.
    pub(super) logits: Vec<f32>,
    pub(super) figures: Figures,
}

/// A sequence on its way.
struct Running {
    sampler: Sampler,
    continuation: Continuation,
    /// Tokens that ran at some time.
    furthest: usize,
}

/// An executor with a scheduler, whose prefix cache outlives a round.
pub(super) struct Serving<'a> {
    executor: &'a mut ModelExecutor,
    scheduler: Scheduler,
    wanted: Wanted,
    /// The place in the input of each living sequence, at the index of its id.
    places: Vec<usize>,
    step: Step,
    scratch: Scratch,
}

impl<'a> Serving<'a> {
    /// With an empty cache.
    pub(super) fn new(executor: &'a mut ModelExecutor, bounds: Bounds, wanted: Wanted) -> Self {
        // One run of one caller: nobody to keep cached prompts from, so the key of their hashes may be known.
        let pool = Blocks::new(executor.geometry().blocks, [0; 32]);
        let scheduler = Scheduler::new(bounds, pool);
        Self { executor, scheduler, wanted, places: Vec::new(), step: Step::default(), scratch: Scratch::default() }
    }

    /// Runs sequences that fit the executor side by side until each has its continuation. `each` is told of everything
    /// that is computed.
    ///
    /// # Errors
    /// [`ExecuteError`], and that of `each`.
    pub(super) fn round(
        &mut self,
        sequences: &[Sequence],
        each: &mut dyn FnMut(Computed<'_>) -> Result<(), ExecuteError>,
    ) -> Result<Vec<Continuation>, ExecuteError> {
        let mut running = sequences.iter().map(|sequence| self.running(sequence)).collect::<Result<Vec<_>, _>>()?;
        for (place, sequence) in sequences.iter().enumerate() {
            self.add(place, sequence);
        }
        while self.scheduler.has_work() {
            let mut step = std::mem::take(&mut self.step);
            self.turn(&mut step, &mut running, each)?;
            self.step = step;
        }
        Ok(running.into_iter().map(|running| running.continuation).collect())
    }

    fn running(&self, sequence: &Sequence) -> Result<Running, ExecuteError> {
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let sampler = Sampler::new(greedy, 0, self.executor.geometry().vocab, &sequence.ids, &[]);
        let sampler = sampler.map_err(|error| ExecuteError::Failed(error.to_string()))?;
        let continuation = Continuation { tokens: Vec::new(), logits: Vec::new(), figures: Figures::default() };
        Ok(Running { sampler, continuation, furthest: 0 })
    }

    fn add(&mut self, place: usize, sequence: &Sequence) {
        let SequenceId(id) = self.scheduler.add(NewSequence {
            tokens: sequence.ids.clone(),
            position_ids: sequence.positions.clone(),
            adapter: self.wanted.adapter.then_some(0),
            scope: Vec::new(),
            rank_micros: 0,
            tenant: "".into(),
            reading: None,
            generates: true,
        });
        if self.places.len() <= id {
            self.places.resize(id + 1, 0);
        }
        self.places[id] = place;
    }

    /// One step, from plan to the tokens that are picked.
    fn turn(
        &mut self,
        step: &mut Step,
        running: &mut [Running],
        each: &mut dyn FnMut(Computed<'_>) -> Result<(), ExecuteError>,
    ) -> Result<(), ExecuteError> {
        self.scheduler.plan(&Pace::UNLIMITED, step);
        if step.is_empty() {
            return Err(ExecuteError::Failed("the scheduler found nothing to do".to_owned()));
        }
        for id in &step.preempted {
            running[self.places[id.0]].continuation.figures.preemptions += 1;
        }
        for started in step.started.iter().filter(|started| started.first) {
            running[self.places[started.id.0]].continuation.figures.prefix_hit_tokens += started.cached;
        }
        if self.wanted.rows == LogitRows::All {
            step.plan.sequences.iter_mut().for_each(|sequence| sequence.logits = LogitRows::All);
        }
        let mut trace = self.wanted.trace.then(Trace::default);
        let output = self.executor.execute_traced(&step.plan, trace.as_mut())?;
        self.scheduler.commit(step);
        let mut first_row = 0;
        for ((part, ran), logits) in step.parts.iter().zip(&step.plan.sequences).zip(&output.logits) {
            let rows = first_row..first_row + part.rows;
            first_row = rows.end;
            let trace = trace.as_ref().map(|trace| trace.rows(rows, step.shape.tokens));
            let index = self.places[part.id.0];
            let last = self.advance(part.id, part.samples, ran, logits, &mut running[index])?;
            each(Computed { index, step: ran, logits, trace, last })?;
        }
        Ok(())
    }

    /// Takes note of what ran of a sequence, and picks its next token when one is due. Returns whether it has ended.
    fn advance(
        &mut self,
        id: SequenceId,
        samples: bool,
        ran: &SequenceStep,
        logits: &[f32],
        running: &mut Running,
    ) -> Result<bool, ExecuteError> {
        let Running { sampler, continuation, furthest } = running;
        let (start, end) = (ran.start as usize, ran.start as usize + ran.tokens.len());
        continuation.figures.steps += 1;
        continuation.figures.recomputed_tokens += end.min(*furthest).saturating_sub(start);
        *furthest = end.max(*furthest);
        if !samples {
            return Ok(false);
        }
        if continuation.tokens.len() < self.wanted.generate {
            let row = &logits[logits.len() - self.executor.geometry().vocab..];
            let position = continuation.tokens.len() as u32;
            let chosen = sampler.sample(&mut row.to_vec(), position, Narrowing::default(), &mut self.scratch);
            let chosen = chosen.map_err(|error| ExecuteError::Failed(error.to_string()))?;
            continuation.tokens.push(chosen.id);
            continuation.logits.extend_from_slice(row);
        }
        if continuation.tokens.len() < self.wanted.generate {
            self.scheduler.append(id, continuation.tokens[continuation.tokens.len() - 1]);
            return Ok(false);
        }
        self.scheduler.remove(id);
        Ok(true)
    }
}
