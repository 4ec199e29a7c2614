//! Real images, labelled or not: `--data NAME|DIR`. A folder says by its content what it is; everything is fitted to the
//! size and channels that a base works on, and kept as bytes.
//! Must not know about training.

mod cifar;
mod fashion;
mod folder;
mod idx;
mod pickle;
mod picture;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use sha2::{Digest, Sha256};

pub use self::fashion::FASHION_CLASSES;
use crate::error::{Error, Result};

/// Data sets known by name.
pub const NAMES: [&str; 1] = ["fashion-mnist"];

/// What is looked for in a folder, for messages.
const FORMATS: &str = "idx files (`train-images-idx3-ubyte` and its companions, plain or .gz), CIFAR-10 (`data_batch_1.bin` … \
                       or the Python version's `data_batch_1` …), PNG or JPEG images (in one folder, or one sub-folder \
                       per class; below `train/` and `test/` if there are both parts)";

/// 8-bit images.
pub struct Dataset {
    /// `[channels, height, width]`.
    pub shape: [usize; 3],
    /// One byte per value, image by image, channel planes.
    pub images: Vec<u8>,
    /// Class of each image; empty if the images have none.
    pub labels: Vec<u8>,
}

/// Which part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// For training.
    Train,
    /// Held out.
    Test,
}

impl Split {
    /// `train` or `test`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Test => "test",
        }
    }
}

/// A data set that was found and not yet read.
#[derive(Debug)]
pub struct Source {
    split: Split,
    kind: Kind,
}

/// Where its images are.
#[derive(Debug)]
enum Kind {
    /// Fashion-MNIST by name: verified, downloaded if need be.
    Fashion,
    Idx(idx::Files),
    Cifar(cifar::Files),
    Folder(folder::Files),
}

/// A data set and what is known about it.
pub struct Loaded {
    /// The images.
    pub data: Dataset,
    /// What it is, for the model card.
    pub about: String,
    /// Names of the classes, if the data set says them.
    pub classes: Option<Vec<String>>,
    /// SHA-256 of images and labels as they are used.
    pub sha256: String,
}

/// The same data set wherever the program runs next.
pub fn absolute(data: String) -> Result<String> {
    if NAMES.contains(&data.as_str()) {
        return Ok(data);
    }
    let path = Path::new(&data);
    Ok(std::path::absolute(path).map_err(Error::file("find", path))?.to_string_lossy().into_owned())
}

impl Source {
    /// The data set of this name, else the one in this folder.
    pub fn find(data: &str, split: Split) -> Result<Self> {
        if data == NAMES[0] {
            return Ok(Self { split, kind: Kind::Fashion });
        }
        let path = Path::new(data);
        if !path.is_dir() {
            return Err(Error::Request(format!(
                "`--data {data}`: there is no such folder\n\nhint: the data set known by name is `{}`; a folder holds {FORMATS}",
                NAMES[0]
            )));
        }
        Ok(Self { split, kind: detect(path, split)? })
    }

    /// Number of images, without reading them where that can be told.
    pub fn count(&self) -> Result<usize> {
        match &self.kind {
            Kind::Fashion => Ok(fashion::count(self.split)),
            Kind::Idx(files) => files.count(),
            Kind::Cifar(files) => files.count(),
            Kind::Folder(files) => Ok(files.count()),
        }
    }

