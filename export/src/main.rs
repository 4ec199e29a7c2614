//! `dmd-export`: the command line over the library. No knowledge of networks or of ONNX.

mod write;

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use dmd_core::golden::EXTENSION;
use dmd_export::locate::locate;
use dmd_export::quantise::Method;
use dmd_export::{Checkpoint, Error, External, Form, Kind, Precision, Summary, export_in, golden};

use crate::write::{File, write};

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
    /// channel), with arithmetic in f32; or qdq, which also computes convolutions in 8-bit integers (generators only; onnxruntime
    /// only). Input and output are f32 in all of them. For generators of up to 200 million multiply-accumulate operations per
    /// image (qdq: all) the card says what it costs
    #[arg(long, value_name = "f32|f16|int8|qdq", default_value_t)]
    dtype: Precision,
    /// How ranges of activations are found for --dtype qdq, on 32 images of the generator's own noise: smallest to largest value,
    /// without the outermost 0.005 %, or with the least mean squared error
    #[arg(long, value_name = "min-max|percentile|mse", default_value_t)]
    calibration: Method,
    /// Images per call, fixed in the file [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    batch: Option<u16>,
    /// Add the output `image`: `x_gen` as bytes, u8 [n, height, width, channels], rounded as dmd-run rounds pictures
    #[arg(long)]
    image: bool,
    /// Version of ONNX's operator set, 14 to 22
    #[arg(long, value_name = "N", default_value_t = dmd_export::model::OPSET)]
    opset: i64,
    /// Put the weights into OUT.data beside OUT; without this, only if the file would exceed ONNX's 2 GB
    #[arg(long)]
    external_data: bool,
    /// Write OUT's expected outputs beside it, as NAME.golden.safetensors, for `dmd-run verify`: 8 images of seed 0 by a
    /// plain evaluation of the network, which does about half a billion multiply-accumulate operations per second and core
    #[arg(long)]
    golden: bool,
    /// Replace files that exist
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
  dmd-export model.onnx --golden && dmd-run verify model.onnx
  dmd-export npu.onnx --batch 1 --image             fixed shapes, pictures as bytes
  dmd-export base.onnx --from assets/ddpm-fashion --teacher
  dmd-run model.onnx --seed 7 -o images.png         try it

Exit status: 0 done, 1 the graph broke a rule of exported files (nothing is written), 2 wrong usage or input.";

fn main() -> ExitCode {
    match run(&dmd_cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            dmd_cli::say!("error: {error:#}");
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
    let golden_path = out.with_extension(EXTENSION);
    let mut data_path = out.clone().into_os_string();
    data_path.push(".data");
    let data_path = PathBuf::from(data_path);
    let targets = [(out, true), (&golden_path, arguments.golden), (&data_path, arguments.external_data)];
    let taken = targets.iter().find(|(path, written)| *written && path.exists());
    if let (Some((path, _)), false, false) = (taken, arguments.force, arguments.dry_run) {
        bail!("cannot write `{}`: it exists\n\nhint: add --force to replace it", path.display());
    }
    let kind = if arguments.teacher { Kind::Teacher } else { Kind::Generator };
    let dir = locate(arguments.from.as_deref(), Path::new("runs"), kind)?;
    let name = data_path.file_name().and_then(|name| name.to_str());
    let name = name.with_context(|| format!("cannot write `{}`: its name is not UTF-8", out.display()))?;
    let form = Form {
        precision: arguments.dtype,
        calibration: arguments.calibration,
        batch: arguments.batch.map(usize::from),
        image: arguments.image,
        opset: arguments.opset,
        external: if arguments.external_data { External::Always } else { External::AboveLimit }(name.into()),
    };
    let cannot = || format!("cannot export `{}`", dir.display());
    let checkpoint = Checkpoint::load(&dir).with_context(cannot)?;
    let exported = export_in(&checkpoint, kind, &form).with_context(cannot)?;
    dmd_cli::say!("{}", describe(&exported.summary, &dir, out, arguments.dry_run).trim_end());
    if !arguments.dry_run {
        let mut files = Vec::new();
        if arguments.golden {
            let bytes = golden::file(&checkpoint, &exported).with_context(cannot)?;
            files.push(File { path: golden_path, bytes });
        }
        let apart = exported.data.is_some();
        files.extend(exported.data.map(|bytes| File { path: data_path, bytes }));
        files.push(File { path: out.clone(), bytes: exported.bytes });
        write(&files, arguments.force, apart)?;
        for file in files.iter().rev() {
            dmd_cli::say!("  wrote {} ({:.2} MB)", file.path.display(), file.bytes.len() as f64 / 1e6);
        }
    }
    if arguments.json {
        writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&exported.summary)?)?;
    }
    Ok(())
}

fn describe(summary: &Summary, dir: &Path, out: &Path, dry_run: bool) -> String {
    let operators: Vec<String> = summary.operators.iter().map(|(op, n)| format!("{n} {op}")).collect();
    let kind = if summary.kind == Kind::Generator { "generator" } else { "teacher" };
    let size = (summary.bytes + summary.data_bytes) as f64 / 1e6;
    let would =
        if dry_run { format!("  would write {} ({size:.2} MB)\n", out.display()) } else { String::new() };
    format!(
        "{kind} `{}` from {}\n  operators   {}: {}\n  parameters  {} stored, {} in the checkpoint\n  \
         MACs        {:.2} million per image\n{would}",
        summary.name,
        dir.display(),
        summary.nodes,
        operators.join(", "),
        summary.parameters,
        summary.checkpoint_parameters,
        summary.macs as f64 / 1e6,
    )
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe)
}
