//! What an ONNX file says about itself: model card, inputs, outputs, sizes; checked before any engine sees it.
//! The contract and its names are those of `dmd_core::card`. No inference here.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use dmd_core::card::{
    CARD_KEY, INPUT_CLASS, INPUT_T, INPUT_X_T, INPUT_Z, ImageSpec, Kind, ModelCard, OUTPUT_X_GEN, output_of,
};
use dmd_core::schedule::Prediction;
use dmd_engine::message::{Dimension, Graph, Model, ValueInfo, data_type};
use prost::Message;
use serde::Serialize;

use crate::{Error, Result, checks, external};

/// A model read from a file or from memory, not yet loaded into an engine.
pub struct ModelFile {
    /// What the file says about itself.
    pub info: ModelInfo,
    pub(crate) bytes: Bytes,
    /// The file's messages; their weights are parts of `bytes`.
    pub(crate) model: Model,
    /// Path of the model, if weights lie in other files; they are in `model`, not in `bytes`.
    #[cfg_attr(
        not(any(feature = "ort", feature = "tract")),
        expect(dead_code, reason = "only onnxruntime and tract read it")
    )]
    pub(crate) outside: Option<PathBuf>,
}

/// What a file says about itself.
#[derive(Clone, Debug, Serialize)]
pub struct ModelInfo {
    /// The file as messages call it.
    pub name: String,
    /// Size of the file.
    pub bytes: usize,
    /// Files beside it that hold weights.
    pub data_files: Vec<PathBuf>,
    /// Generator, or teacher for several steps.
    pub kind: Kind,
    /// Size and range of the images.
    pub image: ImageSpec,
    /// The model card, if the file has one.
    pub card: Option<ModelCard>,
    /// Inputs in the file's order.
    pub inputs: Vec<Port>,
    /// Outputs in the file's order.
    pub outputs: Vec<Port>,
    /// Position of the image among the outputs.
    pub output: usize,
    /// Images per call, if the file fixes their number.
    pub batch: Option<usize>,
    /// Version of the standard operator set.
    pub opset: i64,
    /// How often each operator occurs.
    pub operators: BTreeMap<String, usize>,
    /// Numbers stored as weights; sizes and indices are none.
    pub parameters: usize,
    /// What is stored, by element type.
    pub stored: BTreeMap<String, Stored>,
}

/// Stored values of one type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stored {
    /// How many.
    pub values: usize,
    /// Their size in a file, with names and shapes.
    pub bytes: usize,
}

/// One input or output.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Port {
    /// Its name in the file.
    pub name: String,
    /// Element type: `f32`, `i64`, or what ONNX calls it.
    pub dtype: String,
    /// Its dimensions; empty if the file does not say.
    pub shape: Vec<Dim>,
    /// What it carries, `None` for an output that is not used.
    pub role: Option<Role>,
}

/// One dimension.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Dim {
    /// The same in every call.
    Fixed(usize),
    /// Chosen by the caller.
    Symbol(String),
}

/// What an input or output carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// `[n, c, h, w]`: noise, noisy image, image or predicted noise.
    Image,
    /// `[n]` f32: the step.
    Step,
    /// `[n]` i64: the class.
    Class,
}

impl ModelFile {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::parse_at(&format!("`{}`", path.display()), bytes.into(), Some(path))
    }

    /// Checks a model in memory; `name` is what messages call it.
    pub fn parse(name: &str, bytes: impl Into<Bytes>) -> Result<Self> {
        Self::parse_at(name, bytes.into(), None)
    }

    fn parse_at(name: &str, bytes: Bytes, path: Option<&Path>) -> Result<Self> {
        let problem = |problem| Error::File { name: name.to_owned(), problem };
        if bytes.is_empty() {
            return Err(problem("the file is empty, expected an ONNX model".to_owned()));
        }
        let mut model = Model::from_bytes(bytes.clone()).map_err(|e| {
            problem(format!("not an ONNX model, or cut off ({e}); got {} bytes", bytes.len()))
        })?;
        let mut data_files = Vec::new();
        if let (Some(path), Some(graph)) = (path, &mut model.graph) {
            let folder = path.parent().unwrap_or(Path::new(""));
            data_files = external::attach(graph, folder).map_err(problem)?;
        }
        let outside = path.filter(|_| !data_files.is_empty()).map(Path::to_owned);
        let info = describe(name, bytes.len(), &model).map_err(problem)?;
        Ok(Self { info: ModelInfo { data_files, ..info }, bytes, model, outside })
    }
}

impl ModelInfo {
    /// Whether the network computes in 8-bit integers.
    pub fn in_integers(&self) -> bool {
        self.operators.contains_key("QuantizeLinear")
    }

    /// `[channels, height, width]`.
    pub fn image_shape(&self) -> [usize; 3] {
        [self.image.channels, self.image.height, self.image.width]
    }

    /// Numbers in one image.
    pub fn image_len(&self) -> usize {
        self.image_shape().iter().product()
    }