    /// Reads all images, fitted to `shape`.
    pub fn load(&self, shape: [usize; 3]) -> Result<Loaded> {
        if !matches!(shape[0], 1 | 3) {
            return Err(Error::Request(format!("images have 1 or 3 channels, the base {}", shape[0])));
        }
        let named = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
        let part = match self.split {
            Split::Train => "training images",
            Split::Test => "test images",
        };
        let (data, about, classes) = match &self.kind {
            Kind::Fashion => {
                let data = Dataset::fashion_mnist(None, self.split)?;
                (data, "Fashion-MNIST".to_owned(), named(&FASHION_CLASSES))
            }
            Kind::Idx(files) => {
                let (data, fashion) = files.load()?;
                let name = if fashion { "Fashion-MNIST" } else { "idx files" };
                (data, name.to_owned(), if fashion { named(&FASHION_CLASSES) } else { None })
            }
            Kind::Cifar(files) => (files.load()?, "CIFAR-10".to_owned(), named(&cifar::CLASSES)),
            Kind::Folder(files) => (files.load(shape)?, files.about(), files.classes()),
        };
        if data.is_empty() {
            return Err(Error::Request("the data set holds no images".into()));
        }
        let [c, h, w] = shape;
        if data.shape != shape {
            let [channels, height, width] = data.shape;
            dmd_cli::say!(
                "note: images of {width}x{height}, {channels} channels, become {w}x{h}, {c} channels"
            );
        }
        let data = picture::fit(data, shape)?;
        let sha256 = data.sha256();
        Ok(Loaded { data, about: format!("{about}, {part}"), classes, sha256 })
    }
}

/// Recognises a folder by what is in it.
fn detect(folder: &Path, split: Split) -> Result<Kind> {
    if let Some(files) = idx::find(folder, split)? {
        return Ok(Kind::Idx(files));
    }
    if let Some(files) = cifar::find(folder, split)? {
        return Ok(Kind::Cifar(files));
    }
    if let Some(files) = folder::find(folder, split)? {
        return Ok(Kind::Folder(files));
    }
    Err(Error::content(folder, format!("there is no data set in it\n\nhint: looked for {FORMATS}")))
}

impl Dataset {
    /// The data set of this name or in this folder, fitted to `shape`.
    pub fn load(data: &str, split: Split, shape: [usize; 3]) -> Result<Self> {
        Ok(Source::find(data, split)?.load(shape)?.data)
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.images.len() / self.shape.iter().product::<usize>().max(1)
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// The images at `indices`, in `range`.
    ///
    /// # Shapes
    /// `[indices, c, h, w]` f32.
    pub fn batch(&self, indices: &[usize], range: [f32; 2], device: &Device) -> Result<Tensor> {
        self.batch_flipped(indices, &[], range, device)
    }

    /// The images at `indices`, in `range`; where `flipped` says so, left and right are exchanged.
    ///
    /// # Shapes
    /// `[indices, c, h, w]` f32.
    pub fn batch_flipped(
        &self,
        indices: &[usize],
        flipped: &[bool],
        [lo, hi]: [f32; 2],
        device: &Device,
    ) -> Result<Tensor> {
        let [c, h, w] = self.shape;
        let size = c * h * w;
        let mut values = Vec::with_capacity(indices.len() * size);
        for (n, i) in indices.iter().enumerate() {
            let value = |v: &u8| lo + (hi - lo) * f32::from(*v) / 255.0;
            let image = &self.images[i * size..(i + 1) * size];
            if flipped.get(n) == Some(&true) {
                image.chunks_exact(w).for_each(|row| values.extend(row.iter().rev().map(value)));
            } else {
                values.extend(image.iter().map(value));
            }
        }
        Ok(Tensor::from_vec(values, (indices.len(), c, h, w), device)?)
    }

    /// An error where a label is no class of the base, or where labels are missing.
    pub fn check_labels(&self, classes: usize, base: &str) -> Result<()> {
        if self.labels.is_empty() {
            return Err(Error::Request(format!(
                "base `{base}` is conditional on {classes} classes, and the images have none\n\nhint: put the images of \
                 each class in a sub-folder of its own"
            )));
        }
        match self.labels.iter().find(|label| usize::from(**label) >= classes) {
            None => Ok(()),
            Some(label) => Err(Error::Request(format!(
                "the data has a label {label}, expected 0 to {} from the {classes} classes of base `{base}`",
                classes - 1
            ))),
        }
    }

    fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(&self.images);
        hash.update(&self.labels);
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// Names in a folder with their paths, sorted; hidden ones are left out.
fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let read = std::fs::read_dir(folder).map_err(Error::file("read", folder))?;
    let mut found = Vec::new();
    for entry in read {
        let entry = entry.map_err(Error::file("read", folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') {
            found.push((name, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}
