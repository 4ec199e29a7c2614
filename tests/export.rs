//! Exported graphs against diffusers' goldens, the exporter's own unfolded evaluation, and the file contract. Files
//! are run by tract here, generators by onnxruntime too; `scripts/check_onnx.py` adds the ONNX reference evaluator.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use dmd_core::card::{CARD_KEY, Classes, GeneratorConfig, ModelCard, Provenance};
use dmd_core::compare::Tolerance;
use dmd_core::net::shapes::summarise;
use dmd_core::net::{Conv2d, Ops};
use dmd_core::schedule::Prediction;
use dmd_export::partial::{Exporter, Known, Value};
use dmd_export::{Array, Checkpoint, Form, Kind, Precision, evaluate, export, export_in, golden};
use dmd_runtime_native::{Batch, ModelFile, Options, Provider};
use dmd_tests::operations::Operation;
use dmd_tests::{Golden, compare, fixture, seeded};
use tract_onnx::pb::{GraphProto, ModelProto, OperatorSetIdProto};
use tract_onnx::prelude::*;

/// Tighter than `Tolerance::MODEL`: what this project promises for the small configurations.
const GOLDEN: Tolerance = Tolerance { abs: 1e-4, rel: 0.0 };

fn checkpoint(name: &str) -> Result<Checkpoint> {
    Ok(Checkpoint::load(&fixture(name))?)
}

fn generator(name: &str, t_gen: usize, input_scale: f64) -> Result<Checkpoint> {
    Ok(Checkpoint { generator: Some(GeneratorConfig { t_gen, input_scale }), ..checkpoint(name)? })
}

fn array(golden: &Golden, name: &str) -> Result<Array> {
    Ok(Array::new(golden.shape(name)?, golden.f32(name)?)?)
}

fn classes(golden: &Golden) -> Result<Vec<usize>> {
    Ok(golden.i64("class")?.into_iter().map(usize::try_from).collect::<Result<_, _>>()?)
}

fn noise(shape: &[usize], seed: u32) -> Array {
    let mut array = Array::filled(shape, 0.0);
    dmd_core::noise::standard_normal(seed, 0, &mut array.data);
    array
}

fn tensor(array: &Array) -> Result<TValue> {
    Ok(Tensor::from_shape(&array.shape, &array.data)?.into())
}

fn class_tensor(class: &[usize]) -> Result<TValue> {
    let class: Vec<i64> = class.iter().map(|&c| c as i64).collect();
    Ok(Tensor::from_shape(&[class.len()], &class)?.into())
}

/// Runs a file, with a symbolic batch, on several inputs.
fn run(bytes: &[u8], inputs: Vec<TVec<TValue>>) -> Result<Vec<Vec<f32>>> {
    run_model(tract_onnx::onnx().model_for_read(&mut &bytes[..])?, inputs)
}

fn run_model(model: InferenceModel, inputs: Vec<TVec<TValue>>) -> Result<Vec<Vec<f32>>> {
    let plan = model.into_optimized()?.into_runnable()?;
    let run = |inputs| -> Result<Vec<f32>> {
        Ok(plan.run(inputs)?[0].to_plain_array_view::<f32>()?.iter().copied().collect())
    };
    inputs.into_iter().map(run).collect()
}

/// Runs a generator's file by onnxruntime on batches of noise and classes, which it may not take.
fn by_onnxruntime(bytes: &[u8], batches: &[(&Array, &[usize])]) -> Result<Vec<Vec<f32>>> {
    let options = Options { provider: Provider::Cpu, threads: Some(1), ..Options::default() };
    let model =
        dmd_runtime_native::Generator::load(ModelFile::parse("generator", bytes.to_vec())?, &options)?;
    let run = |(z, class): &(&Array, &[usize])| {
        let (n, class) = (class.len(), class.iter().map(|c| *c as i64).collect::<Vec<_>>());
        Ok(model.evaluate(&Batch { n, x: &z.data, t: &vec![0.0; n], class: &class })?)
    };
    batches.iter().map(run).collect()
}

/// A graph without a card, for single operations.
fn model_of(graph: GraphProto) -> Result<InferenceModel> {
    let opset_import = vec![OperatorSetIdProto { domain: String::new(), version: 18 }];
    let proto = ModelProto { ir_version: 10, opset_import, graph: Some(graph), ..Default::default() };
    tract_onnx::onnx().model_for_proto_model(&proto)
}

