//! A run directory: `run.json`, `stats.jsonl`, `samples/`, `checkpoints/state.safetensors`.
//!
//! The state file is replaced atomically and carries its step; on resume, statistics after that step are dropped, so
//! that an interrupted run continues as if nothing had happened.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use dmd_cli::files::temporary_folder;
use dmd_core::pixels::{Image, grid, to_image};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::checkpoint::{read_metadata, read_tensors, write_json, write_tensors};
use crate::error::{Error, Result};
use crate::files;
use crate::lock::Lock;
use crate::network::Tensors;

/// Name of the state that a run continues from.
pub const LATEST: &str = "state";

/// Name of the file with what a second stage starts from.
const INIT: &str = "init.safetensors";

/// Folder of one run.
pub struct Run {
    /// Its path.
    pub folder: PathBuf,
    /// Held while the run is worked on; none where it is only read.
    lock: Option<Lock>,
}

impl Run {
    /// A new folder: `out`, or the next free `runs/NAME-NNN`. It appears with `run.json` and what `prepare` puts there,
    /// or not at all.
    pub fn create(
        out: Option<&Path>,
        name: &str,
        options: &impl Serialize,
        prepare: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Self> {
        let mut folder = match out {
            Some(folder) => folder.to_owned(),
            None => free_name(Path::new("runs"), name)?,
        };
        if folder.exists() {
            return Err(Error::content(
                &folder,
                "it exists already\n\nhint: choose another `--out`, or continue the run there with `--resume`",
            ));
        }
        if folder.file_name().is_none() {
            return Err(Error::content(&folder, "it is no name of a folder"));
        }
        let partial = temporary_folder(&folder).map_err(Error::file("create", &folder))?;
        let mut run = Self { folder: partial.path().to_owned(), lock: None };
        prepare(partial.path())?;
        run.save_options(options)?;
        run.lock = Some(Lock::take(partial.path())?);
        while let Err(e) = fs::rename(partial.path(), &folder) {
            // Another run may have taken the name meanwhile.
            match out {
                None if folder.exists() => folder = free_name(Path::new("runs"), name)?,
                _ => return Err(Error::file("create", &folder)(e)),
            }
        }
        Ok(Self { folder, ..run })
    }

    /// An existing run, to be continued: no other process may work on it meanwhile.
    pub fn resume(folder: &Path) -> Result<Self> {
        let run = Self::open(folder)?;
        Ok(Self { lock: Some(Lock::take(folder)?), ..run })
    }

    /// An existing run, to be read.
    pub fn open(folder: &Path) -> Result<Self> {
        if folder.join("run.json").is_file() {
            return Ok(Self { folder: folder.to_owned(), lock: None });
        }
        Err(Error::content(
            folder,
            "there is no `run.json`\n\nhint: `--resume` takes a folder that dmd-distill made",
        ))
    }

    /// Refuses a run of another command than `distill` or `teacher`, whichever is expected.
    pub fn check_command(&self, expected: &str) -> Result<()> {
        let options: Value = self.options()?;
        let command = |name: &str| if name == "distill" { "dmd-distill" } else { "dmd-distill teacher" };
        match options["command"].as_str() {
            Some(found) if found == expected => Ok(()),
            Some(found @ ("distill" | "teacher")) => Err(Error::content(
                &self.folder,
                format!(
                    "it is a run of `{}`, not of `{}`\n\nhint: continue it with `{} --resume {}`",
                    command(found),
                    command(expected),
                    command(found),
                    self.folder.display()
                ),
            )),
            _ => Err(Error::content(
                &self.path("run.json"),
                "got another `command`, expected `distill` or `teacher`",
            )),
        }
    }

    /// The step of the saved state; 0 if training has not come to one.
    pub fn saved_step(&self) -> Result<u64> {
        let path = self.state_path(LATEST);
        match path.exists() {
            true => Ok(step_and_note(&path, &files::read(&path)?)?.0),
            false => Ok(0),
        }
    }

    /// A path inside the run.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Names of the files in a sub-folder.
    pub fn list(&self, sub: &str) -> Result<Vec<String>> {
        let folder = self.path(sub);
        let failed = || Error::file("list", &folder);
        let entries = fs::read_dir(&folder).map_err(failed())?;
        entries.map(|entry| Ok(entry.map_err(failed())?.file_name().to_string_lossy().into_owned())).collect()
    }

    /// Saves the resolved options.
    pub fn save_options(&self, options: &impl Serialize) -> Result<()> {
        write_json(&self.path("run.json"), options)
    }

    /// Reads the resolved options of an existing run.
    pub fn options<T: DeserializeOwned>(&self) -> Result<T> {
        let path = self.path("run.json");
        serde_json::from_slice(&files::read(&path)?).map_err(|e| Error::content(&path, e))
    }

    /// Appends a line of statistics.
    pub fn log(&self, line: &Value) -> Result<()> {
        let path = self.path("stats.jsonl");
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut f| writeln!(f, "{line}"))
            .map_err(Error::file("write", &path))
    }

