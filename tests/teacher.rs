//! `dmd-distill teacher` from outside: every preset from tiny data, options, resuming, and what it refuses.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use dmd_tests::{Finished, fixture, read_text, run_bin};
use image::{GrayImage, Luma, Rgb, RgbImage};
use serde_json::Value;

/// Options that make any training a matter of seconds.
const TINY: &str = "--train-steps 2 --batch 2 --save-every 1 --samples 1 --sample-steps 1";

fn teacher(cwd: &Path, line: &str) -> Result<Finished> {
    let args: Vec<&str> = std::iter::once("teacher").chain(line.split_whitespace()).collect();
    run_bin("dmd-distill", cwd, &args)
}

fn done(cwd: &Path, line: &str) -> Result<Finished> {
    let finished = teacher(cwd, line)?;
    ensure!(finished.code == Some(0), "{line}: {finished:?}");
    Ok(finished)
}

/// Exit code 2, nothing on standard output, and an error that says these things.
fn refused(cwd: &Path, line: &str, says: &[&str]) -> Result<()> {
    let finished = teacher(cwd, line)?;
    ensure!(finished.code == Some(2) && finished.stdout.is_empty(), "{line}: {finished:?}");
    for text in says {
        ensure!(finished.stderr.contains(text), "{line}: `{text}` is not in: {}", finished.stderr);
    }
    Ok(())
}

/// Two classes of grey pictures, one folder each.
fn classes(folder: &Path) -> Result<()> {
    for (class, value) in [("eight", 90), ("three", 180)] {
        fs::create_dir_all(folder.join(class))?;
        for i in 0..3u8 {
            let picture = GrayImage::from_fn(20, 24, |x, y| Luma([value + i + (x * y % 50) as u8]));
            picture.save(folder.join(class).join(format!("{i}.png")))?;
        }
    }
    Ok(())
}

/// Colour pictures without classes.
fn faces(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    for i in 0..3u8 {
        let picture = RgbImage::from_fn(40, 50, |x, y| Rgb([x as u8 * 5, y as u8 * 4, 80 * i]));
        picture.save(folder.join(format!("{i}.png")))?;
    }
    Ok(())
}

/// MNIST's four files with three images each.
fn mnist(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let header = |axes: &[u32]| {
        let sizes = axes.iter().flat_map(|size| size.to_be_bytes());
        [0, 0, 8, axes.len() as u8].into_iter().chain(sizes).collect::<Vec<u8>>()
    };
    let pixels: Vec<u8> = (0..3 * 28 * 28u32).map(|i| (i * i % 251) as u8).collect();
    for part in ["train", "t10k"] {
        let images = [header(&[3, 28, 28]), pixels.clone()].concat();
        fs::write(folder.join(format!("{part}-images-idx3-ubyte")), images)?;
        fs::write(folder.join(format!("{part}-labels-idx1-ubyte")), [header(&[3]), vec![0, 9, 4]].concat())?;
    }
    Ok(())
}

fn json(path: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&read_text(path)?)?)
}

#[test]
fn ddpm_mnist_is_trained_from_idx_files_with_statistics_that_move() -> Result<()> {
    let folder = tempfile::tempdir()?;
    mnist(&folder.path().join("mnist"))?;
    done(folder.path(), &format!("--base ddpm-mnist --data mnist --out t {TINY}"))?;
    let base = folder.path().join("t/teacher");
    let card = json(&base.join("card.json"))?;
    ensure!(card["training"]["data"] == "idx files, training images", "{card}");
    ensure!(card["training"]["data_images"] == 3 && card["classes"]["count"] == 10, "{card}");
    let weights = dmd_tests::Golden::read(&base.join("model.safetensors"))?;
    let mean = weights.f32("init_conv.conv1.1.running_mean")?;
    let variance = weights.f32("init_conv.conv1.1.running_var")?;
    ensure!(
        mean.iter().any(|v| *v != 0.0) && variance.iter().any(|v| *v != 1.0),
        "the statistics did not move"
    );
    let sampled =
        run_bin("dmd-distill", folder.path(), ["sample", "t/teacher", "--steps", "1", "--count", "2"])?;
    ensure!(sampled.code == Some(0), "{sampled:?}");
    Ok(())
}

#[test]
fn ddpm_celeba_is_trained_from_a_folder_of_pictures() -> Result<()> {
    let folder = tempfile::tempdir()?;
    faces(&folder.path().join("faces"))?;
    done(folder.path(), &format!("--base ddpm-celeba --data faces --out t {TINY}"))?;
    let card = json(&folder.path().join("t/teacher/card.json"))?;
    ensure!(card["training"]["data"] == "images of `faces`, training images", "{card}");
    ensure!(folder.path().join("t/samples/step-000002.png").is_file(), "no samples");
    Ok(())
}

