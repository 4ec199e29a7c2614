//! The browser's generator, run natively: tiny graphs written here whose outputs are known, and files that must be
//! refused. `tests/web` checks the same code as WebAssembly, on the bundled model.

mod support;

use dmd_runtime_wasm::generator::{Generator, Request, Towards};
use prost::Message;
use serde_json::{Value, json};
use support::{SHAPE, card, file, operator, value, z};
use tract_onnx::pb::{
    AttributeProto, ModelProto, NodeProto, TensorProto, attribute_proto::AttributeType,
    tensor_proto::DataLocation, tensor_proto::DataType, tensor_shape_proto::dimension::Value as Dim,
    type_proto,
};

/// `x_gen = z + class`, or `x_gen = -z` without a class.
fn model(card: Option<Value>, conditional: bool) -> ModelProto {
    let mut input = vec![value("z", DataType::Float, &SHAPE)];
    let mut node = vec![];
    if conditional {
        input.push(value("class", DataType::Int64, &[]));
        let to = AttributeProto {
            name: "to".to_owned(),
            i: DataType::Float as i64,
            r#type: AttributeType::Int as i32,
            ..Default::default()
        };
        node.push(NodeProto { attribute: vec![to], ..operator("Cast", &["class"], "shift") });
        node.push(operator("Add", &["z", "shift"], "x_gen"));
    } else {
        node.push(operator("Neg", &["z"], "x_gen"));
    }
    file(card, input, node)
}

fn load(model: &ModelProto) -> dmd_runtime_wasm::Result<Generator> {
    Generator::from_bytes(model.encode_to_vec())
}

fn refusal(model: &ModelProto) -> String {
    load(model).err().expect("the model was accepted").to_string()
}

#[test]
fn an_image_is_the_graph_applied_to_the_contract_noise() -> anyhow::Result<()> {
    let generator = load(&model(Some(card()), true))?;
    let values = |image, class| generator.generate(9, image, class).map(|s| s.values);
    let shifted = |image, by: f32| z(9, image).iter().map(|v| v + by).collect::<Vec<_>>();
    assert_eq!(values(0, Some(0))?, z(9, 0));
    assert_eq!(values(7, Some(2))?, shifted(7, 2.0));
    assert_eq!(values(4, None)?, shifted(4, 1.0), "image 4 of 3 classes has class 1");
    assert_eq!(generator.generate(9, 5, None)?.class, Some(2));
    Ok(())
}

