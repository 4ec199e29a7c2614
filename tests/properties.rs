//! What holds for every valid input, on inputs that nobody chose: schedules and samplers, noise, pixels, metrics, and for small networks
//! of any configuration that the exporter, folded and not, computes what training computes. The inputs are the same in every run;
//! `DMD_PROPERTY_ROUNDS=100` tries a hundred times as many.

#[expect(dead_code, reason = "one graph is built here")]
mod models;
#[expect(dead_code, reason = "one graph is built here")]
mod nodes;

use std::convert::Infallible;

use anyhow::{Result, anyhow, ensure};
use candle_core::Device;
use dmd_core::card::{Classes, GeneratorConfig, Provenance};
use dmd_core::config::{Block, ModelConfig, Resample, TimeShift, UNet2DConfig};
use dmd_core::net::{Activation, OneStep};
use dmd_core::noise::{slerp, standard_normal, step_noise};
use dmd_core::pixels::{Image, from_image, grid, to_image};
use dmd_core::sampler::{Sampler, Trajectory};
use dmd_core::schedule::{BetaSchedule, Prediction, Schedule, ScheduleConfig, Variance};
use dmd_distill::metrics::Features;
use dmd_distill::metrics::frechet::Gaussian;
use dmd_distill::metrics::kid::discrepancy;
use dmd_distill::metrics::neighbours::neighbours;
use dmd_distill::network::{Network, Tensors};
use dmd_engine::message::Model;
use dmd_engine::{Input, Network as Engine};
use dmd_export::{Array, Checkpoint, Kind, evaluate, export};
use dmd_runtime_native::{Batch, Generator, ModelFile, Options, Provider};
use dmd_tests::{compare_scaled, seeded};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{NodeProto, TensorProto};

use crate::models::{model, node, port};
use crate::nodes::{int, tensor, with};

