//! Options of a base training, and how they are resolved: the preset's recipe (`presets/NAME/teacher.toml`), then a TOML file,
//! then flags.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::base::{self, Preset};
use crate::checkpoint::Checkpoint;
use crate::data::{self, Source, Split};
use crate::error::{Error, Result};
use crate::files;
use crate::optimiser::LrSchedule;

/// A base training.
#[derive(Clone, Debug, Args)]
pub struct TeacherArgs {
    /// Preset to train: architecture, noise schedule and recipe
    #[arg(long, value_name = "NAME", required_unless_present = "resume")]
    pub base: Option<String>,
    /// Start from the weights of a base of the same architecture instead of random ones: a preset, a folder, a PyTorch file or a
    /// model of the hub
    #[arg(long, value_name = "NAME|DIR|FILE|ORG/REPO")]
    pub init: Option<String>,
    /// Continue the run in this folder; only --train-steps, --device and --profile may be given with it
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
    /// Run folder to create [default: the next free runs/teacher-BASE-NNN]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// TOML file with any of the options below; flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where to compute
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value = "auto")]
    pub device: String,
    /// Print how long an update takes and what part of it is communication between ranks, and keep it as `profile.json`
    #[arg(long)]
    pub profile: bool,
    /// Print the resolved options, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Everything that a TOML file may also set.
    #[command(flatten)]
    pub recipe: TeacherRecipe,
}

/// Options of a base training that a TOML file may set; none means "not said here".
#[derive(Clone, Debug, Default, PartialEq, Args, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct TeacherRecipe {
    /// Images: `fashion-mnist` (found or downloaded), or a folder with idx files, CIFAR-10, or PNG and JPEG images [default: the
    /// preset's, if it has one]
    #[arg(long, value_name = "NAME|DIR")]
    pub data: Option<String>,
    /// Updates [default: the preset's, as all below]
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    pub train_steps: Option<u64>,
    /// Passes over the images, instead of updates
    #[arg(long, value_name = "N")]
    pub epochs: Option<u64>,
    /// Images per update
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Learning rate after warm-up
    #[arg(long, value_name = "X")]
    pub lr: Option<f64>,
    /// How the learning rate falls: not at all, to a tenth along a cosine, or to zero in equal parts, epoch by epoch
    #[arg(long, value_name = "KIND")]
    pub lr_schedule: Option<LrSchedule>,
    /// Updates over which the learning rate grows to its value
    #[arg(long, value_name = "N")]
    pub warmup: Option<u64>,
    /// Decoupled weight decay of AdamW; 0 is Adam
    #[arg(long, value_name = "X")]
    pub weight_decay: Option<f64>,
    /// Largest norm of all gradients together; 0 does not limit it
    #[arg(long, value_name = "X")]
    pub clip: Option<f64>,
    /// Decay of the weights' moving average, which is the result; 0 takes the last weights
    #[arg(long, value_name = "X")]
    pub ema: Option<f64>,
    /// Share of labels replaced by "no class", for conditional bases
    #[arg(long, value_name = "X")]
    pub drop_label: Option<f64>,
    /// Exchange left and right in half of the images
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub flip: Option<bool>,
    /// Seed of everything random
    #[arg(long, value_name = "N")]
    pub seed: Option<u32>,
    /// Updates between saved states
    #[arg(long, value_name = "N")]
    pub save_every: Option<u64>,
    /// Updates between sample grids
    #[arg(long, value_name = "N")]
    pub sample_every: Option<u64>,
    /// Images of a sample grid
    #[arg(long, value_name = "N")]
    pub samples: Option<usize>,
    /// Network evaluations per image of a sample grid
    #[arg(long, value_name = "N")]
    pub sample_steps: Option<usize>,
}

/// Weights to start from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Init {
    /// As it was named.
    pub id: String,
    /// SHA-256 of its weights file.
    pub sha256: String,
}

