//! What the tests of all crates share: golden data, fixtures, and the built binaries.
//! Must not contain a test, nor anything that computes an expected value.

pub mod hub;
pub mod operations;
pub mod seeded;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dmd_core::compare::{Tolerance, close};
use safetensors::{Dtype, SafeTensors};

/// Largest gradient of a parameter without effect in f64, as goldens have it, and in f32.
const F64_NOISE: f32 = 1e-11;
const F32_NOISE: f32 = 1e-6;

/// The contents of one file of `tests/golden`, by tensor name.
#[derive(Clone, Debug)]
pub struct Golden {
    name: String,
    tensors: BTreeMap<String, Stored>,
    cases: Option<serde_json::Value>,
}

/// A tensor of f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Size of each axis.
    pub shape: Vec<usize>,
    /// Values, last axis fastest.
    pub data: Vec<f32>,
}

/// What a finished program left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Exit code; none where a signal ended the program.
    pub code: Option<i32>,
    /// Standard output, invalid UTF-8 replaced.
    pub stdout: String,
    /// Standard error, invalid UTF-8 replaced.
    pub stderr: String,
}

#[derive(Clone, Debug)]
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Golden {
    /// Reads `tests/golden/NAME.safetensors`.
    ///
    /// # Errors
    /// If the file is missing or is not safetensors.
    pub fn load(name: &str) -> Result<Self> {
        Self::read(&repository().join("tests/golden").join(format!("{name}.safetensors")))
    }

    /// Reads any safetensors file, such as a fixture's weights.
    ///
    /// # Errors
    /// If the file is missing or is not safetensors.
    pub fn read(path: &Path) -> Result<Self> {
        let shown = path.display();
        let bytes = std::fs::read(path).with_context(|| format!("cannot read `{shown}`"))?;
        let (_, header) =
            SafeTensors::read_metadata(&bytes).with_context(|| format!("cannot parse `{shown}`"))?;
        let cases = match header.metadata().as_ref().and_then(|entries| entries.get("cases")) {
            Some(text) => Some(serde_json::from_str(text).with_context(|| format!("`cases` of `{shown}`"))?),
            None => None,
        };
        let tensors = SafeTensors::deserialize(&bytes)
            .with_context(|| format!("cannot parse `{shown}`"))?
            .iter()
            .map(|(key, view)| {
                let (dtype, shape) = (view.dtype(), view.shape().to_vec());
                (key.to_owned(), Stored { dtype, shape, bytes: view.data().to_vec() })
            })
            .collect();
        Ok(Self { name: shown.to_string(), tensors, cases })
    }

    /// All tensor names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// What follows `prefix` in the names that start with it, in order.
    pub fn names_under<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.names().filter_map(move |name| name.strip_prefix(prefix))
    }

    /// Whether a tensor of this name exists.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Size of each axis.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.stored(name)?.shape)
    }

    /// Values and shape of an f32 tensor.
    ///
    /// # Errors
    /// If there is no such tensor or it is not f32.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        Ok(Tensor { shape: self.shape(name)?.to_vec(), data: self.f32(name)? })
    }

    /// Values of an f32 tensor, last axis fastest.
    ///
    /// # Errors
    /// If there is no such tensor or it is not f32.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>> {
        self.values(name, Dtype::F32, f32::from_le_bytes)
    }

    /// Values of an f64 tensor, last axis fastest.
    ///
    /// # Errors
    /// If there is no such tensor or it is not f64.
    pub fn f64(&self, name: &str) -> Result<Vec<f64>> {
        self.values(name, Dtype::F64, f64::from_le_bytes)
    }

    /// Values of an int64 tensor, last axis fastest.
    ///
    /// # Errors
    /// If there is no such tensor or it is not int64.
    pub fn i64(&self, name: &str) -> Result<Vec<i64>> {
        self.values(name, Dtype::I64, i64::from_le_bytes)
    }

    /// The parameters of the cases, from the file's header.
    ///
    /// # Errors
    /// If the header has none.
    pub fn cases(&self) -> Result<&serde_json::Value> {
        self.cases.as_ref().with_context(|| format!("`{}` has no `cases` in its header", self.name))
    }

    fn stored(&self, name: &str) -> Result<&Stored> {
        self.tensors.get(name).with_context(|| format!("`{}` has no tensor `{name}`", self.name))
    }

    fn values<T, const N: usize>(
        &self,
        name: &str,
        dtype: Dtype,
        decode: fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let stored = self.stored(name)?;
        ensure!(
            stored.dtype == dtype,
            "tensor `{name}` of `{}`: got {:?}, expected {dtype:?}",
            self.name,
            stored.dtype
        );
        Ok(stored.bytes.as_chunks().0.iter().map(|bytes| decode(*bytes)).collect())
    }
}

