//! Memory between inaccessible pages: touching one byte outside ends the test.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};

const PAGE: usize = 4096;

/// Which end lies flush against an inaccessible page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Side {
    Start,
    End,
}

/// The other side each time.
pub(crate) fn side() -> Side {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    if CALLS.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) { Side::End } else { Side::Start }
}

/// A slice with an inaccessible page right before or right after it.
pub(crate) struct Guarded<T> {
    map: *mut u8,
    map_len: usize,
    data: *mut T,
    len: usize,
}

// SAFETY: it owns its memory, which holds plain numbers.
unsafe impl<T: Send> Send for Guarded<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Guarded<T> {}

impl<T: Copy> Guarded<T> {
    /// `len` elements, every byte 0xff: NaN in every float format.
    pub(crate) fn poisoned(len: usize, side: Side) -> Self {
        Self::filled(len, side, 0xff).expect("memory for a test")
    }

    /// The elements of `values`.
    pub(crate) fn new(values: &[T], side: Side) -> Self {
        let mut memory = Self::poisoned(values.len(), side);
        memory.copy_from_slice(values);
        memory
    }

    fn filled(len: usize, side: Side, byte: u8) -> io::Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let inner = bytes.checked_next_multiple_of(PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let map_len = inner.checked_add(2 * PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new private mapping at an address of the kernel's choice touches no other memory.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let map = map.cast::<u8>();
        // SAFETY: the range lies inside the mapping.
        if inner > 0 && unsafe { libc::mprotect(map.add(PAGE).cast(), inner, libc::PROT_READ | libc::PROT_WRITE) } != 0
        {
            return Err(io::Error::last_os_error());
        }
        let offset = match side {
            Side::Start => PAGE,
            Side::End => PAGE + inner - bytes,
        };
        // SAFETY: `bytes` from `offset` lie inside the accessible part.
        let data = unsafe {
            let start = map.add(offset);
            if byte != 0 {
                start.write_bytes(byte, bytes);
            }
            start.cast::<T>()
        };
        assert!(data.is_aligned(), "an element of {} bytes at the end of a page", size_of::<T>());
        Ok(Guarded { map, map_len, data, len })
    }
}

impl<T> Deref for Guarded<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `data` points at `len` initialised elements that live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `filled` and nothing refers to it any more.
        unsafe { libc::munmap(self.map.cast(), self.map_len) };
    }
}

/// What `crate::memory::Pages` is in tests.
pub(crate) struct GuardedPages(Guarded<u8>);

impl GuardedPages {
    pub(crate) fn zeroed(len: usize) -> io::Result<Self> {
        Guarded::filled(len, side(), 0).map(GuardedPages)
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// A view's elements in guarded memory: rows `stride` apart, the last one ending at the last element.
pub(crate) fn strided(values: &[f32], width: usize, stride: usize, side: Side) -> Guarded<f32> {
    let rows = values.len() / width;
    let len = if rows == 0 { 0 } else { (rows - 1) * stride + width };
    let mut memory = Guarded::poisoned(len, side);
    for (row, values) in values.chunks_exact(width).enumerate() {
        memory[row * stride..][..width].copy_from_slice(values);
    }
    memory
}

/// The opposite of [`strided`].
pub(crate) fn gathered(memory: &[f32], rows: usize, width: usize, stride: usize) -> Vec<f32> {
    (0..rows).flat_map(|row| memory[row * stride..][..width].to_vec()).collect()
}

#[test]
fn guarded_memory_is_writable_up_to_both_ends() {
    for side in [Side::Start, Side::End] {
        for len in [0, 1, 7, 4096, 5000] {
            let mut memory = Guarded::new(&vec![1u8; len], side);
            memory.fill(2);
            assert!(memory.iter().all(|&byte| byte == 2));
        }
    }
}
