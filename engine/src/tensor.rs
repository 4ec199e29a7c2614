//! Stored values: read from the file when a node needs them, and what is computed from them alone while a network is built.

use std::borrow::Cow;

use half::f16;

use crate::message::{self, EXTERNAL, data_type};

/// Values of a shape; none if they cannot be counted.
pub fn count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d))
}

/// Numbers that a stored value of the file holds, whatever its shape says.
pub fn numbers(tensor: &message::Tensor) -> usize {
    let width = match tensor.data_type {
        data_type::FLOAT | data_type::INT32 => 4,
        data_type::FLOAT16 => 2,
        data_type::INT64 => 8,
        _ => 1,
    };
    tensor.raw_data.len() / width
        + tensor.float_data.len()
        + tensor.int32_data.len()
        + tensor.int64_data.len()
}

/// Values whose numbers are known.
#[derive(Clone, Debug)]
pub enum Stored {
    /// As they are in the file.
    File(Box<message::Tensor>),
    /// Computed from others: shape and values.
    Floats(Vec<usize>, Vec<f32>),
}

impl Stored {
    /// Its shape.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::File(tensor) => tensor.dims.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect(),
            Self::Floats(shape, _) => shape.clone(),
        }
    }

    /// How many numbers it holds, whatever its shape says.
    pub fn len(&self) -> usize {
        match self {
            Self::File(tensor) => numbers(tensor),
            Self::Floats(_, values) => values.len(),
        }
    }

    /// Whether its type is one of integers.
    pub fn is_of_integers(&self) -> bool {
        matches!(self, Self::File(tensor) if data_type::INTEGERS.contains(&tensor.data_type))
    }

    /// Its values as floats. 16-bit floats and integers are converted, the latter exactly up to 2^24.
    pub fn floats(&self) -> Result<Cow<'_, [f32]>, String> {
        let tensor = match self {
            Self::Floats(_, values) => return Ok(Cow::Borrowed(values)),
            Self::File(tensor) => tensor,
        };
        let raw = &tensor.raw_data;
        let values: Vec<f32> = match tensor.data_type {
            data_type::FLOAT if raw.is_empty() => tensor.float_data.clone(),
            data_type::FLOAT => raw.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            data_type::FLOAT16 => {
                raw.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()
            }
            data_type::INT8 => raw.iter().map(|&b| f32::from(b.cast_signed())).collect(),
            data_type::UINT8 => raw.iter().map(|&b| f32::from(b)).collect(),
            _ => self.integers()?.iter().map(|&v| v as f32).collect(),
        };
        self.filled(values.len())?;
        Ok(Cow::Owned(values))
    }

    /// Its values as integers.
    pub fn integers(&self) -> Result<Vec<i64>, String> {
        let Self::File(tensor) = self else { return Err("got floats, expected integers".to_owned()) };
        let raw = &tensor.raw_data;
        let values: Vec<i64> = match tensor.data_type {
            data_type::INT64 if raw.is_empty() => tensor.int64_data.clone(),
            data_type::INT64 => raw.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            data_type::INT32 => {
                raw.as_chunks::<4>().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect()
            }
            other => {
                return Err(format!(
                    "`{}` holds {}, which is not supported here",
                    tensor.name,
                    data_type::name(other)
                ));
            }
        };
        self.filled(values.len())?;
        Ok(values)
    }

    fn filled(&self, got: usize) -> Result<(), String> {
        let shape = self.shape();
        let expected = count(&shape);
        match self {
            Self::File(tensor) if tensor.data_location == EXTERNAL => {
                Err(format!("`{}` lies in another file, expected a single file", tensor.name))
            }
            Self::File(tensor) if expected != Some(got) => {
                Err(format!("`{}` has {got} values, expected {shape:?}", tensor.name))
            }
            _ => Ok(()),
        }
    }
}

/// DequantizeLinear of stored values: `(x − zero)·scale`, with one scale for all or one per index of `axis`.
pub fn dequantize(x: &Stored, scale: &Stored, zero: Option<&Stored>, axis: usize) -> Result<Stored, String> {
    let (shape, mut values, per_row, scale) =
        (x.shape(), x.floats()?.into_owned(), scale.shape(), scale.floats()?);
    let zero = zero.map(Stored::floats).transpose()?;
    let rows = if scale.len() == 1 { 1 } else { shape.get(axis).copied().unwrap_or(0) };
    if rows != scale.len() || per_row.len() > 1 || zero.as_ref().is_some_and(|z| z.len() != rows) {
        return Err(format!("got {} scales, expected 1 or one per index of axis {axis}", scale.len()));
    }
    let inner = if rows == 1 { values.len() } else { shape[axis + 1..].iter().product() };
    for (i, part) in values.chunks_mut(inner.max(1)).enumerate() {
        let (scale, zero) = (scale[i % rows], zero.as_ref().map_or(0.0, |z| z[i % rows]));
        part.iter_mut().for_each(|v| *v = (*v - zero) * scale);
    }
    Ok(Stored::Floats(shape, values))
}
