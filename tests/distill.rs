//! Distillation against PyTorch: networks, operations, losses and a training trajectory, value by value.

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use dmd_core::card::GeneratorConfig;
use dmd_core::compare::Tolerance;
use dmd_core::config::ModelConfig;
use dmd_core::net::{OneStep, denoise};
use dmd_core::schedule::Schedule;
use dmd_distill::checkpoint::{Checkpoint, Source};
use dmd_distill::cpu::{self, CpuOps};
use dmd_distill::distillation::{Distillation, Start};
use dmd_distill::draws::{CriticDraws, GeneratorDraws, Input, Noise, PairBatch, RealBatch};
use dmd_distill::network::{Engine, Network, Tensors, initial_weights};
use dmd_distill::ops::CandleOps;
use dmd_distill::options::Recipe;
use dmd_distill::random::{Purpose, Random};
use dmd_distill::statistics::BatchStatistics;
use dmd_distill::train::DistillOptions;
use dmd_tests::operations::Operation;
use dmd_tests::{Golden, compare, compare_gradient, compare_scaled, fixture};

const CPU: Device = Device::Cpu;
/// What CPUs use, and what GPUs use.
const ENGINES: [Engine; 2] = [Engine::Kernels, Engine::Compositions];
/// Bound on predicted noise.
const EPS_PRED: Tolerance = Tolerance { abs: 1e-4, rel: 0.0 };
/// diffusers rounds the angles of the time embedding to f32, as we do, but after another exponential: at t = 999 the
/// two differ by up to 6e-5 (tests/golden/README.md).
const ANGLES_IN_F32: f32 = 1e-4;
/// The key bias of an attention has no effect; its gradient is rounding noise (tests/golden/README.md).
const WITHOUT_EFFECT: &str = "to_k.bias";

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

fn floats(golden: &Golden, name: &str) -> Result<Tensor> {
    Ok(Tensor::from_vec(golden.f32(name)?, golden.shape(name)?, &CPU)?)
}

fn indices(golden: &Golden, name: &str) -> Result<Vec<u32>> {
    golden.i64(name)?.into_iter().map(|v| u32::try_from(v).context("negative")).collect()
}

fn checkpoint(name: &str) -> Result<Checkpoint> {
    Ok(Checkpoint::load(&Source::Folder(fixture(name)))?)
}

/// Compares the gradient of every variable with `PREFIX.NAME`.
fn compare_gradients(
    what: &str,
    grads: &GradStore,
    network: &Network,
    golden: &Golden,
    prefix: &str,
) -> Result<()> {
    let count = golden.names_under(prefix).filter(|name| network.parameters().contains_key(*name)).count();
    ensure!(count == network.variables().len(), "{what}: {count} gradients");
    for (name, var) in network.variables() {
        let got = flat(grads.get(var).with_context(|| format!("no gradient for `{name}`"))?)?;
        compare_gradient(what, name, &got, &golden.f32(&format!("{prefix}{name}"))?, 1e-4)?;
    }
    Ok(())
}

#[test]
fn unet2d_matches_diffusers_with_every_gradient() -> Result<()> {
    for (folder, file) in [("tiny-ddpm", "unet_tiny_ddpm"), ("tiny-class", "unet_tiny_class")] {
        let (base, golden) = (checkpoint(folder)?, Golden::load(file)?);
        let mut network = Network::trainable(&base.config, &base.tensors, &CPU)?;
        let x_t = Var::from_tensor(&floats(&golden, "x_t")?)?;
        let t = floats(&golden, "timesteps")?;
        let class = match golden.has("class") {
            true => Some(Tensor::new(indices(&golden, "class")?, &CPU)?),
            false => None,
        };
        for engine in ENGINES {
            let what = format!("{file} by {engine:?}");
            network.engine = engine;
            let eps_pred = network.predict(&x_t, &t, class.as_ref())?;
            compare(&what, &flat(&eps_pred)?, &golden.f32("eps_pred")?, EPS_PRED)?;
            let grads = (eps_pred * floats(&golden, "cotangent")?)?.mean_all()?.backward()?;
            compare_gradients(&what, &grads, &network, &golden, "grad.")?;
            let got = flat(grads.get(&x_t).context("no gradient for x_t")?)?;
            compare_gradient(&what, "x_t", &got, &golden.f32("grad.x_t")?, 1e-4)?;
        }
    }
    Ok(())
}

