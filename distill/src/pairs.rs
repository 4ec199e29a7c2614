//! Noise-image pairs of a base: `z` by the noise contract, `y` by deterministic DDIM from it, with the class.
//! Yin et al. 2024 (arXiv:2311.18828), section 3.3, with a deterministic sampler so that `y` is a function of `z`.
//!
//! A folder holds `pairs.json` (what was asked) and shards of 256 pairs; finished shards are never computed again.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dmd_core::schedule::Schedule;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoint, read_tensors, write_json, write_tensors};
use crate::error::{Error, Result};
use crate::files;
use crate::network::{Network, Tensors};
use crate::progress::{Progress, stop_requested};
use crate::sampler::{Request, ddim};

/// Pairs in a file.
const SHARD: usize = 256;
/// Pairs computed at once.
const BATCH: usize = 32;

/// What a folder of pairs holds; two folders with the same description have the same pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairsOptions {
    /// Name of the base.
    pub base: String,
    /// SHA-256 of its weights.
    pub base_sha256: String,
    /// Sampler.
    pub sampler: String,
    /// Network evaluations per image.
    pub steps: usize,
    /// Seed of the noise contract; pair `k` has the noise of image `k` and class `k mod classes`.
    pub seed: u32,
}

/// Pairs in memory.
pub struct Pairs {
    options: PairsOptions,
    classes: Option<usize>,
    /// `[count, c, h, w]` in the base's range, f16 on the CPU.
    y: Tensor,
}

impl PairsOptions {
    /// The default description for a base.
    pub fn new(name: &str, base: &Checkpoint, steps: usize, seed: u32) -> Self {
        Self {
            base: name.to_owned(),
            base_sha256: base.sha256.clone(),
            sampler: "ddim-trailing-clip".to_owned(),
            steps,
            seed,
        }
    }

    /// Folder name that tells different descriptions apart.
    pub fn folder_name(&self) -> String {
        let name = Path::new(&self.base).file_name().map_or("base".into(), |n| n.to_string_lossy());
        let hash = self.base_sha256.get(..8).unwrap_or("unsaved");
        format!("{name}-{hash}-ddim{}-seed{}", self.steps, self.seed)
    }
}

/// Computes what is missing of the first `count` pairs in `folder` and returns them.
pub fn prepare(
    folder: &Path,
    options: &PairsOptions,
    base: &Checkpoint,
    count: usize,
    device: &Device,
) -> Result<Pairs> {
    let description = folder.join("pairs.json");
    if description.exists() {
        let found: PairsOptions = serde_json::from_slice(&files::read(&description)?)
            .map_err(|e| Error::content(&description, e))?;
        if found != *options {
            return Err(Error::content(
                &description,
                "the pairs there were made with another base, sampler or seed\n\nhint: choose another `--pairs-dir`",
            ));
        }
    } else {
        write_json(&description, options)?;
    }
    let teacher = Network::frozen(&base.config, &base.tensors, device)?;
    let schedule = Schedule::new(&base.schedule);
    let classes = base.class_count();
    let shards = count.div_ceil(SHARD);
    let missing = (0..shards).filter(|i| !shard_path(folder, *i).exists()).count();
    let mut progress = Progress::new("pairs", ((shards - missing) * SHARD) as u64, (shards * SHARD) as u64);
    let mut done = (shards - missing) * SHARD;
    let mut found = Vec::new();
    for shard in 0..shards {
        let path = shard_path(folder, shard);
        if !path.exists() {
            let mut parts = Vec::new();
            for first in (shard * SHARD..(shard + 1) * SHARD).step_by(BATCH) {
                let request = Request::new(options.seed, first as u64, BATCH, classes);
                parts.push(ddim(&teacher, &schedule, &request, options.steps)?.to_dtype(DType::F16)?);
                done += BATCH;
                progress.update(done as u64, "");
                if stop_requested() {
                    return Err(Error::Interrupted(format!(
                        "stopped; finished shards are kept in `{}`\n\nhint: the same command continues",
                        folder.display()
                    )));
                }
            }
            let y = Tensor::cat(&parts, 0)?;
            write_tensors(&path, &Tensors::from([("y".to_owned(), y)]), &[])?;
        }
        let y = read_tensors(&path, &files::read(&path)?)?.remove("y");
        let expected = [&[SHARD][..], &base.config.image_shape()].concat();
        match y {
            Some(y) if y.dims() == expected => found.push(y),
            _ => return Err(Error::content(&path, format!("it does not hold `y` of shape {expected:?}"))),
        }
    }
    let y = Tensor::cat(&found, 0)?.narrow(0, 0, count)?.to_dtype(DType::F16)?;
    Ok(Pairs { options: options.clone(), classes, y })
}

fn shard_path(folder: &Path, shard: usize) -> PathBuf {
    folder.join(format!("shard-{shard:05}.safetensors"))
}

impl Pairs {
    /// Number of pairs.
    pub fn count(&self) -> usize {
        self.y.dims()[0]
    }

    /// The pairs at `indices`: noise, image, class.
    ///
    /// # Shapes
    /// `z`, `y`: `[indices, c, h, w]` f32; class `[indices]` u32.
    pub fn batch(&self, indices: &[usize], device: &Device) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        let request = Request {
            seed: self.options.seed,
            images: indices.iter().map(|i| *i as u64).collect(),
            classes: self.classes.map(|n| indices.iter().map(|i| (i % n) as u32).collect()),
        };
        let (_, c, h, w) = self.y.dims4()?;
        let z = request.noise([c, h, w], device)?;
        let index: Vec<u32> = indices.iter().map(|i| *i as u32).collect();
        let y = self.y.index_select(&Tensor::new(index, self.y.device())?, 0)?;
        Ok((z, y.to_dtype(DType::F32)?.to_device(device)?, request.class_tensor(device)?))
    }
}
