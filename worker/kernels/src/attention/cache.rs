//! Where keys and values are kept.

use std::io;
use std::marker::PhantomData;

use crate::amx::TILE_K;
use crate::elementwise::vectors;
use crate::memory::{Disjoint, Pages};
use crate::panel::{COLUMNS, Element, panel_bytes};
use crate::simd::{Kernel, Simd};
use crate::{Cpu, Level, Rows};

/// Tokens in one block of the cache.
pub const BLOCK_TOKENS: usize = 32;
/// Panels of keys in a block.
pub(super) const KEY_PANELS: usize = BLOCK_TOKENS / COLUMNS;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum KvFormat {
    /// 32-bit floats.
    F32,
    /// bfloat16, rounded to nearest even.
    Bf16,
    /// IEEE half precision, rounded to nearest even: the bytes of bfloat16 with eight times its precision. A finite
    /// number beyond ±65504 is kept as that.
    F16,
}

/// Runs `$body` with `$E` standing for the element type of `$format`.
macro_rules! with_kv_element {
    ($format:expr, $E:ident => $body:expr) => {
        match $format {
            $crate::KvFormat::F32 => {
                type $E = $crate::panel::F32;
                $body
            }
            $crate::KvFormat::Bf16 => {
                type $E = $crate::panel::Bf16;
                $body
            }
            $crate::KvFormat::F16 => {
                type $E = $crate::panel::F16;
                $body
            }
        }
    };
}
pub(super) use with_kv_element;

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

impl KvFormat {
    /// Whether `level` attends over heads of `head_dim` dimensions in this format on tiles.
    pub fn on_tiles(self, level: Level, head_dim: usize) -> bool {
        level == Level::Amx && self.fits_tiles(head_dim)
    }

    pub(super) fn fits_tiles(self, head_dim: usize) -> bool {
        self == KvFormat::Bf16 && head_dim.is_multiple_of(TILE_K)
    }
}

/// Keys and values of all layers in blocks of [`BLOCK_TOKENS`] tokens.
pub struct KvCache {
    shape: KvShape,
    /// `[layer][block][head]` regions, each the keys' panels, then the values'.
    pages: Pages,
}

/// The sizes of a region: what one head has in one block of one layer.
#[derive(Clone, Copy)]
pub(super) struct Region {
    pub(super) key_panel: usize,
    pub(super) value_panel: usize,
    pub(super) value_panels: usize,
}

impl Region {
    pub(super) fn new<E: Element>(head_dim: usize) -> Region {
        Region {
            key_panel: panel_bytes::<E>(head_dim),
            value_panel: panel_bytes::<E>(BLOCK_TOKENS),
            value_panels: head_dim.div_ceil(COLUMNS),
        }
    }

    fn bytes(self) -> usize {
        KEY_PANELS * self.key_panel + self.value_panels * self.value_panel
    }
}

impl KvShape {
    /// Bytes of one block through all layers.
    pub fn block_bytes(&self) -> usize {
        self.layers * self.kv_heads * self.region_bytes()
    }

    /// Bytes of the whole cache.
    pub fn bytes(&self) -> usize {
        self.blocks * self.block_bytes()
    }

    fn region_bytes(&self) -> usize {
        with_kv_element!(self.format, E => Region::new::<E>(self.head_dim).bytes())
    }

    fn region_index(&self, layer: usize, block: usize, head: usize) -> usize {
        (layer * self.blocks + block) * self.kv_heads + head
    }
}

impl KvCache {
    /// An empty cache. Memory is taken as blocks are first written.
    ///
    /// # Errors
    /// When the address space cannot be had.
    ///
    /// # Panics
    /// When a size is 0.
    pub fn new(shape: KvShape) -> io::Result<KvCache> {
        let sizes = [shape.layers, shape.blocks, shape.kv_heads, shape.head_dim];
        assert!(!sizes.contains(&0), "a key-value cache of {shape:?}");
        let bytes = shape.layers.checked_mul(shape.blocks).and_then(|n| n.checked_mul(shape.kv_heads));
        let bytes = bytes.and_then(|n| n.checked_mul(shape.region_bytes())).unwrap_or(usize::MAX);
        Ok(KvCache { shape, pages: Pages::zeroed(bytes)? })
    }