/// Tries `cases` inputs, and shrinks the first that fails.
fn every<S: Strategy>(cases: u32, inputs: &S, holds: impl Fn(S::Value) -> Result<()>) -> Result<()> {
    let rounds =
        std::env::var("DMD_PROPERTY_ROUNDS").ok().map(|n| n.parse::<u32>()).transpose()?.unwrap_or(1);
    let config = Config { cases: cases * rounds, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let test = |input| holds(input).map_err(|e| TestCaseError::fail(format!("{e:#}")));
    runner.run(inputs, test).map_err(|e| anyhow!("{e}"))
}

fn schedules() -> impl Strategy<Value = ScheduleConfig> {
    let formula = prop_oneof![
        Just(BetaSchedule::Linear),
        Just(BetaSchedule::ScaledLinear),
        Just(BetaSchedule::SquaredcosCapV2)
    ];
    let prediction =
        prop_oneof![Just(Prediction::Epsilon), Just(Prediction::Sample), Just(Prediction::Velocity)];
    let variance = prop_oneof![Just(Variance::Small), Just(Variance::Large)];
    let betas = prop::option::weighted(0.2, prop::collection::vec(1e-4..0.2f64, 2..40));
    let ends = (1e-5..1e-2f64, 1e-3..0.05f64);
    (2..400usize, formula, ends, prediction, variance, prop::option::of(1.0..2.0f64), betas).prop_map(
        |(steps, beta_schedule, (start, more), prediction_type, variance_type, clip, trained_betas)| {
            let num_train_timesteps = trained_betas.as_ref().map_or(steps, Vec::len);
            let (beta_start, beta_end) = (start, start + more);
            ScheduleConfig {
                num_train_timesteps,
                beta_schedule,
                beta_start,
                beta_end,
                trained_betas,
                prediction_type,
                variance_type,
                clip,
            }
        },
    )
}

#[test]
fn every_schedule_adds_noise_step_by_step() -> Result<()> {
    every(200, &schedules(), |config| {
        ensure!(serde_json::from_str::<ScheduleConfig>(&serde_json::to_string(&config)?)? == config);
        let s = Schedule::new(&config);
        let n = s.num_train_timesteps();
        ensure!(n == config.num_train_timesteps && s.betas.iter().all(|beta| 0.0 < *beta && *beta < 1.0));
        ensure!(s.alphas_cumprod[0] < 1.0 && s.alphas_cumprod.windows(2).all(|w| w[0] > w[1] && w[1] > 0.0));
        for t in 0..n {
            let (alpha, sigma) = (s.alpha_t(t), s.sigma_t(t));
            ensure!((alpha * alpha + sigma * sigma - 1.0).abs() < 1e-12, "step {t}");
            let (x0, eps) = (0.7, -1.3);
            let (of_x0, of_eps) = s.prediction.target_factors(alpha, sigma);
            let (of_x_t, of_target) = s.prediction.x0_factors(alpha, sigma);
            let got = of_x_t * (alpha * x0 + sigma * eps) + of_target * (of_x0 * x0 + of_eps * eps);
            ensure!((got - x0).abs() < 1e-9 * (1.0 + sigma / alpha), "step {t}: {got}");
            let nearest = s.nearest_step(sigma / alpha);
            ensure!(nearest == t, "step {t} is nearest to {nearest}");
        }
        Ok(())
    })
}

/// Whoever asks a network that knows the image is led to it, by every sampler in any number of steps.
#[test]
fn every_sampler_follows_a_true_prediction_to_the_image() -> Result<()> {
    let sampler = prop_oneof![Just(Sampler::Ddim), Just(Sampler::Ddpm), Just(Sampler::Heun)];
    let inputs = (schedules(), sampler, 0.0..1.0f64, -1.0..1.0f32, any::<u32>());
    every(100, &inputs, |(config, sampler, share, x0, seed)| {
        let s = Schedule::new(&config);
        let steps = 1 + (share * (s.num_train_timesteps() - 1) as f64) as usize;
        let path = Trajectory::new(&s, sampler, steps, [-1.0, 1.0])?;
        let t: Vec<usize> = path.timesteps().collect();
        ensure!(t.len() == steps && t[0] + 1 == s.num_train_timesteps() && t.windows(2).all(|w| w[0] > w[1]));
        let (mut x, mut asked) = ([0.0f32; 3], 0);
        standard_normal(seed, 0, &mut x);
        let predict = |t: usize, x: &[f32]| {
            asked += 1;
            let (alpha, sigma) = (s.alpha_t(t), s.sigma_t(t));
            let (of_x0, of_eps) = s.prediction.target_factors(alpha, sigma);
            let of = |x: &f32| {
                let eps = (f64::from(*x) - alpha * f64::from(x0)) / sigma;
                (of_x0 * f64::from(x0) + of_eps * eps) as f32
            };
            Ok::<_, Infallible>(x.iter().map(of).collect())
        };
        path.run(&mut x, predict, |step, noise| step_noise(seed, 0, step, noise))?;
        ensure!(asked == path.evaluations(), "{asked} evaluations");
        // The last step divides rounding errors by its `alpha_t`.
        let allowed = 1e-3 + 2e-6 / s.alpha_t(t[steps - 1]) as f32;
        ensure!(x.iter().all(|x| (x - x0).abs() < allowed), "{x:?}, expected {x0}");
        Ok(())
    })
}

#[test]
fn noise_depends_on_its_place_alone() -> Result<()> {
    let inputs = (any::<u32>(), any::<u64>(), 0..1000usize, 1..64usize, 0..64usize, 0.0..=1.0f64);
    every(200, &inputs, |(seed, image, step, n, more, share)| {
        let (mut short, mut long) = (vec![0.0; n], vec![0.0; n + more]);
        standard_normal(seed, image, &mut short);
        standard_normal(seed, image, &mut long);
        // An odd end takes the cosine alone, which is also the first of its pair.
        ensure!(short[..] == long[..n] && long.iter().all(|v| v.abs() < 6.7));
        let mut other = vec![0.0; n];
        standard_normal(seed, image.wrapping_add(1), &mut other);
        ensure!(other != short, "two images are one");
        let mut fresh = vec![0.0; n];
        step_noise(seed, image, step, &mut fresh);
        ensure!(fresh != short && fresh != other, "noise of a step is that of an image");
        // Between images, whose angle is near a right one; few numbers can be opposites.
        let (mut short, mut other, mut between) =
            (vec![0.0; n + 200], vec![0.0; n + 200], vec![0.0; n + 200]);
        standard_normal(seed, image, &mut short);
        standard_normal(seed, image.wrapping_add(1), &mut other);
        slerp(&short, &other, share, &mut between);
        let length = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let ratio = length(&between) / length(&short).max(length(&other));
        ensure!((0.8..1.1).contains(&ratio), "the length became {ratio} times as large");
        for (share, end) in [(0.0, &short), (1.0, &other)] {
            slerp(&short, &other, share, &mut between);
            compare_scaled("an end", &between, end, 1e-5, 1e-5)?;
        }
        Ok(())
    })
}

#[test]
fn pixels_keep_every_level_and_every_place() -> Result<()> {
    let size = (1..4usize, 1..9usize, 1..9usize, 1..7usize, 1..9usize, 0..4usize);
    let inputs = (size, any::<u32>(), -2.0..0.5f32, 0.1..3.0f32);
    every(200, &inputs, |((channels, height, width, count, columns, gap), seed, lo, span)| {
        let shape = [channels, height, width];
        let mut values = vec![0.0; count * channels * height * width];
        standard_normal(seed, 0, &mut values);
        let each = values.chunks(channels * height * width);
        let images: Vec<Image> = each.map(|v| to_image(v, shape, [lo, lo + span])).collect();
        for (image, values) in images.iter().zip(values.chunks(channels * height * width)) {
            ensure!(to_image(&from_image(image, [lo, lo + span]), shape, [lo, lo + span]) == *image);
            let back = from_image(image, [lo, lo + span]);
            let step = span / 255.0 * 0.5001;
            let near = |(v, b): (&f32, &f32)| (v.clamp(lo, lo + span) - b).abs() <= step + 1e-6;
            ensure!(values.iter().zip(&back).all(near), "a pixel is off by more than half a level");
        }
        let sheet = grid(&images, columns, gap);
        let columns = columns.min(count);
        for (i, image) in images.iter().enumerate() {
            let (top, left) = (gap + i / columns * (height + gap), gap + i % columns * (width + gap));
            for y in 0..height {
                let at = ((top + y) * sheet.width + left) * channels;
                let row = y * width * channels..(y + 1) * width * channels;
                ensure!(sheet.data[at..at + width * channels] == image.data[row], "image {i}, row {y}");
            }
        }
        let covered = count * height * width;
        let white = sheet.data.chunks(channels).filter(|p| p.iter().all(|v| *v == 255)).count();
        ensure!(white + covered >= sheet.height * sheet.width, "something else is on the sheet");
        Ok(())
    })
}

/// Rows of features that are all different.
fn features(seed: u32, set: u64, count: usize, dimension: usize, shift: f32) -> Result<(Features, Features)> {
    let mut values = vec![0.0; count * dimension];
    standard_normal(seed, set, &mut values);
    values.iter_mut().for_each(|v| *v += shift);
    let turned: Vec<f32> = values.chunks(dimension).rev().flatten().copied().collect();
    Ok((Features::new(dimension, &values)?, Features::new(dimension, &turned)?))
}

#[test]
fn metrics_are_distances() -> Result<()> {
    let inputs = (any::<u32>(), 6..40usize, 6..40usize, 1..8usize, -3.0..3.0f32);
    every(100, &inputs, |(seed, n, m, dimension, shift)| {
        let (a, a_turned) = features(seed, 0, n, dimension, 0.0)?;
        let (b, b_turned) = features(seed, 1, m, dimension, shift)?;
        let (moved, _) = features(seed, 0, n, dimension, 2.0)?;
        let close = |got: f64, expected: f64| (got - expected).abs() <= 1e-6 * (1.0 + expected.abs());

        let frechet = |a: &Features, b: &Features| Gaussian::of(a)?.distance(&Gaussian::of(b)?);
        let distance = frechet(&a, &b)?;
        ensure!(distance > -1e-6 && close(frechet(&b, &a)?, distance), "{distance}");
        ensure!(close(frechet(&a_turned, &b_turned)?, distance), "the order of images matters");
        ensure!(close(frechet(&a, &a)?, 0.0) && close(frechet(&a, &moved)?, 4.0 * dimension as f64));

        let kid = discrepancy(&a, &b)?;
        ensure!(close(discrepancy(&b, &a)?, kid) && close(discrepancy(&a_turned, &b_turned)?, kid), "{kid}");

        let (there, back) = (neighbours(&a, &b)?, neighbours(&b, &a)?);
        ensure!(there.precision == back.recall && there.recall == back.precision, "{there:?} and {back:?}");
        ensure!(neighbours(&a_turned, &b_turned)? == there, "the order of images matters");
        let shares = [there.precision, there.recall, there.coverage];
        ensure!(shares.iter().all(|share| (0.0..=1.0).contains(share)) && there.density >= 0.0, "{there:?}");
        let same = neighbours(&a, &a_turned)?;
        ensure!([same.precision, same.recall, same.coverage] == [1.0; 3], "{same:?}");
        let far = neighbours(&a, &features(seed, 0, n, dimension, 1e4)?.0)?;
        ensure!([far.precision, far.recall, far.density, far.coverage] == [0.0; 4], "{far:?}");
        Ok(())
    })
}

/// U-Nets of up to three resolutions with every option there is, and few channels.
fn networks() -> impl Strategy<Value = UNet2DConfig> {
    let block = || prop_oneof![Just(Block::Plain), Just(Block::Attention), Just(Block::Resnet)];
    let level = (1..4usize, block(), block());
    let resample = || prop_oneof![Just(Resample::Conv), Just(Resample::Resnet)];
    let shift = prop_oneof![Just(TimeShift::Add), Just(TimeShift::ScaleShift)];
    let activation = prop_oneof![
        Just(Activation::Silu),
        Just(Activation::Gelu),
        Just(Activation::Relu),
        Just(Activation::Mish)
    ];
    let sizes =
        (prop::collection::vec(level, 1..4), 1..4usize, 1..3usize, prop_oneof![Just(1usize), Just(3)]);
    let attention = (any::<bool>(), prop_oneof![Just(None), Just(Some(2)), Just(Some(4))]);
    let numbers = (
        prop_oneof![Just(1usize), Just(2), Just(4)],
        prop_oneof![Just(1e-5), Just(1e-6), Just(1e-2)],
        prop_oneof![Just(1.0), Just(std::f64::consts::SQRT_2)],
        prop_oneof![Just(0.0), Just(1.0)],
        0..2usize,
        any::<bool>(),
    );
    let choices = (resample(), resample(), shift, activation, prop::option::of(1..5usize));
    (sizes, attention, numbers, choices).prop_map(|(sizes, attention, numbers, choices)| {
        let (levels, side, layers_per_block, channels) = sizes;
        let (norm_num_groups, norm_eps, mid_block_scale_factor, freq_shift, padding, flip) = numbers;
        let (downsample_type, upsample_type, resnet_time_scale_shift, activation, num_class_embeds) = choices;
        UNet2DConfig {
            // Never less than 2 by 2 pixels: what is left of the difference of one value and its own mean is rounding.
            sample_size: (side + 1) << (levels.len() - 1),
            in_channels: channels,
            out_channels: channels,
            block_out_channels: levels.iter().map(|(c, ..)| 4 * c).collect(),
            down_blocks: levels.iter().map(|(_, down, _)| *down).collect(),
            up_blocks: levels.iter().map(|(.., up)| *up).collect(),
            layers_per_block,
            add_attention: attention.0,
            attention_head_dim: attention.1,
            downsample_padding: padding,
            downsample_type,
            upsample_type,
            resnet_time_scale_shift,
            mid_block_scale_factor,
            activation,
            flip_sin_to_cos: flip,
            freq_shift,
            norm_num_groups,
            norm_eps,
            num_class_embeds,
        }
    })
}

/// What an exported file makes of its inputs, in the file's order, by the engine.
fn run(bytes: &[u8], inputs: &[(&[usize], &[f32])]) -> Result<Vec<f32>> {
    let model = Model::from_bytes(bytes.to_vec().into())?;
    let graph = model.graph.clone().unwrap_or_default();
    let named: Vec<Input> =
        graph.input.iter().zip(inputs).map(|(port, (shape, _))| Input { name: &port.name, shape }).collect();
    let network = Engine::build(model, &named, &[&graph.output[0].name])?;
    let values: Vec<&[f32]> = inputs.iter().map(|(_, values)| *values).collect();
    Ok(network.run(&mut network.workspace(), &values)?[0].to_vec())
}

/// The training engine, the exporter's unfolded evaluation and the folded file, for a base and for a generator.
#[test]
fn every_network_is_trained_evaluated_and_exported_alike() -> Result<()> {
    const N: usize = 2;
    every(24, &(networks(), schedules(), any::<u16>()), |(network, schedule, seed)| {
        let config = ModelConfig::UNet2D(network);
        ensure!(ModelConfig::from_json(&serde_json::to_string(&config)?)? == config);
        let weights = seeded::weights(&config, u64::from(seed))?;
        let t_gen = Schedule::new(&schedule).nearest_step(2.5);
        let generator = GeneratorConfig { t_gen, input_scale: 0.9 };
        let constants = OneStep::new(&generator, &Schedule::new(&schedule))?;
        let rows = config.class_rows();
        let classes = rows.map(|count| Classes { count, names: vec![], none: None });
        let checkpoint = |generator| -> Result<Checkpoint> {
            let weights = weights.iter().map(|(n, t)| Ok((n.clone(), Array::new(&t.shape, t.data.clone())?)));
            Ok(Checkpoint {
                config: config.clone(),
                schedule: schedule.clone(),
                generator,
                provenance: Provenance { classes: classes.clone(), ..Provenance::named("any") },
                weights: weights.collect::<Result<_>>()?,
            })
        };
        let cpu = Device::Cpu;
        let tensor = |shape: &[usize], data: &[f32]| candle_core::Tensor::from_slice(data, shape, &cpu);
        let tensors = weights.iter().map(|(name, t)| Ok((name.clone(), tensor(&t.shape, &t.data)?)));
        let tensors = tensors.collect::<Result<Tensors>>()?;
        let trained = Network::frozen(&config, &tensors, &cpu)?;

        let [c, h, w] = config.image_shape();
        let shape = [N, c, h, w];
        let mut x = Array::filled(&shape, 0.0);
        standard_normal(u32::from(seed), 0, &mut x.data);
        let last = schedule.num_train_timesteps - 1;
        let t = [last as f32, (last / 3) as f32];
        let class: Option<Vec<usize>> = rows.map(|rows| vec![0, rows - 1]);
        let numbers: Option<Vec<f32>> = class.as_ref().map(|all| all.iter().map(|c| *c as f32).collect());
        let class_tensor = class.as_ref().map(|all| all.iter().map(|c| *c as u32).collect::<Vec<_>>());
        let class_tensor = class_tensor.map(|all| candle_core::Tensor::new(all, &cpu)).transpose()?;
        let x_tensor = tensor(&shape, &x.data)?;
        let mut inputs: Vec<(&[usize], &[f32])> = vec![(&shape, &x.data), (&[N], &t)];
        inputs.extend(numbers.as_ref().map(|numbers| (&[N][..], &numbers[..])));

        for kind in [Kind::Teacher, Kind::Generator] {
            let (candle, unfolded, exported) = match kind {
                Kind::Teacher => {
                    let base = checkpoint(None)?;
                    let unfolded = evaluate::eps_pred(&base, &x, &t, class.as_deref())?;
                    (
                        trained.predict(&x_tensor, &tensor(&[N], &t)?, class_tensor.as_ref())?,
                        unfolded,
                        export(&base, kind)?,
                    )
                }
                Kind::Generator => {
                    inputs.remove(1);
                    let made = checkpoint(Some(generator.clone()))?;
                    let unfolded = evaluate::x_gen(&made, &x, class.as_deref())?;
                    (
                        trained.one_step(&constants, &x_tensor, class_tensor.as_ref())?,
                        unfolded,
                        export(&made, kind)?,
                    )
                }
            };
            let folded = run(&exported.bytes, &inputs)?;
            compare_scaled(&format!("{kind:?}, folded"), &folded, &unfolded.data, 1e-5, 1e-5)?;
            let candle = candle.flatten_all()?.to_vec1::<f32>()?;
            compare_scaled(&format!("{kind:?}, as trained"), &candle, &unfolded.data, 1e-5, 1e-5)?;
        }
        Ok(())
    })
}

/// The nodes of one operator, or of several that the engine makes one, from the values `a` and `b` to `to`; all of shape `[1, 2, 4, 4]`.
fn operator(kind: u8, a: &str, b: &str, to: &str) -> Vec<NodeProto> {
    let inner = format!("{to}.inner");
    match kind {
        0 => vec![node("Neg", &[a], to)],
        1 => vec![node("Sigmoid", &[a], to)],
        2 => vec![node("Relu", &[a], to)],
        3 => vec![node("Identity", &[a], to)],
        4 => vec![with(node("Cast", &[a], to), vec![int("to", DataType::Float as i64)])],
        5 => vec![node("Reshape", &[a, "image"], to)],
        6 => vec![node("Add", &[a, b], to)],
        7 => vec![node("Mul", &[a, b], to)],
        8 => vec![node("InstanceNormalization", &[a, "scale", "shift"], to)],
        9 => vec![node("BatchNormalization", &[a, "scale", "shift", "mean", "variance"], to)],
        10 => vec![node("Sigmoid", &[a], &inner), node("Mul", &[a, &inner], to)],
        11 => vec![node("Sigmoid", &[a], &inner), node("Mul", &[&inner, b], to)],
        _ => vec![node("InstanceNormalization", &[a, "ones", "zeros"], to)],
    }
}

/// Values that others read too, before and after, and under other names.
#[test]
fn every_graph_computes_what_tract_computes() -> Result<()> {
    let numbers = |name: &str, values: [f32; 2]| TensorProto {
        data_type: DataType::Float as i32,
        int64_data: vec![],
        float_data: values.to_vec(),
        ..tensor(name, &[2], &[])
    };
    let options = Options { provider: Provider::Tract, threads: Some(1), ..Options::default() };
    let shape = [1, 2, 4, 4];
    let mut x = vec![0.0; 32];
    standard_normal(8, 0, &mut x);
    let graphs =
        prop::collection::vec((0..14u8, any::<prop::sample::Index>(), any::<prop::sample::Index>()), 2..20);
    every(400, &graphs, |graph| {
        let mut names = vec!["z".to_owned()];
        let mut nodes = vec![];
        for (i, (kind, a, b)) in graph.iter().enumerate() {
            // Most read what was computed last, as networks do.
            let recent = names.len().saturating_sub(4);
            let (a, b) = (a.get(&names[recent..]).clone(), b.get(&names[recent..]).clone());
            let to = format!("v{i}");
            nodes.extend(operator(*kind, &a, &b, &to));
            names.push(to);
        }
        let [.., a, b] = &names[..] else { return Ok(()) };
        nodes.push(node("Add", &[a, b], "y"));
        let stored = vec![
            tensor("image", &[4], &[0, 2, 4, 4]),
            numbers("scale", [1.5, -0.5]),
            numbers("shift", [0.25, 1.0]),
            numbers("mean", [0.1, -0.2]),
            numbers("variance", [0.5, 2.0]),
            numbers("ones", [1.0, 1.0]),
            numbers("zeros", [0.0, 0.0]),
        ];
        let port = |name| vec![port(name, &["n", "2", "4", "4"], DataType::Float)];
        let bytes = model((port("z"), port("y")), nodes, stored, None);
        let tract = Generator::load(ModelFile::parse("any", bytes.clone())?, &options)?;
        let expected = tract.evaluate(&Batch { n: 1, x: &x, t: &[0.0], class: &[0] })?;
        compare_scaled("a graph", &run(&bytes, &[(&shape, &x)])?, &expected, 1e-3, 1e-3)
    })
}
