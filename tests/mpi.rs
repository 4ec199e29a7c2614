//! Training by several ranks that `mpirun` starts: the same numbers as by one, what ends and continues a run, what is measured
//! and what is refused. Needs `scripts/build-mpi`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dmd_tests::{Finished, Golden, binary, fixture, read_text, refused, run_bin};
use image::{GrayImage, Luma, Rgb, RgbImage};
use serde_json::Value;

/// Largest relative difference that the order of sums may make.
const RELATIVE: f64 = 1e-5;

fn program() -> Result<PathBuf> {
    binary("mpi/dmd-distill").context("scripts/build-mpi builds it")
}

/// A command that starts `ranks` ranks, more than there are cores if need be, also as root and in a container.
fn mpirun(ranks: usize, cwd: &Path) -> Result<Command> {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--bind-to", "none", "-n", &ranks.to_string()]).arg(program()?);
    for name in ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] {
        command.env(name, "1");
    }
    command.env("OMPI_MCA_btl_vader_single_copy_mechanism", "none").env("RAYON_NUM_THREADS", "1");
    command.current_dir(cwd).stdin(Stdio::null());
    Ok(command)
}

fn finish(command: &mut Command) -> Result<Finished> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    Ok(Finished { code: output.status.code(), stdout, stderr })
}

/// By one process without MPI, or by several ranks.
fn run(ranks: usize, cwd: &Path, line: &str) -> Result<Finished> {
    let done = match ranks {
        1 => run_bin("dmd-distill", cwd, line.split_whitespace())?,
        _ => finish(mpirun(ranks, cwd)?.args(line.split_whitespace()))?,
    };
    ensure!(done.code == Some(0), "{ranks} ranks, {line}: {done:?}");
    Ok(done)
}

/// Pictures of three classes of 12 by 12 pixels in `faces`, and colour ones of 32 by 32 in `colour`.
fn pictures(folder: &Path) -> Result<()> {
    for class in 0..3u8 {
        let inside = folder.join(format!("faces/train/class-{class}"));
        fs::create_dir_all(&inside)?;
        for i in 0..4u8 {
            let picture = GrayImage::from_fn(12, 12, |x, y| Luma([40 * class + 9 * i + (x * y % 30) as u8]));
            picture.save(inside.join(format!("{i}.png")))?;
        }
    }
    fs::create_dir_all(folder.join("colour"))?;
    for i in 0..7u8 {
        let picture = RgbImage::from_fn(32, 32, |x, y| Rgb([x as u8 * 5, y as u8 * 4, 30 * i]));
        picture.save(folder.join(format!("colour/{i}.png")))?;
    }
    Ok(())
}

/// Every loss of DMD and DMD2 on the class-conditional fixture. Five images are no multiple of two or three ranks.
fn all_losses(out: &str, steps: u64, more: &str) -> Result<String> {
    let base = fixture("tiny-class");
    Ok(format!(
        "--base {} --out {out} --train-steps {steps} --batch 5 --pairs 16 --pair-steps 2 --pairs-dir pairs --fake-updates 2 \
         --warmup 2 --gan-weight 0.1 --data faces --dm-draws 2 --clamp --sample-every 100 --samples 3 {more}",
        base.to_str().context("the path is not UTF-8")?
    ))
}

