//! `dmd-run`: the command line and nothing else.

mod cli;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use dmd_runtime_native::{Provider, Sampler};

use cli::{Ends, Format, Seeds};

/// Generate images from an ONNX model made by dmd-export
#[derive(Parser)]
#[command(name = "dmd-run", version, args_conflicts_with_subcommands = true, after_help = cli::AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    sample: SampleArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Show what a model file says about itself
    Info {
        /// ONNX file [default: ./model.onnx, else the bundled model]
        model: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List the providers: what is here, and why the rest is not
    Providers {
        /// The onnxruntime library to ask
        #[arg(long, value_name = "FILE")]
        ort_lib: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Compare what a model computes here with the golden file that `dmd-export --golden` wrote
    ///
    /// A row per provider: largest and mean absolute difference, root mean square difference relative to the expected
    /// values, PSNR, bytes of pictures that differ and by how many levels at most, time per image. Exit code 1 where
    /// noise differs or a provider is beyond what is allowed: for f32 1e-4 in what the network predicts, for f16 and int8
    /// 2e-3 and 2e-2 of the root mean square.
    Verify(VerifyArgs),
    /// Measure how fast a model runs here
    ///
    /// Network evaluations of every provider, number of threads and number of images, providers in turn; then whole
    /// processes from their start to one picture on disk, with their memory.
    Bench(BenchArgs),
}

#[derive(Args)]
struct BenchArgs {
    /// ONNX file [default: ./model.onnx, else the bundled model]
    model: Option<PathBuf>,
    /// What runs the network; several separated by commas [default: every usable provider]
    #[arg(long, value_delimiter = ',', hide_possible_values = false, value_parser = provider())]
    provider: Vec<Provider>,
    /// Numbers of threads [default: 1, 2, 4, … and one per core]
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Vec<u16>,
    /// Numbers of images per evaluation
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "1,16", value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: Vec<u16>,
    /// Time for each number of threads and images; 5 rounds at least
    #[arg(long, value_name = "S", default_value_t = 10.0)]
    seconds: f64,
    /// Processes per provider for the time from start to picture
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u16).range(0..=1000))]
    starts: u16,
    /// Evaluate once for every line on stdin and print the milliseconds, for comparing with other programs in turn
    #[arg(long, conflicts_with = "json")]
    on_request: bool,
    /// The onnxruntime library to load [default: searched]
    #[arg(long, value_name = "FILE")]
    ort_lib: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct VerifyArgs {
    /// ONNX file
    model: PathBuf,
    /// Golden file [default: MODEL with .golden.safetensors for .onnx]
    golden: Option<PathBuf>,
    /// What runs the network [default: every usable provider]
    #[arg(long, hide_possible_values = false, value_parser = provider())]
    provider: Option<Provider>,
    /// Threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// The onnxruntime library to load [default: searched]
    #[arg(long, value_name = "FILE")]
    ort_lib: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct SampleArgs {
    /// ONNX file [default: ./model.onnx, else the bundled model]
    model: Option<PathBuf>,
    /// Steps per image [default: 1 for a generator, 50 for a teacher]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// What the steps of a teacher are: ddim (deterministic), ddpm (ancestral, adds noise), heun (second order, two network
    /// evaluations per step)
    #[arg(long, value_name = "NAME", default_value = "ddim", value_parser = sampler())]
    sampler: Sampler,
    /// Classifier-free guidance of a teacher with classes; 1 is none
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    guidance: f64,
    /// Seed of the noise; image k of a seed is always the same. Several as a list, 1,5,9, or a range, 3..7, which is 3 to
    /// 7 with both ends
    #[arg(long, value_name = "N", default_value = "0")]
    seed: Seeds,
    /// Number of images per seed; with `--class all`, of each class
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// From image 0 of seed A to image 0 of seed B in --count images of one class, along the great arc between their
    /// noise
    #[arg(long, value_name = "A..B", conflicts_with = "seed")]
    interpolate: Option<Ends>,
    /// Class of all images by number or name, or `all` for a grid with a column per class [default: image k has
    /// class k mod number of classes]
    #[arg(long, value_name = "C")]
    class: Option<String>,
    /// What runs the network; auto is cuda, engine, cpu or tract, whichever is first to be usable; the others are taken
    /// where they are named
    #[arg(long, default_value = "auto", hide_possible_values = false, value_parser = provider())]
    provider: Provider,
    /// Threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// The onnxruntime library to load [default: searched, see below]
    #[arg(long, value_name = "FILE")]
    ort_lib: Option<PathBuf>,
    /// Folder where TensorRT keeps the engines it builds [default: dmd/tensorrt in the user's cache folder]
    #[arg(long, value_name = "DIR")]
    trt_cache: Option<PathBuf>,
    /// Where to write: NAME.png, NAME.npy, NAME.raw, or - for stdout, see below
    #[arg(short, long, value_name = "FILE", default_value = "samples.png")]
    output: PathBuf,
    /// What to write [default: what the name of the output says, png on stdout]
    #[arg(long, value_name = "FORMAT", value_enum)]
    format: Option<Format>,
    /// Put all images on one sheet
    #[arg(long)]
    grid: bool,
    /// Also write time and memory as JSON into a file; it is replaced
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Replace existing files
    #[arg(long)]
    force: bool,
}

fn provider() -> impl TypedValueParser<Value = Provider> {
    PossibleValuesParser::new(Provider::NAMES).try_map(|name| name.parse::<Provider>())
}

fn sampler() -> impl TypedValueParser<Value = Sampler> {
    PossibleValuesParser::new(Sampler::NAMES).try_map(|name| name.parse::<Sampler>())
}

fn main() -> ExitCode {
    let Cli { command, sample } = dmd_cli::parse();
    let done = |()| ExitCode::SUCCESS;
    cli::exit_code(match command {
        Some(Command::Info { model, json }) => cli::info(model.as_deref(), json).map(done),
        Some(Command::Providers { ort_lib, json }) => cli::providers(ort_lib, json).map(done),
        Some(Command::Verify(args)) => cli::verify(&args),
        Some(Command::Bench(args)) => cli::bench(&args).map(done),
        None => cli::sample(&sample).map(done),
    })
}
