//! `dmd-distill` from outside: a whole small run, resuming, and everything it refuses.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use dmd_tests::{Finished, fixture, read_text, refused, run_bin};
use serde_json::Value;

fn distill(cwd: &Path, args: &[&str]) -> Result<Finished> {
    run_bin("dmd-distill", cwd, args)
}

/// A distillation of the class-conditional fixture that takes a second.
fn small<'a>(base: &'a str, out: &'a str, steps: &'a str) -> Vec<&'a str> {
    let line = "--batch 4 --pairs 8 --pair-steps 2 --fake-updates 2 --save-every 2 --sample-every 2 --warmup 2 \
                --pairs-dir pairs";
    let mut args = vec!["--base", base, "--out", out, "--train-steps", steps];
    args.extend(line.split_whitespace());
    args
}

fn fixture_path(name: &str) -> Result<String> {
    Ok(fixture(name).to_str().context("the path is not UTF-8")?.to_owned())
}

#[test]
fn a_run_leaves_a_generator_and_pictures() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-class")?;
    let mut args = small(&base, "run", "4");
    args.extend(["--reg-until", "0.5", "--clamp", "--dm-draws", "2"]);
    let done = distill(folder.path(), &args)?;
    ensure!(done.code == Some(0), "{done:?}");
    let run = folder.path().join("run");
    for file in [
        "run.json",
        "stats.jsonl",
        "losses.png",
        "comparison.png",
        "samples/step-000000.png",
        "samples/step-000004.png",
        "checkpoints/state.safetensors",
        "generator/config.json",
        "generator/generator.json",
        "generator/model.safetensors",
        "teacher/model.safetensors",
    ] {
        ensure!(run.join(file).is_file(), "no `{file}`");
    }
    let stats: Vec<Value> = read_text(&run.join("stats.jsonl"))?
        .lines()
        .map(serde_json::from_str)
        .collect::<std::result::Result<_, _>>()?;
    ensure!(stats.len() == 4, "{} lines", stats.len());
    let first = &stats[0];
    ensure!(first["dm"].as_f64() == Some(0.0), "critic and teacher start equal: {first}");
    let regresses: Vec<bool> = stats.iter().map(|s| s["reg"].as_f64().is_some_and(|v| v > 0.0)).collect();
    ensure!(regresses == [true, true, false, false], "{regresses:?}");
    ensure!(stats.iter().all(|s| s["fake"].as_f64().is_some_and(|v| v > 0.0)), "{stats:?}");
    let generator: Value = serde_json::from_str(&read_text(&run.join("generator/generator.json"))?)?;
    ensure!(generator["t_gen"] == 440, "{generator}");
    let sampled = distill(folder.path(), &["sample", "run", "--count", "10", "-o", "grid.png"])?;
    ensure!(sampled.code == Some(0) && folder.path().join("grid.png").is_file(), "{sampled:?}");
    Ok(())
}

#[test]
fn bases_are_listed_with_their_size() -> Result<()> {
    let listed = distill(Path::new("."), &["bases", "--json"])?;
    ensure!(listed.code == Some(0), "{listed:?}");
    let bases: Value = serde_json::from_str(&listed.stdout)?;
    let expected = [
        ("ddpm-fashion", 687_473, Some(10)),
        ("ddpm-mnist", 6_585_601, Some(10)),
        ("ddpm-celeba", 426_691, None),
        ("ddpm-cifar10", 35_746_307, None),
    ];
    ensure!(bases.as_array().is_some_and(|all| all.len() == expected.len()), "{bases}");
    for (base, (name, parameters, classes)) in bases.as_array().into_iter().flatten().zip(expected) {
        ensure!(base["name"] == name && base["parameters"] == parameters, "{base}");
        ensure!(base["classes"].as_u64() == classes, "{base}");
    }
    Ok(())
}

#[test]
fn a_dry_run_prints_options_and_cost_and_writes_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-class")?;
    let done = distill(folder.path(), &["--base", &base, "--dry-run", "--t-gen", "last"])?;
    ensure!(done.code == Some(0), "{done:?}");
    let options: Value = serde_json::from_str(&done.stdout)?;
    ensure!(options["t_gen"] == 999 && options["fake_updates"] == 5, "{options}");
    ensure!(done.stderr.contains("parameters 52337"), "{}", done.stderr);
    ensure!(fs::read_dir(folder.path())?.next().is_none(), "something was written");
    Ok(())
}

