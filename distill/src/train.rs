//! Distribution matching distillation: the loop over generator, critic ("fake") and frozen teacher.
//! Yin et al. 2024 (arXiv:2311.18828), Algorithms 1 to 3; several critic updates per generator update as in
//! Yin et al. 2024 (DMD2, arXiv:2405.14867), section 4.2.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use dmd_core::card::{Base, GeneratorConfig, Provenance};
use dmd_core::net::OneStep;
use dmd_core::schedule::Schedule;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::checkpoint::{Checkpoint, Source, snapshot};
use crate::error::{Error, Result};
use crate::losses::{self, NoiseLevels};
use crate::network::{Network, Tensors};
use crate::optimiser::{AdamW, AdamWConfig, Ema};
use crate::pairs::{self, Pairs, PairsOptions};
use crate::progress::{Progress, stop_requested};
use crate::random::{Purpose, Random};
use crate::report;
use crate::run::{Run, images, save_grid};
use crate::sampler::{Request, one_step};
use crate::teacher::part;

/// Resolved options of a distillation; saved as `run.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DistillOptions {
    /// `distill`.
    pub command: String,
    /// Preset or folder of the base.
    pub base: String,
    /// SHA-256 of the base's weights.
    pub base_sha256: String,
    /// Folder of the noise-image pairs.
    pub pairs_dir: PathBuf,
    /// Number of pairs; 0 without regression.
    pub pairs: usize,
    /// DDIM steps per pair.
    pub pair_steps: usize,
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
    /// Weight of the regression loss.
    pub lambda_reg: f64,
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

/// The three networks and the optimisers of two of them.
pub struct Distillation<'a> {
    options: &'a DistillOptions,
    schedule: Schedule,
    one_step: OneStep,
    classes: Option<usize>,
    image: [usize; 3],
    teacher: Network,
    generator: Network,
    fake: Network,
    /// Views of the two trained networks that keep nothing for a backward pass.
    generator_view: Network,
    fake_view: Network,
    generator_optimiser: AdamW,
    fake_optimiser: AdamW,
    device: Device,
}

/// What one update of the generator leaves, and of the critic after it.
pub struct Update {
    /// Generated images, without gradient.
    pub x_gen: Tensor,
    /// Their classes.
    pub class: Option<Tensor>,
    /// Distribution matching loss.
    pub dm: f64,
    /// Regression loss, before its weight; 0 without pairs.
    pub reg: f64,
    /// Norm of the generator's gradient before clipping.
    pub norm: f64,
    /// The critic's mean loss.
    pub fake: f64,
    /// Mean norm of its gradient before clipping.
    pub fake_norm: f64,
}

/// Distils, or continues, and returns the folder of the finished generator.
pub fn train(run: &Run, options: &DistillOptions, device: &Device) -> Result<PathBuf> {
    let base = load_teacher(run)?;
    let pairs = match options.pairs {
        0 => None,
        count => {
            let description = PairsOptions::new(&options.base, &base, options.pair_steps, options.seed);
            Some(pairs::prepare(&options.pairs_dir, &description, &base, count, device)?)
        }
    };
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
        work.save_samples(run, 0, &ema.tensors)?;
    }

    let mut progress = Progress::new("distil", step, options.train_steps);
    while step < options.train_steps {
        let update = work.update(step, pairs.as_ref())?;
        ema.update(work.generator.variables())?;
        step += 1;
        let values = update.x_gen.flatten_all()?.to_vec1::<f32>()?;
        let (brightness, contrast) = mean_and_deviation(&values);
        run.log(&json!({
            "step": step, "dm": update.dm, "reg": update.reg, "fake": update.fake,
            "grad_norm": update.norm, "fake_grad_norm": update.fake_norm,
            "brightness": brightness, "contrast": contrast,
        }))?;
        let message = format!("dm {:.3} reg {:.3} fake {:.3}", update.dm, update.reg, update.fake);
        progress.update(step, &message);

        let last = step == options.train_steps;
        if step.is_multiple_of(options.sample_every) || last {
            work.save_samples(run, step, &ema.tensors)?;
            report::plot_losses(&run.path("losses.png"), &run.stats()?)?;
        }
        let stop = stop_requested();
        if step.is_multiple_of(options.save_every) || last || stop {
            run.save_state(step, &work.state(&ema.tensors)?)?;
        }
        if stop && !last {
            return Err(Error::Interrupted(format!(
                "stopped after step {step}\n\nhint: continue with `dmd-distill --resume {}`",
                run.folder.display()
            )));
        }
    }

    let folder = run.path("generator");
    work.finished(&base, ema.tensors).save(&folder)?;
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

