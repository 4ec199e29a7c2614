//! `dmd-run [MODEL]`: checks the request, loads the model, generates, writes.

use std::time::Instant;

use anyhow::bail;
use dmd_runtime_native::bench::peak_memory;
use dmd_runtime_native::file::ModelInfo;
use dmd_runtime_native::generator::{classes, evaluations, find_class, parts, steps};
use dmd_runtime_native::{Class, Generator, Interpolation, Options, Request};

use serde::{Deserialize, Serialize};

use super::output::{Output, Wish, check_file, save};
use super::progress::Progress;
use crate::SampleArgs;

/// What `--report` writes.
#[derive(Serialize, Deserialize)]
pub struct Report {
    /// The file as messages call it.
    pub model: String,
    /// The provider that ran it.
    pub provider: String,
    /// Its engine and version.
    pub engine: String,
    /// Number of images.
    pub images: usize,
    /// Steps per image.
    pub steps: usize,
    /// Time to read the file and load it into the engine.
    pub load_ms: f64,
    /// Time to generate, by the number of images.
    pub ms_per_image: f64,
    /// The most memory of this process, where the system says so.
    pub peak_mib: Option<f64>,
}

/// Runs the command.
pub fn sample(args: &SampleArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let file = super::open_model(args.model.as_deref())?;
    let info = file.info.clone();
    if info.card.is_none() {
        dmd_cli::say!("warning: {} has no model card: values in [-1, 1] are assumed", info.name);
    }
    let (requests, columns) = requests(args, &info)?;
    let mut evaluated = 0;
    for request in &requests {
        evaluated += request.count as u64 * evaluations(&info, request)? as u64;
    }
    let count = requests.iter().map(|request| request.count).sum::<usize>();
    if let Some(report) = &args.report {
        if *report == args.output || args.model.as_ref() == Some(report) {
            bail!("got `{}` for the report too, expected a file of its own", report.display());
        }
        check_file(report, args.force)?;
    }
    let mut output = Output::plan(&Wish {
        path: &args.output,
        format: args.format,
        grid: args.grid || args.class.as_deref() == Some("all"),
        grid_named: args.grid,
        columns: columns.unwrap_or_else(|| (count as f64).sqrt().ceil() as usize),
        count,
        shape: info.image_shape(),
        force: args.force,
    })?;

    let options = Options {
        provider: args.provider,
        threads: args.threads.map(usize::from),
        ort_lib: args.ort_lib.clone(),
        trt_cache: args.trt_cache.clone(),
    };
    let model = Generator::load(file, &options)?;
    let loaded = started.elapsed();
    let choice = model.choice().clone();
    dmd_cli::say!("{} on {} ({})", info.name, choice.provider, choice.engine);
    for reason in &choice.passed_over {
        dmd_cli::say!("not taken: {reason}");
    }

    let progress = Progress::new(evaluated);
    let mut generate = || -> anyhow::Result<()> {
        for part in requests.iter().flat_map(|request| parts(&info, request)) {
            output.push(&model.sample(&part, &|n| progress.add(n))?)?;
        }
        Ok(())
    };
    let result = generate();
    let elapsed = progress.finish();
    result?;
    let written = output.finish()?;
    let report = Report {
        model: info.name.clone(),
        provider: choice.provider.name().to_owned(),
        engine: choice.engine,
        images: count,
        steps: steps(&info, args.steps)?,
        load_ms: loaded.as_secs_f64() * 1e3,
        ms_per_image: elapsed.as_secs_f64() * 1e3 / count as f64,
        peak_mib: peak_memory(),
    };
    let plural = |n: usize, word: &str| format!("{n} {word}{}", if n == 1 { "" } else { "s" });
    dmd_cli::say!(
        "{} in {}: {:.1} ms per image, {:.0} ms to load; wrote {written}",
        plural(report.images, "image"),
        plural(report.steps, "step"),
        report.ms_per_image,
        report.load_ms,
    );
    if let Some(path) = &args.report {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        save(path, text.as_bytes(), args.force)?;
    }
    Ok(())
}

/// One request for each seed, and the columns of a sheet where they have a meaning: a class each, or an image of the
/// same seed each.
fn requests(args: &SampleArgs, info: &ModelInfo) -> anyhow::Result<(Vec<Request>, Option<usize>)> {
    let steps = Some(steps(info, args.steps)?);
    let (class, per_class) = class_of(args, info)?;
    let count = (args.count as usize).checked_mul(per_class.unwrap_or(1));
    let Some(count) = count else { bail!("got {} images per class, which is too many", args.count) };
    let (first, sampler, guidance) = (0, args.sampler, args.guidance);
    let of_seed = |seed: u32, interpolation| {
        let request = Request::new(seed, count);
        Request { first, class, steps, sampler, guidance, interpolation, ..request }
    };
    let Some(ends) = args.interpolate else {
        let seeds = &args.seed.0;
        if count.checked_mul(seeds.len()).is_none() {
            bail!("got {} seeds with {count} images each, which is too many", seeds.len());
        }
        let row = (seeds.len() > 1 && count > 1).then_some(count);
        let requests = seeds.iter().map(|seed| of_seed(*seed, None)).collect();
        return Ok((requests, per_class.or(row)));
    };
    if per_class.is_some() {
        bail!("got --interpolate with --class all, expected one class: `--class C`, or class 0 without it");
    }
    if count < 2 {
        bail!("got {count} image to interpolate, expected at least 2\n\nhint: --count N, both ends included");
    }
    let interpolation = Interpolation { to: ends.to, frames: count as u64 };
    Ok((vec![of_seed(ends.from, Some(interpolation))], None))
}

/// The class of the images and, for `all`, how many classes there are.
fn class_of(args: &SampleArgs, info: &ModelInfo) -> anyhow::Result<(Class, Option<usize>)> {
    let known = classes(info);
    match (args.class.as_deref(), known) {
        (None, _) => Ok((Class::Cycle, None)),
        (Some("all"), Some(classes)) => Ok((Class::Cycle, Some(classes.count))),
        (Some("all"), None) => bail!("got --class all, but {} does not say which classes it has", info.name),
        (Some(text), _) => Ok((Class::One(find_class(info, text)?), None)),
    }
}
