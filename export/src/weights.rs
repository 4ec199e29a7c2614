//! Reads a checkpoint directory: configuration, schedule, card and weights, all checked against each other. The layout is
//! that of `dmd-distill`, or of a diffusers pipeline with `unet/` and `scheduler/`. Writes nothing and knows nothing of
//! graphs; what lies in the files of weights is `tensors.rs`'s business.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use dmd_core::card::{Classes, GeneratorConfig, Provenance};
use dmd_core::config::ModelConfig;
use dmd_core::net::OneStep;
use dmd_core::schedule::{Schedule, ScheduleConfig};

use crate::{Array, Error, Result, tensors};

/// Names under which the weights may lie: ours, diffusers', and diffusers' index of shards.
pub const WEIGHT_FILES: [&str; 3] = [
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
];
/// How names of PyTorch's files end.
const PYTORCH: [&str; 3] = ["bin", "pt", "pth"];

/// A denoiser or a generator, as a directory holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// `config.json`.
    pub config: ModelConfig,
    /// `scheduler_config.json`.
    pub schedule: ScheduleConfig,
    /// `generator.json`; its presence makes the checkpoint a generator.
    pub generator: Option<GeneratorConfig>,
    /// `card.json`, or a name and the number of classes.
    pub provenance: Provenance,
    /// Parameters by name, converted to f32, exactly those of the configuration.
    pub weights: BTreeMap<String, Array>,
}

impl Checkpoint {
    /// Reads the directory `dir`.
    ///
    /// # Errors
    /// Names the file, and the key or tensor in it, that is missing, damaged or does not fit the others.
    pub fn load(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            return Err(Error::file(dir, "no such directory, expected a checkpoint directory"));
        }
        let place = |name: &str| find(dir, name).unwrap_or(dir.join(name));
        let config = parse(&place("config.json"), ModelConfig::from_json)?;
        let schedule: ScheduleConfig =
            parse(&place("scheduler_config.json"), |text| serde_json::from_str(text))?;
        schedule.check_network(&config).map_err(|e| Error::file(dir, e.to_string()))?;
        let generator = parse_optional(&dir.join("generator.json"))?;
        let card = dir.join("card.json");
        let provenance: Option<Provenance> = parse_optional(&card)?;
        let provenance = complete(provenance, dir, &config).map_err(|e| Error::file(&card, e.to_string()))?;
        let weights = tensors::load(&weight_file(dir)?, &config)?;
        let checkpoint = Self { config, schedule, generator, provenance, weights };
        if checkpoint.generator.is_some() {
            let file = dir.join("generator.json");
            checkpoint.one_step().map_err(|e| Error::file(&file, e.to_string()))?;
        }
        Ok(checkpoint)
    }

    /// The constants of the generator.
    ///
    /// # Errors
    /// If the checkpoint is no generator, or its step lies outside the schedule.
    pub fn one_step(&self) -> Result<OneStep> {
        let config = self.generator.as_ref().ok_or_else(|| {
            Error::Request("the checkpoint has no generator.json: it is a base model, not a generator".into())
        })?;
        Ok(OneStep::new(config, &Schedule::new(&self.schedule))?)
    }
}

fn parse<T, E: std::fmt::Display>(
    path: &Path,
    from: impl FnOnce(&str) -> std::result::Result<T, E>,
) -> Result<T> {
    let text = fs::read_to_string(path).map_err(|e| Error::file(path, e.to_string()))?;
    from(&text).map_err(|e| Error::file(path, e.to_string()))
}

fn parse_optional<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if !path.exists() {
        return Ok(None);
    }
    parse(path, |text| serde_json::from_str(text)).map(Some)
}

/// The card, with the classes that the network implies where it names none.
fn complete(card: Option<Provenance>, dir: &Path, config: &ModelConfig) -> dmd_core::Result<Provenance> {
    let mut card = card.unwrap_or_else(|| Provenance::named(directory_name(dir)));
    if card.classes.is_none() {
        card.classes = match config {
            ModelConfig::ContextUnet(c) => {
                Some(Classes { count: c.n_classes, names: vec![], none: Some(c.n_classes) })
            }
            _ => config.class_rows().map(|count| Classes { count, names: vec![], none: None }),
        };
    }
    card.check_classes(config.class_rows())?;
    Ok(card)
}

/// Last part of the path that says more than the role of the directory in a run.
fn directory_name(dir: &Path) -> String {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let mut names = dir.iter().rev().map(|part| part.to_string_lossy().into_owned());
    names.find(|name| !["generator", "teacher"].contains(&name.as_str())).unwrap_or_else(|| "model".into())
}

/// Where a file of this name lies in a checkpoint directory: in it, or where a diffusers pipeline has it.
pub fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    ["", "unet", "scheduler"].map(|part| dir.join(part).join(name)).into_iter().find(|path| path.is_file())
}

fn weight_file(dir: &Path) -> Result<PathBuf> {
    if let Some(path) = WEIGHT_FILES.iter().find_map(|name| find(dir, name)) {
        return Ok(path);
    }
    let entries = ["", "unet"].iter().filter_map(|part| fs::read_dir(dir.join(part)).ok()).flatten();
    let pickle = entries.flatten().map(|entry| entry.path()).find(|path| is_pytorch(path));
    Err(match pickle {
        Some(path) => pytorch(&path),
        None => Error::file(dir, format!("no weights, expected one of `{}`", WEIGHT_FILES.join("`, `"))),
    })
}

/// Whether a name is that of PyTorch's files.
pub fn is_pytorch(path: &Path) -> bool {
    path.extension().is_some_and(|end| PYTORCH.iter().any(|pytorch| end == *pytorch))
}

/// What to say of such a file.
pub fn pytorch(path: &Path) -> Error {
    let problem = "PyTorch's format is not read here, expected safetensors\n\nhint: `dmd-distill --base` reads it, and leaves \
                   safetensors in the run's `generator/` and, for --teacher, `teacher/`";
    Error::file(path, problem)
}
