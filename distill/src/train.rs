//! A whole distillation: pairs, updates, statistics, pictures, saved states and the finished generator.

use std::path::{Path, PathBuf};

use candle_core::Device;
use dmd_core::sampler::Sampler;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::checkpoint::{Checkpoint, Source, snapshot};
use crate::data::{Dataset, Split};
use crate::distillation::{Distillation, Material, Start};
use crate::error::{Error, Result};
use crate::finish::finished;
use crate::html;
use crate::judge::Judge;
use crate::monitor::{Monitor, Verdict};
use crate::network::{Network, Tensors};
use crate::optimiser::{Ema, LrSchedule};
use crate::pairs::{self, PairsOptions};
use crate::parallel::Team;
use crate::progress::{Progress, stop_requested};
use crate::regression::{Distance, Regression};
use crate::report;
use crate::run::{LATEST, Run, State, images, save_grid};
use crate::sampler::{Request, one_step};
use crate::teacher::part;

/// Name of the state whose samples were best, or without a metric the last healthy ones.
const BEST: &str = "best";
/// Returns to the best state before a run gives up.
const ROLLBACKS: u32 = 3;
/// What to do about a training that does not hold together.
const GENTLER: &str =
    "start again with a lower `--lr`, for example half, or more `--fake-updates`, and another `--out`";

/// A method: the defaults of its losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Distribution matching and regression on pairs. Yin et al. 2024 (arXiv:2311.18828).
    Dmd,
    /// Distribution matching and an adversarial loss on real images, no pairs. Yin et al. 2024 (arXiv:2405.14867).
    Dmd2,
}

/// Which weights become the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// Those whose samples were nearest to real images, where there is a metric.
    Best,
    /// The last.
    Last,
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
    /// Run that this one is the second stage of.
    #[serde(default)]
    pub init: Option<PathBuf>,
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
    /// Real images, for the adversarial loss.
    pub data: Option<String>,
    /// Classifier-free guidance of the teacher, for pairs and distribution matching; 1 is none.
    pub guidance: f64,
    /// Generator updates, after those by regression alone.
    pub train_steps: u64,
    /// Generator updates by regression alone, which come first.
    #[serde(default)]
    pub reg_steps: u64,
    /// Learning rate of the generator in these.
    #[serde(default)]
    pub lr_reg: f64,
    /// Images per update.
    pub batch: usize,
    /// Learning rate of the generator.
    pub lr: f64,
    /// Learning rate of the critic.
    pub lr_fake: f64,
    /// How both change over the updates; [`Self::lr_reg`] likewise, over its own.
    pub lr_schedule: LrSchedule,
    /// Updates of warm-up, for both.
    pub warmup: u64,
    /// Largest norm of a network's gradient; 0 for any.
    pub clip: f64,
    /// Weight of distribution matching; 0 is regression alone.
    pub dm_weight: f64,
    /// Whether the matching gradient keeps the factor `alpha_t` of Eq. 7.
    pub dm_alpha_factor: bool,
    /// Noisy versions of each generated image at which distributions are matched.
    #[serde(default = "one")]
    pub dm_draws: usize,
    /// Whether the losses see generated images clamped to the range of real ones.
    #[serde(default)]
    pub clamp: bool,
    /// First and last step of distribution matching, as shares of all.
    pub t_min: f64,
    /// See `t_min`.
    pub t_max: f64,
    /// Weight of the regression loss.
    pub lambda_reg: f64,
    /// Distance of the regression loss.
    pub reg: Distance,
    /// Share of the updates after those by regression alone that have the regression loss too.
    #[serde(default = "all")]
    pub reg_until: f64,
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
    /// Updates between judgements of samples.
    pub eval_every: u64,
    /// Images of a judgement; 0 judges without a metric.
    pub eval_count: usize,
    /// Which weights become the result.
    pub keep: Keep,
    /// Updates between sample grids.
    pub sample_every: u64,
    /// Images of a sample grid, and at most of the comparison.
    pub samples: usize,
}

// Runs of version 0.1.0 that were begun before these options existed.
fn one() -> usize {
    1
}

