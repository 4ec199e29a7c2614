//! `dmd-run` and its library: both engines draw the same pictures, an image depends on its seed and number alone,
//! a teacher follows its sampler, outputs are what `--help` says, and every refusal leaves the disk as it was.
//! Small models with a known answer come from models.rs; pictures are those of the bundled model.

mod models;
mod sampling;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use dmd_core::compare::Tolerance;
use dmd_core::noise::{standard_normal, step_noise};
use dmd_core::sampler::Trajectory;
use dmd_core::schedule::Schedule;
use dmd_runtime_native::{
    BUNDLED, BUNDLED_NAME, Class, Generator, Images, ModelFile, Options, Provider, Request, Sampler,
};
use dmd_tests::{binary, compare, repository};
use tempfile::TempDir;
use tract_onnx::pb::tensor_proto::DataType;

use crate::models::{card_json, identity, model, node, port, schedule_json, teacher};

const LIBRARY: &str = "ORT_DYLIB_PATH";

fn options(provider: Provider, threads: usize) -> Result<Options> {
    if !provider.embedded() {
        ensure!(
            std::env::var_os(LIBRARY).is_some(),
            "{LIBRARY} names no onnxruntime library\n\nhint: run scripts/test, which installs one and sets the variable"
        );
    }
    Ok(Options { provider, threads: Some(threads), ..Options::default() })
}

fn bundled(provider: Provider, threads: usize) -> Result<Generator> {
    Ok(Generator::load(ModelFile::parse(BUNDLED_NAME, BUNDLED)?, &options(provider, threads)?)?)
}

fn images(model: &Generator, seed: u32, first: u64, count: usize) -> Result<Images> {
    Ok(model.sample(&Request { first, ..Request::new(seed, count) }, &|_| {})?)
}

fn levels_apart(a: &Images, b: &Images) -> u8 {
    let bytes = |s: &Images| s.pixels().into_iter().flat_map(|i| i.data).collect::<Vec<u8>>();
    let (a, b) = (bytes(a), bytes(b));
    assert_eq!(a.len(), b.len());
    a.iter().zip(&b).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0)
}

#[test]
fn all_engines_draw_the_same_pictures() -> Result<()> {
    let engines = [Provider::Engine, Provider::Tract, Provider::Cpu];
    let engines = engines.map(|provider| bundled(provider, 2)).into_iter().collect::<Result<Vec<_>>>()?;
    for seed in 0..64 {
        let drawn = engines.iter().map(|engine| images(engine, seed, u64::from(seed), 1));
        let drawn = drawn.collect::<Result<Vec<_>>>()?;
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            let apart = levels_apart(&drawn[a], &drawn[b]);
            assert!(apart <= 1, "seed {seed}: {apart} levels apart");
        }
        let a = &drawn[0];
        let range = |s: &Images| s.values.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
        assert!(range(a) > -0.9, "seed {seed}: the picture is black");
    }
    Ok(())
}

#[test]
fn an_image_depends_on_its_seed_and_number_alone() -> Result<()> {
    for provider in [Provider::Engine, Provider::Tract, Provider::Cpu] {
        let all = images(&bundled(provider, 1)?, 7, 0, 70)?;
        let model = bundled(provider, 3)?;
        let tail = images(&model, 7, 66, 4)?;
        let one = images(&model, 7, 66, 1)?;
        let len = one.values.len();
        let part = |from: usize, n: usize| Images {
            values: all.values[from * len..(from + n) * len].to_vec(),
            ..all.clone()
        };
        assert_eq!(levels_apart(&part(66, 4), &tail), 0, "{provider}: count and threads");
        assert_eq!(levels_apart(&part(66, 1), &one), 0, "{provider}: batch");
        assert!(levels_apart(&part(0, 1), &part(10, 1)) > 1, "{provider}: two images of a class are one");
    }
    Ok(())
}

#[test]
fn threads_share_a_generator() -> Result<()> {
    for provider in [Provider::Engine, Provider::Tract, Provider::Cpu] {
        let model = bundled(provider, 1)?;
        let draw = |seed| model.generate(seed, 3, Class::Cycle).map(|images| images.values);
        let alone = [draw(1)?, draw(2)?];
        let shared = std::thread::scope(|scope| {
            let threads = [1, 2, 1, 2].map(|seed| scope.spawn(move || draw(seed)));
            threads.map(|thread| thread.join().expect("a thread panicked"))
        });
        for (k, images) in shared.into_iter().enumerate() {
            assert!(images? == alone[k % 2], "{provider}: thread {k} drew other images");
        }
    }
    Ok(())
}

