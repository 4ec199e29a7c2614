//! A graph under construction, and the ONNX messages it becomes.
//!
//! Nodes are only ever added; [`Graph::finish`] writes those that the output depends on and names them then, so that
//! an operation may replace another one by a better node without looking for its readers. No operator is chosen here.

use std::collections::{BTreeMap, BTreeSet};

use dmd_core::card::BATCH;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::{
    AttributeProto, GraphProto, NodeProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    attribute_proto::AttributeType, type_proto,
};

use crate::Array;

/// Something a node can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Edge {
    /// An input of the graph.
    Input(usize),
    /// A stored value.
    Constant(usize),
    /// The result of a node.
    Node(usize),
    /// An optional input that is left out.
    Absent,
}

/// A stored value: weights, or sizes that an operator wants as a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// f32 of any shape.
    Float(Array),
    /// int64 `[k]`.
    Sizes(Vec<i64>),
}

/// An attribute of an operator.
#[derive(Clone, Debug, PartialEq)]
pub enum Attribute {
    /// A number.
    Float(f32),
    /// A whole number.
    Int(i64),
    /// A list.
    Ints(Vec<i64>),
    /// A word.
    Text(&'static str),
}

/// An operator with one result.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// ONNX operator of the default domain.
    pub op: &'static str,
    /// Name of the node and of its result, made unique in the end.
    pub name: String,
    /// What it reads.
    pub inputs: Vec<Edge>,
    /// Its attributes.
    pub attributes: Vec<(&'static str, Attribute)>,
    /// Multiply-accumulate operations per image.
    pub macs: u64,
}

/// An input of the graph, `[n, shape…]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// Its name.
    pub name: &'static str,
    /// Type of its elements.
    pub element: DataType,
    /// Axes after the batch.
    pub shape: Vec<usize>,
}

/// An output of the graph, `[n, shape…]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Where it comes from.
    pub edge: Edge,
    /// Its name.
    pub name: &'static str,
    /// Type of its elements.
    pub element: DataType,
    /// Axes after the batch.
    pub shape: Vec<usize>,
}

/// The finished graph.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The ONNX message.
    pub graph: GraphProto,
    /// Multiply-accumulate operations per image.
    pub macs: u64,
}

/// Nodes, constants and inputs, in the order of creation.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    inputs: Vec<Input>,
    constants: Vec<(String, Data)>,
    nodes: Vec<Node>,
}

impl Graph {
    /// Declares an input.
    pub fn input(&mut self, input: Input) -> Edge {
        self.inputs.push(input);
        Edge::Input(self.inputs.len() - 1)
    }

    /// Stores a value under a name of its own.
    pub fn constant(&mut self, name: &str, data: Data) -> Edge {
        self.constants.push((name.to_owned(), data));
        Edge::Constant(self.constants.len() - 1)
    }

    /// Stores a value once for all who ask for the same one under the same name.
    pub fn shared(&mut self, name: &str, data: Data) -> Edge {
        match self.constants.iter().position(|(n, d)| n == name && *d == data) {
            Some(i) => Edge::Constant(i),
            None => self.constant(name, data),
        }
    }

    /// Adds a node without attributes.
    pub fn node(&mut self, op: &'static str, name: &str, inputs: &[Edge]) -> Edge {
        self.push(Node { op, name: name.into(), inputs: inputs.into(), attributes: vec![], macs: 0 })
    }

    /// Adds a node.
    pub fn push(&mut self, node: Node) -> Edge {
        self.nodes.push(node);
        Edge::Node(self.nodes.len() - 1)
    }

    /// The node behind a value, if one computes it.
    pub fn producer(&self, edge: Edge) -> Option<&Node> {
        match edge {
            Edge::Node(i) => self.nodes.get(i),
            _ => None,
        }
    }

    /// The name and the value of a constant.
    pub fn value(&self, edge: Edge) -> Option<&(String, Data)> {
        match edge {
            Edge::Constant(i) => self.constants.get(i),
            _ => None,
        }
    }