impl<'a> Distillation<'a> {
    /// Starts from the base, or from a saved state.
    pub fn new(
        options: &'a DistillOptions,
        base: &Checkpoint,
        saved: Option<&Tensors>,
        device: &Device,
    ) -> Result<Self> {
        let schedule = Schedule::new(&base.schedule);
        let config = GeneratorConfig { t_gen: options.t_gen, input_scale: options.input_scale };
        let weights = |prefix: &str| match saved {
            Some(tensors) => part(tensors, prefix),
            None => Ok(base.tensors.clone()),
        };
        let generator = Network::trainable(&base.config, &weights("generator.")?, device)?;
        let fake = Network::trainable(&base.config, &weights("fake.")?, device)?;
        let mut generator_optimiser =
            AdamW::new(AdamWConfig::new(options.lr, options.warmup), generator.variables())?;
        let mut fake_optimiser =
            AdamW::new(AdamWConfig::new(options.lr_fake, options.warmup), fake.variables())?;
        if let Some(tensors) = saved {
            generator_optimiser.load("generator_optimiser", generator.variables(), tensors)?;
            fake_optimiser.load("fake_optimiser", fake.variables(), tensors)?;
        }
        Ok(Self {
            options,
            one_step: OneStep::new(&config, &schedule)?,
            schedule,
            classes: base.class_count(),
            image: base.config.image_shape(),
            teacher: Network::frozen(&base.config, &base.tensors, device)?.in_bf16_on_gpu(),
            generator_view: generator.without_gradient(),
            fake_view: fake.without_gradient().in_bf16_on_gpu(),
            generator,
            fake,
            generator_optimiser,
            fake_optimiser,
            device: device.clone(),
        })
    }

    /// One update of the generator and those of the critic that follow it.
    pub fn update(&mut self, step: u64, pairs: Option<&Pairs>) -> Result<Update> {
        let mut update = self.update_generator(step, pairs)?;
        (update.fake, update.fake_norm) = self.update_fake(step, &update)?;
        Ok(update)
    }

    /// Noise and classes for a batch of generated images.
    fn draw(&self, random: &mut Random) -> Result<(Tensor, Option<Tensor>)> {
        let class = self.classes.map(|n| {
            let classes: Vec<u32> = (0..self.options.batch).map(|_| random.below(n) as u32).collect();
            Tensor::new(classes, &self.device)
        });
        let [c, h, w] = self.image;
        Ok((random.normal_tensor(&[self.options.batch, c, h, w], &self.device)?, class.transpose()?))
    }

    /// Steps drawn uniformly from `from..to`, and noise.
    fn noise(
        &self,
        random: &mut Random,
        from: usize,
        to: usize,
        x: &Tensor,
    ) -> Result<(NoiseLevels, Tensor)> {
        let t: Vec<u32> = (0..x.dims()[0]).map(|_| (from + random.below(to - from)) as u32).collect();
        let levels = NoiseLevels::new(&self.schedule, &t, &self.device)?;
        Ok((levels, random.normal_tensor(x.dims(), &self.device)?))
    }

    /// Algorithm 1, lines 5 to 13: distribution matching on fresh noise, regression on pairs.
    fn update_generator(&mut self, step: u64, pairs: Option<&Pairs>) -> Result<Update> {
        let mut random = Random::new(self.options.seed, Purpose::Generator, step);
        let (z, class) = self.draw(&mut random)?;
        let x_gen = self.generator.one_step(&self.one_step, &z, class.as_ref())?;
        let detached = x_gen.detach();
        let total = self.schedule.num_train_timesteps();
        let (levels, eps) = self.noise(&mut random, total / 50, total - total / 50, &detached)?;
        let x_t = levels.noisy(&detached, &eps)?;
        let x0 =
            |network: &Network| levels.x0_from_eps(&x_t, &network.eps_pred(&x_t, &levels.t, class.as_ref())?);
        let (x0_real, x0_fake) = (x0(&self.teacher)?, x0(&self.fake_view)?);
        let gradient = losses::distribution_matching_gradient(&detached, &x0_real, &x0_fake)?;
        let dm = losses::distribution_matching(&x_gen, &gradient)?;
        let mut loss = dm.clone();
        let mut reg = 0.0;
        if let Some(pairs) = pairs {
            let indices: Vec<usize> = (0..self.options.batch).map(|_| random.below(pairs.count())).collect();
            let (z, y, class) = pairs.batch(&indices, &self.device)?;
            let x_ref = self.generator.one_step(&self.one_step, &z, class.as_ref())?;
            let regression = losses::regression(&x_ref, &y)?;
            reg = scalar(&regression)?;
            loss = (loss + (regression * self.options.lambda_reg)?)?;
        }
        let grads = loss.backward()?;
        let norm = self.generator_optimiser.step(self.generator.variables(), &grads)?;
        Ok(Update { x_gen: detached, class, dm: scalar(&dm)?, reg, norm, fake: 0.0, fake_norm: 0.0 })
    }