    /// The sizes.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// What `head` has in `block` of `layer`.
    #[inline(always)]
    pub(super) fn region(&self, layer: usize, block: usize, head: usize) -> &[u8] {
        assert!(block < self.shape.blocks);
        let bytes = self.shape.region_bytes();
        &self.pages.as_slice()[self.shape.region_index(layer, block, head) * bytes..][..bytes]
    }

    /// Stores a layer's keys and values: row i goes to slot `slots[i]` = block · [`BLOCK_TOKENS`] + offset; `keys` and
    /// `values` `[rows, kv_heads · head_dim]`. Of two rows for one slot the later one stays.
    ///
    /// # Panics
    /// When the sizes contradict each other or a slot or layer does not exist.
    pub fn write(&mut self, cpu: &Cpu, layer: usize, slots: &[u32], keys: Rows<'_>, values: Rows<'_>) {
        let shape = self.shape;
        let KvShape { layers, blocks, kv_heads, head_dim, .. } = shape;
        assert!(layer < layers, "write: layer {layer} of {layers}");
        assert_eq!((keys.rows(), keys.width()), (slots.len(), kv_heads * head_dim), "write: keys");
        assert_eq!((values.rows(), values.width()), (slots.len(), kv_heads * head_dim), "write: values");
        let missing = slots.iter().find(|&&slot| slot as usize >= blocks * BLOCK_TOKENS);
        assert!(missing.is_none(), "write: slot {missing:?} of {}", blocks * BLOCK_TOKENS);
        let bytes = shape.region_bytes();
        let regions = Disjoint::new(self.pages.as_mut_slice());
        // A task owns the blocks of one residue, so that no two tasks write one region, whatever the slots are.
        let residues = (slots.len() * keys.width() / (1 << 13)).clamp(1, 4 * cpu.threads());
        cpu.pool().run(residues, |residue| {
            for (row, &slot) in slots.iter().enumerate() {
                let (block, offset) = (slot as usize / BLOCK_TOKENS, slot as usize % BLOCK_TOKENS);
                if block % residues != residue {
                    continue;
                }
                for head in 0..kv_heads {
                    // SAFETY: the block belongs to this task, which holds one region at a time.
                    let region = unsafe { regions.slice(shape.region_index(layer, block, head) * bytes, bytes) };
                    let columns = head * head_dim..(head + 1) * head_dim;
                    let (key, value) = (&keys.row(row)[columns.clone()], &values.row(row)[columns]);
                    with_kv_element!(shape.format, E => {
                        cpu.dispatch(PutToken::<E> { region, offset, key, value, element: PhantomData });
                    });
                }
            }
        });
    }

    /// Copies block `from` to block `to` in every layer.
    ///
    /// # Panics
    /// When a block does not exist.
    pub fn copy_block(&mut self, from: usize, to: usize) {
        let KvShape { layers, blocks, kv_heads, .. } = self.shape;
        assert!(from < blocks && to < blocks, "copy of block {from} to {to} of {blocks}");
        let bytes = self.shape.region_bytes();
        for layer in 0..layers {
            let start = self.shape.region_index(layer, from, 0) * bytes;
            let target = self.shape.region_index(layer, to, 0) * bytes;
            self.pages.as_mut_slice().copy_within(start..start + kv_heads * bytes, target);
        }
    }
}

/// Writes one token's key and value of one head.
struct PutToken<'a, E> {
    region: &'a mut [u8],
    offset: usize,
    key: &'a [f32],
    value: &'a [f32],
    element: PhantomData<E>,
}

