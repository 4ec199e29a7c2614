//! Files in the idx layout of MNIST, plain or compressed: MNIST itself, Fashion-MNIST, EMNIST, KMNIST, and whatever else
//! is stored like them. LeCun, Cortes and Burges 1998, "The MNIST database of handwritten digits".

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;

use super::{Dataset, Split, entries, fashion};
use crate::error::{Error, Result};
use crate::files;

/// Longest header of an idx file.
const HEADER: u64 = 4 + 4 * 4;
/// Bytes of a compressed file that surely hold the header.
const HEAD: u64 = 1 << 12;
/// Bytes of data of the largest compressed file.
const LARGEST: u64 = 1 << 32;
/// How a gzip file begins.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Images and their labels.
#[derive(Debug)]
pub struct Files {
    images: PathBuf,
    labels: PathBuf,
}

/// How the names of images and labels end, whatever stands before and whether a dot or a hyphen joins the parts.
const TRAIN: [&[&str]; 2] = [&["train-images-idx3-ubyte"], &["train-labels-idx1-ubyte"]];
const TEST: [&[&str]; 2] = [
    &["t10k-images-idx3-ubyte", "test-images-idx3-ubyte"],
    &["t10k-labels-idx1-ubyte", "test-labels-idx1-ubyte"],
];

/// The idx files of a split in a folder; none if there are no images in that layout at all.
pub fn find(folder: &Path, split: Split) -> Result<Option<Files>> {
    let mut all: Vec<(String, PathBuf)> = entries(folder)?
        .into_iter()
        .filter(|(_, path)| path.is_file())
        .map(|(name, path)| (name.strip_suffix(".gz").unwrap_or(&name).replace('.', "-"), path))
        .collect();
    all.dedup_by(|next, kept| next.0 == kept.0);
    let of = |endings: &[&str]| -> Vec<&PathBuf> {
        let suits = |name: &str| endings.iter().any(|ending| name.ends_with(ending));
        all.iter().filter(|(name, _)| suits(name)).map(|(_, path)| path).collect()
    };
    if of(TRAIN[0]).is_empty() && of(TEST[0]).is_empty() {
        return Ok(None);
    }
    let one = |endings: &[&str]| match of(endings).as_slice() {
        [path] => Ok((*path).clone()),
        [] => {
            let problem = format!("there are idx files, but no `{}`, plain or .gz", endings[0]);
            Err(Error::content(folder, problem))
        }
        [first, second, ..] => {
            let (first, second) = (first.display(), second.display());
            Err(Error::content(folder, format!("`{first}` and `{second}` are both there, expected one")))
        }
    };
    let [images, labels] = if split == Split::Train { TRAIN } else { TEST };
    Ok(Some(Files { images: one(images)?, labels: one(labels)? }))
}

impl Files {
    /// Number of images that the header promises.
    pub fn count(&self) -> Result<usize> {
        let mut start = Vec::new();
        let file = File::open(&self.images).map_err(Error::file("read", &self.images))?;
        file.take(HEAD).read_to_end(&mut start).map_err(Error::file("read", &self.images))?;
        if start.starts_with(&GZIP) {
            let mut content = Vec::new();
            let read = GzDecoder::new(start.as_slice()).take(HEADER).read_to_end(&mut content);
            read.map_err(Error::file("read", &self.images))?;
            start = content;
        }
        Ok(header(&self.images, &start)?.0[0])
    }

    /// Reads both files; the second value says whether they are Fashion-MNIST's.
    pub fn load(&self) -> Result<(Dataset, bool)> {
        let read = |path: &PathBuf| -> Result<(PathBuf, Vec<u8>)> {
            Ok((path.clone(), decompress(path, files::read(path)?)?))
        };
        let (images, labels) = (read(&self.images)?, read(&self.labels)?);
        let fashion = fashion::is_known(&files::sha256(&images.1));
        Ok((join(&images, &labels)?, fashion))
    }
}

