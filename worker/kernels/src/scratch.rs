//! Working memory that each thread keeps between calls.

use std::cell::Cell;
use std::thread::LocalKey;

use crate::amx::TileRow;
use crate::simd::LANES;

/// One vector in memory, on its own cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Vector(pub(crate) [f32; LANES]);

/// A thread's buffer of some kind.
pub(crate) type Buffer<T> = LocalKey<Cell<Vec<T>>>;

thread_local! {
    /// Activations packed for a product.
    pub(crate) static ACTIVATIONS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Activations packed for a product of tiles.
    pub(crate) static TILES: Cell<Vec<TileRow>> = const { Cell::new(Vec::new()) };
    /// Sums of a task.
    pub(crate) static SUMS: Cell<Vec<Vector>> = const { Cell::new(Vec::new()) };
    /// What a mixture of experts keeps between its products.
    pub(crate) static EXPERTS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Partial results of attention.
    pub(crate) static PARTIALS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

impl Vector {
    pub(crate) const ZERO: Vector = Vector([0.0; LANES]);
}

/// The same memory as rows of tiles.
pub(crate) fn tile_rows(vectors: &mut [Vector]) -> &mut [TileRow] {
    const { assert!(size_of::<Vector>() == size_of::<TileRow>() && align_of::<Vector>() == align_of::<TileRow>()) };
    // SAFETY: both are 64 bytes of plain numbers with one alignment, and every bit pattern is one of either.
    unsafe { std::slice::from_raw_parts_mut(vectors.as_mut_ptr().cast(), vectors.len()) }
}

/// Runs `body` on `len` elements of the thread's buffer, which hold anything. A nested use of the same buffer gets
/// another one, and a panic in `body` loses the buffer, not more.
#[cfg(not(test))]
pub(crate) fn with<T: Copy, R>(buffer: &'static Buffer<T>, len: usize, fill: T, body: impl FnOnce(&mut [T]) -> R) -> R {
    let mut memory = buffer.take();
    if memory.len() < len {
        memory.resize(len, fill);
    }
    let result = body(&mut memory[..len]);
    buffer.set(memory);
    result
}

/// The same for tests: new memory each time, between inaccessible pages, full of NaN.
#[cfg(test)]
pub(crate) fn with<T: Copy, R>(_: &'static Buffer<T>, len: usize, _: T, body: impl FnOnce(&mut [T]) -> R) -> R {
    body(&mut crate::tests::guard::Guarded::poisoned(len, crate::tests::guard::side()))
}
