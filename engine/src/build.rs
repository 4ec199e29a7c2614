//! From nodes to steps: what the outputs need, names, shapes, and which steps are one. How each operator becomes a step is
//! in `lower`.

use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::kernels::norm::GroupNorm;
use crate::kernels::pointwise::Unary;
use crate::message::{Model, Node, data_type};
use crate::network::Input;
use crate::operators::Operator;
use crate::tensor::{Stored, count, numbers};
use crate::{Error, Result};

/// What a step reads.
#[derive(Clone, Debug)]
pub(crate) enum Operand {
    /// The number of a computed value.
    Value(usize),
    /// A stored value.
    Known(Arc<[f32]>),
}

impl Operand {
    /// The number, if it is a computed value.
    pub(crate) fn value(&self) -> Option<usize> {
        match self {
            Self::Value(value) => Some(*value),
            Self::Known(_) => None,
        }
    }
}

/// One operator, what it reads and which value it computes.
pub(crate) struct Step {
    pub(crate) operator: Operator,
    pub(crate) node: String,
    pub(crate) inputs: Vec<Operand>,
    pub(crate) output: usize,
}

/// Steps in the order in which they run.
pub(crate) struct Built {
    pub(crate) steps: Vec<Step>,
    /// Floats of each value.
    pub(crate) sizes: Vec<usize>,
    pub(crate) inputs: Vec<usize>,
    pub(crate) outputs: Vec<(usize, Vec<usize>)>,
}

/// A computed value under one of its names: reshaping gives a value another name and shape, but no other memory.
#[derive(Clone, Debug)]
pub(crate) struct Flow {
    pub(crate) value: usize,
    pub(crate) shape: Vec<usize>,
}

#[derive(Clone, Debug)]
pub(crate) enum Value {
    Stored(Arc<Stored>),
    Flow(Flow),
}

/// A network while it is built.
#[derive(Default)]
pub(crate) struct Builder {
    names: HashMap<String, Value>,
    /// How many nodes read a name, and graph outputs.
    readers: HashMap<String, usize>,
    /// How many of them are still to come.
    left: HashMap<String, usize>,
    steps: Vec<Option<Step>>,
    /// Which step computes a value.
    producers: Vec<Option<usize>>,
    /// Whether a value is read under several names.
    shared: Vec<bool>,
    /// Whether a value is of a type of integers; all are computed as floats.
    pub(crate) integers: Vec<bool>,
    sizes: Vec<usize>,
    /// Stored numbers that nodes have read so far; each may keep them in a form of its own.
    read: usize,
}

/// Numbers that one value may have: 1 GiB of f32, an image of 8192 by 8192 pixels in 4 channels.
pub const MAX_VALUES: usize = 1 << 28;
/// How often all nodes together may read the stored numbers of a file. A quantised weight is read twice, by DequantizeLinear and by its layer.
const READINGS: usize = 8;
/// Stored numbers that may be read in addition, for small files that share theirs between many nodes.
const FREE_READINGS: usize = 1 << 16;
/// Versions of ONNX's operators that mean what `lower` computes: before, Softmax flattened its input and Clip had attributes.
const OPERATOR_SETS: RangeInclusive<i64> = 13..=24;

