//! PURE: which tokens of which sequences run in the next step.
//!
//! There is no prefill phase and no decode phase: a sequence has tokens, of which some are in the cache, and a step runs
//! some of those that are not. [`Scheduler::plan`] fills a step in this order:
//!
//! 1. sequences that miss one token (they decode), each of them, in order of rank. One that needs a block when none is
//!    free preempts the sequence that comes last: its blocks are released, and it waits to be computed again;
//! 2. running sequences that miss more (they read prompts), in pieces that fit the step's pace;
//! 3. waiting sequences, while there are places, blocks and room in the step.
//!
//! The first sequence in rank is never preempted by another, and every sequence fits the pool alone, so there is always
//! progress.

use std::sync::Arc;

use slab::Slab;

use crate::executor::BLOCK_TOKENS;

use super::blocks::Blocks;
use super::cost::StepCost;
use super::queue::{DECODE_WEIGHT, PREFILL_WEIGHT, Queue};
use super::sequence::{Chain, Positions, Residence, Sequence, Stage};
pub use super::sequence::{Rank, RowReading, RowReadingKind, SequenceId};
pub use super::step::{Part, Started, Step};

/// Limits of a step.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Most sequences that hold blocks.
    pub max_num_seqs: usize,
    /// Most tokens in one step; at least `max_num_seqs`.
    pub max_num_batched_tokens: usize,
    /// Most tokens of one prompt in one step, at least 1.
    pub long_prefill_token_threshold: usize,
    /// Looks for prompts in the prefix cache.
    pub prefix_caching: bool,
}

/// How long a step may last.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// What steps cost.
    pub cost: StepCost,
    /// Seconds that a step may last while sequences decode.
    pub target: f64,
}

impl Pace {
    /// Steps are as large as the [`Bounds`] allow, however long they last.
    pub const UNLIMITED: Pace =
        Pace { cost: StepCost { base: 1e-9, per_token: 0.0, per_sequence: 0.0, per_context: 0.0 }, target: 1.0 };
}

/// A sequence to be scheduled.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// Prompt, and output that was emitted earlier; at least one token, and no more than fit the pool together with
    /// everything that will be appended.
    pub tokens: Vec<u32>,
    /// Positions of the prompt when they are not `0..`. Keeps the sequence out of the prefix cache.
    pub position_ids: Option<Vec<u32>>,
    /// Index of its adapter.
    pub adapter: Option<u32>,
    /// Everything that separates cached prompts: tenant, salt, model, adapter.
    pub scope: Vec<Vec<u8>>,
    /// Arrival in microseconds, plus priority times ageing.
    pub rank_micros: i64,
    /// Whose it is.
    pub tenant: Arc<str>,
    /// What is read off its rows, beside the token that is sampled from the last one.
    pub reading: Option<RowReading>,
    /// Whether a token is sampled at its end. Otherwise it is to be [removed](Scheduler::remove) once all of it ran.
    pub generates: bool,
}

/// Rows of a prompt that a step reads at least, whatever it costs, so that prompts make progress.
const LEAST_CHUNK: usize = BLOCK_TOKENS;
/// A step in which nothing decodes may last so many times longer.
const IDLE_PACE: f64 = 4.0;
/// Rows of prompts in a step while its cost is unknown.
const UNKNOWN_CHUNK: usize = 256;

/// Decides what runs. Owns the block pool and every sequence's tokens.
#[derive(Debug)]
pub struct Scheduler {
    bounds: Bounds,
    pool: Blocks,
    sequences: Slab<Sequence>,
    /// Sequences that hold blocks, in order of rank.
    running: Vec<usize>,
    queue: Queue,
    serial: u64,
    found: Vec<u32>,
}

impl Scheduler {
    /// With no sequence yet.
    pub fn new(bounds: Bounds, pool: Blocks) -> Self {
        Self {
            bounds,
            pool,
            sequences: Slab::new(),
            running: Vec::new(),
            queue: Queue::default(),
            serial: 0,
            found: Vec::new(),
        }
    }

