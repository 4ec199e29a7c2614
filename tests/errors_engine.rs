//! ONNX files that the project's engine does not run: each refused by the program itself, exit code 2, by node and reason.

mod models;
mod nodes;

use std::fs;

use anyhow::{Context, Result};
use dmd_tests::{refused, run_bin};
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{AttributeProto, NodeProto, TensorProto};

use crate::models::{card_json, identity, model, node, port, teacher};
use crate::nodes::{int, ints, tensor, with};

const DIMS: [&str; 4] = ["n", "1", "4", "4"];

fn floats(name: &str, dims: &[i64]) -> TensorProto {
    let count = dims.iter().product::<i64>() as usize;
    TensorProto {
        name: name.to_owned(),
        dims: dims.to_vec(),
        data_type: DataType::Float as i32,
        float_data: vec![1.0; count],
        ..Default::default()
    }
}

#[test]
fn nodes_of_other_forms_are_refused_by_name() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = || node("Identity", &["z"], "x");
    let one = |op, inputs: &[&str]| node(op, inputs, "y");
    let foreign = NodeProto { domain: "com.other".to_owned(), ..one("Relu", &["z"]) };
    let row = with(node("Reshape", &["z", "sixteen"], "row"), vec![int("allowzero", 0)]);
    let mode = AttributeProto {
        name: "mode".to_owned(),
        r#type: AttributeType::String as i32,
        s: b"cubic".to_vec(),
        ..Default::default()
    };
    let resize = with(one("Resize", &["z", "", "scales"]), vec![mode]);
    let alpha = AttributeProto {
        name: "alpha".to_owned(),
        r#type: AttributeType::Float as i32,
        f: 2.0,
        ..Default::default()
    };
    let scaled = with(one("Gemm", &["z", "matrix"]), vec![alpha]);
    let weights = || {
        let mut empty = floats("empty", &[0, 2]);
        empty.float_data.clear();
        let mut single = floats("single", &[]);
        single.float_data = vec![1.0];
        let eight = TensorProto {
            name: "eight".to_owned(),
            dims: vec![2, 2],
            data_type: DataType::Int8 as i32,
            raw_data: vec![1; 4],
            ..Default::default()
        };
        vec![
            floats("k", &[1, 1, 1, 1]),
            floats("two", &[2]),
            floats("three", &[3]),
            floats("matrix", &[4, 4]),
            floats("cube", &[1, 1, 1]),
            floats("scales", &[4]),
            tensor("sixteen", &[1], &[16]),
            tensor("nine", &[4], &[1, 1, 3, 3]),
            tensor("0,0", &[2], &[0, 0]),
            tensor("2,2", &[2], &[2, 2]),
            tensor("2,3", &[2], &[2, 3]),
            tensor("3", &[1], &[3]),
            tensor("1", &[1], &[1]),
            empty,
            single,
            eight,
        ]
    };
    let cases: Vec<(Vec<NodeProto>, &str)> = vec![
        (vec![foreign], "got an operator of `com.other`, expected ONNX's own"),
        (vec![with(one("Softmax", &["z"]), vec![int("axis", 0)])], "got axis 0, expected the last one"),
        (vec![with(one("Softmax", &["z"]), vec![int("axis", 9)])], "got axis 9, expected one of 4 axes"),
        (vec![one("Constant", &[])], "the attribute `value` is missing"),
        (
            vec![with(one("Transpose", &["z"]), vec![ints("perm", &[0, 1])])],
            "got `perm` [0, 1] for shape [1, 1, 4, 4]",
        ),
        (vec![one("Conv", &["z", "k", "two"])], "got a bias of shape [2], expected [1]"),
        (
            vec![with(one("Conv", &["z", "k"]), vec![ints("strides", &[1])])],
            "got `strides` [1], expected two sizes",
        ),
        (vec![one("Conv", &["k", "k"])], "got a stored value as input 0, expected a computed one"),
        (vec![one("Conv", &["z", "z"])], "got a computed value as input 1, expected a stored one"),
        (vec![one("Conv", &["z"])], "input 1 is missing"),
        (vec![scaled], "got `alpha` or `beta`, expected 1"),
        (vec![one("Gemm", &["z", "cube"])], "got weights of shape [1, 1, 1], expected a matrix"),
        (vec![row, one("MatMul", &["row", "row"])], "got a vector, expected matrices"),
        (
            vec![one("BatchNormalization", &["z", "three", "three", "three", "three"])],
            "expected a channel per parameter",
        ),
        (vec![with(one("Concat", &[]), vec![int("axis", 1)])], "it has no input"),
        (
            vec![one("Slice", &["z", "0,0", "2,2", "2,3"])],
            "got several axes or steps, expected a range of one axis",
        ),
        (vec![one("Slice", &["z", "3", "1", "3"])], "got 3 to 1 of 4, expected at least one"),
        (vec![image(), one("Reshape", &["x", "nine"])], "for a value of shape"),
        (vec![resize], "got `mode` `cubic`, expected `nearest`"),
        (
            vec![node("DequantizeLinear", &["eight", "three"], "w"), one("Conv", &["z", "w"])],
            "got 3 scales, expected 1 or one per index of axis ",
        ),
    ];
    for (nodes, says) in cases {
        let ports = (vec![port("z", &DIMS, DataType::Float)], vec![port("y", &DIMS, DataType::Float)]);
        fs::write(dir.path().join("x.onnx"), model(ports, nodes, weights(), None))?;
        let done = run_bin("dmd-run", dir.path(), ["x.onnx", "--provider", "engine"])?;
        refused(&done, &["dmd-engine cannot run `x.onnx`: ", says]).with_context(|| says.to_owned())?;
    }
    for (table, says) in [
        ("single", "got a single number, expected a table"),
        ("empty", "got a table of shape [0, 2], expected some rows"),
    ] {
        let inputs = vec![port("z", &DIMS, DataType::Float), port("class", &["n"], DataType::Int64)];
        let nodes = vec![node("Gather", &[table, "class"], "row"), node("Add", &["z", "row"], "y")];
        let ports = (inputs, vec![port("y", &DIMS, DataType::Float)]);
        fs::write(dir.path().join("x.onnx"), model(ports, nodes, weights(), None))?;
        let done = run_bin("dmd-run", dir.path(), ["x.onnx", "--provider", "engine", "--class", "0"])?;
        refused(&done, &[says]).with_context(|| says.to_owned())?;
    }
    Ok(())
}

/// What the helpers make runs on the engine: the refusals above are about the nodes.
#[test]
fn the_forms_around_them_run() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let bytes = identity(&DIMS, "x_gen", DataType::Float, Some(card_json("generator", 4).to_string()));
    fs::write(dir.path().join("x.onnx"), bytes)?;
    teacher(dir.path())?;
    for model in ["x.onnx", "teacher.onnx"] {
        let done = run_bin("dmd-run", dir.path(), [model, "--provider", "engine", "--force"])?;
        anyhow::ensure!(done.code == Some(0), "{model}: {done:?}");
    }
    Ok(())
}
