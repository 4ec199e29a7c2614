//! Sessions of onnxruntime's providers: the options each takes, whether it can be had here, and a session of its own
//! to find out. A provider that was named either works or is an error; operators that it has no kernel for are computed on the
//! CPU only where it says so (`ort`).

use dmd_engine::message::{
    Attribute, Dimension, Graph, Model, Node, OperatorSet, Shape, Tensor, TensorType, Type, ValueInfo,
    data_type,
};
#[cfg(feature = "ort-load")]
use ort::ep::{self, ExecutionProvider, ExecutionProviderDispatch};
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::TensorRef;
use prost::Message;

use crate::generator::Options;
use crate::library::{self, Library};
#[cfg(feature = "ort-load")]
use crate::plugins;
use crate::remedies;
use crate::{Error, Provider, Result};

/// How onnxruntime calls the provider that may come as a plugin.
#[cfg(feature = "ort-load")]
const WEBGPU: &str = "WebGpuExecutionProvider";
/// Rows and columns of the probe's image.
const SIDE: usize = 4;

/// Whether the library was built with a provider, or has it as a plugin; the reason if not.
#[cfg_attr(not(feature = "ort-load"), expect(unused_variables, reason = "only plugins lie beside a library"))]
pub(crate) fn in_library(provider: Provider, library: &Library) -> Result<(), String> {
    if let Some(system) = remedies::other_system(provider) {
        return Err(system);
    }
    #[cfg(feature = "ort-load")]
    let built_in = match provider {
        Provider::Cuda => ep::CUDA::is_available(),
        Provider::Tensorrt => ep::TensorRT::is_available(),
        Provider::Coreml => ep::CoreML::is_available(),
        Provider::Directml => ep::DirectML::is_available(),
        Provider::Openvino => ep::OpenVINO::is_available(),
        Provider::Xnnpack => ep::XNNPACK::is_available(),
        Provider::Webgpu => return webgpu(library).map(drop),
        Provider::Auto | Provider::Engine | Provider::Tract | Provider::Cpu => Ok(true),
    };
    #[cfg(not(feature = "ort-load"))]
    let built_in: ort::Result<bool> = Ok(provider == Provider::Cpu);
    match built_in {
        Ok(true) => Ok(()),
        Ok(false) => Err("the onnxruntime library was built without it".to_owned()),
        Err(e) => Err(e.to_string()),
    }
}

/// The library, and a session of the provider that waits for its model. `integers`: the model computes in 8 bits.
pub(crate) fn builder(
    provider: Provider,
    options: &Options,
    integers: bool,
) -> Result<(Library, SessionBuilder)> {
    let library = library::load(options.ort_lib.as_deref()).map_err(|e| e.for_provider(provider))?;
    in_library(provider, &library).map_err(|reason| Error::Provider {
        provider,
        reason: format!("{reason} ({})", library.name()),
        remedy: remedies::other_library(provider),
    })?;
    let failed = |e: &ort::Error| unusable(provider, e);
    let builder = plain(provider, &library, options, integers).map_err(|e| failed(&e))?;
    #[cfg(feature = "ort-load")]
    let builder = with_provider(builder, provider, &library, options)?;
    Ok((library, builder))
}

/// Asks whether a model would run now: a convolution, on this provider alone.
pub(crate) fn probe(provider: Provider, options: &Options) -> Result<()> {
    let (_, builder) = builder(provider, options, false)?;
    let run = || -> ort::Result<()> {
        // onnxruntime refuses this option for its CPU provider, which is the one to fall back to.
        let mut builder =
            if provider == Provider::Cpu { builder } else { builder.with_disable_cpu_fallback()? };
        let mut session = builder.commit_from_memory(&tiny_model())?;
        let x = [0.5f32; SIDE * SIDE];
        session.run(ort::inputs!["x" => TensorRef::from_array_view(([1, 1, SIDE, SIDE], &x[..]))?])?;
        Ok(())
    };
    run().map_err(|e| unusable(provider, &e))
}

/// An error of onnxruntime in one line.
pub(crate) fn one_line(error: &ort::Error) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn unusable(provider: Provider, error: &ort::Error) -> Error {
    let (reason, remedy) = remedies::explain(provider, &one_line(error));
    Error::Provider { provider, reason, remedy }
}

fn plain(
    provider: Provider,
    library: &Library,
    options: &Options,
    integers: bool,
) -> ort::Result<SessionBuilder> {
    // XNNPACK has threads of its own, and onnxruntime's would only wait beside them.
    let own_threads = provider == Provider::Xnnpack;
    let mut builder = Session::builder(&library.environment)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_quant_qdq(integers)? // else 8-bit weights become f32 once, when the file is loaded
        .with_intra_threads(if own_threads { 1 } else { options.threads() })?
        .with_inter_threads(1)?;
    if own_threads {
        builder = builder.with_intra_op_spinning(false)?;
    }
    if provider == Provider::Directml {
        builder = builder.with_memory_pattern(false)?; // DirectML's documentation demands it
    }
    Ok(builder)
}

