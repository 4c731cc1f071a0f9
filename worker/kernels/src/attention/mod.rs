//! Attention over a paged cache of keys and values.
//!
//! A block of the cache holds, for each layer and key-value head, 32 positions: the keys as two panels of sixteen
//! positions (`k` runs over the head's dimensions), the values as panels of sixteen dimensions (`k` runs over
//! positions). Both are the second operand of [`crate::panel::tile`] as they lie.
//!
//! The query rows of one key-value head are all its query heads of all tokens of a span, so that each key and value is
//! loaded once for a whole group. Positions are gone through in tiles of [`TILE`] with a running maximum, and in splits
//! of [`SPLIT`] that each start afresh and are merged in ascending order. Tiles and splits lie at fixed absolute
//! positions, so a row's result does not depend on whether it was computed in a prompt, in a chunk or alone.
//!
//! With AMX and a cache of bf16 numbers, queries and weights are rounded to bf16 and multiplied on tiles (`tiles`); all else
//! is the same.

mod cache;
mod item;
mod tiles;

use std::marker::PhantomData;

use crate::amx::TileUnit;
use crate::memory::Disjoint;
use crate::{Cpu, Rows, RowsMut, scratch};

use cache::with_kv_element;
pub use cache::{BLOCK_TOKENS, KvCache, KvFormat, KvShape};
use item::{Item, Merge, Part, ROW_BLOCK};

/// Positions that are scored together.
const TILE: usize = 2 * BLOCK_TOKENS;
/// Positions that are reduced by themselves, before the merge. Part of the order of summation.
const SPLIT: usize = 512;

/// Constants of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads; a multiple of the cache's key-value heads. Query head i uses key-value head
    /// i / (heads / kv_heads).
    pub heads: usize,
    /// Factor of the scores, 1/√head_dim.
    pub scale: f32,
    /// How many positions a query sees, itself included (at least 1); `None` for all.
    pub window: Option<usize>,
}

/// Consecutive rows of one sequence in a flat batch.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// First row in the batch.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Place of the first row in its sequence: it sees the places `0..=start`, the next one `0..=start + 1`, …
    pub start: usize,
    /// The sequence's blocks, covering at least `start + rows` tokens.
    pub blocks: &'a [u32],
}

impl Attention {
    /// The first position that a query at `position` sees.
    fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// What all items of one call share.
struct Call<'a> {
    cache: &'a KvCache,
    layer: usize,
    attention: Attention,
    /// Query heads of a key-value head.
    group: usize,
    q: Rows<'a>,
    /// What multiplies queries and weights, rounded to bf16, where the cache is of such numbers.
    unit: Option<TileUnit>,
    out: Disjoint<'a, f32>,
    out_stride: usize,
}

