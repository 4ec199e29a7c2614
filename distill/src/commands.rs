//! What each command does, from parsed arguments to files.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{Device, Tensor};
use dmd_core::net::shapes;
use dmd_core::sampler::{Sampler, TEACHER_STEPS};
use dmd_core::schedule::Schedule;
use serde::de::DeserializeOwned;

use crate::base::{self, PRESETS};
use crate::checkpoint::{Checkpoint, Source};
use crate::data::Loaded;
use crate::error::{Error, Result};
use crate::inventory::Inventory;
use crate::network::{Guidance, Network};
use crate::options::{DistillArgs, PairsArgs, Recipe, SampleArgs};
use crate::pairs::{self, PairsOptions};
use crate::parallel::Team;
use crate::regression::Regression;
use crate::run::{Run, images, save_grid};
use crate::sampler::{self, Request, Sampling, one_step};
use crate::share::Share;
use crate::teacher;
use crate::teacher::options::{TeacherArgs, TeacherOptions};
use crate::train::{self, DistillOptions};
use crate::{device, progress};

/// Images drawn at once.
const BATCH: usize = 50;
/// Images whose evaluation an estimate measures: enough to keep all lanes and some cores busy.
const MEASURED: usize = 16;

/// `dmd-distill bases`.
pub fn bases(json: bool) -> Result<()> {
    let all = PRESETS.iter().map(base::Preset::describe).collect::<Result<Vec<_>>>()?;
    if json {
        return print(&format!("{:#}", serde_json::Value::from(all)));
    }
    for b in all {
        let [c, h, w] = [0, 1, 2].map(|i| b["image"][i].as_u64().unwrap_or(0));
        let name = b["name"].as_str().unwrap_or("");
        let about = b["about"].as_str().unwrap_or("");
        let weights = b["weights"].as_str().unwrap_or("");
        print(&format!(
            "{name}\n    {about}\n    {c}x{h}x{w}, {} parameters; weights {weights}",
            b["parameters"]
        ))?;
    }
    Ok(())
}

/// Writes a line to standard output; a closed pipe is not an error.
pub fn print(line: &str) -> Result<()> {
    use std::io::Write;
    match writeln!(std::io::stdout(), "{line}") {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::file("write", Path::new("stdout"))(e))
        }
        _ => Ok(()),
    }
}

/// `dmd-distill --base …`, or `--resume …`.
pub fn distill(args: DistillArgs, team: &Team) -> Result<()> {
    let target = device::parse_for(&args.device, team)?;
    let profile = args.profile;
    match together(team, || begin_distillation(args, &target, team))? {
        Some((run, options)) => run_distillation(&run, &options, &target, team, profile),
        None => Ok(()),
    }
}

/// Lets the first rank begin a run, or find one, and the others open it; none if nothing is to be done.
fn together<T: DeserializeOwned>(
    team: &Team,
    begin: impl FnOnce() -> Result<Option<(Run, T)>>,
) -> Result<Option<(Run, T)>> {
    if team.leads() {
        let begun = begin()?;
        let absolute = |run: &Run| std::path::absolute(&run.folder).map_err(Error::file("find", &run.folder));
        let folder = begun.as_ref().map(|(run, _)| absolute(run)).transpose()?;
        team.from_leader(Some(folder))?;
        return Ok(begun);
    }
    let folder: Option<PathBuf> = team.from_leader(None)?;
    let Some(folder) = folder else { return Ok(None) };
    if !folder.join("run.json").is_file() {
        return Err(Error::content(
            &folder,
            "this rank does not see the run that rank 0 began there\n\nhint: run from a file system that all hosts share",
        ));
    }
    let run = Run::open(&folder)?;
    let options = run.options()?;
    Ok(Some((run, options)))
}

