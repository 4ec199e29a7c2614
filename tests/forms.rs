//! The forms an exported file can have: a fixed batch, pictures as bytes, other operator sets, weights outside. Each is
//! the same function, in both engines; `scripts/check_onnx.py` adds ONNX's own checker and evaluator.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use dmd_core::card::GeneratorConfig;
use dmd_core::compare::Tolerance;
use dmd_core::pixels::to_image;
use dmd_export::model::OPSETS;
use dmd_export::partial::{Exporter, Value};
use dmd_export::{Array, Checkpoint, Form, Kind, evaluate, export, export_in, pixels};
use dmd_runtime_native::{Batch, Class, Generator, ModelFile, Options, Provider, Request};
use dmd_tests::{Finished, compare, fixture, refused, repository, run_bin};
use tempfile::TempDir;
use tract_onnx::pb::{ModelProto, OperatorSetIdProto};
use tract_onnx::prelude::*;

/// As in tests/export.rs.
const SMALL: Tolerance = Tolerance { abs: 1e-4, rel: 0.0 };

fn generator() -> Result<Checkpoint> {
    let generator = Some(GeneratorConfig { t_gen: 440, input_scale: 1.0 });
    Ok(Checkpoint { generator, ..Checkpoint::load(&fixture("tiny-class"))? })
}

fn load(bytes: &[u8], provider: Provider) -> Result<Generator> {
    let options = Options { provider, threads: Some(2), ..Options::default() };
    Ok(Generator::load(ModelFile::parse("generator", bytes.to_vec())?, &options)?)
}

fn export_cli(cwd: &Path, args: &[&str]) -> Result<Finished> {
    let assets = repository().join("assets/one-step-fashion");
    let from = ["--from", assets.to_str().context("path")?];
    run_bin("dmd-export", cwd, [args, &from].concat())
}

fn done(finished: Finished) -> Result<Finished> {
    ensure!(finished.code == Some(0), "{}", finished.stderr);
    Ok(finished)
}

