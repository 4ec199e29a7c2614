//! The build with all of ONNX's operators: what the project's engine does not have runs by tract, all else as in every build.

mod support;

use dmd_runtime_wasm::generator::Generator;
use prost::Message;
use support::{SHAPE, card, file, operator, value, z};
use tract_onnx::pb::{AttributeProto, NodeProto, attribute_proto::AttributeType, tensor_proto::DataType};

fn cast() -> NodeProto {
    let (name, r#type) = ("to".to_owned(), AttributeType::Int as i32);
    let to = AttributeProto { name, i: DataType::Float as i64, r#type, ..Default::default() };
    NodeProto { attribute: vec![to], ..operator("Cast", &["class"], "number") }
}

#[test]
fn operators_of_other_exporters_run() -> anyhow::Result<()> {
    let input = vec![value("z", DataType::Float, &SHAPE)];
    let magnitude = file(None, input, vec![operator("Abs", &["z"], "x_gen")]);
    let generator = Generator::from_bytes(magnitude.encode_to_vec())?;
    assert_eq!(generator.engine(), "tract");
    assert_eq!(generator.generate(3, 1, None)?.values, z(3, 1).iter().map(|v| v.abs()).collect::<Vec<_>>());

    let input = vec![value("z", DataType::Float, &SHAPE), value("class", DataType::Int64, &[])];
    let node = vec![cast(), operator("Sqrt", &["number"], "root"), operator("Add", &["z", "root"], "x_gen")];
    let generator = Generator::from_bytes(file(Some(card()), input, node).encode_to_vec())?;
    assert_eq!(generator.engine(), "tract");
    let expected: Vec<f32> = z(3, 1).iter().map(|v| v + 2.0_f32.sqrt()).collect();
    assert_eq!(generator.generate(3, 1, Some(2))?.values, expected);
    Ok(())
}

#[test]
fn files_of_dmd_export_run_by_the_projects_engine() -> anyhow::Result<()> {
    let input = vec![value("z", DataType::Float, &SHAPE)];
    let plain = file(None, input, vec![operator("Neg", &["z"], "x_gen")]);
    assert_eq!(Generator::from_bytes(plain.encode_to_vec())?.engine(), "dmd-engine");
    Ok(())
}

#[test]
fn what_tract_does_not_have_is_refused_by_name() {
    let input = vec![value("z", DataType::Float, &SHAPE)];
    let unknown = file(None, input.clone(), vec![operator("Frobnicate", &["z"], "x_gen")]);
    let refused = Generator::from_bytes(unknown.encode_to_vec()).err().expect("it was accepted").to_string();
    assert!(refused.starts_with("cannot prepare the model: ") && refused.contains("Frobnicate"), "{refused}");
    let flat = file(None, input, vec![operator("Size", &["z"], "x_gen")]);
    let refused = Generator::from_bytes(flat.encode_to_vec()).err().expect("it was accepted").to_string();
    assert!(refused.contains("`x_gen` is") && refused.contains("expected"), "{refused}");
}
