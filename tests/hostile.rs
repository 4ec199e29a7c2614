//! Files made to hurt: whatever is in them, the native runtime ends with an error and not with the process, and sizes are
//! refused before memory is taken. `DMD_HOSTILE_ROUNDS=100` makes a hundred times as many damaged and random files.

mod models;
mod nodes;

use std::path::Path;

use anyhow::{Result, ensure};
use dmd_runtime_native::{BUNDLED, Generator, ModelFile, Options, Provider, Request};
use prost::Message;
use tempfile::TempDir;
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto,
};

use crate::models::{card_json, identity, model, node, port, teacher};
use crate::nodes::{int, ints, tensor, with};

/// Draws one image by tract if it can be had; the error otherwise. The project's engine, which has fewer operators, must
/// survive the file too.
fn attempt(bytes: &[u8]) -> Result<(), String> {
    let _ = attempt_by(Provider::Engine, bytes);
    attempt_by(Provider::Tract, bytes)
}

fn attempt_by(provider: Provider, bytes: &[u8]) -> Result<(), String> {
    let options = Options { provider, threads: Some(1), ..Options::default() };
    let file = ModelFile::parse("it", bytes.to_vec()).map_err(|e| e.to_string())?;
    let generator = Generator::load(file, &options).map_err(|e| e.to_string())?;
    let request = Request { steps: None, ..Request::new(1, 1) };
    let steps = Request { steps: Some(1), ..request.clone() };
    generator.sample(&steps, &|_| {}).map(drop).map_err(|e| e.to_string())
}

fn refused(what: &str, bytes: &[u8], says: &str) -> Result<()> {
    let got = attempt(bytes).err().unwrap_or_else(|| "an image".to_owned());
    ensure!(got.contains(says), "{what}: got {got}, expected {says}");
    Ok(())
}

/// Panics of tract are caught and become errors; their backtraces would cost more than the work.
fn without_backtraces() {
    std::panic::set_hook(Box::new(|info| println!("{info}")));
}

/// A model of 1x4x4 images from `z` to `y`.
fn graph(nodes: Vec<NodeProto>, weights: Vec<TensorProto>) -> Vec<u8> {
    let dims = ["n", "1", "4", "4"];
    let port = |name| vec![port(name, &dims, DataType::Float)];
    model((port("z"), port("y")), nodes, weights, None)
}

#[test]
fn stored_values_must_be_as_many_as_their_shape_says() -> Result<()> {
    let weight =
        |dims: &[i64]| graph(vec![node("Identity", &["z"], "y")], vec![tensor("w", dims, &[1, 2, 3, 4])]);
    ensure!(attempt(&weight(&[2, 2])) == Ok(()));
    for (dims, says) in [
        (&[1 << 40][..], "expected 1099511627776 values, got 4"),
        (&[1 << 32, 1 << 32], "has shape"),
        (&[i64::MAX, 2], "has shape"),
        (&[-4], "has shape [-4]"),
        (&[3], "expected 3 values, got 4"),
        (&[], "expected 1 values, got 4"),
    ] {
        refused(&format!("{dims:?}"), &weight(dims), says)?;
    }
    let raw = |bytes: usize| TensorProto {
        raw_data: vec![0; bytes],
        int64_data: Vec::new(),
        ..tensor("w", &[2], &[])
    };
    ensure!(attempt(&graph(vec![node("Identity", &["z"], "y")], vec![raw(16)])) == Ok(()));
    refused("raw", &graph(vec![node("Identity", &["z"], "y")], vec![raw(8)]), "expected 2 values, got 1")?;
    let constant = AttributeProto {
        name: "value".to_owned(),
        r#type: AttributeType::Tensor as i32,
        t: Some(tensor("w", &[1 << 50], &[1])),
        ..Default::default()
    };
    let nodes = vec![with(node("Constant", &[], "c"), vec![constant]), node("Add", &["z", "c"], "y")];
    refused("a constant", &graph(nodes, Vec::new()), "values, got 1")
}

