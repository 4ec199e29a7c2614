//! onnxruntime as an engine: a session, and batches of images through it. How a provider gets its session is in
//! `devices`.

use ort::session::builder::SessionBuilder;
use ort::session::{Session, SessionInputValue};
use ort::value::TensorRef;

use crate::batch::Batch;
use crate::devices::{self, one_line};
use crate::file::{ModelFile, Role};
use crate::generator::Options;
use crate::library::Library;
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
        let (library, session) = Self::session(provider, file, options)?;
        let mut engine = library.name();
        let session = match session {
            Ok(session) => session,
            // onnxruntime computes on the CPU what a provider has no kernel for; whoever asked for the provider is told.
            Err(_) if provider != Provider::Cpu => {
                devices::probe(provider, options)?;
                let (_, mut builder) = devices::builder(provider, options, file.info.in_integers())?;
                engine += "; some of its operators on the CPU";
                commit(&mut builder, file).map_err(|e| engine_error(&file.info.name, e))?
            }
            Err(e) => {
                devices::probe(provider, options)?;
                return Err(engine_error(&file.info.name, e));
            }
        };
        let info = &file.info;
        let inputs = info.inputs.iter().filter_map(|p| p.role.map(|role| (p.name.clone(), role))).collect();
        let output = info.outputs[info.output].name.clone();
        let image = info.image_shape();
        let (name, batch) = (info.name.clone(), info.batch);
        Ok((Self { session, name, inputs, output, image, batch }, engine))
    }

    /// A session on this provider alone; onnxruntime refuses that option for its CPU provider, which is the one to fall back to.
    fn session(
        provider: Provider,
        file: &ModelFile,
        options: &Options,
    ) -> Result<(Library, ort::Result<Session>)> {
        let (library, builder) = devices::builder(provider, options, file.info.in_integers())?;
        let alone = match provider {
            Provider::Cpu => Ok(builder),
            _ => builder.with_disable_cpu_fallback().map_err(ort::Error::from),
        };
        Ok((library, alone.and_then(|mut builder| commit(&mut builder, file))))
    }

    /// Runs any number of images; returns the output as one array.
    pub fn run(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        let Self { session, name, inputs, output, image, batch: size } = self;
        batch.in_parts(size.unwrap_or(batch.n), |part| {
            evaluate(session, inputs, output, *image, part).map_err(|e| engine_error(name, e))
        })
    }
}

fn commit(builder: &mut SessionBuilder, file: &ModelFile) -> ort::Result<Session> {
    match &file.outside {
        Some(path) => builder.commit_from_file(path),
        None => builder.commit_from_memory(&file.bytes),
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
