//! The providers a model can run on: their names, which one `auto` means, and what is here and why the rest is not.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::embedded::Embedded;
use crate::engine;
use crate::file::ModelFile;
use crate::generator::{Engine, Options};
#[cfg(feature = "tract")]
use crate::tract;
use crate::{Error, Result};

/// What runs the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// `cuda` if usable, else `engine`, or for a file that this one does not run `cpu` if an onnxruntime library is found,
    /// else `tract`: the fastest of those that compute in f32 throughout, without building an engine first. The others
    /// are taken where they are named. With [`Options::ort_lib`], `cuda` or `cpu`.
    #[default]
    Auto,
    /// The project's own engine, compiled into this crate: files of `dmd-export`.
    Engine,
    /// tract, compiled into this crate: other ONNX files too.
    Tract,
    /// onnxruntime on the CPU.
    Cpu,
    /// onnxruntime on an NVIDIA GPU.
    Cuda,
    /// onnxruntime through TensorRT, with CUDA for the operators it does not take.
    Tensorrt,
    /// onnxruntime through Apple's CoreML.
    Coreml,
    /// onnxruntime through DirectML, on any GPU of Windows.
    Directml,
    /// onnxruntime through Intel's OpenVINO.
    Openvino,
    /// onnxruntime through XNNPACK, on the CPU.
    Xnnpack,
    /// onnxruntime through WebGPU: Vulkan, Metal or Direct3D.
    Webgpu,
}

/// The provider that was taken.
#[derive(Clone, Debug, Serialize)]
pub struct Choice {
    /// Never [`Provider::Auto`].
    pub provider: Provider,
    /// The engine and its version, with the library's path if it is one.
    pub engine: String,
    /// Why `auto` did not take the providers it prefers.
    pub passed_over: Vec<String>,
}

/// Whether a provider can be had on this machine.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The provider.
    pub provider: Provider,
    /// Whether this build of the program knows it.
    pub compiled: bool,
    /// The engine and its version, with the library's path if it is one; none if no library was found.
    pub engine: Option<String>,
    /// Whether that library was built with the provider, or has it as a plugin.
    pub in_library: Option<bool>,
    /// Whether a model would run on it now.
    pub usable: bool,
    /// Why not.
    pub reason: Option<String>,
    /// What to do about it.
    pub remedy: Option<String>,
}

