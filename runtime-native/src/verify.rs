//! Whether a model computes on this machine what its exporter says it must: its golden file, provider by provider.

use std::path::Path;
use std::time::Instant;

use dmd_core::card::{INPUT_CLASS, INPUT_T, Kind, ModelCard};
use dmd_core::compare::max_abs_diff;
use dmd_core::golden::{GOLDEN_KEY, GoldenInfo};
use dmd_core::noise::standard_normal;
use dmd_core::pixels::to_image;
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::file::{ModelFile, ModelInfo, Role};
use crate::{Batch, Error, Generator, Options, Provider, Result};

/// Runs whose shortest is the latency, after one that is compared.
const TIMED_RUNS: usize = 3;

/// What a verification found.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// What the golden file says about itself.
    pub golden: GoldenInfo,
    /// How the model stores its weights.
    pub dtype: String,
    /// What decides.
    pub limit: Limit,
    /// Values of the golden file's noise that differ from this program's, to the bit.
    pub noise_differs: usize,
    /// One for each provider.
    pub providers: Vec<Parity>,
    /// Whether noise and every provider passed.
    pub passed: bool,
}

/// The largest error allowed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Limit {
    /// Which of [`Numbers`]: `max_abs` or `rms_relative`.
    pub measure: &'static str,
    /// Its largest value.
    pub value: f64,
}

/// How one provider did.
#[derive(Clone, Debug, Serialize)]
pub struct Parity {
    /// The provider.
    pub provider: Provider,
    /// Its engine and version; empty if it failed.
    pub engine: String,
    /// What was measured, unless it failed.
    #[serde(flatten)]
    pub numbers: Option<Numbers>,
    /// Why it failed.
    pub error: Option<String>,
    /// Whether it is within the limit.
    pub passed: bool,
}

/// Differences between output and expectation.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Numbers {
    /// Largest absolute difference.
    pub max_abs: f64,
    /// Mean absolute difference.
    pub mean_abs: f64,
    /// Root mean square of the differences over that of the expectation.
    pub rms_relative: f64,
    /// Peak signal-to-noise ratio of images in dB, peak being the card's range; infinite (JSON: null) without difference.
    pub psnr: Option<f64>,
    /// Bytes of pictures that differ.
    pub pixels_differ: Option<usize>,
    /// Largest difference of such a byte.
    pub levels_apart: Option<u8>,
    /// Shortest of a few runs.
    pub ms_per_image: f64,
}

/// A golden file.
#[derive(Clone, Debug)]
pub struct Golden {
    info: GoldenInfo,
    name: String,
    x: Vec<f32>,
    t: Vec<f32>,
    class: Vec<i64>,
    expected: Vec<f32>,
}

impl Golden {
    /// Reads the golden file of a model.
    ///
    /// # Errors
    /// If it cannot be read, is no golden file, or is one of another model.
    pub fn read(path: &Path, model: &ModelFile) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        let name = format!("`{}`", path.display());
        let problem = |problem: String| Error::File { name: name.clone(), problem };
        let not_one = |e: &dyn std::fmt::Display| {
            problem(format!("{e}\n\nhint: `dmd-export --golden` writes golden files"))
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| not_one(&e))?;
        let text = header.metadata().as_ref().and_then(|entries| entries.get(GOLDEN_KEY));
        let text = text.ok_or_else(|| not_one(&format!("its metadata has no `{GOLDEN_KEY}`")))?;
        let info = GoldenInfo::from_json(text).map_err(|e| problem(e.to_string()))?;
        let sha256 = sha256(model)?;
        if info.sha256 != sha256 {
            return Err(problem(format!(
                "it is of a model `{}` with SHA-256 {}, but {} has {sha256}\n\nhint: export the model again with --golden",
                info.name, info.sha256, model.info.name
            )));
        }
        let file = SafeTensors::deserialize(&bytes).map_err(|e| not_one(&e))?;
        let [c, h, w] = model.info.image_shape();
        let tensor = |name: &str, dtype: Dtype, shape: &[usize]| {
            let view = file.tensor(name).map_err(|e| problem(e.to_string()))?;
            if view.dtype() != dtype || view.shape() != shape {
                let (got_dtype, got) = (view.dtype(), view.shape());
                return Err(problem(format!(
                    "`{name}` is {got_dtype:?} {got:?}, expected {dtype:?} {shape:?}"
                )));
            }
            Ok(view.data())
        };
        let floats = |name: &str, shape: &[usize]| -> Result<Vec<f32>> {
            let bytes = tensor(name, Dtype::F32, shape)?;
            Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        let (n, images) = (info.count, [info.count, c, h, w]);
        let input = |role| model.info.inputs.iter().find(|port| port.role == Some(role));
        let x = input(Role::Image).map_or("", |port| port.name.as_str());
        let (x, expected) =
            (floats(x, &images)?, floats(&model.info.outputs[model.info.output].name, &images)?);
        let t = if input(Role::Step).is_some() { floats(INPUT_T, &[n])? } else { vec![0.0; n] };
        let class = if model.info.takes_class() {
            let bytes = tensor(INPUT_CLASS, Dtype::I64, &[n])?;
            bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
        } else {
            vec![0; n]
        };
        Ok(Self { info, name, x, t, class, expected })
    }

    /// Values of the noise that are not those of the noise contract.
    fn noise_differs(&self) -> usize {
        let len = self.x.len() / self.info.count;
        let mut own = vec![0.0; len];
        let differ = |(k, x): (u64, &[f32])| {
            standard_normal(self.info.seed, k, &mut own);
            own.iter().zip(x).filter(|(own, x)| own.to_bits() != x.to_bits()).count()
        };
        (0..).zip(self.x.chunks(len)).map(differ).sum()
    }
}

