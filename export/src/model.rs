//! From a checkpoint to the bytes of an ONNX file: the contract's inputs and output, the model card, verification.
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

use crate::partial::{Exporter, Value};
use crate::precision::{Precision, store};
use crate::verify::{Parameters, verify};
use crate::{Checkpoint, Error, Result};

/// Version of the operator set.
pub const OPSET: i64 = 18;
/// Version of the file format.
pub const IR_VERSION: i64 = 10;

/// A file in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Exported {
    /// The file.
    pub bytes: Vec<u8>,
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
}

/// Writes a checkpoint as an ONNX model with f32 weights.
///
/// # Errors
/// See [`export_in`].
pub fn export(checkpoint: &Checkpoint, kind: Kind) -> Result<Exported> {
    export_in(checkpoint, kind, Precision::F32)
}

/// Writes a checkpoint as an ONNX model.
///
/// # Errors
/// If the checkpoint is of the other kind, does not fit its configuration, or the graph breaks a rule of
/// [`crate::verify`].
pub fn export_in(checkpoint: &Checkpoint, kind: Kind, precision: Precision) -> Result<Exported> {
    check_kind(checkpoint, kind)?;
    let mut exporter = Exporter::new(&checkpoint.weights);
    let shape = checkpoint.config.image_shape();
    let image = exporter.input(if kind == Kind::Generator { INPUT_Z } else { INPUT_X_T }, &shape);
    let (value, output) = match kind {
        Kind::Generator => {
            let (one_step, class) = (checkpoint.one_step()?, class_input(&mut exporter, checkpoint));
            let value = net::one_step(&mut exporter, &checkpoint.config, &one_step, &image, class.as_ref())?;
            (value, OUTPUT_X_GEN)
        }
        Kind::Teacher => {
            let t = exporter.input(INPUT_T, &[]);
            let class = class_input(&mut exporter, checkpoint);
            let value = net::denoise(&mut exporter, &checkpoint.config, &image, &t, class.as_ref())?;
            (value, output_of(checkpoint.schedule.prediction_type))
        }
    };
    let Value::Flow(value) = value else {
        return Err(Error::Verify("the output does not depend on the image".into()));
    };
    let mut finished = exporter.graph.finish(value.edge, output, &shape);
    let parameters = Parameters { reads: exporter.reads(), stored: &exporter.stored };
    verify(&finished.graph, checkpoint.weights.keys(), &parameters)?;
    let stored = stored_numbers(&finished.graph);
    store(&mut finished.graph, precision);
    let card = ModelCard { dtype: precision.to_string(), ..card(checkpoint, kind, stored, finished.macs)? };
    let operators = count_operators(&finished.graph);
    let nodes = finished.graph.node.len();
    let bytes = encode(finished.graph, &card)?;
    let summary = Summary {
        name: card.provenance.name.clone(),
        kind,
        operators,
        nodes,
        parameters: stored,
        checkpoint_parameters: checkpoint.weights.values().map(|a| a.data.len()).sum(),
        macs: finished.macs,
        bytes: bytes.len(),
    };
    Ok(Exported { bytes, card, summary })
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

fn encode(graph: GraphProto, card: &ModelCard) -> Result<Vec<u8>> {
    let card = serde_json::to_string(card).map_err(|e| Error::Verify(format!("model card: {e}")))?;
    ModelCard::from_json(&card)?;
    let model = ModelProto {
        ir_version: IR_VERSION,
        producer_name: "dmd-export".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: OPSET }],
        metadata_props: vec![StringStringEntryProto { key: CARD_KEY.into(), value: card }],
        graph: Some(graph),
        ..Default::default()
    };
    Ok(model.encode_to_vec())
}