    /// Whether the model asks for a class.
    pub fn takes_class(&self) -> bool {
        self.inputs.iter().any(|port| port.role == Some(Role::Class))
    }
}

fn describe(name: &str, bytes: usize, model: &Model) -> Result<ModelInfo, String> {
    let graph = model.graph.as_ref().ok_or("it holds no graph, expected an ONNX model")?;
    let card = match model.metadata_props.iter().find(|p| p.key == CARD_KEY) {
        Some(p) => Some(ModelCard::from_json(&p.value).map_err(|e| e.to_string())?),
        None => None,
    };
    check_structure(graph)?;
    let weights: HashSet<&str> = graph.initializer.iter().map(|w| w.name.as_str()).collect();
    let is_weight = |port: &&ValueInfo| weights.contains(port.name.as_str());
    let mut inputs = graph.input.iter().filter(|p| !is_weight(p)).map(port).collect::<Result<Vec<_>, _>>()?;
    let mut outputs = graph.output.iter().map(port).collect::<Result<Vec<_>, _>>()?;
    let (kind, output) = assign_roles(card.as_ref(), &mut inputs, &mut outputs)?;
    let image = check_shapes(card.as_ref(), &inputs, &outputs[output])?;
    let batch = batch_of(&inputs)?;
    checks::images(batch.unwrap_or(1), [image.channels, image.height, image.width])?;
    let mut stored: BTreeMap<String, Stored> = BTreeMap::new();
    for tensor in &graph.initializer {
        let of_type = stored.entry(element(tensor.data_type)).or_default();
        of_type.values += checks::count(&tensor.dims).unwrap_or_default();
        of_type.bytes += tensor.encoded_len();
    }
    let mut operators = BTreeMap::new();
    for node in &graph.node {
        *operators.entry(node.op_type.clone()).or_insert(0) += 1;
    }
    Ok(ModelInfo {
        name: name.to_owned(),
        bytes,
        data_files: Vec::new(),
        kind,
        image,
        card,
        inputs,
        outputs,
        output,
        batch,
        opset: model.opset_import.iter().find(|o| o.domain.is_empty()).map_or(0, |o| o.version),
        operators,
        parameters: stored.iter().filter(|(kind, _)| *kind != "i64").map(|(_, s)| s.values).sum(),
        stored,
    })
}

fn check_structure(graph: &Graph) -> Result<(), String> {
    checks::tensors(graph)?;
    let computed = graph.node.iter().flat_map(|n| &n.output);
    let stored = graph.initializer.iter().map(|w| &w.name);
    let made: HashSet<&String> = computed.chain(stored).chain(graph.input.iter().map(|i| &i.name)).collect();
    match graph.output.iter().find(|output| !made.contains(&output.name)) {
        Some(output) => Err(format!("nothing computes the output `{}`", output.name)),
        None => Ok(()),
    }
}

fn port(info: &ValueInfo) -> Result<Port, String> {
    let Some(tensor) = info.r#type.as_ref().and_then(|t| t.tensor_type.as_ref()) else {
        return Err(format!("`{}` is not a tensor", info.name));
    };
    let dtype = element(tensor.elem_type);
    let dims = tensor.shape.iter().flat_map(|s| &s.dim);
    let shape = dims
        .map(|d| match d {
            Dimension { dim_value: Some(v), .. } => match usize::try_from(*v) {
                Ok(v) if (1..=1 << 16).contains(&v) => Ok(Dim::Fixed(v)),
                _ => Err(format!("`{}` has a dimension of {v}", info.name)),
            },
            Dimension { dim_param: Some(symbol), .. } if symbol.len() > checks::MAX_SYMBOL => Err(format!(
                "`{}` has a dimension whose name has {} bytes, expected at most {}",
                info.name,
                symbol.len(),
                checks::MAX_SYMBOL
            )),
            Dimension { dim_param: Some(symbol), .. } => Ok(Dim::Symbol(symbol.clone())),
            _ => Ok(Dim::Symbol("?".to_owned())),
        })
        .collect::<Result<_, _>>()?;
    Ok(Port { name: info.name.clone(), dtype, shape, role: None })
}

fn element(kind: i32) -> String {
    match kind {
        data_type::FLOAT => "f32".to_owned(),
        data_type::FLOAT16 => "f16".to_owned(),
        data_type::INT64 => "i64".to_owned(),
        data_type::INT8 => "i8".to_owned(),
        data_type::UINT8 => "u8".to_owned(),
        other => data_type::name(other),
    }
}

/// The number of images per call, if an input fixes it.
fn batch_of(inputs: &[Port]) -> Result<Option<usize>, String> {
    let mut fixed = inputs.iter().filter_map(|port| match port.shape.first() {
        Some(Dim::Fixed(n)) => Some(*n),
        _ => None,
    });
    let batch = fixed.next();
    if fixed.any(|n| Some(n) != batch) {
        return Err(format!("got inputs {}, expected one number of images for all of them", list(inputs)));
    }
    Ok(batch)
}

