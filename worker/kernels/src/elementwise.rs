//! Loops over rows that are cut among the threads.

use std::ops::Range;

use crate::Cpu;
use crate::simd::{LANES, Simd};

/// Numbers below which a piece of work is not worth another thread.
const GRAIN: usize = 1 << 14;

/// Cuts `rows` rows of `width` numbers into ranges, one for each task.
pub(crate) fn for_row_ranges(cpu: &Cpu, rows: usize, width: usize, task: impl Fn(Range<usize>) + Sync) {
    cpu.pool().run_ranges(rows, GRAIN.div_ceil(width.max(1)), task);
}

/// The starts of the vectors of a row.
#[inline(always)]
pub(crate) fn vectors(len: usize) -> std::iter::StepBy<Range<usize>> {
    (0..len).step_by(LANES)
}

/// The vector at `at`, with zeros past the end.
#[inline(always)]
pub(crate) fn load<S: Simd>(s: S, from: &[f32], at: usize) -> S::V {
    let from = &from[at..from.len().min(at + LANES)];
    match from.as_array::<LANES>() {
        Some(from) => s.load(from),
        None => s.load_part(from),
    }
}

/// Stores the lanes that exist at `at`.
#[inline(always)]
pub(crate) fn store<S: Simd>(s: S, to: &mut [f32], at: usize, v: S::V) {
    let end = to.len().min(at + LANES);
    let to = &mut to[at..end];
    match to.as_mut_array::<LANES>() {
        Some(to) => s.store(to, v),
        None => s.store_part(to, v),
    }
}
