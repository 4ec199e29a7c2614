//! What happens to files when a process dies, a disk is full, a folder is read-only, a clock jumps or two processes meet: every file
//! is the old one or the new one, and what goes on afterwards ends like an undisturbed run, to the bit.
//!
//! `DMD_KILLS=100` kills a hundred times instead of a few; `scripts/faults` does that and writes the table of docs/reliability.md.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use dmd_tests::{Finished, binary, fixture, refused, run_bin};
use image::{Rgb, RgbImage};
use prost::Message;
use safetensors::SafeTensors;
use tract_onnx::pb::ModelProto;

/// Kills of all stages together, in a short test.
const FEW: usize = 8;

/// Work that is done in one command, or in several that end early.
struct Stage {
    name: &'static str,
    program: &'static str,
    begin: Vec<String>,
    /// Continues in the folder `out`; the first command again where that is how it goes on.
    resume: Vec<String>,
    /// Files and folders that the work makes.
    results: &'static [&'static str],
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

fn base(name: &str) -> Result<String> {
    Ok(fixture(name).to_str().context("the path is not UTF-8")?.to_owned())
}

/// The four commands that write for a long time, each in a version of a second.
fn stages() -> Result<[Stage; 4]> {
    let (plain, class) = (base("tiny-ddpm")?, base("tiny-class")?);
    let distil = "--out out --train-steps 12 --batch 4 --pairs 8 --pair-steps 2 --fake-updates 2 --save-every 1 \
                  --sample-every 3 --warmup 2 --pairs-dir pairs";
    let pairs = format!("pairs --base {plain} --count 600 --steps 3 --out out");
    let export = format!("out/model.onnx --from {plain} --teacher --golden --force");
    Ok([
        Stage {
            name: "teacher",
            program: "dmd-distill",
            begin: words(
                "teacher --base ddpm-celeba --data faces --out out --train-steps 8 --batch 2 --save-every 1 \
                 --sample-every 3 --samples 1 --sample-steps 2",
            ),
            resume: words("teacher --resume out"),
            results: &["run.json", "stats.jsonl", "checkpoints", "samples", "teacher"],
        },
        Stage {
            name: "pairs",
            program: "dmd-distill",
            begin: words(&pairs),
            resume: words(&pairs),
            results: &[
                "pairs.json",
                "shard-00000.safetensors",
                "shard-00001.safetensors",
                "shard-00002.safetensors",
            ],
        },
        Stage {
            name: "distil",
            program: "dmd-distill",
            begin: words(&format!("--base {class} {distil}")),
            resume: words("--resume out"),
            results: &["run.json", "stats.jsonl", "checkpoints", "samples", "teacher", "generator"],
        },
        Stage {
            name: "export",
            program: "dmd-export",
            begin: words(&export),
            resume: words(&export),
            results: &["model.onnx", "model.golden.safetensors"],
        },
    ])
}

impl Stage {
    /// A folder in which the stage can begin.
    fn prepare(&self, cwd: &Path) -> Result<()> {
        let _ = fs::remove_dir_all(cwd.join("out"));
        let faces = cwd.join("faces");
        fs::create_dir_all(&faces)?;
        for i in 0..3u8 {
            RgbImage::from_fn(40, 40, |x, y| Rgb([x as u8 * 5, y as u8 * 4, 80 * i]))
                .save(faces.join(format!("{i}.png")))?;
        }
        if self.name == "export" {
            // What is there before is another model, whole.
            fs::create_dir_all(cwd.join("out"))?;
            let line = format!("out/model.onnx --from {} --teacher --golden", base("tiny-class")?);
            let done = run_bin(self.program, cwd, words(&line))?;
            ensure!(done.code == Some(0), "{done:?}");
        }
        Ok(())
    }

    fn arguments(&self, cwd: &Path) -> &[String] {
        let begun = ["run.json", "pairs.json"].iter().any(|file| cwd.join("out").join(file).exists());
        if begun { &self.resume } else { &self.begin }
    }