/// Makes the folder of a new run, or opens the one to continue; none for a dry run.
fn begin_distillation(
    args: DistillArgs,
    target: &Device,
    team: &Team,
) -> Result<Option<(Run, DistillOptions)>> {
    if let Some(folder) = &args.resume {
        let allowed = Recipe { train_steps: args.recipe.train_steps, ..Recipe::default() };
        let others = [&args.out, &args.config, &args.init].iter().any(|option| option.is_some());
        if args.base.is_some() || others || args.recipe != allowed {
            return Err(Error::Request(
                "`--resume` takes its options from the run; only `--train-steps`, `--device`, `--profile` and `--dry-run` go with it"
                    .into(),
            ));
        }
        let run = if args.dry_run { Run::open(folder) } else { Run::resume(folder) }?;
        run.check_command("distill")?;
        let mut options: DistillOptions = run.options()?;
        if let Some(steps) = args.recipe.train_steps.filter(|steps| *steps != options.train_steps) {
            let saved = run.saved_step()?;
            let least = saved.saturating_sub(options.reg_steps).max(1);
            if steps < least {
                return Err(too_few(steps, least, saved, folder));
            }
            options.train_steps = steps;
            if !args.dry_run {
                run.save_options(&options)?;
            }
        }
        if args.dry_run {
            return estimate(&options, &train::load_teacher(&run)?, target).map(|()| None);
        }
        return Ok(Some((run, options)));
    }
    let name = args.base.ok_or_else(|| {
        Error::Request("`--base` is missing\n\nhint: `dmd-distill bases` lists the presets".into())
    })?;
    let preset = base::find(&name);
    let checkpoint = match preset {
        Some(preset) if args.dry_run => preset.untrained()?,
        _ => base::load(&name)?,
    };
    let file = args.config.as_deref().map(Recipe::find).transpose()?.unwrap_or_default();
    let preset = preset.map(base::Preset::recipe).transpose()?.unwrap_or_default();
    let asked = args.recipe.or(file);
    let preset = preset.beside(&asked);
    let mut options = asked.or(preset).resolve(&name, &checkpoint)?;
    if args.dry_run {
        return estimate(&options, &checkpoint, target).map(|()| None);
    }
    team.check_batch(options.batch)?;
    options.check_material(&checkpoint)?;
    let init = args.init.as_deref().map(|folder| train::initial(folder, &options)).transpose()?;
    options.init = args.init;
    let run_name = Path::new(&name).file_name().map_or("run".into(), |n| n.to_string_lossy());
    let prepare = |folder: &Path| {
        if let Some(init) = &init {
            Run::save_init(folder, init)?;
        }
        checkpoint.save(&folder.join("teacher"))
    };
    let run = Run::create(args.out.as_deref(), &run_name, &options, prepare)?;
    Ok(Some((run, options)))
}

fn run_distillation(
    run: &Run,
    options: &DistillOptions,
    target: &Device,
    team: &Team,
    profile: bool,
) -> Result<()> {
    let team = announce(run, target, team)?;
    let folder = train::train(run, options, target, &team)?;
    if profile {
        team.report(run)?;
    }
    if !team.leads() {
        return Ok(());
    }
    dmd_cli::say!(
        "generator: {}\npictures:  {}, {}\nnext:      dmd-export model.onnx --from {}",
        folder.display(),
        run.path("comparison.png").display(),
        run.path("losses.png").display(),
        run.folder.display(),
    );
    Ok(())
}

/// Says where a run is and by what it is computed, from when on Ctrl-C only asks it to stop.
fn announce(run: &Run, target: &Device, team: &Team) -> Result<Team> {
    progress::handle_interrupts();
    let ranks = if team.size() > 1 { format!("{} ranks, each ", team.size()) } else { String::new() };
    if team.leads() {
        dmd_cli::say!("run {}, {ranks}on {}", run.folder.display(), device::name(target));
    }
    team.clone().connect(target)
}

/// The resolved options as JSON, without those that only the weights tell if they were not loaded.
fn describe(options: &DistillOptions, base: &Checkpoint) -> Result<String> {
    let problem = |e| Error::content(Path::new("run.json"), e);
    if !options.base_sha256.is_empty() {
        return serde_json::to_string_pretty(options).map_err(problem);
    }
    let mut shown = serde_json::to_value(options).map_err(problem)?;
    if let Some(shown) = shown.as_object_mut() {
        dmd_cli::say!(
            "the weights were not loaded: `base_sha256` and the default `pairs_dir` depend on them"
        );
        shown.remove("base_sha256");
        if options.pairs_dir.ends_with(options.pairs(base).folder_name()) {
            shown.remove("pairs_dir");
        }
    }
    Ok(format!("{shown:#}"))
}