/// Resolved options of a base training; saved as `run.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TeacherOptions {
    /// `teacher`.
    pub command: String,
    /// Preset whose architecture and noise schedule are used.
    pub base: String,
    /// Name of the data set, or its folder.
    pub data: String,
    /// Training images in it.
    pub images: usize,
    /// SHA-256 of images and labels as they are used; none before they are read.
    pub data_sha256: Option<String>,
    /// Weights to start from, if they are not random; the run keeps a copy in `init/`.
    pub init: Option<Init>,
    /// Updates.
    pub train_steps: u64,
    /// Images per update.
    pub batch: usize,
    /// Learning rate after warm-up.
    pub lr: f64,
    /// How it changes then.
    pub lr_schedule: LrSchedule,
    /// Updates of warm-up.
    pub warmup: u64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global norm of the gradients; 0 for any.
    pub clip: f64,
    /// Decay of the weights' moving average.
    pub ema: f64,
    /// Share of labels replaced by "no class".
    pub drop_label: f64,
    /// Exchange left and right in half of the images.
    pub flip: bool,
    /// Seed of everything random.
    pub seed: u32,
    /// Updates between saved states.
    pub save_every: u64,
    /// Updates between sample grids.
    pub sample_every: u64,
    /// Images of a sample grid.
    pub samples: usize,
    /// Network evaluations per image of a sample grid.
    pub sample_steps: usize,
}

/// A training that is about to begin.
pub struct Start {
    /// What was asked for, resolved.
    pub options: TeacherOptions,
    /// The images, found and not read.
    pub source: Source,
    /// The weights to start from, if they are not random.
    pub init: Option<Checkpoint>,
}

impl TeacherArgs {
    /// Resolves and checks the options of a new training; reads no image and writes nothing.
    pub fn resolve(&self) -> Result<Start> {
        let preset = base::preset(self.base.as_deref().unwrap_or_default())?;
        let file = self.config.as_deref().map(TeacherRecipe::read).transpose()?.unwrap_or_default();
        let recipe = self.recipe.clone().or(file).or(preset.teacher_recipe()?);
        let init = self.init.as_deref().map(|init| load_init(preset, init)).transpose()?;
        recipe.resolve(preset, self.init.clone().zip(init))
    }

    /// What may be changed when a run is continued: the number of updates.
    pub fn resumed_steps(&self) -> Result<Option<u64>> {
        let allowed = TeacherRecipe { train_steps: self.recipe.train_steps, ..TeacherRecipe::default() };
        let others = [
            self.base.is_some(),
            self.init.is_some(),
            self.out.is_some(),
            self.config.is_some(),
            self.dry_run,
        ];
        if others.contains(&true) || self.recipe != allowed {
            return Err(Error::Request(
                "`--resume` takes its options from the run; only `--train-steps`, `--device` and `--profile` go with it"
                    .into(),
            ));
        }
        match self.recipe.train_steps {
            Some(0) => Err(Error::Request("`--train-steps` must be at least 1".into())),
            steps => Ok(steps),
        }
    }
}

/// A base of the preset's architecture.
fn load_init(preset: &Preset, init: &str) -> Result<Checkpoint> {
    let checkpoint = base::load(init)?;
    if checkpoint.config == preset.config()? {
        return Ok(checkpoint);
    }
    Err(Error::Request(format!(
        "`--init {init}` has another architecture than `{}`\n\nhint: compare its `config.json` with that of the preset; `dmd-distill \
         bases --json` lists parameters and image sizes",
        preset.name
    )))
}

impl TeacherRecipe {
    /// Reads a TOML file.
    pub fn read(path: &Path) -> Result<Self> {
        let recipe: Self = toml::from_str(&String::from_utf8_lossy(&files::read(path)?))
            .map_err(|e| Error::content(path, e))?;
        if recipe.train_steps.is_some() && recipe.epochs.is_some() {
            return Err(Error::content(
                path,
                "it gives both `train-steps` and `epochs`, expected one of the two",
            ));
        }
        Ok(recipe)
    }

