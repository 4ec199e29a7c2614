//! Training of a base: noise prediction with mean squared error, Ho et al. 2020 (arXiv:2006.11239), Eq. 14, with
//! an exponential moving average of the weights and, for class-conditional bases, dropped labels
//! (Ho and Salimans 2022, arXiv:2207.12598).

pub mod options;
mod order;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use dmd_core::card::Classes;
use dmd_core::config::ModelConfig;
use dmd_core::net::shapes;
use dmd_core::schedule::Schedule;
use serde_json::{Map, Value, json};

use self::options::{Start, TeacherOptions};
use self::order::Order;
use crate::base::{Preset, preset};
use crate::checkpoint::{Checkpoint, Source, snapshot};
use crate::data::{self, Loaded, Split};
use crate::error::{Error, Result};
use crate::losses;
use crate::network::{Network, Tensors, initial_weights};
use crate::optimiser::{AdamW, AdamWConfig, Ema, LrSchedule, state};
use crate::parallel::Team;
use crate::progress::{Progress, stop_requested};
use crate::random::{Purpose, Random};
use crate::run::{LATEST, Run, images, save_grid};
use crate::sampler::{Request, Sampling, sample};

/// Creates the folder of a new run, which appears complete or not at all; returns its options and images with it.
pub fn begin(start: Start, out: Option<&Path>) -> Result<(Run, TeacherOptions, Loaded)> {
    let Start { mut options, source, init } = start;
    let preset = preset(&options.base)?;
    let loaded = load(preset, &options, &source)?;
    options.data_sha256 = Some(loaded.sha256.clone());
    let name = format!("teacher-{}", options.base);
    let run = Run::create(out, &name, &options, |folder| match &init {
        Some(init) => init.save(&folder.join("init")),
        None => Ok(()),
    })?;
    Ok((run, options, loaded))
}

/// Reads the images of a run that is continued; they must be those it began with.
pub fn reload(options: &TeacherOptions) -> Result<Loaded> {
    let source = data::Source::find(&options.data, Split::Train)?;
    let loaded = load(preset(&options.base)?, options, &source)?;
    match &options.data_sha256 {
        Some(expected) if *expected != loaded.sha256 => Err(Error::Request(format!(
            "the images of `{}` are not those that the run began with: got SHA-256 {}, expected {expected} from run.json",
            options.data, loaded.sha256
        ))),
        _ => Ok(loaded),
    }
}

fn load(preset: &Preset, options: &TeacherOptions, source: &data::Source) -> Result<Loaded> {
    let loaded = source.load(preset.config()?.image_shape())?;
    if loaded.data.len() != options.images {
        let (got, expected) = (loaded.data.len(), options.images);
        return Err(Error::Request(format!("got {got} images from `{}`, expected {expected}", options.data)));
    }
    if let Some(classes) = preset.provenance().classes {
        loaded.data.check_labels(classes.count, preset.name)?;
    }
    Ok(loaded)
}

