//! Where a base model comes from: a preset inside this program, or a folder in diffusers layout.

use std::path::{Path, PathBuf};

use dmd_core::card::{Classes, Provenance};
use dmd_core::config::ModelConfig;
use dmd_core::net::shapes;
use dmd_core::schedule::ScheduleConfig;
use serde_json::json;

use crate::checkpoint::{Checkpoint, Source};
use crate::data::FASHION_CLASSES;
use crate::error::{Error, Result};

/// A base this program knows by name.
pub struct Preset {
    /// What `--base` takes.
    pub name: &'static str,
    /// One line about it.
    pub about: &'static str,
    config: &'static str,
    scheduler: &'static str,
    files: &'static [(&'static str, &'static [u8])],
}

macro_rules! bundled {
    ($folder:literal) => {
        &[
            ("config.json", include_bytes!(concat!("../../assets/", $folder, "/config.json"))),
            (
                "scheduler_config.json",
                include_bytes!(concat!("../../assets/", $folder, "/scheduler_config.json")),
            ),
            ("card.json", include_bytes!(concat!("../../assets/", $folder, "/card.json"))),
            ("model.safetensors", include_bytes!(concat!("../../assets/", $folder, "/model.safetensors"))),
        ]
    };
}

/// All presets.
pub const PRESETS: &[Preset] = &[Preset {
    name: "ddpm-fashion",
    about: "Fashion-MNIST by class, 28x28 grey; weights bundled",
    config: include_str!("../presets/ddpm-fashion/config.json"),
    scheduler: include_str!("../presets/ddpm-fashion/scheduler_config.json"),
    files: bundled!("ddpm-fashion"),
}];

impl Preset {
    /// Architecture.
    pub fn config(&self) -> Result<ModelConfig> {
        Ok(ModelConfig::from_json(self.config)?)
    }

    /// Forward process.
    pub fn schedule(&self) -> Result<ScheduleConfig> {
        serde_json::from_str(self.scheduler).map_err(|e| Error::content(Path::new(self.name), e))
    }

    /// The card of a base that is about to be trained: the classes of the preset's data set.
    pub fn provenance(&self) -> Provenance {
        let names = FASHION_CLASSES.map(str::to_owned).to_vec();
        Provenance {
            name: self.name.to_owned(),
            classes: Some(Classes { count: names.len(), none: Some(names.len()), names }),
            base: None,
            training: serde_json::Map::new(),
            metrics: serde_json::Map::new(),
        }
    }

    /// What `dmd-distill bases --json` says of it.
    pub fn describe(&self) -> Result<serde_json::Value> {
        let config = self.config()?;
        let summary = shapes::summarise(&config)?;
        Ok(json!({
            "name": self.name,
            "about": self.about,
            "parameters": summary.parameter_count(),
            "macs": summary.total_macs(),
            "image": config.image_shape(),
            "classes": self.provenance().classes.map(|c| c.count),
            "weights": if self.files.is_empty() { "not here" } else { "bundled" },
        }))
    }
}

/// The preset of this name; the error suggests the nearest.
pub fn preset(name: &str) -> Result<&'static Preset> {
    let nearest = PRESETS
        .iter()
        .max_by(|a, b| strsim::jaro_winkler(a.name, name).total_cmp(&strsim::jaro_winkler(b.name, name)));
    PRESETS.iter().find(|p| p.name == name).ok_or_else(|| {
        let nearest = nearest.map_or(String::new(), |p| format!("did you mean `{}`? ", p.name));
        Error::Request(format!(
            "no base `{name}`: it is neither a preset nor a folder\n\nhint: {nearest}`dmd-distill bases` lists the \
             presets; a folder needs `config.json` and `model.safetensors` in diffusers layout"
        ))
    })
}

/// Loads `--base`: a folder if it looks like one or exists, else a preset.
pub fn load(base: &str) -> Result<Checkpoint> {
    let folder = PathBuf::from(base);
    let is_preset = PRESETS.iter().any(|p| p.name == base);
    let source = if !is_preset && (folder.exists() || base.starts_with(['.', '/', '~'])) {
        Source::Folder(folder)
    } else {
        let preset = preset(base)?;
        Source::Bundled(preset.name, preset.files)
    };
    let checkpoint = Checkpoint::load(&source)?;
    if checkpoint.generator.is_some() {
        return Err(Error::Request(format!(
            "`{base}` is a one-step generator already\n\nhint: `--base` takes the model it was distilled from"
        )));
    }
    Ok(checkpoint)
}