#[test]
fn one_step_matches_diffusers() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-class")?, Golden::load("one_step")?);
    let mut network = Network::frozen(&base.config, &base.tensors, &CPU)?;
    let class = Tensor::new(indices(&golden, "class")?, &CPU)?;
    for engine in ENGINES {
        network.engine = engine;
        let x_gen = network.one_step(&generator(&base)?, &floats(&golden, "z")?, Some(&class))?;
        let tolerance = Tolerance { abs: 1e-4, rel: 1e-4 };
        compare(&format!("x_gen by {engine:?}"), &flat(&x_gen)?, &golden.f32("x_gen")?, tolerance)?;
    }
    Ok(())
}

fn generator(base: &Checkpoint) -> Result<OneStep> {
    let schedule = Schedule::new(&base.schedule);
    let config = GeneratorConfig { t_gen: 440, input_scale: 1.0 };
    Ok(OneStep::new(&config, &schedule)?)
}

/// How the values of a tensor lie in memory.
#[derive(Clone, Copy, Debug)]
enum Layout {
    Contiguous,
    /// First and last axis exchanged.
    Transposed,
    /// Among others.
    Narrowed,
}

impl Layout {
    /// A variable from which [`Self::view`] makes these values.
    fn var(self, values: &Tensor) -> Result<Var> {
        let last = values.rank() - 1;
        Ok(Var::from_tensor(&match self {
            Self::Contiguous => values.clone(),
            Self::Transposed => values.transpose(0, last)?.contiguous()?,
            Self::Narrowed => {
                let others = values.affine(-3.0, 5.0)?;
                Tensor::cat(&[&others, values, &others], last)?
            }
        })?)
    }

    fn view(self, stored: &Tensor) -> Result<Tensor> {
        let last = stored.rank() - 1;
        Ok(match self {
            Self::Contiguous => stored.clone(),
            Self::Transposed => stored.transpose(0, last)?,
            Self::Narrowed => stored.narrow(last, stored.dim(last)? / 3, stored.dim(last)? / 3)?,
        })
    }
}

/// Every case of `scripts/golden_ops.py` with the gradients of all its inputs, on both engines, wherever the inputs and the
/// gradient of the result lie in memory.
#[test]
fn operations_match_pytorch() -> Result<()> {
    let golden = Golden::load("ops")?;
    let operations = Operation::all(&golden)?;
    for operation in &operations {
        for engine in ENGINES {
            for layout in [Layout::Contiguous, Layout::Transposed, Layout::Narrowed] {
                run_with(&golden, operation, engine, layout, None)
                    .with_context(|| format!("{} by {engine:?}, {layout:?}", operation.case))?;
            }
        }
    }
    ensure!(operations.len() > 90, "only {} cases", operations.len());
    Ok(())
}

/// Every case of `scripts/golden_batch_norm.py` on both engines: BatchNorm by the statistics of its batch, with the running statistics
/// that follow.
#[test]
fn batch_norm_of_a_batch_matches_pytorch() -> Result<()> {
    let golden = Golden::load("batch_norm")?;
    let operations = Operation::all(&golden)?;
    for operation in &operations {
        for engine in ENGINES {
            let statistics = BatchStatistics::default();
            run_with(&golden, operation, engine, Layout::Contiguous, Some(&statistics))
                .with_context(|| format!("{} by {engine:?}", operation.case))?;
            let case = &operation.case;
            let names = ["running_mean", "running_var"];
            let read =
                |name: &str| Ok((format!("layer.{name}"), floats(&golden, &format!("{case}.{name}"))?));
            let mut running: Tensors = names.iter().map(|name| read(name)).collect::<Result<_>>()?;
            statistics.apply(&mut running)?;
            for name in names {
                let expected = golden.f32(&format!("{case}.after.{name}"))?;
                let got = flat(&running[&format!("layer.{name}")])?;
                compare_scaled(&format!("{case}, {name} by {engine:?}"), &got, &expected, 1e-5, 0.0)?;
            }
        }
    }
    ensure!(operations.len() > 8, "only {} cases", operations.len());
    Ok(())
}