fn all() -> f64 {
    1.0
}

impl DistillOptions {
    /// All updates of the generator.
    pub fn all_steps(&self) -> u64 {
        self.reg_steps.saturating_add(self.train_steps)
    }

    /// Whether update number `step` has the regression loss.
    pub fn regresses(&self, step: u64) -> bool {
        step < self.reg_steps || ((step - self.reg_steps) as f64) < self.reg_until * self.train_steps as f64
    }

    /// Whether update number `step` has losses that need the critic, which is then updated too.
    pub fn matches(&self, step: u64) -> bool {
        step >= self.reg_steps && self.has_critic()
    }

    /// Whether any loss of the generator needs the critic; regression alone does not.
    pub fn has_critic(&self) -> bool {
        self.dm_weight > 0.0 || self.gan_weight > 0.0
    }

    /// Whether samples are judged after `step` updates: more rarely while updates are cheap.
    fn judges(&self, step: u64) -> bool {
        let every = if step < self.reg_steps { 10 * self.eval_every } else { self.eval_every };
        step.is_multiple_of(every) || step == self.reg_steps
    }

    /// Learning rates of generator and critic at a step: by the schedule, and half as much for every return to the best
    /// state.
    fn rates(&self, step: u64, rollbacks: u32) -> [f64; 2] {
        let (lr, step, steps) = match step.checked_sub(self.reg_steps) {
            None => (self.lr_reg, step, self.reg_steps),
            Some(step) => (self.lr, step, self.train_steps),
        };
        let factor = self.lr_schedule.factor(step, steps) * 0.5f64.powi(rollbacks as i32);
        [lr * factor, self.lr_fake * factor]
    }

    /// The pairs that belong to these options. The run's own copy of the base is another file than the base.
    pub fn pairs(&self, base: &Checkpoint) -> PairsOptions {
        let (sampler, steps, guidance) = (self.pair_sampler, self.pair_steps, self.guidance);
        PairsOptions {
            base_sha256: self.base_sha256.clone(),
            ..PairsOptions::new(&self.base, base, sampler, steps, guidance, self.seed)
        }
    }

    /// Computes the pairs that are missing and reads the real images.
    fn material(&self, base: &Checkpoint, device: &Device, team: &Team) -> Result<Material> {
        let pairs = match self.pairs {
            0 => None,
            count => {
                let (folder, description) = (&self.pairs_dir, self.pairs(base));
                pairs::fill_together(folder, &description, base, count, device, team)?;
                Some(pairs::prepare(folder, &description, base, count, device)?)
            }
        };
        Ok(Material { pairs, real: self.real(base)? })
    }

    /// Finds what would stop a run for want of pairs or images, before its folder is made.
    pub fn check_material(&self, base: &Checkpoint) -> Result<()> {
        if self.pairs > 0 {
            self.pairs(base).check(&self.pairs_dir)?;
            Regression::load(&self.reg, base.config.image_shape(), base.config.range(), &Device::Cpu)?;
        }
        self.real(base).map(drop)
    }

    fn real(&self, base: &Checkpoint) -> Result<Option<Dataset>> {
        if self.gan_weight == 0.0 {
            return Ok(None);
        }
        let Some(data) = &self.data else { return Ok(None) };
        let data = Dataset::load(data, Split::Train, base.config.image_shape())?;
        if let Some(classes) = base.class_count() {
            data.check_labels(classes, &self.base)?;
        }
        Ok(Some(data))
    }
}

