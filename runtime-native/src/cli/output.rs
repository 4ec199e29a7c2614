//! Where pictures go: PNG files, a sheet, arrays, raw bytes; files or stdout. Images are written as they come. What exists
//! is replaced only when asked to, and a file appears whole or not at all.

use std::fs;
use std::io::{BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::ValueEnum;
use dmd_cli::files::{self, folder};
use dmd_core::pixels::{Image, grid};
use dmd_runtime_native::Images;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use tempfile::NamedTempFile;

/// White pixels between the images of a sheet.
const GAP: usize = 2;
/// Bytes of the largest sheet.
const LARGEST_SHEET: usize = 1 << 30;

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// 8 bits per channel
    Png,
    /// One array of all images, f32 [n, c, h, w], in the model's range
    Npy,
    /// Bytes of all images, row by row, channels interleaved, no header
    Raw,
}

/// What the command line asked for.
pub struct Wish<'a> {
    /// `-o`.
    pub path: &'a Path,
    /// `--format`.
    pub format: Option<Format>,
    /// `--grid`, or implied by `--class all`.
    pub grid: bool,
    /// Whether `--grid` itself was given.
    pub grid_named: bool,
    /// Columns of a sheet.
    pub columns: usize,
    /// Number of images.
    pub count: usize,
    /// `[c, h, w]` of an image.
    pub shape: [usize; 3],
    /// `--force`.
    pub force: bool,
}

/// A checked destination that images are pushed into.
pub struct Output {
    target: Target,
    force: bool,
    written: usize,
}

enum Target {
    /// One file, or one each if there are several images.
    Pngs { path: PathBuf, count: usize },
    /// Images so far, until the sheet is drawn; to stdout where there is no path.
    Sheet { path: Option<PathBuf>, columns: usize, images: Vec<Image> },
    /// Bytes as they come.
    Stream { sink: Sink, format: Format },
}

enum Sink {
    File(PathBuf, BufWriter<NamedTempFile>),
    Stdout(BufWriter<std::io::Stdout>),
}

impl Output {
    /// Checks that the files can be written and do not exist, before any work is done.
    pub fn plan(wish: &Wish) -> anyhow::Result<Self> {
        let path = wish.path.to_owned();
        let stdout = path == Path::new("-");
        if stdout && std::io::stdout().is_terminal() {
            bail!("got `-` as output, but stdout is a terminal\n\nhint: redirect it to a file or a pipe");
        }
        let format = match wish.format {
            Some(format) => format,
            None if stdout => Format::Png,
            None => format_of(&path)?,
        };
        if format != Format::Png && wish.grid_named {
            bail!("got --grid with `{}`, which holds no sheet", path.display())
        }
        if format == Format::Png {
            color(wish.shape[0])?;
        }
        let sheet = format == Format::Png && wish.count > 1 && (wish.grid || stdout);
        if sheet {
            check_sheet(wish)?;
        }
        if !stdout {
            let several = format == Format::Png && !sheet && wish.count > 1;
            check_files(&path, if several { wish.count } else { 1 }, wish.force)?;
        }
        let target = match format {
            Format::Png if sheet || stdout => {
                let path = (!stdout).then_some(path);
                Target::Sheet { path, columns: wish.columns, images: Vec::new() }
            }
            Format::Png => Target::Pngs { path, count: wish.count },
            Format::Npy | Format::Raw => {
                let mut sink = if stdout {
                    Sink::Stdout(BufWriter::new(std::io::stdout()))
                } else {
                    let file = temporary(&path)?;
                    Sink::File(path, BufWriter::new(file))
                };
                if format == Format::Npy {
                    sink.write(&npy_header(wish.count, wish.shape))?;
                }
                Target::Stream { sink, format }
            }
        };
        Ok(Self { target, force: wish.force, written: 0 })
    }

    /// Writes the next images.
    pub fn push(&mut self, samples: &Images) -> anyhow::Result<()> {
        match &mut self.target {
            Target::Pngs { path, count } => {
                for (image, k) in samples.pixels().iter().zip(self.written..) {
                    let name = if *count == 1 { path.clone() } else { numbered(path, k, *count) };
                    save(&name, &png(image)?, self.force)?;
                }
            }
            Target::Sheet { images, .. } => images.extend(samples.pixels()),
            Target::Stream { sink, format: Format::Npy } => {
                let bytes: Vec<u8> = samples.values.iter().flat_map(|v| v.to_le_bytes()).collect();
                sink.write(&bytes)?;
            }
            Target::Stream { sink, .. } => {
                samples.pixels().iter().try_for_each(|image| sink.write(&image.data))?;
            }
        }
        self.written += samples.count();
        Ok(())
    }