/// Prints the resolved options and what they would cost, measured on one small step.
fn estimate(options: &DistillOptions, base: &Checkpoint, target: &Device) -> Result<()> {
    print(&describe(options, base)?)?;
    let summary = shapes::summarise(&base.config)?;
    let network = Network::frozen(&base.config, &base.tensors, target)?;
    let request = Request::new(0, 0, MEASURED, base.class_count());
    let z = request.noise(base.config.image_shape(), target)?;
    let class = request.class_tensor(target)?;
    let t = Tensor::new(&[options.t_gen as f32], target)?;
    let mut seconds = f64::INFINITY;
    for _ in 0..3 {
        let started = Instant::now();
        network.predict(&z, &t, class.as_ref())?.sum_all()?.to_scalar::<f32>()?;
        seconds = seconds.min(started.elapsed().as_secs_f64() / MEASURED as f64);
    }
    let guided = f64::from(u8::from(options.guidance != 1.0));
    let cost = cost(options, base, &summary, guided)?;
    let passes = cost.passes;
    let all = options.reg_steps as f64 * cost.alone + options.train_steps as f64 * passes;
    let training = all * options.batch as f64 * seconds;
    let per_step = (1.0 + guided) * if options.pair_sampler == Sampler::Heun { 2.0 } else { 1.0 };
    let pairs = options.pairs as f64 * options.pair_steps as f64 * per_step * seconds;
    let [program, weights, activations] = memory(&summary, cost.kept * options.batch as f64, target.is_cpu());
    let grids = options.all_steps().div_ceil(options.sample_every) as f64 * options.samples as f64;
    let pictures = (grids + options.samples.min(20) as f64 * TEACHER_STEPS as f64) * seconds;
    dmd_cli::say!(
        "parameters {}, {} million multiply-adds per image\n\
         memory about {:.1} GB: {:.1} for weights, moments, averages and copies, {:.1} for a batch on its way back\n\
         one image through the network: {:.2} ms on {}\n\
         time about {}: pairs {}, training {} ({passes:.0} network passes per image and update), pictures {}",
        summary.parameter_count(),
        summary.total_macs() / 1_000_000,
        program + weights + activations,
        weights,
        activations,
        seconds * 1e3,
        device::name(target),
        duration(pairs + training + pictures),
        duration(pairs),
        duration(training),
        duration(pictures),
    );
    Ok(())
}

/// What an update costs per image of its batch, in passes of one image through the base's network.
struct Cost {
    /// Passes; one on the way back counts as two.
    passes: f64,
    /// The same by regression alone.
    alone: f64,
    /// Passes whose values are kept at the same time.
    kept: f64,
}

/// A generator update and the critic updates that follow it. The discriminator sees half of a network.
fn cost(options: &DistillOptions, base: &Checkpoint, summary: &shapes::Summary, guided: f64) -> Result<Cost> {
    let (mut generator, mut generator_kept, mut critic, mut critic_kept) = (0.0, 0.0, 0.0, 0.0);
    let (updates, mut alone) = (options.fake_updates as f64, 0.0);
    if options.has_critic() {
        let draws = if options.dm_weight > 0.0 { options.dm_draws as f64 } else { 0.0 };
        let matching = draws * (2.0 + guided);
        (generator, generator_kept) = (3.0 + matching, 1.0);
        (critic, critic_kept) = (3.0 * updates + (updates - 1.0), 1.0);
    }
    if options.gan_weight > 0.0 {
        (generator, generator_kept) = (generator + 1.0, generator_kept + 0.5);
        (critic, critic_kept) = (critic + 3.0 * updates, critic_kept + 1.0);
    }
    if options.pairs > 0 {
        let (shape, range) = (base.config.image_shape(), base.config.range());
        let (multiply_adds, kept) = Regression::load(&options.reg, shape, range, &Device::Cpu)?.cost()?;
        let distance = 3.0 * multiply_adds as f64 / summary.total_macs().max(1) as f64;
        alone = 3.0 + distance;
        generator += options.reg_until * alone;
        generator_kept += 1.0 + kept as f64 / summary.activations.max(1) as f64;
    }
    Ok(Cost { passes: generator + critic, alone, kept: generator_kept.max(critic_kept) })
}