    /// What is not said here is taken from `other`; updates and epochs say the same thing.
    pub fn or(self, other: Self) -> Self {
        let length = self.train_steps.is_some() || self.epochs.is_some();
        let (train_steps, epochs) =
            if length { (self.train_steps, self.epochs) } else { (other.train_steps, other.epochs) };
        Self {
            data: self.data.or(other.data),
            train_steps,
            epochs,
            batch: self.batch.or(other.batch),
            lr: self.lr.or(other.lr),
            lr_schedule: self.lr_schedule.or(other.lr_schedule),
            warmup: self.warmup.or(other.warmup),
            weight_decay: self.weight_decay.or(other.weight_decay),
            clip: self.clip.or(other.clip),
            ema: self.ema.or(other.ema),
            drop_label: self.drop_label.or(other.drop_label),
            flip: self.flip.or(other.flip),
            seed: self.seed.or(other.seed),
            save_every: self.save_every.or(other.save_every),
            sample_every: self.sample_every.or(other.sample_every),
            samples: self.samples.or(other.samples),
            sample_steps: self.sample_steps.or(other.sample_steps),
        }
    }

    fn resolve(self, preset: &Preset, init: Option<(String, Checkpoint)>) -> Result<Start> {
        let Some(data) = self.data.clone() else {
            return Err(Error::Request(format!(
                "`--data` is missing: {}\n\nhint: `--data DIR` takes idx files, CIFAR-10 as it is distributed, or a folder of PNG or \
                 JPEG images",
                preset.about
            )));
        };
        let batch = self.batch.unwrap_or(128);
        if batch == 0 {
            return Err(Error::Request("`--batch` must be at least 1".into()));
        }
        let source = Source::find(&data, Split::Train)?;
        let images = source.count()?;
        let conditional = preset.config()?.class_rows().is_some();
        if self.drop_label.is_some() && !conditional {
            return Err(Error::Request(format!(
                "`--drop-label` has no meaning for `{}`, which knows no classes",
                preset.name
            )));
        }
        let steps_of = |epochs: u64| epochs.saturating_mul(images as u64).div_ceil(batch as u64);
        let data = data::absolute(data)?;
        let (id, init) = init.unzip();
        let options = TeacherOptions {
            command: "teacher".to_owned(),
            base: preset.name.to_owned(),
            data,
            images,
            data_sha256: None,
            init: id.zip(init.as_ref()).map(|(id, init)| Init { id, sha256: init.sha256.clone() }),
            train_steps: self.train_steps.unwrap_or_else(|| steps_of(self.epochs.unwrap_or(20))),
            batch,
            lr: self.lr.unwrap_or(1e-4),
            lr_schedule: self.lr_schedule.unwrap_or(LrSchedule::Constant),
            warmup: self.warmup.unwrap_or(0),
            weight_decay: self.weight_decay.unwrap_or(0.0),
            clip: self.clip.unwrap_or(0.0),
            ema: self.ema.unwrap_or(0.0),
            drop_label: self.drop_label.unwrap_or(if conditional { 0.1 } else { 0.0 }),
            flip: self.flip.unwrap_or(false),
            seed: self.seed.unwrap_or(1),
            save_every: self.save_every.unwrap_or(200),
            sample_every: self.sample_every.unwrap_or(1000),
            samples: self.samples.unwrap_or(40),
            sample_steps: self.sample_steps.unwrap_or(50),
        };
        check(&options, preset.schedule()?.num_train_timesteps)?;
        Ok(Start { options, source, init })
    }
}

fn check(o: &TeacherOptions, total: usize) -> Result<()> {
    let rules = [
        (o.images > 0, "the data set holds no images"),
        (o.train_steps > 0, "`--train-steps` and `--epochs` must be at least 1"),
        (o.save_every > 0 && o.sample_every > 0, "`--save-every` and `--sample-every` must be at least 1"),
        (o.samples > 0, "`--samples` must be at least 1"),
        (
            (1..=total).contains(&o.sample_steps),
            "`--sample-steps` lies between 1 and the base's number of steps",
        ),
        (o.lr > 0.0 && o.lr < 1.0, "`--lr` lies between 0 and 1"),
        ((0.0..1.0).contains(&o.weight_decay), "`--weight-decay` lies from 0 to below 1"),
        (o.clip >= 0.0 && o.clip.is_finite(), "`--clip` must not be negative"),
        ((0.0..1.0).contains(&o.ema), "`--ema` lies from 0 to below 1"),
        ((0.0..=1.0).contains(&o.drop_label), "`--drop-label` lies from 0 to 1"),
    ];
    match rules.into_iter().find(|(holds, _)| !holds) {
        Some((_, rule)) => Err(Error::Request(rule.to_owned())),
        None => Ok(()),
    }
}
