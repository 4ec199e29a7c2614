//! Files that ask for too much: refused while the network is built, before memory is taken.

use dmd_engine::message::{Attribute, Graph, Model, Node, OperatorSet, Tensor, data_type};
use dmd_engine::{Input, Network};

fn floats(name: &str, dims: &[i64], values: &[f32]) -> Tensor {
    Tensor {
        name: name.to_owned(),
        dims: dims.to_vec(),
        data_type: data_type::FLOAT,
        float_data: values.to_vec(),
        ..Tensor::default()
    }
}

fn integers(name: &str, values: &[i64]) -> Tensor {
    Tensor {
        name: name.to_owned(),
        dims: vec![values.len() as i64],
        data_type: data_type::INT64,
        int64_data: values.to_vec(),
        ..Tensor::default()
    }
}

fn node(op: &str, inputs: &[&str], output: &str) -> Node {
    Node {
        op_type: op.to_owned(),
        input: inputs.iter().map(|i| (*i).to_owned()).collect(),
        output: vec![output.to_owned()],
        ..Node::default()
    }
}

fn with(mut node: Node, name: &str, ints: &[i64]) -> Node {
    node.attribute.push(Attribute { name: name.to_owned(), ints: ints.to_vec(), ..Attribute::default() });
    node
}

fn nearest(name: &str, value: &str) -> Attribute {
    Attribute { name: name.to_owned(), s: value.as_bytes().to_vec().into(), ..Attribute::default() }
}

/// The error of a network from `x`, an image of 8 by 8 pixels, to `y`.
fn refused(node: Vec<Node>, initializer: Vec<Tensor>) -> String {
    let model = Model { graph: Some(Graph { node, initializer, ..Graph::default() }), ..Model::default() };
    let built = Network::build(model, &[Input { name: "x", shape: &[1, 1, 8, 8] }], &["y"]);
    built.map(|_| ()).expect_err("it was accepted").to_string()
}

#[test]
fn sizes_are_refused_before_memory_is_taken() {
    let conv = |attribute: &str, ints: &[i64]| {
        let conv = with(node("Conv", &["x", "w"], "y"), attribute, ints);
        refused(vec![conv], vec![floats("w", &[1, 1, 1, 1], &[1.0])])
    };
    let beyond = conv("pads", &[1 << 40; 4]);
    assert!(beyond.contains("expected 0 to 65536"), "{beyond}");
    let padded = conv("pads", &[1 << 16; 4]);
    assert!(padded.contains("makes 17181966400 numbers, expected at most 268435456"), "{padded}");
    let far = conv("strides", &[i64::MAX; 2]);
    assert!(far.contains("expected 0 to 65536"), "{far}");
    let apart = with(node("ConvTranspose", &["x", "w"], "y"), "strides", &[1 << 16; 2]);
    let apart = refused(vec![apart], vec![floats("w", &[1, 1, 1, 1], &[1.0])]);
    assert!(apart.contains("numbers, expected at most 268435456"), "{apart}");
    let kernel = floats("w", &[1 << 32, 1, 1 << 32, 1], &[1.0]);
    let kernel = refused(vec![node("Conv", &["x", "w"], "y")], vec![kernel]);
    assert!(kernel.contains("`w` has 1 values, expected"), "{kernel}");

    let enlarged = |factor: f32| {
        let scales = floats("s", &[4], &[1.0, 1.0, factor, factor]);
        refused(vec![node("Resize", &["x", "", "s"], "y")], vec![scales])
    };
    let nearest = enlarged(1e30);
    assert!(nearest.contains("Resize"), "{nearest}");

    // 2^64 + 64 numbers are not 64.
    let wraps = integers("n", &[(1 << 60) + 4, 16]);
    let wraps = refused(vec![node("Reshape", &["x", "n"], "y")], vec![wraps]);
    assert!(wraps.contains("for a value of shape [1, 1, 8, 8]"), "{wraps}");
    let open = integers("n", &[1 << 62, 8, -1]);
    let open = refused(vec![node("Reshape", &["x", "n"], "y")], vec![open]);
    assert!(open.contains("for a value of shape [1, 1, 8, 8]"), "{open}");

    let name = |i: usize| if i == 0 { "x".to_owned() } else { format!("a{i}") };
    let mut doubled: Vec<Node> =
        (0..40).map(|i| node("Concat", &[&name(i), &name(i)], &name(i + 1))).collect();
    doubled.push(node("Neg", &["a40"], "y"));
    let doubled = refused(doubled, vec![]);
    assert!(doubled.contains("makes 536870912 numbers, expected at most 268435456"), "{doubled}");
}

