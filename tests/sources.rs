//! Where bases come from: a hub (a local server with its layout), PyTorch files, shards, old names; and that the three
//! reference bases go the whole way at full size.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use dmd_core::config::ModelConfig;
use dmd_distill::base;
use dmd_distill::checkpoint::{Checkpoint, Source};
use dmd_distill::network::Tensors;
use dmd_tests::hub::{COMMIT, COMMIT_2, Files, Hub, NEWER, Served};
use dmd_tests::{Finished, Golden, binary, fixture, refused, run_bin, seeded};
use serde_json::Value;

const SCHEDULE: &str =
    r#"{"_class_name":"DDPMScheduler","num_train_timesteps":1000,"beta_start":0.0001,"beta_end":0.02}"#;
const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

/// `dmd-distill` with a hub and a cache of its own.
fn distill(cwd: &Path, hub: &str, environment: &[(&str, &str)], arguments: &[&str]) -> Result<Finished> {
    let output = Command::new(binary("dmd-distill")?)
        .args(arguments)
        .current_dir(cwd)
        .env("HF_HOME", cwd.join("cache"))
        .env("HF_ENDPOINT", hub)
        .env_remove("HF_HUB_CACHE")
        .env_remove("HF_HUB_OFFLINE")
        .env_remove("HF_TOKEN")
        .envs(environment.iter().copied())
        .output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Finished { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) })
}

/// A short run from a base to pictures: distil, export, sample.
fn whole_way(cwd: &Path, hub: &str, base: &str) -> Result<()> {
    let line = "--train-steps 1 --batch 2 --pairs 2 --pair-steps 2 --samples 1 --fake-updates 1 --out run";
    let arguments: Vec<&str> = ["--base", base].into_iter().chain(line.split(' ')).collect();
    let done = distill(cwd, hub, &[], &arguments)?;
    ensure!(done.code == Some(0), "{done:?}");
    let done = run_bin("dmd-export", cwd, ["model.onnx", "--from", "run"])?;
    ensure!(done.code == Some(0), "{done:?}");
    for provider in ["engine", "tract", "cpu"] {
        let output = format!("{provider}.png");
        let done = run_bin(
            "dmd-run",
            cwd,
            ["model.onnx", "--count", "2", "--grid", "--provider", provider, "-o", &output],
        )?;
        ensure!(done.code == Some(0) && cwd.join(&output).is_file(), "{done:?}");
    }
    Ok(())
}

/// The configuration of a golden case, and its weights as safetensors.
fn case(name: &str) -> Result<(String, Vec<u8>)> {
    let golden = Golden::load("bases")?;
    let about = golden.cases()?[name].clone();
    let (config, seed) = seeded::case(&about)?;
    let tensors = candle(seeded::weights(&config, seed)?)?;
    Ok((about["config"].to_string(), safetensors::serialize(&tensors, None)?))
}

fn candle(weights: BTreeMap<String, dmd_tests::Tensor>) -> Result<Tensors> {
    let tensor =
        |(name, t): (String, dmd_tests::Tensor)| Ok((name, Tensor::from_vec(t.data, t.shape, &Device::Cpu)?));
    weights.into_iter().map(tensor).collect()
}

fn folder(path: &Path, config: &str, weights: &[u8]) -> Result<PathBuf> {
    fs::create_dir_all(path)?;
    fs::write(path.join("config.json"), config)?;
    fs::write(path.join("scheduler_config.json"), SCHEDULE)?;
    fs::write(path.join(WEIGHTS), weights)?;
    Ok(path.to_owned())
}

