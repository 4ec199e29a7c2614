//! Where pictures go: PNG files, a sheet, an npy array or stdout. What exists is replaced only when asked to, and a
//! file appears whole or not at all.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use dmd_core::pixels::{Image, grid};
use dmd_runtime_native::Images;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use tempfile::NamedTempFile;

/// White pixels between the images of a sheet.
const GAP: usize = 2;

/// A checked destination.
pub struct Output {
    target: Target,
    force: bool,
}

enum Target {
    Png(PathBuf),
    Series(Vec<PathBuf>),
    Sheet(PathBuf, usize),
    Npy(PathBuf),
    Stdout(usize),
}

/// What the command line asked for.
pub struct Wish<'a> {
    /// `-o`.
    pub path: &'a Path,
    /// `--grid`, or implied by `--class all`.
    pub grid: bool,
    /// Whether `--grid` itself was given.
    pub grid_named: bool,
    /// Columns of a sheet.
    pub columns: usize,
    /// Number of images.
    pub count: usize,
    /// Channels of an image.
    pub channels: usize,
    /// `--force`.
    pub force: bool,
}

impl Output {
    /// Checks that the files can be written and do not exist, before any work is done.
    pub fn plan(wish: &Wish) -> anyhow::Result<Self> {
        let path = wish.path.to_owned();
        let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase());
        let target = match extension.as_deref() {
            _ if path == Path::new("-") => {
                if std::io::stdout().is_terminal() {
                    bail!(
                        "got `-` as output, but stdout is a terminal\n\nhint: redirect it to a file or a pipe"
                    );
                }
                Target::Stdout(wish.columns)
            }
            Some("npy") if wish.grid_named => {
                bail!("got --grid with `{}`, which holds no sheet", path.display())
            }
            Some("npy") => Target::Npy(path),
            Some("png") if wish.grid => Target::Sheet(path, wish.columns),
            Some("png") if wish.count == 1 => Target::Png(path),
            Some("png") => Target::Series(series(&path, wish.count)),
            _ => bail!("got output `{}`, expected a name ending in .png or .npy, or -", path.display()),
        };
        if !matches!(target, Target::Npy(_)) {
            color(wish.channels)?;
        }
        let output = Self { target, force: wish.force };
        output.check()?;
        Ok(output)
    }

    /// Writes the images.
    pub fn write(&self, samples: &Images) -> anyhow::Result<()> {
        match &self.target {
            Target::Npy(path) => self.save(path, &npy(samples)),
            Target::Png(path) => self.save(path, &png(&samples.pixels()[0])?),
            Target::Series(paths) => paths
                .iter()
                .zip(samples.pixels())
                .try_for_each(|(path, image)| self.save(path, &png(&image)?)),
            Target::Sheet(path, columns) => self.save(path, &png(&grid(&samples.pixels(), *columns, GAP))?),
            Target::Stdout(columns) => {
                let images = samples.pixels();
                let image = if images.len() == 1 { images[0].clone() } else { grid(&images, *columns, GAP) };
                let mut out = std::io::stdout().lock();
                out.write_all(&png(&image)?)?;
                Ok(out.flush()?)
            }
        }
    }

    /// What was written, for people.
    pub fn name(&self) -> String {
        match &self.target {
            Target::Png(path) | Target::Sheet(path, _) | Target::Npy(path) => path.display().to_string(),
            Target::Series(paths) => match (paths.first(), paths.last()) {
                (Some(first), Some(last)) => format!("{} to {}", first.display(), last.display()),
                _ => String::new(),
            },
            Target::Stdout(_) => "stdout".to_owned(),
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        let paths: &[PathBuf] = match &self.target {
            Target::Png(path) | Target::Sheet(path, _) | Target::Npy(path) => std::slice::from_ref(path),
            Target::Series(paths) => paths,
            Target::Stdout(_) => return Ok(()),
        };
        for path in paths {
            if path.is_dir() {
                bail!("`{}` is a directory, expected a file to write", path.display());
            }
            if !self.force && path.symlink_metadata().is_ok() {
                bail!(
                    "`{}` exists already\n\nhint: name another file with -o, or replace it with --force",
                    path.display()
                );
            }
        }
        temporary(folder(&paths[0])).map(drop)
    }

    fn save(&self, path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
        let mut file = temporary(folder(path))?;
        let write = |file: &mut NamedTempFile| {
            file.write_all(bytes)?;
            file.as_file().sync_all()
        };
        write(&mut file).with_context(|| format!("cannot write `{}`", path.display()))?;
        let result = if self.force { file.persist(path) } else { file.persist_noclobber(path) };
        result.map_err(|e| e.error).with_context(|| format!("cannot write `{}`", path.display()))?;
        Ok(())
    }
}

/// `NAME-0000.png`, `NAME-0001.png`, ….
fn series(path: &Path, count: usize) -> Vec<PathBuf> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    let digits = (count - 1).to_string().len().max(4);
    (0..count).map(|k| path.with_file_name(format!("{stem}-{k:0digits$}.{extension}"))).collect()
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn temporary(folder: &Path) -> anyhow::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".dmd-run-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    if !fs::metadata(folder).is_ok_and(|m| m.is_dir()) {
        bail!("cannot write into `{}`: it is not a directory", folder.display());
    }
    builder.tempfile_in(folder).with_context(|| format!("cannot write into `{}`", folder.display()))
}

fn color(channels: usize) -> anyhow::Result<ExtendedColorType> {
    Ok(match channels {
        1 => ExtendedColorType::L8,
        3 => ExtendedColorType::Rgb8,
        4 => ExtendedColorType::Rgba8,
        _ => bail!(
            "got {channels} channels, expected 1, 3 or 4 for a PNG\n\nhint: -o NAME.npy takes any number"
        ),
    })
}

fn png(image: &Image) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let (width, height) = (u32::try_from(image.width)?, u32::try_from(image.height)?);
    PngEncoder::new(&mut bytes).write_image(&image.data, width, height, color(image.channels)?)?;
    Ok(bytes)
}

/// NumPy's format, version 1.0: magic, header length, a Python literal padded to 64 bytes, little-endian values.
fn npy(samples: &Images) -> Vec<u8> {
    let [c, h, w] = samples.shape;
    let shape = (samples.count(), c, h, w);
    let dictionary = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape:?}, }}");
    let header = format!("{dictionary:<width$}\n", width = (dictionary.len() + 11).next_multiple_of(64) - 11);
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.bytes());
    bytes.extend(samples.values.iter().flat_map(|v| v.to_le_bytes()));
    bytes
}
