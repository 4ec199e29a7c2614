//! A folder of pictures, PNG or JPEG: flat, or one sub-folder per class whose number is its place in the sorted names. Below
//! `train/` and `test/` where there are both parts; else everything is for training.

use std::path::{Path, PathBuf};

use image::ImageReader;
use rayon::prelude::*;

use super::{Dataset, Split, entries, picture};
use crate::error::{Error, Result};
use crate::progress::Progress;

/// Endings of files that are read.
const PICTURES: [&str; 3] = ["png", "jpg", "jpeg"];
/// Endings of pictures that are not read: leaving them out silently would be a surprise.
const OTHERS: [&str; 7] = ["webp", "gif", "bmp", "tif", "tiff", "avif", "heic"];
/// Pictures between two reports of progress.
const CHUNK: usize = 512;
/// Unreadable files that an error lists.
const LISTED: usize = 5;

/// The pictures of one split, in the order of their names.
#[derive(Debug)]
pub struct Files {
    folder: PathBuf,
    pictures: Vec<PathBuf>,
    labels: Vec<u8>,
    classes: Vec<String>,
}

/// The pictures of a split; none if the folder has neither pictures nor sub-folders with some.
pub fn find(folder: &Path, split: Split) -> Result<Option<Files>> {
    let parts = [Split::Train, Split::Test].map(|split| folder.join(split.name()));
    if parts.iter().any(|part| part.is_dir()) {
        let part = folder.join(split.name());
        if !part.is_dir() {
            return Err(Error::content(folder, format!("there is no `{}/`", split.name())));
        }
        return scan(&part);
    }
    let files = scan(folder)?;
    if files.is_some() && split == Split::Test {
        return Err(Error::content(
            folder,
            "it has no test images\n\nhint: `test/` and `train/` inside it would say which images are for what",
        ));
    }
    Ok(files)
}

fn scan(folder: &Path) -> Result<Option<Files>> {
    let direct = pictures(folder)?;
    let folders: Vec<(String, PathBuf)> =
        entries(folder)?.into_iter().filter(|(_, path)| path.is_dir()).collect();
    let mut files = Files { folder: folder.to_owned(), pictures: direct, labels: vec![], classes: vec![] };
    let mut empty = None;
    for (name, path) in folders {
        let found = pictures(&path)?;
        if let Some((inner, _)) = entries(&path)?.iter().find(|(_, path)| path.is_dir()) {
            return Err(Error::content(
                &path,
                format!(
                    "`{inner}/` inside it is nested too deep\n\nhint: images lie in one folder, or in one sub-folder per class"
                ),
            ));
        }
        if found.is_empty() {
            empty.get_or_insert(path);
            continue;
        }
        if files.labels.is_empty() && !files.pictures.is_empty() {
            let problem =
                format!("there are images both directly in it and in `{name}/`, expected one of the two");
            return Err(Error::content(folder, problem));
        }
        let Ok(label) = u8::try_from(files.classes.len()) else {
            return Err(Error::content(folder, "there are more than 256 sub-folders, one per class"));
        };
        files.labels.extend(std::iter::repeat_n(label, found.len()));
        files.pictures.extend(found);
        files.classes.push(name);
    }
    match empty {
        Some(path) if !files.classes.is_empty() => {
            Err(Error::content(&path, "there is no image in it, and every sub-folder is a class"))
        }
        _ => Ok((!files.pictures.is_empty()).then_some(files)),
    }
}

/// The pictures directly in a folder.
fn pictures(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for (name, path) in entries(folder)? {
        let ending = name.rsplit_once('.').map(|(_, ending)| ending.to_ascii_lowercase()).unwrap_or_default();
        if OTHERS.contains(&ending.as_str()) {
            return Err(Error::content(&path, "images are PNG or JPEG\n\nhint: convert it, or take it out"));
        }
        if PICTURES.contains(&ending.as_str()) && path.is_file() {
            found.push(path);
        }
    }
    Ok(found)
}

impl Files {
    /// Number of pictures.
    pub fn count(&self) -> usize {
        self.pictures.len()
    }

    /// Names of the classes, if there are any.
    pub fn classes(&self) -> Option<Vec<String>> {
        (!self.classes.is_empty()).then(|| self.classes.clone())
    }

    /// What they are, for the model card.
    pub fn about(&self) -> String {
        let absolute = std::path::absolute(&self.folder).unwrap_or_else(|_| self.folder.clone());
        let mut names = absolute.iter().rev().map(|part| part.to_string_lossy());
        let own = names.next().unwrap_or_default();
        let name = if own == "train" || own == "test" { names.next().unwrap_or(own) } else { own };
        format!("images of `{name}`")
    }

    /// Reads all pictures, fitted to `shape`; an error names those that cannot be read.
    pub fn load(&self, shape: [usize; 3]) -> Result<Dataset> {
        let mut images = Vec::with_capacity(self.count() * shape.iter().product::<usize>());
        let mut unreadable = Vec::new();
        let mut progress = Progress::new("images", 0, self.count() as u64);
        for (i, chunk) in self.pictures.chunks(CHUNK).enumerate() {
            let read: Vec<_> = chunk.par_iter().map(|path| read(path, shape)).collect();
            for (path, result) in chunk.iter().zip(read) {
                match result {
                    Ok(planes) => images.extend(planes),
                    Err(problem) => unreadable.push(format!("`{}`: {problem}", path.display())),
                }
            }
            progress.update((i * CHUNK + chunk.len()) as u64, "");
        }
        if unreadable.is_empty() {
            return Ok(Dataset { shape, images, labels: self.labels.clone() });
        }
        let more = match unreadable.len().saturating_sub(LISTED) {
            0 => String::new(),
            n => format!("\n  and {n} more"),
        };
        let count = unreadable.len();
        unreadable.truncate(LISTED);
        let list = unreadable.join("\n  ");
        Err(Error::content(&self.folder, format!("{count} of its images cannot be read:\n  {list}{more}")))
    }
}

fn read(path: &Path, shape: [usize; 3]) -> std::result::Result<Vec<u8>, String> {
    let reader = ImageReader::open(path).and_then(ImageReader::with_guessed_format);
    let picture = reader.map_err(|e| e.to_string())?.decode().map_err(|e| e.to_string())?;
    Ok(picture::planes(&picture, shape))
}