/// The whole MNIST network as it is trained: both engines give the same prediction, gradients and running statistics. The
/// bias before a BatchNorm has no effect, its gradient is rounding noise.
#[test]
fn both_engines_train_the_mnist_network_alike() -> Result<()> {
    let config = ModelConfig::from_json(r#"{"_class_name":"ContextUnet","n_feat":8,"sample_size":12}"#)?;
    let weights = initial_weights(&config, 3)?;
    let mut random = Random::new(4, Purpose::Base, 0);
    let (x, cotangent) =
        (random.normal_tensor(&[5, 1, 12, 12], &CPU)?, random.normal_tensor(&[5, 1, 12, 12], &CPU)?);
    let t = Tensor::new(&[1f32, 40.0, 200.0, 399.0, 400.0], &CPU)?;
    let class = Tensor::new(&[0u32, 3, 9, 10, 10], &CPU)?;
    let mut network = Network::trainable(&config, &weights, &CPU)?.training_statistics();
    let prediction = network.predict(&x, &t, Some(&class))?;
    let grads = (&prediction * &cotangent)?.mean_all()?.backward()?;
    network.update_statistics()?;

    let other = Network::trainable(&config, &weights, &CPU)?;
    let statistics = BatchStatistics::default();
    let mut ops = CandleOps::new(other.parameters(), &CPU);
    ops.use_batch_statistics(statistics.clone());
    let expected = denoise(&mut ops, &config, &x, &t, Some(&class))?;
    compare("prediction", &flat(&prediction)?, &flat(&expected)?, Tolerance { abs: 1e-4, rel: 1e-4 })?;
    let expected_grads = (&expected * &cotangent)?.mean_all()?.backward()?;
    for ((name, var), (_, same)) in network.variables().iter().zip(other.variables()) {
        let [got, expected] =
            [grads.get(var), expected_grads.get(same)].map(|grad| grad.context("no gradient"));
        compare_scaled(name, &flat(got?)?, &flat(expected?)?, 1e-3, 1e-6)?;
    }
    let mut running = other.parameters().clone();
    statistics.apply(&mut running)?;
    let names: Vec<&String> = running.keys().filter(|name| name.contains(".running_")).collect();
    ensure!(names.len() == 28, "{names:?}");
    for name in names {
        ensure!(flat(&running[name])? != flat(&weights[name])?, "`{name}` did not move");
        compare_scaled(name, &flat(&network.parameters()[name])?, &flat(&running[name])?, 1e-4, 1e-6)?;
    }
    Ok(())
}

fn run_with(
    golden: &Golden,
    operation: &Operation,
    engine: Engine,
    layout: Layout,
    statistics: Option<&BatchStatistics>,
) -> Result<()> {
    let case = &operation.case;
    let read = |name: &&'static str, layout: Layout| -> Result<(&'static str, Var)> {
        Ok((*name, layout.var(&floats(golden, &format!("{case}.{name}"))?)?))
    };
    let named = operation.parameters.iter().map(|name| read(name, Layout::Contiguous));
    let named: Vec<(&str, Var)> = named.collect::<Result<_>>()?;
    let inputs = operation.inputs.iter().map(|name| read(name, layout));
    let inputs: Vec<(&str, Var)> = inputs.collect::<Result<_>>()?;
    let parameters: Tensors =
        named.iter().map(|(name, var)| (format!("layer.{name}"), var.as_tensor().clone())).collect();
    let tensors: Vec<Tensor> = inputs.iter().map(|(_, var)| layout.view(var)).collect::<Result<_>>()?;
    let shape = golden.shape(&format!("{case}.y"))?;
    let y = if engine == Engine::Kernels {
        let images: Vec<Tensor> = tensors.iter().map(as_images).collect::<Result<_>>()?;
        let (operation, statistics) = (operation.clone(), statistics.cloned());
        let run = move |ops: &mut CpuOps, inputs: &[cpu::Value]| {
            if let Some(statistics) = statistics {
                ops.use_batch_statistics(statistics);
            }
            let numbers = ops.numbers(&operation.numbers);
            operation.run(ops, inputs, &numbers)
        };
        cpu::apply(&images, &parameters, run)?.reshape(shape)?
    } else {
        let numbers = Tensor::new(operation.numbers.as_slice(), &CPU)?;
        let mut ops = CandleOps::new(&parameters, &CPU);
        if let Some(statistics) = statistics {
            ops.use_batch_statistics(statistics.clone());
        }
        operation.run(&mut ops, &tensors, &numbers)?
    };
    let bound = if operation.name() == "timestep_embedding" { ANGLES_IN_F32 } else { 1e-5 };
    compare_scaled(case, &flat(&y)?, &golden.f32(&format!("{case}.y"))?, bound, 0.0)?;
    if !golden.has(&format!("{case}.cotangent")) {
        return Ok(());
    }
    let cotangent = floats(golden, &format!("{case}.cotangent"))?;
    let last = cotangent.rank() - 1;
    let (y, cotangent) = match layout {
        Layout::Transposed => (y.transpose(0, last)?, cotangent.transpose(0, last)?),
        _ => (y, cotangent),
    };
    let grads = (y * cotangent)?.sum_all()?.backward()?;
    let layouts = inputs.iter().map(|input| (input, layout));
    let all = layouts.chain(named.iter().map(|parameter| (parameter, Layout::Contiguous)));
    for ((name, var), layout) in all.filter(|((name, _), _)| !name.starts_with("running")) {
        let got = grads.get(var).with_context(|| format!("no gradient of {name}"))?;
        let expected = golden.f32(&format!("{case}.grad.{name}"))?;
        compare_gradient(case, name, &flat(&layout.view(got)?)?, &expected, 1e-5)?;
    }
    Ok(())
}

