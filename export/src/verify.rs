//! Rules that every exported file keeps, checked on the ONNX messages themselves. Numbers are not checked here: tests
//! compare the file with `evaluate.rs`.

use std::collections::{BTreeMap, BTreeSet};

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{GraphProto, TensorProto};

use crate::{Error, Result};

/// Operators that a file may use, all of the default domain.
pub const OPERATORS: [&str; 29] = [
    "Add",
    "AveragePool",
    "BatchNormalization",
    "Cast",
    "Clip",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Cos",
    "Div",
    "Erf",
    "Floor",
    "Gather",
    "Gemm",
    "InstanceNormalization",
    "MatMul",
    "MaxPool",
    "Mul",
    "Relu",
    "Reshape",
    "Resize",
    "Sigmoid",
    "Sin",
    "Slice",
    "Softmax",
    "Softplus",
    "Tanh",
    "Transpose",
    "Unsqueeze",
];

/// What became of a checkpoint's parameters.
pub struct Parameters<'a> {
    /// How often each was read; all of them must be here.
    pub reads: &'a BTreeMap<String, usize>,
    /// Those that are stored under their own name.
    pub stored: &'a BTreeSet<String>,
}

/// Checks a graph.
///
/// - Only operators of [`OPERATORS`]; names are unique; inputs are defined before they are read.
/// - Every input, stored value and result is used, and no operator reads stored values alone.
/// - Stored values are finite and fill their shape.
/// - Every parameter of the checkpoint was read exactly once, and those not folded away are stored.
///
/// # Errors
/// Names the first node or value that breaks a rule.
pub fn verify<'a>(
    graph: &GraphProto,
    checkpoint: impl Iterator<Item = &'a String>,
    parameters: &Parameters,
) -> Result<()> {
    let stored = names_of_stored(graph)?;
    structure(graph, &stored)?;
    for name in checkpoint {
        match parameters.reads.get(name) {
            Some(1) => {}
            got => {
                return Err(wrong(
                    name,
                    &format!("the parameter is read {} times, expected once", got.unwrap_or(&0)),
                ));
            }
        }
        if parameters.stored.contains(name) && !stored.contains(name.as_str()) {
            return Err(wrong(name, "the parameter is neither folded nor stored"));
        }
    }
    Ok(())
}

fn wrong(name: &str, problem: &str) -> Error {
    Error::Verify(format!("`{name}`: {problem}"))
}

fn names_of_stored(graph: &GraphProto) -> Result<BTreeSet<&str>> {
    let mut stored = BTreeSet::new();
    for tensor in &graph.initializer {
        if !stored.insert(tensor.name.as_str()) {
            return Err(wrong(&tensor.name, "two stored values of this name"));
        }
        check_tensor(tensor)?;
    }
    Ok(stored)
}

fn check_tensor(tensor: &TensorProto) -> Result<()> {
    let size = if tensor.data_type == DataType::Int64 as i32 { 8 } else { 4 };
    let expected = size * tensor.dims.iter().product::<i64>();
    if tensor.raw_data.len() as i64 != expected {
        let got = tensor.raw_data.len();
        return Err(wrong(
            &tensor.name,
            &format!("got {got} bytes, expected {expected} for {:?}", tensor.dims),
        ));
    }
    let floats = tensor.raw_data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    if tensor.data_type == DataType::Float as i32 && floats.into_iter().any(|v| !v.is_finite()) {
        return Err(wrong(&tensor.name, "stored values are not finite"));
    }
    Ok(())
}

