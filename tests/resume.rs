//! Runs that stop and go on: by a step count, killed at many moments, and what `--resume` refuses.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use dmd_tests::{Finished, binary, fixture, read_text, refused, run_bin};
use image::{GrayImage, Luma};

const FILES: [&str; 4] =
    ["run.json", "stats.jsonl", "generator/model.safetensors", "checkpoints/state.safetensors"];

fn distill(cwd: &Path, args: &[&str]) -> Result<Finished> {
    run_bin("dmd-distill", cwd, args)
}

/// A distillation of the class-conditional fixture that takes a second.
fn small(out: &str, steps: &str) -> Result<Vec<String>> {
    let base = fixture("tiny-class");
    let line = "--batch 4 --pairs 8 --pair-steps 2 --fake-updates 2 --save-every 2 --sample-every 2 --warmup 2 \
                --pairs-dir pairs";
    let mut args = vec!["--base", base.to_str().context("the path is not UTF-8")?];
    args.extend(["--out", out, "--train-steps", steps]);
    args.extend(line.split_whitespace());
    Ok(args.into_iter().map(str::to_owned).collect())
}

fn run_small(cwd: &Path, out: &str, steps: &str) -> Result<()> {
    let done = run_bin("dmd-distill", cwd, small(out, steps)?)?;
    ensure!(done.code == Some(0), "{done:?}");
    Ok(())
}

fn same(cwd: &Path, runs: [&str; 2]) -> Result<()> {
    for file in FILES {
        let [one, other] = runs.map(|run| fs::read(cwd.join(run).join(file)));
        ensure!(one? == other?, "`{file}` differs");
    }
    Ok(())
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (out, steps) in [("whole", "4"), ("parts", "2")] {
        run_small(folder.path(), out, steps)?;
    }
    let stats = folder.path().join("parts/stats.jsonl");
    let later = "{\"step\":3,\"dm\":9.0}\n{\"step\":4,\"d";
    fs::write(&stats, format!("{}{later}", read_text(&stats)?))?;
    let done = distill(folder.path(), &["--resume", "parts", "--train-steps", "4"])?;
    ensure!(done.code == Some(0), "{done:?}");
    same(folder.path(), ["whole", "parts"])
}

/// With a learning rate that makes samples collapse: stopped before the first return to healthy weights, and after it.
#[test]
fn a_run_that_rolls_back_is_continued_alike() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let run = |out: &str, steps: &str| -> Result<Finished> {
        let mut args = small(out, steps)?;
        args.extend(["--lr", "5e-3", "--ema", "0", "--eval-every", "1"].map(str::to_owned));
        run_bin("dmd-distill", folder.path(), args)
    };
    let whole = run("whole", "100")?;
    let rolled_back = |done: &Finished| done.stderr.matches("going back to the weights of step").count();
    ensure!(whole.code == Some(0) && rolled_back(&whole) == 4, "{whole:?}");
    ensure!(whole.stderr.contains("the samples collapsed 4 times"), "{whole:?}");
    let stats = read_text(&folder.path().join("whole/stats.jsonl"))?;
    let steps = stats.lines().count();
    ensure!(steps < 100, "it did not end early: {steps}");
    let card = read_text(&folder.path().join("whole/generator/card.json"))?;
    let card: serde_json::Value = serde_json::from_str(&card)?;
    ensure!(card["training"]["steps"].as_u64().is_some_and(|step| step < steps as u64), "{card}");
    for (out, first) in [("healthy", "20"), ("early", "33"), ("late", "37")] {
        let before = run(out, first)?;
        ensure!(before.code == Some(0), "{before:?}");
        if out == "healthy" {
            // Killed between writing the state and keeping it as the best.
            let [state, best] = ["state", "best"]
                .map(|name| folder.path().join(out).join(format!("checkpoints/{name}.safetensors")));
            ensure!(fs::read(&state)? == fs::read(&best)?, "step {first} is not the best");
            fs::remove_file(best)?;
        }
        let after = distill(folder.path(), &["--resume", out, "--train-steps", "100"])?;
        ensure!(after.code == Some(0) && rolled_back(&before) + rolled_back(&after) == 4, "{after:?}");
        same(folder.path(), ["whole", out])?;
    }
    // Killed between the last state and the generator.
    fs::remove_dir_all(folder.path().join("late/generator"))?;
    let after = distill(folder.path(), &["--resume", "late"])?;
    ensure!(after.code == Some(0) && after.stderr.contains("the samples collapsed 4 times"), "{after:?}");
    same(folder.path(), ["whole", "late"])
}

