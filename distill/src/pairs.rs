//! Noise-image pairs of a base: `z` by the noise contract, `y` by sampling from it, with the class.
//! Yin et al. 2024 (arXiv:2311.18828), section 3.3, with a deterministic sampler by default, so that `y` is a function of `z`.
//!
//! A folder holds `pairs.json` (what was asked) and shards of up to 256 pairs; what is finished is never computed again.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dmd_core::sampler::Sampler;
use dmd_core::schedule::Schedule;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoint, read_tensors, write_json, write_tensors};
use crate::error::{Error, Result};
use crate::files;
use crate::network::{Guidance, Network, Tensors};
use crate::progress::{Progress, stop_requested};
use crate::sampler::{Request, Sampling, sample};

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
    /// Sampler, its spacing and treatment of `x0`.
    pub sampler: String,
    /// Steps per image.
    pub steps: usize,
    /// Classifier-free guidance; 1 is none.
    #[serde(default = "unguided")]
    pub guidance: f64,
    /// Seed of the noise contract; pair `k` has the noise of image `k` and class `k mod classes`.
    pub seed: u32,
}

fn unguided() -> f64 {
    1.0
}

/// Pairs in memory.
pub struct Pairs {
    options: PairsOptions,
    classes: Option<usize>,
    /// `[count, c, h, w]` in the base's range, f16 on the CPU.
    y: Tensor,
}

impl PairsOptions {
    /// The description for a base.
    pub fn new(
        name: &str,
        base: &Checkpoint,
        sampler: Sampler,
        steps: usize,
        guidance: f64,
        seed: u32,
    ) -> Self {
        let clip = if base.schedule.clip.is_some() { "-clip" } else { "" };
        Self {
            base: name.to_owned(),
            base_sha256: base.sha256.clone(),
            sampler: format!("{sampler}-trailing{clip}"),
            steps,
            guidance,
            seed,
        }
    }

    fn sampling(&self, base: &Checkpoint) -> Result<Sampling> {
        let sampler = self.sampler.split('-').next().unwrap_or_default().parse()?;
        let guidance = Guidance::new(self.guidance, base.provenance.classes.as_ref())?;
        Ok(Sampling { sampler, steps: self.steps, guidance })
    }

    /// Folder name that tells different descriptions apart.
    pub fn folder_name(&self) -> String {
        let name = Path::new(&self.base).file_name().map_or("base".into(), |n| n.to_string_lossy());
        let hash = self.base_sha256.get(..8).unwrap_or("unsaved");
        let sampler = self.sampler.split('-').next().unwrap_or_default();
        let guidance = if self.guidance == 1.0 { String::new() } else { format!("-guided{}", self.guidance) };
        format!("{name}-{hash}-{sampler}{}{guidance}-seed{}", self.steps, self.seed)
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
    let sampling = options.sampling(base)?;
    let shards: Vec<(PathBuf, usize)> = (0..count.div_ceil(SHARD))
        .map(|i| (folder.join(format!("shard-{i:05}.safetensors")), SHARD.min(count - i * SHARD)))
        .collect();
    let read = |(path, _): &(PathBuf, usize)| read_shard(path, base.config.image_shape());
    let found = shards.iter().map(read).collect::<Result<Vec<_>>>()?;
    let have = |y: &Option<Tensor>| y.as_ref().map_or(0, |y| y.dims()[0]);
    let mut done: usize = found.iter().zip(&shards).map(|(y, (_, wanted))| have(y).min(*wanted)).sum();
    let mut progress = Progress::new("pairs", done as u64, count as u64);
    let mut all = Vec::new();
    for (i, (y, (path, wanted))) in found.into_iter().zip(&shards).enumerate() {
        let first = have(&y);
        let mut parts: Vec<Tensor> = y.into_iter().collect();
        for start in (first..*wanted).step_by(BATCH) {
            let count = BATCH.min(wanted - start);
            let request = Request::new(options.seed, (i * SHARD + start) as u64, count, classes);
            parts.push(
                sample(&teacher, &schedule, &request, &sampling)?
                    .to_dtype(DType::F16)?
                    .to_device(&Device::Cpu)?,
            );
            done += count;
            progress.update(done as u64, "");
            if stop_requested() {
                return Err(Error::Interrupted(format!(
                    "stopped; finished shards are kept in `{}`\n\nhint: the same command continues",
                    folder.display()
                )));
            }
        }
        let y = Tensor::cat(&parts, 0)?;
        if first < *wanted {
            write_tensors(path, &Tensors::from([("y".to_owned(), y.clone())]), &[])?;
        }
        all.push(y.narrow(0, 0, *wanted)?);
    }
    Ok(Pairs { options: options.clone(), classes, y: Tensor::cat(&all, 0)? })
}

/// The pairs of a shard, f16; none if there is no such file.
fn read_shard(path: &Path, image: [usize; 3]) -> Result<Option<Tensor>> {
    if !path.exists() {
        return Ok(None);
    }
    match read_tensors(path, &files::read(path)?)?.remove("y") {
        Some(y) if y.rank() == 4 && y.dims()[1..] == image && (1..=SHARD).contains(&y.dims()[0]) => {
            Ok(Some(y.to_dtype(DType::F16)?))
        }
        _ => Err(Error::content(
            path,
            format!("it does not hold `y` of up to {SHARD} images of shape {image:?}"),
        )),
    }
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
