//! Metrics against numpy and scipy, the order in which they put worse and worse images, and `dmd-distill eval` and
//! `dmd-distill classifier` from outside, with everything they refuse.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use dmd_core::card::{Base, Classes, GeneratorConfig, Provenance};
use dmd_core::config::ModelConfig;
use dmd_distill::checkpoint::Checkpoint;
use dmd_distill::data::{Dataset, Split};
use dmd_distill::eval::inception::{self, Inception};
use dmd_distill::eval::{Extractor, Pictures, Scorer};
use dmd_distill::metrics::Features;
use dmd_distill::metrics::classes::{Predictions, total_variation};
use dmd_distill::metrics::frechet::Gaussian;
use dmd_distill::metrics::kid::{discrepancy, kid};
use dmd_distill::metrics::neighbours::neighbours;
use dmd_distill::network::{Tensors, initial_weights};
use dmd_tests::seeded::uniform;
use dmd_tests::{Finished, Golden, compare_scaled, interrupt_distill, refused, run_bin};
use safetensors::SafeTensors;
use serde_json::{Value, json};

fn near(what: &str, got: f64, expected: f64, relative: f64) -> Result<()> {
    ensure!(
        (got - expected).abs() <= relative * expected.abs(),
        "{what}: got {got:e}, expected {expected:e}"
    );
    Ok(())
}

/// Golden: `scripts/golden_metrics.py`. Neighbours are counted, so they agree exactly. Roots of eigenvalues near 0 of singular
/// covariances are worth less digits than the rest.
#[test]
fn metrics_match_numpy_and_scipy() -> Result<()> {
    let golden = Golden::load("metrics")?;
    for case in ["normal", "relu", "few"] {
        let load = |part: &str| -> Result<Features> {
            let name = format!("{case}.{part}.f64");
            Ok(Features::from_f64(golden.shape(&name)?[1], golden.f64(&name)?)?)
        };
        let (real, generated) = (load("real")?, load("generated")?);
        let expected = golden.f64(&format!("{case}.scores.f64"))?;
        let (a, b) = (Gaussian::of(&real)?, Gaussian::of(&generated)?);
        near(&format!("{case} frechet"), a.distance(&b)?, expected[0], 1e-7)?;
        near(&format!("{case} frechet, other way"), b.distance(&a)?, expected[0], 1e-7)?;
        near(&format!("{case} mmd"), discrepancy(&real, &generated)?, expected[1], 1e-10)?;
        let found = neighbours(&real, &generated)?;
        let found = [found.precision, found.recall, found.density, found.coverage];
        for (got, expected) in found.iter().zip(&expected[2..]) {
            near(&format!("{case} neighbours {found:?}"), *got, *expected, 1e-12)?;
        }
    }
    let expected = golden.f64("classes.scores.f64")?;
    let predictions = Predictions::new(10, &golden.f32("classes.logits")?)?;
    let other = Predictions::new(10, &golden.f32("classes.other")?)?;
    let asked: Vec<u32> = golden.i64("classes.asked")?.into_iter().map(|class| class as u32).collect();
    near("agreement", predictions.agreement(&asked), expected[0], 1e-12)?;
    near("entropy", predictions.entropy, expected[1], 1e-7)?;
    near("total variation", total_variation(&predictions.histogram, &other.histogram), expected[2], 1e-12)
}

/// The mean over subsets is the discrepancy of the whole, up to what subsets vary.
#[test]
fn kid_over_subsets_estimates_the_whole() -> Result<()> {
    let numbers = |seed: u64, shift: f64| {
        let values = uniform(seed, 0, 1500 * 8);
        Features::from_f64(8, values.into_iter().map(|v| v + shift).collect())
    };
    let (x, y) = (numbers(1, 0.0)?, numbers(2, 0.2)?);
    let (whole, found) = (discrepancy(&x, &y)?, kid(&x, &y)?);
    ensure!((found.mean - whole).abs() < found.std && found.std > 0.0, "{found:?} of {whole}");
    let same = kid(&x, &x)?;
    ensure!(same.mean.abs() < 0.1 * found.mean, "{same:?}");
    Ok(())
}