    fn spawn(&self, cwd: &Path) -> Result<Child> {
        let mut command = Command::new(binary(self.program)?);
        command.args(self.arguments(cwd)).current_dir(cwd).stdin(Stdio::null()).stdout(Stdio::null());
        Ok(command.stderr(File::create(cwd.join("log"))?).spawn()?)
    }

    fn run(&self, cwd: &Path) -> Result<Finished> {
        run_bin(self.program, cwd, self.arguments(cwd))
    }

    /// What the stage makes, by path.
    fn results(&self, cwd: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
        let out = cwd.join("out");
        let mut all = Vec::new();
        for result in self.results {
            let path = out.join(result);
            ensure!(path.exists(), "there is no `{}`", path.display());
            files(&path, &mut all)?;
        }
        all.into_iter().map(|path| Ok((path.strip_prefix(&out)?.to_owned(), fs::read(&path)?))).collect()
    }
}

/// All files below a path, or the file itself.
fn files(path: &Path, all: &mut Vec<PathBuf>) -> Result<()> {
    if !path.is_dir() {
        all.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        files(&entry?.path(), all)?;
    }
    Ok(())
}

/// Every file that has its final name is whole. Names that begin with a dot are what was being written.
fn whole(folder: &Path) -> Result<usize> {
    let (mut all, mut checked) = (Vec::new(), 0);
    if folder.exists() {
        files(folder, &mut all)?;
    }
    for path in all {
        let names = || path.strip_prefix(folder).into_iter().flatten().map(|name| name.to_string_lossy());
        if names().any(|name| name.starts_with('.')) {
            continue;
        }
        let bytes = fs::read(&path)?;
        let extension = path.extension().unwrap_or_default().to_string_lossy();
        let problem = match &*extension {
            "json" => serde_json::from_slice::<serde_json::Value>(&bytes).err().map(|e| e.to_string()),
            "safetensors" => SafeTensors::deserialize(&bytes).err().map(|e| e.to_string()),
            "png" => image::load_from_memory(&bytes).err().map(|e| e.to_string()),
            "onnx" => ModelProto::decode(&*bytes).err().map(|e| e.to_string()),
            "jsonl" => {
                let text = String::from_utf8_lossy(&bytes);
                let complete = text.rsplit_once('\n').map_or("", |(complete, _)| complete);
                complete
                    .lines()
                    .find_map(|l| serde_json::from_str::<serde_json::Value>(l).err())
                    .map(|e| e.to_string())
            }
            "html" => (!bytes.trim_ascii_end().ends_with(b"</table>")).then(|| "it is cut off".to_owned()),
            "" if path.ends_with("lock") => None,
            other => bail!("`{}`: files of the kind `{other}` are not checked", path.display()),
        };
        ensure!(problem.is_none(), "`{}`: {}", path.display(), problem.unwrap_or_default());
        checked += 1;
    }
    Ok(checked)
}

/// Numbers of a fixed sequence (xorshift64*), in [0, 1).
struct Dice(u64);

