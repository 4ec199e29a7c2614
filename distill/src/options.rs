//! The command line, and how it becomes resolved options: preset, then TOML file, then flags.

mod check;
mod stages;

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use dmd_core::sampler::Sampler;
use dmd_core::schedule::Schedule;
use serde::{Deserialize, Deserializer};

use crate::base;
use crate::checkpoint::Checkpoint;
use crate::classifier::ClassifierArgs;
use crate::data;
use crate::error::{Error, Result};
use crate::eval::EvalArgs;
use crate::files;
use crate::network::Guidance;
use crate::optimiser::LrSchedule;
use crate::pairs::PairsOptions;
use crate::regression::Distance;
use crate::teacher::options::TeacherArgs;
use crate::train::{DistillOptions, Keep, Method};

use self::stages::sampler;
pub use self::stages::{PairsArgs, SampleArgs};

/// `sigma_t / alpha_t` of the step that `--t-gen auto` picks.
const AUTO_SIGMA_EDM: f64 = 2.5;

macro_rules! recipe {
    ($name:literal) => {
        ($name, include_str!(concat!("../recipes/", $name, ".toml")))
    };
}

/// Recipes inside this program.
const RECIPES: [(&str, &str); 4] =
    [recipe!("demo"), recipe!("seeds-mnist"), recipe!("seeds-celeba"), recipe!("seeds-cifar10")];

/// Distil a pretrained DDPM into a one-step image generator
///
/// Without a subcommand, does all of it: finds the base, computes noise-image pairs, trains the generator by
/// distribution matching, and writes sample grids, loss curves and the finished generator into a run folder.
#[derive(Debug, Parser)]
#[command(
    name = "dmd-distill",
    version,
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true,
    after_help = "Example:\n  dmd-distill --base ddpm-fashion --config demo    # a few minutes; without --config the real thing, half an hour\n  \
                  dmd-distill eval runs/ddpm-fashion-001 --count 2000\n  dmd-export model.onnx\n  dmd-run model.onnx\n\n\
                  A preset's own settings replace the defaults above; --dry-run shows what results and what it costs."
)]
pub struct Cli {
    /// What to do instead of a whole distillation.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The distillation.
    #[command(flatten)]
    pub distill: DistillArgs,
}

/// Single stages.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the presets: parameters, image size, where the weights come from
    Bases {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Train a base from data
    Teacher(Box<TeacherArgs>),
    /// Pre-compute noise-image pairs of a base
    Pairs(PairsArgs),
    /// Draw a grid of images from a base (many steps) or a generator (one step)
    Sample(SampleArgs),
    /// Train the small classifier whose features the metrics compare
    Classifier(ClassifierArgs),
    /// Measure how far a generator's images are from real ones, beside its teacher's
    Eval(EvalArgs),
}

/// A distillation.
#[derive(Clone, Debug, Default, Args)]
pub struct DistillArgs {
    /// Base to distil: a preset (see `dmd-distill bases`), a folder in diffusers layout, a PyTorch file of ddpm-mnist's or
    /// ddpm-celeba's network, or a model of the Hugging Face hub
    #[arg(long, value_name = "NAME|DIR|FILE|ORG/REPO[@REVISION]")]
    pub base: Option<String>,
    /// Continue the run in this folder; only --train-steps, --device, --profile and --dry-run may be given with it
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
    /// Run folder to create [default: the next free runs/BASE-NNN]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Finished run whose generator and critic this one starts from, instead of from the base: a second stage with other losses
    #[arg(long, value_name = "RUN")]
    pub init: Option<PathBuf>,
    /// TOML file with any of the options below, or a built-in recipe (demo, seeds-mnist, seeds-celeba, seeds-cifar10); flags
    /// win over it
    #[arg(long, value_name = "FILE|RECIPE")]
    pub config: Option<PathBuf>,
    /// Where to compute
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value = "auto")]
    pub device: String,
    /// Print how long an update takes and what part of it is communication between ranks, and keep it as `profile.json`
    #[arg(long)]
    pub profile: bool,
    /// Print the resolved options and the estimated cost, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Everything that a TOML file may also set.
    #[command(flatten)]
    pub recipe: Recipe,
}

