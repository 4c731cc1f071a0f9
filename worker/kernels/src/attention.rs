//! The paged key-value cache and attention over it.

use half::bf16;

use crate::{Cpu, Rows, RowsMut};

/// Tokens in one block of the cache.
pub const BLOCK_TOKENS: usize = 32;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum KvFormat {
    /// 32-bit floats.
    F32,
    /// bfloat16, rounded to nearest even.
    Bf16,
}

/// The sizes of a cache.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct KvShape {
    /// Layers of the model.
    pub layers: usize,
    /// Blocks of [`BLOCK_TOKENS`] tokens, each through all layers.
    pub blocks: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Storage format.
    pub format: KvFormat,
}

/// Keys and values of all layers in blocks of [`BLOCK_TOKENS`] tokens.
pub struct KvCache {
    shape: KvShape,
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Constants of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads; a multiple of the cache's key-value heads. Query head i uses key-value head
    /// i / (heads / kv_heads).
    pub heads: usize,
    /// Factor of the scores, 1/√head_dim.
    pub scale: f32,
    /// How many positions a query sees, itself included; `None` for all.
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

impl KvShape {
    /// Bytes of one block through all layers.
    pub fn block_bytes(&self) -> usize {
        let number = match self.format {
            KvFormat::F32 => 4,
            KvFormat::Bf16 => 2,
        };
        2 * self.layers * self.kv_heads * self.head_dim * BLOCK_TOKENS * number
    }

    /// Bytes of the whole cache.
    pub fn bytes(&self) -> usize {
        self.blocks * self.block_bytes()
    }
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn new(shape: KvShape) -> std::io::Result<KvCache> {
        let numbers = shape.layers * shape.blocks * BLOCK_TOKENS * shape.kv_heads * shape.head_dim;
        Ok(KvCache { shape, keys: vec![0.0; numbers], values: vec![0.0; numbers] })
    }

    /// The sizes.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    fn at(&self, layer: usize, slot: usize, head: usize) -> usize {
        let KvShape { blocks, kv_heads, head_dim, .. } = self.shape;
        ((layer * blocks * BLOCK_TOKENS + slot) * kv_heads + head) * head_dim
    }

    /// Stores a layer's keys and values: row i goes to slot `slots[i]` = block · [`BLOCK_TOKENS`] + offset; `keys` and
    /// `values` `[rows, kv_heads · head_dim]`.
    ///
    /// # Panics
    /// When the sizes contradict each other or a slot or layer does not exist.
    pub fn write(&mut self, cpu: &Cpu, layer: usize, slots: &[u32], keys: Rows<'_>, values: Rows<'_>) {
        let _ = cpu;
        let KvShape { layers, blocks, kv_heads, head_dim, format } = self.shape;
        assert!(layer < layers, "layer {layer} of {layers}");
        assert_eq!((keys.rows(), keys.width()), (slots.len(), kv_heads * head_dim), "keys");
        assert_eq!((values.rows(), values.width()), (slots.len(), kv_heads * head_dim), "values");
        let round = |x: f32| if format == KvFormat::Bf16 { bf16::from_f32(x).to_f32() } else { x };
        for (row, &slot) in slots.iter().enumerate() {
            assert!((slot as usize) < blocks * BLOCK_TOKENS, "slot {slot} of {}", blocks * BLOCK_TOKENS);
            let at = self.at(layer, slot as usize, 0);
            for (i, (&key, &value)) in keys.row(row).iter().zip(values.row(row)).enumerate() {
                self.keys[at + i] = round(key);
                self.values[at + i] = round(value);
            }
        }
    }

    /// Copies block `from` to block `to` in every layer.
    ///
    /// # Panics
    /// When a block does not exist.
    pub fn copy_block(&mut self, from: usize, to: usize) {
        let KvShape { layers, blocks, kv_heads, head_dim, .. } = self.shape;
        assert!(from < blocks && to < blocks, "copy of block {from} to {to} of {blocks}");
        let block = BLOCK_TOKENS * kv_heads * head_dim;
        for layer in 0..layers {
            let (from, to) = (self.at(layer, from * BLOCK_TOKENS, 0), self.at(layer, to * BLOCK_TOKENS, 0));
            self.keys.copy_within(from..from + block, to);
            self.values.copy_within(from..from + block, to);
        }
    }

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
        let _ = cpu;
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let group = attention.heads / kv_heads;
        assert_eq!((q.rows(), q.width()), (out.rows(), out.width()), "attend: shape");
        assert_eq!(q.width(), attention.heads * head_dim, "attend: width");
        for span in spans {
            for i in 0..span.rows {
                let last = span.start + i;
                let first = attention.window.map_or(0, |window| (last + 1).saturating_sub(window));
                for head in 0..attention.heads {
                    let q = &q.row(span.row + i)[head * head_dim..][..head_dim];
                    let slot = |p: usize| span.blocks[p / BLOCK_TOKENS] as usize * BLOCK_TOKENS + p % BLOCK_TOKENS;
                    let mut scores: Vec<f32> = (first..=last)
                        .map(|p| {
                            let key = &self.keys[self.at(layer, slot(p), head / group)..][..head_dim];
                            q.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() * attention.scale
                        })
                        .collect();
                    crate::softmax(cpu, &mut scores);
                    let out = &mut out.row_mut(span.row + i)[head * head_dim..][..head_dim];
                    out.fill(0.0);
                    for (p, weight) in (first..=last).zip(&scores) {
                        let value = &self.values[self.at(layer, slot(p), head / group)..][..head_dim];
                        out.iter_mut().zip(value).for_each(|(out, v)| *out += weight * v);
                    }
                }
            }
        }
    }
}
