//! The command `dmd-export`: what it writes, what it prints, what it refuses and with which exit status.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// A copy of tiny-class, as a generator, that a test may damage.
fn generator(dir: &Path) -> Result<PathBuf> {
    let copy = dir.join("runs/tiny/generator");
    copy_dir(&fixture("tiny-class"), &copy)?;
    fs::write(copy.join("generator.json"), r#"{"t_gen": 440, "input_scale": 1.0}"#)?;
    Ok(copy)
}

fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        fs::copy(&path, to.join(path.file_name().context("name")?))?;
    }
    Ok(())
}

fn dmd_export(dir: &Path, arguments: &[&str]) -> Result<Output> {
    Ok(Command::new(env!("CARGO_BIN_EXE_dmd-export")).current_dir(dir).args(arguments).output()?)
}

fn refused(dir: &Path, arguments: &[&str], expected: &[&str]) -> Result<()> {
    let output = dmd_export(dir, arguments)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2), "{arguments:?}: {:?} {stderr}", output.status);
    for text in expected {
        ensure!(stderr.contains(text), "{arguments:?}: `{text}` is missing in:\n{stderr}");
    }
    ensure!(!dir.join("out.onnx").exists(), "{arguments:?} wrote a file");
    Ok(())
}

#[test]
fn the_newest_run_is_exported_and_nothing_is_overwritten() -> Result<()> {
    let dir = tempfile::tempdir()?;
    generator(dir.path())?;
    let output = dmd_export(dir.path(), &["m.onnx", "--json"])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{stderr}");
    ensure!(stderr.contains("runs/tiny/generator") && stderr.contains("wrote m.onnx"), "{stderr}");
    let summary: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let file = fs::read(dir.path().join("m.onnx"))?;
    ensure!(summary["bytes"] == file.len() && summary["name"] == "tiny", "{summary}");
    ensure!(fs::read_dir(dir.path())?.count() == 2, "a temporary file is left");

    fs::write(dir.path().join("m.onnx"), "precious")?;
    let output = dmd_export(dir.path(), &["m.onnx"])?;
    ensure!(output.status.code() == Some(2) && String::from_utf8_lossy(&output.stderr).contains("--force"));
    ensure!(fs::read(dir.path().join("m.onnx"))? == b"precious");
    ensure!(dmd_export(dir.path(), &["m.onnx", "--force"])?.status.success());
    ensure!(fs::read(dir.path().join("m.onnx"))? == file);
    Ok(())
}

#[test]
fn a_dry_run_tells_the_same_and_writes_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    generator(dir.path())?;
    let output = dmd_export(dir.path(), &["m.onnx", "--dry-run", "--json"])?;
    ensure!(output.status.success() && !dir.path().join("m.onnx").exists());
    ensure!(dmd_export(dir.path(), &["m.onnx", "--json"])?.stdout == output.stdout);
    Ok(())
}

#[test]
fn a_teacher_is_exported_on_request_only() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (generator, base) = (generator(dir.path())?, fixture("tiny-ddpm"));
    let base = base.to_str().context("path")?;
    refused(dir.path(), &["out.onnx", "--from", base], &["tiny-ddpm", "--teacher"])?;
    let from = generator.to_str().context("path")?;
    refused(dir.path(), &["out.onnx", "--from", from, "--teacher"], &["leave out --teacher"])?;
    let run = dir.path().join("runs/tiny");
    refused(
        dir.path(),
        &["out.onnx", "--from", "runs/tiny", "--teacher"],
        &["neither a checkpoint", "runs/tiny"],
    )?;
    copy_dir(Path::new(base), &run.join("teacher"))?;
    let output = dmd_export(dir.path(), &["out.onnx", "--from", "runs/tiny", "--teacher"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(String::from_utf8_lossy(&output.stderr).contains("teacher `tiny`"));
    Ok(())
}

#[test]
fn wrong_usage_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    refused(dir.path(), &[], &["<OUT>"])?;
    refused(dir.path(), &["out.onnx", "--fast"], &["--fast"])?;
    refused(dir.path(), &["out.onnx", "--dtype", "f64"], &["f64", "`f32`, `f16`, `int8`"])?;
    refused(dir.path(), &["out.onnx"], &["no finished run", "--from"])?;
    refused(dir.path(), &["out.onnx", "--from", "nowhere"], &["nowhere"])?;
    refused(dir.path(), &["out.onnx", "--from", "."], &["config.json"])?;
    generator(dir.path())?;
    refused(dir.path(), &["out.pt"], &["out.pt", ".onnx"])?;
    refused(dir.path(), &["missing/out.onnx"], &["missing"])
}