impl<E: Element> Kernel for PutToken<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let PutToken { region, offset, key, value, .. } = self;
        let sizes = Region::new::<E>(key.len());
        let (keys, values) = region.split_at_mut(KEY_PANELS * sizes.key_panel);
        let panel = &mut keys[offset / COLUMNS * sizes.key_panel..][..sizes.key_panel];
        for at in vectors(key.len()) {
            let stored = E::round_all(s, s.load(&in_range::<E>(key, at)));
            for (dim, &stored) in (at..key.len()).zip(&stored) {
                E::put(panel, dim, offset % COLUMNS, stored);
            }
        }
        for (at, panel) in vectors(value.len()).zip(values.chunks_exact_mut(sizes.value_panel)) {
            let stored = E::round_all(s, s.load(&in_range::<E>(value, at)));
            for (column, &stored) in stored.iter().enumerate() {
                E::put(panel, offset, column, stored);
            }
        }
    }
}

/// Up to sixteen numbers from `at`, zeros after them; a finite number that the format cannot hold becomes its largest,
/// what is not finite stays so.
#[inline(always)]
fn in_range<E: Element>(numbers: &[f32], at: usize) -> [f32; COLUMNS] {
    let mut part = [0.0; COLUMNS];
    let numbers = &numbers[at..numbers.len().min(at + COLUMNS)];
    part[..numbers.len()].copy_from_slice(numbers);
    if E::LARGEST < f32::MAX {
        for number in &mut part {
            *number = if number.is_finite() { number.clamp(-E::LARGEST, E::LARGEST) } else { *number };
        }
    }
    part
}

impl std::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvCache {:?}", self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::panel::{Bf16, F32};
    use crate::simd::Portable;

    #[test]
    fn a_cache_takes_the_bytes_of_its_numbers_when_heads_are_multiples_of_sixteen() {
        let shape = |format| KvShape { layers: 18, blocks: 10, kv_heads: 2, head_dim: 128, format };
        assert_eq!(shape(KvFormat::Bf16).block_bytes(), 18 * 2 * 2 * 128 * 32 * 2);
        assert_eq!(shape(KvFormat::F32).bytes(), 10 * 18 * 2 * 2 * 128 * 32 * 4);
    }

    #[test]
    fn a_cache_larger_than_the_address_space_is_an_error() {
        let shape = KvShape { layers: 1 << 20, blocks: 1 << 40, kv_heads: 8, head_dim: 128, format: KvFormat::F32 };
        assert!(KvCache::new(shape).is_err());
    }

    fn places<E: Element>(head_dim: usize) {
        let sizes = Region::new::<E>(head_dim);
        let mut region = vec![0; sizes.bytes()];
        for offset in 0..BLOCK_TOKENS {
            let key: Vec<f32> = (0..head_dim).map(|dim| (offset * 4 + dim) as f32).collect();
            let value: Vec<f32> = key.iter().map(|key| -key).collect();
            PutToken::<E> { region: &mut region, offset, key: &key, value: &value, element: PhantomData }
                .run(Portable::<false>);
        }
        let (keys, values) = region.split_at(KEY_PANELS * sizes.key_panel);
        for offset in 0..BLOCK_TOKENS {
            for dim in 0..head_dim {
                let panel = &keys[offset / COLUMNS * sizes.key_panel..];
                assert_eq!(E::get(panel, dim, offset % COLUMNS), (offset * 4 + dim) as f32);
                let panel = &values[dim / COLUMNS * sizes.value_panel..];
                assert_eq!(E::get(panel, offset, dim % COLUMNS), -((offset * 4 + dim) as f32));
            }
        }
    }

    #[test]
    fn every_token_has_its_own_place_in_a_block() {
        for head_dim in [1, 6, 16, 40, 128] {
            places::<F32>(head_dim);
            places::<Bf16>(head_dim);
        }
    }
}
