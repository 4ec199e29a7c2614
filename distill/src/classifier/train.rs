//! Training of a classifier: cross entropy, AdamW, a cosine of the learning rate, small shifts, averaged weights.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::{Device, Tensor};
use clap::Args;
use dmd_cli::files::temporary_folder;
use serde_json::{Map, json};

use super::{Classifier, ClassifierCard, ClassifierConfig, RANGE, forward, trainable};
use crate::data::{Dataset, FASHION_CLASSES, Loaded, Source, Split};
use crate::device;
use crate::error::{Error, Result};
use crate::network::Tensors;
use crate::optimiser::{AdamW, AdamWConfig, Ema};
use crate::progress::{Progress, handle_interrupts, stop_requested};
use crate::random::{Purpose, Random};

/// Images classified at once.
const BATCH: usize = 250;
/// Decay of the averaged weights.
const EMA: f64 = 0.998;

/// A classifier's training.
#[derive(Clone, Debug, Args)]
pub struct ClassifierArgs {
    /// Data set: `fashion-mnist`, or a folder as `teacher --data` takes it, with a part for training and one for tests
    #[arg(long, value_name = "NAME|DIR", default_value = "fashion-mnist")]
    pub data: String,
    /// Channels, height and width that the images are fitted to: those of the models to be judged
    #[arg(long, value_name = "CxHxW", default_value = "1x28x28", value_parser = shape)]
    pub shape: [usize; 3],
    /// Folder to create
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Passes over the training images
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub epochs: u64,
    /// Images per update
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub batch: usize,
    /// Learning rate after warm-up
    #[arg(long, value_name = "X", default_value_t = 2e-3)]
    pub lr: f64,
    /// Largest shift of a training image, in pixels
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub shift: usize,
    /// Training images to use [default: all]
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Seed of everything random
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u32,
    /// Where to compute
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value = "auto")]
    pub device: String,
}