/// A limit on the size of files stands for a full disk: writing fails in the middle either way.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_no_part_of_a_file() -> Result<()> {
    let dir = tempfile::tempdir()?;
    generator(dir.path())?;
    fs::write(dir.path().join("old.onnx"), "precious")?;
    for arguments in [&["out.onnx"][..], &["old.onnx", "--force"], &["out.onnx", "--external-data"]] {
        let output = Command::new("sh")
            .args(["-c", r#"trap "" XFSZ; ulimit -f 16; exec "$0" "$@""#, env!("CARGO_BIN_EXE_dmd-export")])
            .current_dir(dir.path())
            .args(arguments)
            .output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2), "{arguments:?}: {:?} {stderr}", output.status);
        ensure!(stderr.contains("cannot write") && stderr.contains("too large"), "{stderr}");
        ensure!(fs::read(dir.path().join("old.onnx"))? == b"precious");
        ensure!(fs::read_dir(dir.path())?.count() == 2, "{arguments:?} left a file");
    }
    Ok(())
}

#[test]
fn a_damaged_checkpoint_is_refused_by_file_and_key() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let copy = generator(dir.path())?;
    let expect = |file: &str, content: &[u8], texts: &[&str]| -> Result<()> {
        let path = copy.join(file);
        let before = fs::read(&path).ok();
        fs::write(&path, content)?;
        refused(dir.path(), &["out.onnx"], texts).with_context(|| file.to_owned())?;
        match before {
            Some(bytes) => fs::write(&path, bytes)?,
            None => fs::remove_file(&path)?,
        }
        Ok(())
    };
    let config = fs::read_to_string(copy.join("config.json"))?;
    let weights = fs::read(copy.join(WEIGHTS))?;
    expect("config.json", b"{", &["config.json", "JSON"])?;
    expect("config.json", config.replace("\"silu\"", "\"tanh\"").as_bytes(), &["config.json", "act_fn"])?;
    let wider = config.replacen("\"sample_size\": 12", "\"sample_size\": 10", 1);
    ensure!(wider != config);
    expect("config.json", wider.as_bytes(), &["sample_size"])?;
    expect("scheduler_config.json", b"[]", &["scheduler_config.json"])?;
    expect("generator.json", br#"{"t_gen": 1000, "input_scale": 1.0}"#, &["generator.json", "t_gen", "999"])?;
    expect("generator.json", br#"{"t_gen": 1}"#, &["generator.json", "input_scale"])?;
    let card = br#"{"name": "x", "classes": {"count": 12}}"#;
    expect("card.json", card, &["card.json", "class table"])?;
    expect(WEIGHTS, &weights[..weights.len() - 8], &[WEIGHTS, "truncated"])?;
    expect(WEIGHTS, &weights[..100], &[WEIGHTS, "truncated"])?;
    expect(WEIGHTS, b"", &[WEIGHTS, "truncated"])?;
    expect(WEIGHTS, b"this is no safetensors file at all", &[WEIGHTS, "safetensors"])?;
    fs::remove_file(copy.join(WEIGHTS))?;
    fs::create_dir(copy.join("elsewhere"))?;
    refused(dir.path(), &["out.onnx", "--from", "runs/tiny"], &["model.safetensors", WEIGHTS])
}

/// The tensors of tiny-class with one changed, as the bytes of a file.
fn changed(name: &str, change: impl Fn(&mut Vec<usize>, &mut Vec<u8>, &mut Dtype)) -> Result<Vec<u8>> {
    let bytes = fs::read(fixture("tiny-class").join(WEIGHTS))?;
    let mut tensors = Vec::new();
    for (key, view) in SafeTensors::deserialize(&bytes)?.tensors() {
        let (mut shape, mut data, mut dtype) = (view.shape().to_vec(), view.data().to_vec(), view.dtype());
        if key == name {
            change(&mut shape, &mut data, &mut dtype);
        }
        if !shape.is_empty() {
            tensors.push((key, shape, data, dtype));
        }
    }
    if !tensors.iter().any(|(key, ..)| key == name) && name.starts_with("extra") {
        tensors.push((name.to_owned(), vec![1], vec![0; 4], Dtype::F32));
    }
    let views = tensors
        .iter()
        .map(|(key, shape, data, dtype)| Ok((key.clone(), TensorView::new(*dtype, shape.clone(), data)?)));
    Ok(safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None)?)
}

