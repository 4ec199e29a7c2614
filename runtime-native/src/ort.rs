//! onnxruntime as an engine: sessions on its CPU, CUDA and TensorRT providers, batches of images.
//! A provider that was named either works or is an error; nothing falls back to the CPU here.

use ort::ep::{self, ExecutionProvider};
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{Session, SessionInputValue};
use ort::value::TensorRef;
use prost::Message;
use tract_onnx::pb;

use crate::batch::Batch;
use crate::file::{ModelFile, Role};
use crate::generator::Options;
use crate::library::{self, Library};
use crate::{Error, Provider, Result};

/// A session and what it must be fed.
pub(crate) struct Ort {
    session: Session,
    name: String,
    inputs: Vec<(String, Role)>,
    output: String,
    image: [usize; 3],
    batch: Option<usize>,
}

impl Ort {
    /// Loads a model; also returns the library's name.
    pub fn open(provider: Provider, file: &ModelFile, options: &Options) -> Result<(Self, String)> {
        let library = ready(provider, options)?;
        let engine_error = |e: ort::Error| engine_error(&file.info.name, e);
        let mut builder = builder(provider, &library, options, file.info.in_integers())?;
        let session = match &file.outside {
            Some(path) => builder.commit_from_file(path),
            None => builder.commit_from_memory(&file.bytes),
        };
        let (session, info) = (session.map_err(engine_error)?, &file.info);
        let inputs = info.inputs.iter().filter_map(|p| p.role.map(|role| (p.name.clone(), role))).collect();
        let output = info.outputs[info.output].name.clone();
        let image = info.image_shape();
        let (name, batch) = (info.name.clone(), info.batch);
        Ok((Self { session, name, inputs, output, image, batch }, library.name()))
    }

    /// Runs any number of images; returns the output as one array.
    pub fn run(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        let Self { session, name, inputs, output, image, batch: size } = self;
        batch.in_parts(size.unwrap_or(batch.n), |part| {
            evaluate(session, inputs, output, *image, part).map_err(|e| engine_error(name, e))
        })
    }
}

fn evaluate(
    session: &mut Session,
    inputs: &[(String, Role)],
    output: &str,
    [c, h, w]: [usize; 3],
    batch: &Batch,
) -> ort::Result<Vec<f32>> {
    let n = batch.n;
    let values = inputs
        .iter()
        .map(|(name, role)| {
            let value: SessionInputValue = match role {
                Role::Image => TensorRef::from_array_view(([n, c, h, w], batch.x))?.into(),
                Role::Step => TensorRef::from_array_view(([n], batch.t))?.into(),
                Role::Class => TensorRef::from_array_view(([n], batch.class))?.into(),
            };
            Ok((name.as_str(), value))
        })
        .collect::<ort::Result<Vec<_>>>()?;
    let outputs = session.run(values)?;
    let value =
        outputs.get(output).ok_or_else(|| ort::Error::new(format!("output `{output}` is missing")))?;
    Ok(value.try_extract_tensor::<f32>()?.1.to_vec())
}

/// Whether the loaded library was built with a provider; the reason if not.
pub(crate) fn compiled_in(provider: Provider) -> Result<(), String> {
    let compiled = match provider {
        Provider::Cuda => ep::CUDA::is_available(),
        Provider::Tensorrt => ep::TensorRT::is_available(),
        _ => Ok(true),
    };
    match compiled {
        Ok(true) => Ok(()),
        Ok(false) => Err("the onnxruntime library was built without it".to_owned()),
        Err(e) => Err(e.to_string()),
    }
}

/// Asks whether a model would run now: makes a session for a model of one operator.
pub(crate) fn probe(provider: Provider, options: &Options) -> Result<String, (Option<String>, Error)> {
    let library = library::load(options.ort_lib.as_deref()).map_err(|e| (None, e.for_provider(provider)))?;
    let attempt = || -> Result<()> {
        ready(provider, options)?;
        let mut builder = builder(provider, &library, options, false)?;
        builder.commit_from_memory(&tiny_model()).map_err(|e| unusable(provider, &e))?;
        Ok(())
    };
    attempt().map(|()| library.name()).map_err(|e| (Some(library.name()), e))
}

fn ready(provider: Provider, options: &Options) -> Result<Library> {
    let library = library::load(options.ort_lib.as_deref()).map_err(|e| e.for_provider(provider))?;
    compiled_in(provider).map_err(|reason| Error::Provider {
        provider,
        reason: format!("{reason} ({})", library.name()),
        remedy: "`pip install onnxruntime-gpu`, then name its library file with --ort-lib".to_owned(),
    })?;
    Ok(library)
}

fn builder(
    provider: Provider,
    library: &Library,
    options: &Options,
    integers: bool,
) -> Result<ort::session::builder::SessionBuilder> {
    let cuda = || ep::CUDA::default().with_tf32(false).build().error_on_failure();
    let providers = match provider {
        Provider::Cuda => vec![cuda()],
        Provider::Tensorrt => vec![ep::TensorRT::default().build().error_on_failure(), cuda()],
        _ => Vec::new(),
    };
    let plain = || -> ort::Result<_> {
        Ok(Session::builder(&library.environment)?
            .with_optimization_level(GraphOptimizationLevel::All)?
            .with_quant_qdq(integers)? // else 8-bit weights become f32 once, when the file is loaded
            .with_intra_threads(options.threads())?
            .with_inter_threads(1)?)
    };
    let builder = plain().map_err(|e| unusable(provider, &e))?;
    builder.with_execution_providers(providers).map_err(|e| unusable(provider, &e.into()))
}

fn unusable(provider: Provider, error: &ort::Error) -> Error {
    let remedy = match provider {
        Provider::Cuda => {
            "a driver, and the CUDA and cuDNN libraries of the version named above on the library path"
        }
        Provider::Tensorrt => "a driver, and the CUDA, cuDNN and TensorRT libraries on the library path",
        _ => "another onnxruntime library may help, see --ort-lib",
    };
    Error::Provider { provider, reason: one_line(error), remedy: remedy.to_owned() }
}

fn engine_error(name: &str, error: ort::Error) -> Error {
    Error::Engine { engine: "onnxruntime", name: name.to_owned(), message: one_line(&error) }
}

fn one_line(error: &ort::Error) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn tiny_model() -> Vec<u8> {
    let port = |name: &str| pb::ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(pb::TypeProto {
            value: Some(pb::type_proto::Value::TensorType(pb::type_proto::Tensor {
                elem_type: pb::tensor_proto::DataType::Float as i32,
                shape: Some(pb::TensorShapeProto {
                    dim: vec![pb::tensor_shape_proto::Dimension {
                        value: Some(pb::tensor_shape_proto::dimension::Value::DimValue(1)),
                        ..Default::default()
                    }],
                }),
            })),
            ..Default::default()
        }),
        ..Default::default()
    };
    let node = pb::NodeProto {
        op_type: "Relu".to_owned(),
        input: vec!["x".to_owned()],
        output: vec!["y".to_owned()],
        ..Default::default()
    };
    let graph = pb::GraphProto {
        name: "probe".to_owned(),
        node: vec![node],
        input: vec![port("x")],
        output: vec![port("y")],
        ..Default::default()
    };
    let opset = pb::OperatorSetIdProto { domain: String::new(), version: 18 };
    pb::ModelProto { ir_version: 8, opset_import: vec![opset], graph: Some(graph), ..Default::default() }
        .encode_to_vec()
}