/// Options of a distillation that a TOML file may set; none means "not said here".
#[derive(Clone, Debug, Default, PartialEq, Args, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Recipe {
    /// Which losses: dmd (distribution matching and regression on pairs) or dmd2 (distribution matching and a
    /// discriminator of real images, no pairs) [default: dmd]
    #[arg(long, value_enum)]
    pub method: Option<Method>,
    /// Real images for the discriminator: `fashion-mnist`, or a folder as `teacher --data` takes it [default: the preset's]
    #[arg(long, value_name = "NAME|DIR")]
    pub data: Option<String>,
    /// Generator updates [default: 2000]
    #[arg(long, value_name = "N")]
    pub train_steps: Option<u64>,
    /// Generator updates by regression alone that come before those: cheap ones, which give every noise its image, so that
    /// distribution matching has only to sharpen it [default: 0]
    #[arg(long, value_name = "N")]
    pub reg_steps: Option<u64>,
    /// Learning rate of the generator in the updates by regression alone [default: that of --lr]
    #[arg(long, value_name = "X")]
    pub lr_reg: Option<f64>,
    /// Images per update [default: 32]
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Learning rate of the generator [default: 2e-4]
    #[arg(long, value_name = "X")]
    pub lr: Option<f64>,
    /// Learning rate of the critic [default: that of the generator]
    #[arg(long, value_name = "X")]
    pub lr_fake: Option<f64>,
    /// How both learning rates change over the updates: constant, cosine (to a tenth) or linear (to nothing)
    /// [default: constant]
    #[arg(long, value_enum)]
    pub lr_schedule: Option<LrSchedule>,
    /// Largest norm of a network's gradient; 0 does not limit it [default: 10]
    #[arg(long, value_name = "X")]
    pub clip: Option<f64>,
    /// Updates over which both learning rates grow to their value [default: 50]
    #[arg(long, value_name = "N")]
    pub warmup: Option<u64>,
    /// Number of noise-image pairs; 0 trains without the regression loss, whose weight must be 0 too [default: 1024; 0
    /// where the regression has no weight]
    #[arg(long, value_name = "N")]
    pub pairs: Option<usize>,
    /// Steps per pair [default: 50]
    #[arg(long, value_name = "N")]
    pub pair_steps: Option<usize>,
    /// Sampler of the pairs: ddim, heun, or ddpm (then the image hardly depends on the noise) [default: ddim]
    #[arg(long, value_name = "NAME", value_parser = sampler())]
    pub pair_sampler: Option<Sampler>,
    /// Classifier-free guidance of the teacher, for pairs and distribution matching; 1 is none [default: 1]
    #[arg(long, value_name = "X")]
    pub guidance: Option<f64>,
    /// Folder of the pairs [default: pairs/ and a name made of base, sampler and seed]
    #[arg(long, value_name = "DIR")]
    pub pairs_dir: Option<PathBuf>,
    /// Weight of distribution matching; 0 trains by regression alone [default: 1]
    #[arg(long, value_name = "X")]
    pub dm_weight: Option<f64>,
    /// Keep the factor alpha_t of the paper's Eq. 7, which its Algorithm 2 drops
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub dm_alpha_factor: Option<bool>,
    /// Noise levels and noises at which each generated image is matched per update [default: 1]
    #[arg(long, value_name = "N")]
    pub dm_draws: Option<usize>,
    /// Let the losses see generated images as they are shown: clamped to the range of real ones, with the gradient passed
    /// straight through [default: false]
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub clamp: Option<bool>,
    /// First step of distribution matching, as a share of all steps [default: 0.02]
    #[arg(long, value_name = "X")]
    pub t_min: Option<f64>,
    /// Last step of distribution matching, as a share of all steps [default: 0.98]
    #[arg(long, value_name = "X")]
    pub t_max: Option<f64>,
    /// Weight of the regression loss [default: 0.25; dmd2: 0]
    #[arg(long, value_name = "X")]
    pub lambda_reg: Option<f64>,
    /// Distance of the regression loss: l2; huber (single bad pairs count less); classifier, between features of the bundled
    /// classifier or one of `dmd-distill classifier`; or lpips, with a folder that holds torchvision's VGG16 or AlexNet and
    /// the linear weights of the package lpips for it [default: l2]
    #[arg(long, value_name = "l2|huber|classifier[:DIR]|lpips:DIR")]
    pub reg: Option<Distance>,
    /// Share of the updates after which the regression loss is left out, so that distribution matching sharpens what regression
    /// has averaged [default: 1]
    #[arg(long, value_name = "X")]
    pub reg_until: Option<f64>,
    /// Weight of the adversarial loss in the generator's; 0 trains without real images [default: 0; dmd2: 3e-3]
    #[arg(long, value_name = "X")]
    pub gan_weight: Option<f64>,
    /// Weight of the discriminator's loss in the critic's [default: 1e-2]
    #[arg(long, value_name = "X")]
    pub gan_weight_fake: Option<f64>,
    /// Fixed step of the generator: a number, `last`, or `auto` for the one where sigma/alpha is nearest 2.5
    /// [default: auto]
    #[arg(long, value_name = "STEP|last|auto")]
    #[serde(deserialize_with = "text_or_number")]
    pub t_gen: Option<String>,
    /// Factor on the generator's noise input [default: 1]
    #[arg(long, value_name = "X")]
    pub input_scale: Option<f64>,
    /// Critic updates per generator update [default: 5]
    #[arg(long, value_name = "K")]
    pub fake_updates: Option<u64>,
    /// Decay of the generator's moving average, which is the result [default: 0.99]
    #[arg(long, value_name = "X")]
    pub ema: Option<f64>,
    /// Seed of everything random [default: 1]
    #[arg(long, value_name = "N")]
    pub seed: Option<u32>,
    /// Updates between saved states [default: 50]
    #[arg(long, value_name = "N")]
    pub save_every: Option<u64>,
    /// Updates between judgements of samples: brightness, contrast, diversity and, where the program has a classifier of the
    /// data, the kernel distance to real images; ten times as many between those of --reg-steps [default: 50]
    #[arg(long, value_name = "N")]
    pub eval_every: Option<u64>,
    /// Images of a judgement; 0 judges without the metric [default: 1000]
    #[arg(long, value_name = "N")]
    pub eval_count: Option<usize>,
    /// Which weights become the result: best (by the metric, where there is one) or last [default: best]
    #[arg(long, value_enum)]
    pub keep: Option<Keep>,
    /// Updates between sample grids [default: 100]
    #[arg(long, value_name = "N")]
    pub sample_every: Option<u64>,
    /// Images of a sample grid; the comparison with the teacher's 50 steps has at most 20 [default: 40]
    #[arg(long, value_name = "N")]
    pub samples: Option<usize>,
}

