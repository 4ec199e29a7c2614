//! A whole distillation: pairs, updates, statistics, pictures, saved states and the finished generator.

use std::path::{Path, PathBuf};

use candle_core::Device;
use dmd_core::card::{Base, GeneratorConfig, Provenance};
use dmd_core::sampler::Sampler;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::checkpoint::{Checkpoint, Source, snapshot};
use crate::data::{Dataset, Split};
use crate::distillation::{Distillation, Material};
use crate::error::{Error, Result};
use crate::losses::Distance;
use crate::network::{Network, Tensors};
use crate::optimiser::Ema;
use crate::pairs::{self, PairsOptions};
use crate::progress::{Progress, stop_requested};
use crate::report;
use crate::run::{Run, images, save_grid};
use crate::sampler::{Request, one_step};
use crate::teacher::part;

/// A method: the defaults of its losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Distribution matching and regression on pairs. Yin et al. 2024 (arXiv:2311.18828).
    Dmd,
    /// Distribution matching and an adversarial loss on real images, no pairs. Yin et al. 2024 (arXiv:2405.14867).
    Dmd2,
}

/// Resolved options of a distillation; saved as `run.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DistillOptions {
    /// `distill`.
    pub command: String,
    /// Preset or folder of the base.
    pub base: String,
    /// SHA-256 of the base's weights.
    pub base_sha256: String,
    /// Which paper's losses are the defaults.
    pub method: Method,
    /// Folder of the noise-image pairs.
    pub pairs_dir: PathBuf,
    /// Number of pairs; 0 without regression.
    pub pairs: usize,
    /// Steps per pair.
    pub pair_steps: usize,
    /// Sampler of the pairs.
    pub pair_sampler: Sampler,
    /// Real images of the adversarial loss, if not searched for.
    pub data: Option<PathBuf>,
    /// Classifier-free guidance of the teacher, for pairs and distribution matching; 1 is none.
    pub guidance: f64,
    /// Generator updates.
    pub train_steps: u64,
    /// Images per update.
    pub batch: usize,
    /// Learning rate of the generator.
    pub lr: f64,
    /// Learning rate of the critic.
    pub lr_fake: f64,
    /// Updates of warm-up, for both.
    pub warmup: u64,
    /// Weight of distribution matching; 0 is regression alone.
    pub dm_weight: f64,
    /// Whether the matching gradient keeps the factor `alpha_t` of Eq. 7.
    pub dm_alpha_factor: bool,
    /// First and last step of distribution matching, as shares of all.
    pub t_min: f64,
    /// See `t_min`.
    pub t_max: f64,
    /// Weight of the regression loss.
    pub lambda_reg: f64,
    /// Distance of the regression loss.
    pub reg: Distance,
    /// Weight of the adversarial loss in the generator's; 0 trains without real images.
    pub gan_weight: f64,
    /// Weight of the discriminator's loss in the critic's.
    pub gan_weight_fake: f64,
    /// Fixed step of the generator.
    pub t_gen: usize,
    /// Factor on the generator's input.
    pub input_scale: f64,
    /// Critic updates per generator update.
    pub fake_updates: u64,
    /// Decay of the generator's moving average.
    pub ema: f64,
    /// Seed of everything random.
    pub seed: u32,
    /// Updates between saved states.
    pub save_every: u64,
    /// Updates between sample grids.
    pub sample_every: u64,
    /// Images of a sample grid, and at most of the comparison.
    pub samples: usize,
}

impl DistillOptions {
    /// The pairs that belong to these options. The run's own copy of the base is another file than the base.
    pub fn pairs(&self, base: &Checkpoint) -> PairsOptions {
        let (sampler, steps, guidance) = (self.pair_sampler, self.pair_steps, self.guidance);
        PairsOptions {
            base_sha256: self.base_sha256.clone(),
            ..PairsOptions::new(&self.base, base, sampler, steps, guidance, self.seed)
        }
    }

    /// Computes the pairs that are missing and reads the real images.
    fn material(&self, base: &Checkpoint, device: &Device) -> Result<Material> {
        let pairs = match self.pairs {
            0 => None,
            count => Some(pairs::prepare(&self.pairs_dir, &self.pairs(base), base, count, device)?),
        };
        Ok(Material { pairs, real: self.real(base)? })
    }

    /// Finds what would stop a run for want of pairs or images, before its folder is made.
    pub fn check_material(&self, base: &Checkpoint) -> Result<()> {
        if self.pairs > 0 {
            self.pairs(base).check(&self.pairs_dir)?;
        }
        self.real(base).map(drop)
    }

    fn real(&self, base: &Checkpoint) -> Result<Option<Dataset>> {
        if self.gan_weight == 0.0 {
            return Ok(None);
        }
        let data = Dataset::fashion_mnist(self.data.as_deref(), Split::Train)?;
        let expected = base.config.image_shape();
        if data.shape != expected {
            return Err(Error::Request(format!(
                "the real images have shape {:?}, expected {expected:?} from base `{}`",
                data.shape, self.base
            )));
        }
        Ok(Some(data))
    }
}

