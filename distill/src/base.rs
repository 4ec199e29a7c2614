//! Where a base model comes from: a preset inside this program, a folder in diffusers layout, a PyTorch file, or the
//! Hugging Face hub.

use std::path::{Path, PathBuf};

use candle_core::Device;
use dmd_assets::{DDPM_FASHION, Files};
use dmd_core::card::{Base, Classes, Provenance};
use dmd_core::config::ModelConfig;
use dmd_core::net::shapes;
use dmd_core::schedule::{Schedule, ScheduleConfig};
use serde_json::json;

use crate::checkpoint::{Checkpoint, Source};
use crate::data::FASHION_CLASSES;
use crate::error::{Error, Result};
use crate::network::initial_weights;
use crate::options::Recipe;
use crate::teacher::options::TeacherRecipe;
use crate::weights::{self, Found};
use crate::{files, hub};

/// A base this program knows by name.
pub struct Preset {
    /// What `--base` takes.
    pub name: &'static str,
    /// One line about it.
    pub about: &'static str,
    config: &'static str,
    scheduler: &'static str,
    weights: Weights,
    classes: &'static [&'static str],
    recipe: &'static str,
    teacher: &'static str,
}

/// Where a preset's weights are.
enum Weights {
    /// Inside this program.
    Bundled(Files),
    /// In this repository of the hub.
    Hub(&'static str),
    /// Nowhere that a program could fetch them from.
    Elsewhere,
}

macro_rules! description {
    ($name:literal, $file:literal) => {
        include_str!(concat!("../presets/", $name, "/", $file))
    };
}

/// All presets.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "ddpm-fashion",
        about: "Fashion-MNIST by class, 28x28 grey",
        config: description!("ddpm-fashion", "config.json"),
        scheduler: description!("ddpm-fashion", "scheduler_config.json"),
        weights: Weights::Bundled(DDPM_FASHION),
        classes: &FASHION_CLASSES,
        recipe: description!("ddpm-fashion", "distill.toml"),
        teacher: description!("ddpm-fashion", "teacher.toml"),
    },
    Preset {
        name: "ddpm-mnist",
        about: "MNIST by class, 28x28 grey; the network of TeaPearce/Conditional_Diffusion_MNIST",
        config: description!("ddpm-mnist", "config.json"),
        scheduler: description!("ddpm-mnist", "scheduler_config.json"),
        weights: Weights::Elsewhere,
        classes: &["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"],
        recipe: description!("ddpm-mnist", "distill.toml"),
        teacher: description!("ddpm-mnist", "teacher.toml"),
    },
    Preset {
        name: "ddpm-celeba",
        about: "CelebA faces, 32x32 colour; the small network of the reference experiments",
        config: description!("ddpm-celeba", "config.json"),
        scheduler: description!("ddpm-celeba", "scheduler_config.json"),
        weights: Weights::Elsewhere,
        classes: &[],
        recipe: description!("ddpm-celeba", "distill.toml"),
        teacher: description!("ddpm-celeba", "teacher.toml"),
    },
    Preset {
        name: "ddpm-cifar10",
        about: "CIFAR-10, 32x32 colour; google/ddpm-cifar10-32 of the Hugging Face hub",
        config: description!("ddpm-cifar10", "config.json"),
        scheduler: description!("ddpm-cifar10", "scheduler_config.json"),
        weights: Weights::Hub("google/ddpm-cifar10-32"),
        classes: &[],
        recipe: description!("ddpm-cifar10", "distill.toml"),
        teacher: description!("ddpm-cifar10", "teacher.toml"),
    },
];

impl Preset {
    /// Architecture.
    pub fn config(&self) -> Result<ModelConfig> {
        Ok(ModelConfig::from_json(self.config)?)
    }

    /// Forward process.
    pub fn schedule(&self) -> Result<ScheduleConfig> {
        serde_json::from_str(self.scheduler).map_err(|e| Error::content(Path::new(self.name), e))
    }

