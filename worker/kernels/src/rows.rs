//! Views of row-major f32 matrices whose rows may lie further apart than they are wide.

use std::ops::Range;

use crate::memory::Disjoint;

/// A row-major matrix view: `rows` × `width`, consecutive rows `stride` apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    data: &'a [f32],
    rows: usize,
    width: usize,
    stride: usize,
}

/// A mutable row-major matrix view: `rows` × `width`, consecutive rows `stride` apart.
#[derive(Debug)]
pub struct RowsMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    width: usize,
    stride: usize,
}

/// Elements from the first of the first row to the last of the last.
fn extent(rows: usize, width: usize, stride: usize) -> usize {
    if rows == 0 { 0 } else { (rows - 1) * stride + width }
}

impl<'a> Rows<'a> {
    /// Rows of `width` without gaps; there are `data.len() / width` of them.
    ///
    /// # Panics
    /// When `width` is 0 or does not divide the length.
    pub fn new(data: &'a [f32], width: usize) -> Self {
        assert!(width > 0 && data.len().is_multiple_of(width), "{} elements in rows of {width}", data.len());
        Rows { data, rows: data.len() / width, width, stride: width }
    }

    /// `rows` rows of `width` elements that start `stride` apart.
    ///
    /// # Panics
    /// When `data` is shorter than that, or `width` is 0 or larger than `stride`.
    pub fn strided(data: &'a [f32], rows: usize, width: usize, stride: usize) -> Self {
        assert!(0 < width && width <= stride, "width {width}, stride {stride}");
        let data = &data[..extent(rows, width, stride)];
        Rows { data, rows, width, stride }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Elements from the start of one row to the start of the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Row `index`.
    pub fn row(&self, index: usize) -> &'a [f32] {
        assert!(index < self.rows, "row {index} of {}", self.rows);
        &self.data[index * self.stride..][..self.width]
    }

    /// The rows of `range`.
    pub fn slice(&self, range: Range<usize>) -> Rows<'a> {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let data = if range.is_empty() { &[] } else { &self.data[range.start * self.stride..] };
        Rows::strided(data, range.len(), self.width, self.stride)
    }

    /// The columns of `range`, of every row.
    pub fn columns(&self, range: Range<usize>) -> Rows<'a> {
        assert!(range.start < range.end && range.end <= self.width, "columns {range:?} of {}", self.width);
        let data = if self.rows == 0 { &[] } else { &self.data[range.start..] };
        Rows::strided(data, self.rows, range.len(), self.stride)
    }
}

impl<'a> RowsMut<'a> {
    /// Rows of `width` without gaps; there are `data.len() / width` of them.
    ///
    /// # Panics
    /// When `width` is 0 or does not divide the length.
    pub fn new(data: &'a mut [f32], width: usize) -> Self {
        assert!(width > 0 && data.len().is_multiple_of(width), "{} elements in rows of {width}", data.len());
        let rows = data.len() / width;
        RowsMut { data, rows, width, stride: width }
    }

    /// `rows` rows of `width` elements that start `stride` apart.
    ///
    /// # Panics
    /// When `data` is shorter than that, or `width` is 0 or larger than `stride`.
    pub fn strided(data: &'a mut [f32], rows: usize, width: usize, stride: usize) -> Self {
        assert!(0 < width && width <= stride, "width {width}, stride {stride}");
        let data = &mut data[..extent(rows, width, stride)];
        RowsMut { data, rows, width, stride }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Elements from the start of one row to the start of the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Row `index`.
    pub fn row_mut(&mut self, index: usize) -> &mut [f32] {
        assert!(index < self.rows, "row {index} of {}", self.rows);
        &mut self.data[index * self.stride..][..self.width]
    }

    /// The same rows for a shorter time.
    pub fn reborrow(&mut self) -> RowsMut<'_> {
        RowsMut { data: self.data, rows: self.rows, width: self.width, stride: self.stride }
    }

    /// The same rows, read only.
    pub fn as_rows(&self) -> Rows<'_> {
        Rows { data: self.data, rows: self.rows, width: self.width, stride: self.stride }
    }

    /// The rows of `range`.
    pub fn slice(self, range: Range<usize>) -> RowsMut<'a> {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let data = if range.is_empty() { &mut [] } else { &mut self.data[range.start * self.stride..] };
        RowsMut::strided(data, range.len(), self.width, self.stride)
    }

    /// The columns of `range`, of every row.
    pub fn columns(self, range: Range<usize>) -> RowsMut<'a> {
        assert!(range.start < range.end && range.end <= self.width, "columns {range:?} of {}", self.width);
        let data = if self.rows == 0 { &mut [] } else { &mut self.data[range.start..] };
        RowsMut::strided(data, self.rows, range.len(), self.stride)
    }

    /// The elements, to be written by several threads.
    pub(crate) fn disjoint(&mut self) -> Disjoint<'_, f32> {
        Disjoint::new(self.data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_columns_of_a_view_address_the_same_elements() {
        let data: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let all = Rows::new(&data, 6);
        assert_eq!((all.rows(), all.width()), (4, 6));
        let inner = all.slice(1..4).columns(2..5);
        assert_eq!(inner.row(0), &[8.0, 9.0, 10.0]);
        assert_eq!(inner.row(2), &[20.0, 21.0, 22.0]);
        assert_eq!(all.slice(4..4).rows(), 0);
        let mut copy = data.clone();
        RowsMut::new(&mut copy, 6).slice(1..4).columns(2..5).row_mut(2).fill(-1.0);
        assert_eq!(&copy[19..24], &[19.0, -1.0, -1.0, -1.0, 23.0]);
    }

    #[test]
    #[should_panic(expected = "rows of 5")]
    fn a_length_that_is_no_multiple_of_the_width_is_refused() {
        Rows::new(&[0.0; 12], 5);
    }

    #[test]
    #[should_panic]
    fn a_strided_view_past_the_end_is_refused() {
        Rows::strided(&[0.0; 12], 3, 4, 5);
    }
}
