//! onnxruntime as an engine: a session, and batches of images through it. How a provider gets its session is in
//! `devices`.

use ort::session::{Session, SessionInputValue};
use ort::value::TensorRef;

use crate::batch::Batch;
use crate::devices::{self, one_line};
use crate::file::{ModelFile, Role};
use crate::generator::Options;
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
        let (library, mut builder) = devices::builder(provider, options, file.info.in_integers())?;
        let session = match &file.outside {
            Some(path) => builder.commit_from_file(path),
            None => builder.commit_from_memory(&file.bytes),
        };
        let session = session.map_err(|e| match devices::probe(provider, options) {
            Ok(()) => engine_error(&file.info.name, e),
            Err(unusable) => unusable,
        })?;
        let info = &file.info;
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

fn engine_error(name: &str, error: ort::Error) -> Error {
    Error::Engine { engine: "onnxruntime", name: name.to_owned(), message: one_line(&error) }
}