/// A teacher with a known answer: `eps_pred = 0.5·x_t + t/1000 + class/100`, followed along the trajectory here.
#[test]
fn a_teacher_follows_the_sampler() -> Result<()> {
    let dir = TempDir::new()?;
    let path = teacher(dir.path())?;
    let schedule = Schedule::new(&serde_json::from_value(schedule_json())?);
    for provider in [Provider::Engine, Provider::Tract, Provider::Cpu] {
        let model = Generator::open(&path, &options(provider, 1)?)?;
        for (steps, class, sampler) in [
            (1, Class::Cycle, Sampler::Ddim),
            (3, Class::One(1), Sampler::Heun),
            (5, Class::One(2), Sampler::Ddpm),
            (1000, Class::Cycle, Sampler::Ddim),
        ] {
            let request = Request { first: 1, class, steps: Some(steps), sampler, ..Request::new(5, 2) };
            let path = Trajectory::new(&schedule, sampler, steps, [-1.0, 1.0])?;
            let done = AtomicUsize::new(0);
            let got = model.sample(&request, &|n| {
                done.fetch_add(n, Ordering::Relaxed);
            })?;
            assert_eq!(done.into_inner(), 2 * path.evaluations());
            let mut expected = vec![0.0; 2 * 8];
            for (k, x) in (1u64..).zip(expected.chunks_mut(8)) {
                let class = if let Class::One(c) = class { c as f32 } else { (k % 3) as f32 };
                standard_normal(5, k, x);
                let predict = |t: usize, x: &[f32]| {
                    let shift = t as f32 / 1000.0 + class / 100.0;
                    Ok::<_, Infallible>(x.iter().map(|x| 0.5 * x + shift).collect())
                };
                path.run(x, predict, |step, out| step_noise(5, k, step, out))?;
            }
            compare(
                &format!("{provider}, {steps} {sampler} steps"),
                &got.values,
                &expected,
                Tolerance::MODEL,
            )?;
        }
        let samples = model.sample(&Request::new(5, 1), &|_| {})?;
        assert_eq!(samples.count(), 1);
    }
    Ok(())
}

/// The bundled base: guidance 1 is no guidance, 0 the images without class, and the class shows more the stronger it is.
#[test]
fn guidance_mixes_the_predictions_with_and_without_class() -> Result<()> {
    let dir = TempDir::new()?;
    let path = dir.path().join("base.onnx");
    let export = Command::new(binary("dmd-export")?)
        .args([path.as_os_str(), "--teacher".as_ref(), "--from".as_ref()])
        .arg(repository().join("assets/ddpm-fashion"))
        .output()?;
    ensure!(export.status.success(), "{}", text(&export.stderr));
    let model = Generator::open(&path, &options(Provider::Tract, 2)?)?;
    let draw = |class: usize, guidance: f64| -> Result<Vec<f32>> {
        let class = Class::One(class);
        let request = Request { class, steps: Some(8), guidance, ..Request::new(3, 2) };
        Ok(model.sample(&request, &|_| {})?.values)
    };
    let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
    let (trousers, boots) = (1, 9);
    compare("guidance 0", &draw(trousers, 0.0)?, &draw(boots, 0.0)?, Tolerance::EXACT)?;
    let apart =
        |guidance| -> Result<f32> { Ok(distance(&draw(trousers, guidance)?, &draw(boots, guidance)?)) };
    let (plain, guided) = (apart(1.0)?, apart(3.0)?);
    ensure!(plain > 1.0 && guided > plain, "without guidance {plain} apart, with it {guided}");
    refused(dir.path(), &["--guidance", "2"], "takes one step")?;
    refused(dir.path(), &["base.onnx", "--guidance", "NaN"], "got guidance NaN")?;
    refused(dir.path(), &["base.onnx", "--sampler", "euler"], "euler")
}