    /// Options that suit this base better than the general ones.
    pub fn recipe(&self) -> Result<Recipe> {
        toml::from_str(self.recipe).map_err(|e| Error::content(Path::new(self.name), e))
    }

    /// How this base is trained from data.
    pub fn teacher_recipe(&self) -> Result<TeacherRecipe> {
        toml::from_str(self.teacher).map_err(|e| Error::content(Path::new(self.name), e))
    }

    /// The card of a base that is about to be trained: the classes of the preset's data set.
    pub fn provenance(&self) -> Provenance {
        let names: Vec<String> = self.classes.iter().map(|name| (*name).to_owned()).collect();
        let none = Some(names.len());
        let classes = (!names.is_empty()).then_some(Classes { count: names.len(), none, names });
        Provenance { classes, ..Provenance::named(self.name) }
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
            "weights": match self.weights {
                Weights::Bundled(_) => "bundled".to_owned(),
                Weights::Hub(id) if hub::is_cached(id) => format!("in the cache, from the hub: {id}"),
                Weights::Hub(id) => format!("downloaded on first use from the hub: {id}"),
                Weights::Elsewhere => "not here: train it, or bring a PyTorch file".to_owned(),
            },
        }))
    }

    fn load(&self) -> Result<Checkpoint> {
        match self.weights {
            Weights::Bundled(files) => Checkpoint::load(&Source::Bundled(self.name, files)),
            Weights::Hub(id) => {
                let checkpoint = from_hub(id)?;
                let provenance = Provenance { base: checkpoint.provenance.base, ..self.provenance() };
                Ok(Checkpoint { provenance, ..checkpoint })
            }
            Weights::Elsewhere => Err(Error::Request(format!(
                "no hub has the weights of `{0}`\n\nhint: `dmd-distill teacher --base {0}` trains them; if you have the \
                 original program's checkpoint, name the file: `--base FILE.pth`",
                self.name
            ))),
        }
    }

    /// The architecture with random weights, for estimates.
    pub fn untrained(&self) -> Result<Checkpoint> {
        let config = self.config()?;
        Ok(Checkpoint {
            tensors: initial_weights(&config, 0)?,
            config,
            schedule: self.schedule()?,
            generator: None,
            provenance: self.provenance(),
            sha256: String::new(),
        })
    }
}

/// The preset of this name, if there is one.
pub fn find(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|p| p.name == name)
}

/// The preset of this name; the error suggests the nearest.
pub fn preset(name: &str) -> Result<&'static Preset> {
    let nearest = PRESETS
        .iter()
        .max_by(|a, b| strsim::jaro_winkler(a.name, name).total_cmp(&strsim::jaro_winkler(b.name, name)));
    find(name).ok_or_else(|| {
        let nearest = nearest.map_or(String::new(), |p| format!("did you mean `{}`? ", p.name));
        Error::Request(format!(
            "no base `{name}`: it is neither a preset, nor a file or folder, nor ORG/NAME on the hub\n\nhint: \
             {nearest}`dmd-distill bases` lists the presets; a folder needs `config.json`, `scheduler_config.json` \
             and weights"
        ))
    })
}

/// Loads `--base`: a preset, a folder, a PyTorch file, or `ORG/NAME` on the hub.
pub fn load(base: &str) -> Result<Checkpoint> {
    let path = PathBuf::from(base);
    let checkpoint = match find(base) {
        Some(preset) => preset.load()?,
        None if path.is_file() => from_file(&path)?,
        None if path.join("run.json").is_file() => return Err(run_folder(&path)),
        None if path.exists() || base.starts_with(['.', '/', '~']) => {
            Checkpoint::load(&Source::Folder(path))?
        }
        None if hub::is_id(base) => from_hub(base)?,
        None => preset(base)?.load()?,
    };
    if checkpoint.generator.is_some() {
        return Err(Error::Request(format!(
            "`{base}` is a one-step generator already\n\nhint: `--base` takes the model it was distilled from"
        )));
    }
    Ok(checkpoint)
}