/// See [`crate::Network::build`].
pub(crate) fn build(model: Model, inputs: &[Input], outputs: &[&str]) -> Result<Built> {
    let mut versions =
        model.opset_import.iter().filter(|set| set.domain.is_empty() || set.domain == "ai.onnx");
    if let Some(set) = versions.find(|set| !OPERATOR_SETS.contains(&set.version)) {
        let (first, last) = OPERATOR_SETS.into_inner();
        return Err(Error::Graph(format!(
            "got operators of opset {}, expected {first} to {last}",
            set.version
        )));
    }
    let graph = model.graph.ok_or_else(|| Error::Graph("the file holds no graph".to_owned()))?;
    let mut builder = Builder::default();
    let constants =
        graph.node.iter().flat_map(|node| &node.attribute).filter_map(|attribute| attribute.t.as_ref());
    let stored: usize = graph.initializer.iter().chain(constants).map(numbers).sum();
    let most = FREE_READINGS + READINGS * stored;
    for tensor in graph.initializer {
        builder.names.insert(tensor.name.clone(), Value::Stored(Arc::new(Stored::File(Box::new(tensor)))));
    }
    let mut values = Vec::with_capacity(inputs.len());
    for input in inputs {
        let flow = builder.value(input.shape.to_vec(), None);
        if builder.sizes[flow.value] > MAX_VALUES {
            let (name, shape) = (input.name, input.shape);
            return Err(Error::Graph(format!(
                "got the input `{name}` of shape {shape:?}, expected at most {MAX_VALUES} numbers"
            )));
        }
        let declared = graph.input.iter().find(|declared| declared.name == input.name);
        let tensor = declared.and_then(|declared| declared.r#type.as_ref()?.tensor_type.as_ref());
        builder.integers[flow.value] =
            tensor.is_some_and(|tensor| data_type::INTEGERS.contains(&tensor.elem_type));
        values.push(flow.value);
        builder.names.insert(input.name.to_owned(), Value::Flow(flow));
    }
    let nodes = needed(graph.node, outputs);
    for name in nodes
        .iter()
        .flat_map(|node| &node.input)
        .chain(outputs.iter().map(|&o| o.to_owned()).collect::<Vec<_>>().iter())
    {
        *builder.readers.entry(name.clone()).or_default() += 1;
    }
    builder.left = builder.readers.clone();
    for node in nodes {
        let before = builder.sizes.len();
        builder.read(&node);
        if builder.read > most {
            let read = builder.read;
            return Err(node.wrong(format!(
                "so far {read} stored numbers were read of {stored}, expected at most {most}"
            )));
        }
        builder.node(&node)?;
        if let Some(size) = builder.sizes[before..].iter().find(|size| **size > MAX_VALUES) {
            return Err(node.wrong(format!("it makes {size} numbers, expected at most {MAX_VALUES}")));
        }
    }
    let outputs = outputs.iter().map(|name| match builder.names.get(*name) {
        Some(Value::Flow(flow)) => Ok((flow.value, flow.shape.clone())),
        _ => Err(Error::Graph(format!("no operator computes the output `{name}`"))),
    });
    let outputs = outputs.collect::<Result<_>>()?;
    let steps = builder.steps.into_iter().flatten().collect();
    Ok(Built { steps, sizes: builder.sizes, inputs: values, outputs })
}

/// The nodes that the outputs depend on.
fn needed(nodes: Vec<Node>, outputs: &[&str]) -> Vec<Node> {
    let mut wanted: HashSet<String> = outputs.iter().map(|&name| name.to_owned()).collect();
    let mut kept = Vec::with_capacity(nodes.len());
    for node in nodes.into_iter().rev() {
        if node.output.iter().any(|name| wanted.contains(name)) {
            wanted.extend(node.input.iter().filter(|name| !name.is_empty()).cloned());
            kept.push(node);
        }
    }
    kept.reverse();
    kept
}

impl Builder {
    fn value(&mut self, shape: Vec<usize>, producer: Option<usize>) -> Flow {
        self.sizes.push(count(&shape).unwrap_or(usize::MAX));
        self.producers.push(producer);
        self.shared.push(false);
        self.integers.push(false);
        Flow { value: self.sizes.len() - 1, shape }
    }

    /// Counts the stored numbers that a node reads.
    fn read(&mut self, node: &Node) {
        for name in &node.input {
            if let Some(Value::Stored(stored)) = self.names.get(name) {
                self.read += stored.len();
            }
        }
    }

    fn node(&mut self, node: &Node) -> Result<()> {
        let value = self.lower(node)?;
        let Some(name) = node.output.first() else { return Err(node.wrong("it has no output")) };
        self.names.insert(name.clone(), value);
        // Weights are not kept longer than their last reader needs them.
        for input in &node.input {
            if let Some(left) = self.left.get_mut(input) {
                *left -= 1;
                if *left == 0 {
                    self.names.remove(input);
                }
            }
        }
        Ok(())
    }

    /// The input number `index`, if the node has it.
    pub(crate) fn optional(&self, node: &Node, index: usize) -> Result<Option<Value>> {
        match node.input.get(index).filter(|name| !name.is_empty()) {
            None => Ok(None),
            Some(name) => {
                let found = self.names.get(name).cloned();
                let missing = || node.wrong(format!("reads `{name}`, which nothing defines"));
                found.map(Some).ok_or_else(missing)
            }
        }
    }

    /// The input number `index`.
    pub(crate) fn input(&self, node: &Node, index: usize) -> Result<Value> {
        self.optional(node, index)?.ok_or_else(|| node.wrong(format!("input {index} is missing")))
    }

    /// The input number `index`, which must be computed.
    pub(crate) fn flow(&self, node: &Node, index: usize) -> Result<Flow> {
        match self.input(node, index)? {
            Value::Flow(flow) => Ok(flow),
            Value::Stored(_) => {
                Err(node.wrong(format!("got a stored value as input {index}, expected a computed one")))
            }
        }
    }

    /// The input number `index`, if the node has it, which must be stored.
    pub(crate) fn optional_stored(&self, node: &Node, index: usize) -> Result<Option<Arc<Stored>>> {
        match self.optional(node, index)? {
            None => Ok(None),
            Some(Value::Stored(stored)) => Ok(Some(stored)),
            Some(Value::Flow(_)) => {
                Err(node.wrong(format!("got a computed value as input {index}, expected a stored one")))
            }
        }
    }

    /// The input number `index`, which must be stored.
    pub(crate) fn stored(&self, node: &Node, index: usize) -> Result<Arc<Stored>> {
        self.optional_stored(node, index)?.ok_or_else(|| node.wrong(format!("input {index} is missing")))
    }

    /// The stored input number `index` as floats.
    pub(crate) fn floats(&self, node: &Node, index: usize) -> Result<Vec<f32>> {
        let stored = self.stored(node, index)?;
        stored.floats().map(|values| values.into_owned()).map_err(|e| node.wrong(e))
    }

    /// The stored input number `index` as integers.
    pub(crate) fn integers(&self, node: &Node, index: usize) -> Result<Vec<i64>> {
        self.stored(node, index)?.integers().map_err(|e| node.wrong(e))
    }

    /// Adds a step.
    pub(crate) fn step(
        &mut self,
        node: &Node,
        operator: Operator,
        inputs: Vec<Operand>,
        shape: Vec<usize>,
    ) -> Flow {
        let of_integers = |operand: &Operand| operand.value().is_some_and(|value| self.integers[value]);
        let integers = !matches!(operator, Operator::Gather(_)) && inputs.iter().any(of_integers);
        let flow = self.value(shape, Some(self.steps.len()));
        self.integers[flow.value] = integers;
        let name = if node.name.is_empty() { node.op_type.clone() } else { node.name.clone() };
        self.steps.push(Some(Step { operator, node: name, inputs, output: flow.value }));
        flow
    }

    /// The input number 0 in another shape.
    pub(crate) fn reshaped(&mut self, node: &Node, flow: Flow, shape: Vec<usize>) -> Result<Flow> {
        if count(&shape) != count(&flow.shape) {
            return Err(node.wrong(format!("got {shape:?} for a value of shape {:?}", flow.shape)));
        }
        self.shared[flow.value] |= self.readers(node, 0) != 1;
        Ok(Flow { value: flow.value, shape })
    }

    /// The input number 0 under another name.
    pub(crate) fn same(&mut self, node: &Node, flow: Flow) -> Result<Flow> {
        let shape = flow.shape.clone();
        self.reshaped(node, flow, shape)
    }

    /// How many nodes read the input number `index`, before this one or after it, and graph outputs.
    fn readers(&self, node: &Node, index: usize) -> usize {
        node.input.get(index).and_then(|name| self.readers.get(name)).copied().unwrap_or(0)
    }

    /// The step that computes an input, if `readers` are all that read it.
    fn producer(&mut self, node: &Node, index: usize, readers: usize) -> Option<&mut Step> {
        let Ok(Some(Value::Flow(flow))) = self.optional(node, index) else { return None };
        if self.shared[flow.value] || self.readers(node, index) != readers {
            return None;
        }
        self.steps[self.producers[flow.value]?].as_mut()
    }

    /// Scale and shift per channel after an InstanceNormalization of groups of them: one step.
    pub(crate) fn fuse_affine(&mut self, node: &Node, x: &Flow, scale: &[f32], shift: &[f32]) -> bool {
        let [n, channels, pixels @ ..] = &x.shape[..] else { return false };
        let (total, pixels) = (n * channels, pixels.iter().product::<usize>());
        let Some(Step { operator: Operator::GroupNorm(norm), .. }) = self.producer(node, 0, 1) else {
            return false;
        };
        let plain =
            !norm.silu && norm.scale.iter().all(|v| *v == 1.0) && norm.shift.iter().all(|v| *v == 0.0);
        let fits = norm.groups == norm.scale.len()
            && channels % norm.groups == 0
            && norm.groups * norm.pixels * n == total * pixels;
        if plain && fits {
            let (scale, shift) = (scale.to_vec(), shift.to_vec());
            **norm = GroupNorm { pixels, scale, shift, ..**norm };
        }
        plain && fits
    }

    /// `x·sigmoid(x)`: one step, part of the step before it where that is possible.
    pub(crate) fn fuse_silu(&mut self, node: &Node) -> Option<Flow> {
        for (x, gate) in [(0, 1), (1, 0)] {
            let Ok(Some(Value::Flow(flow))) = self.optional(node, x) else { continue };
            let Ok(Some(Value::Flow(gated))) = self.optional(node, gate) else { continue };
            let Some(step) = self.producer(node, gate, 1) else { continue };
            if !matches!(step.operator, Operator::Unary(Unary::Sigmoid))
                || step.inputs[0].value() != Some(flow.value)
                || gated.shape != flow.shape
            {
                continue;
            }
            if let Some(sigmoid) = self.producers[gated.value] {
                self.steps[sigmoid] = None;
            }
            // The sigmoid is the other reader.
            if let Some(step) = self.producer(node, x, 2) {
                match &mut step.operator {
                    Operator::GroupNorm(norm) if !norm.silu => norm.silu = true,
                    Operator::Affine { silu, .. } if !*silu => *silu = true,
                    _ => {
                        let silu = Operator::Unary(Unary::Silu);
                        return Some(self.step(node, silu, vec![Operand::Value(flow.value)], flow.shape));
                    }
                }
                return Some(flow);
            }
            let silu = Operator::Unary(Unary::Silu);
            return Some(self.step(node, silu, vec![Operand::Value(flow.value)], flow.shape));
        }
        None
    }
}
