//! Checkpoint directories in diffusers layout: `config.json`, `scheduler_config.json`, weights as safetensors under
//! the checkpoint's own names; `generator.json` for a one-step generator and `card.json` for where it came from.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dmd_assets::Files;
use dmd_cli::files::temporary_folder;
use dmd_core::card::{Classes, GeneratorConfig, Provenance};
use dmd_core::config::ModelConfig;
use dmd_core::net::{OneStep, shapes};
use dmd_core::schedule::{Schedule, ScheduleConfig};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::error::{Error, Result};
use crate::files;
use crate::network::Tensors;
use crate::weights::{self, Found};

/// Where a checkpoint's files are.
#[derive(Clone, Debug)]
pub enum Source {
    /// A folder, or its `unet/` and `scheduler/` as diffusers pipelines have them.
    Folder(PathBuf),
    /// Files inside this program: folder name for messages, then name and bytes.
    Bundled(&'static str, Files),
}

/// A denoiser with its schedule and history.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Architecture.
    pub config: ModelConfig,
    /// Forward process.
    pub schedule: ScheduleConfig,
    /// Present if this is a one-step generator.
    pub generator: Option<GeneratorConfig>,
    /// Where it came from.
    pub provenance: Provenance,
    /// Weights on the CPU, f32.
    pub tensors: Tensors,
    /// SHA-256 of the weights file; empty if never written.
    pub sha256: String,
}

impl Source {
    /// A file by its name, and where it lies.
    pub fn read(&self, name: &str) -> Result<Option<(PathBuf, Vec<u8>)>> {
        match self {
            Self::Bundled(folder, all) => Ok(all
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(n, bytes)| (Path::new(folder).join(n), bytes.to_vec()))),
            Self::Folder(folder) => {
                let candidates = ["", "unet", "scheduler"].map(|sub| folder.join(sub).join(name));
                match candidates.into_iter().find(|p| p.is_file()) {
                    Some(path) => files::read(&path).map(|bytes| Some((path, bytes))),
                    None => Ok(None),
                }
            }
        }
    }

    /// The folder.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Folder(p) => p.clone(),
            Self::Bundled(name, _) => PathBuf::from(name),
        }
    }

    fn json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        match self.read(name)? {
            None => Ok(None),
            Some((path, bytes)) => {
                serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::content(&path, e))
            }
        }
    }

    fn required<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.json(name)?.ok_or_else(|| {
            Error::content(
                &self.path(),
                format!(
                    "there is no `{name}`\n\nhint: a checkpoint folder has `config.json`, `scheduler_config.json` and \
                     weights, which dmd-distill calls `{}` and diffusers `{}`",
                    weights::NAMES[0],
                    weights::NAMES[1]
                ),
            )
        })
    }
}

impl Checkpoint {
    /// Reads and checks a checkpoint; every tensor must have the shape that `config.json` asks for.
    pub fn load(source: &Source) -> Result<Self> {
        if let Source::Folder(path) = source
            && !path.is_dir()
        {
            return Err(Error::content(path, "there is no such folder"));
        }
        let config: ModelConfig = source.required("config.json")?;
        let schedule: ScheduleConfig = source.required("scheduler_config.json")?;
        schedule.check_network(&config).map_err(|e| Error::content(&source.path(), e))?;
        let name = source.path().file_name().map_or("model".into(), |n| n.to_string_lossy().into_owned());
        let mut provenance = source.json("card.json")?.unwrap_or_else(|| Provenance::named(name));
        if let (None, ModelConfig::ContextUnet(c)) = (&provenance.classes, &config) {
            let none = Some(c.n_classes);
            provenance.classes = Some(Classes { count: c.n_classes, names: Vec::new(), none });
        }
        let card = || source.path().join("card.json");
        provenance.check_classes(config.class_rows()).map_err(|e| Error::content(&card(), e))?;
        Self::assemble(config, schedule, source.json("generator.json")?, provenance, weights::read(source)?)
    }

