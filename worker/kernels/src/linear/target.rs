//! Where the sums of a product go.

use std::ops::Range;

use super::product::Epilogue;
use crate::Matrix;
use crate::elementwise::{load, store};
use crate::memory::Disjoint;
use crate::scratch::Vector;
use crate::simd::{Simd, math};

/// Activations below this many numbers are packed by the caller alone.
pub(super) const PACK_ALONE: usize = 1 << 15;
/// Most panels of a task.
const PANEL_BLOCK: usize = 8;

/// What turns sums into results, as the tasks of a product share it.
pub(super) struct Target<'a> {
    pub(super) weight: &'a Matrix,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) epilogue: Epilogue,
    pub(super) out: Disjoint<'a, f32>,
    pub(super) out_stride: usize,
}

/// Panels of a task when there are so many units of work, a panel for a block of rows each: few enough that threads finish
/// together, enough that handing one out costs nothing beside it. A multiple of 4.
pub(super) fn panels_of_task(units: usize, threads: usize) -> usize {
    (units / (8 * threads)).clamp(1, PANEL_BLOCK).next_multiple_of(4)
}

impl Target<'_> {
    /// The panels of the matrix, `count` at a time.
    pub(super) fn panels_by(&self, count: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let panels = self.weight.panels();
        (0..panels).step_by(count).map(move |first| first..(first + count).min(panels))
    }

    /// Writes the results of `panels` and of `rows` rows from `first_row` on, whose sums are `[panel][row]`. Panels of
    /// [`Epilogue::SwiGlu`] come in pairs.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(&self, s: S, panels: Range<usize>, first_row: usize, rows: usize, sums: &[Vector]) {
        let step = if self.epilogue == Epilogue::SwiGlu { 2 } else { 1 };
        for panel in panels.clone().step_by(step) {
            let (column, n) = self.weight.columns_of(panel);
            let at = (panel - panels.start) * rows;
            for row in 0..rows {
                // SAFETY: rows and columns of different tasks do not overlap.
                let out = unsafe { self.out.slice((first_row + row) * self.out_stride + column, n) };
                let sum = self.biased(s, panel, &sums[at + row]);
                let result = match self.epilogue {
                    Epilogue::Store => sum,
                    Epilogue::Add => s.add(load(s, out, 0), sum),
                    Epilogue::SwiGlu => s.mul(math::silu(s, sum), self.biased(s, panel + 1, &sums[at + rows + row])),
                };
                store(s, out, 0, result);
            }
        }
    }

    /// A sum of `panel` plus its bias.
    #[inline(always)]
    fn biased<S: Simd>(&self, s: S, panel: usize, sum: &Vector) -> S::V {
        let sum = s.load(&sum.0);
        match self.bias {
            Some(bias) => {
                let (column, n) = self.weight.columns_of(panel);
                s.add(sum, load(s, &bias[column..column + n], 0))
            }
            None => sum,
        }
    }
}
