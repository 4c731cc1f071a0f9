//! One piece of attention: some query rows of one key-value head, over all their positions or one split of them.

use std::marker::PhantomData;
use std::ops::Range;

use super::cache::{KEY_PANELS, Region};
use super::{BLOCK_TOKENS, Call, SPLIT, Span, TILE, tiles};
use crate::amx::TileState;
use crate::elementwise::{load, store};
use crate::panel::{COLUMNS, Element, F32, Prefetch, has_tile, prefetch_start, tile, widen};
use crate::scratch::Vector;
use crate::simd::{Kernel, LANES, Simd, math};

/// Most query rows of an item; a multiple of every level's tile rows.
pub(super) const ROW_BLOCK: usize = 48;
/// Up to so many tiles of rows the keys and values are widened for each; more of them are worth doing it once.
const FEW_TILES: usize = 2;
/// Vectors of a row's scores.
pub(super) const SCORES: usize = TILE / LANES;
/// Where running maxima start: below every score, and finite, so that differences are.
const LOWEST: f32 = -1e30;

/// What a task computes.
pub(super) struct Item {
    pub(super) span: usize,
    pub(super) head: usize,
    /// Query rows of the head: row i is query head i % group of token i / group.
    pub(super) rows: Range<usize>,
    /// The split alone, with its result put aside, instead of everything.
    pub(super) part: Option<Part>,
}

/// One split, and where its results go.
pub(super) struct Part {
    pub(super) split: usize,
    /// First row among the partial results.
    pub(super) first_row: usize,
}

/// Partial results to merge: `splits` times `rows` rows from `first_row`.
pub(super) struct Merge {
    pub(super) span: usize,
    pub(super) head: usize,
    pub(super) rows: usize,
    pub(super) first_row: usize,
    pub(super) splits: usize,
}

/// Vectors of a row of results.
pub(super) fn row_vectors(head_dim: usize) -> usize {
    head_dim.div_ceil(COLUMNS)
}

/// Numbers of one row of partial results: maximum, sum, and the weighted values.
pub(super) fn part_len(head_dim: usize) -> usize {
    2 + row_vectors(head_dim) * LANES
}

/// Vectors of a widened panel of keys, or of a tile's values.
fn widened_vectors(head_dim: usize) -> usize {
    head_dim.next_multiple_of(2).max(TILE)
}

/// Vectors of memory that an item needs: packed queries, scores, sums, the split's results, the merged ones, and a
/// widened panel or what tiles need.
pub(super) fn scratch_vectors(head_dim: usize) -> usize {
    ROW_BLOCK * (3 * row_vectors(head_dim) + SCORES + 1) + widened_vectors(head_dim).max(tiles::VECTORS)
}

/// An [`Item`] at some level.
pub(super) struct Compute<'a, E> {
    pub(super) call: &'a Call<'a>,
    pub(super) item: &'a Item,
    pub(super) span: &'a Span<'a>,
    pub(super) part: Option<&'a mut [f32]>,
    pub(super) memory: &'a mut [Vector],
    pub(super) element: PhantomData<E>,
}

impl<E: Element> Kernel for Compute<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Compute { call, item, span, part, memory, .. } = self;
        let mut work = Work::new(s, call, span, item.head, item.rows.clone(), memory);
        let last = span.start + (item.rows.end - 1) / call.group;
        let first = call.attention.first_seen(span.start + item.rows.start / call.group);
        match call.unit {
            Some(_) => work.pack_query_tiles(),
            None => work.pack_queries(),
        }
        match (&item.part, part) {
            (Some(Part { split, .. }), Some(to)) => {
                let from = first.max(split * SPLIT);
                work.split::<E>(from, last.min((split + 1) * SPLIT - 1));
                work.put_aside(to);
            }
            _ => {
                work.clear_merged();
                for split in first / SPLIT..=last / SPLIT {
                    let from = first.max(split * SPLIT);
                    let to = last.min((split + 1) * SPLIT - 1);
                    work.split::<E>(from, to);
                    work.merge();
                }
                work.write_out();
            }
        }
    }
}