#[test]
fn ddpm_cifar10_is_trained_from_its_python_version() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let data = fixture("cifar-10-batches-py");
    let line = format!("--base ddpm-cifar10 --data {} --out t {TINY} --save-every 9", data.display());
    done(folder.path(), &line.replace("--save-every 1 ", ""))?;
    let options = json(&folder.path().join("t/run.json"))?;
    ensure!(options["flip"] == true && options["clip"] == 1.0 && options["warmup"] == 5000, "{options}");
    ensure!(json(&folder.path().join("t/teacher/card.json"))?["classes"].is_null(), "it has classes");
    Ok(())
}

/// BatchNorm's statistics, the average and the mean loss come back with everything else.
#[test]
fn a_resumed_training_equals_an_uninterrupted_one() -> Result<()> {
    let folder = tempfile::tempdir()?;
    mnist(&folder.path().join("mnist"))?;
    let line = |out: &str, steps: u64| {
        format!(
            "--base ddpm-mnist --data mnist --out {out} --train-steps {steps} --batch 2 --save-every 9 --sample-every 9 \
             --samples 1 --sample-steps 1 --ema 0.9 --flip --lr-schedule constant"
        )
    };
    done(folder.path(), &line("whole", 3))?;
    done(folder.path(), &line("parts", 2))?;
    let resumed = done(folder.path(), "--resume parts --train-steps 3")?;
    ensure!(resumed.stderr.contains("continuing after step 2"), "{resumed:?}");
    for file in [
        "run.json",
        "stats.jsonl",
        "teacher/card.json",
        "teacher/model.safetensors",
        "checkpoints/state.safetensors",
    ] {
        let [whole, parts] = ["whole", "parts"].map(|run| fs::read(folder.path().join(run).join(file)));
        ensure!(whole? == parts?, "`{file}` differs");
    }
    let too_few = "got `--train-steps 2`, expected at least 3: the run in `parts` has come to step 3";
    refused(folder.path(), "--resume parts --train-steps 2", &[too_few])?;
    refused(folder.path(), "--resume parts --lr 1e-3", &["only `--train-steps`"])?;
    fs::write(folder.path().join("mnist/train-labels-idx1-ubyte"), [0, 0, 8, 1, 0, 0, 0, 3, 0, 9, 5])?;
    refused(folder.path(), "--resume parts", &["not those that the run began with", "SHA-256"])
}

#[test]
fn a_training_may_start_from_a_base() -> Result<()> {
    let folder = tempfile::tempdir()?;
    faces(&folder.path().join("faces"))?;
    done(folder.path(), &format!("--base ddpm-celeba --data faces --out a {TINY}"))?;
    let line = format!("--base ddpm-celeba --data faces --out b --init a/teacher {TINY} --lr 1e-12");
    done(folder.path(), &line)?;
    let read = |run: &str| -> Result<Vec<f32>> {
        let path = folder.path().join(run).join("teacher/model.safetensors");
        dmd_tests::Golden::read(&path)?.f32("conv1.weight")
    };
    let (a, b) = (read("a")?, read("b")?);
    ensure!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-6), "it did not start there");
    let card = json(&folder.path().join("b/teacher/card.json"))?;
    let init = &card["training"]["init"];
    let sha256 = init["sha256"].as_str().context("no SHA-256")?;
    ensure!(init["id"] == "a/teacher" && sha256.len() == 64, "{card}");
    fs::remove_dir_all(folder.path().join("a"))?;
    done(folder.path(), "--resume b --train-steps 3")?;
    let other = format!("--base ddpm-celeba --data faces --init {} {TINY}", fixture("tiny-ddpm").display());
    refused(folder.path(), &other, &["--init", "another architecture"])
}