/// Golden: `scripts/golden_unet.py`; diffusers' `UNet2DModel` in f64.
#[test]
fn the_exported_teacher_matches_diffusers() -> Result<()> {
    for (name, file) in [("tiny-ddpm", "unet_tiny_ddpm"), ("tiny-class", "unet_tiny_class")] {
        let (checkpoint, golden) = (checkpoint(name)?, Golden::load(file)?);
        let (x_t, t, expected) =
            (array(&golden, "x_t")?, array(&golden, "timesteps")?, golden.f32("eps_pred")?);
        let class = golden.has("class").then(|| classes(&golden)).transpose()?;
        let evaluated = evaluate::eps_pred(&checkpoint, &x_t, &t.data, class.as_deref())?;
        compare(&format!("{name}, evaluated"), &evaluated.data, &expected, GOLDEN)?;

        let mut inputs = tvec![tensor(&x_t)?, tensor(&t)?];
        if let Some(class) = &class {
            inputs.push(class_tensor(class)?);
        }
        let exported = export(&checkpoint, Kind::Teacher)?;
        let got = &run(&exported.bytes, vec![inputs])?[0];
        compare(&format!("{name}, by tract"), got, &expected, GOLDEN)?;
    }
    Ok(())
}

/// Golden: `scripts/golden_unet.py`; tiny-class as a one-step generator.
#[test]
fn the_exported_generator_matches_diffusers() -> Result<()> {
    let (checkpoint, golden) = (generator("tiny-class", 440, 1.0)?, Golden::load("one_step")?);
    let (z, class, expected) = (array(&golden, "z")?, classes(&golden)?, golden.f32("x_gen")?);
    let evaluated = evaluate::x_gen(&checkpoint, &z, Some(&class))?;
    compare("evaluated", &evaluated.data, &expected, GOLDEN)?;
    let exported = export(&checkpoint, Kind::Generator)?;
    let got = &run(&exported.bytes, vec![tvec![tensor(&z)?, class_tensor(&class)?]])?[0];
    compare("by tract", got, &expected, GOLDEN)
}

#[test]
fn folded_equals_unfolded_for_every_class_and_batch() -> Result<()> {
    let checkpoint = generator("tiny-class", 123, 0.8)?;
    let exported = export(&checkpoint, Kind::Generator)?;
    let rows = checkpoint.config.class_rows().context("conditional")?;
    let mut batches: Vec<Vec<usize>> = (0..rows).map(|class| vec![class]).collect();
    batches.extend([vec![4, 0], vec![10, 3, 3, 0, 9, 1, 7]]);
    let inputs: Vec<Array> = (0..).zip(&batches).map(|(i, b)| noise(&[b.len(), 1, 12, 12], i)).collect();
    let feed = inputs.iter().zip(&batches).map(|(z, c)| Ok(tvec![tensor(z)?, class_tensor(c)?]));
    let got = run(&exported.bytes, feed.collect::<Result<_>>()?)?;
    for ((z, class), got) in inputs.iter().zip(&batches).zip(got) {
        let expected = evaluate::x_gen(&checkpoint, z, Some(class))?;
        compare(&format!("classes {class:?}"), &got, &expected.data, GOLDEN)?;
    }
    Ok(())
}