    /// Writes what `outputs` depend on as ONNX messages, for batches of `batch` images, or of any number.
    pub fn finish(&self, outputs: &[Output], batch: Option<usize>) -> Finished {
        let used = self.reachable(outputs);
        let mut names = Names::default();
        for (i, input) in self.inputs.iter().enumerate() {
            names.assign(Edge::Input(i), input.name);
        }
        for output in outputs {
            names.assign(output.edge, output.name);
        }
        for edge in &used {
            match *edge {
                Edge::Constant(i) => names.assign(*edge, &self.constants[i].0),
                Edge::Node(i) => names.assign(*edge, &self.nodes[i].name),
                Edge::Input(_) | Edge::Absent => {}
            }
        }
        let name = outputs.first().map_or("", |output| output.name);
        let mut graph = GraphProto { name: name.into(), ..Default::default() };
        let mut macs = 0;
        for edge in &used {
            match *edge {
                Edge::Node(i) => {
                    macs += self.nodes[i].macs;
                    graph.node.push(node_proto(&self.nodes[i], names.of(*edge), &names));
                }
                Edge::Constant(i) => {
                    graph.initializer.push(tensor_proto(names.of(*edge), &self.constants[i].1));
                }
                Edge::Input(_) | Edge::Absent => {}
            }
        }
        graph.input = self.inputs.iter().map(|i| value_info(i.name, i.element, batch, &i.shape)).collect();
        graph.output = outputs.iter().map(|o| value_info(o.name, o.element, batch, &o.shape)).collect();
        Finished { graph, macs }
    }

    /// Everything `outputs` depend on, in the order of creation within each kind.
    fn reachable(&self, outputs: &[Output]) -> BTreeSet<Edge> {
        let mut used = BTreeSet::new();
        let mut open: Vec<Edge> = outputs.iter().map(|output| output.edge).collect();
        while let Some(edge) = open.pop() {
            if edge != Edge::Absent && used.insert(edge) {
                open.extend(self.producer(edge).into_iter().flat_map(|node| &node.inputs));
            }
        }
        used
    }
}

/// One name per value.
#[derive(Default)]
struct Names {
    by_edge: BTreeMap<Edge, String>,
    taken: BTreeSet<String>,
}

impl Names {
    fn assign(&mut self, edge: Edge, wish: &str) {
        if self.by_edge.contains_key(&edge) {
            return;
        }
        let mut name = wish.to_owned();
        let mut count = 0;
        while !self.taken.insert(name.clone()) {
            count += 1;
            name = format!("{wish}_{count}");
        }
        self.by_edge.insert(edge, name);
    }

    fn of(&self, edge: Edge) -> &str {
        self.by_edge.get(&edge).map_or("", String::as_str)
    }
}

fn node_proto(node: &Node, name: &str, names: &Names) -> NodeProto {
    let inputs = node.inputs.iter().map(|&edge| names.of(edge).to_owned()).collect();
    message(node.op, name, inputs, &node.attributes)
}

/// The message of a node whose result has its name.
pub fn message(
    op: &str,
    name: &str,
    inputs: Vec<String>,
    attributes: &[(&'static str, Attribute)],
) -> NodeProto {
    NodeProto {
        op_type: op.into(),
        name: name.into(),
        input: inputs,
        output: vec![name.into()],
        attribute: attributes.iter().map(|(name, value)| attribute_proto(name, value)).collect(),
        ..Default::default()
    }
}

fn attribute_proto(name: &str, value: &Attribute) -> AttributeProto {
    let mut proto = AttributeProto { name: name.into(), ..Default::default() };
    let kind = match value {
        Attribute::Float(v) => {
            proto.f = *v;
            AttributeType::Float
        }
        Attribute::Int(v) => {
            proto.i = *v;
            AttributeType::Int
        }
        Attribute::Ints(v) => {
            proto.ints.clone_from(v);
            AttributeType::Ints
        }
        Attribute::Text(v) => {
            proto.s = v.as_bytes().to_vec();
            AttributeType::String
        }
    };
    proto.r#type = kind as i32;
    proto
}

fn tensor_proto(name: &str, data: &Data) -> TensorProto {
    let (kind, dims, raw_data) = match data {
        Data::Float(array) => (
            DataType::Float,
            array.shape.iter().map(|&n| n as i64).collect(),
            array.data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        ),
        Data::Sizes(sizes) => (
            DataType::Int64,
            vec![sizes.len() as i64],
            sizes.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>(),
        ),
    };
    TensorProto { name: name.into(), data_type: kind as i32, dims, raw_data, ..Default::default() }
}

fn value_info(name: &str, element: DataType, batch: Option<usize>, shape: &[usize]) -> ValueInfoProto {
    let fixed = |n: usize| dimension::Value::DimValue(n as i64);
    let batch = batch.map_or(dimension::Value::DimParam(BATCH.into()), fixed);
    let dims = std::iter::once(batch).chain(shape.iter().map(|&n| fixed(n)));
    let tensor = type_proto::Tensor {
        elem_type: element as i32,
        shape: Some(TensorShapeProto {
            dim: dims.map(|value| Dimension { value: Some(value), ..Default::default() }).collect(),
        }),
    };
    ValueInfoProto {
        name: name.into(),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() }),
        ..Default::default()
    }
}
