//! Products of bf16 matrices on tiles ([`crate::amx`]): activations are rounded to bf16, sums are f32.
//!
//! A panel is a column of tiles as it lies, so only activations are packed. A task owns some panels and some rows. It takes
//! two panels at a time, goes through `k` in blocks that stay in the first cache, and through its rows by two tiles. The
//! sum of one output is the same in any order of tasks, blocks and rows: tiles of `k`, added in ascending order.

use std::ops::Range;

use super::product::Product;
use super::target::{PACK_ALONE, Target, panels_of_task};
use crate::Cpu;
use crate::amx::{Operands, TILE_BYTES, TILE_K, TILE_ROWS, TileRow, TileState, TileUnit, WIDE, copy_rows, pairs};
use crate::elementwise::load;
use crate::memory::Disjoint;
use crate::panel::Prefetch;
use crate::scratch::{self, Vector, tile_rows};
use crate::simd::{Kernel, LANES, Simd};

/// Rows that are multiplied at once.
const ROWS: usize = WIDE * TILE_ROWS;
/// Most bytes of packed activations of a task: they stay in the second cache while its panels come by.
const ROW_BLOCK_BYTES: usize = 1 << 20;
/// Tiles of `k` in a block: of two panels, they fill most of the first cache.
const BLOCK_STEPS: usize = 16;

/// A product as its tasks see it.
struct Shared<'a> {
    target: Target<'a>,
    rows: usize,
    /// Tiles of `k`, the last of them perhaps in part.
    steps: usize,
    /// Packed activations: for each tile of rows, one tile for each step.
    packed: &'a [TileRow],
}

/// Some panels and some rows of a product; rows begin at a tile.
struct Task {
    product: usize,
    panels: Range<usize>,
    rows: Range<usize>,
}

/// Computes those products that `takes` names.
pub(super) fn run(cpu: &Cpu, unit: TileUnit, products: &mut [Product<'_>], takes: impl Fn(&Product<'_>) -> bool) {
    let len = |product: &Product<'_>| product.out.rows() * product.x.width().div_ceil(TILE_K);
    let packed_len = products.iter().filter(|product| takes(product)).map(len).sum();
    scratch::with(&scratch::TILES, packed_len, TileRow::ZERO, |packed| {
        let mut rest = &mut *packed;
        let shared: Vec<Shared<'_>> = products
            .iter_mut()
            .filter(|product| takes(product))
            .map(|product| {
                let (rows, steps) = (product.out.rows(), product.x.width().div_ceil(TILE_K));
                let own = rest.split_off_mut(..len(product)).unwrap_or_default();
                pack(cpu, product, steps, own);
                Shared { target: product.target(), rows, steps, packed: own }
            })
            .collect();
        let tasks = split(&shared, cpu.threads());
        cpu.pool().run(tasks.len(), |index| {
            let task = &tasks[index];
            let product = &shared[task.product];
            let len = WIDE * task.rows.len();
            scratch::with(&scratch::SUMS, len + WIDE * TILE_ROWS, Vector::ZERO, |memory| {
                let (sums, edge) = memory.split_at_mut(len);
                cpu.dispatch(Compute { unit, product, task, sums, edge });
            });
        });
    });
}

/// Rounds and packs the rows that take part.
fn pack(cpu: &Cpu, product: &Product<'_>, steps: usize, packed: &mut [TileRow]) {
    let rows = product.out.rows();
    let alone = rows * steps * TILE_K < PACK_ALONE;
    let packed = Disjoint::new(packed);
    let pack_tiles = |tiles: Range<usize>| {
        for first in tiles.map(|tile| tile * TILE_ROWS) {
            let rows = first..rows.min(first + TILE_ROWS);
            // SAFETY: tiles do not overlap, and each is packed by one task.
            let to = unsafe { packed.slice(first * steps, rows.len() * steps) };
            cpu.dispatch(Pack { product, rows, to });
        }
    };
    let tiles = rows.div_ceil(TILE_ROWS);
    if alone { pack_tiles(0..tiles) } else { cpu.pool().run_ranges(tiles, 1, pack_tiles) }
}

/// A tile of rows, at each step of `k`.
struct Pack<'a> {
    product: &'a Product<'a>,
    rows: Range<usize>,
    to: &'a mut [TileRow],
}

impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let count = self.rows.len();
        for (index, row) in self.rows.enumerate() {
            let x = self.product.input(row);
            for (step, to) in self.to[index..].iter_mut().step_by(count).enumerate() {
                let at = step * TILE_K;
                let rest = if at + LANES < x.len() { load(s, x, at + LANES) } else { s.splat(0.0) };
                to.round(s, [load(s, x, at), rest]);
            }
        }
    }
}