fn stats(run: &Path) -> Result<Vec<Value>> {
    let text = read_text(&run.join("stats.jsonl"))?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// Every logged number of the first `steps` updates.
fn same_numbers(one: &Path, other: &Path, steps: usize) -> Result<()> {
    let (one, other) = (stats(one)?, stats(other)?);
    ensure!(one.len() >= steps && other.len() >= steps, "got {} and {} updates", one.len(), other.len());
    for (a, b) in one.iter().zip(&other).take(steps) {
        let names = a.as_object().context("a line is no object")?;
        ensure!(names.contains_key("grad_norm"), "{a}");
        for name in names.keys().filter(|name| *name != "kid") {
            let [a, b] = [a, b].map(|line| line[name].as_f64().context("no number"));
            let (a, b) = (a?, b?);
            let difference = (a - b).abs();
            ensure!(difference <= RELATIVE * a.abs(), "step {}, `{name}`: {a} and {b}", one[0]["step"]);
        }
    }
    Ok(())
}

/// Weights, averages and moments of two saved states, tensor by tensor: the length of the difference beside that of the tensor.
/// A bias of keys has no effect on attention (softmax takes no note of it), so that its gradient is rounding noise, which Adam
/// makes as large as any.
fn same_state(one: &Path, other: &Path, prefixes: &[&str]) -> Result<()> {
    let [one, other] = [one, other].map(|run| Golden::read(&run.join("checkpoints/state.safetensors")));
    let (one, other) = (one?, other?);
    for prefix in prefixes {
        let names: Vec<&str> = one.names_under(prefix).collect();
        ensure!(!names.is_empty(), "no tensor of `{prefix}`");
        for name in names.into_iter().filter(|name| !name.ends_with("to_k.bias")) {
            let name = format!("{prefix}{name}");
            let (a, b) = (one.f32(&name)?, other.f32(&name)?);
            let length = |values: &mut dyn Iterator<Item = f32>| -> f64 {
                values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
            };
            let whole = length(&mut a.iter().copied());
            let apart = length(&mut a.iter().zip(&b).map(|(a, b)| a - b));
            ensure!(apart <= RELATIVE * whole, "`{name}` differs by {apart:e} of {whole:e}");
        }
    }
    Ok(())
}

#[test]
fn ranks_distil_like_one_process() -> Result<()> {
    let folder = tempfile::tempdir()?;
    pictures(folder.path())?;
    for ranks in 1..=3 {
        let more = "--save-every 20 --eval-every 10 --profile";
        let done = run(ranks, folder.path(), &all_losses(&format!("by-{ranks}"), 20, more)?)?;
        ensure!(done.stderr.matches("generator: ").count() == 1, "not one rank speaks: {done:?}");
        let profile = read_text(&folder.path().join(format!("by-{ranks}/profile.json")))?;
        check_profile(&serde_json::from_str(&profile)?, ranks, &folder.path().join(format!("by-{ranks}")))?;
    }
    let losses = stats(&folder.path().join("by-1"))?;
    for name in ["dm", "reg", "fake", "adversarial", "discrimination"] {
        ensure!(losses[19][name].as_f64().is_some_and(|loss| loss > 0.0), "`{name}` takes no part");
    }
    let one = folder.path().join("by-1");
    for ranks in ["by-2", "by-3"] {
        let other = folder.path().join(ranks);
        same_numbers(&one, &other, 20).context(ranks)?;
        same_state(&one, &other, &["generator.", "fake.", "ema."]).context(ranks)?;
    }

    // Without a launcher the program with MPI is the one without.
    run(1, folder.path(), &all_losses("plain", 2, "")?)?;
    let line = all_losses("single", 2, "")?;
    let single = finish(Command::new(program()?).args(line.split_whitespace()).current_dir(folder.path()))?;
    ensure!(single.code == Some(0), "{single:?}");
    let states = ["plain", "single"]
        .map(|run| fs::read(folder.path().join(run).join("checkpoints/state.safetensors")));
    let [plain, single] = states;
    ensure!(plain? == single?, "one process with MPI differs from one without");
    Ok(())
}

/// All-reduced are the gradients of generator and critic, nothing else, and nothing by one rank.
fn check_profile(profile: &Value, ranks: usize, run: &Path) -> Result<()> {
    let state = Golden::read(&run.join("checkpoints/state.safetensors"))?;
    let bytes = |optimiser: &str| -> Result<u64> {
        let prefix = format!("{optimiser}.first.");
        let sizes = state
            .names_under(&prefix)
            .map(|name| Ok(4 * state.shape(&format!("{prefix}{name}"))?.iter().product::<usize>() as u64));
        sizes.sum()
    };
    let updates = profile["updates"].as_u64().context("no updates")?;
    let expected = updates * (bytes("generator_optimiser")? + 2 * bytes("fake_optimiser")?);
    let expected = if ranks == 1 { 0 } else { expected };
    ensure!(profile["gradient_bytes"] == expected && updates == 20, "expected {expected}: {profile}");
    let number = |value: &Value| value.as_f64().with_context(|| format!("no number: {profile}"));
    let [least, most] = ["least", "most"].map(|end| number(&profile["communication_seconds"][end]));
    let (least, most, all) = (least?, most?, number(&profile["seconds_per_update"])?);
    ensure!((least > 0.0) == (ranks > 1) && least <= most && most < all, "{profile}");
    ensure!(profile["ranks"] == ranks, "{profile}");
    Ok(())
}

#[test]
fn ranks_train_a_base_like_one_process() -> Result<()> {
    let folder = tempfile::tempdir()?;
    pictures(folder.path())?;
    for ranks in 1..=3 {
        let line = format!(
            "teacher --base ddpm-celeba --data colour --out by-{ranks} --batch 5 --train-steps 20 --save-every 20 --flip \
             --samples 1 --sample-steps 1"
        );
        run(ranks, folder.path(), &line)?;
    }
    let one = folder.path().join("by-1");
    for ranks in ["by-2", "by-3"] {
        same_numbers(&one, &folder.path().join(ranks), 20).context(ranks)?;
        same_state(&one, &folder.path().join(ranks), &["teacher.", "ema."]).context(ranks)?;
    }
    Ok(())
}

/// BatchNorm sees the images of all ranks, forward and backward: with its own images alone the first loss would differ. Later
/// updates follow rounding noise in biases without effect.
#[test]
fn batch_norm_sees_the_images_of_all_ranks() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for class in 0..10u8 {
        let inside = folder.path().join(format!("digits/{class}"));
        fs::create_dir_all(&inside)?;
        let picture = GrayImage::from_fn(28, 28, |x, y| Luma([20 * class + (x * y % 50) as u8]));
        picture.save(inside.join("0.png"))?;
    }
    for ranks in [1, 2] {
        let line = format!(
            "teacher --base ddpm-mnist --data digits --out by-{ranks} --batch 3 --train-steps 2 --samples 1 --sample-steps 1"
        );
        run(ranks, folder.path(), &line)?;
    }
    let runs = ["by-1", "by-2"].map(|run| folder.path().join(run));
    same_numbers(&runs[0], &runs[1], 2)?;
    let states = runs.map(|run| Golden::read(&run.join("checkpoints/state.safetensors")));
    let [one, other] =
        [states[0].as_ref(), states[1].as_ref()].map(|state| state.map_err(|e| anyhow::anyhow!("{e}")));
    let (one, other) = (one?, other?);
    let name = "teacher.init_conv.conv1.1.running_var";
    let (one, other) = (one.f32(name)?, other.f32(name)?);
    for (a, b) in one.iter().zip(&other) {
        ensure!((a - b).abs() <= 1e-4 * a.abs(), "running variance: {a} and {b}");
    }
    Ok(())
}

