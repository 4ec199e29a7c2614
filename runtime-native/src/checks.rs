//! What a file must keep to before anything is allocated for it: every stored tensor has as many values as its shape says, lies
//! in the file, and no image is larger than [`MAX_VALUES`]. Nothing here reads the card or knows what inputs mean.

use dmd_engine::MAX_VALUES;
use dmd_engine::message::{EXTERNAL, Graph, Tensor, data_type};

/// Bytes of a symbolic dimension's name: engines parse it as an expression, by recursion.
pub(crate) const MAX_SYMBOL: usize = 64;

/// Checks every tensor of a graph, those in the attributes and graphs of its nodes too.
pub(crate) fn tensors(graph: &Graph) -> Result<(), String> {
    for weight in &graph.initializer {
        tensor(weight)?;
    }
    for sparse in &graph.sparse_initializer {
        sparse.values.iter().chain(&sparse.indices).try_for_each(tensor)?;
    }
    for attribute in graph.node.iter().flat_map(|node| &node.attribute) {
        attribute.t.iter().chain(&attribute.tensors).try_for_each(tensor)?;
        attribute.g.iter().chain(&attribute.graphs).try_for_each(tensors)?;
    }
    Ok(())
}

/// Numbers of a shape, if none is negative and they can be counted.
pub(crate) fn count(dims: &[i64]) -> Option<usize> {
    dims.iter().try_fold(1usize, |n, d| n.checked_mul(usize::try_from(*d).ok()?))
}

/// Values of one call of a model: `batch` images.
pub(crate) fn images(batch: usize, shape: [usize; 3]) -> Result<(), String> {
    let values = shape.iter().try_fold(batch, |n, d| n.checked_mul(*d));
    match values {
        Some(values) if values <= MAX_VALUES => Ok(()),
        _ => {
            Err(format!("got {batch} images of {shape:?} in one call, expected at most {MAX_VALUES} values"))
        }
    }
}

fn tensor(tensor: &Tensor) -> Result<(), String> {
    let name = &tensor.name;
    if tensor.data_location == EXTERNAL {
        return Err(format!("weight `{name}` lies in another file, expected a single file"));
    }
    let Some(expected) = count(&tensor.dims) else {
        return Err(format!("weight `{name}` has shape {:?}", tensor.dims));
    };
    let stored = stored(tensor);
    if stored != expected {
        let shape = &tensor.dims;
        return Err(format!("weight `{name}` has shape {shape:?}, expected {expected} values, got {stored}"));
    }
    Ok(())
}

/// Values that a tensor stores, whatever its shape says.
fn stored(tensor: &Tensor) -> usize {
    let kind = tensor.data_type;
    let bits = match kind {
        data_type::INT4 | data_type::UINT4 | data_type::FLOAT4E2M1 => 4,
        data_type::FLOAT16 | data_type::BFLOAT16 | data_type::INT16 | data_type::UINT16 => 16,
        data_type::FLOAT | data_type::INT32 | data_type::UINT32 => 32,
        data_type::DOUBLE | data_type::INT64 | data_type::UINT64 | data_type::COMPLEX64 => 64,
        data_type::COMPLEX128 => 128,
        _ => 8,
    };
    if !tensor.raw_data.is_empty() {
        let values = tensor.raw_data.len() * 8 / bits;
        // Two values share a byte; the last one may be alone.
        let alone = bits == 4 && count(&tensor.dims).is_some_and(|n| n % 2 == 1);
        return values - usize::from(alone);
    }
    match kind {
        data_type::FLOAT => tensor.float_data.len(),
        data_type::COMPLEX64 => tensor.float_data.len() / 2,
        data_type::DOUBLE => tensor.double_data.len(),
        data_type::COMPLEX128 => tensor.double_data.len() / 2,
        data_type::INT64 => tensor.int64_data.len(),
        data_type::UINT32 | data_type::UINT64 => tensor.uint64_data.len(),
        data_type::STRING => tensor.string_data.len(),
        data_type::INT4 | data_type::UINT4 | data_type::FLOAT4E2M1 => {
            let odd = count(&tensor.dims).is_some_and(|n| n % 2 == 1);
            (tensor.int32_data.len() * 2).saturating_sub(usize::from(odd))
        }
        _ => tensor.int32_data.len(),
    }
}
