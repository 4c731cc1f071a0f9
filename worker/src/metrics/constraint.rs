//! Figures of constrained answers.

use std::time::Duration;

use prometheus::Histogram;

use super::{Maker, Metrics};
use crate::constraint::Observer;

/// Compilation of a constraint, in seconds.
const COMPILE: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Work on one mask, in seconds.
const MASK: &[f64] =
    &[0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1];

/// How long the work on constraints takes.
#[derive(Debug)]
pub(super) struct ConstraintFigures {
    compile: Histogram,
    mask: Histogram,
    wait: Histogram,
}

impl ConstraintFigures {
    pub(super) fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
        Ok(Self {
            compile: make.histogram("ernie:constraint_compile_seconds", "Compilation of a constraint.", COMPILE)?,
            mask: make.histogram("ernie:constraint_mask_seconds", "Work on the mask of one token.", MASK)?,
            wait: make.histogram("ernie:constraint_wait_seconds", "What the engine waited for a mask.", MASK)?,
        })
    }
}

impl Observer for Metrics {
    fn compiled(&self, took: Duration) {
        self.constraint.compile.observe(took.as_secs_f64());
    }

    fn masked(&self, took: Duration) {
        self.constraint.mask.observe(took.as_secs_f64());
    }

    fn waited(&self, waited: Duration) {
        self.constraint.wait.observe(waited.as_secs_f64());
    }
}
