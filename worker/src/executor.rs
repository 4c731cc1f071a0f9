//! The seam between the engine and the model: `execute(StepPlan) -> StepOutput`.
//!
//! The engine decides *what* runs (which tokens of which sequences, in which key-value blocks); an executor computes
//! it. A plan is plain data that could travel to another process, and names no tensor; an executor knows no request.

use serde::{Deserialize, Serialize};

/// Tokens in one block of the key-value cache.
pub const BLOCK_TOKENS: usize = 32;

/// One forward pass over rows of several sequences, without padding.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct StepPlan {
    /// The sequences that take part, each at most once.
    pub sequences: Vec<SequenceStep>,
}

impl StepPlan {
    /// Rows of the flat batch.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.tokens.len()).sum()
    }
}

/// The part of one sequence in a step.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct SequenceStep {
    /// The token ids to run, `[n]`, n ≥ 1.
    pub tokens: Vec<u32>,
    /// How many tokens of the sequence are in the cache already; the first of `tokens` goes to this place.
    pub start: u32,
    /// Rotary positions `[n]` when they differ from `start..start + n`.
    pub position_ids: Option<Vec<u32>>,
    /// The sequence's blocks in order; covers at least `start + n` tokens.
    pub blocks: Vec<u32>,
    /// Index of the adapter that applies, in the order in which adapters were loaded.
    pub adapter: Option<u32>,
    /// Which rows need logits.
    pub logits: LogitRows,
    /// What else is read off its rows.
    pub reading: Option<Reading>,
}

/// What is read off consecutive rows of a sequence, beside logits. Its size does not grow with the vocabulary.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub enum Reading {
    /// How probable given tokens are.
    Scores {
        /// The first row, of this step.
        first: u32,
        /// For each row from `first` on: the token that is scored, `[rows]`.
        targets: Vec<u32>,
        /// How many of the best tokens come beside it.
        top: u32,
    },
    /// The sum of final hidden states, after the last norm, one row added after the other.
    HiddenSum {
        /// The first row, of this step.
        first: u32,
        /// How many rows, at least one.
        rows: u32,
        /// What they are added to, as an earlier step gave it; empty for nothing.
        onto: Vec<f64>,
    },
}

impl Reading {
    /// The rows of the step that it looks at.
    pub fn rows(&self) -> std::ops::Range<usize> {
        let (first, rows) = match self {
            Self::Scores { first, targets, .. } => (*first as usize, targets.len()),
            Self::HiddenSum { first, rows, .. } => (*first as usize, *rows as usize),
        };
        first..first + rows
    }
}

/// Which rows of a sequence go through the output head.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum LogitRows {
    /// None: more of the prompt follows in a later step.
    #[default]
    None,
    /// The last row only.
    Last,
    /// Every row.
    All,
}

/// What a step gives back.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// One entry for each sequence of the plan, in order: logits in f32, row-major `[rows, vocab]`; `rows` is 0, 1 or n
    /// as asked.
    pub logits: Vec<Vec<f32>>,
    /// What was [read](SequenceStep::reading), in the order of the sequences that asked.
    pub readings: Vec<Readout>,
}

/// What came of a [`Reading`].
#[derive(Clone, Debug, PartialEq)]
pub enum Readout {
    /// One entry for each target.
    Scores(Vec<RowScore>),
    /// The sum so far, `[hidden]`.
    HiddenSum(Vec<f64>),
}

/// What a row's logits say of one token. Minus `log_sum_exp`, a logit is a log-probability (natural logarithm).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowScore {
    /// The token's logit.
    pub logit: f32,
    /// Logarithm of the sum of the exponentials of all logits; not a number when one of them is not finite.
    pub log_sum_exp: f32,
    /// The best tokens and their logits, best first, the smaller id first among equals.
    pub top: Vec<(u32, f32)>,
}

/// Sizes that the engine needs for its bookkeeping.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Geometry {
    /// Columns of a logit row.
    pub vocab: usize,
    /// Numbers of a hidden state.
    pub hidden: usize,
    /// Blocks in the key-value cache, each of [`BLOCK_TOKENS`] tokens.
    pub blocks: usize,
    /// The longest sequence that the model allows, in tokens.
    pub max_model_len: usize,
}

/// A step that could not be computed. It fails the sequences of that step; the executor stays usable.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ExecuteError {
    /// The plan contradicts the geometry: a defect of the engine.
    #[error("invalid step: {0}")]
    InvalidPlan(String),
    /// The computation failed.
    #[error("forward pass failed: {0}")]
    Failed(String),
}

/// Computes steps. Owned by the one engine thread.
pub trait Executor: Send {
    /// The sizes this executor was built with.
    fn geometry(&self) -> Geometry;

    /// Runs one forward pass: writes keys and values of every row into its block, and returns the logits asked for.
    ///
    /// # Errors
    /// [`ExecuteError`]; nothing is assumed about cache contents of that step's rows afterwards.
    fn execute(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecuteError>;
}
