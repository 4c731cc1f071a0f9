//! Products in vectors of sixteen lanes: every level and every format of weights.
//!
//! A task owns some panels and some rows, keeps their sums in its own scratch memory, goes through `k` in blocks of
//! [`K_BLOCK`], and finishes with the epilogue. With few rows it walks along each panel, so that every weight is read from
//! memory once, in order; with many it takes a block of all its panels at a time, so that the activations stay in the
//! cache. The sum of one output is the same in either order: blocks of `k` from zero, added in ascending order.

use std::marker::PhantomData;
use std::ops::Range;

use super::product::Product;
use super::target::{PACK_ALONE, Target, panels_of_task};
use crate::Cpu;
use crate::matrix::with_weight;
use crate::memory::Disjoint;
use crate::panel::{F32, Prefetch, has_tile};
use crate::scratch::{self, Vector};
use crate::simd::{Kernel, Simd};
use crate::weight::{K_BLOCK, Weight};

/// Most rows of a task: a block of them, `K_BLOCK` long, stays in the second cache.
const ROW_BLOCK: usize = 96;
/// Most panels that a register tile covers.
const MOST_WIDE: usize = 4;
/// Up to so many tiles of rows, a task walks along each panel; more of them are worth widening the weights first.
const FEW_TILES: usize = 2;

/// Rows cut into tiles of nearly equal size.
#[derive(Clone, Copy)]
struct Tiles {
    rows: usize,
    count: usize,
}

impl Tiles {
    fn new(rows: usize, most: usize) -> Tiles {
        Tiles { rows, count: rows.div_ceil(most) }
    }

    fn start(self, tile: usize) -> usize {
        self.rows * tile / self.count
    }
}

/// A product as its tasks see it.
struct Shared<'a> {
    target: Target<'a>,
    tiles: Tiles,
    /// Packed activations: tile after tile, each `[k][rows of the tile]`.
    packed: &'a [f32],
}

/// Some panels and some tiles of a product.
struct Task {
    product: usize,
    panels: Range<usize>,
    tiles: Range<usize>,
}

/// Computes those products that `takes` names.
pub(super) fn run(cpu: &Cpu, products: &mut [Product<'_>], takes: impl Fn(&Product<'_>) -> bool) {
    let most = cpu.dispatch(TileRows);
    let packed_len = products.iter().filter(|product| takes(product)).map(|p| p.out.rows() * p.x.width()).sum();
    scratch::with(&scratch::ACTIVATIONS, packed_len, 0.0, |packed| {
        let mut rest = &mut *packed;
        let shared: Vec<Shared<'_>> = products
            .iter_mut()
            .filter(|product| takes(product))
            .map(|product| {
                let tiles = Tiles::new(product.out.rows(), most);
                let own = rest.split_off_mut(..product.out.rows() * product.x.width()).unwrap_or_default();
                pack(cpu, product, tiles, own);
                Shared { target: product.target(), tiles, packed: own }
            })
            .collect();
        let tasks = split(&shared, cpu.threads());
        cpu.pool().run(tasks.len(), |index| {
            let task = &tasks[index];
            let product = &shared[task.product];
            let first_row = product.tiles.start(task.tiles.start);
            let rows = product.tiles.start(task.tiles.end) - first_row;
            let len = rows * task.panels.len();
            scratch::with(&scratch::SUMS, len + MOST_WIDE * K_BLOCK, Vector::ZERO, |memory| {
                let (sums, widened) = memory.split_at_mut(len);
                with_weight!(product.target.weight.format(), W => {
                    cpu.dispatch(Compute::<W> { product, task, first_row, rows, sums, widened, format: PhantomData });
                });
            });
        });
    });
}

/// The most rows of a tile at this level.
struct TileRows;

impl Kernel for TileRows {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        S::ROWS
    }
}

