//! Perceptual distances against the Python package lpips (`scripts/golden_lpips.py`), and as a regression loss.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor, Var};
use dmd_distill::classifier::Classifier;
use dmd_distill::network::Tensors;
use dmd_distill::perceptual::{Lpips, Perceptual};
use dmd_tests::seeded::uniform;
use dmd_tests::{Golden, compare_scaled};

const CPU: Device = Device::Cpu;
/// Neighbouring pixels of an enlarged image nearly tie when the largest is kept: PyTorch's own f32 is 7e-4 away from its f64.
const ENLARGED: f32 = 1e-3;

type Shapes = BTreeMap<String, Vec<usize>>;

/// The networks of the golden file: shapes by name.
fn networks(golden: &Golden) -> Result<BTreeMap<String, Shapes>> {
    Ok(serde_json::from_value(golden.cases()?["weights"].clone())?)
}

fn weights(shapes: &Shapes) -> Result<Tensors> {
    let mut tensors = Tensors::new();
    for (stream, (name, shape)) in shapes.iter().enumerate() {
        let u = uniform(0, stream as u64, shape.iter().product()).into_iter();
        let scale = (6.0 / shape[1..].iter().product::<usize>() as f64).sqrt();
        let values: Vec<f32> = match shape.len() {
            _ if name.starts_with("lin") => u.map(|u| (0.5 + 0.5 * u) as f32).collect(),
            1 => u.map(|u| (0.1 * u) as f32).collect(),
            _ => u.map(|u| (scale * u) as f32).collect(),
        };
        tensors.insert(name.clone(), Tensor::from_vec(values, shape.as_slice(), &CPU)?);
    }
    Ok(tensors)
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

#[test]
fn lpips_matches_the_package_with_its_gradient() -> Result<()> {
    let golden = Golden::load("lpips")?;
    let (cases, networks) = (golden.cases()?["cases"].clone(), networks(&golden)?);
    ensure!(cases.as_object().is_some_and(|cases| cases.len() == 3), "{cases}");
    for (name, stream) in [("vgg", 0), ("alex", 2), ("grey", 4)] {
        let case = &cases[name];
        let shape: Vec<usize> = serde_json::from_value(case["images"].clone())?;
        let kind = case["network"].as_str().context("a case without network")?;
        let tensors = weights(networks.get(kind).context("no weights")?)?;
        let network = Lpips::new(&tensors, &CPU)?;
        let images = |stream: u64| -> Result<Tensor> {
            let values = uniform(1, stream, shape.iter().product()).into_iter().map(|u| u as f32);
            Ok(Tensor::from_vec(values.collect::<Vec<f32>>(), shape.as_slice(), &CPU)?)
        };
        let (x, y) = (Var::from_tensor(&images(stream)?)?, images(stream + 1)?);
        let expected = golden.f32(&format!("{name}.distances"))?;
        let mean = if case["side"] == 0 {
            let distances = network.distances(&x, &y)?;
            compare_scaled(name, &flat(&distances)?, &expected, 1e-5, 0.0)?;
            distances.mean_all()?
        } else {
            Perceptual::Lpips(Box::new(network)).distance(&x, &y, [-1.0, 1.0])?
        };
        let expected = expected.iter().sum::<f32>() / expected.len() as f32;
        compare_scaled(name, &[mean.to_scalar()?], &[expected], 1e-5, 0.0)?;
        let grads = mean.backward()?;
        let gradient = flat(grads.get(&x).context("no gradient")?)?;
        compare_scaled(
            &format!("{name} gradient"),
            &gradient,
            &golden.f32(&format!("{name}.gradient"))?,
            if case["side"] == 0 { 1e-4 } else { ENLARGED },
            0.0,
        )?;
    }
    Ok(())
}

#[test]
fn weights_that_do_not_fit_are_named() -> Result<()> {
    let golden = Golden::load("lpips")?;
    let networks = networks(&golden)?;
    let tensors = weights(networks.get("alex").context("no weights")?)?;
    let problem = |tensors: &Tensors| -> Result<String> {
        Ok(Lpips::new(tensors, &CPU).err().context("accepted")?.to_string())
    };
    let mut without = tensors.clone();
    without.remove("lin4.model.1.weight");
    ensure!(problem(&without)? == "there is no tensor `lin4.model.1.weight`", "{}", problem(&without)?);
    let mut vgg = tensors.clone();
    vgg.remove("features.0.weight");
    ensure!(problem(&vgg)?.contains("features.0.weight"), "{}", problem(&vgg)?);

    let folder = tempfile::tempdir()?;
    let empty = Lpips::load(folder.path(), &CPU).err().context("accepted")?.to_string();
    ensure!(empty.contains("features.0.weight") && empty.contains("vgg16-397923af.pth"), "{empty}");
    let (backbone, lin): (Tensors, Tensors) =
        tensors.into_iter().partition(|(name, _)| name.starts_with("features"));
    let write = |name: &str, tensors: &Tensors| {
        candle_core::safetensors::save(&hash_map(tensors), folder.path().join(name))
    };
    write("alexnet.safetensors", &backbone)?;
    write("alex.safetensors", &lin)?;
    Lpips::load(folder.path(), &CPU)?;
    write("other.safetensors", &lin)?;
    let twice = Lpips::load(folder.path(), &CPU).err().context("accepted")?.to_string();
    ensure!(twice.contains("two files have a tensor"), "{twice}");
    Ok(())
}

fn hash_map(tensors: &Tensors) -> std::collections::HashMap<String, Tensor> {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect()
}

/// On the bundled classifier: 0 for equal images, larger the more they differ, with a gradient that leads back.
#[test]
fn a_classifier_compares_images() -> Result<()> {
    let network = Perceptual::Classifier(Box::new(Classifier::bundled(&CPU)?));
    let numbers = |stream: u64| -> Result<Tensor> {
        let values = uniform(3, stream, 2 * 28 * 28).into_iter().map(|u| u as f32).collect::<Vec<f32>>();
        Ok(Tensor::from_vec(values, (2, 1, 28, 28), &CPU)?)
    };
    let (y, other) = (numbers(0)?, numbers(1)?);
    let near = Var::from_tensor(&((&y * 0.9)? + (&other * 0.1)?)?)?;
    let at = |x: &Tensor| -> Result<f32> { Ok(network.distance(x, &y, [-1.0, 1.0])?.to_scalar()?) };
    let (zero, small, large) = (at(&y)?, at(&near)?, at(&other)?);
    ensure!(zero.abs() < 1e-6 && small > 1e-4 && large > 2.0 * small, "{zero} {small} {large}");
    let loss = network.distance(&near, &y, [-1.0, 1.0])?;
    let grads = loss.backward()?;
    let gradient = grads.get(&near).context("no gradient")?;
    let step = 0.1 * small / gradient.sqr()?.sum_all()?.to_scalar::<f32>()?;
    let after = at(&(near.as_tensor() - (gradient * f64::from(step))?)?)?;
    let expected = 0.9 * small;
    ensure!((after - expected).abs() < 0.05 * small, "{small} became {after}, expected about {expected}");
    let unit_range =
        network.distance(&((near.as_tensor() + 1.0)? / 2.0)?, &((&y + 1.0)? / 2.0)?, [0.0, 1.0])?;
    ensure!((unit_range.to_scalar::<f32>()? - small).abs() < 1e-4 * small, "the range changes the distance");
    Ok(())
}
