//! Weights of a checkpoint as they lie on disk: safetensors, in one file or in shards, or PyTorch's pickles, with the names
//! that older libraries and other programs gave them. Pickles are read, never executed.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::DType;
use candle_core::pickle::{self, Object, Stack};
use dmd_core::legacy;
use dmd_core::net::shapes::Summary;
use serde_json::Value;

use crate::checkpoint::{Source, read_tensors};
use crate::error::{Error, Result};
use crate::files;
use crate::network::Tensors;

/// Names that weights may have, in the order in which they are looked for; ours first.
pub const NAMES: [&str; 6] = [
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "model.pt",
];
/// Prefixes that training programs put before all names.
const PREFIXES: [&str; 5] = ["nn_model.", "network.", "module.", "model.", "unet."];
/// Keys under which a training program's checkpoint may hold the weights.
const STATE_KEYS: [&str; 6] = ["state_dict", "model_state_dict", "model", "ema", "unet", "ddpm"];
/// What a pickle of tensors refers to; anything else would be code.
const HARMLESS: [&str; 5] = ["collections", "torch", "torch._utils", "torch._tensor", "torch.storage"];

/// Weights as they were found.
pub struct Found {
    /// File they came from, or the index of the shards.
    pub path: PathBuf,
    /// All tensors, f32, under the names in the file.
    pub tensors: Tensors,
    /// SHA-256 of the file, or of all shards in the order of the index.
    pub sha256: String,
}

/// Reads the weights of a checkpoint folder.
pub fn read(source: &Source) -> Result<Found> {
    for name in NAMES {
        if let Some((path, bytes)) = source.read(name)? {
            return read_file(&path, bytes);
        }
    }
    Err(Error::content(
        &source.path(),
        format!("there are no weights, expected one of `{}`", NAMES.join("`, `")),
    ))
}

/// Reads one file by its kind.
pub fn read_file(path: &Path, bytes: Vec<u8>) -> Result<Found> {
    let name = path.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
    let mut sha256 = files::sha256(&bytes);
    let tensors = if name.ends_with(".index.json") {
        let (mut all, mut hashes) = (Tensors::new(), String::new());
        for shard in shards(path)? {
            let path = path.with_file_name(shard);
            let bytes = files::read(&path)?;
            hashes += &files::sha256(&bytes);
            all.extend(read_tensors(&path, &bytes)?);
        }
        sha256 = files::sha256(hashes.as_bytes());
        all
    } else if name.ends_with(".safetensors") {
        read_tensors(path, &bytes)?
    } else {
        read_pickle(path)?
    };
    Ok(Found { path: path.to_owned(), tensors, sha256 })
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
        let name =
            value.as_str().filter(|name| !name.contains(['/', '\\']) && name.ends_with(".safetensors"));
        name.map(str::to_owned).ok_or_else(|| {
            Error::content(
                path,
                format!("got the shard {value}, expected the name of a safetensors file beside it"),
            )
        })
    };
    map.values().map(name).collect()
}

fn read_pickle(path: &Path) -> Result<Tensors> {
    let broken = |e: &dyn std::fmt::Display| {
        Error::content(
            path,
            format!(
                "not a PyTorch checkpoint that can be read without running it: {e}\n\nhint: convert it to safetensors"
            ),
        )
    };
    if let Some(foreign) = foreign_class(path).map_err(|e| broken(&e))? {
        return Err(Error::content(
            path,
            format!(
                "it refers to `{foreign}`; a checkpoint of weights holds tensors only, and nothing in it was \
                 executed\n\nhint: save `model.state_dict()`, or convert the file to safetensors"
            ),
        ));
    }
    let mut found = pickle::read_all(path).map_err(|e| broken(&e))?;
    for key in STATE_KEYS {
        if found.is_empty() {
            found = pickle::read_all_with_key(path, Some(key)).unwrap_or_default();
        }
    }
    if found.is_empty() {
        return Err(broken(&"there are no tensors in it"));
    }
    found.into_iter().map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::F32)?))).collect()
}

/// The first class that a pickle mentions and that no tensor needs.
fn foreign_class(path: &Path) -> candle_core::Result<Option<String>> {
    let file = std::fs::File::open(path)?;
    let mut archive =
        zip::ZipArchive::new(std::io::BufReader::new(file)).map_err(candle_core::Error::wrap)?;
    let name = archive
        .file_names()
        .find_map(|name| Some(name.ok()?.into_owned()).filter(|n| n.ends_with("data.pkl")));
    let Some(name) = name else { candle_core::bail!("there is no data.pkl in it") };
    let mut bytes = Vec::new();
    archive.by_name(&name).map_err(candle_core::Error::wrap)?.take(1 << 26).read_to_end(&mut bytes)?;
    let mut stack = Stack::empty();
    stack.read_loop(&mut bytes.as_slice())?;
    Ok(stack.stack().iter().find_map(foreign_in))
}

fn foreign_in(object: &Object) -> Option<String> {
    match object {
        Object::Class { module_name, class_name } => {
            (!HARMLESS.contains(&module_name.as_str())).then(|| format!("{module_name}.{class_name}"))
        }
        Object::Tuple(all) | Object::List(all) => all.iter().find_map(foreign_in),
        Object::Dict(all) => all.iter().find_map(|(k, v)| foreign_in(k).or_else(|| foreign_in(v))),
        Object::Reduce { callable, args } | Object::Build { callable, args } => {
            foreign_in(callable).or_else(|| foreign_in(args))
        }
        Object::PersistentLoad(inner) => foreign_in(inner),
        _ => None,
    }
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