impl Dice {
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// How many kills a test makes.
fn kills() -> Result<usize> {
    Ok(std::env::var("DMD_KILLS").ok().map(|n| n.parse()).transpose()?.unwrap_or(FEW))
}

/// Kills the stage `wanted` times, each time at a moment of its own within the time that an undisturbed run takes, and continues it
/// each time; what it ends with is compared with that run. Prints what happened.
fn kill(stage: &Stage, wanted: usize, dice: &mut Dice) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cwd = folder.path();
    stage.prepare(cwd)?;
    let old = if stage.name == "export" { stage.results(cwd)? } else { BTreeMap::new() };
    let started = Instant::now();
    let done = stage.run(cwd)?;
    let time = started.elapsed();
    ensure!(done.code == Some(0), "{}: {done:?}", stage.name);
    let expected = stage.results(cwd)?;
    let (mut killed, mut finished, mut checked) = (0, 0, 0);
    stage.prepare(cwd)?;
    while killed < wanted {
        let mut process = stage.spawn(cwd)?;
        std::thread::sleep(time.mul_f64(dice.unit()));
        process.kill()?;
        let ended = process.wait()?;
        checked += whole(&cwd.join("out"))?;
        for (path, bytes) in &old {
            let now = fs::read(cwd.join("out").join(path))?;
            let known = now == *bytes || expected.get(path) == Some(&now);
            ensure!(known, "`{}` is neither the old one nor the new one", path.display());
        }
        match ended.code() {
            None => killed += 1,
            Some(0) => {
                same(stage, cwd, &expected)?;
                finished += 1;
                stage.prepare(cwd)?;
            }
            Some(code) => bail!("{}: exit code {code}: {}", stage.name, fs::read_to_string(cwd.join("log"))?),
        }
    }
    let done = stage.run(cwd)?;
    ensure!(done.code == Some(0), "{}: {done:?}", stage.name);
    same(stage, cwd, &expected)?;
    println!("figure {}_kills {killed}", stage.name);
    println!("figure {}_runs_completed_and_identical {}", stage.name, finished + 1);
    println!("figure {}_files_checked {checked}", stage.name);
    Ok(())
}

fn same(stage: &Stage, cwd: &Path, expected: &BTreeMap<PathBuf, Vec<u8>>) -> Result<()> {
    let got = stage.results(cwd)?;
    let names = |all: &BTreeMap<PathBuf, Vec<u8>>| all.keys().cloned().collect::<Vec<_>>();
    ensure!(
        names(&got) == names(expected),
        "{}: {:?}, expected {:?}",
        stage.name,
        names(&got),
        names(expected)
    );
    let differs = got.iter().find(|(path, bytes)| expected.get(*path) != Some(bytes));
    ensure!(
        differs.is_none(),
        "{}: `{}` differs",
        stage.name,
        differs.map_or(Path::new(""), |(p, _)| p).display()
    );
    Ok(())
}

#[test]
fn a_killed_process_leaves_whole_files_and_can_be_continued() -> Result<()> {
    let (wanted, mut dice) = (kills()?, Dice(20_240_513));
    let stages = stages()?;
    for (i, stage) in stages.iter().enumerate() {
        kill(stage, (wanted + i) / stages.len(), &mut dice)
            .with_context(|| format!("stage {}", stage.name))?;
    }
    Ok(())
}

/// Runs a stage through a shell that does something first; the shell's `$0` and `$@` are the command.
#[cfg(unix)]
fn under(shell: &str, stage: &Stage, cwd: &Path) -> Result<Finished> {
    let mut command = Command::new("sh");
    command.args(["-c", shell]).arg(binary(stage.program)?).args(stage.arguments(cwd));
    let output = command.current_dir(cwd).stdin(Stdio::null()).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Finished { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) })
}

/// Writes fail from so many kilobytes on, as on a full disk, at several stages of the work; with space again it goes on.
#[test]
#[cfg(unix)]
fn a_full_disk_is_an_error_and_loses_nothing() -> Result<()> {
    for stage in stages()? {
        let folder = tempfile::tempdir()?;
        let cwd = folder.path();
        stage.prepare(cwd)?;
        let before = whole(&cwd.join("out"))?;
        for kilobytes in [0, 4, 40, 200] {
            // Blocks of 512 bytes; the signal that would end the process becomes an error of the write.
            let shell = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", 2 * kilobytes);
            let full = under(&shell, &stage, cwd)?;
            refused(&full, &["cannot write"]).with_context(|| format!("{}, {kilobytes} kB", stage.name))?;
            whole(&cwd.join("out")).with_context(|| format!("{}, {kilobytes} kB", stage.name))?;
        }
        ensure!(whole(&cwd.join("out"))? >= before);
        let done = stage.run(cwd)?;
        ensure!(done.code == Some(0), "{}: {done:?}", stage.name);
        let got = stage.results(cwd)?;
        let left: Vec<PathBuf> = got.keys().filter(|p| p.to_string_lossy().contains("/.")).cloned().collect();
        ensure!(left.is_empty(), "{}: {left:?} are left", stage.name);
        stage.prepare(cwd)?;
        ensure!(stage.run(cwd)?.code == Some(0));
        same(&stage, cwd, &got)?;
    }
    Ok(())
}