/// The root of the repository.
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// A folder or file of `tests/fixtures`.
pub fn fixture(name: &str) -> PathBuf {
    repository().join("tests/fixtures").join(name)
}

/// Reads a text file of the repository, with the path in the error.
///
/// # Errors
/// If the file is missing or is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))
}

/// [`close`] with the name of what is compared in the error.
///
/// # Errors
/// If an element is outside the tolerance.
pub fn compare(what: &str, got: &[f32], expected: &[f32], tolerance: Tolerance) -> Result<()> {
    close(got, expected, tolerance).with_context(|| format!("`{what}`"))
}

/// [`compare`] for values whose size is arbitrary, such as gradients: the error allowed is `relative` times the
/// largest expected value, and at least `floor`.
///
/// # Errors
/// If an element is outside the tolerance.
pub fn compare_scaled(what: &str, got: &[f32], expected: &[f32], relative: f32, floor: f32) -> Result<()> {
    let largest = expected.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
    compare(what, got, expected, Tolerance { abs: (relative * largest).max(floor), rel: 0.0 })
}

/// [`compare`] for the gradient of the parameter or input `name`: the error allowed is `relative` times the largest
/// expected value. Of a gradient that is 0 in exact arithmetic f32 leaves rounding noise, whose size is bounded
/// (tests/golden/README.md).
///
/// # Errors
/// If an element is outside the tolerance.
pub fn compare_gradient(what: &str, name: &str, got: &[f32], expected: &[f32], relative: f32) -> Result<()> {
    let zero = expected.iter().all(|v| v.abs() <= F64_NOISE);
    let floor = if zero { F32_NOISE } else { 0.0 };
    compare_scaled(&format!("{what}, gradient of {name}"), got, expected, relative, floor)
}

/// The built binary `name` of another package of the workspace, from the profile that this test was built in.
///
/// # Errors
/// If it has not been built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe().context("cannot find the running test")?;
    let profile = test.ancestors().nth(2).context("the running test lies in no target directory")?;
    let path = profile.join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    if !path.is_file() {
        let flag = if profile.ends_with("release") { " --release" } else { "" };
        bail!("`{}` is not built\n\nhint: cargo build{flag} --bin {name}", path.display());
    }
    Ok(path)
}

/// A program that refuses what it was asked for: exit code 2, nothing on standard output, and an error that says all this.
///
/// # Errors
/// If it did anything else.
pub fn refused(finished: &Finished, says: &[&str]) -> Result<()> {
    ensure!(finished.code == Some(2) && finished.stdout.is_empty(), "got {finished:?}");
    for text in std::iter::once(&"error: ").chain(says) {
        ensure!(finished.stderr.contains(text), "`{text}` is not in: {}", finished.stderr);
    }
    Ok(())
}

/// Runs the built binary `name` in the folder `cwd` and waits for it. Standard input is empty.
///
/// # Errors
/// If it has not been built or cannot be started; its own failure is in [`Finished::code`].
pub fn run_bin<A: AsRef<OsStr>>(
    name: &str,
    cwd: &Path,
    args: impl IntoIterator<Item = A>,
) -> Result<Finished> {
    finish(start_bin(name, cwd, args)?)
}

/// Ctrl-C for `dmd-distill` in the folder `cwd` as soon as `begun` holds.
///
/// # Errors
/// If it does not hold within two minutes, or the program ended before; its own failure is in [`Finished::code`].
pub fn interrupt_distill<A: AsRef<OsStr>>(
    cwd: &Path,
    args: impl IntoIterator<Item = A>,
    begun: impl Fn() -> bool,
) -> Result<Finished> {
    let mut process = start_bin("dmd-distill", cwd, args)?;
    let deadline = Instant::now() + Duration::from_secs(120);
    while !begun() {
        if process.try_wait()?.is_some() || Instant::now() > deadline {
            process.kill()?;
            bail!("never got to where it was to be interrupted: {:?}", finish(process)?);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    ensure!(Command::new("kill").args(["-INT", &process.id().to_string()]).status()?.success(), "kill");
    finish(process)
}

fn start_bin<A: AsRef<OsStr>>(name: &str, cwd: &Path, args: impl IntoIterator<Item = A>) -> Result<Child> {
    Command::new(binary(name)?)
        .args(args)
        .current_dir(cwd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{name}` in `{}`", cwd.display()))
}

fn finish(process: Child) -> Result<Finished> {
    let output = process.wait_with_output()?;
    Ok(Finished {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