/// Vectors become images of one pixel.
fn as_images(t: &Tensor) -> Result<Tensor> {
    Ok(match *t.dims() {
        [n, c] => t.reshape((n, c, 1, 1))?,
        _ => t.clone(),
    })
}

/// The tensors of one training step: `once.NAME`, or row `i` of `steps.NAME`.
struct Step<'a> {
    golden: &'a Golden,
    row: Option<usize>,
}

impl Step<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", if self.row.is_some() { "steps" } else { "once" })
    }

    fn floats(&self, name: &str) -> Result<Tensor> {
        let all = floats(self.golden, &self.key(name))?;
        Ok(match self.row {
            Some(row) => all.get(row)?,
            None => all,
        })
    }

    fn indices(&self, name: &str) -> Result<Vec<u32>> {
        let all = indices(self.golden, &self.key(name))?;
        Ok(match self.row {
            Some(row) => all.chunks_exact(3).nth(row).context("no such row")?.to_vec(),
            None => all,
        })
    }

    fn expected(&self, name: &str) -> Result<f32> {
        let all = self.golden.f32(&self.key(name))?;
        all.get(self.row.unwrap_or(0)).copied().context("no such row")
    }

    /// A loss or a norm, to 1e-4 relative.
    fn figure(&self, engine: Engine, name: &str, got: f64) -> Result<()> {
        let what = format!("{} by {engine:?}", self.key(name));
        compare(&what, &[got as f32], &[self.expected(name)?], Tolerance { abs: 0.0, rel: 1e-4 })
    }

    fn input(&self, z: &str, class: &str) -> Result<Input> {
        let class = Tensor::new(self.indices(class)?, &CPU)?;
        Ok(Input { z: self.floats(z)?, class: Some(class) })
    }

    fn noise(&self, t: &str, eps: &str) -> Result<Noise> {
        Ok(Noise { t: self.indices(t)?, eps: self.floats(eps)? })
    }

    fn generator(&self) -> Result<GeneratorDraws> {
        let pairs = PairBatch { input: self.input("z_ref", "class_ref")?, y: self.floats("y_ref")? };
        Ok(GeneratorDraws {
            input: self.input("z", "class")?,
            matching: self.noise("t", "eps")?,
            pairs: Some(pairs),
            adversarial: None,
        })
    }

    fn critic(&self) -> Result<CriticDraws> {
        Ok(CriticDraws { input: None, noise: self.noise("t_fake", "eps_fake")?, real: None })
    }
}

/// The options of `scripts/golden_losses.py`.
fn options(base: &Checkpoint) -> Result<DistillOptions> {
    let recipe = Recipe {
        batch: Some(3),
        lambda_reg: Some(0.5),
        lr: Some(1e-3),
        warmup: Some(1),
        fake_updates: Some(1),
        t_gen: Some("440".to_owned()),
        ..Recipe::default()
    };
    Ok(recipe.resolve("tiny-class", base)?)
}