    /// All statistics so far.
    pub fn stats(&self) -> Result<Vec<Value>> {
        let text = self.stats_text()?;
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    fn stats_text(&self) -> Result<String> {
        let path = self.path("stats.jsonl");
        match path.exists() {
            true => Ok(String::from_utf8_lossy(&files::read(&path)?).into_owned()),
            false => Ok(String::new()),
        }
    }

    /// Saves everything that training needs to go on after `step`, and notes, as `checkpoints/NAME.safetensors`.
    pub fn save_state(&self, name: &str, step: u64, tensors: &Tensors, note: &impl Serialize) -> Result<()> {
        let path = self.state_path(name);
        // One entry: the order of several in a file is not fixed.
        write_tensors(&path, tensors, &[("state", json!({"step": step, "note": note}).to_string())])
    }

    /// Keeps the state `from` as `to` too.
    pub fn keep_state(&self, from: &str, to: &str) -> Result<()> {
        files::copy(&self.state_path(from), &self.state_path(to))
    }

    /// A saved state; none if there is no such.
    pub fn read_state(&self, name: &str) -> Result<Option<State>> {
        let path = self.state_path(name);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = files::read(&path)?;
        let (step, note) = step_and_note(&path, &bytes)?;
        Ok(Some(State { step, tensors: read_tensors(&path, &bytes)?, note, path }))
    }

    fn state_path(&self, name: &str) -> PathBuf {
        self.path(&format!("checkpoints/{name}.safetensors"))
    }

    /// Keeps what a new run starts from.
    pub fn save_init(folder: &Path, tensors: &Tensors) -> Result<()> {
        write_tensors(&folder.join(INIT), tensors, &[])
    }

    /// What [`Self::save_init`] kept.
    pub fn read_init(&self) -> Result<Tensors> {
        let path = self.path(INIT);
        read_tensors(&path, &files::read(&path)?)
    }

    /// The state `name` that a run continues from; none if training had not come to one. Drops later statistics.
    pub fn load_state(&self, name: &str) -> Result<Option<State>> {
        let state = self.read_state(name)?;
        let last = state.as_ref().map_or(0, |state| state.step);
        let step_of = |line: &str| serde_json::from_str::<Value>(line).ok()?["step"].as_u64();
        let text = self.stats_text()?;
        let kept: String = text
            .lines()
            .filter(|line| step_of(line).is_some_and(|s| s <= last))
            .flat_map(|line| [line, "\n"])
            .collect();
        files::write(&self.path("stats.jsonl"), kept.as_bytes())?;
        Ok(state)
    }
}

/// What a run saved at a step.
pub struct State {
    /// Updates behind it.
    pub step: u64,
    /// Weights, averages and moments.
    pub tensors: Tensors,
    note: Value,
    path: PathBuf,
}

impl State {
    /// What was noted beside the tensors.
    pub fn note<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(self.note.clone()).map_err(|e| Error::content(&self.path, e))
    }
}

fn step_and_note(path: &Path, bytes: &[u8]) -> Result<(u64, Value)> {
    let metadata = read_metadata(path, bytes)?;
    let state: Value = metadata
        .get("state")
        .and_then(|text| serde_json::from_str(text).ok())
        .ok_or_else(|| Error::content(path, "it is no state of a run"))?;
    let step = state["step"].as_u64().ok_or_else(|| Error::content(path, "it does not say its step"))?;
    Ok((step, state["note"].clone()))
}

fn free_name(parent: &Path, name: &str) -> Result<PathBuf> {
    (1..10_000)
        .map(|i| parent.join(format!("{name}-{i:03}")))
        .find(|p| !p.exists())
        .ok_or_else(|| Error::content(parent, "10000 runs of this name exist"))
}

/// The images of a batch.
///
/// # Shapes
/// `x`: `[n, c, h, w]` in `range`.
pub fn images(x: &Tensor, range: [f32; 2]) -> Result<Vec<Image>> {
    let (n, c, h, w) = x.dims4()?;
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    Ok((0..n).map(|i| to_image(&values[i * c * h * w..(i + 1) * c * h * w], [c, h, w], range)).collect())
}

/// Writes a grid of images as PNG, each pixel enlarged to `zoom` by `zoom`.
pub fn save_grid(path: &Path, images: &[Image], columns: usize, zoom: usize) -> Result<()> {
    save_image(path, &enlarge(&grid(images, columns, 2), zoom))
}

/// Repeats every pixel `zoom` times in both directions.
pub fn enlarge(image: &Image, zoom: usize) -> Image {
    let Image { channels, height, width, data } = image;
    let row = |y: usize| {
        (0..width * zoom).flat_map(move |x| {
            let at = (y / zoom * width + x / zoom) * channels;
            &data[at..at + channels]
        })
    };
    let data = (0..height * zoom).flat_map(row).copied().collect();
    Image { channels: *channels, height: height * zoom, width: width * zoom, data }
}

/// Writes one image as PNG, atomically.
pub fn save_image(path: &Path, image: &Image) -> Result<()> {
    let kind = match image.channels {
        1 => image::ExtendedColorType::L8,
        3 => image::ExtendedColorType::Rgb8,
        n => return Err(Error::content(path, format!("a PNG has 1 or 3 channels, the model {n}"))),
    };
    let mut bytes = Vec::new();
    let encoder = image::codecs::png::PngEncoder::new(&mut bytes);
    image::ImageEncoder::write_image(encoder, &image.data, image.width as u32, image.height as u32, kind)
        .map_err(|e| Error::content(path, e))?;
    files::write(path, &bytes)
}