/// Real images of 12 by 12 pixels in a folder per class.
fn pictures(folder: &Path) -> Result<()> {
    for class in 0..3u8 {
        let inside = folder.join(format!("train/class-{class}"));
        fs::create_dir_all(&inside)?;
        for i in 0..4u8 {
            let picture = GrayImage::from_fn(12, 12, |x, y| Luma([40 * class + 9 * i + (x * y % 30) as u8]));
            picture.save(inside.join(format!("{i}.png")))?;
        }
    }
    Ok(())
}

#[test]
fn dmd2_goes_the_whole_way_and_is_continued_alike() -> Result<()> {
    let folder = tempfile::tempdir()?;
    pictures(&folder.path().join("faces"))?;
    let run = |cwd: &Path, out: &str, steps: &str, more: &[&str]| -> Result<Finished> {
        let base = fixture("tiny-class");
        let line = "--method dmd2 --data faces --batch 4 --fake-updates 2 --eval-every 2 --save-every 2 --device cpu";
        let mut args = vec!["--base", base.to_str().context("the path is not UTF-8")?];
        args.extend(["--out", out, "--train-steps", steps]);
        args.extend(line.split_whitespace().chain(more.iter().copied()));
        run_bin("dmd-distill", cwd, args)
    };
    for (out, steps) in [("whole", "4"), ("parts", "2")] {
        let done = run(folder.path(), out, steps, &[])?;
        ensure!(done.code == Some(0), "{done:?}");
    }
    let stats = read_text(&folder.path().join("whole/stats.jsonl"))?;
    let line: serde_json::Value = serde_json::from_str(stats.lines().last().context("no statistics")?)?;
    for loss in ["adversarial", "discrimination", "dm", "fake"] {
        ensure!(line[loss].as_f64().is_some_and(|loss| loss > 0.0), "{loss}: {line}");
    }
    ensure!(line["reg"] == 0.0 && !folder.path().join("pairs").exists(), "there were pairs: {line}");
    // From another folder: the run knows where its images are.
    let elsewhere = tempfile::tempdir()?;
    let run_folder = folder.path().join("parts");
    let resume = ["--resume", run_folder.to_str().context("the path is not UTF-8")?, "--train-steps", "4"];
    let done = distill(elsewhere.path(), &resume)?;
    ensure!(done.code == Some(0), "{done:?}");
    same(folder.path(), ["whole", "parts"])?;

    // A second stage begins with what the first ended with.
    run_small(folder.path(), "first", "4")?;
    for (out, steps) in [("second", "4"), ("second-parts", "2")] {
        let done = run(folder.path(), out, steps, &["--init", "first"])?;
        ensure!(done.code == Some(0), "{done:?}");
    }
    let sheet = |place: &str| fs::read(folder.path().join(place));
    let base = sheet("first/samples/step-000000.png")?;
    ensure!(
        sheet("second/samples/step-000000.png")? == sheet("first/samples/step-000004.png")?,
        "another start"
    );
    ensure!(sheet("second/samples/step-000000.png")? != base, "the first stage changed nothing");
    let done = distill(folder.path(), &["--resume", "second-parts", "--train-steps", "4"])?;
    ensure!(done.code == Some(0), "{done:?}");
    same(folder.path(), ["second", "second-parts"])?;
    refused(
        &run(folder.path(), "run", "1", &["--init", "first", "--t-gen", "last"])?,
        &["first", "another base, `--t-gen` or `--input-scale`"],
    )?;
    refused(&run(folder.path(), "run", "1", &["--init", "nowhere"])?, &["nowhere", "run.json"])?;

    let flat = folder.path().join("flat/train");
    fs::create_dir_all(&flat)?;
    fs::copy(folder.path().join("faces/train/class-0/0.png"), flat.join("0.png"))?;
    let args = small("run", "1")?;
    let wrong = |extra: &[&str]| {
        let all: Vec<&str> = args.iter().map(String::as_str).chain(extra.iter().copied()).collect();
        distill(folder.path(), &all)
    };
    refused(&wrong(&["--gan-weight", "0.1", "--data", "flat"])?, &["the images have none", "sub-folder"])?;
    refused(&wrong(&["--data", "faces"])?, &["only the adversarial loss", "--method dmd2"])?;
    ensure!(!folder.path().join("run").exists(), "a run was begun");
    Ok(())
}