/// The image that each kind of prediction implies: Ho et al. 2020 (arXiv:2006.11239), Eq. 15, and Salimans and Ho 2022
/// (arXiv:2202.00512), appendix D, written out here.
#[test]
fn generators_of_every_prediction_make_the_image_it_implies() -> Result<()> {
    for prediction in [Prediction::Epsilon, Prediction::Sample, Prediction::Velocity] {
        let mut checkpoint = generator("tiny-class", 440, 0.8)?;
        checkpoint.schedule.prediction_type = prediction;
        let (alpha, sigma) = (checkpoint.one_step()?.alpha_t as f32, checkpoint.one_step()?.sigma_t as f32);
        let class = [3, 10, 0];
        let z = noise(&[3, 1, 12, 12], 11);
        let x_t = Array { data: z.data.iter().map(|z| 0.8 * z).collect(), ..z.clone() };
        let output = evaluate::eps_pred(&checkpoint, &x_t, &[440.0], Some(&class))?;
        let image = |(x_t, output): (&f32, &f32)| match prediction {
            Prediction::Epsilon => (x_t - sigma * output) / alpha,
            Prediction::Sample => *output,
            Prediction::Velocity => alpha * x_t - sigma * output,
        };
        let expected: Vec<f32> = x_t.data.iter().zip(&output.data).map(image).collect();
        let evaluated = evaluate::x_gen(&checkpoint, &z, Some(&class))?;
        compare(&format!("{prediction:?}, evaluated"), &evaluated.data, &expected, Tolerance::LAYER)?;
        let bytes = export(&checkpoint, Kind::Generator)?.bytes;
        let got = &run(&bytes, vec![tvec![tensor(&z)?, class_tensor(&class)?]])?[0];
        compare(&format!("{prediction:?}, by tract"), got, &expected, GOLDEN)?;
        let got = &by_onnxruntime(&bytes, &[(&z, &class)])?[0];
        compare(&format!("{prediction:?}, by onnxruntime"), got, &expected, GOLDEN)?;
    }
    Ok(())
}