/// Decides what each input and output carries: by name where there is a card, by type where there is none.
fn assign_roles(
    card: Option<&ModelCard>,
    inputs: &mut [Port],
    outputs: &mut [Port],
) -> Result<(Kind, usize), String> {
    let kind = card.map_or(Kind::Generator, |c| c.kind);
    let (image, step, result) = match kind {
        Kind::Generator => (INPUT_Z, None, OUTPUT_X_GEN),
        Kind::Teacher => {
            let prediction = card.map_or(Prediction::Epsilon, |c| c.schedule.prediction_type);
            (INPUT_X_T, Some(INPUT_T), output_of(prediction))
        }
    };
    for port in inputs.iter_mut() {
        port.role = match (card.is_some(), port.name.as_str(), port.dtype.as_str()) {
            (true, name, _) if name == image => Some(Role::Image),
            (true, name, _) if Some(name) == step => Some(Role::Step),
            (true, INPUT_CLASS, _) => Some(Role::Class),
            (false, _, "f32") if port.shape.len() == 4 => Some(Role::Image),
            (false, _, "i64") if port.shape.len() == 1 => Some(Role::Class),
            _ => None,
        };
    }
    let expected = match card {
        Some(_) => format!(
            "`{image}`{} and perhaps `{INPUT_CLASS}`",
            step.map_or(String::new(), |s| format!(", `{s}`"))
        ),
        None => "one f32 [n, c, h, w] and perhaps one i64 [n] in a file without a model card".to_owned(),
    };
    let count = |role| inputs.iter().filter(|p| p.role == Some(role)).count();
    let unknown = inputs.iter().any(|p| p.role.is_none());
    if unknown
        || count(Role::Image) != 1
        || count(Role::Class) > 1
        || count(Role::Step) != usize::from(step.is_some())
    {
        return Err(format!("got inputs {}, expected {expected}", list(inputs)));
    }
    let output = match card {
        Some(_) => outputs.iter().position(|p| p.name == result),
        None => (outputs.len() == 1).then_some(0),
    };
    let Some(output) = output else {
        let expected = if card.is_some() { format!("`{result}`") } else { "one image".to_owned() };
        return Err(format!("got outputs {}, expected {expected}", list(outputs)));
    };
    outputs[output].role = Some(Role::Image);
    if let Some(card) = card
        && card.provenance.classes.is_some() != (count(Role::Class) == 1)
    {
        return Err(format!("the inputs {} and the classes of the model card disagree", list(inputs)));
    }
    Ok((kind, output))
}

fn check_shapes(card: Option<&ModelCard>, inputs: &[Port], output: &Port) -> Result<ImageSpec, String> {
    for port in inputs {
        let (dtype, rank) = match port.role {
            Some(Role::Image) => ("f32", 4),
            Some(Role::Step) => ("f32", 1),
            _ => ("i64", 1),
        };
        if port.dtype != dtype || port.shape.len() != rank {
            let dims = if rank == 4 { "[n, c, h, w]" } else { "[n]" };
            return Err(format!("got input {port}, expected {dtype} {dims}"));
        }
    }
    let input = inputs.iter().find(|p| p.role == Some(Role::Image)).ok_or("it has no image input")?;
    let [_, Dim::Fixed(channels), Dim::Fixed(height), Dim::Fixed(width)] = input.shape[..] else {
        return Err(format!("got input {input}, expected a fixed number of channels, rows and columns"));
    };
    let agrees = |port: &Port| {
        port.shape.len() == 4
            && port.shape[1..].iter().zip([channels, height, width]).all(|(d, n)| match d {
                Dim::Fixed(d) => *d == n,
                Dim::Symbol(_) => true,
            })
    };
    if output.dtype != "f32" || !(output.shape.is_empty() || agrees(output)) {
        return Err(format!(
            "got output {output}, expected f32 [n, {channels}, {height}, {width}] as the input {input}"
        ));
    }
    match card {
        Some(card) if card.image_shape() == [channels, height, width] => Ok(card.image.clone()),
        Some(card) => {
            let [c, h, w] = card.image_shape();
            Err(format!("got input {input}, expected [n, {c}, {h}, {w}] from the model card"))
        }
        None => Ok(ImageSpec { channels, height, width, range: [-1.0, 1.0] }),
    }
}

fn list(ports: &[Port]) -> String {
    if ports.is_empty() {
        return "none".to_owned();
    }
    ports.iter().map(Port::to_string).collect::<Vec<_>>().join(", ")
}

impl std::fmt::Display for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dims: Vec<String> = self.shape.iter().map(Dim::to_string).collect();
        write!(f, "`{}` {} [{}]", self.name, self.dtype, dims.join(", "))
    }
}

impl std::fmt::Display for Dim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed(n) => write!(f, "{n}"),
            Self::Symbol(s) => f.write_str(s),
        }
    }
}
