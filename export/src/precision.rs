//! Smaller weights in a finished graph: stored as f16 or as 8-bit integers, and turned back into f32 by one node each,
//! which runtimes compute when they load the file. Arithmetic, inputs and output stay f32, and so do the
//! weights of the head.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use half::f16;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{GraphProto, NodeProto, TensorProto};

use crate::graph::{Attribute, message};

/// Values below this number are not worth a node.
const SMALLEST: usize = 64;
/// Operators whose second input is a weight; its first axis is the output channel (second for ConvTranspose).
const WEIGHTED: [(&str, i64); 3] = [("Conv", 0), ("ConvTranspose", 1), ("Gemm", 0)];
/// Largest 8-bit integer that is used, in both directions.
const LARGEST: f32 = 127.0;

/// How weights are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// As they are.
    #[default]
    F32,
    /// IEEE half precision: half the size.
    F16,
    /// Weights of convolutions and linear layers as 8-bit integers with a scale per output channel, all else f32: about a quarter
    /// of the size.
    Int8,
    /// Weights and activations of convolutions and linear layers in 8 bits, see [`crate::quantise`].
    Qdq,
}

impl Precision {
    /// Their names.
    pub const NAMES: [&str; 4] = ["f32", "f16", "int8", "qdq"];
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(Self::NAMES[*self as usize])
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::F32, Self::F16, Self::Int8, Self::Qdq];
        let found = all.into_iter().find(|precision| precision.to_string() == text);
        found.ok_or_else(|| format!("got `{text}`, expected `{}`", Self::NAMES.join("`, `")))
    }
}

/// Stores the weights of a verified graph in another precision.
///
/// The head, that is the last convolution before the output, keeps its f32 weights: its error would be multiplied by
/// `sigma_t/alpha_t` in the image.
pub fn store(graph: &mut GraphProto, precision: Precision) {
    let places = Places::of(graph);
    let (mut constants, mut nodes) = (Vec::new(), Vec::new());
    for tensor in std::mem::take(&mut graph.initializer) {
        match places.smaller(&tensor, precision) {
            None => constants.push(tensor),
            Some((values, node)) => {
                constants.extend(values);
                nodes.push(node);
            }
        }
    }
    graph.initializer = constants;
    nodes.append(&mut graph.node);
    graph.node = nodes;
}

/// Which stored values are weights of which operators.
struct Places {
    head: Vec<String>,
    axes: BTreeMap<String, i64>,
}

impl Places {
    fn of(graph: &GraphProto) -> Self {
        let mut axes: BTreeMap<String, i64> = BTreeMap::new();
        for node in &graph.node {
            if let (Some((_, axis)), Some(weight)) =
                (WEIGHTED.iter().find(|(op, _)| *op == node.op_type), node.input.get(1))
            {
                axes.insert(weight.clone(), *axis);
            }
        }
        Self { head: head(graph), axes }
    }

    /// What is stored instead of a value and the node that turns it back, or nothing where it stays as it is.
    fn smaller(&self, tensor: &TensorProto, precision: Precision) -> Option<(Vec<TensorProto>, NodeProto)> {
        let size = tensor.dims.iter().product::<i64>() as usize;
        let float = tensor.data_type == DataType::Float as i32;
        if !float || size < SMALLEST || self.head.contains(&tensor.name) {
            return None;
        }
        match precision {
            Precision::F32 | Precision::Qdq => None,
            Precision::F16 => half_precision(tensor),
            Precision::Int8 => self.axes.get(&tensor.name).map(|axis| integers(tensor, *axis, LARGEST, &[])),
        }
    }
}

/// The stored values of the convolution nearest to the output.
pub fn head(graph: &GraphProto) -> Vec<String> {
    let last = graph.node.iter().rev().find(|node| node.op_type == "Conv" || node.op_type == "Gemm");
    last.map(|node| node.input[1..].to_vec()).unwrap_or_default()
}

/// Its values as f32.
pub fn floats(tensor: &TensorProto) -> impl Iterator<Item = f32> + '_ {
    tensor.raw_data.chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// A stored value.
