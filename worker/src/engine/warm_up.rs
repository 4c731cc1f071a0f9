//! What steps of a fresh executor cost, found out by running some.

use std::time::{Duration, Instant};

use crate::executor::{BLOCK_TOKENS, ExecuteError, Executor, LogitRows, SequenceStep, StepPlan};

use super::cost::{CostModel, Shape};

/// Steps to be tried: sequences, and rows of each.
const STEPS: [(usize, usize); 6] = [(1, 1), (1, 32), (4, 1), (1, 64), (2, 16), (1, 128)];

/// Runs steps of several shapes for about as long as `budget`, and tells `model` what they took. The first is not
/// counted: it pays for what is set up on first use. The cache must be empty, and is left so.
///
/// # Errors
/// That of the executor.
pub(super) fn measure(
    executor: &mut dyn Executor,
    (max_num_seqs, max_num_batched_tokens): (usize, usize),
    budget: Duration,
    model: &mut CostModel,
) -> Result<(), ExecuteError> {
    if budget.is_zero() {
        return Ok(());
    }
    let geometry = executor.geometry();
    let fits = |&(sequences, rows): &(usize, usize)| {
        sequences <= max_num_seqs
            && sequences * rows <= max_num_batched_tokens
            && rows <= geometry.max_model_len
            && sequences * rows.div_ceil(BLOCK_TOKENS) <= geometry.blocks
    };
    let begun = Instant::now();
    executor.execute(&plan(1, 1, geometry.vocab))?;
    let steps: Vec<_> = STEPS.into_iter().filter(fits).collect();
    for round in 0.. {
        let mut ran = false;
        for &(sequences, rows) in &steps {
            let shape = (0..sequences).fold(Shape::default(), |shape, _| shape.plus(Shape::of_rows(0, rows, true, 0)));
            // In the first round nothing is known of larger steps, which the expectation underrates; so it may overrun.
            let left = budget.saturating_sub(begun.elapsed()).as_secs_f64();
            if left <= model.cost().seconds(shape) {
                continue;
            }
            let plan = plan(sequences, rows, geometry.vocab);
            let step = Instant::now();
            executor.execute(&plan)?;
            model.observe(shape, step.elapsed().as_secs_f64());
            ran = true;
        }
        if !ran || round == 64 {
            break;
        }
    }
    Ok(())
}

fn plan(sequences: usize, rows: usize, vocab: usize) -> StepPlan {
    let blocks = rows.div_ceil(BLOCK_TOKENS);
    let sequence = |index: usize| SequenceStep {
        tokens: (0..rows).map(|row| (row % vocab.max(1)) as u32).collect(),
        start: 0,
        position_ids: None,
        blocks: (index * blocks..(index + 1) * blocks).map(|block| block as u32).collect(),
        adapter: None,
        logits: LogitRows::Last,
        reading: None,
    };
    StepPlan { sequences: (0..sequences).map(sequence).collect() }
}