/// Trains, or continues, and returns the folder of the finished base. Of several ranks the first writes.
pub fn train(
    run: &Run,
    options: &TeacherOptions,
    loaded: &Loaded,
    device: &Device,
    team: &Team,
) -> Result<PathBuf> {
    team.check_batch(options.batch)?;
    let preset = preset(&options.base)?;
    let config = preset.config()?;
    let schedule_config = preset.schedule()?;
    let schedule = Schedule::new(&schedule_config);
    let data = &loaded.data;
    let classes = classes(preset, loaded);
    let summary = shapes::summarise(&config)?;
    let constant: BTreeSet<&String> = summary.frozen.difference(&summary.statistics).collect();

    if team.size() > 1 && !summary.statistics.is_empty() && !device.is_cpu() {
        return Err(Error::Request(format!(
            "`{}` has BatchNorm, and ranks on GPUs would each normalise by their own images

hint: one rank, or `--device cpu`",
            options.base
        )));
    }
    let (share, weight) = (team.share(options.batch), team.weight(options.batch));

    let resumed = if team.leads() { run.load_state(LATEST)? } else { run.read_state(LATEST)? };
    let mut step = resumed.as_ref().map_or(0, |state| state.step);
    let weights = match (&resumed, &options.init) {
        (Some(state), _) => part(&state.tensors, "teacher.")?,
        (None, Some(_)) => Checkpoint::load(&Source::Folder(run.path("init")))?.tensors,
        (None, None) => initial_weights(&config, options.seed)?,
    };
    let mut network = Network::trainable(&config, &weights, device)?.shared_statistics(team, weight);
    let mut optimiser = AdamW::new(adam(options), network.variables())?;
    let average = match &resumed {
        Some(state) => part(&state.tensors, "ema.")?,
        None => snapshot(network.parameters())?,
    };
    let mut ema = Ema::new(options.ema, step, average);
    if let Some(state) = &resumed {
        optimiser.load("optimiser", network.variables(), &state.tensors)?;
        if team.leads() {
            dmd_cli::say!("continuing after step {step}");
        }
    }
    let mut mean_loss = None;
    for line in run.stats()? {
        mean_loss = line["loss"].as_f64().map(|loss| smooth(mean_loss, loss)).or(mean_loss);
    }

    let mut order = Order::new(options.seed, data.len());
    let mut progress = Progress::new("teacher", step, options.train_steps);
    while step < options.train_steps {
        optimiser.config.lr = options.lr * lr_factor(options, step);
        let (loss, norm) = team.timed(|| {
            let indices = order.batch(step, options.batch);
            let mut random = Random::new(options.seed, Purpose::Base, step);
            let flipped: Vec<bool> = match options.flip {
                true => indices.iter().map(|_| random.unit() < 0.5).collect(),
                false => vec![false; indices.len()],
            };
            let (own, range) = (share.clone(), config.range());
            let x0 = data.batch_flipped(&indices[own.clone()], &flipped[own.clone()], range, device)?;
            let first = first_step(&config);
            let total = schedule.num_train_timesteps();
            let t: Vec<u32> = indices.iter().map(|_| (first + random.below(total - first)) as u32).collect();
            let class = classes.as_ref().map(|c| {
                let pick = |i: &usize| match c.none {
                    Some(none) if random.unit() < options.drop_label => none as u32,
                    _ => u32::from(data.labels[*i]),
                };
                indices.iter().map(pick).collect::<Vec<u32>>()
            });
            let class = class.map(|c| Tensor::new(&c[own.clone()], device)).transpose()?;
            let size = config.image_shape().iter().product();
            let eps = random.normal_rows(options.batch, size, std::slice::from_ref(&own));
            let eps = Tensor::from_vec(eps, x0.dims(), device)?;
            let levels = losses::NoiseLevels::new(&schedule, &t[own], device)?;
            let prediction = network.predict(&levels.noisy(&x0, &eps)?, &levels.t, class.as_ref())?;
            let loss = losses::denoising(&prediction, &levels.target(&x0, &eps)?)?;
            let mut grads = loss.backward()?;
            team.average(&mut grads, network.variables(), weight)?;
            let norm = optimiser.step(network.variables(), &grads)?;
            network.update_statistics()?;
            let mut loss = [f64::from(loss.to_scalar::<f32>()?) * weight];
            team.sum(&mut loss);
            Ok((loss[0], norm))
        })?;
        ema.update_to(network.parameters().iter().filter(|(name, _)| !constant.contains(*name)))?;
        step += 1;
        let mean = smooth(mean_loss, loss);
        mean_loss = Some(mean);
        if team.leads() {
            run.log(&json!({"step": step, "loss": loss, "grad_norm": norm}))?;
        }
        progress.update(step, &format!("loss {mean:.4}"));

        let last = step == options.train_steps;
        if team.leads() && (step.is_multiple_of(options.sample_every) || last) {
            let averaged = Network::frozen(&config, &ema.tensors, device)?;
            let request = Request::new(options.seed, 0, options.samples, classes.as_ref().map(|c| c.count));
            let x = sample(&averaged, &schedule, &request, &Sampling::ddim(options.sample_steps))?;
            let path = run.path(&format!("samples/step-{step:06}.png"));
            save_grid(&path, &images(&x, config.range())?, 10, 2)?;
        }
        let stop = team.any(stop_requested());
        let save = step.is_multiple_of(options.save_every) || last || stop;
        if save {
            team.check_equal(network.parameters().values())?;
        }
        if save && team.leads() {
            let mut tensors = Tensors::new();
            for (name, tensor) in network.parameters() {
                tensors.insert(format!("teacher.{name}"), tensor.clone());
                tensors.insert(format!("ema.{name}"), ema.tensors[name].clone());
            }
            optimiser.save("optimiser", network.variables(), &mut tensors)?;
            run.save_state(LATEST, step, &tensors, &())?;
        }
        if stop && !last {
            return Err(Error::Interrupted(format!(
                "stopped after step {step}\n\nhint: continue with `dmd-distill teacher --resume {}`",
                run.folder.display()
            )));
        }
    }

    let folder = run.path("teacher");
    if !team.leads() {
        return Ok(folder);
    }
    let mut provenance = preset.provenance();
    provenance.classes = classes;
    provenance.training = record(options, loaded, mean_loss);
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

/// What the card says about a training.
fn record(options: &TeacherOptions, loaded: &Loaded, loss: Option<f64>) -> Map<String, Value> {
    let mut record = Map::from_iter([
        ("steps".to_owned(), json!(options.train_steps)),
        ("batch".to_owned(), json!(options.batch)),
        ("lr".to_owned(), json!(options.lr)),
        ("lr_schedule".to_owned(), json!(options.lr_schedule)),
        ("ema".to_owned(), json!(options.ema)),
        ("seed".to_owned(), json!(options.seed)),
        ("loss".to_owned(), json!(loss)),
        ("data".to_owned(), json!(loaded.about)),
        ("data_images".to_owned(), json!(options.images)),
        ("data_sha256".to_owned(), json!(loaded.sha256)),
    ]);
    if let Some(init) = &options.init {
        record.insert("init".to_owned(), json!(init));
    }
    record
}

/// The classes of the base: those that the data set names, else the preset's, else numbers.
fn classes(preset: &Preset, loaded: &Loaded) -> Option<Classes> {
    let own = preset.provenance().classes?;
    match &loaded.classes {
        Some(names) => Some(Classes { count: names.len(), names: names.clone(), ..own }),
        None => {
            let names = (0..own.count).map(|class| class.to_string()).collect();
            Some(Classes { names, ..own })
        }
    }
}

/// The lowest step that is trained: the MNIST network's table has an entry 0 that nothing is ever noised with.
fn first_step(config: &ModelConfig) -> usize {
    usize::from(matches!(config, ModelConfig::ContextUnet(_)))
}

fn adam(options: &TeacherOptions) -> AdamWConfig {
    let clip = if options.clip == 0.0 { f64::INFINITY } else { options.clip };
    AdamWConfig { weight_decay: options.weight_decay, clip, ..AdamWConfig::new(options.lr, options.warmup) }
}

/// Mean of the losses, recent ones above all.
fn smooth(mean: Option<f64>, loss: f64) -> f64 {
    mean.map_or(loss, |mean| 0.98 * mean + 0.02 * loss)
}

/// Learning rate of an update, as a share of its value after warm-up; the even fall goes epoch by epoch.
fn lr_factor(options: &TeacherOptions, step: u64) -> f64 {
    let total = options.train_steps.max(1);
    if options.lr_schedule != LrSchedule::Linear {
        return options.lr_schedule.factor(step, total);
    }
    let (batch, images) = (options.batch as f64, options.images as f64);
    let epochs = (total as f64 * batch / images).round().max(1.0);
    let epoch = (step as f64 * batch / images).floor().min(epochs - 1.0);
    options.lr_schedule.factor(epoch as u64, epochs as u64)
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

#[cfg(test)]
mod tests {
    use super::options::TeacherRecipe;
    use super::*;
    use crate::base::PRESETS;

    fn options(text: &str) -> TeacherOptions {
        serde_json::from_value(serde_json::json!({
            "command": "teacher", "base": "ddpm-mnist", "data": "x", "images": 60_000, "data_sha256": null, "init": null,
            "train_steps": 4688, "batch": 256, "lr": 1e-4, "lr_schedule": text, "warmup": 0, "weight_decay": 0.0, "clip": 0.0,
            "ema": 0.0, "drop_label": 0.1, "flip": false, "seed": 1, "save_every": 1, "sample_every": 1, "samples": 1,
            "sample_steps": 1,
        }))
        .unwrap()
    }

    /// The MNIST recipe: `lr·(1 − epoch/20)`.
    #[test]
    fn a_linear_schedule_falls_epoch_by_epoch() {
        let linear = options("linear");
        for (step, factor) in [(0, 1.0), (234, 1.0), (235, 0.95), (2344, 0.5), (4687, 0.05)] {
            let got = lr_factor(&linear, step);
            assert!((got - factor).abs() < 1e-12, "{step}: {got}, expected {factor}");
        }
        assert_eq!(lr_factor(&TeacherOptions { train_steps: 2, ..linear }, 1), 1.0);
        assert_eq!(lr_factor(&options("constant"), 4000), 1.0);
        assert!((lr_factor(&options("cosine"), 4688) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn every_preset_has_a_recipe() {
        for preset in PRESETS {
            let recipe = preset.teacher_recipe().unwrap();
            assert!(recipe.lr.is_some() && recipe.batch.is_some(), "{}", preset.name);
            assert!(recipe.train_steps.is_some() != recipe.epochs.is_some(), "{}", preset.name);
        }
        let flags = TeacherRecipe { epochs: Some(3), ..TeacherRecipe::default() };
        let both =
            flags.or(TeacherRecipe { train_steps: Some(9), lr: Some(0.5), ..TeacherRecipe::default() });
        assert_eq!((both.train_steps, both.epochs, both.lr), (None, Some(3), Some(0.5)));
    }
}