#[test]
fn a_dry_run_resolves_preset_file_and_flags_in_this_order() -> Result<()> {
    let folder = tempfile::tempdir()?;
    mnist(&folder.path().join("mnist"))?;
    let print = |line: &str| -> Result<Value> {
        let finished = done(folder.path(), &format!("{line} --dry-run"))?;
        Ok(serde_json::from_str(&finished.stdout)?)
    };
    let fashion = print("--base ddpm-fashion")?;
    ensure!(
        fashion["train_steps"] == 20_000 && fashion["lr"] == 1e-3 && fashion["lr_schedule"] == "cosine",
        "{fashion}"
    );
    ensure!(
        fashion["data"] == "fashion-mnist" && fashion["images"] == 60_000 && fashion["ema"] == 0.999,
        "{fashion}"
    );
    let preset = print("--base ddpm-mnist --data mnist")?;
    ensure!(
        preset["train_steps"] == 1 && preset["lr_schedule"] == "linear" && preset["batch"] == 256,
        "{preset}"
    );
    fs::write(
        folder.path().join("o.toml"),
        "lr = 5e-4\nbatch = 2\nepochs = 4\ndata = \"mnist\"\nlr-schedule = \"cosine\"",
    )?;
    let both = print("--base ddpm-mnist --config o.toml --lr 1e-3")?;
    ensure!(both["lr"] == 1e-3 && both["batch"] == 2 && both["train_steps"] == 6, "{both}");
    ensure!(both["lr_schedule"] == "cosine" && both["drop_label"] == 0.1 && both["ema"] == 0.0, "{both}");
    ensure!(print("--base ddpm-mnist --config o.toml --train-steps 7")?["train_steps"] == 7, "updates win");
    ensure!(fs::read_dir(folder.path())?.count() == 2, "something was written");
    fs::write(folder.path().join("o.toml"), "epochs = 4\ntrain-steps = 3")?;
    refused(
        folder.path(),
        "--base ddpm-mnist --config o.toml --data mnist",
        &["both `train-steps` and `epochs`"],
    )?;
    fs::write(folder.path().join("o.toml"), "epocs = 4")?;
    refused(folder.path(), "--base ddpm-mnist --config o.toml --data mnist", &["o.toml", "epocs"])
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_written() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cwd = folder.path();
    mnist(&cwd.join("mnist"))?;
    faces(&cwd.join("faces"))?;
    for (options, says) in [
        ("--batch 0", "`--batch`"),
        ("--train-steps 0", "`--train-steps`"),
        ("--train-steps 2 --epochs 2", "cannot be used with"),
        ("--save-every 0", "`--save-every`"),
        ("--samples 0", "`--samples`"),
        ("--sample-steps 402", "`--sample-steps`"),
        ("--lr 1.5", "`--lr`"),
        ("--lr-schedule step", "possible values: constant, cosine, linear"),
        ("--weight-decay 1", "`--weight-decay`"),
        ("--clip nan", "`--clip`"),
        ("--ema 1", "`--ema`"),
        ("--drop-label 1.1", "`--drop-label`"),
        ("--flip=often", "--flip"),
    ] {
        refused(cwd, &format!("--base ddpm-mnist --data mnist --out t {options}"), &[says])?;
    }
    refused(cwd, "--base ddpm-celeba --data faces --drop-label 0.1", &["--drop-label", "no classes"])?;
    refused(cwd, "--base ddpm-cifar10", &["`--data` is missing", "CIFAR-10", "hint:"])?;
    refused(cwd, "--base ddpm-mnst --data mnist", &["did you mean `ddpm-mnist`"])?;
    refused(cwd, "--base ddpm-mnist --data nowhere", &["--data nowhere", "no such folder", "fashion-mnist"])?;
    refused(cwd, "--base ddpm-mnist --data faces", &["conditional on 10 classes", "sub-folder"])?;
    fs::create_dir(cwd.join("empty"))?;
    refused(cwd, "--base ddpm-mnist --data empty", &["no data set in it", "looked for"])?;
    fs::write(cwd.join("mnist/train-labels-idx1-ubyte"), [0, 0, 8, 1, 0, 0, 0, 3, 0, 10, 4])?;
    refused(cwd, "--base ddpm-mnist --data mnist", &["label 10, expected 0 to 9"])?;
    fs::write(cwd.join("faces/bad.png"), "no picture")?;
    refused(cwd, "--base ddpm-celeba --data faces", &["1 of its images", "bad.png"])?;
    ensure!(!cwd.join("t").exists() && !cwd.join("runs").exists(), "a run was begun");
    Ok(())
}

#[test]
fn sub_folders_name_the_classes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    classes(&folder.path().join("digits"))?;
    done(folder.path(), &format!("--base ddpm-fashion --data digits --out t {TINY}"))?;
    let card = json(&folder.path().join("t/teacher/card.json"))?;
    ensure!(card["classes"]["names"] == serde_json::json!(["eight", "three"]), "{card}");
    ensure!(card["classes"]["count"] == 2 && card["classes"]["none"] == 10, "{card}");
    Ok(())
}
