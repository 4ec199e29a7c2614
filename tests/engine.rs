//! The project's engine against tract: every kind, precision and form of exported files, with one image and with several.

use anyhow::{Result, ensure};
use dmd_core::card::{Classes, GeneratorConfig, Provenance};
use dmd_core::compare::Tolerance;
use dmd_core::noise::standard_normal;
use dmd_engine::message::Model;
use dmd_engine::{Input, Network};
use dmd_export::{Array, Checkpoint, Form, Kind, Precision, export_in};
use dmd_runtime_native::{Batch, ModelFile, Options, Provider};
use dmd_tests::{Golden, compare, fixture, repository, seeded};

/// As in tests/export.rs.
const GOLDEN: Tolerance = Tolerance { abs: 1e-4, rel: 0.0 };

/// Both fixtures, and the other two networks with weights from a seed.
fn networks() -> Result<Vec<Checkpoint>> {
    let golden = Golden::load("bases")?;
    let mut networks =
        vec![Checkpoint::load(&fixture("tiny-class"))?, Checkpoint::load(&fixture("tiny-ddpm"))?];
    for case in ["small-mnist", "small-celeba"] {
        let (config, seed) = seeded::case(&golden.cases()?[case])?;
        let weights = seeded::weights(&config, seed)?.into_iter();
        let weights = weights.map(|(name, t)| Ok((name, Array::new(&t.shape, t.data)?)));
        let weights = weights.collect::<Result<_>>()?;
        let classes = config.class_rows().map(|count| Classes { count, names: vec![], none: None });
        let provenance = Provenance { classes, ..Provenance::named(case) };
        let schedule = serde_json::from_str(r#"{"num_train_timesteps": 50}"#)?;
        networks.push(Checkpoint { config, weights, schedule, generator: None, provenance });
    }
    Ok(networks)
}

/// What the engine makes of `n` images.
fn by_engine(bytes: &[u8], n: usize, shape: &[usize], batch: &Batch) -> Result<Vec<f32>> {
    let model = Model::from_bytes(bytes.to_vec().into())?;
    let graph = model.graph.as_ref().expect("a graph");
    let names: Vec<String> = graph.input.iter().map(|input| input.name.clone()).collect();
    let (output, image, each) = (graph.output[0].name.clone(), [&[n], shape].concat(), [n]);
    let class: Vec<f32> = batch.class.iter().map(|&c| c as f32).collect();
    let (mut inputs, mut values): (Vec<_>, Vec<&[f32]>) = (vec![], vec![]);
    for name in &names {
        let (shape, value): (&[usize], &[f32]) = match name.as_str() {
            "class" => (&each, &class),
            "t" => (&each, batch.t),
            _ => (&image, batch.x),
        };
        inputs.push(Input { name, shape });
        values.push(value);
    }
    let network = Network::build(model, &inputs, &[&output])?;
    ensure!(network.output_shapes().eq([&image[..]]));
    Ok(network.run(&mut network.workspace(), &values)?[0].to_vec())
}

#[test]
fn every_file_computes_what_tract_computes() -> Result<()> {
    let options = Options { provider: Provider::Tract, threads: Some(1), ..Options::default() };
    let mut compared = 0;
    for mut network in networks()? {
        for kind in [Kind::Teacher, Kind::Generator] {
            let t_gen = network.schedule.num_train_timesteps * 2 / 5;
            network.generator =
                (kind == Kind::Generator).then_some(GeneratorConfig { t_gen, input_scale: 0.9 });
            let mut forms: Vec<Form> = [Precision::F32, Precision::F16, Precision::Int8]
                .map(|precision| Form { precision, ..Form::default() })
                .into();
            forms.push(Form { batch: Some(2), ..Form::default() });
            if kind == Kind::Generator {
                forms.push(Form { image: true, ..Form::default() });
            }
            for form in forms {
                let bytes = export_in(&network, kind, &form)?.bytes;
                let file = ModelFile::parse("file", bytes.clone())?;
                let shape = file.info.image_shape();
                let len: usize = shape.iter().product();
                let tract = dmd_runtime_native::Generator::load(file, &options)?;
                for n in form.batch.map_or(vec![1, 3], |n| vec![n]) {
                    let mut x = vec![0.0; n * len];
                    standard_normal(3, n as u64, &mut x);
                    let t: Vec<f32> = (0..n).map(|i| (7 * i + 1) as f32).collect();
                    let class: Vec<i64> = (0..n as i64).collect();
                    let batch = Batch { n, x: &x, t: &t, class: &class };
                    let what =
                        format!("{} {kind:?} {:?}, {n} images", network.provenance.name, form.precision);
                    compare(&what, &by_engine(&bytes, n, &shape, &batch)?, &tract.evaluate(&batch)?, GOLDEN)?;
                    compared += 1;
                }
            }
        }
    }
    ensure!(compared == 4 * (7 + 9), "{compared} comparisons");
    Ok(())
}

#[test]
fn threads_change_no_bit_of_the_bundled_generator() -> Result<()> {
    let bytes = std::fs::read(repository().join("assets/one-step-fashion.onnx"))?;
    let shape = ModelFile::parse("bundled", bytes.clone())?.info.image_shape();
    let mut x = vec![0.0; shape.iter().product()];
    standard_normal(3, 1, &mut x);
    let batch = Batch { n: 1, x: &x, t: &[0.0], class: &[7] };
    let on = |threads| -> Result<Vec<u32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let image = pool.install(|| by_engine(&bytes, 1, &shape, &batch))?;
        Ok(image.into_iter().map(f32::to_bits).collect())
    };
    let one = on(1)?;
    ensure!(one.len() == x.len() && on(2)? == one && on(3)? == one, "the image depends on the threads");
    Ok(())
}