/// Golden: `scripts/golden_inception.py`. f32 through 94 layers against f64.
#[test]
fn inception_matches_pytorch_fid() -> Result<()> {
    let golden = Golden::load("inception")?;
    let mut names = BTreeMap::new();
    for (layer, [out, input, height, width]) in inception::shapes() {
        names.insert(format!("{layer}.conv.weight"), vec![out, input, height, width]);
        for suffix in ["weight", "bias", "running_mean", "running_var"] {
            names.insert(format!("{layer}.bn.{suffix}"), vec![out]);
        }
    }
    let mut tensors = Tensors::new();
    for (stream, (name, shape)) in names.iter().enumerate() {
        let u = uniform(0, stream as u64, shape.iter().product()).into_iter();
        let scale = (6.0 / shape[1..].iter().product::<usize>() as f64).sqrt();
        let values: Vec<f32> = match (shape.len(), name.rsplit('.').next()) {
            (1, Some("running_var")) => u.map(|u| (1.0 + 0.5 * u) as f32).collect(),
            (1, Some("weight")) => u.map(|u| (1.0 + 0.1 * u) as f32).collect(),
            (1, _) => u.map(|u| (0.1 * u) as f32).collect(),
            _ => u.map(|u| (scale * u) as f32).collect(),
        };
        tensors.insert(name.clone(), Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?);
    }
    let network = Inception::new(&tensors, String::new(), &Device::Cpu)?;
    let cases = golden.cases()?.as_object().context("cases")?;
    ensure!(cases.len() == 3, "{cases:?}");
    for (case, stream) in [("small", 0), ("uneven", 1), ("large", 2)] {
        let shape: Vec<usize> = serde_json::from_value(cases[case].clone())?;
        let u = uniform(1, stream, shape.iter().product());
        let values: Vec<f32> = u.into_iter().map(|u| 0.5 + 0.5 * u as f32).collect();
        let x = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?;
        let features: Vec<f32> = network.features(&x)?.flatten_all()?.to_vec1()?;
        compare_scaled(case, &features, &golden.f32(&format!("{case}.features"))?, 1e-4, 0.0)?;
    }
    let grey = Tensor::from_vec(vec![0.25f32; 64], (1, 1, 8, 8), &Device::Cpu)?;
    let colour = Tensor::cat(&[&grey, &grey, &grey], 1)?;
    let [grey, colour] = [grey, colour].map(|x| Ok(network.features(&x)?.flatten_all()?.to_vec1::<f32>()?));
    let (grey, colour): (Result<Vec<f32>>, Result<Vec<f32>>) = (grey, colour);
    ensure!(grey? == colour?, "grey images are images of three equal channels");
    ensure!(!network.is_published() && network.name().starts_with("inception-2048"), "{}", network.name());
    tensors.remove("Mixed_7c.branch_pool.bn.bias");
    let missing =
        Inception::new(&tensors, String::new(), &Device::Cpu).err().context("accepted")?.to_string();
    ensure!(missing.contains("Mixed_7c.branch_pool.bn.bias"), "{missing}");
    Ok(())
}

/// Images changed value by value or by their neighbours.
fn changed(of: &Pictures, noise: f64, blurs: usize) -> Pictures {
    let [_, h, w] = of.shape;
    let mut bytes = of.bytes.clone();
    for _ in 0..blurs {
        for image in bytes.chunks_exact_mut(h * w) {
            let old = image.to_vec();
            for (i, pixel) in image.iter_mut().enumerate() {
                let at = |dy: isize, dx: isize| {
                    let (y, x) = ((i / w) as isize + dy, (i % w) as isize + dx);
                    let inside = (0..h as isize).contains(&y) && (0..w as isize).contains(&x);
                    if inside { u32::from(old[y as usize * w + x as usize]) } else { 0 }
                };
                let around: u32 =
                    (-1..=1).flat_map(|dy| (-1..=1).map(move |dx| (dy, dx))).map(|(dy, dx)| at(dy, dx)).sum();
                *pixel = (around / 9) as u8;
            }
        }
    }
    if noise > 0.0 {
        let numbers = uniform(3, 0, bytes.len());
        bytes
            .iter_mut()
            .zip(numbers)
            .for_each(|(v, u)| *v = (f64::from(*v) + noise * u).clamp(0.0, 255.0) as u8);
    }
    Pictures { bytes, ..of.clone() }
}

