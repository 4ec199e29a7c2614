//! Noise-image pairs of a base: `z` by the noise contract, `y` by sampling from it, with the class.
//! Yin et al. 2024 (arXiv:2311.18828), section 3.3, with a deterministic sampler by default, so that `y` is a function of `z`.
//!
//! A folder holds `pairs.json` (what was asked) and shards of up to 256 pairs; what is finished is never computed again, and
//! several processes can fill one folder together.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use dmd_core::sampler::Sampler;
use dmd_core::schedule::Schedule;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoint, read_tensors, write_json, write_tensors};
use crate::error::{Error, Result};
use crate::files;
use crate::network::{Guidance, Network, Tensors};
use crate::parallel::Team;
use crate::progress::{Progress, stop_requested};
use crate::sampler::{Request, Sampling, sample};
use crate::share::Share;

/// Pairs in a file.
const SHARD: usize = 256;
/// Pairs computed at once.
const BATCH: usize = 32;
/// Time after which an unfinished shard is saved.
const SAVE_INTERVAL: Duration = Duration::from_secs(60);
/// What tells the seed of the pairs from that of the run: the noise they teach is never that of the run's pictures.
const SEED_OF_PAIRS: u32 = 0x8000_0000;

/// What a folder of pairs holds; two folders with the same description have the same pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairsOptions {
    /// Name of the base.
    pub base: String,
    /// SHA-256 of its weights.
    pub base_sha256: String,
    /// SHA-256 of its configuration and schedule.
    #[serde(default)]
    pub model_sha256: String,
    /// Sampler, its spacing and treatment of `x0`.
    pub sampler: String,
    /// Steps per image.
    pub steps: usize,
    /// Classifier-free guidance; 1 is none.
    #[serde(default = "unguided")]
    pub guidance: f64,
    /// Number of classes, if the base is conditional.
    #[serde(default)]
    pub classes: Option<usize>,
    /// Seed of the noise contract, which is the run's with the top bit flipped; pair `k` has the noise of image `k` and class
    /// `k mod classes`.
    pub seed: u32,
}

fn unguided() -> f64 {
    1.0
}

/// Pairs in memory.
pub struct Pairs {
    seed: u32,
    all: Shard,
}

/// The first pairs of a file.
pub(crate) struct Shard {
    /// `[count, c, h, w]` in the base's range, f16 on the CPU.
    y: Tensor,
    /// `[count]` u32, if the base is conditional.
    class: Option<Tensor>,
}

impl PairsOptions {
    /// The description for a base and the seed of a run.
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
            model_sha256: base.description_sha256(),
            sampler: format!("{sampler}-trailing{clip}"),
            steps,
            guidance,
            classes: base.class_count(),
            seed: seed ^ SEED_OF_PAIRS,
        }
    }

    /// Whether pairs in `folder`, if there are any, are these.
    pub fn check(&self, folder: &Path) -> Result<()> {
        let description = folder.join("pairs.json");
        if !description.exists() {
            return Ok(());
        }
        let found: Self = serde_json::from_slice(&files::read(&description)?)
            .map_err(|e| Error::content(&description, e))?;
        // The same base may have been named by another path.
        if (Self { base: self.base.clone(), ..found }) == *self {
            return Ok(());
        }
        Err(Error::content(
            &description,
            "the pairs there were made with another base, sampler or seed, or other classes\n\nhint: choose another \
             folder (`--pairs-dir`, or `--out` of `dmd-distill pairs`)",
        ))
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
        format!("{name}-{hash}-{sampler}{}{guidance}-seed{:08x}", self.steps, self.seed)
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
    let (mut y, mut class) = (Vec::new(), Vec::new());
    compute(folder, options, base, count, Share::ALL, device, |shard| {
        y.push(shard.y);
        class.extend(shard.class);
    })?;
    let class = if class.is_empty() { None } else { Some(Tensor::cat(&class, 0)?) };
    Ok(Pairs { seed: options.seed, all: Shard { y: Tensor::cat(&y, 0)?, class } })
}

/// Computes what is missing of a share of the first `count` pairs in `folder`; returns how many the share has.
pub fn fill(
    folder: &Path,
    options: &PairsOptions,
    base: &Checkpoint,
    count: usize,
    share: Share,
    device: &Device,
) -> Result<usize> {
    let mut have = 0;
    compute(folder, options, base, count, share, device, |shard| have += shard.count())?;
    Ok(have)
}