#[test]
fn images_and_batches_beyond_measure_are_refused() -> Result<()> {
    for dims in [["1", "16", "65536", "65536"], ["65536", "3", "256", "256"], ["n", "65536", "65536", "1"]] {
        let bytes = identity(&dims, "y", DataType::Float, None);
        refused(&format!("{dims:?}"), &bytes, "expected at most 268435456 values")?;
    }
    refused("a dimension", &identity(&["n", "1", "65537", "1"], "y", DataType::Float, None), "dimension of")?;
    let nested = format!("{}n{}", "(".repeat(100_000), ")".repeat(100_000));
    refused("a name", &identity(&[&nested, "1", "4", "4"], "y", DataType::Float, None), "expected at most 64")
}

#[test]
fn more_messages_than_any_network_has_are_not_decoded() -> Result<()> {
    let graph = GraphProto { node: vec![NodeProto::default(); 1 << 18], ..Default::default() };
    let bytes = ModelProto { graph: Some(graph), ..Default::default() }.encode_to_vec();
    refused("empty nodes", &bytes, "more than 262144 messages and texts")
}

/// What tract would compute while it builds its plan, or while it runs it.
#[test]
fn sizes_are_refused_before_memory_is_taken() -> Result<()> {
    let sum = |of: &str| node("ReduceSum", &[of], "s");
    let add = || node("Add", &["z", "s"], "y");
    let huge = 1 << 20;
    let cases: Vec<(&str, Vec<NodeProto>, Vec<TensorProto>)> = vec![
        (
            "ConstantOfShape",
            vec![node("ConstantOfShape", &["w"], "a")],
            vec![tensor("w", &[2], &[huge, huge])],
        ),
        ("Expand", vec![node("Expand", &["z", "w"], "a")], vec![tensor("w", &[4], &[huge, 1024, 4, 4])]),
        ("Tile", vec![node("Tile", &["z", "w"], "a")], vec![tensor("w", &[4], &[huge, 1024, 1, 1])]),
        (
            "Pad",
            vec![node("Pad", &["z", "w"], "a")],
            vec![tensor("w", &[8], &[0, 0, 0, 0, 0, 0, huge, huge])],
        ),
        (
            "Range",
            vec![node("Range", &["w", "v", "u"], "a")],
            vec![tensor("w", &[], &[0]), tensor("v", &[], &[huge * huge]), tensor("u", &[], &[1])],
        ),
        (
            "Conv",
            vec![with(node("Conv", &["z", "k"], "a"), vec![ints("pads", &[huge, huge, huge, huge])])],
            vec![TensorProto {
                data_type: DataType::Float as i32,
                int64_data: Vec::new(),
                float_data: vec![1.0],
                ..tensor("k", &[1, 1, 1, 1], &[])
            }],
        ),
    ];
    for (what, mut nodes, weights) in cases {
        nodes.extend([sum("a"), add()]);
        let got = attempt(&graph(nodes, weights)).err().unwrap_or_default();
        ensure!(got.contains("expected at most") || got.contains("cannot be told"), "{what}: got `{got}`");
    }
    for (what, first) in [("of the input", "z"), ("of a constant", "w")] {
        let name = |i: usize| if i == 0 { first.to_owned() } else { format!("a{i}") };
        let double = |i| with(node("Concat", &[&name(i), &name(i)], &name(i + 1)), vec![int("axis", 1)]);
        let mut nodes: Vec<NodeProto> = (0..50).map(double).collect();
        nodes.extend([node("Cast", &["a50"], "f"), sum("f"), add()]);
        nodes[50].attribute.push(int("to", DataType::Float as i64));
        refused(what, &graph(nodes, vec![tensor("w", &[1, 1, 1, 1], &[7])]), "expected at most")?;
    }
    Ok(())
}