fn fashion(split: Split) -> Result<Dataset> {
    Ok(Dataset::load("fashion-mnist", split, [1, 28, 28])?)
}

#[test]
fn scores_get_worse_with_noise_and_blur() -> Result<()> {
    let (train, test) = (fashion(Split::Train)?, fashion(Split::Test)?);
    let reference = Pictures::balanced(&train, 1000)?;
    let real = Pictures::balanced(&test, 1000)?;
    let scorer = Scorer::new(Extractor::find("bundled", &Device::Cpu)?, &reference)?;
    let itself = scorer.scores(&reference)?;
    ensure!(itself.frechet.abs() < 1e-4 && itself.class_tv == Some(0.0), "{itself:?}");
    ensure!(itself.kid < 0.0 && itself.precision == 1.0 && itself.coverage == 1.0, "{itself:?}");
    let floor = scorer.scores(&real)?;
    ensure!(floor.class_agreement.is_some_and(|share| share > 0.88), "{floor:?}");
    for path in [[(20.0, 0), (60.0, 0), (150.0, 0)], [(0.0, 1), (0.0, 2), (0.0, 4)]] {
        let mut last = floor;
        for (noise, blurs) in path {
            let next = scorer.scores(&changed(&real, noise, blurs))?;
            ensure!(
                next.frechet > last.frechet && next.kid > last.kid,
                "noise {noise}, blur {blurs}: {next:?}"
            );
            last = next;
        }
        ensure!(last.frechet > 10.0 * floor.frechet && last.recall < floor.recall, "{last:?} {floor:?}");
        ensure!(last.class_agreement < floor.class_agreement, "{last:?}");
    }
    let one_class = Pictures { bytes: real.bytes[..100 * 784].repeat(10), ..real.clone() };
    let collapsed = scorer.scores(&one_class)?;
    ensure!(collapsed.class_tv.is_some_and(|share| share > 0.5) && collapsed.recall < 0.3, "{collapsed:?}");
    Ok(())
}

fn distill(cwd: &Path, args: &[&str]) -> Result<Finished> {
    run_bin("dmd-distill", cwd, args)
}