/// Packs the rows that take part: tile after tile, each `[k][rows of the tile]`.
fn pack(cpu: &Cpu, product: &Product<'_>, tiles: Tiles, packed: &mut [f32]) {
    let width = product.x.width();
    let alone = packed.len() < PACK_ALONE;
    let packed = Disjoint::new(packed);
    let pack_tiles = |range: Range<usize>| {
        for tile in range {
            let (start, end) = (tiles.start(tile), tiles.start(tile + 1));
            // SAFETY: tiles do not overlap, and each is packed by one task.
            let to = unsafe { packed.slice(start * width, (end - start) * width) };
            for row in start..end {
                let column = to[row - start..].iter_mut().step_by(end - start);
                column.zip(product.input(row)).for_each(|(to, from)| *to = *from);
            }
        }
    };
    if alone { pack_tiles(0..tiles.count) } else { cpu.pool().run_ranges(tiles.count, 1, pack_tiles) }
}

/// Cuts the products into tasks.
fn split(products: &[Shared<'_>], threads: usize) -> Vec<Task> {
    let blocks = |product: &Shared<'_>| product.tiles.rows.div_ceil(ROW_BLOCK);
    let units = products.iter().map(|product| product.target.weight.panels() * blocks(product)).sum();
    let panels = panels_of_task(units, threads);
    let mut tasks = Vec::with_capacity(units / panels + products.len());
    for (index, product) in products.iter().enumerate() {
        let (count, blocks) = (product.tiles.count, blocks(product));
        for block in 0..blocks {
            let tiles = count * block / blocks..count * (block + 1) / blocks;
            let panels = product.target.panels_by(panels);
            tasks.extend(panels.map(|panels| Task { product: index, panels, tiles: tiles.clone() }));
        }
    }
    tasks
}

/// One task at one level, with memory for its sums, `[panel][row]`, one vector each, and for widened weights.
struct Compute<'a, W> {
    product: &'a Shared<'a>,
    task: &'a Task,
    first_row: usize,
    rows: usize,
    sums: &'a mut [Vector],
    widened: &'a mut [Vector],
    format: PhantomData<W>,
}

impl<W: Weight> Kernel for Compute<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Compute { product, task, first_row, rows, sums, widened, format } = self;
        let mut block = Block { s, product, task, first_row, rows, sums, widened, format };
        block.compute();
        product.target.finish(s, task.panels.clone(), first_row, rows, block.sums);
    }
}

/// A [`Compute`] with its level.
struct Block<'a, S, W> {
    s: S,
    product: &'a Shared<'a>,
    task: &'a Task,
    first_row: usize,
    rows: usize,
    sums: &'a mut [Vector],
    widened: &'a mut [Vector],
    format: PhantomData<W>,
}