/// A distillation of tiny-class at the goldens' weights, before its first update.
fn distillation<'a>(
    options: &'a DistillOptions,
    base: &Checkpoint,
    goldens: &[&Golden],
    engine: Engine,
) -> Result<Distillation<'a>> {
    let mut state = Distillation::new(options, base, Start::Base, &CPU)?.state(&Tensors::new())?;
    for golden in goldens {
        for name in ["generator.", "fake."]
            .iter()
            .flat_map(|role| golden.names().filter(move |name| name.starts_with(role)))
        {
            ensure!(state.insert(name.to_owned(), floats(golden, name)?).is_some(), "`{name}`");
        }
    }
    Ok(Distillation::new(options, base, Start::State(&state), &CPU)?.on(engine))
}

#[test]
fn the_three_losses_match_pytorch_with_every_gradient() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-class")?, Golden::load("losses")?);
    let options = options(&base)?;
    for engine in ENGINES {
        let work = distillation(&options, &base, &[&golden], engine)?;
        let step = Step { golden: &golden, row: None };
        let draws = step.generator()?;
        let (loss, mut update) = work.generator_loss(&draws)?;
        let x_gen = golden.f32("once.x_gen")?;
        compare_scaled("x_gen", &flat(&update.x_gen)?, &x_gen, 1e-4, 0.0)?;
        let class = draws.input.class.as_ref();
        let gradient = flat(&work.matching_gradient(&update.x_gen, class, &draws.matching)?)?;
        compare_scaled("dm_gradient", &gradient, &golden.f32("once.dm_gradient")?, 1e-4, 0.0)?;
        let critic = work.critic_loss(&step.critic()?, &mut update)?;
        step.figure(engine, "loss.dm", update.dm)?;
        step.figure(engine, "loss.reg", update.reg)?;
        step.figure(engine, "loss.critic", update.fake)?;
        for (role, network, loss) in [("generator", &work.generator, loss), ("fake", &work.fake, critic)] {
            let what = format!("{role} by {engine:?}");
            compare_gradients(&what, &loss.backward()?, network, &golden, &format!("grad.{role}."))?;
        }
    }
    Ok(())
}

/// Critic updates after the first see what the generator, as it has become, makes of fresh noise.
#[test]
fn later_critic_updates_follow_the_generator() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-class")?, Golden::load("losses")?);
    let options = options(&base)?;
    for engine in ENGINES {
        let mut work = distillation(&options, &base, &[&golden], engine)?;
        let step = Step { golden: &golden, row: None };
        let draws = step.generator()?;
        let constants =
            OneStep::new(&GeneratorConfig { t_gen: 440, input_scale: 1.0 }, &Schedule::new(&base.schedule))?;
        let class = draws.input.class.clone();
        let before = work.generator.one_step(&constants, &draws.input.z, class.as_ref())?;
        let mut update = work.update_generator(&draws)?;
        let after = work.generator.one_step(&constants, &draws.input.z, class.as_ref())?;
        let moved = (&after - &before)?.abs()?.max_all()?.to_scalar::<f32>()?;
        ensure!(moved > 1e-3, "the generator did not move: {moved}");
        let fresh = CriticDraws { input: Some(step.input("z", "class")?), ..step.critic()? };
        update.fake = 0.0;
        let got = work.critic_loss(&fresh, &mut update)?.to_scalar::<f32>()?;
        update.x_gen = after.detach();
        let expected = work.critic_loss(&step.critic()?, &mut update)?.to_scalar::<f32>()?;
        update.x_gen = before.detach();
        let stale = work.critic_loss(&step.critic()?, &mut update)?.to_scalar::<f32>()?;
        ensure!((got - expected).abs() <= 1e-6 * expected, "{engine:?}: {got}, expected {expected}");
        ensure!((stale - expected).abs() > 1e-5 * expected, "{engine:?}: cannot be told from {stale}");
    }
    Ok(())
}

