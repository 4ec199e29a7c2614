//! The reference bases at full size, and small networks with every option, against PyTorch and diffusers: golden
//! `scripts/golden_bases.py`, weights from seeds.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use dmd_core::card::{Classes, Provenance};
use dmd_core::compare::Tolerance;
use dmd_core::config::ModelConfig;
use dmd_core::net::denoise;
use dmd_core::net::shapes::summarise;
use dmd_distill::network::{Engine, Network, Tensors};
use dmd_distill::ops::CandleOps;
use dmd_export::{Array, Checkpoint, Kind, export};
use dmd_runtime_native::{Batch, Generator, ModelFile, Options, Provider};
use dmd_tests::{Golden, compare, compare_gradient, seeded};

const CPU: Device = Device::Cpu;
/// The bound on predicted noise for training, and for exported files.
const ENGINE: Tolerance = Tolerance { abs: 2e-5, rel: 0.0 };
const EXPORTED: Tolerance = Tolerance { abs: 1e-4, rel: 0.0 };

fn cases() -> Result<(Golden, Vec<(String, serde_json::Value)>)> {
    let golden = Golden::load("bases")?;
    let cases = golden.cases()?.as_object().context("cases")?.clone();
    ensure!(cases.len() == 11, "{} cases", cases.len());
    Ok((golden, cases.into_iter().collect()))
}

fn tensor(golden: &Golden, name: &str) -> Result<Tensor> {
    Ok(Tensor::from_vec(golden.f32(name)?, golden.shape(name)?, &CPU)?)
}

fn whole(golden: &Golden, name: &str) -> Result<Option<Vec<u32>>> {
    if !golden.has(name) {
        return Ok(None);
    }
    Ok(Some(golden.i64(name)?.into_iter().map(u32::try_from).collect::<Result<_, _>>()?))
}

/// Step indices as f32.
fn steps(golden: &Golden, case: &str) -> Result<Vec<f32>> {
    Ok(whole(golden, &format!("{case}.t"))?.context("t")?.iter().map(|t| *t as f32).collect())
}

fn candle_weights(config: &ModelConfig, seed: u64) -> Result<Tensors> {
    let weights = seeded::weights(config, seed)?.into_iter();
    weights.map(|(name, t)| Ok((name, Tensor::from_vec(t.data, t.shape, &CPU)?))).collect()
}

#[test]
fn both_engines_match_pytorch_with_every_gradient() -> Result<()> {
    let (golden, cases) = cases()?;
    for (case, about) in cases {
        let (config, seed) = seeded::case(&about)?;
        let parameters = about["parameters"].as_u64().context("parameters")?;
        let summary = summarise(&config)?;
        ensure!(summary.parameter_count() as u64 == parameters, "{case}");
        let weights = candle_weights(&config, seed)?;
        let with_gradients = golden.has(&format!("{case}.cotangent"));
        let mut network = match with_gradients {
            true => Network::trainable(&config, &weights, &CPU)?,
            false => Network::frozen(&config, &weights, &CPU)?,
        };
        for engine in [Engine::Kernels, Engine::Compositions] {
            let what = format!("{case} by {engine:?}");
            network.engine = engine;
            let class = whole(&golden, &format!("{case}.class"))?;
            let class = class.map(|class| Tensor::new(class, &CPU)).transpose()?;
            let t = Tensor::new(steps(&golden, &case)?, &CPU)?;
            let eps_pred = network.predict(&tensor(&golden, &format!("{case}.x_t"))?, &t, class.as_ref())?;
            let expected = golden.f32(&format!("{case}.eps_pred"))?;
            compare(&what, &eps_pred.flatten_all()?.to_vec1()?, &expected, ENGINE)?;
            if !with_gradients {
                continue;
            }
            let loss = (eps_pred * tensor(&golden, &format!("{case}.cotangent"))?)?.mean_all()?;
            let gradients = loss.backward()?;
            let prefix = format!("{case}.grad.");
            let trained = |name: &&str| !summary.frozen.contains(*name);
            let names = golden.names_under(&prefix).filter(trained).count();
            ensure!(names == network.variables().len(), "{what}: {names} gradients");
            for (name, var) in network.variables() {
                let got = gradients.get(var).with_context(|| format!("{what}: no gradient of {name}"))?;
                let expected = golden.f32(&format!("{prefix}{name}"))?;
                compare_gradient(&what, name, &got.flatten_all()?.to_vec1()?, &expected, 1e-5)?;
            }
            for name in golden.names_under(&prefix).filter(|name| summary.frozen.contains(*name)) {
                let expected = golden.f32(&format!("{prefix}{name}"))?;
                ensure!(expected.iter().all(|v| *v == 0.0), "{what}: `{name}` is trained by PyTorch");
            }
        }
    }
    Ok(())
}

