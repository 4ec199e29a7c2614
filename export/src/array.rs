//! Dense f32 arrays: what the exporter computes with. No operations of networks, those are in `evaluate.rs`.

use crate::{Error, Result};

/// Values in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Length of each axis; empty for a scalar.
    pub shape: Vec<usize>,
    /// As many values as the product of `shape`.
    pub data: Vec<f32>,
}

impl Array {
    /// Joins a shape and its values.
    ///
    /// # Errors
    /// If `data` does not fill `shape`.
    pub fn new(shape: &[usize], data: Vec<f32>) -> Result<Self> {
        let expected = shape.iter().product::<usize>();
        if data.len() != expected {
            return Err(Error::Array(format!(
                "got {} values, expected {expected} for {shape:?}",
                data.len()
            )));
        }
        Ok(Self { shape: shape.to_vec(), data })
    }

    /// One value.
    pub fn scalar(value: f32) -> Self {
        Self { shape: vec![], data: vec![value] }
    }

    /// The same value everywhere.
    pub fn filled(shape: &[usize], value: f32) -> Self {
        Self { shape: shape.to_vec(), data: vec![value; shape.iter().product()] }
    }

    /// The same values under another shape.
    ///
    /// # Errors
    /// If the number of elements differs.
    pub fn reshaped(self, shape: &[usize]) -> Result<Self> {
        Self::new(shape, self.data)
    }

    /// Length of the first axis; 1 for a scalar.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Elementwise combination over the first axis, where one of the two may have a single row for all.
    ///
    /// # Errors
    /// If the rows do not broadcast or the other axes differ.
    pub fn zip_rows(&self, other: &Self, f: impl Fn(f32, f32) -> f32) -> Result<Self> {
        let rows = self.common_rows(other)?;
        if self.shape.get(1..) != other.shape.get(1..) {
            return Err(Error::Array(format!("got shape {:?}, expected {:?}", other.shape, self.shape)));
        }
        let len = self.data.len().max(other.data.len());
        let at = |v: &[f32], i: usize| v[i % v.len()];
        let data = (0..len).map(|i| f(at(&self.data, i), at(&other.data, i))).collect();
        let mut shape = self.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = rows;
        }
        Self::new(&shape, data)
    }

    /// Rows of a result of `self` and `other`: equal, or one of them 1.
    ///
    /// # Errors
    /// If the rows do not broadcast.
    pub fn common_rows(&self, other: &Self) -> Result<usize> {
        match (self.rows(), other.rows()) {
            (a, b) if a == b || b == 1 => Ok(a),
            (1, b) => Ok(b),
            (a, b) => Err(Error::Array(format!("got {b} rows, expected {a} or 1"))),
        }
    }

    /// Row `i`, where a single row stands for all.
    pub fn row(&self, i: usize) -> &[f32] {
        let len = self.data.len() / self.rows();
        let start = (i % self.rows()) * len;
        &self.data[start..start + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_row_stands_for_all_and_others_must_agree() {
        let a = Array::new(&[2, 2], vec![1.0, 2.0, 3.0, 4.0]).unwrap();
        let b = Array::new(&[1, 2], vec![10.0, 20.0]).unwrap();
        let sum = a.zip_rows(&b, |x, y| x + y).unwrap();
        assert_eq!((sum.shape.as_slice(), sum.data.as_slice()), (&[2, 2][..], &[11.0, 22.0, 13.0, 24.0][..]));
        assert_eq!(b.zip_rows(&a, |x, y| x + y).unwrap(), sum);
        assert_eq!(a.row(1), [3.0, 4.0]);
        assert!(a.zip_rows(&Array::filled(&[3, 2], 0.0), |x, _| x).is_err());
        assert!(a.zip_rows(&Array::filled(&[2, 1], 0.0), |x, _| x).is_err());
        assert!(Array::new(&[2, 2], vec![0.0; 3]).is_err());
    }
}