/// A [`Merge`] at some level.
pub(super) struct MergeParts<'a> {
    pub(super) call: &'a Call<'a>,
    pub(super) merge: &'a Merge,
    pub(super) span: &'a Span<'a>,
    pub(super) partials: &'a [f32],
    pub(super) memory: &'a mut [Vector],
}

impl Kernel for MergeParts<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let MergeParts { call, merge, span, partials, memory } = self;
        let mut work = Work::new(s, call, span, merge.head, 0..merge.rows, memory);
        let len = part_len(call.cache.shape().head_dim);
        work.clear_merged();
        for split in 0..merge.splits {
            work.take_back(&partials[(merge.first_row + split * merge.rows) * len..][..merge.rows * len]);
            work.merge();
        }
        work.write_out();
    }
}

/// The state of an item. `[row]` counts the item's own rows.
pub(super) struct Work<'a, S> {
    pub(super) s: S,
    pub(super) call: &'a Call<'a>,
    span: &'a Span<'a>,
    head: usize,
    pub(super) rows: Range<usize>,
    /// Query rows packed in tiles `[head_dim][rows of the tile]`, or as rows of [`crate::amx`]'s tiles.
    pub(super) queries: &'a mut [Vector],
    /// Scores, then weights, of a tile: `[row][position]`. On tiles of AMX `[vector of positions][row]`, and then sums of
    /// weighted values, `[panel][row]`.
    pub(super) scores: &'a mut [Vector],
    /// Sums of the split's weights, lane by lane.
    sums: &'a mut [Vector],
    /// Weighted values of the split `[row][dimension]`.
    pub(super) values: &'a mut [Vector],
    /// Weighted values of all splits so far.
    merged: &'a mut [Vector],
    /// A panel of keys, or a tile of values, in f32; or what tiles need.
    pub(super) widened: &'a mut [Vector],
    /// What [`Call::unit`] multiplies with.
    pub(super) tile_state: TileState,
    /// The split's largest score of each row, and its sum once the split is complete.
    max: [f32; ROW_BLOCK],
    sum: [f32; ROW_BLOCK],
    /// The same of all splits so far.
    merged_max: [f32; ROW_BLOCK],
    merged_sum: [f32; ROW_BLOCK],
    /// By what a tile scales down a row's earlier values.
    pub(super) shrink: [f32; ROW_BLOCK],
}

/// The numbers of vectors that lie beside each other.
fn numbers(vectors: &[Vector]) -> *const f32 {
    vectors.as_ptr().cast()
}

impl<'a, S: Simd> Work<'a, S> {
    #[inline(always)]
    fn new(
        s: S,
        call: &'a Call<'a>,
        span: &'a Span<'a>,
        head: usize,
        rows: Range<usize>,
        memory: &'a mut [Vector],
    ) -> Self {
        let width = row_vectors(call.cache.shape().head_dim);
        let (queries, memory) = memory.split_at_mut(ROW_BLOCK * width);
        let (scores, memory) = memory.split_at_mut(ROW_BLOCK * SCORES);
        let (sums, memory) = memory.split_at_mut(ROW_BLOCK);
        let (values, memory) = memory.split_at_mut(ROW_BLOCK * width);
        let (merged, widened) = memory.split_at_mut(ROW_BLOCK * width);
        let (zero, lowest) = ([0.0; ROW_BLOCK], [LOWEST; ROW_BLOCK]);
        let (max, sum, merged_max, merged_sum, shrink) = (lowest, zero, lowest, zero, zero);
        Work {
            s,
            call,
            span,
            head,
            rows,
            queries,
            scores,
            sums,
            values,
            merged,
            widened,
            tile_state: TileState::new(),
            max,
            sum,
            merged_max,
            merged_sum,
            shrink,
        }
    }

    pub(super) fn head_dim(&self) -> usize {
        self.call.cache.shape().head_dim
    }

    /// Tiles of rows: start and length of each.
    #[inline(always)]
    fn tile(&self, number: usize) -> (usize, usize) {
        let (rows, count) = (self.rows.len(), self.tiles());
        let start = rows * number / count;
        (start, rows * (number + 1) / count - start)
    }

    #[inline(always)]
    fn tiles(&self) -> usize {
        self.rows.len().div_ceil(S::ROWS)
    }

