//! Golden files and `dmd-run verify`: the exporter's evaluation is candle's, both engines pass on it, and what does not
//! belong together or was changed is told apart by the exit code.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use dmd_core::card::GeneratorConfig;
use dmd_core::compare::Tolerance;
use dmd_core::golden::{GOLDEN_KEY, GoldenInfo};
use dmd_core::net::OneStep;
use dmd_core::noise::standard_normal;
use dmd_core::schedule::Schedule;
use dmd_distill::checkpoint::Source;
use dmd_distill::network::{Engine, Network};
use dmd_export::golden::reference;
use dmd_export::{Array, Checkpoint, Kind};
use dmd_tests::{Finished, Golden, compare, fixture, refused, repository, run_bin};
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

fn export(cwd: &Path, out: &str, from: &str, args: &[&str]) -> Result<()> {
    let from = repository().join("assets").join(from);
    let args = [&[out, "--golden", "--from", from.to_str().context("path")?][..], args].concat();
    let finished = run_bin("dmd-export", cwd, args)?;
    ensure!(finished.code == Some(0), "{}", finished.stderr);
    Ok(())
}

fn verify(cwd: &Path, args: &[&str]) -> Result<Finished> {
    run_bin("dmd-run", cwd, [&["verify"], args].concat())
}

/// The golden values are the exporter's own evaluation; candle's is the one that was trained.
#[test]
fn the_evaluation_is_candles() -> Result<()> {
    let evaluated = Checkpoint::load(&fixture("tiny-class"))?;
    let trained = dmd_distill::checkpoint::Checkpoint::load(&Source::Folder(fixture("tiny-class")))?;
    let close = Tolerance { abs: 1e-4, rel: 0.0 };
    let to_candle =
        |array: &Array| Tensor::from_vec(array.data.clone(), array.shape.as_slice(), &Device::Cpu);
    let classes = |class: &[usize]| {
        Tensor::from_vec(class.iter().map(|c| *c as u32).collect::<Vec<_>>(), class.len(), &Device::Cpu)
    };
    let teacher = reference(&evaluated, Kind::Teacher, 5)?;
    let (t, class) = (teacher.t.context("steps")?, teacher.class.context("classes")?);
    ensure!(t.data == [999.0, 749.0, 499.0, 249.0, 0.0], "{t:?}");
    let (x_t, t, class) = (to_candle(&teacher.x)?, to_candle(&t)?, classes(&class)?);
    let config = GeneratorConfig { t_gen: 440, input_scale: 1.0 };
    let constants = OneStep::new(&config, &Schedule::new(&evaluated.schedule))?;
    let generator = reference(&Checkpoint { generator: Some(config), ..evaluated }, Kind::Generator, 5)?;

    let mut network = Network::frozen(&trained.config, &trained.tensors, &Device::Cpu)?;
    for engine in [Engine::Kernels, Engine::Compositions] {
        network.engine = engine;
        let eps_pred = network.predict(&x_t, &t, Some(&class))?.flatten_all()?.to_vec1::<f32>()?;
        compare(&format!("eps_pred by {engine:?}"), &eps_pred, &teacher.output.data, close)?;
        let x_gen = network.one_step(&constants, &x_t, Some(&class))?.flatten_all()?.to_vec1::<f32>()?;
        compare(&format!("x_gen by {engine:?}"), &x_gen, &generator.output.data, close)?;
    }
    Ok(())
}

/// The bundled generator in every precision, and its teacher, by every provider of this machine.
#[test]
fn exported_models_pass() -> Result<()> {
    let dir = TempDir::new()?;
    for (name, from, args, measure) in [
        ("f32", "one-step-fashion", &["--image", "--batch", "3"][..], "max_abs"),
        ("f16", "one-step-fashion", &["--dtype", "f16"], "rms_relative"),
        ("int8", "one-step-fashion", &["--dtype", "int8", "--external-data"], "rms_relative"),
        ("teacher", "ddpm-fashion", &["--teacher"], "max_abs"),
    ] {
        export(dir.path(), &format!("{name}.onnx"), from, args)?;
        let finished = verify(dir.path(), &[&format!("{name}.onnx"), "--json"])?;
        ensure!(finished.code == Some(0), "{name}: {}{}", finished.stdout, finished.stderr);
        let found: serde_json::Value = serde_json::from_str(&finished.stdout)?;
        ensure!(found["limit"]["measure"] == measure && found["noise_differs"] == 0, "{name}: {found}");
        let providers = found["providers"].as_array().context("providers")?;
        ensure!(providers.len() >= 2, "{name}: {found}");
        for provider in providers {
            let number =
                |key: &str| provider[key].as_f64().with_context(|| format!("{name}: `{key}` of {provider}"));
            ensure!(number("ms_per_image")? > 0.0 && number("mean_abs")? <= number("max_abs")?);
            if measure == "max_abs" {
                ensure!(number("max_abs")? < 1e-4, "{name}: {provider}");
            }
            if name == "f32" {
                ensure!(number("psnr")? > 80.0 && number("levels_apart")? <= 1.0, "{provider}");
            }
            ensure!((name == "teacher") == provider["psnr"].is_null(), "{name}: {provider}");
        }
    }
    let plain = verify(dir.path(), &["f32.onnx", "--provider", "tract"])?;
    ensure!(
        plain.code == Some(0) && plain.stdout.contains("tract") && !plain.stdout.contains("\ncpu"),
        "{plain:?}"
    );
    Ok(())
}