/// Generators of two networks of `scripts/golden_bases.py`.
fn reference_networks() -> Result<Vec<Checkpoint>> {
    let golden = Golden::load("bases")?;
    let cases = [
        ("small-mnist", 180, r#"{"num_train_timesteps": 400}"#),
        ("small-celeba", 30, r#"{"num_train_timesteps": 50}"#),
    ];
    let checkpoint = |(case, t_gen, schedule): (&str, usize, &str)| -> Result<Checkpoint> {
        let (config, seed) = seeded::case(&golden.cases()?[case])?;
        let weights = seeded::weights(&config, seed)?.into_iter();
        let classes = config.class_rows().map(|count| Classes { count, names: vec![], none: None });
        Ok(Checkpoint {
            weights: weights
                .map(|(name, t)| Ok((name, Array::new(&t.shape, t.data)?)))
                .collect::<Result<_>>()?,
            config,
            schedule: serde_json::from_str(schedule)?,
            generator: Some(GeneratorConfig { t_gen, input_scale: 0.9 }),
            provenance: Provenance { classes, ..Provenance::named(case.to_owned()) },
        })
    };
    cases.into_iter().map(checkpoint).collect()
}

/// Networks and weights of `scripts/golden_bases.py`, whose own outputs tests/bases.rs compares with PyTorch.
#[test]
fn folded_equals_unfolded_for_the_reference_networks() -> Result<()> {
    for checkpoint in reference_networks()? {
        let case = checkpoint.provenance.name.clone();
        let (rows, shape) = (checkpoint.config.class_rows(), checkpoint.config.image_shape());
        let mut classes: Vec<Vec<usize>> = (0..rows.unwrap_or(1)).map(|class| vec![class]).collect();
        classes.extend([2, 7].map(|n| (0..n).map(|i| (3 * i + 1) % rows.unwrap_or(1)).collect()));
        let z = |(i, class): (u32, &Vec<usize>)| noise(&[&[class.len()], &shape[..]].concat(), i);
        let z: Vec<Array> = (0..).zip(&classes).map(z).collect();
        let batches: Vec<(&Array, &[usize])> = z.iter().zip(classes.iter().map(Vec::as_slice)).collect();
        let bytes = export(&checkpoint, Kind::Generator)?.bytes;
        let feed = |(z, class): &(&Array, &[usize])| -> Result<TVec<TValue>> {
            Ok(if rows.is_some() { tvec![tensor(z)?, class_tensor(class)?] } else { tvec![tensor(z)?] })
        };
        let by_tract = run(&bytes, batches.iter().map(feed).collect::<Result<_>>()?)?;
        let by_ort = by_onnxruntime(&bytes, &batches)?;
        for (((z, class), by_tract), by_ort) in batches.into_iter().zip(by_tract).zip(by_ort) {
            let expected = evaluate::x_gen(&checkpoint, z, rows.map(|_| class))?.data;
            compare(&format!("{case}, classes {class:?} by tract"), &by_tract, &expected, GOLDEN)?;
            compare(&format!("{case}, classes {class:?} by onnxruntime"), &by_ort, &expected, GOLDEN)?;
        }
    }
    Ok(())
}

/// At the last step the image is the network's error divided by a small `alpha_t`: the errors before that are compared.
#[test]
fn folded_equals_unfolded_without_classes() -> Result<()> {
    let checkpoint = generator("tiny-ddpm", 999, 1.0)?;
    let exported = export(&checkpoint, Kind::Generator)?;
    let alpha_t = checkpoint.one_step()?.alpha_t as f32;
    let scaled = |values: &[f32]| values.iter().map(|v| v * alpha_t).collect::<Vec<_>>();
    for batch in [1, 2, 7] {
        let z = noise(&[batch, 3, 16, 16], 5);
        let got = &run(&exported.bytes, vec![tvec![tensor(&z)?]])?[0];
        let expected = evaluate::x_gen(&checkpoint, &z, None)?;
        compare(&format!("batch {batch}"), &scaled(got), &scaled(&expected.data), GOLDEN)?;
    }
    Ok(())
}

/// Golden: `scripts/golden_ops.py`; every operation alone, evaluated and by tract from the exported operators.
#[test]
fn every_operation_matches_pytorch() -> Result<()> {
    let golden = Golden::load("ops")?;
    let operations = Operation::all(&golden)?;
    ensure!(operations.len() > 90, "got {} cases", operations.len());
    for operation in operations {
        let case = &operation.case;
        let tensor_of = |key: &str| array(&golden, &format!("{case}.{key}"));
        let mut weights = BTreeMap::new();
        for key in &operation.parameters {
            weights.insert(format!("layer.{key}"), tensor_of(key)?);
        }
        let inputs = operation.inputs.iter().map(|key| tensor_of(key)).collect::<Result<Vec<_>>>()?;
        let numbers = Array::new(&[operation.numbers.len()], operation.numbers.clone())?;
        let y = tensor_of("y")?;
        let tolerance = Tolerance { abs: 3e-5, rel: 1e-4 };

        let got = operation.run(&mut evaluate::Evaluate::new(&weights), &inputs, &numbers)?;
        compare(&format!("{case}, evaluated"), &got.data, &y.data, tolerance)?;
        ensure!(got.shape == y.shape, "{case}: got shape {:?}, expected {:?}", got.shape, y.shape);

        let mut exporter = Exporter::new(&weights);
        let names = ["first", "second", "third"];
        let mut values = Vec::new();
        let mut feed = tvec![];
        let given = if inputs.is_empty() { std::slice::from_ref(&numbers) } else { &inputs };
        for (name, array) in names.into_iter().zip(given) {
            if array.rows() == y.rows() {
                values.push(exporter.input(name, &array.shape[1..]));
                feed.push(tensor(array)?);
            } else {
                values.push(Value::Const(Known { array: array.clone(), name: name.into() }));
            }
        }
        let value = operation.run(&mut exporter, &values, &values[0])?;
        let Value::Flow(flow) = value else { anyhow::bail!("{case}: folded away") };
        let graph = exporter.graph.finish(&[flow.output("y")], None).graph;
        let got = &run_model(model_of(graph)?, vec![feed]).with_context(|| case.clone())?[0];
        compare(&format!("{case}, by tract"), got, &y.data, tolerance)?;
    }
    Ok(())
}

#[test]
fn the_generators_operators_are_these() -> Result<()> {
    let summary = export(&generator("tiny-class", 440, 1.0)?, Kind::Generator)?.summary;
    let operators: Vec<String> = summary.operators.iter().map(|(op, n)| format!("{op} {n}")).collect();
    let expected = "Add 27, AveragePool 2, BatchNormalization 27, Concat 6, Conv 49, ConvTranspose 2, Gather 11, \
        InstanceNormalization 27, MatMul 8, Mul 29, Reshape 70, Sigmoid 23, Softmax 4, Transpose 8";
    assert_eq!(operators.join(", "), expected);
    Ok(())
}

#[test]
fn the_time_and_class_paths_are_gone_from_the_generator() -> Result<()> {
    let checkpoint = generator("tiny-class", 440, 1.0)?;
    let exported = export(&checkpoint, Kind::Generator)?;
    let graph = tract_onnx::onnx().proto_model_for_read(&mut &exported.bytes[..])?.graph.context("graph")?;
    let stored: BTreeMap<&str, &[i64]> =
        graph.initializer.iter().map(|t| (t.name.as_str(), t.dims.as_slice())).collect();
    let gone = |name: &str| {
        ["time_embedding.", "class_embedding."].iter().any(|p| name.starts_with(p))
            || name.contains(".time_emb_proj.")
    };
    for (name, array) in &checkpoint.weights {
        let dims = stored.get(name.as_str());
        if gone(name) {
            ensure!(dims.is_none(), "`{name}` is stored");
        } else if name.ends_with("conv1.bias") {
            ensure!(dims == Some(&&[11, array.shape[0] as i64, 1, 1][..]), "`{name}`: {dims:?}");
        } else {
            let numbers = dims.with_context(|| format!("`{name}` is missing"))?.iter().product::<i64>();
            ensure!(numbers == array.data.len() as i64, "`{name}`: {dims:?}");
        }
    }
    Ok(())
}

#[test]
fn the_card_in_the_file_says_what_it_needs() -> Result<()> {
    let checkpoint = generator("tiny-class", 440, 1.0)?;
    let exported = export(&checkpoint, Kind::Generator)?;
    let proto = tract_onnx::onnx().proto_model_for_read(&mut &exported.bytes[..])?;
    ensure!((proto.ir_version, proto.opset_import.len(), proto.opset_import[0].version) == (10, 1, 18));
    let entry = proto.metadata_props.iter().find(|p| p.key == CARD_KEY).context("card")?;
    let card = ModelCard::from_json(&entry.value)?;
    ensure!(entry.value == serde_json::to_string(&exported.card)?);
    ensure!((card.kind, card.t_gen, card.image_shape()) == (Kind::Generator, Some(440), [1, 12, 12]));
    ensure!(card.alpha_t.is_some_and(|a| (a - 0.371).abs() < 1e-3), "{:?}", card.alpha_t);
    ensure!(card.provenance.name == "tiny-class" && card.schedule == checkpoint.schedule);
    ensure!(card.provenance.classes.as_ref().is_some_and(|c| c.count == 11));
    ensure!(export(&checkpoint, Kind::Generator)? == exported, "two exports differ");

    let base = self::checkpoint("tiny-class")?;
    let teacher = export(&base, Kind::Teacher)?.card;
    ensure!((teacher.kind, teacher.t_gen, teacher.alpha_t) == (Kind::Teacher, None, None));
    let network = summarise(&base.config)?;
    let enlarging = network.macs.iter().filter(|(name, _)| name.contains("upsamplers"));
    let saved = enlarging.map(|(_, macs)| macs * 3 / 4).sum::<u64>();
    ensure!(saved > 0 && teacher.macs == network.total_macs() - saved, "got {} MACs", teacher.macs);
    ensure!(card.macs < teacher.macs && card.parameters < teacher.parameters);
    Ok(())
}

/// Smaller weights: sizes and errors of the bundled generator, by both engines.
#[test]
fn smaller_files_draw_the_same_images() -> Result<()> {
    let checkpoint = Checkpoint::load(&dmd_tests::repository().join("assets/one-step-fashion"))?;
    let whole = export(&checkpoint, Kind::Generator)?;
    let (z, class) = (noise(&[16, 1, 28, 28], 3), (0..16).map(|k| k % 10).collect::<Vec<usize>>());
    let by_tract = |bytes: &[u8]| -> Result<Vec<f32>> {
        Ok(run(bytes, vec![tvec![tensor(&z)?, class_tensor(&class)?]])?.remove(0))
    };
    let by_ort = |bytes: &[u8]| -> Result<Vec<f32>> { Ok(by_onnxruntime(bytes, &[(&z, &class)])?.remove(0)) };
    let expected = by_tract(&whole.bytes)?;
    for (precision, size, error) in [(Precision::F16, 0.52, 2e-3), (Precision::Int8, 0.30, 2e-2)] {
        let exported = export_in(&checkpoint, Kind::Generator, &Form { precision, ..Form::default() })?;
        let share = exported.bytes.len() as f64 / whole.bytes.len() as f64;
        ensure!(share <= size, "{precision}: {share} of the size");
        ensure!(
            exported.card.dtype == precision.to_string() && exported.card.parameters == whole.card.parameters
        );
        let (tract, ort) = (by_tract(&exported.bytes)?, by_ort(&exported.bytes)?);
        for (engine, got) in [("tract", &tract), ("onnxruntime", &ort)] {
            let rms = |values: &mut dyn Iterator<Item = f32>| -> f64 {
                values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
            };
            let relative =
                rms(&mut got.iter().zip(&expected).map(|(a, b)| a - b)) / rms(&mut expected.iter().copied());
            ensure!(relative <= error, "{precision} by {engine}: {relative}");
            ensure!(relative > 1e-6, "{precision} by {engine}: as if it were f32");
        }
        compare(&format!("{precision} by both engines"), &ort, &tract, Tolerance { abs: 1e-3, rel: 0.0 })?;
    }
    Ok(())
}

/// By tract on the images that the exporter measures; with merged BatchNorm, transposed convolutions and bias tables.
#[test]
fn the_card_says_what_a_precision_costs() -> Result<()> {
    let bundled = Checkpoint::load(&dmd_tests::repository().join("assets/one-step-fashion"))?;
    for checkpoint in reference_networks()?.into_iter().chain([bundled]) {
        let exact = golden::reference(&checkpoint, Kind::Generator, 4)?;
        let mut feed = tvec![tensor(&exact.x)?];
        feed.extend(exact.class.as_deref().map(class_tensor).transpose()?);
        for precision in [Precision::F16, Precision::Int8] {
            let name = format!("{} in {precision}", checkpoint.provenance.name);
            let form = Form { precision, ..Form::default() };
            let exported = export_in(&checkpoint, Kind::Generator, &form)?;
            let got = run(&exported.bytes, vec![feed.clone()])?.remove(0);
            let squares =
                |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
            let error = squares(&mut got.iter().zip(&exact.output.data).map(|(g, e)| g - e));
            let relative = (error / squares(&mut exact.output.data.iter().copied())).sqrt();
            let card = &exported.card.provenance.metrics[&precision.to_string()];
            let recorded = card["rms_relative"].as_f64().context("rms_relative")?;
            ensure!((0.95..1.05).contains(&(recorded / relative)), "{name}: {relative}, card {recorded}");
        }
        ensure!(export(&checkpoint, Kind::Generator)?.card.provenance == checkpoint.provenance);
    }
    Ok(())
}

/// A bias merges into a convolution only for those who read the sum.
#[test]
fn a_convolution_that_is_also_read_without_the_bias_keeps_its_own() -> Result<()> {
    let weights = BTreeMap::from([
        ("conv.weight".to_owned(), Array::new(&[1, 1, 1, 1], vec![2.0])?),
        ("conv.bias".to_owned(), Array::new(&[1], vec![1.0])?),
    ]);
    let mut ops = Exporter::new(&weights);
    let x = ops.input("x", &[1, 1, 1]);
    let class = ops.class("class", 2);
    let spec = Conv2d { in_channels: 1, out_channels: 1, kernel: 1, stride: 1, padding: [0; 4] };
    let plain = ops.conv2d(&x, "conv", spec)?;
    let known = |data: Vec<f32>| -> Result<Known> {
        Ok(Known { array: Array::new(&[data.len(), 1], data)?, name: "bias".into() })
    };
    let biased = ops.add_bias(&plain, &Value::Const(known(vec![10.0])?))?;
    ensure!(matches!(class, Value::Table(_)));
    let by_class = ops.add_bias(&plain, &Value::Table(known(vec![100.0, 200.0])?))?;
    let sum = ops.concat(&plain, &biased)?;
    let Value::Flow(flow) = ops.concat(&sum, &by_class)? else { anyhow::bail!("folded away") };
    let graph = ops.graph.finish(&[flow.output("y")], None).graph;
    let feed = tvec![tensor(&Array::new(&[2, 1, 1, 1], vec![3.0, 5.0])?)?, class_tensor(&[1, 0])?];
    let got = run_model(model_of(graph)?, vec![feed])?;
    ensure!(got[0] == [7.0, 17.0, 207.0, 11.0, 21.0, 111.0], "{:?}", got[0]);
    Ok(())
}