/// google/ddpm-cifar10-32 at full size, with random weights: downloaded with an interruption, distilled, exported, run.
#[test]
fn ddpm_cifar10_goes_the_whole_way_from_the_hub() -> Result<()> {
    let (config, weights) = case("ddpm-cifar10")?;
    let cut = Served { cut: Some((1, weights.len() / 2)), ..Served::large(weights) };
    let hub = Hub::start(Files::from([
        ("google/ddpm-cifar10-32/config.json".to_owned(), Served::small(&config)),
        ("google/ddpm-cifar10-32/scheduler_config.json".to_owned(), Served::small(SCHEDULE)),
        (
            "google/ddpm-cifar10-32/model_index.json".to_owned(),
            Served::small(r#"{"_class_name":"DDPMPipeline"}"#),
        ),
        ("google/ddpm-cifar10-32/diffusion_pytorch_model.safetensors".to_owned(), cut.clone()),
    ]))?;
    let cwd = tempfile::tempdir()?;
    whole_way(cwd.path(), &format!("{}/", hub.address), "ddpm-cifar10")?;
    let card: Value = serde_json::from_slice(&fs::read(cwd.path().join("run/generator/card.json"))?)?;
    ensure!(card["name"] == "one-step-cifar10", "{card}");
    ensure!(card["base"]["id"] == format!("google/ddpm-cifar10-32@{COMMIT}"), "{card}");
    let name = format!("/google/ddpm-cifar10-32/resolve/{COMMIT}/{WEIGHTS}");
    let again: Vec<String> = hub.asked().into_iter().filter(|path| path.starts_with(&name)).collect();
    let resumed = again.iter().any(|path| path.rsplit(' ').next().is_some_and(|from| from != "0"));
    ensure!(resumed, "the download did not go on where it stopped: {again:?}");
    let listed = distill(cwd.path(), &hub.address, &[], &["bases"])?;
    ensure!(listed.stdout.contains("in the cache, from the hub"), "{listed:?}");
    let offline = ["--base", "google/ddpm-cifar10-32", "--dry-run"];
    let done = distill(cwd.path(), "http://127.0.0.1:9", &[("HF_HUB_OFFLINE", "1")], &offline)?;
    ensure!(done.code == Some(0) && done.stderr.contains("parameters 35746307"), "{done:?}");
    Ok(())
}

/// Cut for good, then continued by a second command; a tag; the token; another commit while the first is in the cache.
#[test]
fn a_download_is_of_one_commit_and_goes_on_with_the_next_command() -> Result<()> {
    let (config, bytes) = case("small-heads")?;
    let half = bytes.len() / 2;
    let cut = Served { cut: Some((3, half / 4)), ..Served::large(bytes.clone()) };
    let hub = Hub::start(Files::from([
        ("a/moved/config.json".to_owned(), Served::small(&config)),
        ("a/moved/scheduler_config.json".to_owned(), Served::small(SCHEDULE)),
        (format!("a/moved/{WEIGHTS}"), cut),
    ]))?;
    let cwd = tempfile::tempdir()?;
    let run = |base: &str, environment: &[(&str, &str)]| {
        distill(cwd.path(), &hub.address, environment, &["--base", base, "--dry-run"])
    };
    refused(&run("a/moved", &[("HF_TOKEN", "secret")])?, &["cannot download `a/moved`", "goes on", "hint:"])?;
    let asked = hub.asked();
    ensure!(asked.iter().all(|line| line.contains(" with bearer secret")), "{asked:?}");
    refused(
        &run("a/moved", &[("HF_HUB_OFFLINE", "1")])?,
        &["incomplete in the cache", "unset HF_HUB_OFFLINE"],
    )?;
    let before = asked.len();
    let done = run("a/moved", &[])?;
    ensure!(done.code == Some(0) && done.stderr.contains(&format!("downloading {WEIGHTS}")), "{done:?}");
    let asked = hub.asked();
    let resumed = |line: &String| line.contains(&format!("{WEIGHTS} from")) && !line.ends_with(" from 0");
    ensure!(asked[before..].iter().any(resumed), "the second command began again: {asked:?}");

    let tagged = run("a/moved@v1", &[])?;
    ensure!(tagged.code == Some(0), "{tagged:?}");
    let whole =
        |asked: &[String]| asked.iter().filter(|line| line.contains(&format!("{WEIGHTS} from"))).count();
    let count = whole(&hub.asked());
    hub.replace(NEWER, Served::small("the second commit"));
    let done = run("a/moved", &[])?;
    ensure!(done.code == Some(0), "{done:?}");
    let snapshots = cwd.path().join("cache/hub/models--a--moved/snapshots");
    ensure!(snapshots.join(COMMIT_2).join(WEIGHTS).is_file(), "the weights are not in the second snapshot");
    ensure!(whole(&hub.asked()) == count, "unchanged weights were downloaded again");
    for base in ["a/moved", "a/moved@v1"] {
        let done = distill(
            cwd.path(),
            "http://127.0.0.1:9",
            &[("HF_HUB_OFFLINE", "1")],
            &["--base", base, "--dry-run"],
        )?;
        ensure!(done.code == Some(0), "{done:?}");
    }
    Ok(())
}

/// An estimate for a preset needs neither the network nor a place to write.
#[test]
fn a_dry_run_of_a_preset_downloads_nothing() -> Result<()> {
    let hub = Hub::start(Files::new())?;
    let cwd = tempfile::tempdir()?;
    let done = distill(cwd.path(), &hub.address, &[], &["--base", "ddpm-cifar10", "--dry-run"])?;
    ensure!(done.code == Some(0), "{done:?}");
    for says in ["parameters 35746307", "million multiply-adds", "memory about", "time about", "not loaded"] {
        ensure!(done.stderr.contains(says), "`{says}` is not in: {}", done.stderr);
    }
    let options: Value = serde_json::from_str(&done.stdout)?;
    ensure!(options["lr"] == 2e-5 && options["base"] == "ddpm-cifar10", "{options}");
    ensure!(options.get("base_sha256").is_none() && options.get("pairs_dir").is_none(), "{options}");
    ensure!(hub.asked().is_empty(), "{:?}", hub.asked());
    ensure!(fs::read_dir(cwd.path())?.next().is_none(), "something was written");
    Ok(())
}

/// The other two reference networks at full size, with random weights, from folders.
#[test]
fn ddpm_mnist_and_ddpm_celeba_go_the_whole_way() -> Result<()> {
    for name in ["ddpm-mnist", "ddpm-celeba"] {
        let cwd = tempfile::tempdir()?;
        let (config, weights) = case(name)?;
        let base = folder(&cwd.path().join("base"), &config, &weights)?;
        if name == "ddpm-mnist" {
            fs::write(base.join("scheduler_config.json"), SCHEDULE.replace("1000", "401"))?;
        }
        whole_way(cwd.path(), "http://127.0.0.1:9", "./base").context(name)?;
    }
    Ok(())
}

#[test]
fn what_a_hub_cannot_give_is_said() -> Result<()> {
    let (config, weights) = case("small-heads")?;
    let good = Served::large(weights.clone());
    let wrong = Served { bytes: weights.iter().rev().copied().collect(), ..good.clone() };
    let text = r#"{"_class_name":"StableDiffusionPipeline","text_encoder":["transformers","CLIPTextModel"]}"#;
    let latent = r#"{"_class_name":"LDMPipeline","vqvae":["diffusers","VQModel"]}"#;
    let conditional = r#"{"_class_name":"UNet2DConditionModel"}"#;
    let mut files = Files::new();
    for (repository, config, index, served) in [
        ("a/wrong", config.as_str(), "", &wrong),
        ("a/text", config.as_str(), text, &good),
        ("a/latent", config.as_str(), latent, &good),
        ("a/conditional", conditional, "", &good),
        ("a/good", config.as_str(), "", &good),
    ] {
        files.insert(format!("{repository}/unet/config.json"), Served::small(config));
        files.insert(format!("{repository}/scheduler/scheduler_config.json"), Served::small(SCHEDULE));
        files.insert(format!("{repository}/unet/{WEIGHTS}"), served.clone());
        if !index.is_empty() {
            files.insert(format!("{repository}/model_index.json"), Served::small(index));
        }
    }
    files.insert("a/empty/README.md".to_owned(), Served::small("nothing"));
    let hub = Hub::start(files)?;
    let cwd = tempfile::tempdir()?;
    let run = |base: &str, environment: &[(&str, &str)]| {
        distill(cwd.path(), &hub.address, environment, &["--base", base, "--dry-run"])
    };
    let good = run("a/good", &[])?;
    ensure!(good.code == Some(0), "{good:?}");
    refused(&run("a/wrong", &[])?, &["SHA-256", "the hub announced", "hint:"])?;
    refused(&run("a/text", &[])?, &["StableDiffusionPipeline", "text_encoder", "not supported"])?;
    refused(&run("a/latent", &[])?, &["LDMPipeline", "vqvae", "not supported"])?;
    refused(&run("a/conditional", &[])?, &["_class_name", "UNet2DConditionModel"])?;
    refused(&run("a/empty", &[])?, &["no `config.json`", "UNet2DModel"])?;
    refused(
        &run("a/missing", &[])?,
        &["there is no file or folder `a/missing` here", "has no model `a/missing`", "hint:"],
    )?;
    refused(&run("a/good@v2", &[])?, &["a/good@v2", "revision"])?;
    refused(&run("a/never", &[("HF_HUB_OFFLINE", "1")])?, &["not in the cache", "HF_HUB_OFFLINE"])?;
    let unreachable = distill(cwd.path(), "http://127.0.0.1:9", &[], &["--base", "a/other", "--dry-run"])?;
    refused(&unreachable, &["cannot download `a/other`", "HF_HUB_OFFLINE"])?;
    let asked = hub.asked();
    let early = asked.iter().any(|path| path.contains("a/conditional") && path.contains("safetensors"));
    ensure!(!early, "weights of a foreign model were downloaded: {asked:?}");
    Ok(())
}

#[test]
fn pytorch_files_of_other_programs_are_read_and_never_executed() -> Result<()> {
    let pickles = fixture("pickles");
    let small_mnist = r#"{"_class_name":"ContextUnet","n_feat":8,"sample_size":12}"#;
    let small_celeba = r#"{"_class_name":"CelebaUNet","channels":8,"n_steps":50}"#;
    for (file, config, seed, steps, classes) in
        [("mnist.pth", small_mnist, 21, 401, Some(10)), ("celeba.pt", small_celeba, 22, 50, None)]
    {
        let path = pickles.join(file);
        let checkpoint = base::load(path.to_str().context("a path")?)?;
        ensure!(checkpoint.config == ModelConfig::from_json(config)?, "{file}: {:?}", checkpoint.config);
        ensure!(checkpoint.schedule.num_train_timesteps == steps && checkpoint.class_count() == classes);
        let expected = candle(seeded::weights(&checkpoint.config, seed)?)?;
        ensure!(checkpoint.tensors.keys().eq(expected.keys()), "{file}");
        for (name, tensor) in &checkpoint.tensors {
            let apart = (tensor - &expected[name])?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            ensure!(apart < 1e-3, "{file}, {name}: {apart}");
        }
    }
    let cwd = tempfile::tempdir()?;
    let zipped = cwd.path().join("pretrained_model.zip");
    zip(
        &zipped,
        &[("__MACOSX/._model.pth", b"x"), ("model/model_39.pth", &fs::read(pickles.join("mnist.pth"))?)],
    )?;
    let checkpoint = base::load(zipped.to_str().context("a path")?)?;
    ensure!(
        checkpoint.config == ModelConfig::from_json(small_mnist)?
            && checkpoint.provenance.name == "pretrained_model"
    );
    let inside = cwd.path().join("folder");
    fs::create_dir(&inside)?;
    fs::write(inside.join("config.json"), small_celeba)?;
    fs::write(inside.join("scheduler_config.json"), SCHEDULE.replace("1000", "50"))?;
    fs::copy(pickles.join("celeba.pt"), inside.join("epoch-3.pt"))?;
    let from_folder = Checkpoint::load(&Source::Folder(inside.clone()))?;
    ensure!(from_folder.config == ModelConfig::from_json(small_celeba)?);
    fs::rename(inside.join("epoch-3.pt"), inside.join("part-1.bin"))?;
    let map: serde_json::Map<String, Value> =
        from_folder.tensors.keys().map(|name| (name.clone(), "part-1.bin".into())).collect();
    let index = serde_json::json!({ "weight_map": map }).to_string();
    fs::write(inside.join("diffusion_pytorch_model.bin.index.json"), index)?;
    let from_shards = Checkpoint::load(&Source::Folder(inside.clone()))?;
    ensure!(from_shards.tensors.keys().eq(from_folder.tensors.keys()));
    for path in [&zipped, &inside] {
        fs::remove_dir_all(path).or_else(|_| fs::remove_file(path))?;
    }
    let code = pickles.join("code.pth");
    let done = distill(
        cwd.path(),
        "http://127.0.0.1:9",
        &[],
        &["--base", code.to_str().context("a path")?, "--out", "x"],
    )?;
    refused(&done, &["code.pth", ".system", "nothing in it was executed", "hint:"])?;
    ensure!(fs::read_dir(cwd.path())?.count() == 0, "something was written");
    Ok(())
}

/// Writes a compressed zip file.
fn zip(path: &Path, entries: &[(&str, &[u8])]) -> Result<()> {
    let mut archive = zip::ZipWriter::new(fs::File::create(path)?);
    let options =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    for (name, bytes) in entries {
        archive.start_file(*name, options)?;
        archive.write_all(bytes)?;
    }
    archive.finish()?;
    Ok(())
}

#[test]
fn a_network_that_does_not_know_all_steps_is_refused() -> Result<()> {
    let cwd = tempfile::tempdir()?;
    for (config, says) in [
        (
            r#"{"_class_name":"ContextUnet","n_feat":8,"n_steps":400}"#,
            ["got 1000", "expected 401", "`n_steps` 400"],
        ),
        (
            r#"{"_class_name":"CelebaUNet","channels":8,"n_steps":50}"#,
            ["got 1000", "expected 50", "`n_steps` 50"],
        ),
    ] {
        folder(&cwd.path().join("base"), config, b"")?;
        refused(&distill(cwd.path(), "http://127.0.0.1:9", &[], &["--base", "./base", "--dry-run"])?, &says)?;
    }
    Ok(())
}

#[test]
fn old_names_and_shards_load_to_the_same_network() -> Result<()> {
    let (config, bytes) = case("small-heads")?;
    let cwd = tempfile::tempdir()?;
    let load = |path: &Path| Checkpoint::load(&Source::Folder(path.to_owned()));
    let expected = load(&folder(&cwd.path().join("new"), &config, &bytes)?)?;

    let mut old = Tensors::new();
    for (name, tensor) in &expected.tensors {
        let legacy = [
            (".to_q.", ".query."),
            (".to_k.", ".key."),
            (".to_v.", ".value."),
            (".to_out.0.", ".proj_attn."),
        ];
        let renamed = legacy.iter().fold(name.clone(), |name, (new, old)| name.replace(new, old));
        let tensor = match *tensor.dims() {
            [o, i] if renamed != *name => tensor.reshape((o, i, 1, 1))?,
            _ => tensor.clone(),
        };
        old.insert(renamed, tensor);
    }
    let old = folder(&cwd.path().join("old"), &config, &safetensors::serialize(&old, None)?)?;

    let shards = folder(&cwd.path().join("shards"), &config, &bytes)?;
    fs::remove_file(shards.join("diffusion_pytorch_model.safetensors"))?;
    let mut map = serde_json::Map::new();
    for (part, file) in ["part-1.safetensors", "part-2.safetensors"].into_iter().enumerate() {
        let half: Tensors = (expected.tensors.iter().enumerate())
            .filter(|(i, _)| i % 2 == part)
            .map(|(_, (name, tensor))| (name.clone(), tensor.clone()))
            .collect();
        map.extend(half.keys().map(|name| (name.clone(), file.into())));
        fs::write(shards.join(file), safetensors::serialize(&half, None)?)?;
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    fs::write(shards.join("diffusion_pytorch_model.safetensors.index.json"), index)?;

    for path in [old, shards] {
        let found = load(&path)?;
        ensure!(found.tensors.keys().eq(expected.tensors.keys()), "{}", path.display());
        for (name, tensor) in &found.tensors {
            let values = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
            ensure!(values(tensor)? == values(&expected.tensors[name])?, "{}: {name}", path.display());
        }
    }
    Ok(())
}