/// What a runtime in another language would rely on.
#[test]
fn a_golden_file_says_what_it_is() -> Result<()> {
    let dir = TempDir::new()?;
    export(dir.path(), "m.onnx", "one-step-fashion", &[])?;
    let path = dir.path().join("m.golden.safetensors");
    let bytes = std::fs::read(&path)?;
    let (_, header) = SafeTensors::read_metadata(&bytes)?;
    let entries = header.metadata().as_ref().context("metadata")?;
    let info = GoldenInfo::from_json(entries.get(GOLDEN_KEY).context("description")?)?;
    ensure!((info.name.as_str(), info.seed, info.count) == ("one-step-fashion", 0, 8), "{info:?}");
    let golden = Golden::read(&path)?;
    ensure!(golden.shape("z")? == [8, 1, 28, 28] && golden.i64("class")? == [0, 1, 2, 3, 4, 5, 6, 7]);
    let mut noise = vec![0.0; 784];
    standard_normal(0, 7, &mut noise);
    ensure!(golden.f32("z")?[7 * 784..] == noise);
    export(dir.path(), "m.onnx", "one-step-fashion", &["--force"])?;
    ensure!(std::fs::read(&path)? == bytes, "two exports differ");
    Ok(())
}

/// 8-bit arithmetic: onnxruntime's integer kernels are as near to f32 as the exporter's simulation of them, and tract is refused.
#[test]
fn integer_arithmetic_is_as_good_as_its_card_says() -> Result<()> {
    let dir = TempDir::new()?;
    let mut errors = Vec::new();
    for method in ["min-max", "percentile", "mse"] {
        let args = ["--dtype", "qdq", "--calibration", method, "--force"];
        export(dir.path(), "q.onnx", "one-step-fashion", &args)?;
        let done = verify(dir.path(), &["q.onnx", "--json"])?;
        ensure!(done.code == Some(0), "{method}: {done:?}");
        let found: Value = serde_json::from_str(&done.stdout)?;
        let providers = found["providers"].as_array().context("providers")?;
        ensure!(providers.iter().all(|p| p["provider"] != "tract") && !providers.is_empty(), "{found}");
        let said = found["limit"]["value"].as_f64().context("limit")? / 1.25;
        let got = providers[0]["rms_relative"].as_f64().context("rms")?;
        ensure!((0.75 * said..1.25 * said).contains(&got), "{method}: {got}, the card says {said}");
        errors.push(got);
    }
    ensure!(errors.iter().all(|error| *error < 0.15), "{errors:?}");
    refused(&verify(dir.path(), &["q.onnx", "--provider", "tract"])?, &["8-bit integers", "--dtype int8"])?;
    let args = ["q.onnx", "--provider", "tract", "-o", "x.png"];
    refused(&run_bin("dmd-run", dir.path(), args)?, &["8-bit integers", "--provider cpu"])?;
    let base = repository().join("assets/ddpm-fashion");
    let base = base.to_str().context("path")?;
    let args = ["t.onnx", "--teacher", "--from", base, "--dtype", "qdq"];
    refused(&run_bin("dmd-export", dir.path(), args)?, &["calibrated on a generator's noise"])
}

#[test]
fn a_difference_is_1_and_a_file_that_does_not_belong_is_2() -> Result<()> {
    let dir = TempDir::new()?;
    export(dir.path(), "a.onnx", "one-step-fashion", &[])?;
    export(dir.path(), "b.onnx", "one-step-fashion", &["--dtype", "int8"])?;
    let whole = std::fs::read(dir.path().join("a.golden.safetensors"))?;
    let (header, _) = SafeTensors::read_metadata(&whole)?;
    for (name, tensor) in [("x_gen", "FAILED"), ("z", "values differ: FAILED")] {
        let view = SafeTensors::deserialize(&whole)?.tensor(name)?.data().as_ptr() as usize;
        let at = view - whole.as_ptr() as usize + 3;
        let mut changed = whole.clone();
        changed[at] ^= 0x02; // the exponent of the first value
        std::fs::write(dir.path().join("changed.safetensors"), &changed)?;
        let finished = verify(dir.path(), &["a.onnx", "changed.safetensors"])?;
        ensure!(finished.code == Some(1) && finished.stdout.contains(tensor), "{name}: {finished:?}");
    }
    std::fs::write(dir.path().join("cut.safetensors"), &whole[..header])?;
    std::fs::write(dir.path().join("text.safetensors"), "no golden file")?;
    std::fs::copy(dir.path().join("a.onnx"), dir.path().join("c.onnx"))?;
    let weights = repository().join("assets/one-step-fashion/model.safetensors");
    for (args, says) in [
        (&["a.onnx", "b.golden.safetensors"][..], "but `a.onnx` has"),
        (&["a.onnx", "cut.safetensors"], "dmd-export --golden"),
        (&["a.onnx", "text.safetensors"], "dmd-export --golden"),
        (&["a.onnx", "absent.safetensors"], "cannot read `absent.safetensors`"),
        (&["a.onnx", weights.to_str().context("path")?], "has no `dmd.golden`"),
        (&["a.onnx", "--provider", "rocm"], "rocm"),
        (&["absent.onnx"], "cannot read `absent.onnx`"),
        (&["c.onnx"], "there is no `c.golden.safetensors`"),
        (&[], "<MODEL>"),
    ] {
        refused(&verify(dir.path(), args)?, &[says])?;
    }
    Ok(())
}