#[test]
fn pixels_follow_the_range_of_the_card() -> anyhow::Result<()> {
    let generator = load(&model(Some(card()), true))?;
    let sample = generator.generate(1, 0, Some(0))?;
    let level = |v: &f32| (((v + 1.0) / 2.0).clamp(0.0, 1.0) * 255.0 + 0.5).floor() as u8;
    let pixels = generator.pixels(&sample);
    assert_eq!((pixels.height, pixels.width), (3, 4));
    assert_eq!(pixels.data, z(1, 0).iter().map(level).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn a_file_without_a_card_runs_by_its_shapes() -> anyhow::Result<()> {
    let generator = load(&model(None, false))?;
    assert!(generator.contract().card.is_none());
    assert_eq!(generator.generate(3, 1, None)?.values, z(3, 1).iter().map(|v| -v).collect::<Vec<_>>());
    let refused = generator.generate(3, 1, Some(0)).expect_err("a class was accepted").to_string();
    assert_eq!(refused, "got class 0, expected none: the model is unconditional");
    Ok(())
}

#[test]
fn a_fixed_number_of_images_per_call_gives_the_same_images() -> anyhow::Result<()> {
    let fix = |mut model: ModelProto, batch: i64, ports: usize| {
        let graph = model.graph.get_or_insert_default();
        for port in graph.input.iter_mut().chain(&mut graph.output).take(ports) {
            let kind = port.r#type.get_or_insert_default().value.as_mut();
            if let Some(shape) = kind.and_then(|type_proto::Value::TensorType(t)| t.shape.as_mut()) {
                shape.dim[0].value = Some(Dim::DimValue(batch));
            }
        }
        model
    };
    let generator = load(&fix(model(Some(card()), true), 4, 3))?;
    assert_eq!(generator.contract().batch, 4);
    let expected = load(&model(Some(card()), true))?.generate(2, 7, Some(2))?.values;
    assert_eq!(generator.generate(2, 7, Some(2))?.values, expected);
    let plain = load(&fix(model(None, false), 3, 2))?;
    assert_eq!(plain.generate(3, 1, None)?.values, z(3, 1).iter().map(|v| -v).collect::<Vec<_>>());
    let apart = fix(fix(model(Some(card()), true), 4, 2), 3, 1);
    assert_eq!(refusal(&apart), "input `class` has shape [4], expected [3] as `z`");
    Ok(())
}

#[test]
fn weights_in_another_file_are_refused() {
    let mut outside = model(Some(card()), true);
    let (name, data_location) = ("w".to_owned(), Some(DataLocation::External as i32));
    let weight = TensorProto { name, data_location, ..Default::default() };
    outside.graph.get_or_insert_default().initializer.push(weight);
    let refused = refusal(&outside);
    assert!(refused.starts_with("weight `w` lies in another file, expected a single file"), "{refused}");
}

#[test]
fn a_class_out_of_range_is_refused() -> anyhow::Result<()> {
    let generator = load(&model(Some(card()), true))?;
    let refused = generator.generate(0, 0, Some(3)).expect_err("class 3 was accepted").to_string();
    assert_eq!(refused, "got class 3, expected 0 to 2");
    Ok(())
}

#[test]
fn bytes_that_are_not_a_whole_onnx_file_are_refused() {
    let whole = model(Some(card()), true).encode_to_vec();
    let page = b"<!doctype html><title>404</title>";
    for bytes in [&[][..], &page[..], &whole[..whole.len() / 2], &whole[..whole.len() - 1]] {
        let refused =
            Generator::from_bytes(bytes.to_vec()).err().expect("a broken file was accepted").to_string();
        let expected = format!("got {} bytes that are not a complete ONNX file: ", bytes.len());
        assert!(refused.starts_with(&expected), "{refused}");
        assert_eq!(refused.contains(": it holds no graph\n\nhint: "), bytes.is_empty(), "{refused}");
    }
}

#[test]
fn a_teacher_takes_steps() -> anyhow::Result<()> {
    let mut card = card();
    card["kind"] = json!("teacher");
    let refused = refusal(&model(Some(card.clone()), true));
    assert_eq!(refused, "got inputs `z`, `class`, expected `x_t` and `t` and perhaps `class`");

    // A network that predicts the image `-x_t`: each step of DDIM goes towards it.
    card["schedule"]["prediction_type"] = json!("sample");
    card["classes"] = Value::Null;
    let mut file = model(Some(card), false);
    let graph = file.graph.get_or_insert_default();
    graph.input[0].name = "x_t".to_owned();
    graph.input.push(value("t", DataType::Float, &[]));
    graph.node[0] = operator("Neg", &["x_t"], "x0_pred");
    graph.output[0].name = "x0_pred".to_owned();
    let teacher = load(&file)?;
    let sample = |steps| teacher.sample(&Request { seed: 3, steps: Some(steps), ..Request::default() });
    assert_eq!(sample(1)?.values, z(3, 0).iter().map(|v| -v.clamp(-1.0, 1.0)).collect::<Vec<_>>());
    assert_ne!(sample(2)?.values, sample(1)?.values);
    let refused = sample(1001).expect_err("1001 steps were accepted").to_string();
    assert!(refused.starts_with("got 1001 steps, expected 1 to 1000"), "{refused}");
    Ok(())
}

#[test]
fn noise_can_lie_between_two_seeds() -> anyhow::Result<()> {
    let generator = load(&model(None, false))?;
    let at = |share| {
        let towards = Some(Towards { seed: 2, image: 5, share });
        generator.sample(&Request { seed: 1, image: 5, towards, ..Request::default() }).map(|s| s.values)
    };
    let negative = |seed| z(seed, 5).iter().map(|v| -v).collect::<Vec<_>>();
    assert_eq!(at(0.0)?, negative(1));
    assert_eq!(at(1.0)?, negative(2));
    let middle = at(0.5)?;
    assert!(middle != negative(1) && middle != negative(2));
    let refused = at(1.5).expect_err("a share of 1.5 was accepted").to_string();
    assert_eq!(refused, "got share 1.5, expected 0 to 1");
    let steps = generator.sample(&Request { steps: Some(2), ..Request::default() });
    let refused = steps.expect_err("2 steps were accepted").to_string();
    assert_eq!(refused, "got 2 steps, expected 1: the model is a one-step generator");
    Ok(())
}

#[test]
fn a_graph_that_is_no_generator_is_refused() {
    let mut renamed = model(None, false);
    let graph = renamed.graph.get_or_insert_default();
    graph.input[0].name = "image".to_owned();
    assert_eq!(refusal(&renamed), "got inputs `image`, expected `z` and perhaps `class`");

    let mut silent = model(None, false);
    silent.graph.get_or_insert_default().node.clear();
    assert_eq!(refusal(&silent), "got outputs `x_gen`, expected `x_gen` as the result of an operator");

    let mut integers = model(None, false);
    integers.graph.get_or_insert_default().node.push(operator("QuantizeLinear", &["z"], "levels"));
    let refused = refusal(&integers);
    let expected = "its activations are 8-bit integers, which this runtime does not compute\n\nhint: export it with `--dtype int8`";
    assert_eq!(refused, expected);

    let mut sizeless = model(None, false);
    let graph = sizeless.graph.get_or_insert_default();
    graph.input[0] = value("z", DataType::Float, &[1, -1, -1]);
    let expected =
        "got no model card, and input `z` has shape [n, 1, n, n], which does not say the size of an image";
    assert_eq!(refusal(&sizeless), expected);

    let mut doubles = model(None, false);
    doubles.graph.get_or_insert_default().input[0] = value("z", DataType::Double, &[1, 3, 4]);
    assert_eq!(refusal(&doubles), "input `z` has type double, expected float");

    let mut unknown = model(None, false);
    unknown.graph.get_or_insert_default().node[0].op_type = "Frobnicate".to_owned();
    let refused = refusal(&unknown);
    assert!(refused.starts_with("cannot prepare the model: ") && refused.contains("Frobnicate"), "{refused}");
}

#[test]
fn a_card_that_disagrees_with_the_graph_is_refused() {
    let mut wide = card();
    wide["image"]["width"] = json!(5);
    let expected = "input `z` has shape [n, 1, 3, 4], expected [n, 1, 3, 5] from the model card";
    assert_eq!(refusal(&model(Some(wide), true)), expected);

    let mut unnamed = card();
    unnamed["classes"] = Value::Null;
    let refused = refusal(&model(Some(unnamed), true));
    assert!(refused.ends_with("does not say which classes there are"), "{refused}");

    let mut newer = card();
    newer["card_version"] = json!(2);
    assert_eq!(refusal(&model(Some(newer), true)), "model card: got `card_version` 2, expected 1");
}
