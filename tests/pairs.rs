//! Noise-image pairs: independent of how they are made, resumable, shared between processes, with their classes.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use dmd_core::noise;
use dmd_distill::checkpoint::{Checkpoint, Source};
use dmd_distill::options::Recipe;
use dmd_distill::pairs;
use dmd_tests::{Finished, binary, fixture, interrupt_distill, read_text, refused, run_bin};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

fn fixture_path(name: &str) -> Result<String> {
    Ok(fixture(name).to_str().context("the path is not UTF-8")?.to_owned())
}

fn pairs_of(base: &str, cwd: &Path, count: &str, out: &str, more: &[&str]) -> Result<Finished> {
    let args = ["pairs", "--base", base, "--count", count, "--out", out];
    run_bin("dmd-distill", cwd, [&args, more].concat())
}

fn same(cwd: &Path, folders: [&str; 2], shards: usize) -> Result<()> {
    for shard in 0..shards {
        let name = format!("shard-{shard:05}.safetensors");
        let [a, b] = folders.map(|folder| fs::read(cwd.join(folder).join(&name)));
        ensure!(a? == b?, "`{name}` differs");
    }
    Ok(())
}

/// At once or in parts, by one process or by three that run together.
#[test]
fn pairs_do_not_depend_on_how_they_were_made() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cwd = folder.path();
    let base = fixture_path("tiny-ddpm")?;
    for (out, count) in [("a", "800"), ("b", "10"), ("b", "300"), ("b", "800")] {
        let done = pairs_of(&base, cwd, count, out, &["--steps", "1"])?;
        ensure!(done.code == Some(0), "{done:?}");
    }
    same(cwd, ["a", "b"], 4)?;
    let mut together = Vec::new();
    for share in ["0/3", "1/3", "2/3"] {
        let mut command = Command::new(binary("dmd-distill")?);
        command.args([
            "pairs", "--base", &base, "--count", "800", "--steps", "1", "--out", "c", "--shard", share,
        ]);
        together.push(command.current_dir(cwd).stderr(Stdio::null()).spawn()?);
    }
    for mut process in together {
        ensure!(process.wait()?.success(), "a share failed");
    }
    same(cwd, ["a", "c"], 4)?;
    let one = pairs_of(&base, cwd, "800", "d", &["--steps", "1", "--shard", "1/3"])?;
    ensure!(one.code == Some(0) && one.stderr.contains("256 pairs of share 1/3"), "{one:?}");
    let found: Vec<bool> = (0..4).map(|i| cwd.join(format!("d/shard-{i:05}.safetensors")).exists()).collect();
    ensure!(found == [false, true, false, false], "{found:?}");
    refused(&pairs_of(&base, cwd, "800", "d", &["--shard", "3/3"])?, &["3/3", "I from 0 to N - 1"])?;
    let other = pairs_of(&base, cwd, "4", "a", &["--steps", "2"])?;
    refused(&other, &["pairs.json", "another base, sampler or seed", "hint:"])
}

/// Ctrl-C saves the finished pairs of an unfinished shard, by the command of its own and within a distillation.
#[test]
#[cfg(unix)]
fn an_interrupted_computation_keeps_its_pairs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cwd = folder.path();
    let base = fixture_path("tiny-ddpm")?;
    let line = "--base BASE --pairs 96 --pair-steps 200 --pairs-dir b --out run --train-steps 1 --batch 2 --samples 1";
    let whole = pairs_of(&base, cwd, "96", "whole", &["--steps", "200"])?;
    ensure!(whole.code == Some(0), "{whole:?}");
    for (out, line, hint) in [
        ("a", "pairs --base BASE --count 96 --steps 200 --out a", "the same command continues"),
        ("b", line, "`dmd-distill --resume run`"),
    ] {
        let args = line.split(' ').map(|word| if word == "BASE" { base.as_str() } else { word });
        let done = interrupt_distill(cwd, args, || cwd.join(out).join("pairs.json").exists())?;
        ensure!(done.code == Some(130), "{done:?}");
        ensure!(done.stderr.contains("of 96 pairs are kept") && done.stderr.contains(hint), "{done:?}");
        let bytes = fs::read(cwd.join(out).join("shard-00000.safetensors"))?;
        let kept = SafeTensors::deserialize(&bytes)?.tensor("y")?.shape()[0];
        ensure!(kept > 0 && kept < 96 && kept.is_multiple_of(32), "{kept} pairs were kept");
        let done = pairs_of(&base, cwd, "96", out, &["--steps", "200"])?;
        ensure!(done.code == Some(0), "{done:?}");
        same(cwd, ["whole", out], 1)?;
    }
    Ok(())
}