/// Killed as soon as a state is saved: all ranks end at once, and the run goes on by another number of them.
#[test]
fn a_killed_rank_ends_the_job_and_others_continue() -> Result<()> {
    let folder = tempfile::tempdir()?;
    pictures(folder.path())?;
    run(1, folder.path(), &all_losses("whole", 20, "--save-every 20 --eval-every 100")?)?;
    let start = all_losses("killed", 20, "--save-every 1 --eval-every 100")?;
    let log = folder.path().join("log");
    let mut job = mpirun(2, folder.path())?
        .args(start.split_whitespace())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log)?)
        .spawn()?;
    let run_folder = folder.path().join("killed");
    let state = run_folder.join("checkpoints/state.safetensors");
    await_that(&mut job, Duration::from_secs(120), || state.exists())?;
    let rank = rank_of(job.id(), 1)?;
    let killed = Instant::now();
    ensure!(Command::new("kill").args(["-9", &rank.to_string()]).status()?.success(), "cannot kill {rank}");
    let status = loop {
        match job.try_wait()? {
            Some(status) => break status,
            None if killed.elapsed() > Duration::from_secs(10) => {
                job.kill()?;
                bail!("the job goes on 10 s after a rank was killed: {}", read_text(&log)?)
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let said = read_text(&log)?;
    ensure!(!status.success() && said.contains("rank 1") && said.contains("signal 9"), "{status}: {said}");
    ensure!(!run_folder.join("generator").exists(), "the run was finished before");
    let resumed = run(3, folder.path(), "--resume killed")?;
    ensure!(resumed.stderr.contains("continuing after step"), "{resumed:?}");
    let whole = folder.path().join("whole");
    same_numbers(&whole, &run_folder, 20)?;
    same_state(&whole, &run_folder, &["generator.", "fake.", "ema."])
}

fn await_that(job: &mut Child, limit: Duration, holds: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !holds() {
        ensure!(job.try_wait()?.is_none() && Instant::now() < deadline, "it did not come to that");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// The process of a rank, below that of `mpirun`.
fn rank_of(mpirun: u32, rank: usize) -> Result<u32> {
    let mut parents = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(process) = entry?.file_name().to_string_lossy().parse::<u32>() else { continue };
        let Ok(stat) = fs::read_to_string(format!("/proc/{process}/stat")) else { continue };
        let parent =
            stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        parents.insert(process, parent.context("no parent")?);
    }
    let wanted = format!("OMPI_COMM_WORLD_RANK={rank}");
    let is_rank = |process: &u32| {
        let environment = fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == wanted.as_bytes())
    };
    let mut children = parents.iter().filter(|(_, parent)| **parent == mpirun).map(|(process, _)| *process);
    children.find(is_rank).with_context(|| format!("no rank {rank} below process {mpirun}"))
}

/// SIGUSR1, which `mpirun` passes on, ends a job after its update; one process continues it.
#[test]
fn a_stopped_job_is_saved_by_all_ranks_together() -> Result<()> {
    let folder = tempfile::tempdir()?;
    pictures(folder.path())?;
    let start = all_losses("run", 1000, "--save-every 1000 --eval-every 1000")?;
    let log = folder.path().join("log");
    let mut job =
        mpirun(2, folder.path())?.args(start.split_whitespace()).stderr(fs::File::create(&log)?).spawn()?;
    let run_folder = folder.path().join("run");
    await_that(&mut job, Duration::from_secs(120), || stats(&run_folder).is_ok_and(|all| all.len() > 1))?;
    ensure!(Command::new("kill").args(["-USR1", &job.id().to_string()]).status()?.success());
    let status = job.wait()?;
    let said = read_text(&log)?;
    ensure!(!status.success() && said.matches("error: stopped after step").count() == 1, "{status}: {said}");
    let saved = stats(&run_folder)?.len();
    let line = format!("--resume run --train-steps {}", saved + 1);
    let resumed = run(1, folder.path(), &line)?;
    ensure!(resumed.stderr.contains(&format!("continuing after step {saved}")), "{resumed:?}");
    Ok(())
}

/// All ranks go back together when rank 0 finds that samples collapse.
#[test]
fn ranks_return_to_healthy_weights_together() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture("tiny-class");
    let line = format!(
        "--base {} --out run --batch 4 --pairs 8 --pair-steps 2 --fake-updates 2 --pairs-dir pairs --warmup 2 --lr 5e-3 --ema 0 \
         --eval-every 1 --train-steps 100 --save-every 50 --samples 1",
        base.display()
    );
    let done = run(2, folder.path(), &line)?;
    ensure!(done.stderr.matches("going back to the weights of step").count() == 4, "{done:?}");
    ensure!(done.stderr.contains("the samples collapsed 4 times"), "{done:?}");
    ensure!(stats(&folder.path().join("run"))?.len() < 100, "it did not end early");
    Ok(())
}

#[test]
fn ranks_fill_one_folder_of_pairs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = fixture("tiny-ddpm");
    let pairs = |out: &str| format!("pairs --base {} --count 800 --steps 1 --out {out}", base.display());
    run(1, folder.path(), &pairs("one"))?;
    let done = run(3, folder.path(), &pairs("three"))?;
    ensure!(done.stderr.contains("800 pairs by 3 ranks"), "{done:?}");
    for shard in 0..4 {
        let name = format!("shard-{shard:05}.safetensors");
        let [a, b] = ["one", "three"].map(|out| fs::read(folder.path().join(out).join(&name)));
        ensure!(a? == b?, "`{name}` differs");
    }
    Ok(())
}