/// An untrained network with the bundled base's image shape, as a base or as a generator.
fn untrained(seed: u32, generator: bool, base: Option<Base>) -> Result<Checkpoint> {
    let config = json!({
        "_class_name": "UNet2DModel", "sample_size": 28, "in_channels": 1, "out_channels": 1,
        "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 11,
        "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
    });
    let config = ModelConfig::from_json(&config.to_string())?;
    let classes = Classes { count: 10, names: vec![], none: Some(10) };
    Ok(Checkpoint {
        tensors: initial_weights(&config, seed)?,
        config,
        schedule: serde_json::from_value(
            json!({"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}),
        )?,
        generator: generator.then_some(GeneratorConfig { t_gen: 440, input_scale: 1.0 }),
        provenance: Provenance { classes: Some(classes), base, ..Provenance::named("tiny") },
        sha256: String::new(),
    })
}

/// A run folder with an untrained generator and teacher.
fn run_folder(parent: &Path) -> Result<PathBuf> {
    let run = parent.join("run");
    fs::create_dir_all(&run)?;
    untrained(1, true, None)?.save(&run.join("generator"))?;
    untrained(2, false, None)?.save(&run.join("teacher"))?;
    Ok(run)
}

const SMALL: [&str; 6] = ["--count", "80", "--steps", "2", "--json", "--undistilled"];

#[test]
fn a_run_is_scored_beside_its_teacher_and_the_floor() -> Result<()> {
    let folder = tempfile::tempdir()?;
    run_folder(folder.path())?;
    let eval = |model: &str| distill(folder.path(), &[&["eval", model][..], &SMALL].concat());
    let done = eval("run")?;
    ensure!(done.code == Some(0) && done.stderr.contains("mostly bias"), "{done:?}");
    let found: Value = serde_json::from_str(&done.stdout)?;
    let name = found["features"].as_str().context("no features")?;
    ensure!(name.starts_with("fashion-classifier-64 (") && found["distance"] == "Fréchet", "{found}");
    ensure!(found["count"] == 80 && found["steps"] == 2 && found["seed"] == 0, "{found}");
    for row in ["student", "teacher", "undistilled", "floor"] {
        for key in [
            "frechet",
            "kid",
            "kid_std",
            "precision",
            "recall",
            "density",
            "coverage",
            "class_agreement",
            "class_tv",
            "entropy",
        ] {
            ensure!(found[row][key].is_f64(), "{row}.{key} in {found}");
        }
    }
    let frechet = |row: &str| found[row]["frechet"].as_f64().unwrap_or(f64::NAN);
    ensure!(frechet("floor") > 0.0 && frechet("student") > 3.0 * frechet("floor"), "{found}");

    let cache = folder.path().join("eval");
    let shard = |name: &str| -> Result<PathBuf> {
        let inside = fs::read_dir(&cache)?.next().context("no cache")??.path();
        Ok(inside.join(name))
    };
    let written = fs::metadata(shard("shard-00000.safetensors")?)?.modified()?;
    let again = eval("run/generator")?;
    let same: Value = serde_json::from_str(&again.stdout)?;
    ensure!(same["teacher"] == found["teacher"] && same["student"] == found["student"], "{same}");
    ensure!(fs::metadata(shard("shard-00000.safetensors")?)?.modified()? == written, "drawn again");

    let mut bytes = fs::read(shard("shard-00000.safetensors")?)?;
    let end = bytes.len();
    bytes[end - 1] ^= 1;
    fs::write(shard("shard-00000.safetensors")?, &bytes)?;
    refused(
        &eval("run")?,
        &["shard-00000", "its pixels do not have the SHA-256 that it names", "hint: delete"],
    )?;
    for (name, tensor, problem) in [
        ("pictures", [1, 1, 28, 28], "there are no `images`"),
        ("images", [1, 1, 14, 14], "its images have shape [1, 1, 14, 14]"),
    ] {
        let tensor = Tensor::zeros(&tensor, DType::F32, &Device::Cpu)?;
        fs::write(shard("shard-00000.safetensors")?, safetensors::serialize([(name, &tensor)], None)?)?;
        refused(&eval("run")?, &["shard-00000", problem, "hint: delete"])?;
    }
    bytes.truncate(end / 2);
    fs::write(shard("shard-00000.safetensors")?, &bytes)?;
    refused(&eval("run")?, &["shard-00000", "not a complete safetensors file"])?;
    fs::write(
        shard("teacher.json")?,
        fs::read_to_string(shard("teacher.json")?)?.replace("trailing", "leading"),
    )?;
    refused(&eval("run")?, &["teacher.json", "another teacher"])
}

/// More images than were drawn before go on where those ended.
#[test]
fn a_base_alone_has_no_student_and_its_images_are_kept() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let run = run_folder(folder.path())?;
    let eval = |count: &str, cache: &str| -> Result<Value> {
        let args = ["eval", "run/teacher", "--count", count, "--steps", "1", "--json", "--cache", cache];
        let done = distill(folder.path(), &args)?;
        ensure!(done.code == Some(0), "{done:?}");
        Ok(serde_json::from_str(&done.stdout)?)
    };
    let found = eval("70", "parts")?;
    ensure!(found["student"].is_null() && found["teacher"]["kid"].is_f64(), "{found}");
    ensure!(eval("300", "parts")? == eval("300", "whole")?, "parts and whole differ");
    let images = |cache: &str| -> Result<Vec<Vec<u8>>> {
        let inside = fs::read_dir(folder.path().join(cache))?.next().context("no cache")??.path();
        let shards = (0..2).map(|i| inside.join(format!("shard-{i:05}.safetensors")));
        shards.filter(|shard| shard.exists()).map(|shard| Ok(fs::read(shard)?)).collect()
    };
    for (index, share) in ["0/2", "1/2"].into_iter().enumerate() {
        let line = "eval run/teacher --count 300 --steps 1 --cache shares --shard";
        let args: Vec<&str> = line.split(' ').chain([share]).collect();
        let done = distill(folder.path(), &args)?;
        let said = format!("{} images of share {share}", [256, 44][index]);
        ensure!(done.code == Some(0) && done.stderr.contains(&said) && done.stdout.is_empty(), "{done:?}");
        ensure!(images("shares")?.len() == index + 1, "a share drew the other's images");
    }
    let none = distill(folder.path(), &["eval", "run", "--teacher", "none", "--shard", "0/2"])?;
    refused(&none, &["`--shard` draws the images of a teacher, and there is none"])?;
    ensure!(images("shares")? == images("whole")?, "shares and whole differ");
    ensure!(eval("300", "shares")? == eval("300", "whole")?, "scores of shares and whole differ");
    // Ctrl-C keeps the batches that are done.
    let line = "eval run/teacher --count 256 --steps 40 --shard 0/1 --cache";
    let args = |cache| line.split(' ').chain([cache]).collect::<Vec<&str>>();
    ensure!(distill(folder.path(), &args("at once"))?.code == Some(0), "not drawn");
    let begun = || fs::read_dir(folder.path().join("stopped")).is_ok_and(|mut found| found.next().is_some());
    let done = interrupt_distill(folder.path(), args("stopped"), begun)?;
    ensure!(done.code == Some(130) && done.stderr.contains("finished images are kept"), "{done:?}");
    let kept = SafeTensors::deserialize(&images("stopped")?[0])?.tensor("images")?.shape()[0];
    ensure!(kept > 0 && kept < 256 && kept.is_multiple_of(64), "{kept} images were kept");
    ensure!(distill(folder.path(), &args("stopped"))?.code == Some(0), "not continued");
    ensure!(images("stopped")? == images("at once")?, "continued and drawn at once differ");
    fs::remove_dir_all(run.join("generator"))?;
    let done = distill(folder.path(), &["eval", "run", "--count", "70", "--steps", "1", "--cache", "parts"])?;
    ensure!(done.code == Some(0) && done.stdout.contains("teacher, 1 steps"), "{done:?}");
    ensure!(done.stdout.contains("floor") && !done.stdout.contains("student"), "{done:?}");
    Ok(())
}

/// Writes images as `dmd-run` does.
fn write_npy(path: &Path, shape: [usize; 4], values: &[f32]) -> Result<()> {
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape:?}, }}\n");
    let header = header.replace('[', "(").replace(']', ")");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.bytes());
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    Ok(fs::write(path, bytes)?)
}