/// Distils, or continues, and returns the folder of the finished generator.
pub fn train(run: &Run, options: &DistillOptions, device: &Device) -> Result<PathBuf> {
    let base = load_teacher(run)?;
    let resume = format!("continue with `dmd-distill --resume {}`", run.folder.display());
    let material = options.material(&base, device).map_err(|e| e.continue_with(&resume))?;
    let resumed = run.load_state()?;
    let mut step = resumed.as_ref().map_or(0, |(step, _)| *step);
    let mut work = Distillation::new(options, &base, resumed.as_ref().map(|(_, t)| t), device)?;
    let average = match &resumed {
        Some((_, tensors)) => part(tensors, "ema.")?,
        None => snapshot(work.generator.parameters())?,
    };
    let mut ema = Ema::new(options.ema, step, average);
    if resumed.is_some() {
        eprintln!("continuing after step {step}");
    } else {
        save_samples(&work, run, options, 0, &ema.tensors)?;
    }

    let mut progress = Progress::new("distil", step, options.train_steps);
    while step < options.train_steps {
        let update = work.update(step, &material)?;
        ema.update(work.generator.variables())?;
        step += 1;
        let values = update.x_gen.flatten_all()?.to_vec1::<f32>()?;
        let (brightness, contrast) = mean_and_deviation(&values);
        run.log(&json!({
            "step": step, "dm": update.dm, "reg": update.reg, "fake": update.fake,
            "adversarial": update.adversarial, "discrimination": update.discrimination,
            "grad_norm": update.norm, "fake_grad_norm": update.fake_norm,
            "brightness": brightness, "contrast": contrast,
        }))?;
        let message = format!("dm {:.3} reg {:.3} fake {:.3}", update.dm, update.reg, update.fake);
        progress.update(step, &message);

        let last = step == options.train_steps;
        if step.is_multiple_of(options.sample_every) || last {
            save_samples(&work, run, options, step, &ema.tensors)?;
            report::plot_losses(&run.path("losses.png"), &run.stats()?)?;
        }
        let stop = stop_requested();
        if step.is_multiple_of(options.save_every) || last || stop {
            run.save_state(step, &work.state(&ema.tensors)?)?;
        }
        if stop && !last {
            return Err(Error::Interrupted(format!("stopped after step {step}\n\nhint: {resume}")));
        }
    }

    let folder = run.path("generator");
    finished(options, &base, ema.tensors).save(&folder)?;
    let generator = Checkpoint::load(&Source::Folder(folder.clone()))?;
    report::comparison(
        &run.path("comparison.png"),
        &base,
        &generator,
        options.seed,
        options.samples,
        device,
    )?;
    Ok(folder)
}

/// The base that the run was started with; every run keeps its own copy.
pub fn load_teacher(run: &Run) -> Result<Checkpoint> {
    Checkpoint::load(&Source::Folder(run.path("teacher")))
}

fn save_samples(
    work: &Distillation,
    run: &Run,
    options: &DistillOptions,
    step: u64,
    average: &Tensors,
) -> Result<()> {
    let network = Network::frozen(&work.generator.config, average, &work.device)?;
    let request = Request::new(options.seed, 0, options.samples, work.classes);
    let x = one_step(&network, &work.one_step, &request)?;
    let path = run.path(&format!("samples/step-{step:06}.png"));
    save_grid(&path, &images(&x, network.config.range())?, 10, 2)
}

/// The generator as a checkpoint, with its history.
fn finished(o: &DistillOptions, base: &Checkpoint, average: Tensors) -> Checkpoint {
    let images = o.train_steps * o.batch as u64;
    let training = json!({
        "method": o.method, "steps": o.train_steps, "images": images, "batch": o.batch, "lr": o.lr,
        "lr_fake": o.lr_fake, "lambda_reg": o.lambda_reg, "pairs": o.pairs, "pair_steps": o.pair_steps,
        "fake_updates": o.fake_updates, "ema": o.ema, "guidance": o.guidance,
        "dm_weight": o.dm_weight, "gan_weight": o.gan_weight, "gan_weight_fake": o.gan_weight_fake, "reg": o.reg, "seed": o.seed,
    });
    Checkpoint {
        config: base.config.clone(),
        schedule: base.schedule.clone(),
        generator: Some(GeneratorConfig { t_gen: o.t_gen, input_scale: o.input_scale }),
        provenance: Provenance {
            name: format!("one-step-{}", base.provenance.name.trim_start_matches("ddpm-")),
            classes: base.provenance.classes.clone(),
            base: Some(
                base.provenance
                    .base
                    .clone()
                    .unwrap_or_else(|| Base { id: base_id(&o.base), sha256: o.base_sha256.clone() }),
            ),
            training: training.as_object().cloned().unwrap_or_default(),
            metrics: serde_json::Map::new(),
        },
        tensors: average,
        sha256: String::new(),
    }
}

/// A preset's name, or the last part of a folder's path; a model of the hub says itself what it is.
fn base_id(base: &str) -> String {
    Path::new(base).file_name().map_or(base.to_owned(), |n| n.to_string_lossy().into_owned())
}

fn mean_and_deviation(values: &[f32]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
    (mean, variance.sqrt())
}
