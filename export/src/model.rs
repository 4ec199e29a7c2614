//! From a checkpoint to the bytes of an ONNX file: the contract's inputs and outputs, the model card, verification.
//! No file is read or written here.

use std::collections::BTreeMap;

use dmd_core::card::{
    CARD_KEY, CARD_VERSION, INPUT_CLASS, INPUT_T, INPUT_X_T, INPUT_Z, ImageSpec, Kind, ModelCard,
    OUTPUT_X_GEN, output_of,
};
use dmd_core::{net, noise};
use prost::Message;
use serde::Serialize;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{GraphProto, ModelProto, OperatorSetIdProto, StringStringEntryProto};

use crate::external::{External, split};
use crate::graph::Output;
use crate::partial::{Exporter, Value};
use crate::precision::{Precision, store};
use crate::quantise::{Method, quantise};
use crate::verify::{Parameters, verify};
use crate::{Checkpoint, Error, Result, measure, pixels};

/// Version of the operator set where none is asked for.
pub const OPSET: i64 = 18;
/// Versions of the operator set that have every operator of a file in the form that is written.
pub const OPSETS: std::ops::RangeInclusive<i64> = 14..=22;

/// What a file is to be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Form {
    /// How weights are stored.
    pub precision: Precision,
    /// How activations are calibrated, for [`Precision::Qdq`].
    pub calibration: Method,
    /// Images per call, or any number.
    pub batch: Option<usize>,
    /// Whether a generator has the output `image`.
    pub image: bool,
    /// Version of the operator set.
    pub opset: i64,
    /// Where weights go.
    pub external: External,
}

impl Default for Form {
    fn default() -> Self {
        let (precision, external) = (Precision::default(), External::default());
        Self { precision, calibration: Method::default(), batch: None, image: false, opset: OPSET, external }
    }
}

/// A file in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Exported {
    /// The file.
    pub bytes: Vec<u8>,
    /// The file of weights beside it, if they are not in it.
    pub data: Option<Vec<u8>>,
    /// The card in it.
    pub card: ModelCard,
    /// What it is made of.
    pub summary: Summary,
}

/// What a file is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Name on the card.
    pub name: String,
    /// Generator or teacher.
    pub kind: Kind,
    /// Nodes by operator.
    pub operators: BTreeMap<String, usize>,
    /// All nodes.
    pub nodes: usize,
    /// Numbers stored.
    pub parameters: usize,
    /// Numbers in the checkpoint.
    pub checkpoint_parameters: usize,
    /// Multiply-accumulate operations per image.
    pub macs: u64,
    /// Size of the file.
    pub bytes: usize,
    /// Size of the file of weights beside it.
    pub data_bytes: usize,
}

/// Writes a checkpoint as an ONNX model of the usual form: f32, any batch.
///
/// # Errors
/// See [`export_in`].
pub fn export(checkpoint: &Checkpoint, kind: Kind) -> Result<Exported> {
    export_in(checkpoint, kind, &Form::default())
}

/// Writes a checkpoint as an ONNX model.
///
/// # Errors
/// If the checkpoint is of the other kind, does not fit its configuration, cannot have this form, or the graph breaks
/// a rule of [`crate::verify`].
pub fn export_in(checkpoint: &Checkpoint, kind: Kind, form: &Form) -> Result<Exported> {
    check_kind(checkpoint, kind)?;
    check_form(kind, form)?;
    let mut exporter = Exporter::new(&checkpoint.weights);
    // Runtimes have 8-bit kernels for Conv, none for ConvTranspose.
    exporter.enlarging = form.precision != Precision::Qdq;
    let outputs = outputs(&mut exporter, checkpoint, kind, form)?;
    let mut finished = exporter.graph.finish(&outputs, form.batch);
    let parameters = Parameters { reads: exporter.reads(), stored: &exporter.stored };
    verify(&finished.graph, checkpoint.weights.keys(), &parameters)?;
    let stored = stored_numbers(&finished.graph);
    let mut card = card(checkpoint, kind, stored, finished.macs)?;
    card.dtype = form.precision.to_string();
    if form.precision == Precision::Qdq {
        let error = quantise(&mut finished.graph, &card, form.calibration)?;
        card.provenance.metrics.insert(card.dtype.clone(), error);
    }
    let stored_smaller = matches!(form.precision, Precision::F16 | Precision::Int8);
    let measured = stored_smaller && kind == Kind::Generator && finished.macs <= measure::MACS_LIMIT;
    let exact = measured.then(|| finished.graph.clone());
    store(&mut finished.graph, form.precision);
    if let Some(exact) = exact {
        let error = measure::difference(&finished.graph, &exact, &card, measure::COUNT)?;
        card.provenance.metrics.insert(card.dtype.clone(), error);
    }
    let operators = count_operators(&finished.graph);
    let nodes = finished.graph.node.len();
    let (bytes, data) = encode(finished.graph, &card, form)?;
    let summary = Summary {
        name: card.provenance.name.clone(),
        kind,
        operators,
        nodes,
        parameters: stored,
        checkpoint_parameters: checkpoint.weights.values().map(|a| a.data.len()).sum(),
        macs: finished.macs,
        bytes: bytes.len(),
        data_bytes: data.as_ref().map_or(0, Vec::len),
    };
    Ok(Exported { bytes, data, card, summary })
}