/// Killed before the first file, and as soon as it has saved a state, again and again; continued each time.
#[test]
fn a_killed_run_ends_like_an_uninterrupted_one() -> Result<()> {
    const STEPS: u64 = 40;
    let folder = tempfile::tempdir()?;
    let staged = |out: &str| -> Result<Vec<String>> {
        let mut args = small(out, "30")?;
        args.extend(["--reg-steps", "10", "--lr-reg", "1e-3"].map(str::to_owned));
        Ok(args)
    };
    let whole = run_bin("dmd-distill", folder.path(), staged("whole")?)?;
    ensure!(whole.code == Some(0), "{whole:?}");
    let run = folder.path().join("killed");
    let start = staged("killed")?;
    let resume = ["--resume", "killed"].map(str::to_owned).to_vec();
    let begin = |log: &Path| -> Result<Child> {
        let arguments = if run.exists() { &resume } else { &start };
        let mut command = Command::new(binary("dmd-distill")?);
        command.args(arguments).current_dir(folder.path()).stderr(fs::File::create(log)?);
        Ok(command.stdout(Stdio::null()).spawn()?)
    };
    let saved = || -> Option<SystemTime> {
        fs::metadata(run.join("checkpoints/state.safetensors")).and_then(|state| state.modified()).ok()
    };
    let (mut kills, mut resumed) = (0, Vec::new());
    for round in 0..10u64 {
        let log = folder.path().join(format!("log-{round}"));
        let before = saved();
        let mut process = begin(&log)?;
        if round < 4 {
            std::thread::sleep(Duration::from_millis(2 + 30 * round));
        } else {
            let deadline = Instant::now() + Duration::from_secs(120);
            while saved() == before && process.try_wait()?.is_none() {
                ensure!(Instant::now() < deadline, "no state was saved");
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(3 * (round - 4))); // not always at the same place
        }
        process.kill()?;
        kills += usize::from(process.wait()?.code().is_none());
        resumed.extend(step_of(&read_text(&log)?));
    }
    let done = distill(folder.path(), &["--resume", "killed"])?;
    ensure!(done.code == Some(0), "{done:?}");
    resumed.extend(step_of(&done.stderr));
    ensure!(kills > 3, "only {kills} of the processes were still running");
    ensure!(resumed.iter().any(|step| (1..STEPS).contains(step)), "no kill fell between: {resumed:?}");
    same(folder.path(), ["whole", "killed"])
}

/// The step after which a run says that it continues.
fn step_of(log: &str) -> Option<u64> {
    log.split("continuing after step ").nth(1)?.split_whitespace().next()?.parse().ok()
}

#[test]
fn a_resumed_run_is_checked_first() -> Result<()> {
    let folder = tempfile::tempdir()?;
    run_small(folder.path(), "run", "4")?;
    let options = read_text(&folder.path().join("run/run.json"))?;
    let resume = |args: &[&str]| distill(folder.path(), &[&["--resume", "run"], args].concat());
    for steps in ["0", "3"] {
        refused(&resume(&["--train-steps", steps])?, &["--train-steps", "at least 4", "step 4"])?;
    }
    let done = resume(&["--train-steps", "6", "--dry-run"])?;
    ensure!(done.code == Some(0) && done.stdout.contains("\"train_steps\": 6"), "{done:?}");
    ensure!(done.stderr.contains("time about"), "{done:?}");
    ensure!(read_text(&folder.path().join("run/run.json"))? == options, "a dry run changed the options");
    let other = distill(folder.path(), &["teacher", "--resume", "run"])?;
    refused(&other, &["a run of `dmd-distill`", "hint: continue it with `dmd-distill --resume run`"])?;
    fs::write(folder.path().join("run/run.json"), options.replace("\"distill\"", "\"teacher\""))?;
    refused(&resume(&[])?, &["a run of `dmd-distill teacher`", "`dmd-distill teacher --resume run`"])
}