#[test]
fn an_input_has_bounds() {
    let model = Model { graph: Some(Graph::default()), ..Model::default() };
    let built = Network::build(model, &[Input { name: "x", shape: &[1 << 20, 1 << 20] }], &["x"]);
    let problem = built.map(|_| ()).expect_err("it was accepted").to_string();
    assert!(problem.contains("the input `x` of shape [1048576, 1048576]"), "{problem}");
}

/// Each value is allowed; all at once are more than 4 GiB.
#[test]
fn a_workspace_has_bounds() {
    let enlarge = |i: usize| {
        let resize = node("Resize", &["x", "", "s"], &format!("r{i}"));
        let text = |name: &str, s: &'static str| Attribute {
            name: name.to_owned(),
            s: s.into(),
            ..Attribute::default()
        };
        let attribute =
            vec![text("coordinate_transformation_mode", "asymmetric"), text("nearest_mode", "floor")];
        Node { attribute, ..resize }
    };
    let mut nodes: Vec<Node> = (0..17).map(enlarge).collect();
    nodes.push(node("Add", &["r0", "r1"], "s1"));
    nodes.extend((2..17).map(|i| node("Add", &[&format!("s{}", i - 1), &format!("r{i}")], &format!("s{i}"))));
    nodes.push(node("Neg", &["s16"], "y"));
    let problem = refused(nodes, vec![floats("s", &[4], &[1.0, 1.0, 1024.0, 1024.0])]);
    assert!(problem.contains("numbers, expected at most 1073741824"), "{problem}");
}

#[test]
fn stored_values_are_not_multiplied_by_reading_them_again() {
    let table = || floats("w", &[1, 1, 256, 256], &[0.5; 1 << 16]);
    let readers = |count: usize| -> Vec<Node> {
        let name = |i: usize| if i == count { "y".to_owned() } else { format!("v{i}") };
        let first = node("Resize", &["x", "", "s"], "v0");
        let first = Node {
            attribute: vec![
                nearest("mode", "nearest"),
                nearest("nearest_mode", "floor"),
                nearest("coordinate_transformation_mode", "asymmetric"),
            ],
            ..first
        };
        let adds = (0..count).map(|i| node("Add", &[&name(i), "w"], &name(i + 1)));
        std::iter::once(first).chain(adds).collect()
    };
    let built = |count| {
        let graph = Graph {
            node: readers(count),
            initializer: vec![table(), floats("s", &[4], &[1.0, 1.0, 32.0, 32.0])],
            ..Graph::default()
        };
        let model = Model { graph: Some(graph), ..Model::default() };
        Network::build(model, &[Input { name: "x", shape: &[1, 1, 8, 8] }], &["y"])
            .map(|_| ())
            .map_err(|e| e.to_string())
    };
    assert_eq!(built(8), Ok(()));
    let refused = built(20_000).expect_err("20000 copies of one weight were made");
    assert!(refused.contains("stored numbers were read of 65540, expected at most 589856"), "{refused}");
}

#[test]
fn operators_of_other_versions_are_refused() {
    for (version, fits) in [(12, false), (13, true), (24, true), (25, false)] {
        let set = OperatorSet { domain: String::new(), version };
        let graph = Graph { node: vec![node("Relu", &["x"], "y")], ..Graph::default() };
        let model = Model { graph: Some(graph), opset_import: vec![set], ..Model::default() };
        let built = Network::build(model, &[Input { name: "x", shape: &[1, 1, 8, 8] }], &["y"]);
        match built.map(|_| ()).map_err(|e| e.to_string()) {
            Ok(()) => assert!(fits, "version {version} was accepted"),
            Err(refused) => assert!(
                !fits && refused.ends_with(&format!("got operators of opset {version}, expected 13 to 24")),
                "{refused}"
            ),
        }
    }
}

#[test]
fn more_messages_than_any_network_has_are_not_decoded() {
    let nodes = [0x0a, 0x00].repeat(1 << 18);
    let length = [0x80, 0x80, 0x20]; // 2^19 as a varint
    let bytes = [&[0x3a][..], &length, &nodes].concat();
    let problem = Model::from_bytes(bytes.into()).expect_err("it was decoded").to_string();
    assert!(problem.contains("more than 262144 messages and texts"), "{problem}");
}