#[test]
fn every_output_is_what_the_help_says() -> Result<()> {
    let dir = TempDir::new()?;
    let at = |name: &str| dir.path().join(name);
    let png = |name: &str| -> Result<(u32, u32)> { Ok(image::open(at(name))?.into_luma8().dimensions()) };
    let done = |args: &[&str]| -> Result<Output> {
        let out = dmd_run(dir.path(), args)?;
        ensure!(out.status.success(), "{args:?}: {}", text(&out.stderr));
        Ok(out)
    };
    done(&[])?;
    assert_eq!(png("samples.png")?, (28, 28));
    done(&["--count", "3", "-o", "few.png"])?;
    assert_eq!(
        names(dir.path())?,
        ["few-0000.png", "few-0001.png", "few-0002.png", "samples.png"].map(String::from).into()
    );
    assert_eq!(image::open(at("few-0000.png"))?, image::open(at("samples.png"))?);
    done(&["--count", "5", "--grid", "-o", "sheet.png"])?;
    assert_eq!(png("sheet.png")?, (3 * 30 + 2, 2 * 30 + 2));
    done(&["--count", "2", "--class", "all", "-o", "classes.png"])?;
    assert_eq!(png("classes.png")?, (10 * 30 + 2, 2 * 30 + 2));
    let piped = done(&["--count", "5", "-o", "-"])?.stdout;
    assert_eq!(piped, std::fs::read(at("sheet.png"))?);
    let named = done(&["--class", "ANKLE BOOT", "-o", "-"])?.stdout;
    assert_eq!(named, done(&["--class", "9", "-o", "-"])?.stdout);
    assert_ne!(named, std::fs::read(at("samples.png"))?);

    done(&["--count", "2", "--seed", "4", "-o", "array.npy"])?;
    let bytes = std::fs::read(at("array.npy"))?;
    let header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    assert_eq!((&bytes[..8], header % 64), (&b"\x93NUMPY\x01\x00"[..], 0));
    assert!(text(&bytes[10..header]).contains("'<f4', 'fortran_order': False, 'shape': (2, 1, 28, 28)"));
    let values: Vec<f32> = bytes[header..].as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    assert_eq!(values, images(&bundled(Provider::Engine, 1)?, 4, 0, 2)?.values);

    let before = std::fs::read(at("samples.png"))?;
    done(&["--seed", "1", "--force"])?;
    assert_ne!(std::fs::read(at("samples.png"))?, before);
    Ok(())
}

#[test]
fn a_request_that_cannot_be_met_is_refused_and_writes_nothing() -> Result<()> {
    let dir = TempDir::new()?;
    let file = |name: &str, bytes: &[u8]| -> Result<()> { Ok(std::fs::write(dir.path().join(name), bytes)?) };
    teacher(dir.path())?;
    file("old.png", b"mine")?;
    file("plain.onnx", &identity(&["n", "1", "4", "4"], "y", DataType::Float, None))?;
    let cases: &[(&[&str], &str)] = &[
        (&["--steps", "4"], "one-step generator"),
        (&["--steps", "0"], "got 0 steps"),
        (&["teacher.onnx", "--steps", "0"], "expected 1 to 1000"),
        (&["teacher.onnx", "--steps", "1001"], "expected 1 to 1000"),
        (&["--class", "Anorak"], "or a name: T-shirt/top"),
        (&["--class", "10"], "expected 0 to 9"),
        (&["plain.onnx", "--class", "0"], "has no classes"),
        (&["--count", "0"], "0 is not in 1..="),
        (&["--seed", "4294967296"], "4294967296"),
        (&["-o", "old.png"], "--force"),
        (&["-o", "picture.jpg"], "expected a name ending in .png, .npy or .raw"),
        (&["-o", "array.npy", "--grid"], "--grid"),
        (&["-o", "missing/new.png"], "`missing/new.png`: `missing` is not a directory"),
        (&["-o", "old.png/new.png"], "`old.png/new.png`: `old.png` is not a directory"),
        (&["-o", "new.png", "--report", "old.png"], "`old.png` exists already"),
        (
            &["-o", "new.npy", "--report", "new.npy"],
            "`new.npy` for the report too, expected a file of its own",
        ),
        (&["plain.onnx", "-o", "new.npy", "--report", "plain.onnx", "--force"], "a file of its own"),
        (&["--provider", "rocm"], "rocm"),
        (&["--ort-lib", "old.png", "--provider", "tract"], "uses none"),
    ];
    let before = names(dir.path())?;
    for (args, message) in cases {
        refused(dir.path(), args, message)?;
    }
    if cfg!(target_os = "linux") {
        refused(dir.path(), &["-o", "/proc/new.png"], "cannot write `/proc/new.png`")?;
    }
    assert_eq!(names(dir.path())?, before);
    assert_eq!(std::fs::read(dir.path().join("old.png"))?, b"mine");
    Ok(())
}