/// Runs the model at `path` on each provider and compares.
///
/// # Errors
/// A provider that is not available, or a file that cannot be read. An engine that fails is a finding.
pub fn verify(
    path: &Path,
    golden: &Golden,
    providers: &[Provider],
    options: &Options,
) -> Result<Verification> {
    let file = ModelFile::read(path)?;
    let no_card =
        || Error::File { name: golden.name.clone(), problem: "its model has no model card".to_owned() };
    let card = file.info.card.as_ref().ok_or_else(no_card)?;
    let limit = limit(card);
    let mut parities = Vec::new();
    for provider in providers {
        let options = Options { provider: *provider, ..options.clone() };
        let attempt = || -> Result<Parity> {
            let model = Generator::load(ModelFile::read(path)?, &options)?;
            let numbers = measure(&model, golden)?;
            let value = if limit.measure == "max_abs" { numbers.max_abs } else { numbers.rms_relative };
            let choice = model.choice();
            Ok(Parity {
                provider: choice.provider,
                engine: choice.engine.clone(),
                numbers: Some(numbers),
                error: None,
                passed: value <= limit.value,
            })
        };
        parities.push(match attempt() {
            Err(error @ Error::Engine { .. }) => Parity {
                provider: *provider,
                engine: String::new(),
                numbers: None,
                error: Some(error.to_string()),
                passed: false,
            },
            other => other?,
        });
    }
    let noise_differs = golden.noise_differs();
    let passed = noise_differs == 0 && parities.iter().all(|parity| parity.passed);
    let (golden, dtype) = (golden.info.clone(), card.dtype.clone());
    Ok(Verification { golden, dtype, limit, noise_differs, providers: parities, passed })
}

/// f32 arithmetic may be off by 1e-4 in what the network predicts, which the last step multiplies by `sigma_t/alpha_t`
/// where that is more than 1; smaller weights are judged by the whole image, 8-bit
/// arithmetic by what the exporter measured.
fn limit(card: &ModelCard) -> Limit {
    let amplified = card.sigma_t.zip(card.alpha_t).map_or(1.0, |(sigma, alpha)| (sigma / alpha).max(1.0));
    match card.dtype.as_str() {
        "f16" => Limit { measure: "rms_relative", value: 2e-3 },
        "int8" => Limit { measure: "rms_relative", value: 2e-2 },
        "qdq" => Limit { measure: "rms_relative", value: 1.25 * measured(card).unwrap_or(0.0) },
        _ => Limit { measure: "max_abs", value: 1e-4 * amplified },
    }
}

/// What the exporter measured with simulated rounding on the images of a golden file.
fn measured(card: &ModelCard) -> Option<f64> {
    card.provenance.metrics.get(&card.dtype)?.get("rms_relative")?.as_f64()
}

fn measure(model: &Generator, golden: &Golden) -> Result<Numbers> {
    let Golden { x, t, class, expected, .. } = golden;
    let n = golden.info.count;
    let batch = Batch { n, x, t, class };
    let got = model.evaluate(&batch)?;
    if got.len() != expected.len() {
        let problem = format!("its output has {} values, expected {}", got.len(), expected.len());
        return Err(Error::File { name: model.info().name.clone(), problem });
    }
    let mut shortest = f64::INFINITY;
    for _ in 0..TIMED_RUNS {
        let start = Instant::now();
        model.evaluate(&batch)?;
        shortest = shortest.min(start.elapsed().as_secs_f64());
    }
    let info = model.info();
    let differences = || got.iter().zip(expected).map(|(g, e)| f64::from(*g) - f64::from(*e));
    let squares = differences().map(|d| d * d).sum::<f64>();
    let expected_squares = expected.iter().map(|e| f64::from(*e).powi(2)).sum::<f64>();
    let total = expected.len() as f64;
    let is_image = info.kind == Kind::Generator;
    let peak = f64::from(info.image.range[1] - info.image.range[0]);
    let levels = is_image.then(|| levels_apart(info, &got, expected));
    Ok(Numbers {
        max_abs: f64::from(max_abs_diff(&got, expected)),
        mean_abs: differences().map(f64::abs).sum::<f64>() / total,
        rms_relative: (squares / expected_squares).sqrt(),
        psnr: is_image.then(|| 10.0 * (peak * peak * total / squares).log10()),
        pixels_differ: levels.as_ref().map(|levels| levels.iter().filter(|l| **l > 0).count()),
        levels_apart: levels.as_ref().map(|levels| levels.iter().copied().max().unwrap_or(0)),
        ms_per_image: shortest * 1e3 / n as f64,
    })
}

fn levels_apart(info: &ModelInfo, got: &[f32], expected: &[f32]) -> Vec<u8> {
    let bytes = |values: &[f32]| -> Vec<u8> {
        let images = values.chunks(info.image_len());
        images.flat_map(|v| to_image(v, info.image_shape(), info.image.range).data).collect()
    };
    bytes(got).into_iter().zip(bytes(expected)).map(|(g, e)| g.abs_diff(e)).collect()
}

/// SHA-256 of the model file, followed by the files of its weights if they are outside.
fn sha256(model: &ModelFile) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(&model.bytes);
    for path in &model.info.data_files {
        let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.clone(), source })?;
        hash.update(&bytes);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