#[test]
fn images_of_a_file_are_scored() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let test = fashion(Split::Test)?;
    let place = |k: usize| (0..test.len()).filter(|i| usize::from(test.labels[*i]) == k % 10).nth(k / 10);
    let order: Vec<usize> = (0..100).filter_map(place).collect();
    let values: Vec<f32> = order
        .iter()
        .flat_map(|i| &test.images[i * 784..(i + 1) * 784])
        .map(|v| f32::from(*v) / 127.5 - 1.0)
        .collect();
    let path = folder.path().join("x.npy");
    write_npy(&path, [100, 1, 28, 28], &values)?;
    let eval =
        |more: &[&str]| distill(folder.path(), &[&["eval", "--images", "x.npy", "--json"], more].concat());
    let done = eval(&["--count", "100", "--classes", "cycle"])?;
    let found: Value = serde_json::from_str(&done.stdout).with_context(|| format!("{done:?}"))?;
    ensure!(found["student"]["class_agreement"].as_f64().is_some_and(|share| share > 0.85), "{found}");
    ensure!(found["teacher"].is_null(), "{found}");
    let unknown: Value = serde_json::from_str(&eval(&["--count", "100"])?.stdout)?;
    ensure!(unknown["student"]["class_agreement"].is_null(), "{unknown}");
    refused(&eval(&["--count", "101"])?, &["x.npy", "100 images, expected 101"])?;
    refused(&eval(&["--count", "100", "--range", "1,-1"])?, &["--range"])?;
    write_npy(&path, [100, 1, 14, 56], &values)?;
    refused(&eval(&["--count", "100"])?, &["[1, 14, 56]", "[1, 28, 28]"])?;
    fs::write(&path, "no array")?;
    refused(&eval(&["--count", "100"])?, &["x.npy", "NumPy's format", "hint:"])?;
    fs::remove_file(&path)?;
    refused(&eval(&["--count", "100"])?, &["cannot read", "x.npy"])
}