impl<S: Simd, W: Weight> Block<'_, S, W> {
    #[inline(always)]
    fn compute(&mut self) {
        let k = self.product.target.weight.inputs();
        let tiles = self.task.tiles.clone();
        // The widest tile decides how many panels are worked on at once.
        let most = self.rows.div_ceil(tiles.len().max(1));
        let wide = match most {
            1 => 4,
            2 => 2,
            _ if S::WIDE => 2,
            _ => 1,
        };
        if tiles.len() <= FEW_TILES {
            for panel in self.task.panels.clone().step_by(wide) {
                for start in (0..k).step_by(K_BLOCK) {
                    if most <= W::MOST_DIRECT_ROWS {
                        self.add_panels(panel, wide, start);
                    } else {
                        self.add_panels_widened(panel, wide, start);
                    }
                }
            }
        } else {
            for start in (0..k).step_by(K_BLOCK) {
                for panel in self.task.panels.clone().step_by(wide) {
                    if W::WIDENED_FOR_MANY {
                        self.add_panels_widened(panel, wide, start);
                    } else {
                        self.add_panels(panel, wide, start);
                    }
                }
            }
        }
    }

    /// The block of `k` from `start` of a panel.
    #[inline(always)]
    fn block_of(&self, panel: usize, start: usize) -> &[u8] {
        let weight = self.product.target.weight;
        &weight.panel(panel)[W::block(weight.inputs(), start)]
    }

    /// Adds a block of `k` for up to `wide` panels and all tiles.
    #[inline(always)]
    fn add_panels(&mut self, panel: usize, wide: usize, start: usize) {
        let mut blocks = [std::ptr::null(); MOST_WIDE];
        let wide = wide.min(self.task.panels.end - panel);
        for (p, block) in blocks[..wide].iter_mut().enumerate() {
            *block = self.block_of(panel + p, start).as_ptr();
        }
        let k = self.product.target.weight.inputs();
        self.add_tiles::<W>(panel, &blocks[..wide], start, W::prefetch(k, start, wide));
    }

    /// The same with the panels widened first, once for all tiles.
    #[inline(always)]
    fn add_panels_widened(&mut self, panel: usize, wide: usize, start: usize) {
        let mut blocks = [std::ptr::null(); MOST_WIDE];
        let wide = wide.min(self.task.panels.end - panel);
        let widened = std::mem::take(&mut self.widened);
        let len = (self.product.target.weight.inputs() - start).min(K_BLOCK);
        for (p, block) in blocks[..wide].iter_mut().enumerate() {
            let to = &mut widened[p * K_BLOCK..][..K_BLOCK];
            W::widen(self.s, self.block_of(panel + p, start), len, to);
            *block = to.as_ptr().cast();
        }
        self.add_tiles::<F32>(panel, &blocks[..wide], start, Prefetch::ON);
        self.widened = widened;
    }

    /// Adds a block of `k`, at `blocks` in the format `X`, for all tiles.
    #[inline(always)]
    fn add_tiles<X: Weight>(&mut self, panel: usize, blocks: &[*const u8], start: usize, prefetch: Prefetch) {
        for tile in self.task.tiles.clone() {
            let first = self.product.tiles.start(tile);
            let rows = self.product.tiles.start(tile + 1) - first;
            macro_rules! widths {
                ($($rows:literal: $wide:literal;)*) => {
                    match (rows, blocks.len()) {
                        $(($rows, $wide) => self.add::<X, $rows, $wide>(panel, blocks, first, start, prefetch),)*
                        $(($rows, _) => for p in 0..blocks.len() {
                            self.add::<X, $rows, 1>(panel + p, &blocks[p..], first, start, prefetch);
                        },)*
                        _ => unreachable!("tiles have at most {} rows", S::ROWS),
                    }
                };
            }
            widths! { 1: 4; 2: 2; 3: 2; 4: 2; 5: 2; 6: 2; 7: 2; 8: 2; }
        }
    }

    /// Adds a block of `k` for `P` panels and the tile of `R` rows from `first`.
    #[inline(always)]
    fn add<X: Weight, const R: usize, const P: usize>(
        &mut self,
        panel: usize,
        blocks: &[*const u8],
        first: usize,
        start: usize,
        prefetch: Prefetch,
    ) {
        if const { !has_tile::<S, R, P>() || R > X::MOST_DIRECT_ROWS } {
            unreachable!("no tile of {R} rows and {P} panels at this level");
        }
        let s = self.s;
        let k = self.product.target.weight.inputs();
        let len = (k - start).min(K_BLOCK);
        let a = &self.product.packed[first * k + start * R..][..len * R];
        let mut panels = [std::ptr::null(); P];
        panels.copy_from_slice(&blocks[..P]);
        // SAFETY: `a` holds `R` numbers for each of `len` k. Each block is the part of a panel that `block_of` has cut
        // to `len`, or a copy of it in `widened`, which is `K_BLOCK` long.
        let sums: [[S::V; P]; R] = unsafe { X::tile(s, a.as_ptr(), panels, len, prefetch) };
        for p in 0..P {
            let at = (panel + p - self.task.panels.start) * self.rows + first - self.first_row;
            let to = &mut self.sums[at..at + R];
            for r in 0..R {
                let sum = if start == 0 { sums[r][p] } else { s.add(s.load(&to[r].0), sums[r][p]) };
                s.store(&mut to[r].0, sum);
            }
        }
    }
}
