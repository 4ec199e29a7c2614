//! Parts of small graphs.

use dmd_engine::message::{Attribute, Node, Tensor, data_type};

/// Numbers in [-1, 1) that look random and never change.
pub fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

pub fn floats(name: &str, dims: &[usize], values: &[f32]) -> Tensor {
    Tensor {
        name: name.to_owned(),
        dims: dims.iter().map(|&d| d as i64).collect(),
        data_type: data_type::FLOAT,
        raw_data: values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>().into(),
        ..Tensor::default()
    }
}

pub fn node(op: &str, inputs: &[&str], output: &str) -> Node {
    Node {
        op_type: op.to_owned(),
        name: output.to_owned(),
        input: inputs.iter().map(|i| (*i).to_owned()).collect(),
        output: vec![output.to_owned()],
        ..Node::default()
    }
}

pub fn ints(name: &str, ints: &[usize]) -> Attribute {
    Attribute {
        name: name.to_owned(),
        ints: ints.iter().map(|&i| i as i64).collect(),
        ..Attribute::default()
    }
}

pub fn int(name: &str, i: i64) -> Attribute {
    Attribute { name: name.to_owned(), i, ..Attribute::default() }
}
