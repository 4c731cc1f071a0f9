//! One forward pass, whatever the executor does.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::engine::scheduler::Step;
use crate::executor::{Executor, Reading, Readout, StepOutput};

/// Why a step gave nothing.
pub(super) enum Fault {
    /// It failed; the next may not.
    Step(String),
    /// The executor panicked; nothing is known of its state.
    Panic(String),
}

/// Runs a step, and checks that what came back fits it.
pub(super) fn forward(executor: &mut dyn Executor, step: &Step) -> Result<StepOutput, Fault> {
    let vocab = executor.geometry().vocab;
    let output = catch_unwind(AssertUnwindSafe(|| executor.execute(&step.plan)))
        .map_err(|panic| Fault::Panic(format!("the executor panicked: {}", panic_message(&*panic))))?
        .map_err(|error| Fault::Step(error.to_string()))?;
    let fits = output.logits.len() == step.parts.len()
        && output.logits.iter().zip(&step.parts).all(|(row, part)| row.len() == usize::from(part.samples) * vocab);
    if !fits {
        return Err(Fault::Step("the executor returned logits of another shape".to_owned()));
    }
    let asked = step.plan.sequences.iter().filter_map(|sequence| sequence.reading.as_ref());
    let answers = |(asked, read): (&Reading, &Readout)| match (asked, read) {
        (Reading::Scores { targets, .. }, Readout::Scores(scores)) => targets.len() == scores.len(),
        (Reading::HiddenSum { onto, .. }, Readout::HiddenSum(sum)) => onto.is_empty() || onto.len() == sum.len(),
        _ => false,
    };
    if asked.clone().count() == output.readings.len() && asked.zip(&output.readings).all(answers) {
        Ok(output)
    } else {
        Err(Fault::Step("the executor read something else than was asked for".to_owned()))
    }
}

pub(super) fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}