    /// Place in the sequence of the token that a row belongs to.
    #[inline(always)]
    fn position(&self, row: usize) -> usize {
        self.span.start + (self.rows.start + row) / self.call.group
    }

    /// Token (row of the batch) and first column of a query row.
    #[inline(always)]
    pub(super) fn source(&self, row: usize) -> (usize, usize) {
        let (token, head) = ((self.rows.start + row) / self.call.group, (self.rows.start + row) % self.call.group);
        (self.span.row + token, (self.head * self.call.group + head) * self.head_dim())
    }

    #[inline(always)]
    fn pack_queries(&mut self) {
        let dim = self.head_dim();
        for tile in 0..self.tiles() {
            let (start, len) = self.tile(tile);
            for row in start..start + len {
                let (token, column) = self.source(row);
                let query = &self.call.q.row(token)[column..column + dim];
                for (k, &number) in query.iter().enumerate() {
                    let at = start * dim + k * len + row - start;
                    self.queries[at / LANES].0[at % LANES] = number;
                }
            }
        }
    }

    /// Reduces the positions `from..=to` of one split.
    #[inline(always)]
    fn split<E: Element>(&mut self, from: usize, to: usize) {
        let (rows, width) = (self.rows.len(), row_vectors(self.head_dim()));
        self.max = [LOWEST; ROW_BLOCK];
        self.sums[..rows].fill(Vector::ZERO);
        self.values[..rows * width].fill(Vector::ZERO);
        for start in (from / TILE * TILE..=to).step_by(TILE) {
            let seen = (to + 1 - start).min(TILE);
            if let Some(unit) = self.call.unit {
                self.reduce_on_tiles(unit, start, seen);
                continue;
            }
            self.score::<E>(start, seen);
            for row in 0..rows {
                let scores = std::array::from_fn(|i| self.s.load(&self.scores[row * SCORES + i].0));
                let weights = self.weigh(row, start, scores);
                (0..SCORES).for_each(|i| self.s.store(&mut self.scores[row * SCORES + i].0, weights[i]));
            }
            self.add_values::<E>(start, seen);
        }
        for row in 0..rows {
            self.sum[row] = self.s.sum(self.s.load(&self.sums[row].0));
        }
    }