#[test]
fn classes_travel_with_the_pairs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cwd = folder.path();
    let base = cwd.join("base");
    fs::create_dir(&base)?;
    for entry in fs::read_dir(fixture("tiny-class"))? {
        let path = entry?.path();
        fs::copy(&path, base.join(path.file_name().context("no name")?))?;
    }
    let card = |count: usize| {
        fs::write(
            base.join("card.json"),
            format!(r#"{{"name":"x","classes":{{"count":{count},"none":10}}}}"#),
        )
    };
    card(10)?;
    let done = pairs_of("./base", cwd, "24", "pairs", &["--steps", "2"])?;
    ensure!(done.code == Some(0), "{done:?}");
    let description: Value = serde_json::from_str(&read_text(&cwd.join("pairs/pairs.json"))?)?;
    ensure!(description["classes"] == 10, "{description}");
    let shard = cwd.join("pairs/shard-00000.safetensors");
    let bytes = fs::read(&shard)?;
    let tensors = SafeTensors::deserialize(&bytes)?;
    let class = tensors.tensor("class")?;
    let expected: Vec<u8> = (0..24u32).flat_map(|k| (k % 10).to_le_bytes()).collect();
    ensure!(class.dtype() == Dtype::U32 && class.data() == expected, "{:?}", class.data());
    let y = tensors.tensor("y")?;
    let turned: Vec<u8> = (0..24u32).flat_map(|k| ((k + 1) % 10).to_le_bytes()).collect();
    let other = safetensors::tensor::TensorView::new(Dtype::U32, vec![24], &turned)?;
    fs::write(&shard, safetensors::serialize([("y", &y), ("class", &other)], None)?)?;
    let checkpoint = Checkpoint::load(&Source::Folder(base.clone()))?;
    let recipe = Recipe { pairs: Some(24), pair_steps: Some(2), ..Recipe::default() };
    let options = recipe.resolve("./base", &checkpoint)?.pairs(&checkpoint);
    let found = pairs::prepare(&cwd.join("pairs"), &options, &checkpoint, 24, &Device::Cpu)?;
    let done = pairs_of(base.to_str().context("not UTF-8")?, cwd, "24", "pairs", &["--steps", "2"])?;
    ensure!(done.code == Some(0), "the same base by another path: {done:?}");
    let (_, _, class) = found.batch(&[0, 9, 12], &Device::Cpu)?;
    ensure!(class.context("no classes")?.to_vec1::<u32>()? == [1, 0, 3], "the shard's classes are not read");
    card(9)?;
    refused(&pairs_of("./base", cwd, "24", "pairs", &["--steps", "2"])?, &["pairs.json", "other classes"])?;
    card(10)?;
    let schedule = base.join("scheduler_config.json");
    let right = read_text(&schedule)?;
    fs::write(&schedule, right.replacen("0.0001", "0.0002", 1))?;
    ensure!(read_text(&schedule)? != right, "the schedule is the same");
    refused(&pairs_of("./base", cwd, "24", "pairs", &["--steps", "2"])?, &["pairs.json", "another base"])?;
    fs::write(&schedule, right)?;
    let guided = ["--steps", "2", "--guidance", "2"];
    fs::write(base.join("card.json"), r#"{"name":"x","classes":{"count":10}}"#)?;
    refused(&pairs_of("./base", cwd, "24", "guided", &guided)?, &["guidance"])?;
    ensure!(!cwd.join("guided").exists(), "a refused call left a folder");
    card(10)?;
    fs::write(&shard, safetensors::serialize([("y", &y)], None)?)?;
    refused(
        &pairs_of("./base", cwd, "24", "pairs", &["--steps", "2"])?,
        &["shard-00000", "it does not hold `y` of up to ", "`class` below 10"],
    )
}

/// A run's pictures show images of its seed; its pairs must not be among them.
#[test]
fn pairs_share_no_noise_with_pictures() -> Result<()> {
    let base = Checkpoint::load(&Source::Folder(fixture("tiny-ddpm")))?;
    let size: usize = base.config.image_shape().iter().product();
    for seed in [0, 1, 7, u32::MAX] {
        let folder = tempfile::tempdir()?;
        let recipe = Recipe { pairs: Some(4), pair_steps: Some(1), seed: Some(seed), ..Recipe::default() };
        let options = recipe.resolve("base", &base)?.pairs(&base);
        ensure!(options.seed == seed ^ 0x8000_0000, "{options:?}");
        let found = pairs::prepare(folder.path(), &options, &base, 4, &Device::Cpu)?;
        let (z, _, _) = found.batch(&[0, 1, 2, 3], &Device::Cpu)?;
        for z in z.flatten_from(1)?.to_vec2::<f32>()? {
            for image in 0..100 {
                let mut shown = vec![0.0; size];
                noise::standard_normal(seed, image, &mut shown);
                ensure!(z != shown, "seed {seed}, image {image}");
            }
        }
    }
    Ok(())
}

/// Four tasks of a job array of Slurm fill one folder; what is missing, there twice or no shard is found and repaired.
#[test]
fn arrays_of_jobs_fill_one_folder() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cwd = folder.path();
    let base = fixture_path("tiny-ddpm")?;
    let whole = pairs_of(&base, cwd, "1000", "whole", &["--steps", "1"])?;
    ensure!(whole.code == Some(0), "{whole:?}");
    let task = |id: &str, count: &str, more: &[&str]| -> Result<Finished> {
        let mut command = Command::new(binary("dmd-distill")?);
        command.args(["pairs", "--base", &base, "--count", "1000", "--steps", "1", "--out", "parts"]);
        let numbers = [("ID", id), ("MIN", "1"), ("MAX", "4"), ("STEP", "1"), ("COUNT", count)];
        command.envs(numbers.map(|(name, value)| (format!("SLURM_ARRAY_TASK_{name}"), value)));
        let output = command.args(more).current_dir(cwd).output()?;
        let [stdout, stderr] =
            [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned());
        Ok(Finished { code: output.status.code(), stdout, stderr })
    };
    for id in ["1", "3", "4"] {
        let done = task(id, "4", &[])?;
        let share = format!("share {}/4, by SLURM_ARRAY_TASK_ID", id.parse::<u32>()? - 1);
        ensure!(done.code == Some(0) && done.stderr.contains(&share), "{done:?}");
    }
    let check = |count: &str| pairs_of(&base, cwd, count, "parts", &["--steps", "1", "--check"]);
    let gap = check("1000")?;
    ensure!(gap.code == Some(1) && gap.stdout.contains("shard 1 is missing\n"), "{gap:?}");
    let modified = |i: usize| fs::metadata(cwd.join(format!("parts/shard-{i:05}.safetensors")))?.modified();
    let before = modified(0)?;
    for id in ["1", "2"] {
        ensure!(task(id, "4", &[])?.code == Some(0));
    }
    ensure!(modified(0)? == before, "a complete shard was written again");
    same(cwd, ["whole", "parts"], 4)?;
    let complete = check("1000")?;
    ensure!(
        complete.code == Some(0) && complete.stdout == "4 shards, 1000 pairs: complete\n",
        "{complete:?}"
    );

    let longer = check("1020")?;
    ensure!(
        longer.code == Some(1) && longer.stdout.contains("shard 3: got 232 pairs, expected 252"),
        "{longer:?}"
    );
    fs::copy(cwd.join("parts/shard-00000.safetensors"), cwd.join("parts/shard-00002.safetensors"))?;
    fs::copy(cwd.join("whole/shard-00001.safetensors"), cwd.join("parts/shard-00001 (1).safetensors"))?;
    let twice = check("1000")?;
    ensure!(
        twice.code == Some(1) && twice.stdout.contains("shards 0 and 2 hold the same images"),
        "{twice:?}"
    );
    ensure!(twice.stdout.contains("`shard-00001 (1).safetensors` is no name of a shard"), "{twice:?}");
    let used = pairs_of(&base, cwd, "1000", "parts", &["--steps", "1"])?;
    refused(&used, &["shard-00002", "it holds the images of shard 0", "delete the one that was copied"])?;
    fs::remove_file(cwd.join("parts/shard-00002.safetensors"))?;
    ensure!(pairs_of(&base, cwd, "1000", "parts", &["--steps", "1"])?.code == Some(0));
    same(cwd, ["whole", "parts"], 4)?;

    // An array with gaps does not say which share a task has.
    refused(&task("3", "3", &[])?, &["SLURM_ARRAY_TASK_ID", "a list with gaps", "hint: ", "--shard I/N"])?;
    let explicit = task("3", "3", &["--shard", "0/1"])?;
    ensure!(explicit.code == Some(0) && explicit.stderr.contains("1000 pairs in"), "{explicit:?}");
    let mut pod = Command::new(binary("dmd-distill")?);
    pod.args(["pairs", "--base", &base, "--count", "1000", "--steps", "1", "--out", "parts"]);
    let pod = pod.env("JOB_COMPLETION_INDEX", "0").current_dir(cwd).output()?;
    let said = String::from_utf8_lossy(&pod.stderr).into_owned();
    ensure!(pod.status.code() == Some(2) && said.contains("JOB_COMPLETION_INDEX is set"), "{said}");
    Ok(())
}
