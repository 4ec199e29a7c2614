//! Training of a base: noise prediction with mean squared error, Ho et al. 2020 (arXiv:2006.11239), Eq. 14, with
//! an exponential moving average of the weights and, for class-conditional bases, dropped labels
//! (Ho and Salimans 2022, arXiv:2207.12598).

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use dmd_core::schedule::Schedule;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::base::preset;
use crate::checkpoint::{Checkpoint, snapshot};
use crate::data::{Dataset, Split};
use crate::error::{Error, Result};
use crate::losses;
use crate::network::{Network, Tensors, initial_weights};
use crate::optimiser::{AdamW, AdamWConfig, Ema, state};
use crate::progress::{Progress, stop_requested};
use crate::random::{Purpose, Random};
use crate::run::{Run, images, save_grid};
use crate::sampler::{Request, Sampling, sample};

/// Network evaluations per image of a sample grid, if the schedule has as many.
const SAMPLE_STEPS: usize = 50;
/// Images of a sample grid.
const SAMPLES: usize = 40;

/// Resolved options of a base training; saved as `run.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TeacherOptions {
    /// `teacher`.
    pub command: String,
    /// Preset whose architecture, schedule and data set are used.
    pub base: String,
    /// Folder of the data set, if not searched for.
    pub data: Option<PathBuf>,
    /// Updates.
    pub train_steps: u64,
    /// Images per update.
    pub batch: usize,
    /// Learning rate after warm-up; falls to a tenth along a cosine.
    pub lr: f64,
    /// Updates of warm-up.
    pub warmup: u64,
    /// Decay of the weights' moving average.
    pub ema: f64,
    /// Share of labels replaced by "no class".
    pub drop_label: f64,
    /// Seed of everything random.
    pub seed: u32,
    /// Updates between saved states.
    pub save_every: u64,
    /// Updates between sample grids.
    pub sample_every: u64,
}

/// Trains, or continues, and returns the folder of the finished base.
pub fn train(run: &Run, options: &TeacherOptions, device: &Device) -> Result<PathBuf> {
    let preset = preset(&options.base)?;
    let config = preset.config()?;
    let schedule_config = preset.schedule()?;
    let schedule = Schedule::new(&schedule_config);
    let mut provenance = preset.provenance();
    let classes = provenance.classes.clone();
    let data = Dataset::fashion_mnist(options.data.as_deref(), Split::Train)?;
    if data.shape != config.image_shape() {
        return Err(Error::Request(format!(
            "images have shape {:?}, expected {:?} from base `{}`",
            data.shape,
            config.image_shape(),
            options.base
        )));
    }

    let resumed = run.load_state()?;
    let mut step = resumed.as_ref().map_or(0, |(step, _)| *step);
    let weights = match &resumed {
        Some((_, tensors)) => part(tensors, "teacher.")?,
        None => initial_weights(&config, options.seed)?,
    };
    let network = Network::trainable(&config, &weights, device)?;
    let mut optimiser = AdamW::new(AdamWConfig::new(options.lr, options.warmup), network.variables())?;
    let average = match &resumed {
        Some((_, tensors)) => part(tensors, "ema.")?,
        None => snapshot(network.parameters())?,
    };
    let mut ema = Ema::new(options.ema, step, average);
    if let Some((_, tensors)) = &resumed {
        optimiser.load("optimiser", network.variables(), tensors)?;
        eprintln!("continuing after step {step}");
    }

    let mut order = Order::new(options.seed, data.len());
    let mut progress = Progress::new("teacher", step, options.train_steps);
    let mut mean_loss = None;
    while step < options.train_steps {
        let indices = order.batch(step, options.batch);
        let mut random = Random::new(options.seed, Purpose::Base, step);
        let x0 = data.batch(&indices, config.range(), device)?;
        let t: Vec<u32> =
            indices.iter().map(|_| random.below(schedule.num_train_timesteps()) as u32).collect();
        let class = classes.as_ref().map(|c| {
            let pick = |i: &usize| match c.none {
                Some(none) if random.unit() < options.drop_label => none as u32,
                _ => u32::from(data.labels[*i]),
            };
            indices.iter().map(pick).collect::<Vec<u32>>()
        });
        let class = class.map(|c| Tensor::new(c, device)).transpose()?;
        let eps = random.normal_tensor(x0.dims(), device)?;
        let levels = losses::NoiseLevels::new(&schedule, &t, device)?;
        let prediction = network.predict(&levels.noisy(&x0, &eps)?, &levels.t, class.as_ref())?;
        let loss = losses::denoising(&prediction, &levels.target(&x0, &eps)?)?;
        let grads = loss.backward()?;
        optimiser.config.lr = options.lr * cosine(step, options.train_steps);
        let norm = optimiser.step(network.variables(), &grads)?;
        ema.update(network.variables())?;
        step += 1;
        let loss = f64::from(loss.to_scalar::<f32>()?);
        run.log(&json!({"step": step, "loss": loss, "grad_norm": norm}))?;
        let mean = mean_loss.map_or(loss, |m: f64| 0.98 * m + 0.02 * loss);
        mean_loss = Some(mean);
        progress.update(step, &format!("loss {mean:.4}"));

        let last = step == options.train_steps;
        if step.is_multiple_of(options.sample_every) || last {
            let averaged = Network::frozen(&config, &ema.tensors, device)?;
            let request = Request::new(options.seed, 0, SAMPLES, classes.as_ref().map(|c| c.count));
            let x = sample(
                &averaged,
                &schedule,
                &request,
                &Sampling::ddim(SAMPLE_STEPS.min(schedule.num_train_timesteps())),
            )?;
            let path = run.path(&format!("samples/step-{step:06}.png"));
            save_grid(&path, &images(&x, config.range())?, 10, 2)?;
        }
        let stop = stop_requested();
        if step.is_multiple_of(options.save_every) || last || stop {
            let mut tensors = Tensors::new();
            for (name, tensor) in network.parameters() {
                tensors.insert(format!("teacher.{name}"), tensor.clone());
                tensors.insert(format!("ema.{name}"), ema.tensors[name].clone());
            }
            optimiser.save("optimiser", network.variables(), &mut tensors)?;
            run.save_state(step, &tensors)?;
        }
        if stop && !last {
            return Err(Error::Interrupted(format!(
                "stopped after step {step}\n\nhint: continue with `dmd-distill teacher --resume {}`",
                run.folder.display()
            )));
        }
    }

    provenance.training = serde_json::Map::from_iter([
        ("steps".to_owned(), json!(options.train_steps)),
        ("batch".to_owned(), json!(options.batch)),
        ("lr".to_owned(), json!(options.lr)),
        ("ema".to_owned(), json!(options.ema)),
        ("seed".to_owned(), json!(options.seed)),
        ("loss".to_owned(), json!(mean_loss)),
        ("data".to_owned(), json!("Fashion-MNIST, training images")),
    ]);
    let folder = run.path("teacher");
    let checkpoint = Checkpoint {
        config,
        schedule: schedule_config,
        generator: None,
        provenance,
        tensors: ema.tensors,
        sha256: String::new(),
    };
    checkpoint.save(&folder)?;
    Ok(folder)
}