/// A model of the hub; its card records which commit it is.
fn from_hub(id: &str) -> Result<Checkpoint> {
    let hub::Fetched { folder, name, commit } = hub::fetch(id)?;
    let mut checkpoint = Checkpoint::load(&Source::Folder(folder))?;
    let base = Base { id: format!("{name}@{commit}"), sha256: checkpoint.sha256.clone() };
    let short = name.rsplit('/').next().unwrap_or(&name).to_owned();
    checkpoint.provenance = Provenance { name: short, base: Some(base), ..checkpoint.provenance };
    Ok(checkpoint)
}

/// Refuses the folder of a run by the name of the base in it.
fn run_folder(path: &Path) -> Error {
    let inside = path.join("teacher");
    let hint = match inside.is_dir() {
        true => format!("the base in it is `{}`", inside.display()),
        false => "there is no base in it yet; finish the run with `--resume`".to_owned(),
    };
    Error::content(path, format!("it is the folder of a run, not of a model\n\nhint: {hint}"))
}

/// A file of weights alone, of one of the two networks that have no configuration file; its tensors say their sizes.
fn from_file(path: &Path) -> Result<Checkpoint> {
    let found = weights::read_file(path, files::read(path)?)?;
    let size = |name: &str, axis| weights::size(&found.tensors, name, axis);
    let (config, steps, beta_end) = if let Some(n_feat) = size("init_conv.conv1.0.weight", 0) {
        let n_steps = size("alphabar_t", 0).map_or(400, |steps| steps.saturating_sub(1));
        let config = json!({
            "_class_name": "ContextUnet", "n_feat": n_feat, "n_steps": n_steps,
            "in_channels": size("init_conv.conv1.0.weight", 1),
            "n_classes": size("contextembed1.model.0.weight", 1),
            "sample_size": size("up0.0.weight", 2).map(|side| 4 * side),
        });
        (config, n_steps + 1, 2e-2)
    } else if let Some(channels) = size("down.0.res.conv1.weight", 0) {
        let n_steps = size("time_embed.weight", 0).unwrap_or(1000);
        let config = json!({
            "_class_name": "CelebaUNet", "channels": channels, "n_steps": n_steps,
            "in_channels": size("conv1.weight", 1),
        });
        (config, n_steps, 1e-2)
    } else {
        return Err(Error::content(
            path,
            "the tensors are those of neither ddpm-mnist's nor ddpm-celeba's network\n\nhint: name the folder instead, \
             with `config.json` and `scheduler_config.json` beside the weights",
        ));
    };
    let config = ModelConfig::from_json(&config.to_string())?;
    let schedule = json!({"num_train_timesteps": steps, "beta_start": 1e-4, "beta_end": beta_end});
    let schedule: ScheduleConfig = serde_json::from_value(schedule).map_err(|e| Error::content(path, e))?;
    check_schedule(&found, &schedule)?;
    let name = path.file_stem().map_or("model".into(), |name| name.to_string_lossy().into_owned());
    let classes = config.class_rows().map(|rows| {
        let names = (0..rows - 1).map(|class| class.to_string()).collect();
        Classes { count: rows - 1, none: Some(rows - 1), names }
    });
    let provenance = Provenance { classes, ..Provenance::named(name) };
    Checkpoint::assemble(config, schedule, None, provenance, found)
}

/// A file that holds its sampler's table must have the schedule that we assume.
fn check_schedule(found: &Found, schedule: &ScheduleConfig) -> Result<()> {
    let Some(table) = found.tensors.get("alphabar_t") else { return Ok(()) };
    let table = table.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
    let ours = Schedule::new(schedule).alphas_cumprod;
    let apart = table.iter().zip(&ours).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    if table.len() == ours.len() && apart < 1e-4 {
        return Ok(());
    }
    Err(Error::content(
        &found.path,
        format!(
            "its `alphabar_t` is {apart:.4} away from a linear schedule of betas from 1e-4 to {}",
            schedule.beta_end
        ),
    ))
}