    /// Writes what is written last; returns what was written, for people.
    pub fn finish(self) -> anyhow::Result<String> {
        Ok(match self.target {
            Target::Pngs { path, count: 1 } => path.display().to_string(),
            Target::Pngs { path, count } => {
                let name = |k| numbered(&path, k, count).display().to_string();
                format!("{} to {}", name(0), name(count - 1))
            }
            Target::Sheet { path, columns, images } => {
                let sheet =
                    if let [image] = images.as_slice() { image.clone() } else { grid(&images, columns, GAP) };
                let bytes = png(&sheet)?;
                if let Some(path) = path {
                    save(&path, &bytes, self.force)?;
                    path.display().to_string()
                } else {
                    let mut out = std::io::stdout().lock();
                    out.write_all(&bytes)?;
                    out.flush()?;
                    "stdout".to_owned()
                }
            }
            Target::Stream { sink: Sink::Stdout(mut out), .. } => {
                out.flush()?;
                "stdout".to_owned()
            }
            Target::Stream { sink: Sink::File(path, file), .. } => {
                let file = file.into_inner().map_err(std::io::IntoInnerError::into_error);
                let file = file.with_context(|| cannot(&path))?;
                persist(file, &path, self.force)?;
                path.display().to_string()
            }
        })
    }
}

impl Sink {
    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        match self {
            Self::File(path, file) => file.write_all(bytes).with_context(|| cannot(path)),
            Self::Stdout(out) => Ok(out.write_all(bytes)?),
        }
    }
}

fn format_of(path: &Path) -> anyhow::Result<Format> {
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase());
    Ok(match extension.as_deref() {
        Some("png") => Format::Png,
        Some("npy") => Format::Npy,
        Some("raw") => Format::Raw,
        _ => bail!("got output `{}`, expected a name ending in .png, .npy or .raw, or -", path.display()),
    })
}

fn check_sheet(wish: &Wish) -> anyhow::Result<()> {
    let [c, h, w] = wish.shape;
    let columns = wish.columns.clamp(1, wish.count);
    let side = |n: usize, size: usize| n.checked_mul(size + GAP);
    let rows = side(wish.count.div_ceil(columns), h);
    let bytes = rows.and_then(|rows| rows.checked_mul(side(columns, w)?)?.checked_mul(c));
    if bytes.is_none_or(|bytes| bytes > LARGEST_SHEET) {
        bail!(
            "got {} images for one sheet, which would be larger than {} MiB\n\nhint: leave out --grid, or write an array \
             with -o NAME.npy",
            wish.count,
            LARGEST_SHEET >> 20
        );
    }
    Ok(())
}

/// Refuses a file that exists, unless it may be replaced.
pub fn check_file(path: &Path, force: bool) -> anyhow::Result<()> {
    // A device would be replaced by a file of its name.
    if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        bail!("`{}` is a directory or a device, expected a file to write", path.display());
    }
    if !force && path.symlink_metadata().is_ok() {
        bail!("`{}` exists already\n\nhint: name another file, or replace it with --force", path.display());
    }
    Ok(())
}

/// Looks once at the folder, whatever the number of files.
fn check_files(path: &Path, count: usize, force: bool) -> anyhow::Result<()> {
    if count == 1 {
        check_file(path, force)?;
    } else if let Ok(entries) = fs::read_dir(folder(path)) {
        for entry in entries.flatten() {
            let name = entry.file_name();
            let number = name.to_string_lossy().strip_suffix(&suffix(path)).and_then(|stem| {
                stem.strip_prefix(&prefix(path)).and_then(|digits| digits.parse::<usize>().ok())
            });
            if let Some(k) = number.filter(|k| *k < count)
                && numbered(path, k, count).file_name() == Some(&name)
            {
                check_file(&numbered(path, k, count), force)?;
            }
        }
    }
    temporary(path).map(drop)
}

/// Writes a file whole; what exists is replaced only with `force`.
pub fn save(path: &Path, bytes: &[u8], force: bool) -> anyhow::Result<()> {
    let mut file = temporary(path)?;
    file.write_all(bytes).with_context(|| cannot(path))?;
    persist(file, path, force)
}

fn persist(file: NamedTempFile, path: &Path, force: bool) -> anyhow::Result<()> {
    files::place(file, path, force).with_context(|| cannot(path))
}

fn cannot(path: &Path) -> String {
    format!("cannot write `{}`", path.display())
}

/// `NAME-0000.png`, `NAME-0001.png`, ….
fn numbered(path: &Path, k: usize, count: usize) -> PathBuf {
    let digits = (count - 1).to_string().len().max(4);
    path.with_file_name(format!("{}{k:0digits$}{}", prefix(path), suffix(path)))
}

fn prefix(path: &Path) -> String {
    format!("{}-", path.file_stem().unwrap_or_default().to_string_lossy())
}

fn suffix(path: &Path) -> String {
    path.extension().map(|e| format!(".{}", e.to_string_lossy())).unwrap_or_default()
}

fn temporary(path: &Path) -> anyhow::Result<NamedTempFile> {
    files::temporary(path).with_context(|| cannot(path))
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

/// NumPy's format, version 1.0: magic, header length, a Python literal padded to 64 bytes; the values follow.
fn npy_header(count: usize, [c, h, w]: [usize; 3]) -> Vec<u8> {
    let shape = (count, c, h, w);
    let dictionary = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape:?}, }}");
    let header = format!("{dictionary:<width$}\n", width = (dictionary.len() + 11).next_multiple_of(64) - 11);
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.bytes());
    bytes
}