#[test]
fn what_cannot_be_scored_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    run_folder(folder.path())?;
    let eval = |args: &[&str]| distill(folder.path(), &[&["eval"], args].concat());
    refused(&eval(&["run", "--count", "64"])?, &["--count 64", "64 features", "hint: take at least 640"])?;
    refused(&eval(&["run", "--data", "cifar"])?, &["`--data cifar`: there is no such folder", "hint:"])?;
    refused(&eval(&["run", "--data", "run"])?, &["there is no data set in it", "train-images-idx3-ubyte"])?;
    refused(&eval(&["run/teacher", "--undistilled", "--count", "70"])?, &["a generator and its teacher"])?;
    refused(&eval(&["run", "--features", "vgg"])?, &["no features `vgg`"])?;
    refused(&eval(&["run", "--features", "inception:none.pth"])?, &["cannot read `none.pth`"])?;
    fs::write(folder.path().join("some.safetensors"), [2, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'])?;
    refused(&eval(&["run", "--features", "inception:some.safetensors"])?, &["Conv2d_1a_3x3", "pytorch-fid"])?;
    refused(&eval(&["run", "--features", "run"])?, &["there is no `config.json`", "dmd-distill classifier"])?;
    refused(&eval(&["run", "--steps", "1001", "--count", "70"])?, &["--steps 1001", "1 to 1000"])?;
    refused(&eval(&["model.onnx"])?, &["does not run ONNX", "dmd-run", "--images"])?;
    refused(&eval(&["nowhere"])?, &["nowhere"])?;
    refused(&eval(&["run/teacher", "--teacher", "run/teacher"])?, &["is a base, no generator"])?;
    refused(&eval(&["run", "--count", "70000"])?, &["6000 images of class 0, expected 7000"])?;
    refused(&eval(&["--count", "70"])?, &["required"])?;

    let lost = Base { id: "ddpm-fashion".to_owned(), sha256: "0".repeat(64) };
    untrained(3, true, Some(lost))?.save(&folder.path().join("lone/generator"))?;
    refused(
        &eval(&["lone/generator", "--count", "70"])?,
        &["the teacher of `tiny` is not here", "`ddpm-fashion` with weights 00000000", "--teacher DIR"],
    )?;
    let done = eval(&["lone/generator", "--count", "70", "--teacher", "none", "--json"])?;
    ensure!(done.code == Some(0) && done.stdout.contains("\"teacher\": null"), "{done:?}");

    let mut digits = untrained(4, true, None)?;
    digits.provenance.classes = Some(Classes {
        count: 10,
        names: (0..10).map(|digit| format!("digit {digit}")).collect(),
        none: Some(10),
    });
    digits.save(&folder.path().join("digits/generator"))?;
    refused(
        &eval(&["digits/generator", "--count", "70", "--teacher", "none"])?,
        &["`tiny` draws digit 0 and others, fashion-mnist knows T-shirt/top and others", "--data DIR"],
    )?;

    let fixture = dmd_tests::fixture("tiny-class");
    let fixture = fixture.to_str().context("the path is not UTF-8")?;
    refused(&eval(&[fixture, "--count", "70"])?, &["[1, 12, 12]", "[1, 28, 28]"])
}

/// Other images than Fashion-MNIST, of another size, judged by a classifier of their own.
#[test]
fn other_data_is_judged_by_a_classifier_of_its_own() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (part, class) in [("train", 0u8), ("train", 1), ("test", 0), ("test", 1)] {
        let inside = folder.path().join(format!("shapes/{part}/{}", ["bars", "dots"][usize::from(class)]));
        fs::create_dir_all(&inside)?;
        for i in 0..48u32 {
            let bar = |x: u32, y: u32| if class == 0 { x % 4 < 2 } else { x % 4 < 2 && y % 4 < 2 };
            let value = |x, y| image::Luma([if bar(x + i, y) { 200 + (i % 40) as u8 } else { 20 }]);
            image::GrayImage::from_fn(12, 12, value).save(inside.join(format!("{i:02}.png")))?;
        }
    }
    fs::create_dir(folder.path().join("own.partial"))?;
    let line = "classifier --data shapes --shape 1x12x12 --out own --epochs 6 --batch 16 --seed 1";
    let done = distill(folder.path(), &line.split(' ').collect::<Vec<_>>())?;
    ensure!(done.code == Some(0) && folder.path().join("own.partial").is_dir(), "{done:?}");
    let card: Value = serde_json::from_slice(&fs::read(folder.path().join("own/card.json"))?)?;
    ensure!(card["classes"] == json!(["bars", "dots"]) && card["name"] == "classifier", "{card}");
    ensure!(card["metrics"]["test_accuracy"].as_f64().is_some_and(|share| share > 0.9), "{card}");
    let fixture = dmd_tests::fixture("tiny-class");
    let eval = |features: &str| {
        let mut args = vec!["eval", fixture.to_str().context("the path is not UTF-8")?];
        args.extend(["--data", "shapes", "--features", features]);
        args.extend("--count 80 --steps 1 --json".split(' '));
        distill(folder.path(), &args)
    };
    let done = eval("own")?;
    let found: Value = serde_json::from_str(&done.stdout).with_context(|| format!("{done:?}"))?;
    let [teacher, floor] = ["teacher", "floor"].map(|row| found[row]["frechet"].as_f64().unwrap_or(f64::NAN));
    ensure!(teacher > 1.0 && floor.abs() < 1e-3, "{found}");
    refused(&eval("bundled")?, &["[1, 12, 12]", "--data DIR --shape 1x12x12"])
}

