//! The numbers of a checkpoint: safetensors in one file or in shards, as f32 arrays under the names that the network has
//! today, exactly those of the configuration. Must not know other files of a checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use dmd_core::config::ModelConfig;
use dmd_core::legacy;
use dmd_core::net::shapes;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::Value;

use crate::{Array, Error, Result};

/// Reads a safetensors file, or the shards that an index names.
///
/// # Errors
/// Names the file, and the tensor in it, that is missing, damaged or not the configuration's.
pub fn load(path: &Path, config: &ModelConfig) -> Result<BTreeMap<String, Array>> {
    let summary = shapes::summarise(config)?;
    let read = |path: PathBuf| -> Result<(PathBuf, Vec<u8>)> {
        let bytes = fs::read(&path).map_err(|e| Error::file(&path, e.to_string()))?;
        Ok((path, bytes))
    };
    let files = shards(path)?.into_iter().map(read).collect::<Result<Vec<_>>>()?;
    let mut found = Vec::new();
    for (path, bytes) in &files {
        let file = SafeTensors::deserialize(bytes).map_err(|e| Error::file(path, damage(&e)))?;
        for (name, view) in file.tensors() {
            let (name, shape) = legacy::current(&summary, &name, view.shape());
            found.push((path, name, shape, view));
        }
    }
    let shapes = found.iter().map(|(_, name, shape, _)| (name.as_str(), shape.as_slice()));
    summary.check(shapes).map_err(|e| Error::file(path, format!("tensor {e}{OTHER_RUN}")))?;
    let array = |(path, name, shape, view): (&PathBuf, String, Vec<usize>, TensorView)| {
        let array = to_f32(&view).and_then(|array| array.reshaped(&shape).map_err(|e| e.to_string()));
        let array = array.map_err(|problem| Error::file(path, format!("tensor `{name}`: {problem}")))?;
        Ok((name, array))
    };
    found.into_iter().map(array).collect()
}

/// The files that hold the tensors: this one, or those that it names as an index.
fn shards(path: &Path) -> Result<Vec<PathBuf>> {
    if path.extension().is_none_or(|end| end != "json") {
        return Ok(vec![path.to_owned()]);
    }
    let problem = |problem: String| Error::file(path, problem);
    let text = fs::read_to_string(path).map_err(|e| problem(e.to_string()))?;
    let index: Value = serde_json::from_str(&text).map_err(|e| problem(e.to_string()))?;
    let map = index["weight_map"].as_object().filter(|map| !map.is_empty());
    let map = map.ok_or_else(|| problem("there is no `weight_map`".into()))?;
    let shard = |value: &Value| {
        let beside = |name: &&str| !name.contains(['/', '\\']) && name.ends_with(".safetensors");
        value.as_str().filter(beside).map(str::to_owned).ok_or_else(|| {
            problem(format!("got the shard {value}, expected the name of a safetensors file beside it"))
        })
    };
    let names = map.values().map(shard).collect::<Result<BTreeSet<_>>>()?;
    Ok(names.into_iter().map(|name| path.with_file_name(name)).collect())
}

const OTHER_RUN: &str = "\n\nhint: config.json and the weights seem to come from different models; export a directory as \
    `dmd-distill` wrote it";

fn damage(error: &SafeTensorError) -> String {
    match error {
        SafeTensorError::MetadataIncompleteBuffer
        | SafeTensorError::HeaderTooSmall
        | SafeTensorError::InvalidHeaderLength => {
            format!(
                "not a whole safetensors file: {error}\n\nhint: the file is truncated; copy or download it again"
            )
        }
        other => format!("not a safetensors file: {other}"),
    }
}

fn to_f32(view: &TensorView) -> std::result::Result<Array, String> {
    let bytes = view.data();
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    let data: Vec<f32> = match view.dtype() {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        other => return Err(format!("got type {other}, expected F32, F16 or BF16")),
    };
    if let Some(index) = data.iter().position(|v| !v.is_finite()) {
        return Err(format!("got {} at element {index}, expected finite numbers", data[index]));
    }
    Array::new(view.shape(), data).map_err(|e| e.to_string())
}
