//! Weights of a checkpoint as they lie on disk: safetensors, in one file or in shards, or PyTorch's pickles, with the names
//! that older libraries and other programs gave them. Pickles are read, never executed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use dmd_core::legacy;
use dmd_core::net::shapes::Summary;
use serde_json::Value;

use crate::checkpoint::{Source, read_tensors};
use crate::error::{Error, Result};
use crate::files;
use crate::network::Tensors;
use crate::pickle::{self, Problem};

/// Names that weights may have, in the order in which they are looked for; ours first.
pub const NAMES: [&str; 8] = [
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "model.pth",
    "model.pt",
];
/// Endings of PyTorch files, which count under any name where there is one alone.
const ENDINGS: [&str; 2] = [".pth", ".pt"];
/// Endings of shards.
const SHARDS: [&str; 2] = [".safetensors", ".bin"];
/// Prefixes that training programs put before all names.
const PREFIXES: [&str; 5] = ["nn_model.", "network.", "module.", "model.", "unet."];

/// Weights as they were found.
pub struct Found {
    /// File they came from, or the index of the shards.
    pub path: PathBuf,
    /// All tensors, f32, under the names in the file.
    pub tensors: Tensors,
    /// SHA-256 of the file, or of all shards in the order of the index.
    pub sha256: String,
}

/// The names among `all` under which weights may lie in the folder `folder` (empty, or with a slash at its end), best first.
pub fn choose<'a>(folder: &str, all: &'a [String]) -> Option<&'a String> {
    let known = |name: &str| all.iter().find(|found| **found == format!("{folder}{name}"));
    let other = |found: &&String| {
        let name = found.strip_prefix(folder).unwrap_or("/");
        !name.contains('/') && ENDINGS.iter().any(|ending| name.ends_with(ending))
    };
    let mut others = all.iter().filter(other);
    NAMES.into_iter().find_map(known).or_else(|| others.next().filter(|_| others.next().is_none()))
}

/// Reads the weights of a checkpoint folder.
pub fn read(source: &Source) -> Result<Found> {
    for name in NAMES {
        if let Some((path, bytes)) = source.read(name)? {
            return read_file(&path, bytes);
        }
    }
    let folder = source.path();
    for folder in [folder.clone(), folder.join("unet")] {
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let all: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        if let Some(name) = choose("", &all) {
            let path = folder.join(name);
            return read_file(&path, files::read(&path)?);
        }
    }
    Err(Error::content(
        &folder,
        format!("there are no weights, expected one of `{}`, or one other file `*.pth`", NAMES.join("`, `")),
    ))
}

/// Reads one file by its kind.
pub fn read_file(path: &Path, bytes: Vec<u8>) -> Result<Found> {
    let mut sha256 = files::sha256(&bytes);
    let shards = shards(path)?;
    let tensors = if shards.is_empty() {
        read_one(path, &bytes)?
    } else {
        let (mut all, mut hashes) = (Tensors::new(), String::new());
        for shard in shards {
            let path = path.with_file_name(shard);
            let bytes = files::read(&path)?;
            hashes += &files::sha256(&bytes);
            all.extend(read_one(&path, &bytes)?);
        }
        sha256 = files::sha256(hashes.as_bytes());
        all
    };
    Ok(Found { path: path.to_owned(), tensors, sha256 })
}

fn read_one(path: &Path, bytes: &[u8]) -> Result<Tensors> {
    match path.to_string_lossy().ends_with(".safetensors") {
        true => read_tensors(path, bytes),
        false => read_pickle(path, bytes),
    }
}

/// The files that an index of shards names, in order; none if this is no index.
pub fn shards(path: &Path) -> Result<BTreeSet<String>> {
    if !path.to_string_lossy().ends_with(".index.json") {
        return Ok(BTreeSet::new());
    }
    let index: Value = serde_json::from_slice(&files::read(path)?).map_err(|e| Error::content(path, e))?;
    let map = index["weight_map"].as_object().filter(|map| !map.is_empty());
    let map = map.ok_or_else(|| Error::content(path, "there is no `weight_map`"))?;
    let name = |value: &Value| {
        let name = value
            .as_str()
            .filter(|name| !name.contains(['/', '\\']) && SHARDS.iter().any(|e| name.ends_with(e)));
        name.map(str::to_owned).ok_or_else(|| {
            Error::content(
                path,
                format!(
                    "got the shard {value}, expected the name of a file `*.safetensors` or `*.bin` beside it"
                ),
            )
        })
    };
    map.values().map(name).collect()
}

fn read_pickle(path: &Path, bytes: &[u8]) -> Result<Tensors> {
    pickle::read(bytes).map_err(|problem| match problem {
        Problem::Broken(problem) => Error::content(
            path,
            format!(
                "not a PyTorch checkpoint that can be read without running it: {problem}\n\nhint: convert it to \
                 safetensors"
            ),
        ),
        Problem::Foreign(foreign) => Error::content(
            path,
            format!(
                "it refers to `{foreign}`; a checkpoint of weights holds tensors only, and nothing in it was \
                 executed\n\nhint: save `model.state_dict()`, or convert the file to safetensors"
            ),
        ),
    })
}

/// Gives tensors the names that the network has: without the prefix of a training program, without counters and
/// tables of the sampler, with today's names of attention layers, whose 1x1 convolutions become matrices.
pub fn rename(tensors: Tensors, summary: &Summary) -> Result<Tensors> {
    let prefix = PREFIXES.into_iter().find(|prefix| {
        let bare = |name: &String| {
            name.strip_prefix(prefix).is_some_and(|name| summary.parameters.contains_key(name))
        };
        tensors.keys().any(bare) && !tensors.keys().any(|name| summary.parameters.contains_key(name))
    });
    let mut renamed = Tensors::new();
    for (name, tensor) in tensors {
        let bare = match prefix {
            Some(prefix) => match name.strip_prefix(prefix) {
                Some(bare) => bare.to_owned(),
                None => continue, // what the training program keeps beside the network
            },
            None => name,
        };
        if bare.ends_with(".num_batches_tracked") {
            continue;
        }
        let (name, shape) = legacy::current(summary, &bare, tensor.dims());
        renamed.insert(name, tensor.reshape(shape)?);
    }
    Ok(renamed)
}

/// The size of an axis of a tensor, whatever prefix its name has: for files without a configuration.
pub fn size(tensors: &Tensors, name: &str, axis: usize) -> Option<usize> {
    let prefixed = PREFIXES.iter().map(|prefix| format!("{prefix}{name}"));
    let mut names = std::iter::once(name.to_owned()).chain(prefixed);
    names.find_map(|name| tensors.get(&name)?.dims().get(axis).copied())
}
