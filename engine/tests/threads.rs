//! Every operator that is shared among threads, large enough to be: no number of threads changes a bit.

mod support;

use dmd_engine::message::{Graph, Model, Node, Tensor};
use dmd_engine::{Input, Network, Result};
use support::{floats, int, ints, node, numbers};

/// Runs the nodes on `x` on one thread and on 2, 3, 7 and 16.
fn check(what: &str, shape: &[usize], nodes: Vec<Node>, initializer: Vec<Tensor>) -> Result<()> {
    let x = numbers(shape.iter().product(), 1);
    let graph = Graph { node: nodes, initializer, ..Graph::default() };
    let model = Model { graph: Some(graph), ..Model::default() };
    let network = Network::build(model, &[Input { name: "x", shape }], &["y"])?;
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("no threads");
        let mut workspace = network.workspace();
        let got = pool.install(|| network.run(&mut workspace, &[&x]).map(|got| got[0].to_vec()));
        got.map(|y| y.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let one = run(1)?;
    assert!(one.iter().any(|bits| *bits != one[0]), "{what} gives one value only");
    for threads in [2, 3, 7, 16] {
        assert!(run(threads)? == one, "{what} differs on {threads} threads");
    }
    Ok(())
}

#[test]
fn threads_change_no_bit_of_a_convolution() -> Result<()> {
    for (input, output, side, kernel, stride, pad) in [
        (64, 67, 32, 3, 1, 1),
        (40, 45, 17, 3, 1, 1),
        (128, 64, 8, 3, 1, 1),
        (256, 128, 4, 3, 1, 1),
        (64, 9, 32, 3, 2, 1),
        (192, 130, 16, 1, 1, 0),
        (192, 2, 31, 3, 1, 1),
    ] {
        let attribute = vec![ints("strides", &[stride; 2]), ints("pads", &[pad; 4])];
        let conv = Node { attribute, ..node("Conv", &["x", "w", "b"], "y") };
        let weight = numbers(output * input * kernel * kernel, 2);
        let stored = vec![
            floats("w", &[output, input, kernel, kernel], &weight),
            floats("b", &[output], &numbers(output, 3)),
        ];
        let what = format!("{input} to {output} channels of {side}x{side} by {kernel}/{stride}");
        check(&what, &[2, input, side, side], vec![conv], stored)?;
    }
    let attribute = vec![ints("strides", &[2; 2]), ints("pads", &[1; 4])];
    let conv = Node { attribute, ..node("ConvTranspose", &["x", "w"], "y") };
    let stored = vec![floats("w", &[48, 33, 4, 4], &numbers(48 * 33 * 16, 2))];
    check("a transposed convolution", &[1, 48, 15, 15], vec![conv], stored)
}

#[test]
fn threads_change_no_bit_of_a_normalisation() -> Result<()> {
    let channels = 96;
    let stored = || {
        let parameters = ["s", "b"].map(|name| floats(name, &[channels], &numbers(channels, 4)));
        let positive: Vec<f32> = numbers(channels, 5).iter().map(|v| v.abs() + 0.1).collect();
        let [mean, variance] = ["m", "v"].map(|name| floats(name, &[channels], &positive));
        [&parameters[..], &[mean, variance]].concat()
    };
    let shape = [2, channels, 31, 31];
    check("instances", &shape, vec![node("InstanceNormalization", &["x", "s", "b"], "y")], stored())?;
    check("batches", &shape, vec![node("BatchNormalization", &["x", "s", "b", "m", "v"], "y")], stored())?;
    let last = Node { attribute: vec![int("axis", -1)], ..node("Softmax", &["x"], "y") };
    check("softmax", &[3, 331, 257], vec![last], vec![])
}

#[test]
fn threads_change_no_bit_of_functions() -> Result<()> {
    for op in ["Sigmoid", "Relu", "Tanh", "Softplus", "Erf", "Sin", "Floor"] {
        check(op, &[3, 7, 101, 103], vec![node(op, &["x"], "y")], vec![])?;
    }
    let gated = vec![node("Sigmoid", &["x"], "s"), node("Mul", &["x", "s"], "y")];
    check("SiLU", &[3, 7, 101, 103], gated, vec![])?;
    for b in
        [vec![3, 7, 101, 103], vec![1, 7, 1, 1], vec![1, 1, 101, 103], vec![3, 7, 101, 1], vec![3, 1, 1, 1]]
    {
        let values = numbers(b.iter().product(), 6);
        for op in ["Add", "Sub", "Div"] {
            let what = format!("{op} of {b:?}");
            let stored = vec![floats("b", &b, &values)];
            check(&what, &[3, 7, 101, 103], vec![node(op, &["x", "b"], "y")], stored)?;
        }
    }
    Ok(())
}

#[test]
fn threads_change_no_bit_of_attention_and_linear_layers() -> Result<()> {
    let turned = |input: &str, output: &str| Node {
        attribute: vec![ints("perm", &[0, 2, 1])],
        ..node("Transpose", &[input], output)
    };
    let nodes = vec![
        turned("x", "rows"),
        node("MatMul", &["rows", "x"], "scores"),
        Node { attribute: vec![int("axis", -1)], ..node("Softmax", &["scores"], "p") },
        turned("p", "columns"),
        node("MatMul", &["x", "columns"], "y"),
    ];
    check("attention", &[2, 70, 251], nodes, vec![])?;
    let gemm = Node { attribute: vec![int("transB", 1)], ..node("Gemm", &["x", "w", "b"], "y") };
    let stored =
        vec![floats("w", &[1001, 515], &numbers(1001 * 515, 2)), floats("b", &[1001], &numbers(1001, 3))];
    check("a linear layer", &[3, 515], vec![gemm], stored)
}