/// The averaged generator and the critic of a finished run, for one that starts from them; `generator.NAME`, `fake.NAME`.
pub fn initial(folder: &Path, options: &DistillOptions) -> Result<Tensors> {
    let run = Run::open(folder)?;
    run.check_command("distill")?;
    let before: DistillOptions = run.options()?;
    let same = |o: &DistillOptions| (o.base_sha256.clone(), o.t_gen, o.input_scale.to_bits());
    if same(&before) != same(options) {
        return Err(Error::content(
            folder,
            "the run has another base, `--t-gen` or `--input-scale`\n\nhint: a second stage keeps them",
        ));
    }
    let latest =
        run.read_state(LATEST)?.ok_or_else(|| Error::content(folder, "the run has saved no state yet"))?;
    let state = match result(&run, &before, &latest.note()?)? {
        Some(best) => best,
        None => latest,
    };
    let mut tensors = Tensors::new();
    for (from, to) in [("ema.", "generator."), ("fake.", "fake.")] {
        tensors.extend(part(&state.tensors, from)?.into_iter().map(|(name, t)| (format!("{to}{name}"), t)));
    }
    Ok(tensors)
}

/// The state whose weights are a run's result, if they are not the last.
fn result(run: &Run, options: &DistillOptions, monitor: &Monitor) -> Result<Option<State>> {
    let best = options.keep == Keep::Best && monitor.best.is_some();
    if best || monitor.rollbacks > ROLLBACKS { run.read_state(BEST) } else { Ok(None) }
}

