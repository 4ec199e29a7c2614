//! Models of the Hugging Face hub: finds, downloads and checks what a `UNet2DModel` needs, through the crate `hf-hub` and
//! its cache, which Python's libraries share. `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean
//! what they mean there. Knows files, not tensors.

use std::path::{Path, PathBuf};

use dmd_core::config::ModelConfig;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::files;
use crate::weights;

/// Attempts to go on with an interrupted download before giving up.
const RETRIES: usize = 3;
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

/// The folder of a model's files, downloaded where they are not in the cache. `id` is `ORG/NAME`, with `@REVISION` for a
/// branch, tag or commit other than `main`.
pub fn fetch(id: &str) -> Result<PathBuf> {
    let (name, revision) = id.split_once('@').unwrap_or((id, "main"));
    let cache = cache();
    let repo = Repo::with_revision(name.to_owned(), RepoType::Model, revision.to_owned());
    if offline() {
        return cached(&cache, &repo, id);
    }
    let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".to_owned());
    let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty()).or_else(|| cache.token());
    let builder = ApiBuilder::from_cache(cache).with_endpoint(endpoint.clone());
    let api = builder.with_token(token).with_retries(RETRIES).build();
    let repo = api.map_err(|e| failure(id, &endpoint, &e))?.repo(repo);
    let all = repo.info().map_err(|e| failure(id, &endpoint, &e))?.siblings;
    let all: Vec<String> = all.into_iter().map(|file| file.rfilename).collect();
    let get = |name: &str| download(&repo, name).map_err(|e| failure(id, &endpoint, &e));
    let wanted = Wanted::choose(id, &all)?;
    if let Some(index) = &wanted.pipeline {
        check_pipeline(id, &checked(get(index)?)?)?;
    }
    let config = checked(get(&wanted.config)?)?;
    let text = String::from_utf8_lossy(&files::read(&config)?).into_owned();
    ModelConfig::from_json(&text).map_err(|e| Error::content(&config, e))?;
    checked(get(&wanted.scheduler)?)?;
    let weights = checked(get(&wanted.weights)?)?;
    for shard in weights::shards(&weights)? {
        let folder =
            wanted.weights.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
        checked(get(&format!("{folder}{shard}"))?)?;
    }
    snapshot(&config, &wanted.config)
}

/// Whether the model's configuration is in the cache.
pub fn is_cached(id: &str) -> bool {
    cache().model(id.to_owned()).get("config.json").is_some()
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
        let weights: Vec<String> = weights::NAMES.iter().map(|name| format!("{folder}{name}")).collect();
        let schedulers = ["scheduler_config.json".into(), "scheduler/scheduler_config.json".into()];
        Ok(Self {
            pipeline: Some("model_index.json".to_owned()).filter(has),
            scheduler: first(&schedulers, "scheduler_config.json")?,
            weights: first(&weights, weights::NAMES[1])?,
            config,
        })
    }
}

/// The snapshot in the cache, if it is complete.
fn cached(cache: &Cache, repo: &Repo, id: &str) -> Result<PathBuf> {
    let local = cache.repo(repo.clone());
    let found = |name: &str| local.get(name);
    let config = ["config.json", "unet/config.json"].into_iter().find_map(|name| Some((name, found(name)?)));
    let Some((name, config)) = config else {
        return Err(Error::Request(format!(
            "`{id}` is not in the cache `{}`, and HF_HUB_OFFLINE forbids to download it\n\nhint: unset HF_HUB_OFFLINE once",
            cache.path().display()
        )));
    };
    snapshot(&config, name)
}

/// The folder in which a file has the name `name`.
fn snapshot(path: &Path, name: &str) -> Result<PathBuf> {
    let folder = path.ancestors().nth(name.split('/').count());
    folder.map(Path::to_owned).ok_or_else(|| Error::content(path, "it is in no folder"))
}

/// One file: from the cache, else downloaded; an interrupted download goes on where it stopped.
fn download(repo: &ApiRepo, name: &str) -> std::result::Result<PathBuf, ApiError> {
    match repo.get(name) {
        // A part that is longer than the file, or that the server refuses to continue, is of no use.
        Err(ApiError::InvalidResume) => repo.get(name),
        other => other,
    }
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

fn failure(id: &str, endpoint: &str, error: &ApiError) -> Error {
    let status = match error {
        ApiError::RequestError(inner) => match **inner {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        _ => None,
    };
    Error::Request(match status {
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
    })
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