/// A file system of its own that has room for a part of the work only; what is left there is continued where there is room.
#[test]
#[cfg(target_os = "linux")]
fn a_full_file_system_is_an_error_and_loses_nothing() -> Result<()> {
    // Root of the system, or of a name space where the system allows that.
    let unshare = "unshare --map-root-user --mount";
    if !Command::new("sh").args(["-c", &format!("{unshare} true")]).output()?.status.success() {
        println!("left out: this user cannot mount a file system (`{unshare} true`)");
        return Ok(());
    }
    let pages = |path: &Path| -> Result<u64> {
        let mut all = Vec::new();
        files(path, &mut all)?;
        all.iter().try_fold(0, |sum, file| Ok(sum + fs::metadata(file)?.len().div_ceil(4096)))
    };
    for stage in stages()? {
        let folder = tempfile::tempdir()?;
        let (cwd, kept) = (folder.path().join("work"), folder.path().join("kept"));
        fs::create_dir(&cwd)?;
        stage.prepare(&cwd)?;
        let before = pages(&cwd)?;
        ensure!(stage.run(&cwd)?.code == Some(0));
        let expected = stage.results(&cwd)?;
        // Whoever replaces a file needs room for both.
        let needed = (pages(&cwd)? - before).max(before);
        for quarter in 0..4 {
            let kilobytes = 4 * (before + 1 + needed * quarter / 4);
            fs::remove_dir_all(&cwd)?;
            fs::create_dir(&cwd)?;
            stage.prepare(&cwd)?;
            // The same path, so that results are the same; what is left is copied to where there is room.
            let within = format!(
                "cp -R . ../kept && mount -t tmpfs -o size={kilobytes}k dmd . && cd \"$PWD\" && cp -R ../kept/. . || exit 3; \
                 \"$0\" \"$@\"; code=$?; rm -r ../kept && cp -R . ../kept; exit $code"
            );
            let full = under(&format!("exec {unshare} sh -c '{within}' \"$0\" \"$@\""), &stage, &cwd)?;
            let place = || format!("{}, {kilobytes} kB", stage.name);
            refused(&full, &["cannot ", "No space left on device"]).with_context(place)?;
            fs::remove_dir_all(&cwd)?;
            fs::rename(&kept, &cwd)?;
            whole(&cwd.join("out")).with_context(place)?;
            let done = stage.run(&cwd)?;
            ensure!(done.code == Some(0), "{}: {done:?}", place());
            same(&stage, &cwd, &expected).with_context(place)?;
        }
    }
    Ok(())
}

/// The work is done all the same, and a refusal keeps its exit code.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_behind_the_log_stops_nothing() -> Result<()> {
    let shell = "exec \"$0\" \"$@\" 2>/dev/full";
    for stage in stages()? {
        let folder = tempfile::tempdir()?;
        let cwd = folder.path();
        stage.prepare(cwd)?;
        let done = under(shell, &stage, cwd)?;
        ensure!(done.code == Some(0), "{}: {done:?}", stage.name);
        let got = stage.results(cwd)?;
        stage.prepare(cwd)?;
        ensure!(stage.run(cwd)?.code == Some(0));
        same(&stage, cwd, &got)?;
    }
    let folder = tempfile::tempdir()?;
    for (arguments, code) in
        [(&["--count", "2", "-o", "x.png"][..], 0), (&["missing.onnx", "-o", "y.png"], 2)]
    {
        let mut command = Command::new("sh");
        command.args(["-c", shell]).arg(binary("dmd-run")?).args(arguments).current_dir(folder.path());
        let done = command.stdin(Stdio::null()).output()?;
        ensure!(done.status.code() == Some(code), "{arguments:?}: {done:?}");
    }
    Ok(())
}

