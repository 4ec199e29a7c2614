//! `dmd-distill` from outside: a whole small run, resuming, and everything it refuses.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dmd_tests::{Finished, binary, fixture, read_text, run_bin};
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

/// Exit code 2, nothing on standard output, and an error that says these things.
fn refused(finished: &Finished, says: &[&str]) -> Result<()> {
    ensure!(finished.code == Some(2), "got {finished:?}");
    for text in says {
        ensure!(finished.stderr.contains(text), "`{text}` is not in: {}", finished.stderr);
    }
    Ok(())
}

#[test]
fn a_run_leaves_a_generator_and_pictures() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-class")?;
    let done = distill(folder.path(), &small(&base, "run", "4"))?;
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
    ensure!(stats.iter().all(|s| s["fake"].as_f64().is_some_and(|v| v > 0.0)), "{stats:?}");
    let generator: Value = serde_json::from_str(&read_text(&run.join("generator/generator.json"))?)?;
    ensure!(generator["t_gen"] == 440, "{generator}");
    let sampled = distill(folder.path(), &["sample", "run", "--count", "10", "-o", "grid.png"])?;
    ensure!(sampled.code == Some(0) && folder.path().join("grid.png").is_file(), "{sampled:?}");
    Ok(())
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-class")?;
    for (out, steps) in [("whole", "4"), ("parts", "2")] {
        let done = distill(folder.path(), &small(&base, out, steps))?;
        ensure!(done.code == Some(0), "{done:?}");
    }
    let parts = folder.path().join("parts");
    let stats = parts.join("stats.jsonl");
    let later = "{\"step\":3,\"dm\":9.0}\n{\"step\":4,\"d";
    fs::write(&stats, format!("{}{later}", read_text(&stats)?))?;
    let done = distill(folder.path(), &["--resume", "parts", "--train-steps", "4"])?;
    ensure!(done.code == Some(0), "{done:?}");
    for file in ["run.json", "stats.jsonl", "generator/model.safetensors", "checkpoints/state.safetensors"] {
        let [whole, parts] = ["whole", "parts"].map(|run| fs::read(folder.path().join(run).join(file)));
        ensure!(whole? == parts?, "`{file}` differs");
    }
    Ok(())
}

/// Killed at many moments, from before the first file to after the last step, and continued each time.
#[test]
fn a_killed_run_ends_like_an_uninterrupted_one() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-class")?;
    let whole = distill(folder.path(), &small(&base, "whole", "12"))?;
    ensure!(whole.code == Some(0), "{whole:?}");
    let run = folder.path().join("killed");
    let start = small(&base, "killed", "12");
    let arguments = || if run.exists() { vec!["--resume", "killed"] } else { start.clone() };
    let mut kills = 0;
    for delay in [2, 20, 60, 100, 140, 180, 220, 260, 300, 350, 400, 500] {
        let mut process = Command::new(binary("dmd-distill")?)
            .args(arguments())
            .current_dir(folder.path())
            .stderr(Stdio::null())
            .spawn()?;
        std::thread::sleep(Duration::from_millis(delay));
        process.kill()?;
        kills += usize::from(process.wait()?.code().is_none());
    }
    ensure!(kills > 3, "only {kills} of the processes were still running");
    let done = distill(folder.path(), &arguments())?;
    ensure!(done.code == Some(0), "{done:?}");
    for file in ["run.json", "stats.jsonl", "generator/model.safetensors", "checkpoints/state.safetensors"] {
        let [whole, killed] = ["whole", "killed"].map(|run| fs::read(folder.path().join(run).join(file)));
        ensure!(whole? == killed?, "`{file}` differs");
    }
    Ok(())
}

#[test]
fn pairs_do_not_depend_on_how_they_were_made() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-ddpm")?;
    let pairs = |out: &str, count: &str| {
        distill(folder.path(), &["pairs", "--base", &base, "--count", count, "--steps", "1", "--out", out])
    };
    for (out, count) in [("a", "300"), ("b", "10"), ("b", "300")] {
        let done = pairs(out, count)?;
        ensure!(done.code == Some(0), "{done:?}");
    }
    for shard in ["shard-00000.safetensors", "shard-00001.safetensors"] {
        let [a, b] = ["a", "b"].map(|out| fs::read(folder.path().join(out).join(shard)));
        ensure!(a? == b?, "`{shard}` differs");
    }
    let other =
        distill(folder.path(), &["pairs", "--base", &base, "--count", "4", "--steps", "2", "--out", "a"])?;
    refused(&other, &["pairs.json", "another base, sampler or seed", "hint:"])
}

#[test]
fn bases_are_listed_with_their_size() -> Result<()> {
    let listed = distill(Path::new("."), &["bases", "--json"])?;
    ensure!(listed.code == Some(0), "{listed:?}");
    let bases: Value = serde_json::from_str(&listed.stdout)?;
    let fashion = &bases[0];
    ensure!(fashion["name"] == "ddpm-fashion" && fashion["classes"] == 10, "{fashion}");
    ensure!(fashion["parameters"] == 687_473, "{fashion}");
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
    match change(fs::read(&path)?) {
        Some(bytes) => fs::write(&path, bytes)?,
        None => fs::remove_file(&path)?,
    }
    Ok(base.to_str().context("the path is not UTF-8")?.to_owned())
}

const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

#[test]
fn a_damaged_base_is_refused_by_file_and_tensor() -> Result<()> {
    let replace = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| Some(String::from_utf8_lossy(&bytes).replace(from, to).into_bytes())
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

#[test]
fn options_that_make_no_sense_are_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-class")?;
    let cases: [(&[&str], &str); 9] = [
        (&["--batch", "0"], "--batch"),
        (&["--lr", "0"], "learning rates"),
        (&["--ema", "1"], "--ema"),
        (&["--t-gen", "1000"], "--t-gen"),
        (&["--pairs", "0"], "--lambda-reg 0"),
        (&["--pair-steps", "1001"], "--pair-steps"),
        (&["--fake-updates", "0"], "--fake-updates"),
        (&["--device", "cuda"], "--features cuda"),
        (&["--device", "tpu"], "--device tpu"),
    ];
    for (args, says) in cases {
        let all = [&["--base", &base, "--out", "run"], args].concat();
        refused(&distill(folder.path(), &all)?, &[says]).with_context(|| format!("{args:?}"))?;
    }
    ensure!(!folder.path().join("run").exists(), "a run was begun");
    refused(&distill(folder.path(), &["--resume", "nowhere"])?, &["run.json", "--resume"])?;
    refused(&distill(folder.path(), &["--resume", "x", "--lr", "1e-3"])?, &["only `--train-steps`"])
}

#[test]
fn a_generator_is_neither_a_base_nor_sampled_in_many_steps() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture_path("tiny-class")?;
    let done = distill(folder.path(), &small(&base, "run", "1"))?;
    ensure!(done.code == Some(0), "{done:?}");
    refused(&distill(folder.path(), &["--base", "./run/generator"])?, &["one-step generator already"])?;
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