    /// Adds a sequence to the queue.
    pub fn add(&mut self, new: NewSequence) -> SequenceId {
        let NewSequence { tokens, position_ids, adapter, scope, rank_micros, tenant, reading, generates } = new;
        let rank = Rank { micros: rank_micros, serial: self.serial };
        self.serial += 1;
        let tenant = self.queue.join(&tenant);
        let cached = self.bounds.prefix_caching && position_ids.is_none();
        let chain = cached.then(|| {
            let parts: Vec<&[u8]> = scope.iter().map(Vec::as_slice).collect();
            Chain::new(self.pool.root(&parts))
        });
        let positions = position_ids.map(Positions::new);
        let id = SequenceId(self.sequences.insert(Sequence {
            tokens,
            positions,
            adapter,
            rank,
            tenant,
            chain,
            reading,
            generates,
            paused: false,
            started: false,
            stage: Stage::Waiting,
        }));
        self.queue.push(tenant, rank, id);
        id
    }

    /// Forgets a sequence, wherever it is in its life.
    pub fn remove(&mut self, id: SequenceId) {
        let sequence = self.sequences.remove(id.0);
        match sequence.stage {
            Stage::Waiting => self.queue.remove(sequence.tenant, sequence.rank),
            Stage::Running(residence) => {
                self.running.retain(|&other| other != id.0);
                release(&mut self.pool, &residence.blocks);
            }
        }
        self.queue.leave(sequence.tenant);
    }