impl KvCache {
    /// Causal attention of a flat batch over the cache, which already holds the keys and values of the batch's own
    /// rows: `q` and `out` `[rows, heads · head_dim]`. Rows outside every span are left as they are.
    ///
    /// # Panics
    /// When the sizes contradict each other, a block does not exist or spans overlap.
    pub fn attend(
        &self,
        cpu: &Cpu,
        layer: usize,
        attention: &Attention,
        q: Rows<'_>,
        spans: &[Span<'_>],
        mut out: RowsMut<'_>,
    ) {
        let shape = self.shape();
        assert!(layer < shape.layers, "attend: layer {layer} of {}", shape.layers);
        assert!(attention.heads > 0 && attention.heads.is_multiple_of(shape.kv_heads), "attend: {attention:?}");
        assert!(attention.window != Some(0), "attend: a window of 0 positions");
        assert_eq!((q.rows(), q.width()), (out.rows(), out.width()), "attend: shape");
        assert_eq!(q.width(), attention.heads * shape.head_dim, "attend: width");
        check_spans(spans, q.rows(), shape.blocks);
        let group = attention.heads / shape.kv_heads;
        let out_stride = out.stride();
        let unit = cpu.tile_unit().filter(|_| shape.format.fits_tiles(shape.head_dim));
        let call = Call { cache: self, layer, attention: *attention, group, q, unit, out: out.disjoint(), out_stride };
        let plan = Plan::new(&call, spans);
        let part_len = item::part_len(shape.head_dim);
        scratch::with(&scratch::PARTIALS, plan.part_rows * part_len, 0.0, |partials| {
            let shared = Disjoint::new(&mut *partials);
            let vectors = item::scratch_vectors(shape.head_dim);
            cpu.pool().run(plan.items.len(), |index| {
                let item = &plan.items[index];
                // SAFETY: the parts of different items do not overlap.
                let part = item
                    .part
                    .as_ref()
                    .map(|part| unsafe { shared.slice(part.first_row * part_len, item.rows.len() * part_len) });
                scratch::with(&scratch::SUMS, vectors, scratch::Vector::ZERO, |memory| {
                    let span = &spans[item.span];
                    with_kv_element!(shape.format, E => {
                        cpu.dispatch(item::Compute::<E> { call: &call, item, span, part, memory, element: PhantomData });
                    });
                });
            });
            let partials = &*partials;
            cpu.pool().run(plan.merges.len(), |index| {
                let merge = &plan.merges[index];
                scratch::with(&scratch::SUMS, vectors, scratch::Vector::ZERO, |memory| {
                    cpu.dispatch(item::MergeParts { call: &call, merge, span: &spans[merge.span], partials, memory });
                });
            });
        });
    }
}

/// Refuses spans that overlap, end outside the batch, or whose blocks do not exist or do not cover them.
fn check_spans(spans: &[Span<'_>], rows: usize, blocks: usize) {
    let mut ranges: Vec<(usize, usize)> = spans.iter().map(|span| (span.row, span.rows)).collect();
    ranges.sort_unstable();
    let mut end = 0;
    for (row, count) in ranges {
        assert!(row >= end && count <= rows && row <= rows - count, "attend: spans overlap or leave the {rows} rows");
        end = row + count;
    }
    for span in spans {
        assert!(span.blocks.len() * BLOCK_TOKENS >= span.start + span.rows, "attend: too few blocks for a span");
        let missing = span.blocks.iter().find(|&&block| block as usize >= blocks);
        assert!(missing.is_none(), "attend: block {missing:?} of {blocks}");
    }
}

/// The work of a call: items for one loop, then merges for another.
struct Plan {
    items: Vec<Item>,
    merges: Vec<Merge>,
    /// Rows of partial results, of all items together.
    part_rows: usize,
}

impl Plan {
    /// Few rows over many positions are cut along the positions, many rows among themselves; the results are the same.
    fn new(call: &Call<'_>, spans: &[Span<'_>]) -> Plan {
        let mut plan = Plan { items: Vec::new(), merges: Vec::new(), part_rows: 0 };
        let kv_heads = call.cache.shape().kv_heads;
        for (number, span) in spans.iter().enumerate().filter(|(_, span)| span.rows > 0) {
            let rows = span.rows * call.group;
            let splits = call.attention.first_seen(span.start) / SPLIT..(span.start + span.rows).div_ceil(SPLIT);
            for head in 0..kv_heads {
                if rows <= ROW_BLOCK && splits.len() > 1 {
                    plan.merges.push(Merge {
                        span: number,
                        head,
                        rows,
                        first_row: plan.part_rows,
                        splits: splits.len(),
                    });
                    for split in splits.clone() {
                        let part = Part { split, first_row: plan.part_rows };
                        plan.items.push(Item { span: number, head, rows: 0..rows, part: Some(part) });
                        plan.part_rows += rows;
                    }
                } else {
                    let blocks = rows.div_ceil(ROW_BLOCK);
                    // The last rows see the most: they go first.
                    for block in (0..blocks).rev() {
                        let rows = block * ROW_BLOCK..rows.min((block + 1) * ROW_BLOCK);
                        plan.items.push(Item { span: number, head, rows, part: None });
                    }
                }
            }
        }
        plan
    }
}