impl Provider {
    /// The names, in the order of the enum.
    pub const NAMES: [&str; 11] = [
        "auto", "engine", "tract", "cpu", "cuda", "tensorrt", "coreml", "directml", "openvino", "xnnpack",
        "webgpu",
    ];
    /// The real ones.
    pub const ALL: [Self; 10] = [
        Self::Engine,
        Self::Tract,
        Self::Cpu,
        Self::Cuda,
        Self::Tensorrt,
        Self::Coreml,
        Self::Directml,
        Self::Openvino,
        Self::Xnnpack,
        Self::Webgpu,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    /// Whether this build knows it.
    pub fn compiled(self) -> bool {
        match self {
            Self::Auto | Self::Engine => true,
            Self::Tract => cfg!(feature = "tract"),
            Self::Cpu => cfg!(feature = "ort"),
            _ => cfg!(feature = "ort-load"),
        }
    }

    /// Whether it is an engine inside the program, which needs no library.
    pub fn embedded(self) -> bool {
        matches!(self, Self::Engine | Self::Tract)
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Provider {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut all = std::iter::once(Self::Auto).chain(Self::ALL);
        all.find(|p| p.name() == text).ok_or_else(|| {
            Error::Request(format!("got provider `{text}`, expected one of {}", Self::NAMES.join(", ")))
        })
    }
}

/// Asks every provider whether a model would run on it now.
pub fn list(options: &Options) -> Vec<Status> {
    Provider::ALL.into_iter().map(|provider| status(provider, options)).collect()
}

fn status(provider: Provider, options: &Options) -> Status {
    let compiled = provider.compiled();
    let (engine, in_library, result) = match provider {
        _ if !compiled => (None, None, Err(not_compiled(provider))),
        Provider::Engine => (Some(compiled_in(engine::NAME)), None, Ok(())),
        #[cfg(feature = "tract")]
        Provider::Tract => (Some(compiled_in(tract::NAME)), None, Ok(())),
        _ => probe(provider, options),
    };
    let (reason, remedy) = match result {
        Ok(()) => (None, None),
        Err(Error::Provider { reason, remedy, .. }) => (Some(reason), Some(remedy)),
        Err(other) => (Some(other.to_string()), None),
    };
    Status { provider, compiled, engine, in_library, usable: reason.is_none(), reason, remedy }
}

#[cfg(feature = "ort")]
fn probe(provider: Provider, options: &Options) -> (Option<String>, Option<bool>, Result<()>) {
    let library = match crate::library::load(options.ort_lib.as_deref()) {
        Ok(library) => library,
        Err(missing) => return (None, None, Err(missing.for_provider(provider))),
    };
    let in_library = crate::devices::in_library(provider, &library).is_ok();
    (Some(library.name()), Some(in_library), crate::devices::probe(provider, options))
}

#[cfg(not(feature = "ort"))]
fn probe(provider: Provider, _: &Options) -> (Option<String>, Option<bool>, Result<()>) {
    (None, None, Err(not_compiled(provider)))
}

/// Whether an embedded engine runs a file; the reason if not.
pub fn runs(provider: Provider, file: &ModelFile, options: &Options) -> Result<()> {
    match provider {
        Provider::Engine => open_named(provider, file, options).map(drop),
        Provider::Tract if file.info.in_integers() => open_named(provider, file, options).map(drop),
        _ => Ok(()),
    }
}

/// Loads the model into the engine that `options` ask for.
pub(crate) fn open(file: &ModelFile, options: &Options) -> Result<(Engine, Choice)> {
    if options.trt_cache.is_some() && options.provider != Provider::Tensorrt {
        return Err(Error::Request(format!(
            "got a folder for TensorRT's engines, but the provider `{}`, expected `tensorrt`",
            options.provider
        )));
    }
    if options.ort_lib.is_some() && options.provider.embedded() {
        return Err(Error::Request(format!(
            "got an onnxruntime library for the provider `{}`, which uses none",
            options.provider
        )));
    }
    match options.provider {
        Provider::Auto => open_auto(file, options),
        provider => open_named(provider, file, options),
    }
}

fn open_auto(file: &ModelFile, options: &Options) -> Result<(Engine, Choice)> {
    let named = options.ort_lib.is_some(); // then it is to run the file
    let mut passed_over = Vec::new();
    let mut order = Vec::new();
    #[cfg_attr(
        not(feature = "ort"),
        expect(unused_mut, reason = "only the search for its library takes it away")
    )]
    let mut cpu = Provider::Cpu.compiled();
    // Loading the library takes longer than most models.
    #[cfg(feature = "ort")]
    if named || crate::library::wanted() {
        match crate::library::load(options.ort_lib.as_deref()) {
            Ok(library) => {
                let cuda =
                    Provider::Cuda.compiled() && crate::devices::in_library(Provider::Cuda, &library).is_ok();
                order.extend(cuda.then_some(Provider::Cuda));
            }
            Err(problem) if named => return Err(problem.for_provider(Provider::Cpu)),
            Err(problem) => {
                passed_over.push(format!("onnxruntime: {}", problem.reason));
                cpu = false;
            }
        }
    }
    if named {
        order.extend(cpu.then_some(Provider::Cpu));
    } else {
        let tract = Provider::Tract.compiled();
        order.push(Provider::Engine);
        order.extend(cpu.then_some(Provider::Cpu));
        order.extend(tract.then_some(Provider::Tract));
    }
    let mut failed = not_compiled(Provider::Cpu);
    for provider in order {
        match open_named(provider, file, options) {
            Ok((engine, choice)) => return Ok((engine, Choice { passed_over, ..choice })),
            Err(error) => {
                passed_over
                    .push(format!("{provider}: {}", error.to_string().lines().next().unwrap_or_default()));
                failed = error;
            }
        }
    }
    Err(failed)
}

fn open_named(provider: Provider, file: &ModelFile, options: &Options) -> Result<(Engine, Choice)> {
    match provider {
        Provider::Engine => {
            let own = Embedded::open(engine::NAME, file, options, engine::Own::open)?;
            Ok((Engine::Embedded(own), chosen(provider, compiled_in(engine::NAME))))
        }
        #[cfg(feature = "tract")]
        Provider::Tract => {
            let tract = Embedded::open(tract::NAME, file, options, tract::Tract::open)?;
            Ok((Engine::Embedded(tract), chosen(provider, compiled_in(tract::NAME))))
        }
        #[cfg(feature = "ort")]
        Provider::Cpu => open_ort(provider, file, options),
        #[cfg(feature = "ort-load")]
        Provider::Cuda
        | Provider::Tensorrt
        | Provider::Coreml
        | Provider::Directml
        | Provider::Openvino
        | Provider::Xnnpack
        | Provider::Webgpu => open_ort(provider, file, options),
        _ => Err(not_compiled(provider)),
    }
}

#[cfg(feature = "ort")]
fn open_ort(provider: Provider, file: &ModelFile, options: &Options) -> Result<(Engine, Choice)> {
    let (engine, name) = crate::ort::Ort::open(provider, file, options)?;
    Ok((Engine::Ort(engine.into()), chosen(provider, name)))
}

fn not_compiled(provider: Provider) -> Error {
    let feature = if provider == Provider::Tract { "tract" } else { "ort-load" };
    Error::Provider {
        provider,
        reason: format!("this build lacks the cargo feature `{feature}`"),
        remedy: format!("build dmd-run with its default features, or with `--features {feature}`"),
    }
}

fn chosen(provider: Provider, engine: String) -> Choice {
    Choice { provider, engine, passed_over: Vec::new() }
}

fn compiled_in(name: &str) -> String {
    format!("{name}, compiled in")
}