/// The same of the project's engine.
#[test]
fn sizes_are_refused_before_the_engine_takes_memory() -> Result<()> {
    let refused = |what: &str, bytes: &[u8], says: &str| -> Result<()> {
        let got = attempt_by(Provider::Engine, bytes).err().unwrap_or_else(|| "an image".to_owned());
        ensure!(got.contains(says), "{what}: got `{got}`, expected `{says}`");
        Ok(())
    };
    let kernel = TensorProto {
        data_type: DataType::Float as i32,
        int64_data: Vec::new(),
        float_data: vec![1.0],
        ..tensor("k", &[1, 1, 1, 1], &[])
    };
    for (pad, says) in [(1 << 16, "expected at most 268435456"), (1 << 40, "got `pads`"), (-1, "got `pads`")]
    {
        let conv = with(node("Conv", &["z", "k"], "y"), vec![ints("pads", &[pad; 4])]);
        refused("Conv", &graph(vec![conv], vec![kernel.clone()]), says)?;
    }
    let name = |i: usize| if i == 0 { "z".to_owned() } else { format!("a{i}") };
    let double = |i| with(node("Concat", &[&name(i), &name(i)], &name(i + 1)), vec![int("axis", 1)]);
    let doubled = |n: usize| {
        let back = TensorProto { data_type: DataType::Int64 as i32, ..tensor("k", &[1], &[1]) };
        let [starts, axes] = ["starts", "axes"].map(|name| TensorProto { name: name.into(), ..back.clone() });
        let starts = TensorProto { int64_data: vec![0], ..starts };
        let mut nodes: Vec<NodeProto> = (0..n).map(double).collect();
        nodes.push(node("Slice", &[&name(n), "starts", "k", "axes"], "y"));
        graph(nodes, vec![back, starts, axes])
    };
    ensure!(attempt_by(Provider::Engine, &doubled(3)) == Ok(()));
    refused("Concat", &doubled(50), "expected at most 268435456")
}

#[test]
fn graphs_that_no_exporter_writes_are_errors() -> Result<()> {
    without_backtraces();
    let cycle =
        vec![node("Add", &["z", "b"], "a"), node("Add", &["z", "a"], "b"), node("Add", &["a", "b"], "y")];
    ensure!(attempt(&graph(cycle, Vec::new())).is_err(), "a cycle");
    ensure!(attempt(&graph(vec![node("Add", &["z", "y"], "y")], Vec::new())).is_err(), "a loop");
    ensure!(attempt(&graph(vec![node("Add", &["z", "none"], "y")], Vec::new())).is_err(), "an absent input");
    ensure!(attempt(&graph(vec![node("Gemmm", &["z"], "y")], Vec::new())).is_err(), "an unknown operator");
    let twice = vec![node("Identity", &["z"], "y"), node("Neg", &["z"], "y")];
    let _ = attempt(&graph(twice, Vec::new()));
    let chain = (0..2000).map(|i| {
        let name = |i: usize| if i == 0 { "z".to_owned() } else { format!("a{i}") };
        node("Neg", &[&name(i)], &if i == 1999 { "y".to_owned() } else { name(i + 1) })
    });
    ensure!(attempt(&graph(chain.collect(), Vec::new())) == Ok(()), "a chain");

    let graph_of = |g: GraphProto| AttributeProto {
        name: "body".to_owned(),
        r#type: AttributeType::Graph as i32,
        g: Some(g),
        ..Default::default()
    };
    let mut inner = GraphProto { node: vec![node("Identity", &["z"], "y")], ..Default::default() };
    for depth in 0..1000 {
        if depth == 10 {
            let nodes = inner.node.clone();
            refused("a body", &graph(nodes, Vec::new()), "holds a graph")?;
        }
        inner = GraphProto {
            node: vec![with(node("Loop", &["z"], "y"), vec![graph_of(inner)])],
            ..Default::default()
        };
    }
    refused("bodies in bodies", &graph(inner.node, Vec::new()), "recursion limit")
}

#[test]
fn a_card_without_one_of_its_keys_is_refused_or_runs() -> Result<()> {
    let card = card_json("generator", 4);
    let dims = ["n", "1", "4", "4"];
    let bytes = |card: String| identity(&dims, "x_gen", DataType::Float, Some(card));
    ensure!(attempt(&bytes(card.to_string())) == Ok(()));
    for key in card.as_object().into_iter().flat_map(|card| card.keys()) {
        for value in
            [None, Some(serde_json::json!(-1)), Some(serde_json::json!([[1e308]])), Some("\0".into())]
        {
            let mut card = card.clone();
            match value {
                Some(value) => card[key] = value,
                None => drop(card.as_object_mut().and_then(|card| card.remove(key))),
            }
            let _ = attempt(&bytes(card.to_string()));
        }
    }
    for key in ["image", "schedule", "noise", "card_version", "kind"] {
        let mut card = card.clone();
        card.as_object_mut().and_then(|card| card.remove(key));
        refused(key, &bytes(card.to_string()), key)?;
    }
    refused("a deep card", &bytes("[".repeat(1 << 20)), "recursion limit")
}