#[test]
fn flags_win_over_the_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-class")?;
    fs::write(folder.path().join("recipe.toml"), "batch = 7\nlr = 1e-3\n")?;
    let args = ["--base", &base, "--config", "recipe.toml", "--lr", "0.01", "--dry-run"];
    let options: Value = serde_json::from_str(&distill(folder.path(), &args)?.stdout)?;
    ensure!(options["batch"] == 7 && options["lr"] == 0.01, "{options}");
    for t_gen in ["399", "\"399\""] {
        fs::write(folder.path().join("recipe.toml"), format!("t-gen = {t_gen}\n"))?;
        let options: Value = serde_json::from_str(&distill(folder.path(), &args)?.stdout)?;
        ensure!(options["t_gen"] == 399, "{options}");
    }
    fs::write(folder.path().join("recipe.toml"), "t-gen = 3.5\n")?;
    refused(&distill(folder.path(), &args)?, &["recipe.toml", "a step, `last` or `auto`"])?;
    fs::write(folder.path().join("recipe.toml"), "bacth = 7\n")?;
    refused(&distill(folder.path(), &args)?, &["recipe.toml", "bacth"])
}

#[test]
fn an_unknown_base_gets_a_suggestion() -> Result<()> {
    let folder = tempfile::tempdir()?;
    refused(
        &distill(folder.path(), &["--base", "ddpm-fashon"])?,
        &["ddpm-fashon", "did you mean `ddpm-fashion`"],
    )?;
    refused(&distill(folder.path(), &["--base", "./nowhere"])?, &["nowhere", "no such folder"])
}

#[test]
fn an_existing_output_is_left_alone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-class")?;
    fs::create_dir(folder.path().join("run"))?;
    fs::write(folder.path().join("run/mine"), "mine")?;
    refused(&distill(folder.path(), &small(&base, "run", "1"))?, &["run", "exists already", "--resume"])?;
    let left: Vec<_> = fs::read_dir(folder.path().join("run"))?.collect::<std::io::Result<_>>()?;
    ensure!(left.len() == 1, "{left:?}");
    fs::write(folder.path().join("grid.png"), "mine")?;
    refused(&distill(folder.path(), &["sample", &base])?, &["grid.png", "exists already", "--force"])?;
    ensure!(read_text(&folder.path().join("grid.png"))? == "mine", "overwritten");
    Ok(())
}

/// A copy of the class-conditional fixture in which one file is changed.
fn damaged(folder: &Path, file: &str, change: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>) -> Result<String> {
    let base = folder.join("base");
    fs::create_dir(&base)?;
    for entry in fs::read_dir(fixture("tiny-class"))? {
        let path = entry?.path();
        fs::copy(&path, base.join(path.file_name().context("no name")?))?;
    }
    let path = base.join(file);
    match change(fs::read(&path).unwrap_or_default()) {
        Some(bytes) => fs::write(&path, bytes)?,
        None => fs::remove_file(&path)?,
    }
    Ok(base.to_str().context("the path is not UTF-8")?.to_owned())
}

const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

#[test]
fn images_that_are_not_finite_are_not_drawn() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = damaged(folder.path(), WEIGHTS, |mut bytes| {
        let header = bytes.first_chunk().map_or(0, |length| 8 + u64::from_le_bytes(*length) as usize);
        bytes[header..].as_chunks_mut().0.fill(1e30f32.to_le_bytes());
        Some(bytes)
    })?;
    let done = distill(folder.path(), &["sample", &base, "--count", "2", "--steps", "2", "-o", "x.png"])?;
    refused(&done, &["image 0 of seed 0 came out as NaN, expected numbers"])?;
    ensure!(!folder.path().join("x.png").exists(), "drawn nevertheless");
    Ok(())
}

