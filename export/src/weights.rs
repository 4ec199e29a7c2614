//! Reads a checkpoint directory: configuration, schedule, card and weights, all checked against each other.
//! Writes nothing and knows nothing of graphs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use dmd_core::card::{Classes, GeneratorConfig, Provenance};
use dmd_core::config::ModelConfig;
use dmd_core::net::{OneStep, shapes};
use dmd_core::schedule::{Schedule, ScheduleConfig};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};

use crate::{Array, Error, Result};

/// Names under which the weights may lie, first ours, then that of diffusers.
pub const WEIGHT_FILES: [&str; 2] = ["model.safetensors", "diffusion_pytorch_model.safetensors"];

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
        let config = parse(&dir.join("config.json"), ModelConfig::from_json)?;
        let schedule = parse(&dir.join("scheduler_config.json"), |text| serde_json::from_str(text))?;
        let generator = parse_optional(&dir.join("generator.json"))?;
        let card = dir.join("card.json");
        let provenance: Option<Provenance> = parse_optional(&card)?;
        let provenance = complete(provenance, dir, &config).map_err(|problem| Error::file(&card, problem))?;
        let weights = load_weights(&weight_file(dir)?, &config)?;
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

/// Adds what `card.json` leaves out and checks what it says against the configuration.
fn complete(
    card: Option<Provenance>,
    dir: &Path,
    config: &ModelConfig,
) -> std::result::Result<Provenance, String> {
    let rows = config.class_rows();
    let mut card = card.unwrap_or_else(|| Provenance::named(directory_name(dir)));
    match (&card.classes, rows) {
        (None, None) => {}
        (None, Some(count)) => card.classes = Some(Classes { count, names: vec![], none: None }),
        (Some(c), None) => {
            return Err(format!("got {} classes, but config.json has no `num_class_embeds`", c.count));
        }
        (Some(c), Some(rows)) => {
            if c.count == 0 || c.count > rows || c.none.is_some_and(|none| none >= rows) {
                return Err(format!(
                    "got {} classes and `none` {:?}, expected rows of the {rows} in `num_class_embeds` of config.json",
                    c.count, c.none
                ));
            }
            if !c.names.is_empty() && c.names.len() != c.count {
                return Err(format!("got {} class names, expected {}", c.names.len(), c.count));
            }
        }
    }
    Ok(card)
}

/// Last part of the path that says more than the role of the directory in a run.
fn directory_name(dir: &Path) -> String {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let mut names = dir.iter().rev().map(|part| part.to_string_lossy().into_owned());
    names.find(|name| !["generator", "teacher"].contains(&name.as_str())).unwrap_or_else(|| "model".into())
}

fn weight_file(dir: &Path) -> Result<PathBuf> {
    WEIGHT_FILES.iter().map(|name| dir.join(name)).find(|path| path.is_file()).ok_or_else(|| {
        Error::file(dir, format!("no weights, expected `{}` or `{}`", WEIGHT_FILES[0], WEIGHT_FILES[1]))
    })
}

fn load_weights(path: &Path, config: &ModelConfig) -> Result<BTreeMap<String, Array>> {
    let bytes = fs::read(path).map_err(|e| Error::file(path, e.to_string()))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::file(path, damage(&e)))?;
    let views = file.tensors();
    let shapes = views.iter().map(|(name, view)| (name.as_str(), view.shape()));
    shapes::summarise(config)?
        .check(shapes)
        .map_err(|e| Error::file(path, format!("tensor {e}{OTHER_RUN}")))?;
    views
        .iter()
        .map(|(name, view)| {
            let array =
                to_f32(view).map_err(|problem| Error::file(path, format!("tensor `{name}`: {problem}")))?;
            Ok((name.clone(), array))
        })
        .collect()
}

const OTHER_RUN: &str = "\n\nhint: config.json and the weights seem to come from different models; export a directory as \
    `dmd-distill` wrote it";

fn damage(error: &SafeTensorError) -> String {
    match error {
        SafeTensorError::MetadataIncompleteBuffer
        | SafeTensorError::HeaderTooSmall
        | SafeTensorError::InvalidHeaderLength => {
            format!(
                "not a whole safetensors file: {error}\n\nhint: the file is truncated; copy or download it again"
            )
        }
        other => format!("not a safetensors file: {other}"),
    }
}

fn to_f32(view: &TensorView) -> std::result::Result<Array, String> {
    let bytes = view.data();
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    let data: Vec<f32> = match view.dtype() {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        other => return Err(format!("got type {other}, expected F32, F16 or BF16")),
    };
    if let Some(index) = data.iter().position(|v| !v.is_finite()) {
        return Err(format!("got {} at element {index}, expected finite numbers", data[index]));
    }
    Array::new(view.shape(), data).map_err(|e| e.to_string())
}