/// Computes what is missing of the first `count` pairs in `folder`, each of several ranks its share of the shards.
pub fn fill_together(
    folder: &Path,
    options: &PairsOptions,
    base: &Checkpoint,
    count: usize,
    device: &Device,
    team: &Team,
) -> Result<()> {
    if team.size() == 1 {
        return Ok(());
    }
    let share = Share { index: team.rank(), of: team.size() };
    let interrupted = match fill(folder, options, base, count, share, device) {
        Ok(_) => None,
        Err(Error::Interrupted(message)) => Some(message),
        Err(error) => return Err(error),
    };
    // All wait here for the last, and stop together.
    if team.any(interrupted.is_some()) {
        let kept = || format!("stopped; finished pairs are kept in `{}`", folder.display());
        return Err(Error::Interrupted(interrupted.unwrap_or_else(kept)));
    }
    Ok(())
}

/// Hands every shard to `keep`, one after the other.
fn compute(
    folder: &Path,
    options: &PairsOptions,
    base: &Checkpoint,
    count: usize,
    share: Share,
    device: &Device,
    mut keep: impl FnMut(Shard),
) -> Result<()> {
    let (schedule, sampling) = (Schedule::new(&base.schedule), options.sampling(base)?);
    options.check(folder)?;
    write_json(&folder.join("pairs.json"), options)?;
    let teacher = Network::frozen(&base.config, &base.tensors, device)?;
    let mut files = Vec::new();
    for i in (share.index..count.div_ceil(SHARD)).step_by(share.of) {
        let file = ShardFile::new(folder, i, base);
        let wanted = SHARD.min(count - i * SHARD);
        files.push((i * SHARD, wanted, stored(&file.read()?).min(wanted), file));
    }
    let mut done: usize = files.iter().map(|(_, _, found, _)| found).sum();
    let total: usize = files.iter().map(|(_, wanted, ..)| wanted).sum();
    let mut progress = Progress::new("pairs", done as u64, total as u64);
    let (mut saved, mut seen) = (Instant::now(), BTreeMap::new());
    for (first, wanted, _, file) in files {
        let mut shard = file.read()?;
        while stored(&shard) < wanted {
            let start = stored(&shard);
            let count = BATCH.min(wanted - start);
            let request = Request::new(options.seed, (first + start) as u64, count, options.classes);
            let y = sample(&teacher, &schedule, &request, &sampling)?.to_dtype(DType::F16)?;
            let new = Shard { y: y.to_device(&Device::Cpu)?, class: request.class_tensor(&Device::Cpu)? };
            let longer = match shard {
                Some(shard) => shard.append(&new)?,
                None => new,
            };
            done += count;
            progress.update(done as u64, "");
            let stop = stop_requested();
            if stop || longer.count() >= wanted || saved.elapsed() >= SAVE_INTERVAL {
                file.write(&longer)?;
                saved = Instant::now();
            }
            shard = Some(longer);
            if stop {
                let kept = format!("stopped; {done} of {total} pairs are kept in `{}`", folder.display());
                return Err(Error::Interrupted(kept));
            }
        }
        if let Some(shard) = shard {
            if let Some(other) = seen.insert(shard.sha256()?, first / SHARD) {
                let problem = format!("it holds the images of shard {other}");
                let hint = "delete the one that was copied: the same command computes it";
                return Err(Error::content(&file.path, format!("{problem}\n\nhint: {hint}")));
            }
            keep(shard.first(wanted)?);
        }
    }
    Ok(())
}

/// Number of pairs that a file had.
fn stored(shard: &Option<Shard>) -> usize {
    shard.as_ref().map_or(0, Shard::count)
}

impl Shard {
    pub(crate) fn count(&self) -> usize {
        self.y.dims()[0]
    }

    /// Of the images.
    pub(crate) fn sha256(&self) -> Result<String> {
        let values = self.y.flatten_all()?.to_vec1::<half::f16>()?;
        Ok(files::sha256(bytemuck::cast_slice(&values.iter().map(|v| v.to_bits()).collect::<Vec<u16>>())))
    }

