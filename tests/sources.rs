//! Where bases come from: a hub (a local server with its layout), PyTorch files, shards, old names; and that the three
//! reference bases go the whole way at full size.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use dmd_core::config::ModelConfig;
use dmd_distill::base;
use dmd_distill::checkpoint::{Checkpoint, Source};
use dmd_distill::network::Tensors;
use dmd_tests::{Finished, Golden, binary, fixture, run_bin, seeded};
use sha2::{Digest, Sha256};

const SCHEDULE: &str =
    r#"{"_class_name":"DDPMScheduler","num_train_timesteps":1000,"beta_start":0.0001,"beta_end":0.02}"#;
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// One file on the server.
#[derive(Clone)]
struct Served {
    bytes: Vec<u8>,
    /// SHA-256 that the server announces, if it is a large file.
    sha256: Option<String>,
    /// The first answer stops after so many bytes.
    cut: Option<usize>,
}

impl Served {
    fn small(text: &str) -> Self {
        Self { bytes: text.into(), sha256: None, cut: None }
    }

    fn large(bytes: Vec<u8>) -> Self {
        let sha256 = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        Self { bytes, sha256: Some(sha256), cut: None }
    }
}

type Files = BTreeMap<String, Served>;

/// A server with the hub's layout, and the requests that it got.
struct Hub {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    /// Serves files under `REPOSITORY/NAME`.
    fn start(files: Files) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("http://{}", listener.local_addr()?);
        let (files, asked) = (Arc::new(Mutex::new(files)), Arc::new(Mutex::new(Vec::new())));
        let log = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, log) = (files.clone(), log.clone());
                std::thread::spawn(move || while answer(&stream, &files, &log).is_ok_and(|more| more) {});
            }
        });
        Ok(Self { address, asked })
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().map(|asked| asked.clone()).unwrap_or_default()
    }
}

/// Answers one request; whether the connection goes on.
fn answer(mut stream: &TcpStream, files: &Mutex<Files>, log: &Mutex<Vec<String>>) -> Result<bool> {
    let mut lines = BufReader::new(stream).lines();
    let Some(first) = lines.next().transpose()? else { return Ok(false) };
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut start = 0;
    let mut whole = true;
    for line in lines.by_ref() {
        let line = line?.to_ascii_lowercase();
        if let Some(range) = line.strip_prefix("range: bytes=") {
            let (from, to) = range.split_once('-').context("range")?;
            (start, whole) = (from.parse()?, to.is_empty());
        }
        if line.is_empty() {
            break;
        }
    }
    log.lock().map_err(|_| anyhow::anyhow!("log"))?.push(format!("{path} from {start}"));
    let mut files = files.lock().map_err(|_| anyhow::anyhow!("files"))?;
    let missing = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
    if let Some(rest) = path.strip_prefix("/api/models/") {
        let (repository, revision) = rest.split_once("/revision/").context("revision")?;
        let names: Vec<String> = files
            .keys()
            .filter_map(|f| f.strip_prefix(&format!("{repository}/")))
            .map(str::to_owned)
            .collect();
        if revision != "main" || names.is_empty() {
            stream.write_all(missing.as_bytes())?;
            return Ok(true);
        }
        let siblings: Vec<_> = names.iter().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let body = serde_json::json!({ "siblings": siblings, "sha": COMMIT }).to_string();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        return Ok(true);
    }
    let name = path.trim_start_matches('/').replacen("/resolve/main/", "/", 1);
    let Some(file) = files.get_mut(&name) else {
        stream.write_all(missing.as_bytes())?;
        return Ok(true);
    };
    let end = if whole { file.bytes.len() } else { (start + 1).min(file.bytes.len()) };
    let part = &file.bytes[start.min(end)..end];
    let etag = file.sha256.clone().unwrap_or_else(|| format!("{:040x}", name.len()));
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {start}-{}/{}\r\n\
         Content-Length: {}\r\n\r\n",
        end.saturating_sub(1),
        file.bytes.len(),
        part.len()
    )?;
    if let (true, Some(cut)) = (whole, file.cut) {
        file.cut = None;
        stream.write_all(&part[..cut.min(part.len())])?;
        stream.shutdown(std::net::Shutdown::Both)?;
        return Ok(false);
    }
    stream.write_all(part)?;
    Ok(true)
}

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