/// Distils, or continues, and returns the folder of the finished generator: the one that looked best to the metric, or
/// the last where there is none. Of several ranks the first writes and judges.
pub fn train(run: &Run, options: &DistillOptions, device: &Device, team: &Team) -> Result<PathBuf> {
    team.check_batch(options.batch)?;
    let base = load_teacher(run)?;
    let resume = format!("continue with `dmd-distill --resume {}`", run.folder.display());
    let material = options.material(&base, device, team).map_err(|e| e.continue_with(&resume))?;
    let judge = if team.leads() { Some(Judge::new(options, &base, device)?) } else { None };
    let resumed = if team.leads() { run.load_state(LATEST)? } else { run.read_state(LATEST)? };
    if team.leads()
        && let Some(state) = &resumed
        && state.note::<Monitor>()?.kept == Some(state.step)
    {
        run.keep_state(LATEST, BEST)?; // the process may have been killed before it did
    }
    let mut step = resumed.as_ref().map_or(0, |state| state.step);
    let begun = match (&resumed, &options.init) {
        (None, Some(_)) => Some(run.read_init()?),
        _ => None,
    };
    let start = match (&resumed, &begun) {
        (Some(state), _) => Start::State(&state.tensors),
        (None, Some(tensors)) => Start::Stage(tensors),
        (None, None) => Start::Base,
    };
    let mut work = Distillation::new(options, &base, start, device)?.shared(team);
    let (average, mut monitor) = match &resumed {
        Some(state) => (part(&state.tensors, "ema.")?, state.note()?),
        None => (snapshot(work.generator.parameters())?, Monitor::default()),
    };
    let mut ema = Ema::new(options.ema, step, average);
    match &resumed {
        _ if !team.leads() => {}
        Some(_) => dmd_cli::say!("continuing after step {step}"),
        None => save_samples(&work, run, options, 0, &ema.tensors)?,
    }

    let mut progress = Progress::new("distil", step, options.all_steps());
    // A run that ended by collapse may have been killed before its generator was written.
    let (mut shown, mut collapsed) = (String::new(), monitor.rollbacks > ROLLBACKS);
    while step < options.all_steps() && !collapsed {
        if step == options.reg_steps && step > 0 {
            work.forget_moments()?;
        }
        work.set_rates(options.rates(step, monitor.rollbacks));
        let update = team.timed(|| work.update(step, &material)).map_err(|e| diverged(e, step, run))?;
        ema.update(work.generator.variables())?;
        step += 1;
        let last = step == options.all_steps();
        let mut line = json!({
            "step": step, "dm": update.dm, "reg": update.reg, "fake": update.fake,
            "adversarial": update.adversarial, "discrimination": update.discrimination,
            "grad_norm": update.norm, "fake_grad_norm": update.fake_norm,
        });
        let mut verdict = Verdict::Fine;
        if let (true, Some(judge)) = (options.judges(step), &judge) {
            if monitor.reference.is_none() {
                monitor.reference = Some(judge.reference(&base)?);
            }
            let (look, metric) = judge.look(&work, &ema.tensors)?;
            verdict = monitor.judge(step, &look, metric);
            for (name, value) in [
                ("kid", json!(metric)),
                ("brightness", json!(look.brightness)),
                ("contrast", json!(look.contrast)),
                ("diversity", json!(look.diversity)),
            ] {
                line[name] = value;
            }
            if verdict == Verdict::Best {
                monitor.kept = Some(step);
            }
            shown = metric.map_or(String::new(), |kid| format!(" kid {kid:.4}"));
        }
        if options.judges(step) {
            let found = team.leads().then_some((verdict, monitor.rollbacks));
            (verdict, monitor.rollbacks) = team.from_leader(found)?;
        }
        if team.leads() {
            run.log(&line)?;
        }
        let message = format!("dm {:.3} reg {:.3} fake {:.3}{shown}", update.dm, update.reg, update.fake);
        progress.update(step, &message);
        let rolled_back = matches!(verdict, Verdict::Rollback(_));
        match &verdict {
            Verdict::Fine | Verdict::Best => {}
            Verdict::Alarm(problem) if team.leads() => dmd_cli::say!("\nwarning: step {step}: {problem}"),
            Verdict::Alarm(_) => {}
            Verdict::Rollback(problem) => {
                let Some(best) = run.read_state(BEST)? else {
                    return Err(Error::Diverged(format!("step {step}: {problem}\n\nhint: {GENTLER}")));
                };
                collapsed = monitor.rollbacks > ROLLBACKS;
                let then = if collapsed { "and ending there" } else { "at half the learning rate" };
                if team.leads() {
                    let back = format!("going back to the weights of step {} {then}", best.step);
                    dmd_cli::say!("\nwarning: step {step}: {problem}; {back}");
                }
                work = Distillation::new(options, &base, Start::State(&best.tensors), device)?.shared(team);
                if best.step <= options.reg_steps && options.matches(step) {
                    work.forget_moments()?;
                }
                ema = Ema::new(options.ema, step, part(&best.tensors, "ema.")?);
            }
        }
        let last = last || collapsed;
        if team.leads() && (step.is_multiple_of(options.sample_every) || last) {
            save_samples(&work, run, options, step, &ema.tensors)?;
            report::plot(run)?;
        }
        let stop = team.any(stop_requested());
        // A run that is continued knows no later best than its own: the copy follows the state, which says that it is to be made.
        if step.is_multiple_of(options.save_every) || last || stop || rolled_back || verdict == Verdict::Best
        {
            team.check_equal(work.generator.parameters().values().chain(work.fake.parameters().values()))?;
            if team.leads() {
                run.save_state(LATEST, step, &work.state(&ema.tensors)?, &monitor)?;
            }
        }
        if team.leads() && verdict == Verdict::Best {
            run.keep_state(LATEST, BEST)?;
        }
        if last {
            break;
        }
        if stop {
            return Err(Error::Interrupted(format!("stopped after step {step}\n\nhint: {resume}")));
        }
    }
    let folder = run.path("generator");
    if !team.leads() {
        return Ok(folder);
    }
    if collapsed {
        dmd_cli::say!("warning: the samples collapsed {} times\n\nhint: {GENTLER}", monitor.rollbacks);
    }

    let best = result(run, options, &monitor)?;
    let (taken, weights) = match &best {
        Some(best) => (best.step, part(&best.tensors, "ema.")?),
        None => (step, ema.tensors),
    };
    finished(options, &base, weights, taken, &monitor).save(&folder)?;
    let generator = Checkpoint::load(&Source::Folder(folder.clone()))?;
    report::comparison(&run.path("comparison.png"), &base, &generator, options, device)?;
    html::write(run, &generator)?;
    Ok(folder)
}

/// What a failed update means for the user.
fn diverged(error: Error, step: u64, run: &Run) -> Error {
    match error {
        Error::Diverged(problem) => Error::Diverged(format!(
            "update {}: {problem}; what `{}` had saved is kept\n\nhint: {GENTLER}; continued \
             with `--resume` it meets the same",
            step + 1,
            run.folder.display()
        )),
        other => other,
    }
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