#[cfg(feature = "ort-load")]
fn with_provider(
    builder: SessionBuilder,
    provider: Provider,
    library: &Library,
    options: &Options,
) -> Result<SessionBuilder> {
    let refused = |e: ort::Error<SessionBuilder>| unusable(provider, &e.into());
    if provider == Provider::Webgpu && webgpu(library) == Ok(Webgpu::Plugin) {
        let mut devices = library.environment.devices().filter(|d| d.ep().is_ok_and(|name| name == WEBGPU));
        let Some(device) = devices.next() else {
            let reason = "its plugin finds no device it can use".to_owned();
            return Err(Error::Provider { provider, reason, remedy: remedies::driver(provider) });
        };
        return builder.with_devices([device], None).map_err(refused);
    }
    if matches!(provider, Provider::Cuda | Provider::Tensorrt) {
        plugins::preload_cuda(library);
    }
    builder.with_execution_providers(providers(provider, options)?).map_err(refused)
}

/// The providers of a session, in the order in which they may choose operators.
#[cfg(feature = "ort-load")]
fn providers(provider: Provider, options: &Options) -> Result<Vec<ExecutionProviderDispatch>> {
    let cuda = || ep::CUDA::default().with_tf32(false).build();
    let all = match provider {
        Provider::Cuda => vec![cuda()],
        Provider::Tensorrt => {
            let folder = engine_folder(options)?;
            let cached = ep::TensorRT::default().with_engine_cache(true).with_engine_cache_path(&folder);
            vec![cached.with_timing_cache(true).with_timing_cache_path(&folder).build(), cuda()]
        }
        Provider::Coreml => {
            vec![ep::CoreML::default().with_model_format(ep::coreml::ModelFormat::MLProgram).build()]
        }
        Provider::Directml => vec![ep::DirectML::default().build()],
        Provider::Openvino => {
            vec![ep::OpenVINO::default().with_num_threads(options.threads()).build()]
        }
        Provider::Xnnpack => {
            let threads =
                std::num::NonZeroUsize::new(options.threads()).unwrap_or(std::num::NonZeroUsize::MIN);
            vec![ep::XNNPACK::default().with_intra_op_num_threads(threads).build()]
        }
        Provider::Webgpu => vec![ep::WebGPU::default().build()],
        Provider::Auto | Provider::Engine | Provider::Tract | Provider::Cpu => Vec::new(),
    };
    Ok(all.into_iter().map(ExecutionProviderDispatch::error_on_failure).collect())
}

/// The folder of TensorRT's engines, made where it is missing.
#[cfg(feature = "ort-load")]
fn engine_folder(options: &Options) -> Result<String> {
    let variable =
        |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(std::path::PathBuf::from);
    let cache = || {
        let named = variable("XDG_CACHE_HOME").or_else(|| variable("LOCALAPPDATA"));
        Some(named.or_else(|| Some(variable("HOME")?.join(".cache")))?.join("dmd/tensorrt"))
    };
    let problem = |problem: String| {
        Error::Request(format!("{problem}\n\nhint: name a folder that can be written with --trt-cache"))
    };
    let folder = options.trt_cache.clone().or_else(cache);
    let folder = folder.ok_or_else(|| problem("there is no cache folder: `HOME` is not set".to_owned()))?;
    std::fs::create_dir_all(&folder)
        .map_err(|e| problem(format!("cannot keep TensorRT's engines in `{}`: {e}", folder.display())))?;
    Ok(folder.display().to_string())
}

/// Where WebGPU comes from.
#[cfg(feature = "ort-load")]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Webgpu {
    BuiltIn,
    Plugin,
}

#[cfg(feature = "ort-load")]
fn webgpu(library: &Library) -> Result<Webgpu, String> {
    match ep::WebGPU::is_available() {
        Ok(true) => Ok(Webgpu::BuiltIn),
        _ => plugins::register_webgpu(library).map(|()| Webgpu::Plugin),
    }
}

/// A convolution of 3x3, an operator that every provider has.
fn tiny_model() -> Vec<u8> {
    const INTS: i32 = 7; // of AttributeProto.AttributeType
    let port = |name: &str| {
        let dim = [1, 1, SIDE as i64, SIDE as i64].map(|d| Dimension { dim_value: Some(d), dim_param: None });
        let shape = Some(Shape { dim: dim.to_vec() });
        let tensor_type = Some(TensorType { elem_type: data_type::FLOAT, shape });
        ValueInfo { name: name.to_owned(), r#type: Some(Type { tensor_type }) }
    };
    let weight = Tensor {
        name: "w".to_owned(),
        dims: vec![1, 1, 3, 3],
        data_type: data_type::FLOAT,
        float_data: vec![0.25; 9],
        ..Default::default()
    };
    let pads = Attribute { name: "pads".to_owned(), r#type: INTS, ints: vec![1; 4], ..Default::default() };
    let node = Node {
        op_type: "Conv".to_owned(),
        input: vec!["x".to_owned(), "w".to_owned()],
        output: vec!["y".to_owned()],
        attribute: vec![pads],
        ..Default::default()
    };
    let graph = Graph {
        name: "probe".to_owned(),
        node: vec![node],
        initializer: vec![weight],
        input: vec![port("x")],
        output: vec![port("y")],
        ..Default::default()
    };
    let opset_import = vec![OperatorSet { domain: String::new(), version: 18 }];
    Model { ir_version: 8, opset_import, graph: Some(graph), ..Default::default() }.encode_to_vec()
}