fn refused(done: &Finished, says: &[&str]) -> Result<()> {
    ensure!(done.code == Some(2), "{done:?}");
    let missing = says.iter().find(|text| !done.stderr.contains(**text));
    ensure!(missing.is_none(), "`{}` is not in: {}", missing.unwrap_or(&""), done.stderr);
    Ok(())
}

/// A short run from a base to pictures: distil, export, sample.
fn whole_way(cwd: &Path, hub: &str, base: &str) -> Result<()> {
    let line = "--train-steps 2 --batch 2 --pairs 4 --pair-steps 2 --samples 2 --fake-updates 1 --out run";
    let arguments: Vec<&str> = ["--base", base].into_iter().chain(line.split(' ')).collect();
    let done = distill(cwd, hub, &[], &arguments)?;
    ensure!(done.code == Some(0), "{done:?}");
    let done = run_bin("dmd-export", cwd, ["model.onnx", "--from", "run"])?;
    ensure!(done.code == Some(0), "{done:?}");
    for provider in ["tract", "cpu"] {
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
    fs::write(path.join("diffusion_pytorch_model.safetensors"), weights)?;
    Ok(path.to_owned())
}

/// google/ddpm-cifar10-32 at full size, with random weights: downloaded with an interruption, distilled, exported, run.
#[test]
fn ddpm_cifar10_goes_the_whole_way_from_the_hub() -> Result<()> {
    let (config, weights) = case("ddpm-cifar10")?;
    let cut = Served { cut: Some(weights.len() / 2), ..Served::large(weights) };
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
    whole_way(cwd.path(), &hub.address, "ddpm-cifar10")?;
    let name = "/google/ddpm-cifar10-32/resolve/main/diffusion_pytorch_model.safetensors";
    let again: Vec<String> = hub.asked().into_iter().filter(|path| path.starts_with(name)).collect();
    let resumed = again.iter().any(|path| path.rsplit(' ').next().is_some_and(|from| from != "0"));
    ensure!(resumed, "the download did not go on where it stopped: {again:?}");
    let listed = distill(cwd.path(), &hub.address, &[], &["bases"])?;
    ensure!(listed.stdout.contains("in the cache, from the hub"), "{listed:?}");
    let offline = ["--base", "google/ddpm-cifar10-32", "--dry-run"];
    let done = distill(cwd.path(), "http://127.0.0.1:9", &[("HF_HUB_OFFLINE", "1")], &offline)?;
    ensure!(done.code == Some(0) && done.stderr.contains("parameters 35746307"), "{done:?}");
    Ok(())
}

/// The other two reference networks at full size, with random weights, from folders.
#[test]
fn ddpm_mnist_and_ddpm_celeba_go_the_whole_way() -> Result<()> {
    for name in ["ddpm-mnist", "ddpm-celeba"] {
        let cwd = tempfile::tempdir()?;
        let (config, weights) = case(name)?;
        folder(&cwd.path().join("base"), &config, &weights)?;
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
    let weights = "diffusion_pytorch_model.safetensors";
    for (repository, config, index, served) in [
        ("a/wrong", config.as_str(), "", &wrong),
        ("a/text", config.as_str(), text, &good),
        ("a/latent", config.as_str(), latent, &good),
        ("a/conditional", conditional, "", &good),
        ("a/good", config.as_str(), "", &good),
    ] {
        files.insert(format!("{repository}/unet/config.json"), Served::small(config));
        files.insert(format!("{repository}/scheduler/scheduler_config.json"), Served::small(SCHEDULE));
        files.insert(format!("{repository}/unet/{weights}"), served.clone());
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
    refused(&run("a/missing", &[])?, &["has no model `a/missing`", "hint:"])?;
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
