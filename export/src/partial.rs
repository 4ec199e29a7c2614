//! Values of a network during export, and what folds them: the part of partial evaluation that no operator has of
//! its own. What does not depend on the image is computed at once by `evaluate.rs`; a table with one row per class
//! meets the image through one `Gather`. Must not contain operators of networks, those are in `ops.rs`.

use std::collections::{BTreeMap, BTreeSet};

use tract_onnx::pb::tensor_proto::DataType;

use crate::evaluate::Evaluate;
use crate::graph::{Attribute, Data, Edge, Graph, Input, Node, Output};
use crate::{Array, Error, Result};

/// A value of the network during export.
#[derive(Clone, Debug)]
pub enum Value {
    /// The same for every image: the first axis is 1.
    Const(Known),
    /// Depends on the class alone: the first axis is the class.
    Table(Known),
    /// Depends on the image.
    Flow(Flow),
}

/// A value that is known at export.
#[derive(Clone, Debug)]
pub struct Known {
    /// The value, for one image or for every class.
    pub array: Array,
    /// Name it gets where it must be stored.
    pub name: String,
}

/// A value that the graph computes.
#[derive(Clone, Debug)]
pub struct Flow {
    /// Where it comes from.
    pub edge: Edge,
    /// Axes after the batch.
    pub shape: Vec<usize>,
}

/// The exporter's interpreter.
pub struct Exporter<'a> {
    /// The operators so far.
    pub graph: Graph,
    /// Parameters that were stored, not folded away.
    pub stored: BTreeSet<String>,
    /// Whether a convolution of an enlarged image becomes one of the small image, see `convolution.rs`.
    pub enlarging: bool,
    pub(crate) evaluate: Evaluate<'a>,
    class: Option<Edge>,
}

impl Flow {
    /// The value as an f32 output of the graph.
    pub fn output(&self, name: &'static str) -> Output {
        Output { edge: self.edge, name, element: DataType::Float, shape: self.shape.clone() }
    }
}

impl<'a> Exporter<'a> {
    /// Starts with an empty graph.
    pub fn new(weights: &'a BTreeMap<String, Array>) -> Self {
        let evaluate = Evaluate::new(weights);
        Self { graph: Graph::default(), stored: BTreeSet::new(), enlarging: true, evaluate, class: None }
    }

    /// Declares a f32 input `[n, shape…]`.
    pub fn input(&mut self, name: &'static str, shape: &[usize]) -> Value {
        let edge = self.graph.input(Input { name, element: DataType::Float, shape: shape.into() });
        flow(edge, shape)
    }

    /// Declares the class input, int64 `[n]`: the table whose row `k` is `k`.
    pub fn class(&mut self, name: &'static str, rows: usize) -> Value {
        self.class = Some(self.graph.input(Input { name, element: DataType::Int64, shape: vec![] }));
        let data = (0..rows).map(|k| k as f32).collect();
        Value::Table(Known { array: Array { shape: vec![rows], data }, name: name.into() })
    }

    /// How often each parameter was read, folded or stored.
    pub fn reads(&self) -> &BTreeMap<String, usize> {
        &self.evaluate.reads
    }

    /// Computes an operation at once if nothing in it depends on the image.
    pub(crate) fn fold(
        &mut self,
        name: &str,
        inputs: &[&Value],
        operation: impl FnOnce(&mut Evaluate<'a>, &[&Array]) -> Result<Array>,
    ) -> Result<Option<Value>> {
        let mut arrays = Vec::with_capacity(inputs.len());
        let mut per_class = false;
        for input in inputs {
            match input {
                Value::Const(known) => arrays.push(&known.array),
                Value::Table(known) => {
                    per_class = true;
                    arrays.push(&known.array);
                }
                Value::Flow(_) => return Ok(None),
            }
        }
        let known = Known { array: operation(&mut self.evaluate, &arrays)?, name: name.to_owned() };
        Ok(Some(if per_class { Value::Table(known) } else { Value::Const(known) }))
    }

    /// The value in the graph. A constant keeps a first axis of 1, which only broadcasting operators may read.
    pub(crate) fn lift(&mut self, value: &Value) -> Result<Flow> {
        match value {
            Value::Flow(flow) => Ok(flow.clone()),
            Value::Const(known) => {
                let edge = self.graph.constant(&known.name, Data::Float(known.array.clone()));
                Ok(Flow { edge, shape: known.array.shape[1..].to_vec() })
            }
            Value::Table(known) => self.gather(known),
        }
    }

    /// The value in the graph, with an axis for the batch.
    pub(crate) fn batched(&mut self, name: &str, value: &Value) -> Result<Flow> {
        if matches!(value, Value::Const(_)) {
            return Err(Error::Request(format!("`{name}`: a constant cannot stand beside an image here")));
        }
        self.lift(value)
    }

    pub(crate) fn gather(&mut self, table: &Known) -> Result<Flow> {
        let class = self.class.ok_or_else(|| Error::Request("the graph has no class input".into()))?;
        let edge = self.graph.constant(&table.name, Data::Float(table.array.clone()));
        let edge = self.graph.node("Gather", &format!("{}.of_class", table.name), &[edge, class]);
        Ok(Flow { edge, shape: table.array.shape[1..].to_vec() })
    }

    /// Stores a parameter under its own name.
    pub(crate) fn parameter(&mut self, name: &str, shape: &[usize], stored_shape: &[usize]) -> Result<Edge> {
        let array = self.evaluate.parameter(name, shape)?.clone().reshaped(stored_shape)?;
        self.stored.insert(name.to_owned());
        Ok(self.graph.constant(name, Data::Float(array)))
    }

    pub(crate) fn number(&mut self, value: f64) -> Edge {
        self.graph.shared("factor", Data::Float(Array::scalar(value as f32)))
    }

    pub(crate) fn sizes(&mut self, name: &str, sizes: &[i64]) -> Edge {
        self.graph.shared(name, Data::Sizes(sizes.to_vec()))
    }

    pub(crate) fn reshape(&mut self, name: &str, edge: Edge, shape: &[i64]) -> Edge {
        let shape = self.sizes("shape", shape);
        self.graph.node("Reshape", name, &[edge, shape])
    }

    pub(crate) fn transpose_last_two(&mut self, name: &str, edge: Edge) -> Edge {
        let attributes = vec![("perm", Attribute::Ints(vec![0, 1, 3, 2]))];
        self.graph.push(Node { op: "Transpose", name: name.into(), inputs: vec![edge], attributes, macs: 0 })
    }
}

pub(crate) fn flow(edge: Edge, shape: &[usize]) -> Value {
    Value::Flow(Flow { edge, shape: shape.into() })
}

pub(crate) fn wrong_shape(name: &str, got: &[usize], expected: &str) -> Error {
    Error::Array(format!("`{name}`: got shape {got:?} per image, expected {expected}"))
}