#[test]
fn what_ranks_cannot_do_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cwd = folder.path();
    let base = fixture("tiny-class");
    let distil = format!("--base {} --out run --batch 1 --train-steps 1", base.display());
    let few = finish(mpirun(2, cwd)?.args(distil.split_whitespace()))?;
    ensure!(few.code != Some(0) && few.stderr.contains("at least 2: each of the 2 ranks"), "{few:?}");
    ensure!(!cwd.join("run").exists(), "a run was begun");
    let alone = finish(mpirun(2, cwd)?.args(["bases"]))?;
    ensure!(alone.code == Some(2) && alone.stderr.contains("this command works alone"), "{alone:?}");

    // Without MPI in the program each of the processes would train on its own.
    let with = |program: PathBuf, variable: &str| -> Result<Finished> {
        let mut command = Command::new(program);
        finish(command.args(distil.split_whitespace()).env(variable, "2").current_dir(cwd))
    };
    for variable in ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"] {
        let says = [variable, "this build has no MPI", "hint: ", "--features mpi"];
        refused(&with(binary("dmd-distill")?, variable)?, &says)?;
    }
    // A launcher that this MPI does not know: it would see one rank in each process.
    let foreign = with(program()?, "SLURM_STEP_NUM_TASKS")?;
    refused(
        &foreign,
        &["got 1 from MPI as the number of ranks, expected 2 by SLURM_STEP_NUM_TASKS", "srun --mpi=pmix"],
    )?;
    ensure!(!cwd.join("run").exists(), "a run was begun");
    Ok(())
}