/// Images and labels as one data set.
pub fn join(
    (path, images): &(PathBuf, Vec<u8>),
    (label_path, labels): &(PathBuf, Vec<u8>),
) -> Result<Dataset> {
    let (size, pixels) = parse(path, images)?;
    let (count, labels) = parse(label_path, labels)?;
    match (size.as_slice(), count.as_slice()) {
        ([n, height, width], [m]) if n == m && height * width > 0 => {
            Ok(Dataset { shape: [1, *height, *width], images: pixels.to_vec(), labels: labels.to_vec() })
        }
        _ => Err(Error::content(path, format!("{size:?} images do not go with {count:?} labels"))),
    }
}

/// Sizes and bytes of an idx file of unsigned bytes.
fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<(Vec<usize>, &'a [u8])> {
    let (sizes, data) = header(path, bytes)?;
    let expected = sizes.iter().try_fold(1usize, |a, b| a.checked_mul(*b));
    if expected != Some(data.len()) {
        let problem = format!("not an idx file: got {} bytes of data for sizes {sizes:?}", data.len());
        return Err(Error::content(path, problem));
    }
    Ok((sizes, data))
}

/// Sizes of an idx file, and what follows them.
fn header<'a>(path: &Path, bytes: &'a [u8]) -> Result<(Vec<usize>, &'a [u8])> {
    let bad = |problem: &str| Error::content(path, format!("not an idx file: {problem}"));
    let axes = match bytes {
        [0, 0, 8, axes @ 1..=4, ..] => usize::from(*axes),
        _ => return Err(bad("it does not start with 0, 0, 8 and the number of axes")),
    };
    let end = 4 + 4 * axes;
    let sizes = bytes.get(4..end).ok_or_else(|| bad("the header is cut short"))?;
    let sizes = sizes.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize);
    Ok((sizes.collect(), &bytes[end..]))
}

/// The content of a file that may be compressed; of an idx file no more than its header promises, and a byte.
pub fn decompress(path: &Path, bytes: Vec<u8>) -> Result<Vec<u8>> {
    if !bytes.starts_with(&GZIP) {
        return Ok(bytes);
    }
    let bad = |e| Error::content(path, format!("not a complete gzip file: {e}"));
    let (mut content, mut start) = (GzDecoder::new(bytes.as_slice()), Vec::new());
    content.by_ref().take(HEADER).read_to_end(&mut start).map_err(bad)?;
    let (sizes, data) = header(path, &start)?;
    let promised = sizes.iter().fold(1u64, |n, size| n.saturating_mul(*size as u64));
    if promised > LARGEST {
        let problem = format!("not an idx file: got sizes {sizes:?}, expected at most {LARGEST} bytes");
        return Err(Error::content(path, problem));
    }
    let rest = promised.saturating_sub(data.len() as u64).saturating_add(1);
    content.take(rest).read_to_end(&mut start).map_err(bad)?;
    Ok(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idx_file_says_how_long_it_is() {
        let path = Path::new("x");
        let good = [0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 7, 8, 9];
        assert_eq!(parse(path, &good).unwrap(), (vec![1, 3], &good[12..]));
        for bad in [&good[..14], &good[..10], &good[..2], &[0, 0, 13, 1, 0, 0, 0, 0], &[]] {
            assert!(parse(path, bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn no_more_is_unpacked_than_the_header_promises() {
        let packed = |content: &[u8]| {
            let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            std::io::Write::write_all(&mut packer, content).unwrap();
            packer.finish().unwrap()
        };
        let path = Path::new("x");
        let good = [0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9];
        assert_eq!(decompress(path, packed(&good)).unwrap(), good);
        let bomb = decompress(path, packed(&[&good[..], &[0; 1 << 20]].concat())).unwrap();
        assert_eq!(bomb.len(), 21, "the longest header and a byte");
        let vast = [0, 0, 8, 2, 0, 1, 0, 0, 0, 1, 0, 1];
        let refused = decompress(path, packed(&[&vast[..], &[0; 1 << 10]].concat())).unwrap_err().to_string();
        assert!(refused.contains("got sizes [65536, 65537], expected at most 4294967296 bytes"), "{refused}");
        assert!(parse(path, &bomb).is_err());
        assert!(decompress(path, packed(&[0; 1 << 20])).is_err());
        let short = packed(&good);
        assert!(decompress(path, short[..short.len() - 9].to_vec()).is_err(), "cut off");
    }
}