/// What GPUs use with images and parameters of 16 bits, here on the CPU. (candle convolves f16 there, not bf16; the
/// conversions are the same.)
#[test]
fn compositions_in_16_bits_are_near_pytorch() -> Result<()> {
    let (golden, cases) = cases()?;
    for (case, about) in cases.iter().filter(|(case, _)| case.starts_with("small")) {
        let (config, seed) = seeded::case(about)?;
        let weights = candle_weights(&config, seed)?;
        let class = whole(&golden, &format!("{case}.class"))?;
        let class = class.map(|class| Tensor::new(class, &CPU)).transpose()?;
        let t = Tensor::new(steps(&golden, case)?, &CPU)?;
        let x_t = tensor(&golden, &format!("{case}.x_t"))?;
        let expected = golden.f32(&format!("{case}.eps_pred"))?;
        let mut ops = CandleOps::new(&weights, &CPU).in_type(DType::F16);
        let eps_pred = denoise(&mut ops, &config, &x_t.to_dtype(DType::F16)?, &t, class.as_ref())?;
        ensure!(eps_pred.dtype() == DType::F16, "{case}: {:?}", eps_pred.dtype());
        let eps_pred = eps_pred.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        compare(case, &eps_pred, &expected, Tolerance { abs: 2e-2, rel: 0.0 })?;
    }
    Ok(())
}

#[test]
fn exported_teachers_match_pytorch_in_both_engines() -> Result<()> {
    let (golden, cases) = cases()?;
    for (case, about) in cases {
        let (config, seed) = seeded::case(&about)?;
        let weights = (seeded::weights(&config, seed)?.into_iter())
            .map(|(name, t)| Ok((name, Array::new(&t.shape, t.data)?)))
            .collect::<Result<_>>()?;
        let classes = config.class_rows().map(|count| Classes { count, names: vec![], none: None });
        let checkpoint = Checkpoint {
            config,
            schedule: serde_json::from_str(r#"{"num_train_timesteps": 1000}"#)?,
            generator: None,
            provenance: Provenance { classes, ..Provenance::named(case.clone()) },
            weights,
        };
        let x_t = golden.tensor(&format!("{case}.x_t"))?;
        let (t, n) = (steps(&golden, &case)?, x_t.shape[0]);
        let class = whole(&golden, &format!("{case}.class"))?.unwrap_or_else(|| vec![0; n]);
        let class: Vec<i64> = class.into_iter().map(i64::from).collect();
        let expected = golden.f32(&format!("{case}.eps_pred"))?;
        let bytes = export(&checkpoint, Kind::Teacher)?.bytes;
        for provider in [Provider::Engine, Provider::Tract, Provider::Cpu] {
            let options = Options { provider, threads: Some(2), ..Options::default() };
            let model = Generator::load(ModelFile::parse(&case, bytes.clone())?, &options)?;
            let got = model.evaluate(&Batch { n, x: &x_t.data, t: &t, class: &class })?;
            compare(&format!("{case} by {provider}"), &got, &expected, EXPORTED)?;
        }
    }
    Ok(())
}
