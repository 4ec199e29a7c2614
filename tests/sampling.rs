//! What `dmd-run` draws and where it goes: seeds, interpolation, arrays and raw bytes, counts beyond one part; `bench`,
//! `providers`. A module of native.rs.

use std::io::Write;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use dmd_core::noise::standard_normal;
use dmd_runtime_native::{Class, Interpolation, Provider, Request};
use serde_json::Value;
use tempfile::TempDir;
use tract_onnx::pb::tensor_proto::DataType;

use crate::models::{identity, teacher};
use crate::{bundled, command, dmd_run, images, names, refused, text};

/// Values of an npy array; its header is checked where it is written first.
fn values(bytes: &[u8]) -> Vec<f32> {
    let header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    bytes[header..].as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn drawn(dir: &TempDir, args: &[&str]) -> Result<Vec<u8>> {
    let out = dmd_run(dir.path(), args)?;
    ensure!(out.status.success(), "{args:?}: {}", text(&out.stderr));
    Ok(out.stdout)
}

#[test]
fn several_seeds_are_drawn_in_their_order() -> Result<()> {
    let dir = TempDir::new()?;
    let got = values(&drawn(&dir, &["--seed", "8..9,3", "--count", "2", "--format", "npy", "-o", "-"])?);
    let model = bundled(Provider::Engine, 1)?;
    let mut expected = Vec::new();
    for seed in [8, 9, 3] {
        expected.extend(images(&model, seed, 0, 2)?.values);
    }
    assert_eq!(got, expected);
    drawn(&dir, &["--seed", "8..10", "--count", "2", "--grid", "-o", "sheet.png"])?;
    let sheet = image::open(dir.path().join("sheet.png"))?;
    assert_eq!((sheet.width(), sheet.height()), (2 * 30 + 2, 3 * 30 + 2), "a row for each seed");
    for (seed, message) in [("3..1", "the smaller one first"), ("1;2", "expected a seed"), ("1,,2", "got ``")]
    {
        refused(dir.path(), &["--seed", seed], message)?;
    }
    Ok(())
}

#[test]
fn an_interpolation_goes_from_one_seed_to_the_other() -> Result<()> {
    let dir = TempDir::new()?;
    let args = ["--interpolate", "5..6", "--count", "5", "--class", "3", "--format", "npy", "-o", "-"];
    let frames = values(&drawn(&dir, &args)?);
    let model = bundled(Provider::Engine, 1)?;
    let one = |seed: u32| -> Result<Vec<f32>> {
        let request = Request { class: Class::One(3), ..Request::new(seed, 1) };
        Ok(model.sample(&request, &|_| {})?.values)
    };
    let (from, to) = (one(5)?, one(6)?);
    let len = from.len();
    assert_eq!((&frames[..len], &frames[4 * len..]), (&from[..], &to[..]));
    let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
    for pair in frames.chunks(len).collect::<Vec<_>>().windows(2) {
        let step = distance(pair[0], pair[1]);
        ensure!(step > 0.0 && step < distance(&from, &to), "{step}");
    }
    // the same frames when they are asked for in parts
    let interpolation = Some(Interpolation { to: 6, frames: 5 });
    let request = Request { first: 3, class: Class::One(3), interpolation, ..Request::new(5, 2) };
    assert_eq!(model.sample(&request, &|_| {})?.values, frames[3 * len..]);
    let beyond = Request { first: 4, ..request };
    ensure!(model.sample(&beyond, &|_| {}).is_err());
    for (args, message) in [
        (&["--interpolate", "5..6"][..], "got 1 image to interpolate"),
        (&["--interpolate", "5..5", "--count", "3"], "two different seeds"),
        (&["--interpolate", "5", "--count", "3"], "A..B"),
        (&["--interpolate", "5..6", "--count", "3", "--class", "all"], "expected one class"),
        (&["--interpolate", "5..6", "--count", "3", "--seed", "4"], "cannot be used with"),
    ] {
        refused(dir.path(), args, message)?;
    }
    Ok(())
}

/// The noise between the steps is one for all frames, so a teacher's frames follow each other too.
#[test]
fn frames_of_a_teacher_share_the_noise_of_its_steps() -> Result<()> {
    let dir = TempDir::new()?;
    teacher(dir.path())?;
    let args =
        ["teacher.onnx", "--sampler", "ddpm", "--steps", "4", "--class", "1", "--format", "npy", "-o", "-"];
    let frames = values(&drawn(&dir, &[&args[..], &["--interpolate", "5..6", "--count", "3"]].concat())?);
    let first = values(&drawn(&dir, &[&args[..], &["--seed", "5"]].concat())?);
    let last = values(&drawn(&dir, &[&args[..], &["--seed", "6"]].concat())?);
    assert_eq!(frames[..first.len()], first);
    assert_ne!(frames[2 * first.len()..], last, "the last frame has the noise of the first seed's steps");
    Ok(())
}

#[test]
fn raw_bytes_are_the_pixels_of_the_pictures() -> Result<()> {
    let dir = TempDir::new()?;
    let raw = drawn(&dir, &["--count", "3", "--format", "raw", "-o", "-"])?;
    drawn(&dir, &["--count", "3", "-o", "few.png"])?;
    drawn(&dir, &["--count", "3", "-o", "few.raw"])?;
    assert_eq!(std::fs::read(dir.path().join("few.raw"))?, raw);
    let mut pixels = Vec::new();
    for k in 0..3 {
        pixels.extend(image::open(dir.path().join(format!("few-000{k}.png")))?.into_luma8().into_raw());
    }
    assert_eq!(raw, pixels);
    refused(dir.path(), &["-o", "a.raw", "--grid"], "--grid")?;
    refused(dir.path(), &["--format", "jpg"], "possible values: png, npy, raw")?;
    let before = names(dir.path())?;
    refused(dir.path(), &["--count", "3", "-o", "few.png"], "`few-000")?;
    refused(dir.path(), &["--count", "4000000000", "--grid", "-o", "big.png"], "images for one sheet")?;
    assert_eq!(names(dir.path())?, before);
    Ok(())
}

#[test]
fn counts_beyond_one_part_are_the_same_images() -> Result<()> {
    let dir = TempDir::new()?;
    let count = 9000;
    std::fs::write(
        dir.path().join("plain.onnx"),
        identity(&["n", "1", "4", "4"], "y", DataType::Float, None),
    )?;
    for provider in ["engine", "tract", "cpu"] {
        let args =
            ["plain.onnx", "--count", &count.to_string(), "--provider", provider, "--force", "-o", "all.npy"];
        drawn(&dir, &args)?;
        let all = values(&std::fs::read(dir.path().join("all.npy"))?);
        assert_eq!(all.len(), count * 16);
        let mut z = vec![0.0; 16];
        for (k, x) in (0..).zip(all.chunks(16)) {
            standard_normal(0, k, &mut z);
            assert_eq!(x, z, "{provider}: image {k}");
        }
    }
    Ok(())
}

#[test]
fn bench_measures_every_case_and_whole_processes() -> Result<()> {
    let dir = TempDir::new()?;
    std::fs::write(
        dir.path().join("plain.onnx"),
        identity(&["n", "1", "4", "4"], "y", DataType::Float, None),
    )?;
    let cases = ["bench", "plain.onnx", "--provider", "tract,cpu", "--threads", "1,2", "--batch", "1,3"];
    let args = [&cases[..], &["--seconds", "0", "--starts", "1"]].concat();
    let run = |args: &[&str]| -> Result<String> {
        let out = command(dir.path(), args)?.output()?;
        ensure!(out.status.success(), "{}", text(&out.stderr));
        Ok(text(&out.stdout))
    };
    let found: Value = serde_json::from_str(&run(&[&args[..], &["--json"]].concat())?)?;
    let rows = found["rows"].as_array().context("no rows")?;
    assert_eq!(rows.len(), 2 * 2 * 2);
    for row in rows {
        let ms = |key: &str| row["ms"][key].as_f64().with_context(|| format!("no {key}: {row}"));
        ensure!(0.0 < ms("min")? && ms("min")? <= ms("median")? && ms("median")? <= ms("p95")?, "{row}");
        let rate = row["batch"].as_f64().context("no batch")? * 1e3 / ms("median")?;
        ensure!((row["images_per_second"].as_f64().context("no rate")? / rate - 1.0).abs() < 1e-9, "{row}");
    }
    let starts = found["starts"].as_array().context("no starts")?;
    assert_eq!(starts.len(), 2);
    for start in starts {
        ensure!(start["ms"]["min"].as_f64() > Some(1.0), "{start}");
        ensure!(!cfg!(target_os = "linux") || start["peak_mib"].as_f64() > Some(1.0), "{start}");
    }
    let table = run(&args)?;
    ensure!(table.contains("images/s") && table.contains("from the start of the process"), "{table}");

    let one =
        ["bench", "plain.onnx", "--on-request", "--threads", "1", "--batch", "2", "--provider", "tract"];
    let mut child = command(dir.path(), &one)?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("no stdin")?.write_all(b"\n\n\n")?;
    let out = child.wait_with_output()?;
    let times: Vec<f64> = text(&out.stdout).lines().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(times.len() == 3 && times.iter().all(|ms| *ms > 0.0), "{times:?}: {}", text(&out.stderr));
    let several = [&one[..8], &["tract,cpu"]].concat();
    let out = command(dir.path(), &several)?.output()?;
    assert_eq!(out.status.code(), Some(2));
    ensure!(text(&out.stderr).contains("expected one --provider"), "{}", text(&out.stderr));
    Ok(())
}

#[test]
fn every_provider_says_what_it_lacks_and_what_mends_it() -> Result<()> {
    let dir = TempDir::new()?;
    let list: Vec<Value> = serde_json::from_slice(&drawn(&dir, &["providers", "--json"])?)?;
    let listed: Vec<&str> = list.iter().filter_map(|status| status["provider"].as_str()).collect();
    assert_eq!(listed, Provider::ALL.map(Provider::name));
    for status in &list {
        let usable = status["usable"] == true;
        ensure!(status["compiled"] == true && usable == status["reason"].is_null(), "{status}");
        ensure!(usable || status["remedy"].as_str().is_some_and(|text| text.contains('`')), "{status}");
        ensure!(status["in_library"] != false || !usable, "{status}");
    }
    let table = text(&drawn(&dir, &["providers"])?);
    for name in listed {
        ensure!(table.lines().any(|line| line.starts_with(name)), "{name} is not in {table}");
    }
    if cfg!(target_os = "linux") {
        refused(dir.path(), &["--provider", "coreml"], "CoreML is part of macOS")?;
        refused(dir.path(), &["--provider", "directml"], "DirectML is part of Windows")?;
    }
    refused(dir.path(), &["--trt-cache", "engines", "--provider", "cpu"], "expected `tensorrt`")?;
    Ok(())
}

#[test]
fn a_report_holds_time_and_memory() -> Result<()> {
    let dir = TempDir::new()?;
    drawn(&dir, &["--count", "2", "-o", "few.npy", "--report", "report.json"])?;
    let report: Value = serde_json::from_slice(&std::fs::read(dir.path().join("report.json"))?)?;
    assert_eq!(
        (&report["provider"], &report["images"], &report["steps"]),
        (&"engine".into(), &2.into(), &1.into())
    );
    ensure!(
        report["load_ms"].as_f64() > Some(0.0) && report["ms_per_image"].as_f64() > Some(0.0),
        "{report}"
    );
    ensure!(!cfg!(target_os = "linux") || report["peak_mib"].as_f64() > Some(1.0), "{report}");
    Ok(())
}
