//! `dmd-run bench`: a table on stdout, or JSON. Starts are measured by running this program, as a user would.

use std::io::{BufRead, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use dmd_runtime_native::bench::{Inputs, Plan, Row, Times, bench as measure};
use dmd_runtime_native::{Generator, Options, Provider};
use serde::Serialize;

use super::sample::Report;
use crate::BenchArgs;

/// What a provider needs from the start of the process to the picture on disk.
#[derive(Serialize)]
struct Start {
    provider: Provider,
    threads: usize,
    /// Milliseconds.
    ms: Times,
    /// The most memory of any of these processes, where the system says so.
    peak_mib: Option<f64>,
}

#[derive(Serialize)]
struct Found {
    model: String,
    rows: Vec<Row>,
    starts: Vec<Start>,
}

/// Runs the command.
pub fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    let path = args.model.as_deref();
    let file = super::open_model(path)?;
    let options = Options { ort_lib: args.ort_lib.clone(), ..Options::default() };
    let threads: Vec<usize> = args.threads.iter().map(|n| usize::from(*n)).collect();
    let threads = if threads.is_empty() { default_threads(&options) } else { threads };
    if args.on_request {
        return answer(args, file, &options, &threads);
    }
    let mut list =
        if args.provider.is_empty() { super::usable(&file, &options) } else { args.provider.clone() };
    let mut seen = Vec::new();
    list.retain(|provider| {
        !seen.contains(provider) && {
            seen.push(*provider);
            true
        }
    });
    let time = Duration::try_from_secs_f64(args.seconds).context("--seconds")?;
    let batches = args.batch.iter().map(|n| usize::from(*n)).collect();
    let plan = Plan { providers: list, threads, batches, time };
    let rows = measure(&|| super::open_model(path), &options, &plan)?;
    let starts = starts(args, &plan)?;
    let found = Found { model: file.info.name.clone(), rows, starts };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&found)?)?;
    } else {
        write!(out, "{}", table(&found))?;
    }
    Ok(())
}

/// 1, 2, 4, … and all.
fn default_threads(options: &Options) -> Vec<usize> {
    let all = options.threads();
    let mut threads: Vec<usize> =
        std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|n| *n < all).collect();
    threads.push(all);
    threads
}

/// Times whole processes, in turn.
fn starts(args: &BenchArgs, plan: &Plan) -> anyhow::Result<Vec<Start>> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let threads = plan.threads.iter().copied().max().unwrap_or(1);
    let mut found: Vec<(Provider, Vec<f64>, Option<f64>)> =
        plan.providers.iter().map(|provider| (*provider, Vec::new(), None)).collect();
    for _ in 0..args.starts {
        for (provider, times, peak) in &mut found {
            let report = folder.path().join("report.json");
            let mut command = Command::new(&program);
            command.args(&args.model).args(["--provider", provider.name(), "--force"]);
            command.args(["--threads", &threads.to_string()]);
            command.arg("--output").arg(folder.path().join("image.png")).arg("--report").arg(&report);
            if let Some(library) = args.ort_lib.as_ref().filter(|_| !provider.embedded()) {
                command.arg("--ort-lib").arg(library);
            }
            let start = Instant::now();
            let done = command.stdin(Stdio::null()).output().context("cannot start this program")?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
            if !done.status.success() {
                bail!("{provider}: {}", String::from_utf8_lossy(&done.stderr).trim());
            }
            let report: Report = serde_json::from_slice(&std::fs::read(&report)?)?;
            *peak = report.peak_mib.map(|mib| peak.map_or(mib, |other: f64| other.max(mib)));
        }
        found.reverse();
    }
    found.sort_by_key(|(provider, ..)| plan.providers.iter().position(|p| p == provider));
    Ok(found
        .into_iter()
        .filter(|(_, times, _)| !times.is_empty())
        .map(|(provider, ms, peak_mib)| Start { provider, threads, ms: Times::of(ms), peak_mib })
        .collect())
}

/// One evaluation for every line on stdin, so that another program can alternate with this one.
fn answer(
    args: &BenchArgs,
    file: dmd_runtime_native::ModelFile,
    options: &Options,
    threads: &[usize],
) -> anyhow::Result<()> {
    let ([provider], [threads], [batch]) = (&args.provider[..], threads, &args.batch[..]) else {
        bail!("got --on-request with several cases, expected one --provider, one --threads and one --batch");
    };
    let options = Options { provider: *provider, threads: Some(*threads), ..options.clone() };
    let model = Generator::load(file, &options)?;
    let inputs = Inputs::new(&model, usize::from(*batch));
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        line?;
        writeln!(out, "{}", inputs.time(&model)?)?;
        out.flush()?;
    }
    Ok(())
}

fn table(found: &Found) -> String {
    let mut text = format!(
        "{}\n\n{:<9} {:>7} {:>5} {:>9} {:>9} {:>9} {:>7} {:>5} {:>9}\n",
        found.model, "provider", "threads", "batch", "min ms", "median", "p95", "spread", "runs", "images/s"
    );
    for Row { provider, threads, batch, ms, images_per_second, .. } in &found.rows {
        let (name, times) = (provider.name(), columns(ms));
        text.push_str(&format!("{name:<9} {threads:>7} {batch:>5} {times} {images_per_second:>9.1}\n"));
    }
    if !found.starts.is_empty() {
        text.push_str("\nfrom the start of the process to one picture on disk\n");
    }
    for Start { provider, threads, ms, peak_mib } in &found.starts {
        let peak = peak_mib.map(|mib| format!(", peak memory {mib:.0} MiB")).unwrap_or_default();
        let (name, times) = (provider.name(), columns(ms));
        text.push_str(&format!("{name:<9} {threads:>7}       {times}{peak}\n"));
    }
    text
}

/// Least, median, 95th percentile, spread, number of runs.
fn columns(ms: &Times) -> String {
    let Times { runs, min, median, p95, spread } = ms;
    format!("{min:>9.2} {median:>9.2} {p95:>9.2} {:>6.0}% {runs:>5}", spread * 100.0)
}
