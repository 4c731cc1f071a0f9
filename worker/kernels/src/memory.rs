//! Memory that kernels read and write: zeroed pages of our own, and slices that several threads write apart.

use std::io;
use std::marker::PhantomData;

use memmap2::{MmapMut, MmapOptions};

/// Size and alignment of a huge page.
const HUGE: usize = 2 << 20;

/// Tests put what kernels work on between inaccessible pages.
#[cfg(test)]
pub(crate) use crate::tests::guard::GuardedPages as Pages;
#[cfg(not(test))]
pub(crate) use HugePages as Pages;

/// Zeroed anonymous memory, on huge pages where it spans some. Pages that are never touched take no memory.
pub(crate) struct HugePages {
    map: MmapMut,
    offset: usize,
    len: usize,
}

impl HugePages {
    /// `len` zeroed bytes, aligned to a page, or to a huge page when they fill one.
    pub(crate) fn zeroed(len: usize) -> io::Result<HugePages> {
        let slack = if len >= HUGE { HUGE } else { 0 };
        let total = len.checked_add(slack).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?.max(1);
        let map = MmapOptions::new()
            .len(total)
            .map_anon()
            .map_err(|error| io::Error::new(error.kind(), format!("cannot reserve {len} bytes of memory: {error}")))?;
        let offset = if slack > 0 { map.as_ptr().align_offset(HUGE) } else { 0 };
        #[cfg(target_os = "linux")]
        if slack > 0 {
            // Advice only: without huge pages the memory is the same, a few per cent slower.
            let whole = len / HUGE * HUGE;
            let _ = map.advise_range(memmap2::Advice::HugePage, offset, whole);
            // A huge page for a small rest would take up to a huge page more than was asked for.
            let _ = map.advise_range(memmap2::Advice::NoHugePage, offset + whole, total - offset - whole);
        }
        Ok(HugePages { map, offset, len })
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.map[self.offset..][..self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.map[self.offset..][..self.len]
    }
}

/// A mutable slice of which several threads write parts that do not overlap.
#[derive(Clone, Copy)]
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]` that is only taken apart through `slice`, whose callers vouch that parts in use at
// the same time do not overlap; each part is a `&mut [T]`, which may be sent where `T` may.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: as above; a shared `Disjoint` gives nothing but such parts.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Disjoint { start: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// The `len` elements from `at`.
    ///
    /// # Safety
    /// No two parts that are in use at the same time may overlap.
    ///
    /// # Panics
    /// When the part goes past the end.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "callers vouch that parts do not overlap")]
    pub(crate) unsafe fn slice(&self, at: usize, len: usize) -> &'a mut [T] {
        assert!(at <= self.len && len <= self.len - at, "part {at}+{len} of {}", self.len);
        // SAFETY: the part lies inside the slice this was made from, which is borrowed mutably for 'a; the caller
        // vouches that nothing else refers to it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_zeroed_aligned_and_writable_at_any_size() {
        for len in [0, 1, 4096, HUGE - 1, HUGE, 3 * HUGE + 5] {
            let mut pages = HugePages::zeroed(len).expect("memory");
            assert_eq!(pages.as_slice().len(), len);
            assert!(pages.as_slice().iter().all(|&byte| byte == 0));
            assert_eq!(pages.as_slice().as_ptr().align_offset(if len >= HUGE { HUGE } else { 64 }), 0);
            pages.as_mut_slice().fill(7);
            assert!(pages.as_slice().iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn more_memory_than_there_can_be_is_an_error_that_says_how_much() {
        let error = HugePages::zeroed(usize::MAX / 2).err().expect("no such memory").to_string();
        assert!(error.contains("bytes of memory"), "{error}");
    }

    #[test]
    #[should_panic(expected = "part 3+2 of 4")]
    fn a_part_past_the_end_is_refused() {
        let mut data = [0u8; 4];
        // SAFETY: there is no other part.
        let _ = unsafe { Disjoint::new(&mut data).slice(3, 2) };
    }
}