/// Declares the inputs, runs the network, and names the outputs.
fn outputs(exporter: &mut Exporter, checkpoint: &Checkpoint, kind: Kind, form: &Form) -> Result<Vec<Output>> {
    let config = &checkpoint.config;
    let shape = config.image_shape();
    let image = exporter.input(if kind == Kind::Generator { INPUT_Z } else { INPUT_X_T }, &shape);
    let (value, name) = match kind {
        Kind::Generator => {
            let (one_step, class) = (checkpoint.one_step()?, class_input(exporter, checkpoint));
            let value = net::one_step(exporter, config, &one_step, &image, class.as_ref())?;
            (value, OUTPUT_X_GEN)
        }
        Kind::Teacher => {
            let t = exporter.input(INPUT_T, &[]);
            let class = class_input(exporter, checkpoint);
            let value = net::denoise(exporter, config, &image, &t, class.as_ref())?;
            (value, output_of(checkpoint.schedule.prediction_type))
        }
    };
    let Value::Flow(value) = value else {
        return Err(Error::Verify("the output does not depend on the image".into()));
    };
    let mut outputs = vec![value.output(name)];
    if form.image {
        outputs.push(pixels::image(exporter, &value, config.range())?);
    }
    Ok(outputs)
}

fn check_form(kind: Kind, form: &Form) -> Result<()> {
    if !OPSETS.contains(&form.opset) {
        let (first, last) = (OPSETS.start(), OPSETS.end());
        return Err(Error::Request(format!("got opset {}, expected {first} to {last}", form.opset)));
    }
    if form.precision == Precision::Qdq && kind == Kind::Teacher {
        return Err(Error::Request(
            "8-bit activations are calibrated on a generator's noise, and a base model takes images of every noise level\n\n\
             hint: `--dtype int8` stores its weights in 8 bits"
                .into(),
        ));
    }
    if form.image && kind == Kind::Teacher {
        return Err(Error::Request(
            "a base model predicts noise and has no output `image`\n\nhint: leave out --image".into(),
        ));
    }
    Ok(())
}

fn check_kind(checkpoint: &Checkpoint, kind: Kind) -> Result<()> {
    match (kind, &checkpoint.generator) {
        (Kind::Generator, Some(_)) | (Kind::Teacher, None) => Ok(()),
        (Kind::Generator, None) => Err(Error::Request(
            "the checkpoint has no generator.json: it is a base model, not a one-step generator\n\nhint: distil it \
             with `dmd-distill`, or add --teacher to export it as it is"
                .into(),
        )),
        (Kind::Teacher, Some(_)) => Err(Error::Request(
            "the checkpoint has a generator.json: it is a one-step generator, not a base model\n\nhint: leave out \
             --teacher, or name the base it was distilled from"
                .into(),
        )),
    }
}

fn class_input(exporter: &mut Exporter, checkpoint: &Checkpoint) -> Option<Value> {
    checkpoint.config.class_rows().map(|rows| exporter.class(INPUT_CLASS, rows))
}

fn card(checkpoint: &Checkpoint, kind: Kind, parameters: usize, macs: u64) -> Result<ModelCard> {
    let [channels, height, width] = checkpoint.config.image_shape();
    let one_step = match kind {
        Kind::Generator => Some(checkpoint.one_step()?),
        Kind::Teacher => None,
    };
    Ok(ModelCard {
        card_version: CARD_VERSION,
        kind,
        arch: checkpoint.config.arch().into(),
        image: ImageSpec { channels, height, width, range: checkpoint.config.range() },
        provenance: checkpoint.provenance.clone(),
        t_gen: one_step.map(|g| g.t_gen),
        alpha_t: one_step.map(|g| g.alpha_t),
        sigma_t: one_step.map(|g| g.sigma_t),
        schedule: checkpoint.schedule.clone(),
        noise: noise::CONTRACT.into(),
        dtype: "f32".into(),
        parameters,
        macs,
        created_by: concat!("dmd-export ", env!("CARGO_PKG_VERSION")).into(),
    })
}

fn stored_numbers(graph: &GraphProto) -> usize {
    let floats = graph.initializer.iter().filter(|t| t.data_type == DataType::Float as i32);
    floats.map(|t| t.dims.iter().product::<i64>() as usize).sum()
}

fn count_operators(graph: &GraphProto) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for node in &graph.node {
        *counts.entry(node.op_type.clone()).or_default() += 1;
    }
    counts
}

/// The file, and the file of its weights if they are to be outside.
fn encode(graph: GraphProto, card: &ModelCard, form: &Form) -> Result<(Vec<u8>, Option<Vec<u8>>)> {
    let card = serde_json::to_string(card).map_err(|e| Error::Verify(format!("model card: {e}")))?;
    ModelCard::from_json(&card)?;
    let mut model = ModelProto {
        ir_version: ir_version(form.opset),
        producer_name: "dmd-export".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: form.opset }],
        metadata_props: vec![StringStringEntryProto { key: CARD_KEY.into(), value: card }],
        graph: Some(graph),
        ..Default::default()
    };
    let location = form.external.location(model.encoded_len())?;
    let data = location.zip(model.graph.as_mut()).map(|(location, graph)| split(graph, location));
    Ok((model.encode_to_vec(), data))
}

/// Version of the file format: the one that came with the operator set, so that runtimes of its time read it; 10 for
/// opset 18, as all runtimes of today do.
fn ir_version(opset: i64) -> i64 {
    match opset {
        ..=14 => 7,
        15..=17 => 8,
        19 | 20 => 9,
        _ => 10,
    }
}
