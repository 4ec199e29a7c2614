//! Models of the Hugging Face hub: finds, downloads and checks what a `UNet2DModel` needs, through the crate `hf-hub` and
//! its cache, which Python's libraries share. `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean
//! what they mean there. Knows files, not tensors.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dmd_core::config::ModelConfig;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::files;
use crate::weights;

/// Attempts to go on with an interrupted download before giving up.
const RETRIES: u64 = 3;
/// Time between lines about a download where there is no terminal.
const INTERVAL: Duration = Duration::from_secs(20);
/// Parts of a pipeline that mean that its network does not see images, or sees text.
const FOREIGN_PARTS: [&str; 7] = ["vae", "vqvae", "movq", "text_encoder", "bert", "image_encoder", "prior"];

/// Whether this looks like `ORG/NAME` or `ORG/NAME@REVISION`.
pub fn is_id(base: &str) -> bool {
    let id = base.split_once('@').map_or(base, |(id, _)| id);
    let part = |part: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && part.chars().all(known) && !part.starts_with('.')
    };
    id.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

/// A model's files on this machine.
pub struct Fetched {
    /// The folder they are in.
    pub folder: PathBuf,
    /// `ORG/NAME`.
    pub name: String,
    /// The commit they are from.
    pub commit: String,
}

/// The files of a model, downloaded where they are not in the cache. `id` is `ORG/NAME`, with `@REVISION` for a branch, tag or
/// commit other than `main`; a branch is looked up every time, and all files are those of one commit.
pub fn fetch(id: &str) -> Result<Fetched> {
    let (name, revision) = split(id);
    let cache = cache();
    if offline() {
        return cached(&cache, id);
    }
    let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".to_owned());
    let endpoint = endpoint.trim_end_matches('/').to_owned();
    let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty()).or_else(|| cache.token());
    let builder = ApiBuilder::from_cache(cache.clone()).with_endpoint(endpoint.clone());
    let api = builder.with_token(token).with_retries(0).build().map_err(|e| failure(id, &endpoint, &e))?;
    let asked = Repo::with_revision(name.to_owned(), RepoType::Model, revision.to_owned());
    let info = api.repo(asked.clone()).info().map_err(|e| failure(id, &endpoint, &e))?;
    let commit = info.sha;
    if commit.len() < 7 || !commit.chars().all(|c| c.is_ascii_hexdigit()) {
        return Err(Error::Request(format!("{endpoint} gave `{commit}` as the commit of `{id}`")));
    }
    let pinned = Repo::with_revision(name.to_owned(), RepoType::Model, commit.clone());
    let remote = Remote { api: &api, repo: api.repo(pinned), cache: &cache, name, commit: &commit };
    let get = |file: &str| remote.get(file).map_err(|e| failure(id, &endpoint, &e)).and_then(checked);

    let all: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let wanted = Wanted::choose(id, &all)?;
    if let Some(index) = &wanted.pipeline {
        check_pipeline(id, &get(index)?)?;
    }
    let config = get(&wanted.config)?;
    let text = String::from_utf8_lossy(&files::read(&config)?).into_owned();
    ModelConfig::from_json(&text).map_err(|e| Error::content(&config, e))?;
    get(&wanted.scheduler)?;
    for shard in wanted.shards(&get(&wanted.weights)?)? {
        get(&shard)?;
    }
    let folder = snapshot(&cache, name, &commit);
    cache.repo(asked).create_ref(&commit).map_err(Error::file("write", &folder))?;
    Ok(Fetched { folder, name: name.to_owned(), commit })
}

/// Whether all files of a model are in the cache.
pub fn is_cached(id: &str) -> bool {
    cached(&cache(), id).is_ok()
}

/// Name and revision of `ORG/NAME@REVISION`.
fn split(id: &str) -> (&str, &str) {
    id.split_once('@').unwrap_or((id, "main"))
}

fn cache() -> Cache {
    match std::env::var_os("HF_HUB_CACHE") {
        Some(path) => Cache::new(path.into()),
        None => Cache::from_env(),
    }
}

fn offline() -> bool {
    let value = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_lowercase();
    ["1", "true", "yes", "on"].contains(&value.as_str())
}

/// The files of a model, by their names in the repository.
struct Wanted {
    pipeline: Option<String>,
    config: String,
    scheduler: String,
    weights: String,
}

impl Wanted {
    /// The shards that the weights consist of, if this file of them is an index.
    fn shards(&self, weights: &Path) -> Result<BTreeSet<String>> {
        let folder = self.weights.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
        Ok(weights::shards(weights)?.into_iter().map(|shard| format!("{folder}{shard}")).collect())
    }