    /// The block of the sequence that holds `position`.
    #[inline(always)]
    pub(super) fn region(&self, position: usize) -> &'a [u8] {
        let block = self.span.blocks[position / BLOCK_TOKENS] as usize;
        self.call.cache.region(self.call.layer, block, self.head)
    }

    /// Products of all rows with the keys from `start`, of which `seen` exist; panels without any are left out.
    #[inline(always)]
    fn score<E: Element>(&mut self, start: usize, seen: usize) {
        let sizes = Region::new::<E>(self.head_dim());
        for first in (0..seen).step_by(BLOCK_TOKENS) {
            let keys = &self.region(start + first)[..KEY_PANELS * sizes.key_panel];
            if first + BLOCK_TOKENS < seen {
                prefetch_start(self.s, self.region(start + first + BLOCK_TOKENS));
            }
            for (number, panel) in keys.chunks_exact(sizes.key_panel).enumerate() {
                let column = first + number * COLUMNS;
                if column >= seen {
                    break;
                }
                if E::NARROW && self.tiles() > FEW_TILES {
                    widen::<S, E>(self.s, panel, self.widened);
                    self.score_panel::<F32>(numbers(self.widened).cast(), column);
                } else {
                    self.score_panel::<E>(panel.as_ptr(), column);
                }
            }
        }
    }

    /// Products of all rows with a panel of keys, the first of which is the tile's position `column`.
    #[inline(always)]
    fn score_panel<X: Element>(&mut self, panel: *const u8, column: usize) {
        for tile in 0..self.tiles() {
            let (row, len) = self.tile(tile);
            macro_rules! rows {
                ($($rows:literal)*) => {
                    match len {
                        $($rows => self.score_tile::<X, $rows>(row, panel, column),)*
                        _ => unreachable!("tiles have at most {} rows", S::ROWS),
                    }
                };
            }
            rows!(1 2 3 4 5 6 7 8);
        }
    }

    #[inline(always)]
    fn score_tile<X: Element, const R: usize>(&mut self, row: usize, panel: *const u8, column: usize) {
        if const { !has_tile::<S, R, 1>() } {
            unreachable!("no tile of {R} rows at this level");
        }
        let (s, dim) = (self.s, self.head_dim());
        assert!((row + R) * dim <= self.queries.len() * LANES);
        let queries = numbers(self.queries).wrapping_add(row * dim);
        let zero = [[s.splat(0.0)]; R];
        // SAFETY: `queries` has the tile's `R` numbers for each dimension; `panel` is a panel of them in the cache, or
        // widened from there.
        let sums = unsafe { tile::<S, X, R, 1, 1, R>(s, queries, [panel], dim, Prefetch::ON, zero) };
        for r in 0..R {
            s.store(&mut self.scores[(row + r) * SCORES + column / LANES].0, sums[r][0]);
        }
    }

    /// Turns a row's scores into weights relative to its running maximum, and adds them up.
    #[inline(always)]
    pub(super) fn weigh(&mut self, row: usize, start: usize, mut scores: [S::V; SCORES]) -> [S::V; SCORES] {
        let s = self.s;
        let position = self.position(row);
        // Which of the tile's positions the row sees.
        let from = self.call.attention.first_seen(position).saturating_sub(start);
        let to = (position + 1).saturating_sub(start);
        let scale = s.splat(self.call.attention.scale);
        let mut max = s.splat(self.max[row]);
        for (i, score) in scores.iter_mut().enumerate() {
            let v = s.mul(*score, scale);
            let lane = |position: usize| position.saturating_sub(i * LANES).min(LANES);
            let (from, to) = (lane(from), lane(to));
            *score = if from == 0 && to == LANES { v } else { s.within(from, to, v, f32::NEG_INFINITY) };
            max = s.max(max, *score);
        }
        let max = s.largest(max);
        self.shrink[row] = s.largest(math::exp(s, s.splat(self.max[row] - max)));
        self.max[row] = max;
        let max = s.splat(max);
        let mut sum = s.mul(s.load(&self.sums[row].0), s.splat(self.shrink[row]));
        for score in &mut scores {
            *score = math::exp(s, s.sub(*score, max));
            sum = s.add(sum, *score);
        }
        s.store(&mut self.sums[row].0, sum);
        scores
    }

    /// Adds the tile's values times the weights.
    #[inline(always)]
    fn add_values<E: Element>(&mut self, start: usize, seen: usize) {
        let sizes = Region::new::<E>(self.head_dim());
        let mut blocks = [std::ptr::null(); TILE / BLOCK_TOKENS];
        for panel in 0..sizes.value_panels {
            for (i, first) in (0..seen).step_by(BLOCK_TOKENS).enumerate() {
                let values = &self.region(start + first)[KEY_PANELS * sizes.key_panel..];
                let values = &values[panel * sizes.value_panel..][..sizes.value_panel];
                blocks[i] = values.as_ptr();
                if E::NARROW && self.tiles() > FEW_TILES {
                    let to = &mut self.widened[first..][..BLOCK_TOKENS];
                    widen::<S, E>(self.s, values, to);
                    blocks[i] = numbers(to).cast();
                }
            }
            if E::NARROW && self.tiles() > FEW_TILES {
                self.add_values_panel::<F32>(panel, &blocks, seen);
            } else {
                self.add_values_panel::<E>(panel, &blocks, seen);
            }
        }
    }

    /// Adds the products of all rows' weights with a panel of values, at `blocks` for each block of the tile.
    #[inline(always)]
    fn add_values_panel<X: Element>(&mut self, panel: usize, blocks: &[*const u8; TILE / BLOCK_TOKENS], seen: usize) {
        for tile in 0..self.tiles() {
            let (row, len) = self.tile(tile);
            macro_rules! rows {
                ($($rows:literal)*) => {
                    match len {
                        $($rows => self.add_values_tile::<X, $rows>(row, panel, blocks, seen),)*
                        _ => unreachable!("tiles have at most {} rows", S::ROWS),
                    }
                };
            }
            rows!(1 2 3 4 5 6 7 8);
        }
    }

    #[inline(always)]
    fn add_values_tile<X: Element, const R: usize>(
        &mut self,
        row: usize,
        panel: usize,
        blocks: &[*const u8; TILE / BLOCK_TOKENS],
        seen: usize,
    ) {
        if const { !has_tile::<S, R, 1>() } {
            unreachable!("no tile of {R} rows at this level");
        }
        let s = self.s;
        let width = row_vectors(self.head_dim());
        let weights = numbers(&self.scores[row * SCORES..(row + R) * SCORES]);
        let mut sums = [[s.splat(0.0)]; R];
        for (first, &block) in (0..seen).step_by(BLOCK_TOKENS).zip(blocks) {
            let k = (seen - first).min(BLOCK_TOKENS);
            let weights = weights.wrapping_add(first);
            // SAFETY: `weights` has the `TILE` weights of `R` rows beside each other, from `first` on at least `k`;
            // `block` is a panel of `BLOCK_TOKENS` positions in the cache, or widened from there.
            sums = unsafe { tile::<S, X, R, 1, TILE, 1>(s, weights, [block], k, Prefetch::ON, sums) };
        }
        for r in 0..R {
            let to = &mut self.values[(row + r) * width + panel].0;
            s.store(to, s.fma(s.load(to), s.splat(self.shrink[row + r]), sums[r][0]));
        }
    }

    #[inline(always)]
    fn clear_merged(&mut self) {
        let len = self.rows.len() * row_vectors(self.head_dim());
        self.merged[..len].fill(Vector::ZERO);
    }

    /// Merges the split's results into those of the splits before it.
    #[inline(always)]
    fn merge(&mut self) {
        let s = self.s;
        let width = row_vectors(self.head_dim());
        for row in 0..self.rows.len() {
            let (before, own) = (self.merged_max[row], self.max[row]);
            let max = if own > before { own } else { before };
            // Both factors are 1 or less; a NaN in either maximum or sum reaches the result.
            let keep = s.largest(math::exp(s, s.splat(before - max)));
            let take = s.largest(math::exp(s, s.splat(own - max)));
            self.merged_max[row] = max;
            self.merged_sum[row] = self.merged_sum[row] * keep + self.sum[row] * take;
            for at in row * width..(row + 1) * width {
                let own = s.mul(s.load(&self.values[at].0), s.splat(take));
                let to = &mut self.merged[at].0;
                s.store(to, s.fma(s.load(to), s.splat(keep), own));
            }
        }
    }

    /// Writes the rows' results: weighted values over the sum of weights.
    #[inline(always)]
    fn write_out(&mut self) {
        let (s, dim) = (self.s, self.head_dim());
        let width = row_vectors(dim);
        for row in 0..self.rows.len() {
            let (token, column) = self.source(row);
            // SAFETY: spans do not overlap, and a row of a head belongs to one item.
            let out = unsafe { self.call.out.slice(token * self.call.out_stride + column, dim) };
            let scale = s.splat(1.0 / self.merged_sum[row]);
            for i in 0..width {
                store(s, out, i * LANES, s.mul(s.load(&self.merged[row * width + i].0), scale));
            }
        }
    }

    /// Puts the split's results into memory that outlives the item.
    #[inline(always)]
    fn put_aside(&self, to: &mut [f32]) {
        let width = row_vectors(self.head_dim());
        for (row, to) in to.chunks_exact_mut(part_len(self.head_dim())).enumerate() {
            to[0] = self.max[row];
            to[1] = self.sum[row];
            for i in 0..width {
                store(self.s, &mut to[2..], i * LANES, self.s.load(&self.values[row * width + i].0));
            }
        }
    }

    /// The opposite of [`Work::put_aside`].
    #[inline(always)]
    fn take_back(&mut self, from: &[f32]) {
        let (s, width) = (self.s, row_vectors(self.head_dim()));
        for (row, from) in from.chunks_exact(part_len(self.head_dim())).enumerate() {
            self.max[row] = from[0];
            self.sum[row] = from[1];
            for i in 0..width {
                s.store(&mut self.values[row * width + i].0, load(s, &from[2..], i * LANES));
            }
        }
    }
}
