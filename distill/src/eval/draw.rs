//! Images of the models that are judged; those of a teacher are costly and kept in a folder, which several processes can fill.
//!
//! A folder holds `teacher.json` (whose images, drawn how) and shards of up to 256 images, rounded to 8 bits, each with the
//! SHA-256 of its pixels. What is finished is never computed again, also for another number of images.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use dmd_core::schedule::Schedule;
use serde::{Deserialize, Serialize};

use super::Pictures;
use crate::checkpoint::{Checkpoint, read_metadata, read_tensors, write_json, write_tensors};
use crate::error::{Error, Result};
use crate::files;
use crate::network::{Guidance, Network, Tensors};
use crate::progress::{Progress, stop_requested};
use crate::sampler::{self, Request, Sampling};
use crate::share::Share;

/// Images drawn at once.
const BATCH: usize = 64;
/// Images in a file.
const SHARD: usize = 256;

/// Whose images a folder holds; two folders with the same description have the same images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Description {
    /// SHA-256 of the teacher's weights.
    sha256: String,
    /// SHA-256 of its configuration and schedule.
    #[serde(default)]
    model_sha256: String,
    sampler: String,
    steps: usize,
    /// Classifier-free guidance; 1 is none.
    #[serde(default)]
    guidance: f64,
    /// Seed of the noise contract; image `k` has class `k mod classes`.
    seed: u32,
    classes: Option<usize>,
    /// `[channels, height, width]`.
    shape: [usize; 3],
}

/// `count` images in one step: the constants of `model` with the weights of `weights`, which may be its teacher's.
pub fn one_step(
    model: &Checkpoint,
    weights: &Checkpoint,
    seed: u32,
    count: usize,
    device: &Device,
) -> Result<Pictures> {
    let network = Network::frozen(&weights.config, &weights.tensors, device)?;
    let constants = model.one_step()?;
    let mut all: Option<Pictures> = None;
    let mut progress = Progress::new("one step", 0, count as u64);
    for first in (0..count).step_by(BATCH) {
        let request = Request::new(seed, first as u64, BATCH.min(count - first), model.class_count());
        let x = sampler::one_step(&network, &constants, &request)?;
        join(&mut all, Pictures::from_tensor(&x, weights.config.range(), request.classes)?);
        progress.update((first + request.images.len()) as u64, "");
        if stop_requested() {
            return Err(Error::Interrupted("stopped while drawing".into()));
        }
    }
    all.ok_or_else(|| Error::Request("`--count` must be at least 1".into()))
}

/// Images of a teacher by DDIM.
pub struct ManySteps<'a> {
    /// Whose.
    pub teacher: &'a Checkpoint,
    /// Classifier-free guidance; 1 is none.
    pub guidance: f64,
    /// Steps per image.
    pub steps: usize,
    /// Seed of the noise.
    pub seed: u32,
    /// How many.
    pub count: usize,
    /// Below this, in a folder of their own, they are kept.
    pub cache: &'a Path,
}

/// All these images, from their folder as far as they are there.
pub fn many_steps(images: &ManySteps, device: &Device) -> Result<Pictures> {
    let mut all = None;
    draw(images, Share::ALL, device, |pictures| join(&mut all, pictures))?;
    all.ok_or_else(|| Error::Request("`--count` must be at least 1".into()))
}

/// Draws what is missing of a share of these images; returns how many the share has, and their folder.
pub fn fill(images: &ManySteps, share: Share, device: &Device) -> Result<(usize, PathBuf)> {
    let mut have = 0;
    let folder = draw(images, share, device, |pictures| have += pictures.len())?;
    Ok((have, folder))
}

