//! The optional output `image`: the rounding rule of `dmd_core::pixels` in operators, one for each of its steps, so that
//! both give the same bytes. No other post-processing.
//!
//! tract multiplies by the reciprocal where Div is asked for. That is the same where `hi − lo` is a power of two, as it
//! is for all models here; for another range a byte may be off by one there.

use tract_onnx::pb::tensor_proto::DataType;

use dmd_core::card::OUTPUT_IMAGE;

use crate::graph::{Attribute, Edge, Node, Output};
use crate::partial::{Exporter, Flow};
use crate::{Error, Result};

/// `floor(clamp((x − lo) / (hi − lo), 0, 1)·255 + 0.5)` as u8. What it makes of NaN is the runtime's affair.
///
/// # Shapes
/// `x` `[n, c, h, w]`; the output is `[n, h, w, c]`.
pub fn image(exporter: &mut Exporter, x: &Flow, [lo, hi]: [f32; 2]) -> Result<Output> {
    let [c, h, w] = x.shape[..] else {
        return Err(Error::Array(format!("image: got shape {:?} per image, expected [c, h, w]", x.shape)));
    };
    let mut edge = x.edge;
    let mut step = |op, name: &str, edge: Edge, operands: &[f32]| {
        let operands: Vec<Edge> = operands.iter().map(|&v| exporter.number(f64::from(v))).collect();
        exporter.graph.node(op, &format!("{OUTPUT_IMAGE}.{name}"), &[&[edge], &operands[..]].concat())
    };
    if lo != 0.0 {
        edge = step("Add", "above_black", edge, &[-lo]);
    }
    if hi - lo != 1.0 {
        edge = step("Div", "share", edge, &[hi - lo]);
    }
    edge = step("Clip", "clamped", edge, &[0.0, 1.0]);
    edge = step("Mul", "levels", edge, &[255.0]);
    edge = step("Add", "rounded", edge, &[0.5]);
    edge = step("Floor", "whole", edge, &[]);
    let mut change = |op, name: &str, edge, attribute| {
        let (name, inputs, attributes) = (format!("{OUTPUT_IMAGE}.{name}"), vec![edge], vec![attribute]);
        exporter.graph.push(Node { op, name, inputs, attributes, macs: 0 })
    };
    edge = change("Cast", "bytes", edge, ("to", Attribute::Int(DataType::Uint8 as i64)));
    edge = change("Transpose", "interleaved", edge, ("perm", Attribute::Ints(vec![0, 2, 3, 1])));
    Ok(Output { edge, name: OUTPUT_IMAGE, element: DataType::Uint8, shape: vec![h, w, c] })
}