/// A read-only folder is said to be one, before any work. Root may write everywhere, so a read-only mount stands in for it.
#[test]
#[cfg(target_os = "linux")]
fn a_read_only_folder_is_an_error() -> Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    for stage in stages()? {
        let folder = tempfile::tempdir()?;
        let cwd = folder.path();
        stage.prepare(cwd)?;
        let root = fs::metadata("/proc/self")?.uid() == 0;
        let shell = match root {
            true => {
                "exec unshare -m sh -c 'mount --bind . . && mount -o remount,bind,ro . && cd \"$PWD\" && exec \"$0\" \"$@\"' \
                 \"$0\" \"$@\""
            }
            false => "exec \"$0\" \"$@\"",
        };
        if !root {
            fs::set_permissions(cwd, fs::Permissions::from_mode(0o555))?;
        }
        let locked = under(shell, &stage, cwd);
        fs::set_permissions(cwd, fs::Permissions::from_mode(0o755))?;
        refused(&locked?, &["cannot ", "out"]).with_context(|| stage.name)?;
    }
    Ok(())
}

#[test]
fn one_process_at_a_time_works_on_a_run() -> Result<()> {
    let [teacher, _, distil, _] = stages()?;
    for mut stage in [teacher, distil] {
        let folder = tempfile::tempdir()?;
        let cwd = folder.path();
        stage.prepare(cwd)?;
        let at = stage.begin.iter().position(|word| word == "--train-steps").context("no steps")?;
        stage.begin[at + 1] = "100000".to_owned();
        let mut first = stage.spawn(cwd)?;
        let deadline = Instant::now() + Duration::from_secs(300);
        while !cwd.join("out/checkpoints").exists() {
            ensure!(Instant::now() < deadline && first.try_wait()?.is_none(), "{}: no state", stage.name);
            std::thread::sleep(Duration::from_millis(5));
        }
        let owner = format!("process {}", first.id());
        let second = stage.run(cwd);
        first.kill()?;
        first.wait()?;
        refused(&second?, &[&owner, stage.program, "one process at a time", "hint: wait"])?;
        // The lock ends with its owner.
        let steps = words("--train-steps 30000 --dry-run");
        stage.resume = match stage.name {
            "distil" => [stage.resume, steps].concat(),
            _ => [stage.resume, words("--train-steps 0")].concat(),
        };
        let after = stage.run(cwd)?;
        ensure!(!after.stderr.contains("one process at a time"), "{after:?}");
    }
    Ok(())
}

/// Files of the future and of the past: nothing is decided by a clock.
#[test]
fn a_clock_that_jumps_changes_nothing() -> Result<()> {
    let [_, _, distil, _] = stages()?;
    let folder = tempfile::tempdir()?;
    let cwd = folder.path();
    distil.prepare(cwd)?;
    let mut process = distil.spawn(cwd)?;
    let deadline = Instant::now() + Duration::from_secs(300);
    while !cwd.join("out/checkpoints/state.safetensors").exists() {
        ensure!(Instant::now() < deadline && process.try_wait()?.is_none(), "no state was saved");
        std::thread::sleep(Duration::from_millis(2));
    }
    process.kill()?;
    process.wait()?;
    let mut all = Vec::new();
    files(cwd, &mut all)?;
    let year = Duration::from_secs(365 * 86_400);
    for (i, path) in all.iter().enumerate() {
        let when = if i % 2 == 0 { SystemTime::now() + 50 * year } else { SystemTime::UNIX_EPOCH + year };
        File::options().append(true).open(path)?.set_modified(when)?;
    }
    let done = distil.run(cwd)?;
    ensure!(done.code == Some(0), "{done:?}");
    let got = distil.results(cwd)?;
    distil.prepare(cwd)?;
    ensure!(distil.run(cwd)?.code == Some(0));
    same(&distil, cwd, &got)
}