    fn choose(id: &str, all: &[String]) -> Result<Self> {
        let has = |name: &String| all.contains(name);
        let missing = |what: &str| {
            Error::Request(format!(
                "`{id}` has no `{what}`\n\nhint: `--base` takes repositories of a diffusers `UNet2DModel`, such as \
                 google/ddpm-cifar10-32"
            ))
        };
        let first = |names: &[String], what: &str| {
            names.iter().find(|n| has(n)).cloned().ok_or_else(|| missing(what))
        };
        let config = first(&["config.json".into(), "unet/config.json".into()], "config.json")?;
        let folder = config.strip_suffix("config.json").unwrap_or_default();
        let weights = weights::choose(folder, all).cloned();
        let schedulers = ["scheduler_config.json".into(), "scheduler/scheduler_config.json".into()];
        Ok(Self {
            pipeline: Some("model_index.json".to_owned()).filter(has),
            scheduler: first(&schedulers, "scheduler_config.json")?,
            weights: weights.ok_or_else(|| missing(weights::NAMES[1]))?,
            config,
        })
    }
}

/// The folder of a commit in the cache.
fn snapshot(cache: &Cache, name: &str, commit: &str) -> PathBuf {
    cache.model(name.to_owned()).pointer_path(commit)
}

/// The files in the cache, if all are there.
fn cached(cache: &Cache, id: &str) -> Result<Fetched> {
    let (name, revision) = split(id);
    let refused = |problem: &str| {
        Error::Request(format!(
            "{}`{id}` is {problem} in the cache `{}`, and HF_HUB_OFFLINE forbids to download it\n\nhint: unset \
             HF_HUB_OFFLINE once",
            no_folder(id),
            cache.path().display()
        ))
    };
    let repo = Repo::model(name.to_owned());
    let reference = cache.path().join(repo.folder_name()).join("refs").join(revision);
    let commit = std::fs::read_to_string(reference).map(|text| text.trim().to_owned());
    let commit = commit.unwrap_or_else(|_| revision.to_owned());
    let folder = snapshot(cache, name, &commit);
    if !folder.is_dir() {
        let begun = folder
            .parent()
            .and_then(|all| std::fs::read_dir(all).ok())
            .is_some_and(|mut all| all.next().is_some());
        return Err(refused(if begun { "incomplete" } else { "not" }));
    }
    let mut all = Vec::new();
    for sub in ["", "unet/", "scheduler/"] {
        let entries = std::fs::read_dir(folder.join(sub)).into_iter().flatten().flatten();
        // A link to nothing is a file that was removed from the cache.
        let there = entries.filter(|entry| entry.path().is_file());
        all.extend(there.map(|entry| format!("{sub}{}", entry.file_name().to_string_lossy())));
    }
    let incomplete = || refused("incomplete");
    let wanted = Wanted::choose(id, &all).map_err(|_| incomplete())?;
    let shards = wanted.shards(&folder.join(&wanted.weights))?;
    if !shards.iter().all(|shard| all.contains(shard)) {
        return Err(incomplete());
    }
    Ok(Fetched { folder, name: name.to_owned(), commit })
}

/// The files of one commit.
struct Remote<'a> {
    api: &'a Api,
    repo: ApiRepo,
    cache: &'a Cache,
    name: &'a str,
    commit: &'a str,
}

impl Remote<'_> {
    /// One file: from the cache, else downloaded; an interrupted download goes on where it stopped.
    fn get(&self, file: &str) -> std::result::Result<PathBuf, ApiError> {
        let path = snapshot(self.cache, self.name, self.commit).join(file);
        if path.is_file() {
            return Ok(path);
        }
        let etag = self.api.metadata(&self.repo.url(file))?.etag().to_owned();
        let blob = self.cache.model(self.name.to_owned()).blob_path(&etag);
        if blob.is_file() && link(&blob, &path, file.split('/').count()).is_ok() {
            return Ok(path); // another commit has the same file
        }
        let mut attempt = 0;
        loop {
            let done = match std::io::stderr().is_terminal() {
                true => self.repo.download_with_progress(file, indicatif::ProgressBar::new(0)),
                false => self.repo.download_with_progress(file, Lines::default()),
            };
            attempt += 1;
            match done {
                // What is there is longer than the file, or has no rest that the server could send.
                Err(e) if attempt < RETRIES && useless_part(&e) => {
                    std::fs::remove_file(blob.with_extension("part"))?;
                }
                Err(e) if attempt < RETRIES && status(&e).is_none() => {
                    std::thread::sleep(Duration::from_millis(300 * attempt));
                }
                done => return done.map(|_| path),
            }
        }
    }
}