#[test]
fn a_classifier_is_trained_saved_and_used() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let train = |out: &str| {
        let options = "--limit 2560 --epochs 2 --batch 32 --seed 3".split(' ').collect::<Vec<_>>();
        distill(folder.path(), &[&["classifier", "--out", out], options.as_slice()].concat())
    };
    for out in ["a", "b"] {
        let done = train(out)?;
        ensure!(done.code == Some(0) && done.stderr.contains("% of the test images right"), "{done:?}");
    }
    let read = |out: &str, file: &str| fs::read(folder.path().join(out).join(file));
    ensure!(
        read("a", "model.safetensors")? == read("b", "model.safetensors")?,
        "the same seed, other weights"
    );
    let card: Value = serde_json::from_slice(&read("a", "card.json")?)?;
    ensure!(card["metrics"]["test_accuracy"].as_f64().is_some_and(|share| share > 0.5), "{card}");
    refused(&train("a")?, &["exists already"])?;

    run_folder(folder.path())?;
    let args = ["eval", "run", "--features", "a", "--count", "70", "--steps", "1", "--json"];
    let found: Value = serde_json::from_str(&distill(folder.path(), &args)?.stdout)?;
    ensure!(found["features"] != "" && found["student"]["kid"].is_f64(), "{found}");
    let path = folder.path().join("a/config.json");
    fs::write(&path, fs::read_to_string(&path)?.replace("\"features\": 64", "\"features\": 32"))?;
    refused(&distill(folder.path(), &args)?, &["model.safetensors", "classes.weight", "[10, 64]"])?;
    fs::write(&path, "{}")?;
    refused(&distill(folder.path(), &args)?, &["config.json", "_class_name"])
}