    /// Algorithm 1, lines 14 to 17: the critic learns to denoise generated images. The first update sees the batch
    /// of the generator update, the others fresh ones. Returns mean loss and gradient norm.
    fn update_fake(&mut self, step: u64, update: &Update) -> Result<(f64, f64)> {
        let updates = self.options.fake_updates;
        let (mut loss_sum, mut norm_sum) = (0.0, 0.0);
        for k in 0..updates {
            let mut random = Random::new(self.options.seed, Purpose::Critic, step * updates + k);
            let (x_gen, class) = if k == 0 {
                (update.x_gen.clone(), update.class.clone())
            } else {
                let (z, class) = self.draw(&mut random)?;
                (self.generator_view.one_step(&self.one_step, &z, class.as_ref())?, class)
            };
            let total = self.schedule.num_train_timesteps();
            let (levels, eps) = self.noise(&mut random, 0, total, &x_gen)?;
            let x_t = levels.noisy(&x_gen, &eps)?;
            let eps_pred = self.fake.eps_pred(&x_t, &levels.t, class.as_ref())?;
            let loss = losses::denoising(&eps_pred, &eps)?;
            norm_sum += self.fake_optimiser.step(self.fake.variables(), &loss.backward()?)?;
            loss_sum += scalar(&loss)?;
        }
        Ok((loss_sum / updates as f64, norm_sum / updates as f64))
    }

    fn save_samples(&self, run: &Run, step: u64, average: &Tensors) -> Result<()> {
        let network = Network::frozen(&self.generator.config, average, &self.device)?;
        let request = Request::new(self.options.seed, 0, self.options.samples, self.classes);
        let x = one_step(&network, &self.one_step, &request)?;
        let path = run.path(&format!("samples/step-{step:06}.png"));
        save_grid(&path, &images(&x, network.config.range())?, 10, 2)
    }

    /// Everything that a resumed run needs.
    fn state(&self, average: &Tensors) -> Result<Tensors> {
        let mut tensors = Tensors::new();
        for (name, tensor) in self.generator.parameters() {
            tensors.insert(format!("generator.{name}"), tensor.clone());
            tensors.insert(format!("fake.{name}"), self.fake.parameters()[name].clone());
            tensors.insert(format!("ema.{name}"), average[name].clone());
        }
        self.generator_optimiser.save("generator_optimiser", self.generator.variables(), &mut tensors)?;
        self.fake_optimiser.save("fake_optimiser", self.fake.variables(), &mut tensors)?;
        Ok(tensors)
    }

    /// The generator as a checkpoint, with its history.
    fn finished(&self, base: &Checkpoint, average: Tensors) -> Checkpoint {
        let o = self.options;
        let images = o.train_steps * o.batch as u64;
        let training = json!({
            "method": "dmd", "steps": o.train_steps, "images": images, "batch": o.batch, "lr": o.lr,
            "lr_fake": o.lr_fake, "lambda_reg": o.lambda_reg, "pairs": o.pairs, "pair_steps": o.pair_steps,
            "fake_updates": o.fake_updates, "ema": o.ema, "seed": o.seed,
        });
        Checkpoint {
            config: base.config.clone(),
            schedule: base.schedule.clone(),
            generator: Some(GeneratorConfig { t_gen: o.t_gen, input_scale: o.input_scale }),
            provenance: Provenance {
                name: format!("one-step-{}", base.provenance.name.trim_start_matches("ddpm-")),
                classes: base.provenance.classes.clone(),
                base: Some(Base { id: base_id(&o.base), sha256: o.base_sha256.clone() }),
                training: training.as_object().cloned().unwrap_or_default(),
                metrics: serde_json::Map::new(),
            },
            tensors: average,
            sha256: String::new(),
        }
    }
}

/// A preset's name, or the last part of a folder's path.
fn base_id(base: &str) -> String {
    Path::new(base).file_name().map_or(base.to_owned(), |n| n.to_string_lossy().into_owned())
}

fn scalar(loss: &Tensor) -> Result<f64> {
    Ok(f64::from(loss.to_scalar::<f32>()?))
}

fn mean_and_deviation(values: &[f32]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
    (mean, variance.sqrt())
}
