//! The commands of `dmd-run`, and what they share: finding the model, exit codes.

mod bench;
mod describe;
mod output;
mod progress;
mod sample;
mod seeds;
mod verify;

use std::io::ErrorKind;
use std::path::Path;
use std::process::ExitCode;

use dmd_runtime_native::{BUNDLED, BUNDLED_NAME, ModelFile, Options, Provider, providers};

pub use bench::bench;
pub use describe::{info, providers};
pub use output::Format;
pub use sample::sample;
pub use seeds::{Ends, Seeds};
pub use verify::verify;

/// What `--help` says after the options.
pub const AFTER_HELP: &str = "\
Output:
  NAME.png  One image. Several become NAME-0000.png, NAME-0001.png, …, or one
            sheet NAME.png with --grid or --class all.
  NAME.npy  All images as one array, f32 [n, c, h, w], in the model's range.
  NAME.raw  All images as bytes: rows from the top, channels interleaved.
  -         Stdout: one PNG, a sheet if there are several images; with
            --format npy or raw what is said above.

onnxruntime is loaded from the file that --ort-lib or ORT_DYLIB_PATH names,
else from the first of: the folder of this program, lib in it, the active Python
environment, other Python installations, system folders. `dmd-run providers`
shows what was found.

Exit code: 0 done, 1 `verify` found a difference, 2 wrong usage or input.";

/// Opens the model that was named, else `./model.onnx`, else the bundled one.
fn open_model(path: Option<&Path>) -> dmd_runtime_native::Result<ModelFile> {
    let default = Path::new("model.onnx");
    match path {
        Some(path) => ModelFile::read(path),
        None if default.exists() => ModelFile::read(default),
        None => ModelFile::parse(BUNDLED_NAME, BUNDLED),
    }
}

/// The providers that run a model on this machine; those that do not are named on stderr.
fn usable(file: &ModelFile, options: &Options) -> Vec<Provider> {
    let mut usable = Vec::new();
    for status in providers::list(options) {
        let reason = match (status.usable, providers::runs(status.provider, file, options)) {
            (false, _) => status.reason.unwrap_or_default(),
            (true, Err(error)) => error.to_string().lines().next().unwrap_or_default().to_owned(),
            (true, Ok(())) => {
                usable.push(status.provider);
                continue;
            }
        };
        dmd_cli::say!("not run: {}: {reason}", status.provider);
    }
    usable
}

/// Prints an error; a reader that closed the pipe is none.
pub fn exit_code(result: anyhow::Result<ExitCode>) -> ExitCode {
    let error = match result {
        Ok(code) => return code,
        Err(error) => error,
    };
    let closed = |e: &std::io::Error| e.kind() == ErrorKind::BrokenPipe;
    if error.chain().any(|e| e.downcast_ref().is_some_and(closed)) {
        return ExitCode::SUCCESS;
    }
    dmd_cli::say!("error: {error:#}");
    ExitCode::from(2)
}