#[test]
fn data_outside_that_is_not_there_is_refused() -> Result<()> {
    let dir = TempDir::new()?;
    let path = dir.path().join("model.onnx");
    std::fs::write(dir.path().join("data"), [0; 16])?;
    std::fs::create_dir(dir.path().join("folder"))?;
    let outside = |name: &str, entries: &[(&str, &str)]| {
        let entry = |(key, value): &(&str, &str)| StringStringEntryProto {
            key: (*key).into(),
            value: (*value).into(),
        };
        TensorProto {
            data_location: Some(DataLocation::External as i32),
            external_data: entries.iter().map(entry).collect(),
            ..tensor(name, &[2], &[])
        }
    };
    let read = |weights: Vec<TensorProto>| -> Result<Option<String>> {
        std::fs::write(&path, graph(vec![node("Identity", &["z"], "y")], weights))?;
        Ok(ModelFile::read(&path).err().map(|e| e.to_string()))
    };
    let place = ("location", "data");
    ensure!(read(vec![outside("w", &[place])])?.is_none());
    for (entries, says) in [
        (&[place, ("offset", "18446744073709551615")][..], "but the file has 16"),
        (&[place, ("length", "18446744073709551615")], "but the file has 16"),
        (&[place, ("offset", "1"), ("length", "18446744073709551615")], "but the file has 16"),
        (&[place, ("offset", "-1")], "has the offset `-1`"),
        (&[place, ("length", "8")], "expected 2 values, got 1"),
        (&[("location", "none")], "cannot be read"),
        (&[("location", "folder")], "weight `w`"),
        (&[("location", "../data")], "expected a file beside the model"),
        (&[("location", "/etc/passwd")], "expected a file beside the model"),
        (&[], "expected a file beside the model"),
    ] {
        let got = read(vec![outside("w", entries)])?.unwrap_or_default();
        ensure!(got.contains(says) || says == "weight `w`" && !got.is_empty(), "{entries:?}: got `{got}`");
    }
    let many = (0..1000).map(|i| outside(&format!("w{i}"), &[place])).collect();
    ensure!(read(many)?.is_some_and(|e| e.contains("where another does")));
    let mut constant = int("value", 0);
    constant.t = Some(outside("w", &[place]));
    let nodes = vec![with(node("Constant", &[], "c"), vec![constant]), node("Identity", &["z"], "y")];
    refused("a constant", &graph(nodes, Vec::new()), "lies in another file")
}

/// Numbers of a fixed sequence (xorshift64*).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// How many files a test makes: `n`, or as many times more as `DMD_HOSTILE_ROUNDS` says.
fn rounds(n: usize) -> Result<usize> {
    Ok(match std::env::var("DMD_HOSTILE_ROUNDS") {
        Ok(times) => n * times.parse::<usize>()?,
        Err(_) => n,
    })
}

/// Damages bytes: flips, cuts, lengths that grow, parts that move.
fn damaged(bytes: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..dice.of(&[1, 1, 1, 2, 5]) {
        let at = dice.below(bytes.len().max(1));
        match dice.below(6) {
            _ if bytes.is_empty() => {}
            0 => bytes[at] ^= 1 << dice.below(8),
            1 => bytes[at] = dice.of(&[0, 1, 0x7f, 0x80, 0xff]),
            2 => bytes.truncate(at),
            3 => {
                let end = (at + 9).min(bytes.len());
                bytes[at..end].fill(0xff);
            }
            4 => drop(bytes.splice(at..at, [0xff, 0xff, 0xff, 0xff, 0x07])),
            _ => {
                let (from, len) = (dice.below(bytes.len()), dice.below(64));
                let part = bytes[from..(from + len).min(bytes.len())].to_vec();
                drop(bytes.splice(at..at, part));
            }
        }
    }
    bytes
}