#[test]
fn a_file_that_is_no_model_is_refused_by_name() -> Result<()> {
    let dir = TempDir::new()?;
    let card = |height| card_json("generator", height).to_string();
    let generator = |dims: &[&str], dtype, height| identity(dims, "x_gen", dtype, Some(card(height)));
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("empty.onnx", Vec::new(), "the file is empty"),
        ("text.onnx", b"# not a model\n".to_vec(), "not an ONNX model"),
        ("cut.onnx", BUNDLED[..BUNDLED.len() / 2].to_vec(), "cut off"),
        ("tail.onnx", BUNDLED[..BUNDLED.len() - 1].to_vec(), "cut off"),
        ("rank.onnx", identity(&["n", "16"], "y", DataType::Float, None), "expected one f32 [n, c, h, w]"),
        (
            "f64.onnx",
            generator(&["n", "1", "4", "4"], DataType::Double, 4),
            "got input `z` double [n, 1, 4, 4], expected f32",
        ),
        ("card.onnx", generator(&["n", "1", "4", "4"], DataType::Float, 8), "from the model card"),
        ("free.onnx", generator(&["n", "1", "h", "4"], DataType::Float, 4), "expected a fixed number"),
        ("zero.onnx", generator(&["n", "1", "0", "4"], DataType::Float, 4), "dimension of 0"),
        ("lost.onnx", identity(&["n", "1", "4", "4"], "", DataType::Float, None), "nothing computes"),
        (
            "version.onnx",
            identity(
                &["n", "1", "4", "4"],
                "y",
                DataType::Float,
                Some(card(4).replace("\"card_version\":1", "\"card_version\":2")),
            ),
            "expected 1",
        ),
    ];
    for (name, bytes, message) in cases {
        std::fs::write(dir.path().join(name), bytes)?;
        refused(dir.path(), &[name], message).with_context(|| (*name).to_owned())?;
        refused(dir.path(), &["info", name], message).with_context(|| (*name).to_owned())?;
    }
    refused(dir.path(), &["absent.onnx"], "cannot read `absent.onnx`")?;
    assert_eq!(names(dir.path())?, cases.iter().map(|(name, ..)| (*name).to_owned()).collect());
    Ok(())
}

#[test]
fn a_file_without_a_card_runs_with_a_warning() -> Result<()> {
    let dir = TempDir::new()?;
    let providers = ["engine", "tract", "cpu"];
    for (batch, provider) in ["n", "2"].into_iter().flat_map(|batch| providers.map(|p| (batch, p))) {
        let bytes = identity(&[batch, "3", "4", "6"], "y", DataType::Float, None);
        std::fs::write(dir.path().join("model.onnx"), bytes)?;
        let args = ["--seed", "3", "--count", "3", "--provider", provider, "--force", "-o", "z.npy"];
        let out = dmd_run(dir.path(), &args)?;
        assert!(out.status.success(), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains("no model card"), "{}", text(&out.stderr));
        let bytes = std::fs::read(dir.path().join("z.npy"))?;
        let mut z = vec![0.0; 3 * 3 * 4 * 6];
        for (k, z) in (0..).zip(z.chunks_mut(3 * 4 * 6)) {
            standard_normal(3, k, z);
        }
        let expected: Vec<u8> = z.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(bytes[bytes.len() - expected.len()..], expected, "{provider}, batch {batch}");
    }
    Ok(())
}

/// An operator that `dmd-export` does not write.
#[test]
fn auto_takes_another_engine_for_a_foreign_file() -> Result<()> {
    let dir = TempDir::new()?;
    let dims = ["n", "1", "4", "4"];
    let ports = (port("z", &dims, DataType::Float), port("y", &dims, DataType::Float));
    let bytes = model((vec![ports.0], vec![ports.1]), vec![node("Abs", &["z"], "y")], vec![], None);
    std::fs::write(dir.path().join("model.onnx"), bytes)?;
    std::fs::write(dir.path().join("wrong.so"), b"not a library")?;
    let hint = "this operator is not one that `dmd-export` writes";
    refused(dir.path(), &["--provider", "engine", "-o", "-"], hint)?;
    options(Provider::Cpu, 1)?;
    for (library, provider) in [(None, "on cpu"), (Some("wrong.so"), "on tract")] {
        let mut command = command(dir.path(), &["-o", "-"])?;
        library.map(|library| command.env(LIBRARY, library));
        let out = command.output()?;
        let stderr = text(&out.stderr);
        ensure!(out.status.success() && stderr.contains(provider) && stderr.contains(hint), "{stderr}");
    }
    Ok(())
}

