//! The C library: its header is what cbindgen writes, a C program draws the pictures of the Rust library from several
//! threads, and every mistake of a caller gets a code and a text.
#![expect(unsafe_code, reason = "the functions are called as C calls them")]

use std::ffi::{CStr, CString, c_char};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::{null, null_mut};

use anyhow::{Context, Result, bail, ensure};
use dmd::DmdStatus as Status;
use dmd_runtime_native::{Class, Generator, Options, Provider, Request};
use dmd_tests::repository;
use tempfile::TempDir;

fn crate_folder() -> PathBuf {
    repository().join("runtime-native/c")
}

fn model() -> PathBuf {
    repository().join("assets/one-step-fashion.onnx")
}

/// The folder of the shared library that cargo built for this test.
fn library_folder() -> Result<PathBuf> {
    let folder = std::env::current_exe()?.parent().context("the test lies in no folder")?.to_owned();
    let name = format!("{}dmd{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    ensure!(folder.join(&name).is_file(), "`{name}` is not in `{}`", folder.display());
    Ok(folder)
}

fn finished(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

fn compiler(language: &str, standard: &str) -> Command {
    let mut command = Command::new("cc");
    command.args(["-x", language, standard, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I"]);
    command.arg(crate_folder().join("include"));
    command
}

#[test]
fn the_header_is_what_cbindgen_writes() -> Result<()> {
    let config = cbindgen::Config::from_file(crate_folder().join("cbindgen.toml"));
    let bindings = cbindgen::Builder::new()
        .with_config(config.map_err(anyhow::Error::msg)?)
        .with_src(crate_folder().join("src/lib.rs"))
        .generate()?;
    let mut expected = Vec::new();
    bindings.write(&mut expected);
    let path = crate_folder().join("include/dmd.h");
    if std::fs::read(&path).unwrap_or_default() != expected {
        let current = std::env::temp_dir().join("dmd.h");
        std::fs::write(&current, expected)?;
        bail!(
            "`{}` is not what src/lib.rs says\n\nhint: cp {} {}",
            path.display(),
            current.display(),
            path.display()
        );
    }
    Ok(())
}

#[test]
fn the_header_is_valid_c_and_cpp() -> Result<()> {
    let dir = TempDir::new()?;
    let source = dir.path().join("header.c");
    std::fs::write(
        &source,
        "#include \"dmd.h\"\n#include \"dmd.h\"\nint main(void) { return DMD_STATUS_OK; }\n",
    )?;
    for (language, standard) in [("c", "-std=c99"), ("c++", "-std=c++11")] {
        finished(compiler(language, standard).args(["-fsyntax-only".as_ref(), source.as_os_str()]))?;
    }
    Ok(())
}

#[test]
fn the_c_example_draws_what_the_rust_library_draws() -> Result<()> {
    let (dir, library) = (TempDir::new()?, library_folder()?);
    let program = dir.path().join("generate");
    let mut compile = compiler("c", "-std=c99");
    compile.arg(crate_folder().join("examples/generate.c")).arg("-o").arg(&program);
    finished(compile.arg("-L").arg(&library).args(["-x", "none", "-ldmd", "-lpthread"]))?;
    let run = |seed: &str, count: &str, threads: &str| -> Result<Vec<u8>> {
        let mut command = Command::new(&program);
        finished(command.arg(model()).args([seed, count, threads]).env("LD_LIBRARY_PATH", &library))
    };
    let options = Options { provider: Provider::Engine, ..Options::default() };
    let generator = Generator::open(&model(), &options)?;
    for (seed, count, threads) in [(7, 13, 4), (4_294_967_295, 2, 1)] {
        let images = generator.generate(seed, count, Class::Cycle)?;
        let pixels: Vec<u8> = images.pixels().into_iter().flat_map(|image| image.data).collect();
        let expected = [format!("P5\n28 {}\n255\n", 28 * count).as_bytes(), &pixels].concat();
        let got = run(&seed.to_string(), &count.to_string(), &threads.to_string())?;
        ensure!(
            got == expected,
            "seed {seed}: {} bytes of C are not the {} of Rust",
            got.len(),
            expected.len()
        );
    }
    let missing = Command::new(&program)
        .args(["none.onnx", "0", "1", "1"])
        .env("LD_LIBRARY_PATH", &library)
        .output()?;
    let stderr = String::from_utf8_lossy(&missing.stderr);
    ensure!(missing.status.code() == Some(2) && stderr.contains("cannot read `none.onnx`"), "{stderr}");
    Ok(())
}

/// A generator that closes itself.
struct Open(*mut dmd::DmdGenerator);

impl Drop for Open {
    fn drop(&mut self) {
        // SAFETY: it was opened and is closed once.
        unsafe { dmd::dmd_close(self.0) }
    }
}

fn open(path: &Path, provider: &CStr) -> Result<Result<Open, Status>> {
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    let mut generator = null_mut();
    // SAFETY: texts end in zero, and the result has its place.
    let status = unsafe { dmd::dmd_open(path.as_ptr(), provider.as_ptr(), 1, null(), &mut generator) };
    ensure!((status == Status::Ok) != generator.is_null(), "{status:?} with {generator:?}");
    Ok(if status == Status::Ok { Ok(Open(generator)) } else { Err(status) })
}

fn last_error() -> String {
    // SAFETY: the text is never null and ends in zero.
    unsafe { CStr::from_ptr(dmd::dmd_last_error()) }.to_string_lossy().into_owned()
}

#[test]
fn a_generator_in_memory_has_shape_info_and_values() -> Result<()> {
    let bytes = std::fs::read(model())?;
    let mut raw = null_mut();
    // SAFETY: the bytes are there, and the result has its place.
    let status =
        unsafe { dmd::dmd_open_memory(bytes.as_ptr(), bytes.len(), c"engine".as_ptr(), 2, null(), &mut raw) };
    ensure!(status == Status::Ok, "{}", last_error());
    let generator = Open(raw);
    let mut shape = [0usize; 3];
    // SAFETY: the generator is open, the buffer has three numbers.
    ensure!(unsafe { dmd::dmd_shape(generator.0, shape.as_mut_ptr()) } == Status::Ok);
    ensure!(shape == [1, 28, 28]);
    // SAFETY: the generator is open, and its text lives as long.
    let info = unsafe { CStr::from_ptr(dmd::dmd_info(generator.0)) }.to_str()?;
    let info: serde_json::Value = serde_json::from_str(info)?;
    ensure!(info["provider"] == "engine" && info["card"]["classes"]["count"] == 10, "{info}");

    let len = 3 * 784;
    let mut values = vec![f32::NAN; len + 1];
    // SAFETY: the generator is open, the buffer as long as said.
    let status = unsafe { dmd::dmd_generate_values(generator.0, 5, 8, 3, 4, values.as_mut_ptr(), len + 1) };
    ensure!(status == Status::Ok, "{}", last_error());
    let options = Options { provider: Provider::Engine, ..Options::default() };
    let request = Request { first: 8, class: Class::One(4), ..Request::new(5, 3) };
    let expected = Generator::open(&model(), &options)?.sample(&request, &|_| {})?;
    ensure!(values[..len] == expected.values && values[len].is_nan());
    Ok(())
}

#[test]
fn a_callers_mistakes_get_a_code_and_a_text() -> Result<()> {
    let dir = TempDir::new()?;
    let text = dir.path().join("text.onnx");
    std::fs::write(&text, "# not a model\n")?;
    for (path, provider, status, says) in [
        (text.as_path(), c"engine", Status::InvalidModel, "not an ONNX model"),
        (Path::new("none.onnx"), c"engine", Status::InvalidModel, "cannot read `none.onnx`: No such file"),
        (&model(), c"rocm", Status::InvalidText, "got provider `rocm`"),
        (&model(), c"\xff", Status::InvalidText, "`provider` is not UTF-8"),
        (&model(), c"tensorrt", Status::ProviderUnavailable, "provider `tensorrt` is not available"),
    ] {
        let got = open(path, provider)?.err();
        ensure!(got == Some(status) && last_error().contains(says), "{says}: {got:?} {}", last_error());
    }
    let name = |text: &'static CStr| -> *const c_char { text.as_ptr() };
    let mut raw = null_mut();
    let bytes = [0u8; 4];
    // SAFETY: every pointer is null or what the function asks for.
    let nulls = unsafe {
        [
            (dmd::dmd_open(null(), null(), 0, null(), &mut raw), last_error(), "`path` is null"),
            (dmd::dmd_open(name(c"m"), null(), 0, null(), null_mut()), last_error(), "`generator` is null"),
            (dmd::dmd_open_memory(null(), 4, null(), 0, null(), &mut raw), last_error(), "`bytes` is null"),
            (dmd::dmd_shape(null(), [0; 3].as_mut_ptr()), last_error(), "`generator` is null"),
            (
                dmd::dmd_generate_pixels(null(), 0, 0, 1, -1, null_mut(), 0),
                last_error(),
                "`generator` is null",
            ),
        ]
    };
    for (status, text, says) in nulls {
        ensure!(status == Status::NullPointer && text == says, "{says}: {status:?} {text}");
    }
    // SAFETY: as above.
    unsafe {
        ensure!(dmd::dmd_info(null()).is_null());
        dmd::dmd_close(null_mut());
        let status = dmd::dmd_open_memory(bytes.as_ptr(), usize::MAX, null(), 0, null(), &mut raw);
        ensure!(status == Status::InvalidRequest && raw.is_null(), "{status:?}");
        let status = dmd::dmd_open_memory(bytes.as_ptr(), 4, null(), 0, null(), &mut raw);
        ensure!(status == Status::InvalidModel && raw.is_null(), "{status:?}");
    }

    let Ok(generator) = open(&model(), c"engine")? else { bail!("{}", last_error()) };
    let mut pixels = [7u8; 784];
    for (count, class, len, status, says) in [
        (1, -1, 783, Status::BufferTooSmall, "got room for 783 values in `pixels`, expected at least 784"),
        (0, -1, 784, Status::InvalidRequest, "got 0 images"),
        (usize::MAX, -1, 784, Status::InvalidRequest, "images, which fit nowhere"),
        (1, -2, 784, Status::InvalidRequest, "got class -2"),
        (1, 10, 784, Status::InvalidRequest, "got class 10, expected 0 to 9"),
    ] {
        let at = pixels.as_mut_ptr();
        // SAFETY: the generator is open, the buffer at least as long as said.
        let got = unsafe { dmd::dmd_generate_pixels(generator.0, 0, 0, count, class, at, len) };
        ensure!(got == status && last_error().contains(says), "{says}: {got:?} {}", last_error());
    }
    // SAFETY: the generator is open, the buffer null.
    let got = unsafe { dmd::dmd_generate_values(generator.0, 0, 0, 1, -1, null_mut(), 784) };
    ensure!(got == Status::NullPointer && last_error() == "`values` is null");
    ensure!(pixels == [7; 784], "a refused call wrote pixels");
    std::thread::spawn(last_error).join().map_or(Ok(()), |other| {
        ensure!(other.is_empty(), "another thread sees `{other}`");
        Ok(())
    })
}