#[test]
fn damaged_files_are_errors_or_run() -> Result<()> {
    without_backtraces();
    let dir = TempDir::new()?;
    let read = |path: &Path| std::fs::read(path);
    let card = card_json("generator", 4).to_string();
    let half =
        TensorProto { data_type: DataType::Float as i32, float_data: vec![0.5], ..tensor("w", &[1], &[]) };
    let seeds = [
        read(&teacher(dir.path())?)?,
        identity(&["2", "1", "4", "4"], "x_gen", DataType::Float, Some(card)),
        graph(vec![node("Add", &["z", "w"], "y")], vec![half]),
    ];
    for (i, seed) in seeds.iter().enumerate() {
        ensure!(attempt(seed) == Ok(()), "{i}: {:?}", attempt(seed));
    }
    let mut dice = Dice(7);
    let (mut ran, mut failed) = (0, 0);
    for i in 0..rounds(3000)? {
        match attempt(&damaged(&seeds[i % seeds.len()], &mut dice)) {
            Ok(()) => ran += 1,
            Err(_) => failed += 1,
        }
    }
    ensure!(ran > 20 && failed > 1000, "{ran} ran and {failed} failed: the damage is too large or too small");
    // The bundled model without its values, whose every byte says something, then as it is.
    let mut bare = ModelProto::decode(BUNDLED)?;
    bare.graph.iter_mut().flat_map(|g| &mut g.initializer).for_each(|w| w.raw_data.truncate(64));
    let bare = bare.encode_to_vec();
    for _ in 0..rounds(3000)? {
        let _ = ModelFile::parse("it", damaged(&bare, &mut dice));
    }
    for _ in 0..rounds(20)? {
        let _ = attempt(&damaged(BUNDLED, &mut dice));
    }
    Ok(())
}

#[test]
fn random_graphs_are_errors_or_run() -> Result<()> {
    without_backtraces();
    let operators: Vec<&str> =
        "Add Mul Conv ConvTranspose Reshape Transpose Concat Gather Slice MatMul Gemm Softmax \
        InstanceNormalization BatchNormalization Resize MaxPool AveragePool Cast Tile Expand Pad Split \
        Squeeze Unsqueeze ReduceMean Shape ConstantOfShape Range OneHot Einsum DepthToSpace \
        SpaceToDepth Flatten NonZero TopK Where Clip GlobalAveragePool"
            .split(' ')
            .collect();
    let names: Vec<&str> =
        "axis axes pads strides kernel_shape group dilations perm to blocksize starts ends split \
        output_shape output_padding mode equation keepdims num_outputs transB"
            .split(' ')
            .collect();
    let numbers = [-1, 0, 1, 2, 3, 4, -9, 100, 1 << 20, 1 << 40, i64::MAX, i64::MIN];
    let mut dice = Dice(11);
    let mut ran = 0;
    for _ in 0..rounds(4000)? {
        let mut weights = Vec::new();
        for name in ["w", "v"] {
            let len = 1 + dice.below(4);
            let values: Vec<i64> = (0..len).map(|_| dice.of(&numbers)).collect();
            weights.push(tensor(name, &[len as i64], &values));
        }
        let size = [1, 1, 1 + dice.below(3) as i64, 1 + dice.below(3) as i64];
        weights.push(TensorProto {
            data_type: DataType::Float as i32,
            float_data: vec![0.5; (size[2] * size[3]) as usize],
            ..tensor("k", &size, &[])
        });
        let count = 1 + dice.below(3);
        let nodes = (0..count).map(|i| {
            let before = if i == 0 { "z".to_owned() } else { format!("a{}", i - 1) };
            let mut inputs = vec![before.as_str()];
            inputs.extend((0..dice.below(3)).map(|_| dice.of(&["w", "v", "k", "z", ""])));
            let output = if i + 1 == count { "y".to_owned() } else { format!("a{i}") };
            let attributes = (0..dice.below(4)).map(|_| {
                let name = dice.of(&names);
                match dice.below(3) {
                    0 => int(name, dice.of(&numbers)),
                    1 => ints(name, &(0..dice.below(5)).map(|_| dice.of(&numbers)).collect::<Vec<_>>()),
                    _ => AttributeProto {
                        s: dice.of(&["linear", "ab,bc->ac", "...->...", "->", "nearest"]).into(),
                        r#type: AttributeType::String as i32,
                        ..int(name, 0)
                    },
                }
            });
            let attributes = attributes.collect();
            with(node(dice.of(&operators), &inputs, &output), attributes)
        });
        let bytes = graph(nodes.collect(), weights);
        ran += usize::from(attempt(&bytes).is_ok());
    }
    ensure!(ran > 40, "{ran} of 4000 graphs ran: they are too wild");
    Ok(())
}
