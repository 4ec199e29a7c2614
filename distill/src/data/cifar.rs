//! CIFAR-10 as its author distributes it: the binary version (`data_batch_1.bin` …) and the Python version (pickles
//! `data_batch_1` …, read without executing anything). Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".

use std::path::{Path, PathBuf};

use super::pickle::{self, Pickle};
use super::{Dataset, Split};
use crate::error::{Error, Result};
use crate::files;

/// Names of the ten classes, in order.
pub const CLASSES: [&str; 10] =
    ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];

/// `[channels, height, width]`, in the order of the bytes.
const SHAPE: [usize; 3] = [3, 32, 32];
/// Bytes of an image.
const IMAGE: usize = 3 * 32 * 32;
/// Folders that the archives unpack to.
const ARCHIVES: [&str; 2] = ["cifar-10-batches-bin", "cifar-10-batches-py"];

/// The batches of one split.
#[derive(Debug)]
pub struct Files {
    batches: Vec<PathBuf>,
    binary: bool,
}

/// The batches in a folder, or in the folder inside it that an archive unpacked to; none if the first is missing.
pub fn find(folder: &Path, split: Split) -> Result<Option<Files>> {
    let folders = std::iter::once(folder.to_owned()).chain(ARCHIVES.map(|name| folder.join(name)));
    for folder in folders {
        for (binary, ending) in [(true, ".bin"), (false, "")] {
            let exists = |stem: &str| folder.join(format!("{stem}{ending}")).is_file();
            if !exists("data_batch_1") && !exists("test_batch") {
                continue;
            }
            let names: Vec<String> = match split {
                Split::Train => (1..=5).map(|i| format!("data_batch_{i}{ending}")).collect(),
                Split::Test => vec![format!("test_batch{ending}")],
            };
            if let Some(name) = names.iter().find(|name| !folder.join(name).is_file()) {
                return Err(Error::content(
                    &folder,
                    format!("it looks like CIFAR-10, but there is no `{name}`"),
                ));
            }
            let batches = names.iter().map(|name| folder.join(name)).collect();
            return Ok(Some(Files { batches, binary }));
        }
    }
    Ok(None)
}

impl Files {
    /// Number of images.
    pub fn count(&self) -> Result<usize> {
        if !self.binary {
            return Ok(self.load()?.len());
        }
        let size = |path: &PathBuf| path.metadata().map_err(Error::file("read", path));
        self.batches.iter().map(|path| Ok(size(path)?.len() as usize / (IMAGE + 1))).sum()
    }

    /// Reads all batches.
    pub fn load(&self) -> Result<Dataset> {
        let (mut images, mut labels) = (Vec::new(), Vec::new());
        for path in &self.batches {
            let bytes = files::read(path)?;
            match self.binary {
                true => read_binary(path, &bytes, &mut images, &mut labels)?,
                false => read_pickle(path, &bytes, &mut images, &mut labels)?,
            }
        }
        Ok(Dataset { shape: SHAPE, images, labels })
    }
}

/// Records of a label and an image.
fn read_binary(path: &Path, bytes: &[u8], images: &mut Vec<u8>, labels: &mut Vec<u8>) -> Result<()> {
    if bytes.is_empty() || !bytes.len().is_multiple_of(IMAGE + 1) {
        let problem =
            format!("got {} bytes, expected a multiple of {} from CIFAR-10's layout", bytes.len(), IMAGE + 1);
        return Err(Error::content(path, problem));
    }
    for record in bytes.chunks_exact(IMAGE + 1) {
        let [label, image @ ..] = record else { continue };
        labels.push(checked(path, i64::from(*label))?);
        images.extend_from_slice(image);
    }
    Ok(())
}

/// A dictionary with `data`, an array `[n, 3072]` of bytes, and `labels`, a list of `n` numbers.
fn read_pickle(path: &Path, bytes: &[u8], images: &mut Vec<u8>, labels: &mut Vec<u8>) -> Result<()> {
    let bad = |problem: String| {
        Error::content(path, format!("not a batch of CIFAR-10's Python version: {problem}"))
    };
    let pickle = Pickle::read(bytes).map_err(|e| match e {
        pickle::Error::Foreign(name) => Error::content(
            path,
            format!("it refers to `{name}`, which no batch of CIFAR-10 needs; nothing in it was executed"),
        ),
        pickle::Error::Broken(problem) => bad(problem),
    })?;
    let entry = |key: &str| pickle.entry(key).ok_or_else(|| bad(format!("it has no entry `{key}`")));
    let (shape, data) = pickle.bytes_array(entry("data")?).map_err(&bad)?;
    let numbers = pickle.integers(entry("labels")?).map_err(&bad)?;
    if shape != [numbers.len(), IMAGE] {
        return Err(bad(format!(
            "got data {shape:?} and {} labels, expected [labels, {IMAGE}]",
            numbers.len()
        )));
    }
    for number in numbers {
        labels.push(checked(path, number)?);
    }
    images.extend_from_slice(data);
    Ok(())
}

fn checked(path: &Path, label: i64) -> Result<u8> {
    let known = u8::try_from(label).ok().filter(|label| usize::from(*label) < CLASSES.len());
    known.ok_or_else(|| {
        Error::content(path, format!("got the label {label}, expected 0 to 9 from CIFAR-10's classes"))
    })
}