    /// Keeps a sequence out of steps until it is [resumed](Self::resume). It keeps its blocks for as long as nobody
    /// needs them.
    pub fn pause(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id.0];
        sequence.paused = true;
        if let Stage::Waiting = sequence.stage {
            self.queue.remove(sequence.tenant, sequence.rank);
        }
    }

    /// Lets a paused sequence take part again.
    pub fn resume(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id.0];
        sequence.paused = false;
        if let Stage::Waiting = sequence.stage {
            self.queue.push(sequence.tenant, sequence.rank, id);
        }
    }

    /// Appends a sampled token to a sequence whose tokens are all in the cache. Until then it takes part in no step, and keeps
    /// its place and its blocks unless it is preempted.
    pub fn append(&mut self, id: SequenceId, token: u32) {
        self.sequences[id.0].tokens.push(token);
    }

    /// Rows that something is still to be read off.
    pub fn rows_unread(&self, id: SequenceId) -> usize {
        self.sequences[id.0].reading.as_ref().map_or(0, |reading| reading.rows.len())
    }

    /// Keeps the sum of the hidden states read so far.
    pub fn keep_sum(&mut self, id: SequenceId, so_far: Vec<f64>) {
        let reading = self.sequences[id.0].reading.as_mut();
        if let Some(RowReadingKind::HiddenSum { sum }) = reading.map(|reading| &mut reading.kind) {
            *sum = so_far;
        }
    }

    /// Fills `step` with what runs next; empty when nothing can.
    pub fn plan(&mut self, pace: &Pace, step: &mut Step) {
        step.clear();
        self.decode(step);
        self.read_prompts(pace, step);
        self.admit(pace, step);
    }

    /// Takes note that a step was computed. Must come before tokens are appended or sequences removed.
    pub fn commit(&mut self, step: &Step) {
        for part in &step.parts {
            let sequence = &mut self.sequences[part.id.0];
            let weight = if part.rows == 1 { DECODE_WEIGHT } else { PREFILL_WEIGHT };
            self.queue.charge(sequence.tenant, weight * part.rows as u64);
            if let Stage::Running(residence) = &mut sequence.stage {
                residence.computed += part.rows;
                if let Some(reading) = &mut sequence.reading {
                    reading.rows.start += part.reads;
                }
                sequence.publish(&mut self.pool);
            }
        }
    }

    /// Sequences that hold blocks.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that hold none.
    pub fn waiting(&self) -> usize {
        self.sequences.len() - self.running.len()
    }

    /// Whether any sequence could take part in a step.
    pub fn has_work(&self) -> bool {
        let could_run = |sequence: &Sequence| !sequence.paused && sequence.missing() > 0;
        !self.queue.is_empty() || self.running.iter().any(|&id| could_run(&self.sequences[id]))
    }

    /// The pool.
    pub fn pool(&self) -> &Blocks {
        &self.pool
    }

    /// Prompt and output of a sequence so far.
    pub fn tokens(&self, id: SequenceId) -> &[u32] {
        &self.sequences[id.0].tokens
    }

    /// 1. Every sequence that misses one token runs it.
    fn decode(&mut self, step: &mut Step) {
        let mut index = 0;
        while let Some(&id) = self.running.get(index) {
            let sequence = &self.sequences[id];
            if sequence.paused || sequence.missing() != 1 {
                index += 1;
                continue;
            }
            let full = sequence.computed() == sequence.blocks().len() * BLOCK_TOKENS;
            if full && !self.grow(&mut index, step) {
                continue;
            }
            step.push(SequenceId(id), &self.sequences[id], 1);
            step.decode_rows += 1;
            index += 1;
        }
    }

    /// Gives one more block to the running sequence at `index`, which follows it when sequences before it are preempted.
    /// `false`: the sequence itself was the last in line, and was preempted.
    fn grow(&mut self, index: &mut usize, step: &mut Step) -> bool {
        loop {
            if let Some(block) = self.pool.take() {
                if let Stage::Running(residence) = &mut self.sequences[self.running[*index]].stage {
                    residence.blocks.push(block);
                }
                return true;
            }
            // Whoever is paused cannot use its blocks anyway; otherwise the last in line gives way. Those before `index`
            // that are not paused are in the step already, and come before the last in line.
            let victim = self.last_paused().unwrap_or(self.running.len() - 1);
            self.preempt(victim, step);
            match victim.cmp(index) {
                std::cmp::Ordering::Less => *index -= 1,
                std::cmp::Ordering::Equal => return false,
                std::cmp::Ordering::Greater => {}
            }
        }
    }

    fn last_paused(&self) -> Option<usize> {
        self.running.iter().rposition(|&id| self.sequences[id].paused)
    }

    /// Sends the running sequence at `index` back to the queue.
    fn preempt(&mut self, index: usize, step: &mut Step) {
        let id = self.running.remove(index);
        let sequence = &mut self.sequences[id];
        if let Stage::Running(residence) = std::mem::replace(&mut sequence.stage, Stage::Waiting) {
            release(&mut self.pool, &residence.blocks);
        }
        if !sequence.paused {
            self.queue.push(sequence.tenant, sequence.rank, SequenceId(id));
        }
        step.preempted.push(SequenceId(id));
    }

    /// 2. Running sequences that miss more than one token run a piece.
    fn read_prompts(&mut self, pace: &Pace, step: &mut Step) {
        if step.decode_rows == self.running.len() {
            return;
        }
        let reads = |sequence: &Sequence| !sequence.paused && sequence.missing() > 1;
        let running = self.running.iter().map(|&id| &self.sequences[id]);
        let mut behind: usize = running.filter(|sequence| reads(sequence)).map(Sequence::missing).sum();
        behind += self.next_to_admit().map_or(0, |id| self.sequences[id.0].missing());
        for index in 0..self.running.len() {
            let id = self.running[index];
            let sequence = &self.sequences[id];
            if !reads(sequence) {
                continue;
            }
            behind -= sequence.missing();
            let rows = self.chunk(pace, step, sequence, sequence.computed(), behind);
            if rows == 0 {
                return;
            }
            step.push(SequenceId(id), sequence, rows);
        }
    }

    /// 3. Waiting sequences start, in order.
    fn admit(&mut self, pace: &Pace, step: &mut Step) {
        while let Some(id) = self.queue.head() {
            if step.shape.tokens == self.bounds.max_num_batched_tokens {
                return;
            }
            if self.running.len() == self.bounds.max_num_seqs {
                let Some(paused) = self.last_paused() else { return };
                self.preempt(paused, step);
            }
            let mut found = std::mem::take(&mut self.found);
            found.clear();
            self.sequences[id.0].find_prefix(&self.pool, &mut found);
            let started = self.start(id, &found, pace, step);
            self.found = found;
            if !started {
                return;
            }
        }
    }

    /// Starts a waiting sequence behind the blocks found for it, if step and pool have room.
    fn start(&mut self, id: SequenceId, found: &[u32], pace: &Pace, step: &mut Step) -> bool {
        let sequence = &self.sequences[id.0];
        let computed = found.len() * BLOCK_TOKENS;
        let behind = 0;
        let rows = self.chunk(pace, step, sequence, computed, behind);
        // Its blocks are taken all at once, so that a prompt being read never has to wait for one.
        let fresh = sequence.tokens.len().div_ceil(BLOCK_TOKENS) - found.len();
        if rows == 0 || !self.make_room(found, fresh, step) {
            return false;
        }
        let mut blocks = found.to_vec();
        for &block in found {
            self.pool.share(block);
        }
        // There are enough free blocks: `make_room` has seen them.
        blocks.extend((0..fresh).map_while(|_| self.pool.take()));
        let sequence = &mut self.sequences[id.0];
        let first = !std::mem::replace(&mut sequence.started, true);
        sequence.stage = Stage::Running(Residence { blocks, computed, published: found.len() });
        self.queue.remove(sequence.tenant, sequence.rank);
        let rank = sequence.rank;
        let place = self.running.partition_point(|&other| self.sequences[other].rank < rank);
        self.running.insert(place, id.0);
        step.started.push(Started { id, cached: computed, first });
        step.push(id, &self.sequences[id.0], rows);
        true
    }

    /// Whether `fresh` blocks can be taken beside those found, and still leave one for each running sequence, which will
    /// soon need it. Paused sequences give way.
    fn make_room(&mut self, found: &[u32], fresh: usize, step: &mut Step) -> bool {
        loop {
            let found_free = found.iter().filter(|&&block| self.pool.is_free(block)).count();
            if self.pool.free() >= fresh + found_free + self.running.len() {
                return true;
            }
            let Some(paused) = self.last_paused() else { return false };
            self.preempt(paused, step);
        }
    }

    /// The waiting sequence that could start in this step.
    fn next_to_admit(&self) -> Option<SequenceId> {
        self.queue.head().filter(|_| self.running.len() < self.bounds.max_num_seqs)
    }

    /// How many rows of the sequence, from `start` on, the step takes, when `behind` more rows wait for their turn. A long
    /// prompt leaves up to half of the room to those behind it, so that short ones need not wait until it is read.
    fn chunk(&self, pace: &Pace, step: &Step, sequence: &Sequence, start: usize, behind: usize) -> usize {
        let missing = sequence.tokens.len() - start;
        let target = if step.decode_rows > 0 { pace.target } else { pace.target * IDLE_PACE };
        let paced = pace.cost.rows_within(step.shape, start, sequence.scores_after(start), target);
        let paced = paced.unwrap_or_else(|| UNKNOWN_CHUNK.saturating_sub(step.prompt_rows()));
        let least = if step.prompt_rows() == 0 { LEAST_CHUNK } else { 0 };
        let room = paced.max(least).min(self.bounds.max_num_batched_tokens - step.shape.tokens);
        let share = room.saturating_sub(behind).max(room.div_ceil(2));
        let rows = missing.min(share).min(self.bounds.long_prefill_token_threshold);
        // A piece ends at the end of a block where it can: whole tiles are cheapest.
        if rows < missing && rows >= BLOCK_TOKENS { rows - (start + rows) % BLOCK_TOKENS } else { rows }
    }
}

/// Releases a sequence's blocks, its beginning last.
fn release(pool: &mut Blocks, blocks: &[u32]) {
    for &block in blocks.iter().rev() {
        pool.release(block);
    }
}

mod audit;
#[cfg(test)]
mod tests;
