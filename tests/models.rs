//! Small ONNX models with a known answer, built message by message for the runtime's tests. No expected values here.

use std::path::{Path, PathBuf};

use anyhow::Result;
use prost::Message;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension::Value as Dim};
use tract_onnx::pb::{self, attribute_proto::AttributeType, type_proto};

/// The schedule of every card here.
pub fn schedule_json() -> serde_json::Value {
    serde_json::json!({ "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02 })
}

/// A card for images of `1 x height x 4`.
pub fn card_json(kind: &str, height: usize) -> serde_json::Value {
    serde_json::json!({
        "card_version": 1, "kind": kind, "arch": "test", "name": "test",
        "image": { "channels": 1, "height": height, "width": 4, "range": [-1.0, 1.0] },
        "schedule": schedule_json(), "noise": "dmd-noise-1", "dtype": "f32", "parameters": 0, "macs": 0,
        "created_by": "tests/native.rs"
    })
}

/// Copies its input `z` to its output; without a `made` name nothing computes the output.
pub fn identity(dims: &[&str], made: &str, dtype: DataType, card: Option<String>) -> Vec<u8> {
    let output = if made.is_empty() { "y" } else { made };
    let ports = (vec![port("z", dims, dtype)], vec![port(output, dims, dtype)]);
    model(
        ports,
        vec![node("Identity", &["z"], if made.is_empty() { "other" } else { made })],
        Vec::new(),
        card,
    )
}

/// Writes `teacher.onnx`: `eps_pred = 0.5·x_t + t/1000 + class/100`, three classes, images of 1x2x4.
pub fn teacher(dir: &Path) -> Result<PathBuf> {
    let dims = ["n", "1", "2", "4"];
    let scalar = |name: &str, value: f32| pb::TensorProto {
        name: name.to_owned(),
        data_type: DataType::Float as i32,
        float_data: vec![value],
        ..Default::default()
    };
    let column = pb::TensorProto {
        name: "column".to_owned(),
        dims: vec![4],
        data_type: DataType::Int64 as i32,
        int64_data: vec![-1, 1, 1, 1],
        ..Default::default()
    };
    let mut cast = node("Cast", &["class"], "class_f32");
    cast.attribute.push(pb::AttributeProto {
        name: "to".to_owned(),
        r#type: AttributeType::Int as i32,
        i: DataType::Float as i64,
        ..Default::default()
    });
    let nodes = vec![
        cast,
        node("Mul", &["class_f32", "hundredth"], "class_part"),
        node("Mul", &["t", "thousandth"], "t_part"),
        node("Add", &["class_part", "t_part"], "shift"),
        node("Reshape", &["shift", "column"], "shift_4d"),
        node("Mul", &["x_t", "half"], "x_part"),
        node("Add", &["x_part", "shift_4d"], "eps_pred"),
    ];
    let weights = vec![scalar("hundredth", 0.01), scalar("thousandth", 0.001), scalar("half", 0.5), column];
    let inputs = vec![
        port("x_t", &dims, DataType::Float),
        port("t", &["n"], DataType::Float),
        port("class", &["n"], DataType::Int64),
    ];
    let mut card = card_json("teacher", 2);
    card["classes"] = serde_json::json!({ "count": 3 });
    let ports = (inputs, vec![port("eps_pred", &dims, DataType::Float)]);
    let path = dir.join("teacher.onnx");
    std::fs::write(&path, model(ports, nodes, weights, Some(card.to_string())))?;
    Ok(path)
}

pub fn port(name: &str, dims: &[&str], dtype: DataType) -> pb::ValueInfoProto {
    let value = |d: &&str| d.parse().map_or_else(|_| Dim::DimParam((*d).to_owned()), Dim::DimValue);
    let dim = dims.iter().map(|d| Dimension { value: Some(value(d)), ..Default::default() }).collect();
    let tensor = type_proto::Tensor { elem_type: dtype as i32, shape: Some(pb::TensorShapeProto { dim }) };
    let r#type = pb::TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
    pb::ValueInfoProto { name: name.to_owned(), r#type: Some(r#type), ..Default::default() }
}

pub fn node(op: &str, inputs: &[&str], output: &str) -> pb::NodeProto {
    pb::NodeProto {
        op_type: op.to_owned(),
        input: inputs.iter().map(|i| (*i).to_owned()).collect(),
        output: vec![output.to_owned()],
        ..Default::default()
    }
}

pub fn model(
    (input, output): (Vec<pb::ValueInfoProto>, Vec<pb::ValueInfoProto>),
    node: Vec<pb::NodeProto>,
    initializer: Vec<pb::TensorProto>,
    card: Option<String>,
) -> Vec<u8> {
    let graph =
        pb::GraphProto { name: "test".to_owned(), node, initializer, input, output, ..Default::default() };
    let entry = |value| pb::StringStringEntryProto { key: "dmd.card".to_owned(), value };
    pb::ModelProto {
        ir_version: 8,
        opset_import: vec![pb::OperatorSetIdProto { domain: String::new(), version: 18 }],
        graph: Some(graph),
        metadata_props: card.map(entry).into_iter().collect(),
        ..Default::default()
    }
    .encode_to_vec()
}