pub fn stored(name: String, kind: DataType, dims: Vec<i64>, raw_data: Vec<u8>) -> TensorProto {
    TensorProto { name, data_type: kind as i32, dims, raw_data, ..Default::default() }
}

/// Index along `axis` of element `i`.
fn channel(tensor: &TensorProto, axis: i64) -> impl Fn(usize) -> usize {
    let channels = tensor.dims[axis as usize] as usize;
    let inner = tensor.dims[axis as usize + 1..].iter().product::<i64>() as usize;
    move |i| i / inner % channels
}

/// None where a value is too large for half precision.
fn half_precision(tensor: &TensorProto) -> Option<(Vec<TensorProto>, NodeProto)> {
    let values: Vec<f16> = floats(tensor).map(f16::from_f32).collect();
    if values.iter().any(|value| value.is_infinite()) {
        return None;
    }
    let name = format!("{}.f16", tensor.name);
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let to = [("to", Attribute::Int(DataType::Float as i64))];
    let cast = message("Cast", &tensor.name, vec![name.clone()], &to);
    Some((vec![stored(name, DataType::Float16, tensor.dims.clone(), bytes)], cast))
}

/// Symmetric: `round(w/scale)` with `scale = max|w|/largest` per index of `axis`, but no less than `least` has for it.
pub fn integers(
    tensor: &TensorProto,
    axis: i64,
    largest: f32,
    least: &[f32],
) -> (Vec<TensorProto>, NodeProto) {
    let channel = channel(tensor, axis);
    let mut scales = vec![0.0f32; tensor.dims[axis as usize] as usize];
    for (i, value) in floats(tensor).enumerate() {
        let scale = &mut scales[channel(i)];
        *scale = scale.max(value.abs() / largest);
    }
    scales.iter_mut().zip(least).for_each(|(scale, least)| *scale = scale.max(*least));
    scales.iter_mut().filter(|scale| **scale == 0.0).for_each(|scale| *scale = 1.0);
    let quantised = floats(tensor).enumerate().map(|(i, value)| (value / scales[channel(i)]).round() as i8);
    let bytes = quantised.map(|value| value as u8).collect();
    let names = [format!("{}.int8", tensor.name), format!("{}.scale", tensor.name)];
    let scale_bytes = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    let constants = vec![
        stored(names[0].clone(), DataType::Int8, tensor.dims.clone(), bytes),
        stored(names[1].clone(), DataType::Float, vec![tensor.dims[axis as usize]], scale_bytes),
    ];
    let axis = [("axis", Attribute::Int(axis))];
    (constants, message("DequantizeLinear", &tensor.name, names.to_vec(), &axis))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dims: &[i64], values: &[f32]) -> TensorProto {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        stored("w".into(), DataType::Float, dims.to_vec(), bytes)
    }

    #[test]
    fn integers_have_a_scale_per_channel_of_either_axis() {
        let w = tensor(&[2, 2, 2], &[1.0, -2.0, 0.0, 0.0, 127.0, 63.5, 0.0, -0.4]);
        let (constants, node) = integers(&w, 0, LARGEST, &[]);
        assert_eq!(constants[0].raw_data, [64u8, 129, 0, 0, 127, 64, 0, 0]);
        assert_eq!(floats(&constants[1]).collect::<Vec<_>>(), [2.0 / 127.0, 1.0]);
        assert_eq!((node.op_type.as_str(), node.output[0].as_str()), ("DequantizeLinear", "w"));
        let (constants, _) = integers(&w, 1, LARGEST, &[]);
        assert_eq!(floats(&constants[1]).collect::<Vec<_>>(), [1.0, 0.4 / 127.0]);
        assert_eq!(constants[0].raw_data, [1u8, 254, 0, 0, 127, 64, 0, 129]);
    }

    #[test]
    fn values_beyond_half_precision_stay_as_they_are() {
        assert!(half_precision(&tensor(&[2], &[1.0, 70000.0])).is_none());
        let (constants, node) = half_precision(&tensor(&[2], &[1.0, -0.333_333_34])).unwrap();
        assert_eq!(constants[0].raw_data, [0x00, 0x3c, 0x55, 0xb5]);
        assert_eq!(node.input, ["w.f16"]);
    }
}