#[test]
fn a_named_provider_is_had_or_refused_with_its_reason() -> Result<()> {
    let dir = TempDir::new()?;
    std::fs::write(dir.path().join("wrong.so"), b"not a library")?;
    for (library, message) in [("absent.so", "`absent.so` is not a file"), ("wrong.so", "cannot be loaded")] {
        let run = |args: &[&str]| -> Result<Output> {
            Ok(command(dir.path(), args)?.env(LIBRARY, library).output()?)
        };
        for args in [&["--provider", "cpu"][..], &["--ort-lib", library]] {
            let out = run(args)?;
            assert_eq!((out.status.code(), out.stdout.len()), (Some(2), 0));
            let stderr = text(&out.stderr);
            assert!(stderr.contains(message) && stderr.contains("hint: "), "{stderr}");
        }
        let out = run(&["-o", "-"])?;
        assert!(out.status.success(), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains("on engine"), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains(message), "{}", text(&out.stderr));
    }
    assert_eq!(names(dir.path())?, ["wrong.so".to_owned()].into());

    options(Provider::Cpu, 1)?;
    let list: serde_json::Value =
        serde_json::from_slice(&dmd_run(dir.path(), &["providers", "--json"])?.stdout)?;
    for status in list.as_array().context("`providers --json` is no list")? {
        let name = status["provider"].as_str().context("a provider without a name")?;
        let out = dmd_run(dir.path(), &["--provider", name, "-o", "-"])?;
        assert_eq!(out.status.success(), status["usable"] == true, "{name}: {}", text(&out.stderr));
        if let Some(reason) = status["reason"].as_str() {
            assert_eq!(out.status.code(), Some(2));
            assert!(text(&out.stderr).contains(reason), "{name}: {}", text(&out.stderr));
        }
    }
    assert_eq!([0, 1, 2].map(|i| list[i]["usable"] == true), [true; 3], "engine, tract and cpu: {list}");
    Ok(())
}

#[test]
fn info_tells_what_the_card_says() -> Result<()> {
    let dir = TempDir::new()?;
    let info: serde_json::Value = serde_json::from_slice(&dmd_run(dir.path(), &["info", "--json"])?.stdout)?;
    assert_eq!(info["kind"], "generator");
    assert_eq!(info["bytes"], BUNDLED.len());
    assert_eq!(info["inputs"][0]["name"], "z");
    assert_eq!(info["inputs"][0]["shape"], serde_json::json!(["n", 1, 28, 28]));
    assert_eq!(info["batch"], serde_json::Value::Null);
    assert_eq!(info["parameters"], info["card"]["parameters"]);
    assert_eq!(info["stored"]["f32"]["values"], info["parameters"]);
    let plain = dmd_run(dir.path(), &["info"])?;
    let macs = format!("MACs         {} per image", info["card"]["macs"]);
    for row in ["one-step generator", "batch        any", &macs] {
        assert!(text(&plain.stdout).contains(row), "`{row}` is not in {}", text(&plain.stdout));
    }
    Ok(())
}

fn command(cwd: &Path, args: &[&str]) -> Result<Command> {
    let mut command = Command::new(binary("dmd-run")?);
    command.args(args).current_dir(cwd).stdin(Stdio::null());
    Ok(command)
}

fn dmd_run(cwd: &Path, args: &[&str]) -> Result<Output> {
    let plain = !args.contains(&"--provider") && !args.contains(&"info") && !args.contains(&"providers");
    let engine: &[&str] = if plain { &["--provider", "engine"] } else { &[] };
    Ok(command(cwd, &[args, engine].concat())?.output()?)
}

fn refused(cwd: &Path, args: &[&str], message: &str) -> Result<()> {
    let out = dmd_run(cwd, args)?;
    let stderr = text(&out.stderr);
    ensure!(out.status.code() == Some(2), "{args:?}: exit {:?}, expected 2: {stderr}", out.status.code());
    ensure!(out.stdout.is_empty(), "{args:?}: it wrote to stdout");
    ensure!(
        stderr.contains("error: ") && stderr.contains(message),
        "{args:?}: got {stderr}expected {message}"
    );
    Ok(())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn names(dir: &Path) -> Result<BTreeSet<String>> {
    std::fs::read_dir(dir)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect()
}