/// Cuts the products into tasks.
fn split(products: &[Shared<'_>], threads: usize) -> Vec<Task> {
    let rows = |product: &Shared<'_>| {
        (ROW_BLOCK_BYTES / (size_of::<TileRow>() * product.steps) / ROWS * ROWS).clamp(ROWS, 16 * ROWS)
    };
    let blocks = |product: &Shared<'_>| product.rows.div_ceil(rows(product));
    let units = products.iter().map(|product| product.target.weight.panels() * blocks(product)).sum();
    let panels = panels_of_task(units, threads);
    let mut tasks = Vec::with_capacity(units / panels + products.len());
    for (index, product) in products.iter().enumerate() {
        for first in (0..product.rows).step_by(rows(product)) {
            let rows = first..product.rows.min(first + rows(product));
            let panels = product.target.panels_by(panels);
            tasks.extend(panels.map(|panels| Task { product: index, panels, rows: rows.clone() }));
        }
    }
    tasks
}

/// One task, with memory for the sums of two panels, `[panel][row]`, and for the last tiles of their `k`.
struct Compute<'a> {
    unit: TileUnit,
    product: &'a Shared<'a>,
    task: &'a Task,
    sums: &'a mut [Vector],
    edge: &'a mut [Vector],
}

impl Kernel for Compute<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Compute { unit, product, task, sums, edge } = self;
        let mut block = Block { unit, state: TileState::new(), product, rows: task.rows.clone(), sums };
        for first in task.panels.clone().step_by(WIDE) {
            let panels = first..task.panels.end.min(first + WIDE);
            block.compute(panels.clone(), edge);
            product.target.finish(s, panels, task.rows.start, task.rows.len(), block.sums);
        }
    }
}

/// The rows of a task, and the sums of the panels at hand.
struct Block<'a> {
    unit: TileUnit,
    state: TileState,
    product: &'a Shared<'a>,
    rows: Range<usize>,
    sums: &'a mut [Vector],
}

impl Block<'_> {
    /// The sums of one panel or two.
    fn compute(&mut self, panels: Range<usize>, edge: &mut [Vector]) {
        let weight = self.product.target.weight;
        // A single panel is multiplied twice; nobody asks for the second sums.
        let bytes = [panels.start, panels.end - 1].map(|panel| weight.panel(panel));
        let full = bytes[0].len() / TILE_BYTES;
        self.sums.fill(Vector::ZERO);
        for start in (0..full).step_by(BLOCK_STEPS) {
            let steps = (full - start).min(BLOCK_STEPS);
            let prefetch = Prefetch::new(TILE_BYTES, start * TILE_BYTES, bytes[0].len(), WIDE);
            let panels = bytes.map(|panel| panel[start * TILE_BYTES..][..steps * TILE_BYTES].as_ptr());
            // SAFETY: each panel holds these tiles.
            unsafe { self.add(panels, start, steps, Some(prefetch)) };
        }
        let rest = bytes.map(|panel| &panel[full * TILE_BYTES..]);
        if !rest[0].is_empty() {
            // Beyond a panel lies the next one, or nothing.
            let (first, second) = edge.split_at_mut(TILE_ROWS);
            let left = weight.inputs() - full * TILE_K;
            copy_rows(rest[0], left, tile_rows(first));
            copy_rows(rest[1], left, tile_rows(second));
            // SAFETY: each copy is one tile.
            unsafe { self.add([first.as_ptr().cast(), second.as_ptr().cast()], full, 1, None) };
        }
    }

    /// Adds the products of all rows with `steps` tiles at each of `panels`, the first of which is number `start` of `k`.
    ///
    /// # Safety
    /// The tiles must be readable.
    unsafe fn add(&mut self, panels: [*const u8; WIDE], start: usize, steps: usize, prefetch: Option<Prefetch>) {
        let count = self.rows.len();
        for (row, rows) in pairs(count) {
            let mut a = [self.activations(row, rows[0], start, steps); 2];
            if rows[1] > 0 {
                a[1] = self.activations(row + TILE_ROWS, rows[1], start, steps);
            }
            let (first, second) = self.sums.split_at_mut(count);
            let c = [first, second].map(|sums| sums[row..row + rows[0] + rows[1]].as_mut_ptr());
            let mut operands = Operands { rows, a, b: panels, c, steps, ahead: None };
            let prefetch = prefetch.filter(|_| row == 0);
            let parts = prefetch.map_or([(steps, None), (0, None)], |prefetch| {
                prefetch.split(steps).map(|(steps, ahead)| (steps, Some(ahead)))
            });
            for (steps, ahead) in parts.into_iter().filter(|part| part.0 > 0) {
                (operands.steps, operands.ahead) = (steps, ahead);
                // SAFETY: the caller vouches for the weights; activations and sums are what the slices above hold.
                unsafe { self.unit.multiply(&mut self.state, &operands) };
                operands.a[0] = operands.a[0].wrapping_add(steps * rows[0]);
                operands.a[1] = operands.a[1].wrapping_add(steps * rows[1]);
                operands.b = operands.b.map(|panel| panel.wrapping_add(steps * TILE_BYTES));
            }
        }
    }

    /// The tiles of `rows` rows from row `row` of the task on, at steps from `start`.
    fn activations(&self, row: usize, rows: usize, start: usize, steps: usize) -> *const TileRow {
        let tile = &self.product.packed[(self.rows.start + row) * self.product.steps..];
        tile[start * rows..][..steps * rows].as_ptr()
    }
}