/// DMD2's losses: `scripts/golden_adversarial.py`.
#[test]
fn the_adversarial_losses_match_pytorch_with_every_gradient() -> Result<()> {
    let base = checkpoint("tiny-class")?;
    let (golden, weights) = (Golden::load("adversarial")?, Golden::load("losses")?);
    let options = DistillOptions {
        gan_weight: 0.5,
        gan_weight_fake: 0.25,
        lambda_reg: 0.0,
        pairs: 0,
        ..options(&base)?
    };
    for engine in ENGINES {
        let work = distillation(&options, &base, &[&weights, &golden], engine)?;
        let step = Step { golden: &golden, row: None };
        let draws = GeneratorDraws {
            pairs: None,
            adversarial: Some(step.noise("t_adversarial", "eps_adversarial")?),
            ..step.generator()?
        };
        let real = RealBatch {
            images: step.floats("y_real")?,
            class: Some(Tensor::new(step.indices("class_real")?, &CPU)?),
            noise: step.noise("t_real", "eps_real")?,
        };
        let (loss, mut update) = work.generator_loss(&draws)?;
        let critic = work.critic_loss(&CriticDraws { real: Some(real), ..step.critic()? }, &mut update)?;
        step.figure(engine, "loss.dm", update.dm)?;
        step.figure(engine, "loss.adversarial", update.adversarial)?;
        step.figure(engine, "loss.critic", update.fake)?;
        step.figure(engine, "loss.discrimination", update.discrimination)?;
        for (role, network, loss) in [("generator", &work.generator, loss), ("fake", &work.fake, critic)] {
            let what = format!("{role} by {engine:?}");
            compare_gradients(&what, &loss.backward()?, network, &golden, &format!("grad.{role}."))?;
        }
    }
    Ok(())
}

/// On a bottleneck of 8 pixels the head halves once before it looks at the whole.
#[test]
fn the_discriminator_matches_pytorch_on_a_larger_bottleneck() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-ddpm")?, Golden::load("adversarial")?);
    let mut tensors = base.tensors.clone();
    for name in golden.names_under("ddpm.").filter(|name| name.starts_with("discriminator.")) {
        tensors.insert(name.to_owned(), floats(&golden, &format!("ddpm.{name}"))?);
    }
    let mut network = Network::trainable(&base.config, &tensors, &CPU)?;
    let x_t = Var::from_tensor(&floats(&golden, "ddpm.x_t")?)?;
    let t: Vec<f32> = golden.i64("ddpm.t")?.into_iter().map(|t| t as f32).collect();
    for engine in ENGINES {
        network.engine = engine;
        let logit = network.logit(&x_t, &Tensor::new(t.clone(), &CPU)?, None)?;
        let what = format!("logit by {engine:?}");
        compare_scaled(&what, &flat(&logit)?, &golden.f32("ddpm.logit")?, 1e-4, 0.0)?;
        let grads = logit.mean_all()?.backward()?;
        let got = flat(grads.get(&x_t).context("no gradient for x_t")?)?;
        compare_gradient(&what, "x_t", &got, &golden.f32("ddpm.gradient")?, 1e-4)?;
    }
    Ok(())
}

/// The updates that `dmd-distill` makes, on the golden's draws.
#[test]
fn ten_training_steps_match_pytorch() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-class")?, Golden::load("losses")?);
    let options = options(&base)?;
    for engine in ENGINES {
        let mut work = distillation(&options, &base, &[&golden], engine)?;
        for row in 0..10 {
            let step = Step { golden: &golden, row: Some(row) };
            let mut update = work.update_generator(&step.generator()?)?;
            work.update_critic(&step.critic()?, &mut update)?;
            step.figure(engine, "loss.dm", update.dm)?;
            step.figure(engine, "loss.reg", update.reg)?;
            step.figure(engine, "loss.critic", update.fake)?;
            step.figure(engine, "grad_norm.generator", update.norm)?;
            step.figure(engine, "grad_norm.fake", update.fake_norm)?;
        }
        for (role, network) in [("generator", &work.generator), ("fake", &work.fake)] {
            for (name, var) in network.variables().iter().filter(|(n, _)| !n.ends_with(WITHOUT_EFFECT)) {
                let expected = golden.f32(&format!("final.{role}.{name}"))?;
                compare_scaled(&format!("{name} by {engine:?}"), &flat(var)?, &expected, 1e-4, 0.0)?;
            }
        }
    }
    Ok(())
}
