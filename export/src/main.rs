//! `dmd-export`: the command line over the library. No knowledge of networks or of ONNX.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use dmd_export::locate::locate;
use dmd_export::{Checkpoint, Error, Kind, Precision, Summary, export_in};

/// Write a distilled generator as a single ONNX file
///
/// The file maps noise `z` [n, channels, height, width] (and `class` [n], if the model knows classes) to images
/// `x_gen`. Everything that does not depend on the image is computed now and is no part of the file. What a runtime
/// must know is inside, as JSON in `metadata_props` under `dmd.card`.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Arguments {
    /// File to write, ending in .onnx
    out: PathBuf,
    /// Run or checkpoint directory [default: the newest run in runs/]
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    /// Write the base model that was distilled: `x_t`, `t` (and `class`) to `eps_pred`
    #[arg(long)]
    teacher: bool,
    /// How weights are stored: f32, f16 (half the size), or int8 (a quarter: convolutions and linear layers with a scale per
    /// channel). Arithmetic, input and output are f32 in all of them
    #[arg(long, value_name = "f32|f16|int8", default_value_t)]
    dtype: Precision,
    /// Replace OUT if it exists
    #[arg(long)]
    force: bool,
    /// Print operators, parameters and file size; write nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the summary as JSON on stdout
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  dmd-export model.onnx                             the generator of the newest run
  dmd-export model.onnx --from runs/fashion         the generator of that run
  dmd-export small.onnx --dtype int8                a quarter of the size
  dmd-export base.onnx --from assets/ddpm-fashion --teacher
  dmd-run model.onnx --seed 7 -o images.png         try it

Exit status: 0 done, 1 the graph broke a rule of exported files (nothing is written), 2 wrong usage or input.";

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            let verification = matches!(error.downcast_ref::<Error>(), Some(Error::Verify(_)));
            ExitCode::from(if verification { 1 } else { 2 })
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let out = &arguments.out;
    if out.extension().is_none_or(|e| e != "onnx") {
        bail!("cannot write `{}`: the name must end in `.onnx`", out.display());
    }
    if out.exists() && !arguments.force && !arguments.dry_run {
        bail!("cannot write `{}`: it exists\n\nhint: add --force to replace it", out.display());
    }
    let kind = if arguments.teacher { Kind::Teacher } else { Kind::Generator };
    let dir = locate(arguments.from.as_deref(), Path::new("runs"), kind)?;
    let exported = Checkpoint::load(&dir)
        .and_then(|checkpoint| export_in(&checkpoint, kind, arguments.dtype))
        .with_context(|| format!("cannot export `{}`", dir.display()))?;
    if !arguments.dry_run {
        write(out, &exported.bytes, arguments.force)
            .with_context(|| format!("cannot write `{}`", out.display()))?;
    }
    eprint!("{}", describe(&exported.summary, &dir, out, arguments.dry_run));
    if arguments.json {
        writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&exported.summary)?)?;
    }
    Ok(())
}

fn describe(summary: &Summary, dir: &Path, out: &Path, dry_run: bool) -> String {
    let operators: Vec<String> = summary.operators.iter().map(|(op, n)| format!("{n} {op}")).collect();
    let kind = if summary.kind == Kind::Generator { "generator" } else { "teacher" };
    let done = if dry_run { "would write" } else { "wrote" };
    format!(
        "{kind} `{}` from {}\n  operators   {}: {}\n  parameters  {} stored, {} in the checkpoint\n  \
         MACs        {:.2} million per image\n  {done} {} ({:.2} MB)\n",
        summary.name,
        dir.display(),
        summary.nodes,
        operators.join(", "),
        summary.parameters,
        summary.checkpoint_parameters,
        summary.macs as f64 / 1e6,
        out.display(),
        summary.bytes as f64 / 1e6,
    )
}

/// Writes a temporary file beside `out` and moves it there, so that `out` is either absent, old or whole.
fn write(out: &Path, bytes: &[u8], replace: bool) -> Result<()> {
    let parent = match out.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    if !parent.is_dir() {
        bail!("there is no directory `{}`", parent.display());
    }
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.prefix(".dmd-export-").tempfile_in(parent)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    if replace {
        file.persist(out)?;
    } else {
        file.persist_noclobber(out)?;
    }
    Ok(())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe)
}