fn structure(graph: &GraphProto, stored: &BTreeSet<&str>) -> Result<()> {
    let mut defined = stored.clone();
    for input in &graph.input {
        if !defined.insert(&input.name) {
            return Err(wrong(&input.name, "the input has the name of another value"));
        }
    }
    let mut read = BTreeSet::new();
    let mut node_names = BTreeSet::new();
    for node in &graph.node {
        let name = &node.name;
        if !node.domain.is_empty() || !OPERATORS.contains(&node.op_type.as_str()) {
            return Err(wrong(name, &format!("operator `{}` is not on the list", node.op_type)));
        }
        let inputs: Vec<&str> = node.input.iter().map(String::as_str).filter(|i| !i.is_empty()).collect();
        if let Some(input) = inputs.iter().find(|input| !defined.contains(**input)) {
            return Err(wrong(name, &format!("reads `{input}` before it is defined")));
        }
        if inputs.iter().all(|input| stored.contains(input)) {
            return Err(wrong(name, "reads nothing but stored values"));
        }
        read.extend(inputs);
        if !node_names.insert(name) || !node.output.iter().all(|output| defined.insert(output)) {
            return Err(wrong(name, "the node has the name of another"));
        }
    }
    for output in &graph.output {
        if stored.contains(output.name.as_str()) || !defined.contains(output.name.as_str()) {
            return Err(wrong(&output.name, "no node computes the output"));
        }
        read.insert(&output.name);
    }
    match defined.iter().find(|name| !read.contains(*name)) {
        Some(name) => Err(wrong(name, "nothing reads it")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use tract_onnx::pb::{NodeProto, ValueInfoProto};

    use super::*;

    fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
        NodeProto {
            op_type: op.into(),
            name: output.into(),
            input: inputs.iter().map(|&i| i.into()).collect(),
            output: vec![output.into()],
            ..Default::default()
        }
    }

    fn value(name: &str) -> ValueInfoProto {
        ValueInfoProto { name: name.into(), ..Default::default() }
    }

    fn weight(name: &str, number: f32) -> TensorProto {
        let (data_type, raw_data) = (DataType::Float as i32, number.to_le_bytes().to_vec());
        TensorProto { name: name.into(), data_type, dims: vec![1], raw_data, ..Default::default() }
    }

    fn graph() -> GraphProto {
        GraphProto {
            input: vec![value("z")],
            initializer: vec![weight("a.bias", 1.0)],
            node: vec![node("Sigmoid", &["z"], "s"), node("Add", &["s", "a.bias"], "x_gen")],
            output: vec![value("x_gen")],
            ..Default::default()
        }
    }

    fn problem(graph: &GraphProto, reads: &[(&str, usize)]) -> Option<String> {
        let names = ["a.bias".to_owned(), "folded.weight".to_owned()];
        let reads = reads.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect();
        let stored = BTreeSet::from(["a.bias".to_owned()]);
        let parameters = Parameters { reads: &reads, stored: &stored };
        verify(graph, names.iter(), &parameters).err().map(|e| e.to_string())
    }

    #[test]
    fn each_broken_rule_is_named() {
        let good = [("a.bias", 1), ("folded.weight", 1)];
        assert_eq!(problem(&graph(), &good), None);
        type Damage = fn(&mut GraphProto);
        let broken: [(&str, Damage); 11] = [
            ("not on the list", |g| g.node[0].op_type = "Loop".into()),
            ("not on the list", |g| g.node[0].domain = "com.microsoft".into()),
            ("before it is defined", |g| g.node.reverse()),
            ("before it is defined", |g| g.node[0].input[0] = "t".into()),
            ("nothing but stored", |g| g.node[0].input[0] = "a.bias".into()),
            ("the name of another", |g| g.node[1].output[0] = "s".into()),
            ("`t`: nothing reads it", |g| g.input.push(value("t"))),
            ("`b`: nothing reads it", |g| g.initializer.push(weight("b", 0.0))),
            ("no node computes the output", |g| g.output[0].name = "a.bias".into()),
            ("not finite", |g| g.initializer[0] = weight("a.bias", f32::INFINITY)),
            ("expected 8 for", |g| g.initializer[0].dims = vec![2]),
        ];
        for (expected, damage) in broken {
            let mut graph = graph();
            damage(&mut graph);
            let got = problem(&graph, &good).unwrap_or_default();
            assert!(got.contains(expected), "got `{got}`, expected `{expected}`");
        }
    }

    #[test]
    fn each_parameter_is_read_once_and_stored_unless_folded() {
        let cases: [(&[(&str, usize)], &str); 3] = [
            (&[("a.bias", 1)], "`folded.weight`: the parameter is read 0 times"),
            (&[("a.bias", 2), ("folded.weight", 1)], "`a.bias`: the parameter is read 2 times"),
            (&[("a.bias", 1), ("folded.weight", 1)], "neither folded nor stored"),
        ];
        for (i, (reads, expected)) in cases.into_iter().enumerate() {
            let mut graph = graph();
            if i == 2 {
                graph.initializer[0].name = "other".into();
                graph.node[1].input[1] = "other".into();
            }
            let got = problem(&graph, reads).unwrap_or_default();
            assert!(got.contains(expected), "got `{got}`, expected `{expected}`");
        }
    }
}