impl Recipe {
    /// Reads a TOML file, or the built-in recipe of this name.
    pub fn find(path: &Path) -> Result<Self> {
        let built_in = RECIPES.iter().find(|(name, _)| path.as_os_str() == *name);
        let text = match built_in {
            Some((_, text)) => (*text).to_owned(),
            None if !path.exists() => {
                let names: Vec<&str> = RECIPES.iter().map(|(name, _)| *name).collect();
                let problem =
                    format!("there is no such file\n\nhint: built-in recipes are `{}`", names.join("`, `"));
                return Err(Error::content(path, problem));
            }
            None => String::from_utf8_lossy(&files::read(path)?).into_owned(),
        };
        toml::from_str(&text).map_err(|e| Error::content(path, e))
    }

    /// What is not said here is taken from `other`.
    pub fn or(self, other: Self) -> Self {
        Self {
            method: self.method.or(other.method),
            data: self.data.or(other.data),
            dm_weight: self.dm_weight.or(other.dm_weight),
            dm_alpha_factor: self.dm_alpha_factor.or(other.dm_alpha_factor),
            dm_draws: self.dm_draws.or(other.dm_draws),
            clamp: self.clamp.or(other.clamp),
            t_min: self.t_min.or(other.t_min),
            t_max: self.t_max.or(other.t_max),
            reg: self.reg.or(other.reg),
            reg_until: self.reg_until.or(other.reg_until),
            reg_steps: self.reg_steps.or(other.reg_steps),
            lr_reg: self.lr_reg.or(other.lr_reg),
            gan_weight: self.gan_weight.or(other.gan_weight),
            gan_weight_fake: self.gan_weight_fake.or(other.gan_weight_fake),
            train_steps: self.train_steps.or(other.train_steps),
            batch: self.batch.or(other.batch),
            lr: self.lr.or(other.lr),
            lr_fake: self.lr_fake.or(other.lr_fake),
            warmup: self.warmup.or(other.warmup),
            lr_schedule: self.lr_schedule.or(other.lr_schedule),
            clip: self.clip.or(other.clip),
            eval_every: self.eval_every.or(other.eval_every),
            eval_count: self.eval_count.or(other.eval_count),
            keep: self.keep.or(other.keep),
            pairs: self.pairs.or(other.pairs),
            pair_steps: self.pair_steps.or(other.pair_steps),
            pair_sampler: self.pair_sampler.or(other.pair_sampler),
            guidance: self.guidance.or(other.guidance),
            pairs_dir: self.pairs_dir.or(other.pairs_dir),
            lambda_reg: self.lambda_reg.or(other.lambda_reg),
            t_gen: self.t_gen.or(other.t_gen),
            input_scale: self.input_scale.or(other.input_scale),
            fake_updates: self.fake_updates.or(other.fake_updates),
            ema: self.ema.or(other.ema),
            seed: self.seed.or(other.seed),
            save_every: self.save_every.or(other.save_every),
            sample_every: self.sample_every.or(other.sample_every),
            samples: self.samples.or(other.samples),
        }
    }

