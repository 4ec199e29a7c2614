//! `dmd-run [MODEL]`: checks the request, loads the model, generates, writes.

use std::time::Instant;

use anyhow::bail;
use dmd_runtime_native::file::ModelInfo;
use dmd_runtime_native::generator::{classes, evaluations, find_class, steps};
use dmd_runtime_native::{Class, Model, Options, Request};

use super::output::{Output, Wish};
use super::progress::Progress;
use crate::SampleArgs;

/// Runs the command.
pub fn sample(args: &SampleArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let file = super::open_model(args.model.as_deref())?;
    let info = file.info.clone();
    if info.card.is_none() {
        eprintln!("warning: {} has no model card: values in [-1, 1] are assumed", info.name);
    }
    let steps = steps(&info, args.steps)?;
    let (class, per_class) = class_of(args, &info)?;
    let count = args.count as usize * per_class.unwrap_or(1);
    let (seed, sampler, guidance) = (args.seed, args.sampler, args.guidance);
    let request = Request { seed, first: 0, count, class, steps: Some(steps), sampler, guidance };
    let evaluations = evaluations(&info, &request)?;
    let output = Output::plan(&Wish {
        path: &args.output,
        grid: args.grid || per_class.is_some(),
        grid_named: args.grid,
        columns: per_class.unwrap_or_else(|| (count as f64).sqrt().ceil() as usize),
        count,
        channels: info.image.channels,
        force: args.force,
    })?;

    let options = Options {
        provider: args.provider,
        threads: args.threads.map(usize::from),
        ort_lib: args.ort_lib.clone(),
        trt_cache: args.trt_cache.clone(),
    };
    let mut model = Model::load(file, &options)?;
    let loaded = started.elapsed();
    let choice = model.choice();
    eprintln!("{} on {} ({})", info.name, choice.provider, choice.engine);
    for reason in &choice.passed_over {
        eprintln!("not taken: {reason}");
    }

    let progress = Progress::new((count * evaluations) as u64);
    let result = model.generate(&request, &|n| progress.add(n));
    let elapsed = progress.finish();
    output.write(&result?)?;
    let each = elapsed.as_secs_f64() * 1e3 / count as f64;
    let plural = |n: usize, word: &str| format!("{n} {word}{}", if n == 1 { "" } else { "s" });
    eprintln!(
        "{} in {}: {each:.1} ms per image, {:.0} ms to load; wrote {}",
        plural(count, "image"),
        plural(steps, "step"),
        loaded.as_secs_f64() * 1e3,
        output.name()
    );
    Ok(())
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