/// Old names, shards and the folders of a pipeline give the same file.
#[test]
fn every_layout_of_diffusers_is_exported_to_the_same_file() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let copy = generator(dir.path())?;
    let from = copy.to_str().context("path")?;
    let export = || -> Result<Vec<u8>> {
        let output = dmd_export(dir.path(), &["out.onnx", "--force", "--from", from])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(fs::read(dir.path().join("out.onnx"))?)
    };
    fs::write(copy.join("card.json"), r#"{"name": "tiny"}"#)?;
    let expected = export()?;
    let bytes = fs::read(copy.join(WEIGHTS))?;
    let file = SafeTensors::deserialize(&bytes)?;

    let names =
        [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")];
    let mut tensors = Vec::new();
    for (name, view) in file.tensors() {
        let old = names.iter().fold(name.clone(), |name, (new, old)| name.replace(new, old));
        let (renamed, name) = (old != name, old);
        let mut shape = view.shape().to_vec();
        if renamed && shape.len() == 2 {
            shape.extend([1, 1]);
        }
        tensors.push((name, shape, view.data().to_vec()));
    }
    let write = |path: PathBuf, part: &[(String, Vec<usize>, Vec<u8>)]| -> Result<()> {
        let views = part
            .iter()
            .map(|(name, shape, data)| Ok((name.clone(), TensorView::new(Dtype::F32, shape.clone(), data)?)));
        Ok(fs::write(path, safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None)?)?)
    };
    write(copy.join(WEIGHTS), &tensors)?;
    ensure!(export()? == expected, "old names");

    fs::remove_file(copy.join(WEIGHTS))?;
    let mut map = serde_json::Map::new();
    for (name, part) in
        ["a.safetensors", "b.safetensors"].iter().zip(tensors.chunks(tensors.len().div_ceil(2)))
    {
        write(copy.join(name), part)?;
        map.extend(part.iter().map(|(key, ..)| (key.clone(), (*name).into())));
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    fs::write(copy.join(format!("{WEIGHTS}.index.json")), index)?;
    ensure!(export()? == expected, "shards");

    for (part, files) in [
        ("scheduler", vec!["scheduler_config.json".to_owned()]),
        (
            "unet",
            vec![
                "config.json".into(),
                "a.safetensors".into(),
                "b.safetensors".into(),
                format!("{WEIGHTS}.index.json"),
            ],
        ),
    ] {
        fs::create_dir(copy.join(part))?;
        for file in files {
            fs::rename(copy.join(&file), copy.join(part).join(&file))?;
        }
    }
    ensure!(export()? == expected, "pipeline");

    fs::remove_file(copy.join("unet/b.safetensors"))?;
    fs::remove_file(dir.path().join("out.onnx"))?;
    refused(dir.path(), &["out.onnx", "--from", from], &["b.safetensors"])?;
    fs::remove_file(copy.join(format!("unet/{WEIGHTS}.index.json")))?;
    fs::write(copy.join("unet/diffusion_pytorch_model.bin"), "")?;
    refused(
        dir.path(),
        &["out.onnx", "--from", from],
        &["diffusion_pytorch_model.bin", "hint: `dmd-distill --base`"],
    )
}

#[test]
fn weights_that_do_not_fit_are_refused_by_tensor() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = generator(dir.path())?.join(WEIGHTS);
    let name = "conv_in.weight";
    let expect = |content: Vec<u8>, texts: &[&str]| -> Result<()> {
        fs::write(&file, content)?;
        refused(dir.path(), &["out.onnx"], &[texts, &[WEIGHTS]].concat())
    };
    let shape = changed(name, |shape, data, _| {
        shape[0] = 4;
        data.truncate(4 * 9 * 4);
    })?;
    expect(shape, &[name, "[4, 1, 3, 3]", "[8, 1, 3, 3]", "hint"])?;
    expect(changed(name, |shape, _, _| shape.clear())?, &[name, "missing"])?;
    expect(changed("extra.weight", |_, _, _| {})?, &["extra.weight"])?;
    let nan = changed(name, |_, data, _| data[..4].copy_from_slice(&f32::NAN.to_le_bytes()))?;
    expect(nan, &[name, "NaN", "element 0"])?;
    let integers = changed(name, |_, _, dtype| *dtype = Dtype::I32)?;
    expect(integers, &[name, "I32", "BF16"])?;
    Ok(())
}

/// Half-precision checkpoints are widened; a value that all types can hold comes out the same.
#[test]
fn half_precision_weights_are_converted() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = generator(dir.path())?.join(WEIGHTS);
    let name = "conv_out.weight";
    let mut files = Vec::new();
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let content = changed(name, |_, data, to| {
            let values = 0..data.len() / 4;
            *data = values
                .flat_map(|i| match dtype {
                    Dtype::F32 => (i as f32 / 4.0).to_le_bytes().to_vec(),
                    Dtype::F16 => half::f16::from_f32(i as f32 / 4.0).to_le_bytes().to_vec(),
                    _ => half::bf16::from_f32(i as f32 / 4.0).to_le_bytes().to_vec(),
                })
                .collect();
            *to = dtype;
        })?;
        fs::write(&file, content)?;
        ensure!(dmd_export(dir.path(), &["out.onnx", "--force"])?.status.success());
        files.push(fs::read(dir.path().join("out.onnx"))?);
    }
    ensure!(files[0] == files[1] && files[0] == files[2]);
    Ok(())
}