/// The tensors whose names start with `prefix`, without it.
pub fn part(tensors: &Tensors, prefix: &str) -> Result<Tensors> {
    let found: Tensors = tensors
        .iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_owned(), tensor.clone())))
        .collect();
    match found.is_empty() {
        true => state(&found, prefix).map(|_| Tensors::new()),
        false => Ok(found),
    }
}

/// Learning rate factor: 1 at the start, a tenth at the end.
fn cosine(step: u64, total: u64) -> f64 {
    0.55 + 0.45 * (std::f64::consts::PI * step as f64 / total.max(1) as f64).cos()
}

/// Training images in a new random order every epoch.
struct Order {
    seed: u32,
    count: usize,
    epoch: u64,
    order: Vec<u32>,
}

impl Order {
    fn new(seed: u32, count: usize) -> Self {
        let order = Random::new(seed, Purpose::Order, 0).permutation(count);
        Self { seed, count, epoch: 0, order }
    }

    /// Indices of update number `step`.
    fn batch(&mut self, step: u64, batch: usize) -> Vec<usize> {
        let first = step * batch as u64;
        let mut index = |position: u64| {
            let epoch = position / self.count as u64;
            if epoch != self.epoch {
                self.epoch = epoch;
                self.order = Random::new(self.seed, Purpose::Order, epoch).permutation(self.count);
            }
            self.order[(position % self.count as u64) as usize] as usize
        };
        (first..first + batch as u64).map(&mut index).collect()
    }
}

/// Checks options that do not make sense before anything is written.
pub fn validate(options: &TeacherOptions) -> Result<()> {
    preset(&options.base)?;
    let wrong = |what: &str| Err(Error::Request(what.to_owned()));
    if options.batch == 0 || options.train_steps == 0 || options.save_every == 0 || options.sample_every == 0
    {
        return wrong("`--batch`, `--train-steps`, `--save-every` and `--sample-every` must be at least 1");
    }
    if !(options.lr > 0.0 && options.lr < 1.0 && (0.0..1.0).contains(&options.ema)) {
        return wrong("`--lr` must lie between 0 and 1, `--ema` from 0 to below 1");
    }
    if let Some(folder) = &options.data
        && !Path::new(folder).is_dir()
    {
        return Err(Error::content(folder, "`--data`: there is no such folder"));
    }
    Ok(())
}
