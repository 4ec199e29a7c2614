//! Tiny graphs whose outputs are known.

use dmd_core::noise;
use serde_json::{Value, json};
use tract_onnx::pb::{
    GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorShapeProto,
    TypeProto, ValueInfoProto, tensor_proto::DataType, tensor_shape_proto::Dimension,
    tensor_shape_proto::dimension::Value as Dim, type_proto, type_proto::Tensor,
};

pub const SHAPE: [i64; 3] = [1, 3, 4];

/// A file whose nodes make `x_gen`.
pub fn file(card: Option<Value>, input: Vec<ValueInfoProto>, node: Vec<NodeProto>) -> ModelProto {
    let graph = GraphProto {
        name: "tiny".to_owned(),
        input,
        node,
        output: vec![value("x_gen", DataType::Float, &SHAPE)],
        ..Default::default()
    };
    let entry = |card: Value| StringStringEntryProto { key: "dmd.card".to_owned(), value: card.to_string() };
    ModelProto {
        ir_version: 8,
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: 18 }],
        metadata_props: card.into_iter().map(entry).collect(),
        graph: Some(graph),
        ..Default::default()
    }
}

pub fn operator(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: op.to_owned(),
        name: output.to_owned(),
        input: inputs.iter().map(|i| (*i).to_owned()).collect(),
        output: vec![output.to_owned()],
        ..Default::default()
    }
}

pub fn value(name: &str, element: DataType, shape: &[i64]) -> ValueInfoProto {
    let batch = Dimension { value: Some(Dim::DimParam("n".to_owned())), ..Default::default() };
    let rest = shape.iter().map(|n| Dimension { value: Some(Dim::DimValue(*n)), ..Default::default() });
    let shape = TensorShapeProto { dim: std::iter::once(batch).chain(rest).collect() };
    let tensor = Tensor { elem_type: element as i32, shape: Some(shape) };
    let r#type = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
    ValueInfoProto { name: name.to_owned(), r#type: Some(r#type), ..Default::default() }
}

pub fn card() -> Value {
    json!({
        "card_version": 1, "kind": "generator", "arch": "unet2d", "name": "tiny",
        "image": { "channels": SHAPE[0], "height": SHAPE[1], "width": SHAPE[2], "range": [-1.0, 1.0] },
        "classes": { "count": 3, "names": ["ankle", "boot", "coat"] },
        "schedule": {
            "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear",
            "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon"
        },
        "noise": "dmd-noise-1", "dtype": "f32", "parameters": 0, "macs": 0, "created_by": "test"
    })
}

pub fn z(seed: u32, image: u64) -> Vec<f32> {
    let mut z = vec![0.0; 12];
    noise::standard_normal(seed, image, &mut z);
    z
}