/// `dmd-distill classifier`.
pub fn run(args: &ClassifierArgs) -> Result<()> {
    let device = device::parse(&args.device)?;
    check(args)?;
    let [train, test] =
        [Split::Train, Split::Test].map(|split| Source::find(&args.data, split)?.load(args.shape));
    let (Loaded { data: train, about, classes, .. }, Loaded { data: test, .. }) = (train?, test?);
    let count = train.labels.iter().max().map_or(0, |label| usize::from(*label) + 1);
    let classes = classes.unwrap_or_else(|| (0..count).map(|class| class.to_string()).collect());
    for data in [&train, &test] {
        data.check_labels(classes.len(), "classifier")?;
    }
    let config = ClassifierConfig::new(train.shape, classes.len())?;
    if train.len() < args.batch {
        return Err(Error::Request(format!(
            "got `--batch {}`, expected at most the {} training images of `{}`",
            args.batch,
            train.len(),
            args.data
        )));
    }
    handle_interrupts();
    dmd_cli::say!("on {}", device::name(&device));
    let started = Instant::now();
    let weights = fit(args, &config, &train, &device)?;
    let training = json!({
        "data": about, "images": train.len().min(args.limit.unwrap_or(train.len())),
        "epochs": args.epochs, "batch": args.batch, "lr": args.lr, "shift": args.shift, "ema": EMA,
        "seed": args.seed, "created_by": concat!("dmd-distill ", env!("CARGO_PKG_VERSION")),
    });
    let card = ClassifierCard {
        name: if classes == FASHION_CLASSES { "fashion-classifier" } else { "classifier" }.to_owned(),
        classes,
        training: training.as_object().cloned().unwrap_or_default(),
        metrics: Map::new(),
    };
    let mut classifier = Classifier::new(config, card, &weights, &device)?;
    let accuracy = accuracy(&classifier, &test, &device)?;
    classifier.card.metrics.insert("test_accuracy".to_owned(), json!(accuracy));
    classifier.save(&args.out)?;
    dmd_cli::say!(
        "classifier: {}, {:.2} % of the test images right, {:.0} s",
        args.out.display(),
        100.0 * accuracy,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

fn shape(text: &str) -> std::result::Result<[usize; 3], String> {
    let numbers: Option<Vec<usize>> = text.split('x').map(|n| n.parse().ok()).collect();
    numbers.and_then(|n| n.try_into().ok()).ok_or_else(|| "expected three numbers as in 3x32x32".to_owned())
}

fn check(args: &ClassifierArgs) -> Result<()> {
    if args.out.exists() {
        return Err(Error::content(&args.out, "it exists already\n\nhint: choose another `--out`"));
    }
    drop(temporary_folder(&args.out).map_err(Error::file("create", &args.out))?);
    if args.epochs == 0 || args.batch == 0 || args.limit.is_some_and(|n| n < args.batch) {
        return Err(Error::Request(
            "`--epochs` and `--batch` must be at least 1, and `--limit` at least `--batch`".into(),
        ));
    }
    match args.lr > 0.0 && args.lr < 1.0 {
        true => Ok(()),
        false => Err(Error::Request("`--lr` must lie between 0 and 1".into())),
    }
}

/// Trains and returns the averaged weights.
fn fit(args: &ClassifierArgs, config: &ClassifierConfig, data: &Dataset, device: &Device) -> Result<Tensors> {
    let initial = initial_weights(config, args.seed)?;
    let (parameters, variables) = trainable(&initial, device)?;
    let mut ema = Ema::new(EMA, 0, crate::checkpoint::snapshot(&parameters)?);
    let count = data.len().min(args.limit.unwrap_or(data.len()));
    let per_epoch = (count / args.batch) as u64;
    let total = args.epochs * per_epoch;
    let warmup = (total / 10).clamp(1, 100);
    let mut optimiser = AdamW::new(AdamWConfig::new(args.lr, warmup), &variables)?;
    let mut progress = Progress::new("classifier", 0, total);
    let (mut step, mut mean_loss) = (0, None);
    for epoch in 0..args.epochs {
        let order = Random::new(args.seed, Purpose::Order, epoch).permutation(count);
        for indices in order.chunks_exact(args.batch) {
            let mut random = Random::new(args.seed, Purpose::Augmentation, step);
            let indices: Vec<usize> = indices.iter().map(|i| *i as usize).collect();
            let x = shifted(&data.batch(&indices, RANGE, &Device::Cpu)?, args.shift, &mut random)?;
            let labels: Vec<u8> = indices.iter().map(|i| data.labels[*i]).collect();
            let (_, logits) = forward(config, &parameters, &x.to_device(device)?)?;
            let loss = cross_entropy(&logits, &labels)?;
            optimiser.config.lr =
                args.lr * (1.0 + (std::f64::consts::PI * step as f64 / total as f64).cos()) / 2.0;
            optimiser.step(&variables, &loss.backward()?)?;
            ema.update(&variables)?;
            step += 1;
            let loss = f64::from(loss.to_scalar::<f32>()?);
            let mean = mean_loss.map_or(loss, |mean: f64| 0.98 * mean + 0.02 * loss);
            mean_loss = Some(mean);
            progress.update(step, &format!("loss {mean:.4}"));
            if stop_requested() {
                return Err(Error::Interrupted(format!(
                    "stopped after step {step} of {total}; nothing is kept"
                )));
            }
        }
    }
    Ok(ema.tensors)
}

/// `−mean log softmax(logits)[label]`.
///
/// # Shapes
/// `logits`: `[n, classes]`; returns a scalar.
pub fn cross_entropy(logits: &Tensor, labels: &[u8]) -> Result<Tensor> {
    let (n, classes) = logits.dims2()?;
    let mut hot = vec![0.0f32; n * classes];
    for (row, label) in hot.chunks_exact_mut(classes).zip(labels) {
        match row.get_mut(usize::from(*label)) {
            Some(place) => *place = 1.0,
            None => return Err(Error::Request(format!("got label {label}, expected 0 to {}", classes - 1))),
        }
    }
    let hot = Tensor::from_vec(hot, (n, classes), logits.device())?;
    let centred = logits.broadcast_sub(&logits.max_keepdim(1)?.detach())?;
    let log_softmax = centred.broadcast_sub(&centred.exp()?.sum_keepdim(1)?.log()?)?;
    Ok(((log_softmax * hot)?.sum_all()? * (-1.0 / n as f64))?)
}

/// Every image moved by up to `most` pixels in each direction; black comes in.
fn shifted(x: &Tensor, most: usize, random: &mut Random) -> Result<Tensor> {
    let (n, c, h, w) = x.dims4()?;
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    let mut out = vec![RANGE[0]; values.len()];
    for (from, to) in values.chunks_exact(c * h * w).zip(out.chunks_exact_mut(c * h * w)) {
        let [dy, dx] = [0; 2].map(|_| random.below(2 * most + 1) as isize - most as isize);
        for row in 0..c * h {
            let source = (row % h) as isize + dy;
            for column in 0..w {
                let (y, x) = (source as usize, (column as isize + dx) as usize);
                if y < h && x < w {
                    to[row * w + column] = from[(row / h * h + y) * w + x];
                }
            }
        }
    }
    Ok(Tensor::from_vec(out, (n, c, h, w), x.device())?)
}

/// Uniform with variance 1/(fan in) for layers, 1 and 0 for normalisations; biases start at 0.
fn initial_weights(config: &ClassifierConfig, seed: u32) -> Result<Tensors> {
    let mut tensors = Tensors::new();
    for (i, (name, shape)) in config.summary()?.parameters.iter().enumerate() {
        let mut random = Random::new(seed, Purpose::Weights, i as u64);
        let count: usize = shape.iter().product();
        let values = match shape.as_slice() {
            [_] => vec![f32::from(name.ends_with(".weight")); count],
            [_, inner @ ..] => {
                let bound = (3.0 / inner.iter().product::<usize>() as f64).sqrt();
                (0..count).map(|_| ((random.unit() * 2.0 - 1.0) * bound) as f32).collect()
            }
            [] => Vec::new(),
        };
        tensors.insert(name.clone(), Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?);
    }
    Ok(tensors)
}

/// Share of images that get their label.
fn accuracy(classifier: &Classifier, data: &Dataset, device: &Device) -> Result<f64> {
    let mut right = 0;
    let all: Vec<usize> = (0..data.len()).collect();
    for indices in all.chunks(BATCH) {
        let (_, logits) = classifier.classify(&data.batch(indices, RANGE, device)?)?;
        let found = logits.argmax(1)?.to_vec1::<u32>()?;
        right += indices.iter().zip(found).filter(|(i, class)| u32::from(data.labels[**i]) == *class).count();
    }
    Ok(right as f64 / data.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    /// `∂/∂logits = (softmax − one hot)/n`, also where logits are large.
    #[test]
    fn cross_entropy_has_its_value_and_gradient() {
        let values = [0.3f32, -1.2, 2.0, 400.0, 390.0, 395.0];
        let logits = Var::from_tensor(&Tensor::from_slice(&values, (2, 3), &Device::Cpu).unwrap()).unwrap();
        let loss = cross_entropy(&logits, &[1, 0]).unwrap();
        let grads = loss.backward().unwrap();
        let got = grads.get(&logits).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut expected_loss = 0.0;
        for (row, label) in [1usize, 0].into_iter().enumerate() {
            let row_values: Vec<f64> = values[3 * row..][..3].iter().map(|v| f64::from(*v)).collect();
            let most = row_values.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = row_values.iter().map(|v| (v - most).exp()).sum();
            expected_loss -= (row_values[label] - most - sum.ln()) / 2.0;
            for i in 0..3 {
                let softmax = (row_values[i] - most).exp() / sum;
                let expected = (softmax - f64::from(u8::from(i == label))) / 2.0;
                assert!((f64::from(got[3 * row + i]) - expected).abs() < 1e-6);
            }
        }
        assert!((f64::from(loss.to_scalar::<f32>().unwrap()) - expected_loss).abs() < 1e-6);
        assert!(cross_entropy(&logits, &[1, 3]).is_err(), "a label beyond the classes");
    }

    #[test]
    fn a_shift_moves_whole_images_and_lets_black_in() {
        let x = Tensor::arange(1f32, 33.0, &Device::Cpu).unwrap().reshape((2, 1, 4, 4)).unwrap();
        let none = shifted(&x, 0, &mut Random::new(0, Purpose::Augmentation, 0)).unwrap();
        assert_eq!(
            none.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            (1..33).map(|v| v as f32).collect::<Vec<_>>()
        );
        for step in 0..20 {
            let moved = shifted(&x, 1, &mut Random::new(0, Purpose::Augmentation, step)).unwrap();
            let rows = moved.get(0).unwrap().get(0).unwrap().to_vec2::<f32>().unwrap();
            let (y, x) = (0..16).map(|i| (i / 4, i % 4)).find(|(y, x)| rows[*y][*x] == 6.0).unwrap();
            assert!((0..3).contains(&y) && (0..3).contains(&x), "pixel 6 was at 1, 1 and is at {y}, {x}");
            for i in 0..16usize {
                let (sy, sx) = ((i / 4 + 1).wrapping_sub(y), (i % 4 + 1).wrapping_sub(x));
                let expected = if sy < 4 && sx < 4 { (sy * 4 + sx + 1) as f32 } else { RANGE[0] };
                assert_eq!(rows[i / 4][i % 4], expected);
            }
        }
    }
}