    /// A preset's settings beside what the user asked for: those of pairs and regression belong to DMD with both.
    pub fn beside(self, asked: &Self) -> Self {
        let regression = asked.method != Some(Method::Dmd2) && asked.lambda_reg != Some(0.0);
        let (pairs, lambda_reg) = if regression { (self.pairs, self.lambda_reg) } else { (None, None) };
        let matching = asked.dm_weight != Some(0.0);
        let reg_until = self.reg_until.filter(|_| matching);
        let reg_steps = self.reg_steps.filter(|_| matching && regression);
        let gan_weight = self.gan_weight.filter(|_| matching);
        Self { pairs, lambda_reg, reg_until, reg_steps, gan_weight, ..self }
    }

    /// Fills in the defaults for a base and checks the result.
    pub fn resolve(self, name: &str, base: &Checkpoint) -> Result<DistillOptions> {
        let schedule = Schedule::new(&base.schedule);
        let method = self.method.unwrap_or(Method::Dmd);
        let (lambda_reg, gan_weight) = match method {
            Method::Dmd => (0.25, 0.0),
            Method::Dmd2 => (if self.pairs.is_some_and(|n| n > 0) { 0.25 } else { 0.0 }, 3e-3),
        };
        let lambda_reg = self.lambda_reg.unwrap_or(lambda_reg);
        let gan_weight = self.gan_weight.unwrap_or(gan_weight);
        let pairs = if lambda_reg == 0.0 { 0 } else { self.pairs.unwrap_or(1024) };
        let pair_steps = self.pair_steps.unwrap_or(50.min(schedule.num_train_timesteps()));
        let seed = self.seed.unwrap_or(1);
        let lr = self.lr.unwrap_or(2e-4);
        let pair_sampler = self.pair_sampler.unwrap_or(Sampler::Ddim);
        let guidance = self.guidance.unwrap_or(1.0);
        Guidance::new(guidance, base.provenance.classes.as_ref())?;
        let description = PairsOptions::new(name, base, pair_sampler, pair_steps, guidance, seed);
        let pairs_dir = self.pairs_dir.unwrap_or_else(|| Path::new("pairs").join(description.folder_name()));
        let options = DistillOptions {
            command: "distill".to_owned(),
            base: name.to_owned(),
            init: None,
            base_sha256: base.sha256.clone(),
            method,
            data: match self.data {
                Some(_) if gan_weight == 0.0 => {
                    return Err(Error::Request(
                        "only the adversarial loss needs `--data`\n\nhint: add `--method dmd2` or a `--gan-weight`"
                            .into(),
                    ));
                }
                Some(data) => Some(data::absolute(data)?),
                None => base::find(name).map(base::Preset::teacher_recipe).transpose()?.and_then(|r| r.data),
            },
            dm_weight: self.dm_weight.unwrap_or(1.0),
            dm_alpha_factor: self.dm_alpha_factor.unwrap_or(false),
            dm_draws: self.dm_draws.unwrap_or(1),
            clamp: self.clamp.unwrap_or(false),
            t_min: self.t_min.unwrap_or(0.02),
            t_max: self.t_max.unwrap_or(0.98),
            reg: self.reg.unwrap_or(Distance::L2).absolute()?,
            reg_until: self.reg_until.unwrap_or(1.0),
            gan_weight,
            gan_weight_fake: self.gan_weight_fake.unwrap_or(1e-2),
            pairs_dir: std::path::absolute(&pairs_dir).map_err(Error::file("find", &pairs_dir))?,
            pairs,
            pair_steps,
            pair_sampler,
            guidance,
            train_steps: self.train_steps.unwrap_or(2000),
            reg_steps: self.reg_steps.unwrap_or(0),
            lr_reg: self.lr_reg.unwrap_or(lr),
            batch: self.batch.unwrap_or(32),
            lr,
            lr_fake: self.lr_fake.unwrap_or(lr),
            warmup: self.warmup.unwrap_or(50),
            lr_schedule: self.lr_schedule.unwrap_or(LrSchedule::Constant),
            clip: self.clip.unwrap_or(10.0),
            eval_every: self.eval_every.unwrap_or(50),
            eval_count: self.eval_count.unwrap_or(1000),
            keep: self.keep.unwrap_or(Keep::Best),
            lambda_reg,
            t_gen: t_gen(self.t_gen.as_deref().unwrap_or("auto"), &schedule)?,
            input_scale: self.input_scale.unwrap_or(1.0),
            fake_updates: self.fake_updates.unwrap_or(5),
            ema: self.ema.unwrap_or(0.99),
            seed,
            save_every: self.save_every.unwrap_or(50),
            sample_every: self.sample_every.unwrap_or(100),
            samples: self.samples.unwrap_or(40),
        };
        check::check(&options, &schedule)?;
        Ok(options)
    }
}

/// In a TOML file a step may be written `399` or `"399"`.
fn text_or_number<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a step, `last` or `auto`")]
    enum Step {
        Number(u64),
        Text(String),
    }
    Ok(Some(match Step::deserialize(from)? {
        Step::Number(step) => step.to_string(),
        Step::Text(text) => text,
    }))
}

fn t_gen(text: &str, schedule: &Schedule) -> Result<usize> {
    let last = schedule.num_train_timesteps() - 1;
    match text {
        "auto" => Ok(schedule.nearest_step(AUTO_SIGMA_EDM)),
        "last" => Ok(last),
        number => number.parse().ok().filter(|t| *t <= last).ok_or_else(|| {
            Error::Request(format!("got `--t-gen {number}`, expected `auto`, `last` or 0 to {last}"))
        }),
    }
}