#[test]
fn a_damaged_base_is_refused_by_file_and_tensor() -> Result<()> {
    let replace = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| Some(String::from_utf8_lossy(&bytes).replace(from, to).into_bytes())
    };
    let card = |classes: &'static str| {
        move |_: Vec<u8>| Some(format!(r#"{{"name":"x","classes":{classes}}}"#).into_bytes())
    };
    type Change = Box<dyn FnOnce(Vec<u8>) -> Option<Vec<u8>>>;
    let cases: Vec<(&str, Change, Vec<&str>)> = vec![
        ("config.json", Box::new(|_| None), vec!["there is no `config.json`", "hint:"]),
        (WEIGHTS, Box::new(|_| None), vec!["there are no weights", "`model.safetensors`"]),
        (
            WEIGHTS,
            Box::new(|b| Some(b[..b.len() / 2].to_vec())),
            vec![WEIGHTS, "not a complete safetensors file"],
        ),
        (WEIGHTS, Box::new(|_| Some(vec![])), vec![WEIGHTS, "not a complete safetensors file"]),
        (
            WEIGHTS,
            Box::new(|mut b| {
                let end = b.len();
                b[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
                Some(b)
            }),
            vec![WEIGHTS, "not finite"],
        ),
        (
            "config.json",
            Box::new(replace("\"num_class_embeds\": 11", "\"num_class_embeds\": 12")),
            vec![WEIGHTS, "`class_embedding.weight`", "[11, 32]", "[12, 32]", "config.json"],
        ),
        (
            "config.json",
            Box::new(replace("\"sample_size\": 12", "\"sample_size\": 13")),
            vec!["`sample_size`", "13", "multiple of 4"],
        ),
        ("config.json", Box::new(replace("\"silu\"", "\"tanh\"")), vec!["`act_fn`", "tanh"]),
        ("config.json", Box::new(|_| Some(b"{".to_vec())), vec!["config.json"]),
        ("card.json", Box::new(card(r#"{"count":0}"#)), vec!["card.json", "0 classes", "11"]),
        ("card.json", Box::new(card(r#"{"count":10,"none":11}"#)), vec!["card.json", "Some(11)", "11"]),
        ("card.json", Box::new(card(r#"{"count":2,"names":["a"]}"#)), vec!["card.json", "1 class names"]),
    ];
    for (file, change, says) in cases {
        let folder = tempfile::tempdir()?;
        let base = damaged(folder.path(), file, change)?;
        let done = distill(folder.path(), &small(&base, "run", "1"))?;
        refused(&done, &says).with_context(|| format!("{file}, {says:?}"))?;
        ensure!(!folder.path().join("run").exists(), "a run was begun for {says:?}");
    }
    Ok(())
}

/// By regression alone first, with the critic still the base; then with a critic that learns.
#[test]
fn regression_alone_comes_first() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-class")?;
    let mut args = small(&base, "run", "3");
    args.extend(["--reg-steps", "2", "--reg-until", "0", "--lr-reg", "1e-3"]);
    let done = distill(folder.path(), &args)?;
    ensure!(done.code == Some(0), "{done:?}");
    let stats: Vec<Value> = read_text(&folder.path().join("run/stats.jsonl"))?
        .lines()
        .map(serde_json::from_str)
        .collect::<std::result::Result<_, _>>()?;
    let above_zero = |name: &str| -> Vec<bool> {
        stats.iter().map(|line| line[name].as_f64().is_some_and(|value| value > 0.0)).collect()
    };
    ensure!(above_zero("reg") == [true, true, false, false, false], "{stats:?}");
    ensure!(above_zero("fake") == [false, false, true, true, true], "{stats:?}");
    // In the first update that matches distributions the critic is the base, so that there is nothing to match yet.
    ensure!(above_zero("dm") == [false, false, false, true, true], "{stats:?}");
    Ok(())
}

#[test]
fn options_that_make_no_sense_are_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-class")?;
    let cases: [(&[&str], &str); 15] = [
        (&["--batch", "0"], "--batch"),
        (&["--reg-until", "1.5"], "--reg-until"),
        (&["--reg-until", "0.5", "--dm-weight", "0"], "nothing would be left"),
        (&["--reg-steps", "5", "--dm-weight", "0"], "--reg-steps"),
        (&["--lr-reg", "1"], "learning rates"),
        (&["--dm-draws", "0"], "--dm-draws"),
        (&["--lr", "0"], "learning rates"),
        (&["--ema", "1"], "--ema"),
        (&["--t-gen", "1000"], "--t-gen"),
        (&["--pairs", "0"], "--lambda-reg 0"),
        (&["--pair-steps", "1001"], "--pair-steps"),
        (&["--fake-updates", "0"], "--fake-updates"),
        (&["--device", "cuda"], "--features cuda"),
        (&["--device", "tpu"], "--device tpu"),
        (&["--reg", "l1"], "lpips:DIR"),
    ];
    for (args, says) in cases {
        let all = [&["--base", &base, "--out", "run"], args].concat();
        refused(&distill(folder.path(), &all)?, &[says]).with_context(|| format!("{args:?}"))?;
    }
    ensure!(!folder.path().join("run").exists(), "a run was begun");
    refused(&distill(folder.path(), &["--resume", "nowhere"])?, &["run.json", "--resume"])?;
    refused(&distill(folder.path(), &["--resume", "x", "--lr", "1e-3"])?, &["only `--train-steps`"])
}

/// A base with fewer steps than pictures and pairs have by default.
#[test]
fn a_base_of_few_steps_goes_the_whole_way() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = damaged(folder.path(), "scheduler_config.json", |_| {
        Some(br#"{"_class_name":"DDPMScheduler","num_train_timesteps":8}"#.to_vec())
    })?;
    let args = "--batch 2 --pairs 2 --train-steps 1 --fake-updates 1 --samples 2 --out run";
    let args: Vec<&str> = ["--base", &base].into_iter().chain(args.split(' ')).collect();
    let done = distill(folder.path(), &args)?;
    ensure!(done.code == Some(0) && folder.path().join("run/comparison.png").is_file(), "{done:?}");
    let options: Value = serde_json::from_str(&read_text(&folder.path().join("run/run.json"))?)?;
    ensure!(options["pair_steps"] == 8, "{options}");
    let done = distill(folder.path(), &["sample", &base, "--count", "1"])?;
    ensure!(done.code == Some(0), "{done:?}");
    Ok(())
}

#[test]
fn what_a_run_cannot_use_is_refused_before_its_folder_is_made() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-class")?;
    let pairs = |steps: &str, out: &str| {
        distill(folder.path(), &["pairs", "--base", &base, "--count", "8", "--steps", steps, "--out", out])
    };
    for (steps, out) in [("3", "other"), ("2", "pairs")] {
        let done = pairs(steps, out)?;
        ensure!(done.code == Some(0), "{done:?}");
    }
    let args = small(&base, "run", "1");
    let wrong = [&args[..args.len() - 1], &["other"]].concat();
    refused(
        &distill(folder.path(), &wrong)?,
        &["pairs.json", "another base, sampler or seed", "--pairs-dir"],
    )?;
    let images = [&args[..], &["--gan-weight", "0.1", "--data", "nowhere"]].concat();
    refused(&distill(folder.path(), &images)?, &["nowhere"])?;
    let with = |distance: &str| distill(folder.path(), &[&args[..], &["--reg", distance]].concat());
    refused(&with("lpips:nowhere")?, &["nowhere"])?;
    refused(&with("lpips:pairs")?, &["there is no tensor `features.0.weight`", "vgg16-397923af.pth"])?;
    refused(&with("classifier")?, &["[1, 28, 28]", "dmd-distill classifier"])?;
    refused(&with("classifier:pairs")?, &["config.json"])?;
    ensure!(!folder.path().join("run").exists(), "a run was begun");
    let shard = folder.path().join("pairs/shard-00000.safetensors");
    let before = (fs::read(&shard)?, fs::metadata(&shard)?.modified()?);
    let done = distill(folder.path(), &args)?;
    ensure!(done.code == Some(0), "{done:?}");
    ensure!(before == (fs::read(&shard)?, fs::metadata(&shard)?.modified()?), "pairs were computed again");
    Ok(())
}

#[test]
fn a_generator_is_neither_a_base_nor_sampled_in_many_steps() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-class")?;
    let done = distill(folder.path(), &small(&base, "run", "1"))?;
    ensure!(done.code == Some(0), "{done:?}");
    refused(&distill(folder.path(), &["--base", "./run/generator"])?, &["one-step generator already"])?;
    refused(
        &distill(folder.path(), &["--base", "run"])?,
        &["the folder of a run", "hint:", "`run/teacher`"],
    )?;
    refused(
        &distill(folder.path(), &["sample", "run", "--steps", "4"])?,
        &["one-step generator", "--steps 4"],
    )
}

#[test]
fn a_base_can_be_trained_and_resumed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let args =
        "teacher --base ddpm-fashion --train-steps 2 --batch 2 --save-every 1 --sample-every 100 --out t";
    let args: Vec<&str> = args.split_whitespace().collect();
    let done = distill(folder.path(), &args)?;
    ensure!(done.code == Some(0), "{done:?}");
    ensure!(folder.path().join("t/teacher/model.safetensors").is_file(), "no base");
    refused(
        &distill(folder.path(), &[&args[..], &["--data", "nowhere"]].concat())?,
        &["--data", "no such folder"],
    )?;
    let done = distill(folder.path(), &["teacher", "--resume", "t"])?;
    ensure!(done.code == Some(0) && done.stderr.contains("continuing after step 2"), "{done:?}");
    Ok(())
}