#[test]
fn a_fixed_batch_runs_for_any_number_of_images() -> Result<()> {
    let checkpoint = generator()?;
    let free = export(&checkpoint, Kind::Generator)?;
    for provider in [Provider::Engine, Provider::Tract, Provider::Cpu] {
        let expected = load(&free.bytes, provider)?;
        for batch in [1, 3] {
            let form = Form { batch: Some(batch), ..Form::default() };
            let model = load(&export_in(&checkpoint, Kind::Generator, &form)?.bytes, provider)?;
            ensure!(model.info().batch == Some(batch));
            for (count, class) in [(1, Class::One(4)), (3, Class::Cycle), (7, Class::Cycle)] {
                let request = Request { class, first: 2, ..Request::new(9, count) };
                let got = model.sample(&request, &|_| {})?.values;
                let expected = expected.sample(&request, &|_| {})?.values;
                compare(&format!("{provider}, {count} by {batch}"), &got, &expected, SMALL)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_fixed_batch_of_a_teacher_follows_its_steps() -> Result<()> {
    let checkpoint = Checkpoint::load(&fixture("tiny-class"))?;
    let form = Form { batch: Some(2), ..Form::default() };
    let request = Request { steps: Some(3), ..Request::new(1, 3) };
    let bytes =
        [export(&checkpoint, Kind::Teacher)?.bytes, export_in(&checkpoint, Kind::Teacher, &form)?.bytes];
    for provider in [Provider::Engine, Provider::Tract, Provider::Cpu] {
        let values = |bytes: &[u8]| -> Result<Vec<f32>> {
            Ok(load(bytes, provider)?.sample(&request, &|_| {})?.values)
        };
        compare(&provider.to_string(), &values(&bytes[1])?, &values(&bytes[0])?, SMALL)?;
    }
    Ok(())
}

/// Levels, what lies between them and beyond, in every channel, by tract; onnxruntime by `scripts/check_onnx.py`.
#[test]
fn the_output_image_is_the_picture_to_the_bit() -> Result<()> {
    let shape = [3, 32, 32];
    for [lo, hi] in [[-1.0, 1.0], [0.0, 1.0], [-0.5f32, 3.5]] {
        let noise = (0..2).flat_map(|k| {
            let mut x = vec![0.0; 1024];
            dmd_core::noise::standard_normal(1, k, &mut x);
            x
        });
        let between = (0..1024).map(|i| lo + (hi - lo) * (i as f32 - 2.0) / 510.0);
        let x: Vec<f32> = noise.chain(between).collect();
        let weights = BTreeMap::new();
        let mut exporter = Exporter::new(&weights);
        let Value::Flow(flow) = exporter.input("x", &shape) else { anyhow::bail!("an input is known") };
        let image = pixels::image(&mut exporter, &flow, [lo, hi])?;
        let opset_import = vec![OperatorSetIdProto { domain: String::new(), version: 18 }];
        let graph = Some(exporter.graph.finish(&[image], None).graph);
        let proto = ModelProto { ir_version: 10, opset_import, graph, ..Default::default() };
        let plan = tract_onnx::onnx().model_for_proto_model(&proto)?.into_optimized()?.into_runnable()?;
        let outputs = plan.run(tvec![Tensor::from_shape(&[1, 3, 32, 32], &x)?.into()])?;
        let got = outputs[0].to_plain_array_view::<u8>()?;
        ensure!(got.shape() == [1, 32, 32, 3], "{:?}", got.shape());
        ensure!(got.iter().copied().eq(to_image(&x, shape, [lo, hi]).data), "[{lo}, {hi}]: other bytes");
    }
    Ok(())
}

#[test]
fn the_output_image_leaves_the_other_as_it_is() -> Result<()> {
    let checkpoint = generator()?;
    let form = Form { image: true, ..Form::default() };
    let bytes =
        [export(&checkpoint, Kind::Generator)?.bytes, export_in(&checkpoint, Kind::Generator, &form)?.bytes];
    for provider in [Provider::Engine, Provider::Tract, Provider::Cpu] {
        let values = |bytes: &[u8]| -> Result<Vec<f32>> {
            Ok(load(bytes, provider)?.sample(&Request::new(2, 3), &|_| {})?.values)
        };
        compare(&provider.to_string(), &values(&bytes[1])?, &values(&bytes[0])?, SMALL)?;
    }
    Ok(())
}

#[test]
fn every_operator_set_is_the_same_function() -> Result<()> {
    let checkpoint = generator()?;
    let z =
        Array { shape: vec![2, 1, 12, 12], data: (0..288).map(|i| (i % 13) as f32 / 6.0 - 1.0).collect() };
    let expected = evaluate::x_gen(&checkpoint, &z, Some(&[3, 10]))?.data;
    for opset in OPSETS {
        let bytes =
            export_in(&checkpoint, Kind::Generator, &Form { opset, image: true, ..Form::default() })?.bytes;
        for provider in [Provider::Engine, Provider::Tract, Provider::Cpu] {
            let batch = Batch { n: 2, x: &z.data, t: &[0.0; 2], class: &[3, 10] };
            compare(
                &format!("{provider}, opset {opset}"),
                &load(&bytes, provider)?.evaluate(&batch)?,
                &expected,
                SMALL,
            )?;
        }
    }
    Ok(())
}

#[test]
fn weights_outside_are_found_by_both_engines() -> Result<()> {
    let dir = TempDir::new()?;
    done(export_cli(dir.path(), &["in.onnx", "--dtype", "int8"])?)?;
    done(export_cli(dir.path(), &["out.onnx", "--dtype", "int8", "--external-data"])?)?;
    let size = |name: &str| -> Result<u64> { Ok(std::fs::metadata(dir.path().join(name))?.len()) };
    ensure!(
        size("out.onnx")? + size("out.onnx.data")? > size("in.onnx")?
            && 2 * size("out.onnx")? < size("in.onnx")?
    );
    let sample = |model: &str, provider: &str| {
        run_bin(
            "dmd-run",
            dir.path(),
            [model, "--provider", provider, "--count", "3", "--force", "-o", "x.npy"],
        )
    };
    for provider in ["engine", "tract", "cpu"] {
        done(sample("in.onnx", provider)?)?;
        let expected = std::fs::read(dir.path().join("x.npy"))?;
        done(sample("out.onnx", provider)?)?;
        ensure!(std::fs::read(dir.path().join("x.npy"))? == expected, "{provider}: other images");
    }
    let again = export_cli(dir.path(), &["in.onnx", "--external-data"])?;
    refused(&again, &["cannot write `in.onnx`: it exists", "--force"])?;
    let data = dir.path().join("out.onnx.data");
    std::fs::write(&data, &std::fs::read(&data)?[..5000])?;
    refused(
        &sample("out.onnx", "tract")?,
        &["`out.onnx.data` at ", "the file has 5000", "different exports"],
    )?;
    std::fs::remove_file(data)?;
    for provider in ["engine", "tract", "cpu"] {
        refused(
            &sample("out.onnx", provider)?,
            &["`out.onnx.data`, which cannot be read", "belongs beside the model"],
        )?;
    }
    Ok(())
}

#[test]
fn a_form_that_cannot_be_had_is_refused_and_writes_nothing() -> Result<()> {
    let dir = TempDir::new()?;
    let base = repository().join("assets/ddpm-fashion");
    let teacher = ["--teacher", "--from", base.to_str().context("path")?];
    for (args, message) in [
        (&["m.onnx", "--opset", "13"][..], "got opset 13, expected 14 to 22"),
        (&["m.onnx", "--opset", "23"], "got opset 23, expected 14 to 22"),
        (&["m.onnx", "--batch", "0"], "0 is not in 1.."),
        (&["m.onnx", "--dtype", "f64"], "got `f64`"),
        (&["missing/m.onnx", "--golden"], "`missing` is not a directory"),
    ] {
        refused(&export_cli(dir.path(), args)?, &[message])?;
    }
    let image = run_bin("dmd-export", dir.path(), [&["m.onnx", "--image"][..], &teacher].concat())?;
    refused(&image, &["no output `image`", "leave out --image"])?;
    std::fs::write(dir.path().join("m.golden.safetensors"), "mine")?;
    refused(
        &export_cli(dir.path(), &["m.onnx", "--golden"])?,
        &["cannot write `m.golden.safetensors`: it exists"],
    )?;
    ensure!(std::fs::read_dir(dir.path())?.count() == 1, "something was written");
    Ok(())
}
