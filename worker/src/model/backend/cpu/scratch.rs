//! Activations in recycled memory: a forward pass allocates nothing once buffers of its sizes exist.

use std::sync::{Arc, Mutex, PoisonError};

use ernie_kernels::{Rows as View, RowsMut as ViewMut};

/// The most buffers that are kept; a layer has about five at a time.
const KEPT: usize = 12;

/// Buffers that wait for their next use.
#[derive(Clone, Debug, Default)]
pub(super) struct Scratch {
    free: Arc<Mutex<Vec<Vec<f32>>>>,
}

/// Activations `[rows, width]` without gaps.
#[derive(Debug)]
pub struct Rows {
    data: Vec<f32>,
    rows: usize,
    width: usize,
    home: Scratch,
}

impl Scratch {
    /// Rows of arbitrary content.
    pub(super) fn rows(&self, rows: usize, width: usize) -> Rows {
        let length = rows * width;
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // the smallest that is large enough, else the largest
        let fitting = (0..free.len()).filter(|&i| free[i].capacity() >= length).min_by_key(|&i| free[i].capacity());
        let place = fitting.or_else(|| (0..free.len()).max_by_key(|&i| free[i].capacity()));
        let mut data = place.map(|place| free.swap_remove(place)).unwrap_or_default();
        drop(free);
        if data.capacity() < length {
            // not resized: its old content need not be copied
            data = vec![0.0; length];
        }
        data.resize(length, 0.0);
        Rows { data, rows, width, home: self.clone() }
    }
}

impl Rows {
    /// Number of rows.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// The rows, to read.
    pub(super) fn view(&self) -> View<'_> {
        View::new(&self.data, self.width)
    }

    /// The rows, to write.
    pub(super) fn view_mut(&mut self) -> ViewMut<'_> {
        ViewMut::new(&mut self.data, self.width)
    }

    /// The numbers, out of the recycling.
    pub(super) fn into_vec(mut self) -> Vec<f32> {
        std::mem::take(&mut self.data)
    }
}

impl Clone for Rows {
    fn clone(&self) -> Self {
        let mut copy = self.home.rows(self.rows, self.width);
        copy.data.copy_from_slice(&self.data);
        copy
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        let mut free = self.home.free.lock().unwrap_or_else(PoisonError::into_inner);
        if data.capacity() > 0 && free.len() < KEPT {
            free.push(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_for_rows_that_fit_it() {
        let scratch = Scratch::default();
        let place = scratch.rows(4, 8).data.as_ptr();
        let again = scratch.rows(2, 8);
        assert_eq!(again.data.as_ptr(), place);
        assert_eq!((again.rows(), again.width(), again.data.len()), (2, 8, 16));
    }

    #[test]
    fn no_more_buffers_are_kept_than_a_pass_needs() {
        let scratch = Scratch::default();
        let all: Vec<Rows> = (0..3 * KEPT).map(|_| scratch.rows(1, 1)).collect();
        drop(all);
        assert_eq!(scratch.free.lock().expect("not poisoned").len(), KEPT);
    }
}