fn useless_part(error: &ApiError) -> bool {
    matches!(error, ApiError::InvalidResume) || status(error) == Some(416)
}

/// Gives a file of the cache another name, `depth` levels below the snapshot.
fn link(blob: &Path, path: &Path, depth: usize) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let _ = std::fs::remove_file(path); // a link to nothing
    let name = blob.file_name().unwrap_or_default();
    let relative = Path::new(&"../".repeat(depth + 1)).join("blobs").join(name);
    #[cfg(unix)]
    return std::os::unix::fs::symlink(relative, path);
    #[cfg(not(unix))]
    return std::fs::copy(blob, path).map(drop).and(Ok(drop(relative)));
}

/// Lines about a download.
#[derive(Default)]
struct Lines {
    file: String,
    total: usize,
    done: usize,
    printed: Option<Instant>,
}

impl hf_hub::api::Progress for Lines {
    fn init(&mut self, size: usize, file: &str) {
        (self.file, self.total, self.done) = (file.to_owned(), size, 0);
        if self.printed.is_none() {
            self.printed = Some(Instant::now());
            dmd_cli::say!("downloading {file}, {:.1} MB", size as f64 * 1e-6);
        }
    }

    fn update(&mut self, size: usize) {
        self.done += size;
        if self.printed.is_some_and(|printed| printed.elapsed() >= INTERVAL) {
            self.printed = Some(Instant::now());
            dmd_cli::say!(
                "{}: {:.1} of {:.1} MB",
                self.file,
                self.done as f64 * 1e-6,
                self.total as f64 * 1e-6
            );
        }
    }

    fn finish(&mut self) {}
}

/// Compares a file with the SHA-256 under which the hub stores large files; a wrong one is removed from the cache.
fn checked(path: PathBuf) -> Result<PathBuf> {
    let blob = std::fs::canonicalize(&path).map_err(Error::file("find", &path))?;
    let expected = blob.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
    if expected.len() != 64 || !expected.chars().all(|c| c.is_ascii_hexdigit()) {
        return Ok(path);
    }
    let got = files::sha256(&files::read(&blob)?);
    if got == expected {
        return Ok(path);
    }
    let removed = std::fs::remove_file(&path).and_then(|()| std::fs::remove_file(&blob));
    removed.map_err(Error::file("remove", &path))?;
    Err(Error::content(
        &path,
        format!(
            "got SHA-256 {got}, the hub announced {expected}; it was removed\n\nhint: run the command again"
        ),
    ))
}

/// Refuses pipelines whose network does not work on images alone.
fn check_pipeline(id: &str, path: &Path) -> Result<()> {
    let index: Value = serde_json::from_slice(&files::read(path)?).map_err(|e| Error::content(path, e))?;
    let foreign = FOREIGN_PARTS.iter().find(|part| index.get(**part).is_some_and(|value| !value.is_null()));
    match foreign {
        None => Ok(()),
        Some(part) => Err(Error::Request(format!(
            "`{id}` is a `{}` with the part `{part}`: latent and text-conditioned models are not supported\n\nhint: \
             `--base` takes unconditional or class-conditional pixel models, such as google/ddpm-cifar10-32",
            index["_class_name"].as_str().unwrap_or("pipeline"),
        ))),
    }
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(inner) => match **inner {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        _ => None,
    }
}

/// What is also wrong with something that looks like an id.
fn no_folder(id: &str) -> String {
    match Path::new(id).exists() {
        true => String::new(),
        false => format!("there is no file or folder `{id}` here; "),
    }
}

fn failure(id: &str, endpoint: &str, error: &ApiError) -> Error {
    let problem = match status(error) {
        Some(404) => format!(
            "{endpoint} has no model `{id}`, or not this revision\n\nhint: check the spelling; another revision is \
             written ORG/NAME@REVISION"
        ),
        Some(401 | 403) => format!(
            "{endpoint} does not show `{id}` to you\n\nhint: if it exists, accept its terms there and set HF_TOKEN"
        ),
        _ => format!(
            "cannot download `{id}` from {endpoint}: {error}\n\nhint: the same command goes on where it stopped; \
             HF_HUB_OFFLINE=1 uses what is in the cache; a folder you downloaded yourself works too"
        ),
    };
    Error::Request(no_folder(id) + &problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_two_parts() {
        for good in ["google/ddpm-cifar10-32", "a/b@main", "a/b.c@refs/pr/1"] {
            assert!(is_id(good), "{good}");
        }
        for bad in ["ddpm-cifar10", "./a/b", "/a/b", "a/b/c", "a/", "~/b", "runs/../x"] {
            assert!(!is_id(bad), "{bad}");
        }
    }
}