/// Gigabytes of the program, of everything as large as the weights, and of `images` on their way back.
///
/// Three networks, an average and two moments of two networks are 8 sets of weights, their gradients 2. The CPU engine
/// flattens all parameters for each pass and collects their gradients, and a state is put together in memory before it is
/// written: 16 more, measured (peak resident size of ddpm-mnist, where weights outweigh the rest).
fn memory(summary: &shapes::Summary, images: f64, cpu: bool) -> [f64; 3] {
    let (program, sets) = if cpu { (0.13, 26.0) } else { (0.0, 10.0) };
    let gigabytes = |values: f64| values * 4e-9;
    let weights = gigabytes(sets * summary.parameter_count() as f64);
    [program, weights, gigabytes(images * summary.activations as f64)]
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 2.0 * 86_400.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

/// `dmd-distill teacher`.
pub fn teacher(args: &TeacherArgs, team: &Team) -> Result<()> {
    let target = device::parse_for(&args.device, team)?;
    let mut loaded = None;
    let begun = together(team, || {
        let Some((run, options, images)) = begin_teacher(args, team)? else { return Ok(None) };
        loaded = Some(images);
        Ok(Some((run, options)))
    })?;
    let Some((run, options)) = begun else { return Ok(()) };
    let loaded = match loaded {
        Some(loaded) => loaded,
        None => teacher::reload(&options)?,
    };
    let team = announce(&run, &target, team)?;
    let folder = teacher::train(&run, &options, &loaded, &target, &team)?;
    if args.profile {
        team.report(&run)?;
    }
    if team.leads() {
        dmd_cli::say!("base: {}\nnext: dmd-distill --base {}", folder.display(), folder.display());
    }
    Ok(())
}

fn begin_teacher(args: &TeacherArgs, team: &Team) -> Result<Option<(Run, TeacherOptions, Loaded)>> {
    let Some(folder) = &args.resume else {
        let start = args.resolve()?;
        if args.dry_run {
            return print(&format!("{:#}", serde_json::json!(start.options))).map(|()| None);
        }
        team.check_batch(start.options.batch)?;
        return teacher::begin(start, args.out.as_deref()).map(Some);
    };
    let steps = args.resumed_steps()?;
    let run = Run::resume(folder)?;
    run.check_command("teacher")?;
    let mut options: TeacherOptions = run.options()?;
    let loaded = teacher::reload(&options)?;
    if let Some(steps) = steps.filter(|steps| *steps != options.train_steps) {
        let saved = run.saved_step()?;
        if steps < saved {
            return Err(too_few(steps, saved, saved, folder));
        }
        options.train_steps = steps;
        run.save_options(&options)?;
    }
    Ok(Some((run, options, loaded)))
}

fn too_few(steps: u64, least: u64, saved: u64, folder: &Path) -> Error {
    Error::Request(format!(
        "got `--train-steps {steps}`, expected at least {least}: the run in `{}` has come to step {saved}",
        folder.display()
    ))
}

/// `dmd-distill pairs`; false if `--check` found that pairs are missing, or there twice.
pub fn pairs(args: &PairsArgs, team: &Team) -> Result<bool> {
    let target = device::parse_for(&args.device, team)?;
    let checkpoint = base::load(&args.base)?;
    let total = Schedule::new(&checkpoint.schedule).num_train_timesteps();
    if args.count == 0 || args.steps == 0 || args.steps > total {
        return Err(Error::Request(format!("`--count` must be at least 1 and `--steps` from 1 to {total}")));
    }
    let options =
        PairsOptions::new(&args.base, &checkpoint, args.sampler, args.steps, args.guidance, args.seed);
    let folder = args.out.clone().unwrap_or_else(|| Path::new("pairs").join(options.folder_name()));
    if args.check {
        options.check(&folder)?;
        let found = Inventory::of(&folder, &checkpoint, args.count)?;
        print(&found.to_string())?;
        return Ok(found.is_complete());
    }
    progress::handle_interrupts();
    let again = |error: Error| error.continue_with("the same command continues");
    if team.size() > 1 {
        pairs::fill_together(&folder, &options, &checkpoint, args.count, &target, team).map_err(again)?;
        if team.leads() {
            dmd_cli::say!("{} pairs by {} ranks in {}", args.count, team.size(), folder.display());
        }
        return Ok(true);
    }
    let share = args.share()?;
    let count = pairs::fill(&folder, &options, &checkpoint, args.count, share, &target).map_err(again)?;
    let share = match share {
        Share::ALL => String::new(),
        Share { index, of } => format!(" of share {index}/{of}"),
    };
    dmd_cli::say!("{count} pairs{share} in {}", folder.display());
    Ok(true)
}

/// `dmd-distill sample`.
pub fn sample(args: &SampleArgs) -> Result<()> {
    let target = device::parse(&args.device)?;
    let checkpoint = load_any(&args.model)?;
    if args.output.extension().is_none_or(|extension| extension != "png") {
        return Err(Error::content(&args.output, "the name of a picture must end in `.png`"));
    }
    if args.output.exists() && !args.force {
        return Err(Error::content(&args.output, "it exists already\n\nhint: add `--force` to replace it"));
    }
    if args.count == 0 {
        return Err(Error::Request("`--count` must be at least 1".into()));
    }
    let network = Network::frozen(&checkpoint.config, &checkpoint.tensors, &target)?;
    let schedule = Schedule::new(&checkpoint.schedule);
    let constants = checkpoint.generator.is_some().then(|| checkpoint.one_step()).transpose()?;
    let many = TEACHER_STEPS.min(schedule.num_train_timesteps());
    let steps = args.steps.unwrap_or(if constants.is_some() { 1 } else { many });
    if constants.is_some() && steps != 1 {
        return Err(Error::Request(format!(
            "`{}` is a one-step generator, `--steps {steps}` does not apply\n\nhint: sample its teacher for more steps",
            args.model
        )));
    }
    let guidance = match constants {
        Some(_) if args.guidance != 1.0 => {
            return Err(Error::Request(format!(
                "`{}` is a one-step generator, `--guidance` does not apply",
                args.model
            )));
        }
        _ => Guidance::new(args.guidance, checkpoint.provenance.classes.as_ref())?,
    };
    let sampling = Sampling { sampler: args.sampler, steps, guidance };
    let mut shown = Vec::new();
    for first in (0..args.count).step_by(BATCH) {
        let count = BATCH.min(args.count - first);
        let request = Request::new(args.seed, first as u64, count, checkpoint.class_count());
        let x = match &constants {
            Some(constants) => one_step(&network, constants, &request)?,
            None => sampler::sample(&network, &schedule, &request, &sampling)?,
        };
        request.check_finite(&x)?;
        shown.extend(images(&x, checkpoint.config.range())?);
    }
    save_grid(&args.output, &shown, 10, 2)?;
    dmd_cli::say!("{} images in {}", shown.len(), args.output.display());
    Ok(())
}

/// A checkpoint folder, the generator or teacher of a run folder, or a preset.
fn load_any(model: &str) -> Result<Checkpoint> {
    let folder = PathBuf::from(model);
    if folder.join("config.json").is_file() {
        return Checkpoint::load(&Source::Folder(folder));
    }
    match ["generator", "teacher"].map(|sub| folder.join(sub)).into_iter().find(|p| p.is_dir()) {
        Some(inside) => Checkpoint::load(&Source::Folder(inside)),
        None => base::load(model),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Peak resident sizes of short runs with pairs, two cores, in gigabytes.
    #[test]
    fn the_estimated_memory_is_the_measured_one() -> Result<()> {
        for (name, batch, measured) in [
            ("ddpm-fashion", 4, 0.262),
            ("ddpm-fashion", 32, 0.416),
            ("ddpm-celeba", 4, 0.175),
            ("ddpm-celeba", 32, 0.316),
            ("ddpm-mnist", 1, 0.877),
            ("ddpm-mnist", 4, 0.873),
        ] {
            let summary = shapes::summarise(&base::preset(name)?.config()?)?;
            let estimated: f64 = memory(&summary, 2.0 * f64::from(batch), true).iter().sum();
            let ratio = estimated / measured;
            assert!((0.8..1.25).contains(&ratio), "{name}, {batch}: got {estimated:.3}, expected {measured}");
        }
        Ok(())
    }
}