    fn append(&self, other: &Self) -> Result<Self> {
        let class = match (&self.class, &other.class) {
            (Some(a), Some(b)) => Some(Tensor::cat(&[a, b], 0)?),
            _ => None,
        };
        Ok(Self { y: Tensor::cat(&[&self.y, &other.y], 0)?, class })
    }

    fn first(&self, count: usize) -> Result<Self> {
        let class = self.class.as_ref().map(|class| class.narrow(0, 0, count)).transpose()?;
        Ok(Self { y: self.y.narrow(0, 0, count)?, class })
    }
}

/// Where a shard is, and what it must hold: `y` f16, and `class` u32 if the base is conditional.
pub(crate) struct ShardFile {
    path: PathBuf,
    image: [usize; 3],
    classes: Option<usize>,
}

/// How many of the first `count` pairs each shard has.
pub(crate) fn shard_sizes(count: usize) -> impl Iterator<Item = usize> {
    (0..count.div_ceil(SHARD)).map(move |i| SHARD.min(count - i * SHARD))
}

impl ShardFile {
    /// Shard number `i` of the pairs of a base.
    pub(crate) fn new(folder: &Path, i: usize, base: &Checkpoint) -> Self {
        Self {
            path: folder.join(format!("shard-{i:05}.safetensors")),
            image: base.config.image_shape(),
            classes: base.class_count(),
        }
    }

    /// The pairs; none if there is no such file.
    pub(crate) fn read(&self) -> Result<Option<Shard>> {
        if !self.path.exists() {
            return Ok(None);
        }
        let mut tensors = read_tensors(&self.path, &files::read(&self.path)?)?;
        let wrong = || {
            let [c, h, w] = self.image;
            let class = self.classes.map_or(String::new(), |n| format!(" with a `class` below {n} for each"));
            let problem =
                format!("it does not hold `y` of up to {SHARD} images of shape [{c}, {h}, {w}]{class}");
            Error::content(&self.path, problem)
        };
        let y = tensors
            .remove("y")
            .filter(|y| y.rank() == 4 && y.dims()[1..] == self.image && (1..=SHARD).contains(&y.dims()[0]));
        let y = y.ok_or_else(wrong)?.to_dtype(DType::F16)?;
        let class = match (self.classes, tensors.remove("class")) {
            (None, None) => None,
            (Some(classes), Some(class)) if class.dims() == &y.dims()[..1] => {
                let values = class.to_vec1::<f32>()?;
                if values.iter().any(|class| !(0.0..classes as f32).contains(class)) {
                    return Err(wrong());
                }
                Some(class.to_dtype(DType::U32)?)
            }
            _ => return Err(wrong()),
        };
        Ok(Some(Shard { y, class }))
    }

    /// Writes the pairs, unless another process has come as far meanwhile.
    fn write(&self, shard: &Shard) -> Result<()> {
        if stored(&self.read()?) >= shard.count() {
            return Ok(());
        }
        let mut tensors = Tensors::from([("y".to_owned(), shard.y.clone())]);
        tensors.extend(shard.class.clone().map(|class| ("class".to_owned(), class)));
        write_tensors(&self.path, &tensors, &[])
    }
}

impl Pairs {
    /// Number of pairs.
    pub fn count(&self) -> usize {
        self.all.count()
    }

    /// The pairs at `indices`: noise, image, class.
    ///
    /// # Shapes
    /// `z`, `y`: `[indices, c, h, w]` f32; class `[indices]` u32.
    pub fn batch(&self, indices: &[usize], device: &Device) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        let images = indices.iter().map(|i| *i as u64).collect();
        let request = Request { seed: self.seed, images, classes: None };
        let (_, c, h, w) = self.all.y.dims4()?;
        let z = request.noise([c, h, w], device)?;
        let index: Vec<u32> = indices.iter().map(|i| *i as u32).collect();
        let index = Tensor::new(index, &Device::Cpu)?;
        let y = self.all.y.index_select(&index, 0)?;
        let class = match &self.all.class {
            Some(class) => Some(class.index_select(&index, 0)?.to_device(device)?),
            None => None,
        };
        Ok((z, y.to_dtype(DType::F32)?.to_device(device)?, class))
    }
}