/// Hands every file's images of a share to `keep`, one after the other.
fn draw(
    images: &ManySteps,
    share: Share,
    device: &Device,
    mut keep: impl FnMut(Pictures),
) -> Result<PathBuf> {
    let ManySteps { teacher, guidance, steps, seed, count, cache } = *images;
    let description = Description {
        sha256: teacher.sha256.clone(),
        model_sha256: teacher.description_sha256(),
        sampler: "ddim-trailing".to_owned(),
        steps,
        guidance,
        seed,
        classes: teacher.class_count(),
        shape: teacher.config.image_shape(),
    };
    let folder = claim(cache, &teacher.provenance.name, &description)?;
    let have = |pictures: &Option<Pictures>| pictures.as_ref().map_or(0, Pictures::len);
    let (mut shards, mut done, mut total) = (Vec::new(), 0, 0);
    for i in (share.index..count.div_ceil(SHARD)).step_by(share.of) {
        let path = folder.join(format!("shard-{i:05}.safetensors"));
        let (found, wanted) = (read(&path, description.shape)?, SHARD.min(count - i * SHARD));
        done += have(&found).min(wanted);
        total += wanted;
        shards.push((i, path, wanted, found));
    }
    let mut progress = Progress::new("teacher", done as u64, total as u64);
    let network = Network::frozen(&teacher.config, &teacher.tensors, device)?;
    let schedule = Schedule::new(&teacher.schedule);
    let guidance = Guidance::new(guidance, teacher.provenance.classes.as_ref())?;
    let sampling = Sampling { guidance, ..Sampling::ddim(steps) };
    for (i, path, wanted, mut pictures) in shards {
        let first = have(&pictures);
        for start in (first..wanted).step_by(BATCH) {
            let size = BATCH.min(wanted - start);
            let request = Request::new(seed, (i * SHARD + start) as u64, size, description.classes);
            let x = sampler::sample(&network, &schedule, &request, &sampling)?;
            join(&mut pictures, Pictures::from_tensor(&x, teacher.config.range(), None)?);
            done += size;
            progress.update(done as u64, "");
            if stop_requested() {
                if let Some(pictures) = &pictures {
                    write(&path, pictures)?;
                }
                return Err(Error::Interrupted(format!(
                    "stopped; finished images are kept in `{}`\n\nhint: the same command continues",
                    folder.display()
                )));
            }
        }
        let Some(mut pictures) = pictures else { continue };
        if first < wanted {
            write(&path, &pictures)?;
        }
        let size: usize = pictures.shape.iter().product();
        pictures.bytes.truncate(wanted * size);
        pictures.classes = Request::new(seed, (i * SHARD) as u64, wanted, description.classes).classes;
        keep(pictures);
    }
    Ok(folder)
}

fn join(all: &mut Option<Pictures>, more: Pictures) {
    match all {
        Some(all) => all.append(more),
        None => *all = Some(more),
    }
}

/// The folder for these images, which says so itself.
fn claim(cache: &Path, name: &str, description: &Description) -> Result<PathBuf> {
    let hash = description.sha256.get(..8).unwrap_or("unsaved");
    let safe: String =
        name.chars().map(|c| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect();
    let Description { steps, guidance, seed, .. } = description;
    let guided = if *guidance == 1.0 { String::new() } else { format!("-guided{guidance}") };
    let folder = cache.join(format!("{safe}-{hash}-ddim{steps}{guided}-seed{seed}"));
    let path = folder.join("teacher.json");
    if !path.exists() {
        write_json(&path, description)?;
        return Ok(folder);
    }
    let found: Description =
        serde_json::from_slice(&files::read(&path)?).map_err(|e| Error::content(&path, e))?;
    match found == *description {
        true => Ok(folder),
        false => Err(Error::content(
            &path,
            "the images there were drawn from another teacher\n\nhint: choose another `--cache`",
        )),
    }
}

fn write(path: &Path, pictures: &Pictures) -> Result<()> {
    let [c, h, w] = pictures.shape;
    let images = Tensor::from_slice(&pictures.bytes, (pictures.len(), c, h, w), &Device::Cpu)?;
    let tensors = Tensors::from([("images".to_owned(), images)]);
    write_tensors(path, &tensors, &[("sha256", files::sha256(&pictures.bytes))])
}

/// The images of a shard; none if there is no such file.
fn read(path: &Path, shape: [usize; 3]) -> Result<Option<Pictures>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = files::read(path)?;
    let wrong = |problem: &str| {
        Error::content(path, format!("{problem}\n\nhint: delete the file; its images are drawn again"))
    };
    let images =
        read_tensors(path, &bytes)?.remove("images").ok_or_else(|| wrong("there are no `images`"))?;
    if images.rank() != 4 || images.dims()[1..] != shape || !(1..=SHARD).contains(&images.dims()[0]) {
        return Err(wrong(&format!("its images have shape {:?}", images.dims())));
    }
    let values = images.flatten_all()?.to_vec1::<f32>()?;
    let pixels: Vec<u8> = values.iter().map(|v| *v as u8).collect();
    match read_metadata(path, &bytes)?.get("sha256") {
        Some(expected) if *expected == files::sha256(&pixels) => {
            Ok(Some(Pictures { shape, bytes: pixels, classes: None }))
        }
        _ => Err(wrong("its pixels do not have the SHA-256 that it names")),
    }
}