    /// Joins a description and weights that are checked against it.
    pub fn assemble(
        config: ModelConfig,
        schedule: ScheduleConfig,
        generator: Option<GeneratorConfig>,
        provenance: Provenance,
        found: Found,
    ) -> Result<Self> {
        let summary = shapes::summarise(&config)?;
        let Found { path, tensors, sha256 } = found;
        let tensors = weights::rename(tensors, &summary)?;
        let shapes: Vec<(&str, &[usize])> = tensors.iter().map(|(n, t)| (n.as_str(), t.dims())).collect();
        summary.check(shapes).map_err(|e| Error::content(&path, e))?;
        for (name, tensor) in &tensors {
            let total = tensor.abs()?.sum_all()?.to_scalar::<f32>()?;
            if !total.is_finite() {
                let problem = format!("tensor `{name}` holds values that are not finite");
                return Err(Error::content(&path, problem));
            }
        }
        Ok(Self { config, schedule, generator, provenance, tensors, sha256 })
    }

    /// Writes a new checkpoint folder: everything into a folder beside it, then renamed into place. A folder that is
    /// already there is replaced only after the new one is complete.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let partial = temporary_folder(folder).map_err(Error::file("create", folder))?;
        let inside = |name: &str| partial.path().join(name);
        write_json(&inside("config.json"), &self.config)?;
        write_json(&inside("scheduler_config.json"), &self.schedule)?;
        write_json(&inside("card.json"), &self.provenance)?;
        if let Some(generator) = &self.generator {
            write_json(&inside("generator.json"), generator)?;
        }
        write_tensors(&inside(weights::NAMES[0]), &self.tensors, &[])?;
        files::replace_folder(partial.path(), folder)
    }

    /// The constants of the one-step generator; an error if this is a base.
    pub fn one_step(&self) -> Result<OneStep> {
        match &self.generator {
            Some(g) => Ok(OneStep::new(g, &Schedule::new(&self.schedule))?),
            None => {
                Err(Error::Request(format!("`{}` is a base, not a one-step generator", self.provenance.name)))
            }
        }
    }

    /// SHA-256 of configuration and schedule, which say what the weights mean.
    pub fn description_sha256(&self) -> String {
        files::sha256(json!([self.config, self.schedule]).to_string().as_bytes())
    }

    /// Number of classes to draw from, if the model is conditional: the card's, else all rows of the table.
    pub fn class_count(&self) -> Option<usize> {
        self.provenance.classes.as_ref().map(|c| c.count).or(self.config.class_rows())
    }
}

/// Writes JSON for people: indented, with a final newline.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::content(path, e))?;
    text.push('\n');
    files::write(path, text.as_bytes())
}

/// Writes tensors with string metadata, atomically.
pub fn write_tensors(path: &Path, tensors: &Tensors, metadata: &[(&str, String)]) -> Result<()> {
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
    let metadata = (!metadata.is_empty()).then_some(metadata);
    let mut on_cpu = Tensors::new();
    for (name, tensor) in tensors {
        on_cpu.insert(name.clone(), tensor.to_device(&Device::Cpu)?.contiguous()?);
    }
    let bytes = safetensors::serialize(&on_cpu, metadata).map_err(|e| Error::content(path, e))?;
    files::write(path, &bytes)
}

/// Reads all tensors of a safetensors file as f32.
pub fn read_tensors(path: &Path, bytes: &[u8]) -> Result<Tensors> {
    let found = candle_core::safetensors::load_buffer(bytes, &Device::Cpu).map_err(|e| {
        Error::content(
            path,
            format!("not a complete safetensors file ({e})\n\nhint: copy or download the file again"),
        )
    })?;
    found
        .into_iter()
        .map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::F32)?)))
        .collect::<candle_core::Result<_>>()
        .map_err(Error::from)
}

/// The metadata of a safetensors file.
pub fn read_metadata(path: &Path, bytes: &[u8]) -> Result<HashMap<String, String>> {
    let (_, header) = safetensors::SafeTensors::read_metadata(bytes).map_err(|e| Error::content(path, e))?;
    Ok(header.metadata().clone().unwrap_or_default())
}

/// Copies of tensors that later changes to a variable do not reach.
pub fn snapshot(tensors: &Tensors) -> Result<Tensors> {
    tensors
        .iter()
        .map(|(name, tensor)| Ok((name.clone(), Tensor::copy(tensor)?.detach())))
        .collect::<candle_core::Result<_>>()
        .map_err(Error::from)
}
