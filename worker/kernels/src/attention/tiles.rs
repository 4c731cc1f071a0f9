//! Attention on tiles ([`crate::amx`]): a block's keys are two columns of tiles, its values one row of them, as they lie in
//! the cache. Queries and weights are rounded to bf16.

use super::item::{ROW_BLOCK, SCORES, Work, row_vectors};
use super::{BLOCK_TOKENS, TILE};
use crate::amx::{Operands, TILE_BYTES, TILE_K, TILE_ROWS, TileRow, TileUnit, WIDE, copy_rows, pairs};
use crate::attention::cache::{KEY_PANELS, Region};
use crate::elementwise::load;
use crate::panel::{AHEAD, Bf16, prefetch_start};
use crate::scratch::{Vector, tile_rows};
use crate::simd::{LANES, Simd};

/// Blocks of a tile of positions.
const BLOCKS: usize = TILE / BLOCK_TOKENS;
/// Vectors of memory: weights as tiles, and a copy of two panels' values.
pub(super) const VECTORS: usize = ROW_BLOCK * BLOCKS + WIDE * TILE_ROWS;

/// A tile of positions is two vectors of scores for each row of a tile of weights.
const _: () = assert!(BLOCK_TOKENS == TILE_K && TILE_K == 2 * LANES && KEY_PANELS == WIDE);

/// Where row `row` lies at step `step` among tiles of `rows` rows in all, `steps` for each tile of rows.
fn place(row: usize, rows: usize, step: usize, steps: usize) -> usize {
    let first = row / TILE_ROWS * TILE_ROWS;
    first * steps + step * (rows - first).min(TILE_ROWS) + row - first
}

impl<S: Simd> Work<'_, S> {
    /// Rounds and packs the item's queries: for each tile of rows, one tile for each 32 dimensions.
    #[inline(always)]
    pub(super) fn pack_query_tiles(&mut self) {
        let (s, dim, rows) = (self.s, self.head_dim(), self.rows.len());
        for row in 0..rows {
            let (token, column) = self.source(row);
            let query = &self.call.q.row(token)[column..column + dim];
            for step in 0..dim / TILE_K {
                let both = [0, LANES].map(|at| load(s, query, step * TILE_K + at));
                tile_rows(self.queries)[place(row, rows, step, dim / TILE_K)].round(s, both);
            }
        }
    }

    /// Scores the tile of positions from `start`, of which `seen` exist, and adds its weighted values.
    #[inline(always)]
    pub(super) fn reduce_on_tiles(&mut self, unit: TileUnit, start: usize, seen: usize) {
        self.score_on_tiles(unit, start, seen);
        let (s, rows) = (self.s, self.rows.len());
        for row in 0..rows {
            let scores = std::array::from_fn(|i| s.load(&self.scores[i * ROW_BLOCK + row].0));
            let weights: [S::V; SCORES] = self.weigh(row, start, scores);
            for block in 0..BLOCKS {
                let to = &mut tile_rows(self.widened)[place(row, rows, block, BLOCKS)];
                to.round(s, [weights[2 * block], weights[2 * block + 1]]);
            }
        }
        let width = row_vectors(self.head_dim());
        for panel in (0..width).step_by(WIDE) {
            self.weigh_values(unit, panel, start, seen);
            for row in 0..rows {
                let shrink = s.splat(self.shrink[row]);
                for p in 0..WIDE {
                    let to = &mut self.values[row * width + panel + p].0;
                    s.store(to, s.fma(s.load(to), shrink, s.load(&self.scores[p * ROW_BLOCK + row].0)));
                }
            }
        }
    }

    /// Products of all rows with the keys from `start`: `[panel][row]`, what is not seen anything.
    #[inline(always)]
    fn score_on_tiles(&mut self, unit: TileUnit, start: usize, seen: usize) {
        let (dim, rows) = (self.head_dim(), self.rows.len());
        let (steps, sizes) = (dim / TILE_K, Region::new::<Bf16>(dim));
        for (block, first) in (0..seen).step_by(BLOCK_TOKENS).enumerate() {
            let keys = &self.region(start + first)[..KEY_PANELS * sizes.key_panel];
            if first + BLOCK_TOKENS < seen {
                prefetch_start(self.s, self.region(start + first + BLOCK_TOKENS));
            }
            let b = [keys.as_ptr(), keys[sizes.key_panel..].as_ptr()];
            let sums = &mut self.scores[block * WIDE * ROW_BLOCK..][..WIDE * ROW_BLOCK];
            sums.fill(Vector::ZERO);
            let queries = tile_rows(self.queries);
            for (row, both) in pairs(rows) {
                let a = activations(queries, row, both, steps, 0..steps);
                let ahead = (row == 0).then_some(AHEAD);
                let operands = Operands { rows: both, a, b, c: targets(sums, row, both), steps, ahead };
                // SAFETY: keys, packed queries and sums are what the slices above hold.
                unsafe { unit.multiply(&mut self.tile_state, &operands) };
            }
        }
    }

    /// Products of all rows' weights with two panels of values from `start`: `[panel][row]` in the place of scores.
    #[inline(always)]
    fn weigh_values(&mut self, unit: TileUnit, panel: usize, start: usize, seen: usize) {
        let (rows, sizes) = (self.rows.len(), Region::new::<Bf16>(self.head_dim()));
        self.scores[..WIDE * ROW_BLOCK].fill(Vector::ZERO);
        for (block, first) in (0..seen).step_by(BLOCK_TOKENS).enumerate() {
            let values = &self.region(start + first)[KEY_PANELS * sizes.key_panel..];
            let values = [panel, panel + 1].map(|panel| &values[panel * TILE_BYTES..][..TILE_BYTES]);
            let mut b = values.map(<[u8]>::as_ptr);
            let (weights, edge) = tile_rows(self.widened).split_at_mut(ROW_BLOCK * BLOCKS);
            if seen - first < BLOCK_TOKENS {
                // What is not seen has weight 0, but may be anything, even no number.
                let (even, odd) = edge.split_at_mut(TILE_ROWS);
                b = [(values[0], even), (values[1], odd)].map(|(values, edge)| {
                    copy_rows(values, seen - first, edge);
                    edge.as_ptr().cast()
                });
            }
            for (row, both) in pairs(rows) {
                let a = activations(weights, row, both, BLOCKS, block..block + 1);
                let ahead = (row == 0).then_some(AHEAD);
                let c = targets(self.scores, row, both);
                // SAFETY: values, packed weights and sums are what the slices above hold.
                unsafe { unit.multiply(&mut self.tile_state, &Operands { rows: both, a, b, c, steps: 1, ahead }) };
            }
        }
    }
}

/// Where two tiles of rows begin at the first of `range` of their `steps` steps.
fn activations(
    packed: &[TileRow],
    row: usize,
    rows: [usize; 2],
    steps: usize,
    range: std::ops::Range<usize>,
) -> [*const TileRow; 2] {
    let tile = |row: usize, rows: usize| packed[row * steps + range.start * rows..][..range.len() * rows].as_ptr();
    let first = tile(row, rows[0]);
    [first, if rows[1] > 0 { tile(row + TILE_ROWS, rows[1]) } else { first }]
}

/// Where the sums of two tiles of rows begin in each of two panels.
fn targets(sums: &mut [Vector], row: usize, rows: [usize; 2]) -> [*mut Vector; 2] {
    let (first, second) = sums.split_at_mut(ROW_BLOCK);
    [first, second].map(|sums| sums[row..row + rows[0] + rows[1]].as_mut_ptr())
}
