//! `dmd-run verify`: a table with a row for each provider on stdout, or JSON.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, bail};
use dmd_core::golden::EXTENSION;
use dmd_runtime_native::verify::{Golden, Parity, Verification, verify as run};
use dmd_runtime_native::{ModelFile, Options, Provider};

use crate::VerifyArgs;

/// Compares a model with its golden file; exit code 1 where they differ.
pub fn verify(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let path = args.golden.clone().unwrap_or_else(|| args.model.with_extension(EXTENSION));
    let model = ModelFile::read(&args.model)?;
    let cannot = || format!("cannot verify `{}`", args.model.display());
    if args.golden.is_none() && !path.exists() {
        bail!(
            "{}: there is no `{}`\n\nhint: `dmd-export --golden` writes it beside the model",
            cannot(),
            path.display()
        );
    }
    let golden = Golden::read(&path, &model).with_context(cannot)?;
    let options = Options {
        provider: args.provider.unwrap_or(Provider::Auto),
        threads: args.threads.map(usize::from),
        ort_lib: args.ort_lib.clone(),
        trt_cache: None,
    };
    let wanted: Vec<Provider> = match args.provider {
        Some(provider) => vec![provider],
        None => super::usable(&model, &options),
    };
    if wanted.is_empty() {
        bail!("no provider is usable\n\nhint: `dmd-run providers` says why");
    }
    let found = run(&args.model, &golden, &wanted, &options)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&found)?)?;
    } else {
        write!(out, "{}", table(&found))?;
    }
    Ok(if found.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn table(found: &Verification) -> String {
    let golden = &found.golden;
    let noise = match found.noise_differs {
        0 => "the same to the bit".to_owned(),
        n => format!("{n} values differ: FAILED"),
    };
    let mut text = format!(
        "model     `{}`, {} weights\ngolden    images 0 to {} of seed {}, f32 weights\nnoise     {noise}\nallowed   {} \
         {:.2e}\n\n{:<9} {:>9} {:>9} {:>9} {:>8} {:>7} {:>6} {:>9}\n",
        golden.name,
        found.dtype,
        golden.count - 1,
        golden.seed,
        found.limit.measure,
        found.limit.value,
        "provider",
        "max abs",
        "mean abs",
        "rms rel",
        "PSNR dB",
        "pixels",
        "levels",
        "ms/image",
    );
    for parity in &found.providers {
        text.push_str(&row(parity));
    }
    text
}

fn row(parity: &Parity) -> String {
    let provider = parity.provider.name();
    let verdict = if parity.passed { "passed" } else { "FAILED" };
    let Some(n) = &parity.numbers else {
        let error = parity.error.as_deref().unwrap_or_default();
        return format!("{provider:<9} {verdict}: {error}\n");
    };
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    format!(
        "{provider:<9} {:>9.2e} {:>9.2e} {:>9.2e} {:>8} {:>7} {:>6} {:>9.2}  {verdict}  {}\n",
        n.max_abs,
        n.mean_abs,
        n.rms_relative,
        or_dash(n.psnr.map(|v| format!("{v:.1}"))),
        or_dash(n.pixels_differ.map(|v| v.to_string())),
        or_dash(n.levels_apart.map(|v| v.to_string())),
        n.ms_per_image,
        parity.engine.split(',').next().unwrap_or_default(),
    )
}
