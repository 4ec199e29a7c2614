//! Images in NumPy's format: f32, little-endian, `[n, c, h, w]`, as `dmd-run` writes them.
//! https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html

use std::path::Path;

use crate::error::{Error, Result};
use crate::files;

/// What every such file begins with.
const MAGIC: &[u8] = b"\x93NUMPY";

/// An array of four axes.
pub struct Images {
    /// `[n, c, h, w]`.
    pub shape: [usize; 4],
    /// Values, last axis fastest.
    pub values: Vec<f32>,
}

/// Reads a file.
pub fn read(path: &Path) -> Result<Images> {
    parse(&files::read(path)?).map_err(|problem| {
        let hint =
            "hint: `dmd-run MODEL --count N -o FILE.npy` writes such files; in NumPy, `x.astype('<f4')`";
        Error::content(path, format!("{problem}\n\n{hint}"))
    })
}

fn parse(bytes: &[u8]) -> std::result::Result<Images, String> {
    let rest = bytes.strip_prefix(MAGIC).ok_or("it is not in NumPy's format")?;
    let (start, length) = match rest {
        [1, _, a, b, ..] => (4, usize::from(u16::from_le_bytes([*a, *b]))),
        [2 | 3, _, a, b, c, d, ..] => (6, u32::from_le_bytes([*a, *b, *c, *d]) as usize),
        _ => return Err("its header is of an unknown version".into()),
    };
    let header = rest.get(start..).and_then(|rest| rest.get(..length)).ok_or("its header is cut short")?;
    let header: String = String::from_utf8_lossy(header).split_whitespace().collect();
    let after = |key: &str| {
        let place = header.find(&format!("'{key}':")).map(|at| &header[at + key.len() + 3..]);
        place.ok_or(format!("its header has no `{key}`"))
    };
    let descr = after("descr")?.trim_start_matches('\'').split('\'').next().unwrap_or("");
    if descr != "<f4" {
        return Err(format!("it holds values of type `{descr}`, expected `<f4`"));
    }
    if !after("fortran_order")?.starts_with("False") {
        return Err("its first axis is the fastest, expected the last".into());
    }
    let inner = after("shape")?.trim_start_matches('(').split(')').next().unwrap_or("");
    let sizes: Vec<usize> = inner.split(',').filter_map(|size| size.parse().ok()).collect();
    let shape: [usize; 4] =
        sizes.try_into().map_err(|_| format!("it has the shape ({inner}), expected (n, c, h, w)"))?;
    let data = &rest[start + length..];
    let expected = shape.iter().try_fold(4usize, |a, b| a.checked_mul(*b));
    if expected != Some(data.len()) {
        return Err(format!("got {} bytes of values for the shape {shape:?}", data.len()));
    }
    let values: Vec<f32> = data.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect();
    match values.iter().all(|v| v.is_finite()) {
        true => Ok(Images { shape, values }),
        false => Err("it holds values that are not finite".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, values: &[f32]) -> Vec<u8> {
        let mut bytes = [MAGIC, &[1, 0]].concat();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.bytes());
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        bytes
    }

    #[test]
    fn a_file_is_read_or_refused_for_a_reason() {
        let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1, 1, 2), }      \n";
        let images = parse(&file(header, &[1.0, 2.0, 3.0, 4.0])).unwrap();
        assert_eq!((images.shape, images.values), ([2, 1, 1, 2], vec![1.0, 2.0, 3.0, 4.0]));
        let changed = |from: &str, to: &str| file(&header.replace(from, to), &[1.0, 2.0, 3.0, 4.0]);
        for (bytes, problem) in [
            (b"PK".to_vec(), "NumPy's format"),
            (changed("<f4", "<f8"), "`<f8`"),
            (changed("False", "True"), "first axis"),
            (changed("(2, 1, 1, 2)", "(4,)"), "(n, c, h, w)"),
            (changed("(2, 1,", "(3, 1,"), "16 bytes"),
            (changed("shape", "form"), "`shape`"),
            (file(header, &[1.0, 2.0, 3.0, f32::NAN]), "not finite"),
            (file(header, &[])[..30].to_vec(), "cut short"),
        ] {
            let got = parse(&bytes).err().unwrap();
            assert!(got.contains(problem), "{got}");
        }
    }
}
